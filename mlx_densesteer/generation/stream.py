"""Stream the response to one prompt: mlx-lm's tokens, with steering, stop texts and the brake."""

import contextlib
import time
from collections.abc import Generator, Iterator, Sequence
from typing import Protocol

import mlx.core as mx
from mlx_lm.generate import generate_step, speculative_generate_step
from mlx_lm.models.cache import KVCache

from ..errors import SteeringError
from ..model.block import additions
from ..model.marks import marks_of
from ..model.model import Model, takes_model
from ..model.prefix import Chunk, Prefix
from ..model.prompt import check_ids, encode_prompt
from ..steering.steering import Steering
from .answer import Generation, PartialAnswer, brake_answer, check_limits
from .brake import Brake, Braked
from .grammar import Grammar
from .logits import gave_up, processors
from .sampling import GREEDY, Sampler, Sampling
from .speculation import Draft
from .thought import LogitsProcessor, check_limit
from .wired import Wired


class Filling(Protocol):
    """The KV caches of a sequence: a ``prefix.Prefix``, or one rank's part of it."""

    caches: list[KVCache]

    def fill(
        self,
        chunks: Sequence[Chunk],
        steering: Steering | None,
        *,
        last: int,
        answering: bool = False,
    ) -> object:
        """Make the caches those of ``chunks`` under ``steering``."""

    def reset(self) -> None:
        """Forget everything."""


class Stream(Iterator[str]):
    """Iterate over the pieces of a response; ``result`` is the response so far.

    The first ``next`` reads the prompt. After an early end (``break``, Ctrl-C) ``result`` has the
    text so far and ``finish_reason="interrupted"``.

    Args:
        prefix: the caches to use; what they hold of the prompt is not read again.
        chunks: the prompt without its last token.
        last: that token.
        draft_prefix: the draft's caches.
        sampler: chooses the tokens; by default ``sampling``'s own sampler.
        think_limit: end a thought of so many tokens by force.
        grammar: what the answer has to match.
    """

    def __init__(
        self,
        model: Model,
        prefix: Filling,
        chunks: Sequence[Chunk],
        last: int,
        *,
        steering: Steering | None,
        max_tokens: int,
        sampling: Sampling,
        stop: Sequence[str],
        draft: Draft | None = None,
        draft_prefix: Prefix | None = None,
        brake: Brake | None = None,
        sampler: Sampler | None = None,
        think_limit: int | None = None,
        grammar: Grammar | None = None,
    ):
        check_limits(max_tokens, stop)
        check_limit(think_limit)
        if think_limit is not None:
            _ = marks_of(model.network).thought  # raises if the model has no such marks
        additions(model.network, steering)  # raises if it does not fit
        if draft is not None:
            if steering is not None and not steering.calls:
                raise SteeringError(
                    "a gate at tool calls does not go with a draft model: leave one of them out."
                )
            draft.check(model.tokenizer)
            draft_prefix = draft_prefix or Prefix(draft.model.network)
        self._model, self._prefix, self._draft_prefix = model, prefix, draft_prefix
        self._chunks, self._last = list(chunks), last
        tokens = [token for chunk in chunks for token in chunk.tokens] + [last]
        check_ids(tokens, model.vocabulary, "the prompt")
        self._prompt_tokens, self._ends = len(tokens), model.ends(tokens)
        self._steering, self._sampling, self._max_tokens = steering, sampling, max_tokens
        self._draft, self._brake = draft, brake
        self._sampler, self._grammar = sampler or sampling.sampler(), grammar
        self._finish = "interrupted"
        # Whether the caches hold what this stream fed them, and no part of a step.
        self._whole = False
        steered = steering is not None and not steering.is_zero
        self._opens_thought, self._think_limit = model.opens_thought(tokens), think_limit
        self._answer = PartialAnswer(
            model.tokenizer, brake if steered else None, stop, opens_thought=self._opens_thought
        )
        self._first_after = self._rate = 0.0
        self._peak = self._accepted = self._rounds = 0
        self._brakes: list[Braked] = []
        self._changes: list[LogitsProcessor] = []
        self._pieces = self._generate()

    def __next__(self) -> str:
        try:
            return next(self._pieces)
        except StopIteration:
            raise
        except BaseException:
            self._whole = False  # perhaps within a step: some blocks are ahead of others
            raise

    def keep_decoded(self) -> None:
        """Let the caches keep the answer, so that it need not be read again (``Prefix.keep_decoded``)."""
        if not self._whole:
            return
        tokens = (self._last, *self._answer.ids)
        self._prefix.keep_decoded(tokens)
        if self._draft is not None:
            [chunk] = self._draft.chunks([Chunk(tokens)])
            self._draft_prefix.keep_decoded(chunk.tokens)

    def close(self) -> None:
        """End the response now."""
        try:
            self._pieces.close()
        except BaseException:
            self._whole = False
            raise

    @property
    def result(self) -> Generation:
        drafted = self._draft is not None
        return Generation(
            text=self._answer.text,
            token_ids=tuple(self._answer.ids),
            prompt_tokens=self._prompt_tokens,
            tokens_per_second=self._rate,
            time_to_first_token=self._first_after,
            peak_memory_bytes=self._peak,
            finish_reason=self._finish,
            steering=self._steering,
            draft_accepted=self._accepted if drafted else None,
            draft_proposed=self._rounds * self._draft.tokens if drafted else None,
            brakes=tuple(self._brakes),
            thought_limit=self._think_limit,
            gave_up=gave_up(self._changes),
            **self._answer.parts,
        )

    @property
    def shown(self) -> tuple[str | None, str]:
        """Thought and answer, as far as the pieces so far have them."""
        return self._answer.shown

    def _generate(self) -> Generator[str, None, None]:
        """Yield text that is neither taken back later nor the beginning of a stop text."""
        if self._sampling.seed is not None:
            mx.random.seed(self._sampling.seed)
        mx.reset_peak_memory()
        began = time.perf_counter()
        while self._finish == "interrupted":
            with contextlib.closing(self._tokens()) as tokens:
                first, count = 0.0, 0
                for token in tokens:
                    now, count = time.perf_counter(), count + 1
                    first = first or now
                    self._first_after = self._first_after or now - began
                    self._rate = (count - 1) / (now - first) if count > 1 else 0.0
                    self._peak = mx.get_peak_memory()
                    if token in self._ends:
                        self._finish = "length" if gave_up(self._changes) else "stop"
                    else:
                        self._answer.add(token)
                        if len(self._answer.ids) == self._max_tokens:
                            self._finish = "length"
                    if self._finish != "interrupted":
                        self._answer.finalize()
                    if self._answer.stopped:
                        self._finish = "stop"
                    if self._finish != "interrupted" or self._answer.loop_start is not None:
                        break
                    if piece := self._answer.show():
                        yield piece
            if self._finish == "interrupted":
                self._slow_down()
        if piece := self._answer.show_rest():
            yield piece

    def _tokens(self) -> Generator[int, None, None]:
        """Read the prompt, and yield the tokens that follow it."""
        read, ids = [*self._chunks], self._answer.ids
        # After a brake also read the kept answer, from the last prompt token, whose output chose ids[0].
        # The loop below feeds ids[-1].
        if ids:
            read.append(Chunk((self._last, *ids[:-1]), answer=True))
        with self._computing():
            self._prefix.fill(read, self._steering, last=self._last, answering=bool(ids))
            if self._draft is not None:
                self._draft_prefix.fill(self._draft.chunks(read), None, answering=bool(ids))
            self._whole = True
            begin = mx.array([ids[-1] if ids else self._last], mx.uint32)
            network, caches = self._model.network, list(self._prefix.caches)
            options = {"max_tokens": self._max_tokens - len(ids), "sampler": self._sampler}
            options["logits_processors"] = self._changes = processors(
                network,
                ids,
                opened=self._opens_thought,
                skip=1,
                grammar=self._grammar,
                think_limit=self._think_limit,
            )
            if self._draft is None:
                for token, _ in generate_step(begin, network, prompt_cache=caches, **options):
                    yield int(token)
                return
            steps = speculative_generate_step(
                begin,
                network,
                self._draft.network(self._model.vocabulary),
                num_draft_tokens=self._draft.tokens,
                prompt_cache=[*caches, *self._draft_prefix.caches],
                **options,
            )
            new_round = True
            for token, _, from_draft in steps:
                self._accepted += from_draft
                self._rounds += new_round
                new_round = not from_draft  # the target's own token ends a round
                yield int(token)

    @contextlib.contextmanager
    def _computing(self) -> Iterator[None]:
        """Wire memory. After an error of the device forget the caches, which may then hold anything."""
        wired, broken = Wired(), False
        try:
            yield
        except Exception:
            broken = True
            raise
        finally:
            if not wired.close() or broken:
                for prefix in filter(None, (self._prefix, self._draft_prefix)):
                    prefix.reset()

    def _slow_down(self) -> None:
        """Cut off the loop, and lower the strength."""
        self._answer, self._steering, done = brake_answer(
            self._answer, self._steering, self._brake, len(self._brakes) + 1
        )
        self._brakes.append(done)


@takes_model
def stream(
    model: Model,
    prompt: str | Sequence[int],
    *,
    steering: Steering | None = None,
    system: str | None = None,
    raw: bool = False,
    special_tokens: bool = False,
    max_tokens: int = 2048,
    sampling: Sampling = GREEDY,
    stop: Sequence[str] = (),
    draft: Draft | None = None,
    brake: Brake | None = None,
    think_limit: int | None = None,
    grammar: Grammar | None = None,
) -> Stream:
    """Return an iterator over the pieces of the response, as text.

    At the end of the model's context the response ends (``finish_reason="length"``).

    Args:
        model: what ``load`` returns, or mlx-lm's pair of model and tokenizer.
        prompt: a user message (chat template), plain text (``raw``), or token ids.
        special_tokens: let the text of control tokens in a message be control tokens.
        steering: what to add to the residual stream; ``None`` is the stock model.
        stop: texts that end the response; they are not part of it.
        draft: speculative decoding; greedy decoding gives the same text with it, near ties aside.
        brake: cut off degenerate repetition, lower the strength and go on; ``None`` does not.
        think_limit: end a thought of so many tokens by force; the answer follows. ``Steering.budget`` only
            steers it towards its end.
        grammar: what the answer has to match (``json_grammar``).

    Raises:
        InputError: an empty prompt, a token that the model does not know, a conversation that the chat
            template refuses, an empty stop text, or ``max_tokens`` below 1.
        ModelError: the chat template cannot be used.
        ContextError: the prompt fills the model's context.
        VectorMismatchError, SteeringError: the steering cannot be applied.
    """
    model.check_length(prompt, system)
    tokens = encode_prompt(
        model.tokenizer, prompt, system=system, raw=raw, special_tokens=special_tokens
    )
    *rest, last = tokens
    return Stream(
        model, Prefix(model.network), [Chunk(tuple(rest))], last, steering=steering,
        max_tokens=model.room(len(tokens), max_tokens), sampling=sampling, stop=stop, draft=draft,
        brake=brake, think_limit=think_limit, grammar=grammar,
    )  # fmt: skip


@takes_model
def generate(model: Model, prompt: str | Sequence[int], **options: object) -> Generation:
    """Return the whole response; takes the arguments of ``stream``."""
    pieces = stream(model, prompt, **options)
    for _ in pieces:
        pass
    return pieces.result
