"""One prompt, a stream of tokens. mlx-lm generates; this adds steering, stops and counts."""

import contextlib
import time
from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass, replace

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.generate import GenerationResponse, stream_generate
from mlx_lm.sample_utils import make_sampler
from mlx_lm.tokenizer_utils import TokenizerWrapper

from ..distributed.pipeline import PipelinePrefix
from ..distributed.ranks import ALONE
from ..errors import ContextError, InputError
from ..model.block import deltas
from ..model.chunks import Chunk
from ..model.prefix import Prefix
from ..model.prompt import encode_prompt
from ..steering.steering import Steering
from .answer import PartialAnswer
from .brake import Brake, Braked
from .density import density, split_steps
from .speculation import Draft
from .stopping import check_limits

COLDEST = 1e-6  # a temperature below: 1 / temperature soon overflows float32


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen. Temperature 0 is greedy, as is what is next to it."""

    temp: float = 0.0
    top_p: float = 1.0
    seed: int | None = None

    def __post_init__(self) -> None:
        if not 0.0 <= self.temp < float("inf"):
            raise InputError(f"temperature {self.temp}: expected 0 (greedy) or more.")
        if self.temp < COLDEST:
            object.__setattr__(self, "temp", 0.0)
        if self.seed is not None and not 0 <= self.seed < 2**64:
            raise InputError(f"seed {self.seed}: expected a number from 0 to 2**64 - 1.")
        if not 0.0 < self.top_p <= 1.0:
            raise InputError(f"top-p {self.top_p}: expected a number above 0, at most 1.")


GREEDY = Sampling()


@dataclass(frozen=True)
class Generation:
    """A response, whole or so far.

    ``tokens`` counts what the model wrote, without the end-of-turn token but with those of a
    stop text; ``steps`` and ``density`` as in ``density.py``. Times in seconds,
    ``tokens_per_second`` of decoding alone, ``peak_memory_bytes`` as mlx counts it, weights
    included. ``finish_reason`` is ``"stop"`` (end of turn or a stop text), ``"length"``, or
    ``"interrupted"``. ``steering`` is the one in force at the end. With a draft model,
    ``draft_accepted`` of the ``draft_proposed`` tokens were the target's choice too. ``brakes``
    tells where repetition was cut off and the strength lowered.
    """

    text: str
    token_ids: tuple[int, ...]
    prompt_tokens: int
    tokens_per_second: float
    time_to_first_token: float
    peak_memory_bytes: int
    finish_reason: str
    steering: Steering | None = None
    draft_accepted: int | None = None
    draft_proposed: int | None = None
    brakes: tuple[Braked, ...] = ()

    @property
    def tokens(self) -> int:
        return len(self.token_ids)

    @property
    def steps(self) -> int:
        return len(split_steps(self.text))

    @property
    def density(self) -> float | None:
        return density(self.tokens, self.steps)


class Stream(Iterator[str]):
    """Iterate over the pieces of a response; ``result`` is what there is of it so far.

    Stopping early (``break``, Ctrl-C) loses nothing: ``result`` then ends with
    ``finish_reason="interrupted"``. The prompt is read when the first piece is asked for.

    Args:
        prefix: the caches to use; what they hold of the prompt is not read again.
        chunks: the prompt, its last token left out.
        last: that token.
        draft_prefix: the draft's caches, where there is a draft.
    """

    def __init__(
        self,
        model: nn.Module,
        tokenizer: TokenizerWrapper,
        prefix: Prefix | PipelinePrefix,
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
    ):
        check_limits(max_tokens, stop)
        deltas(model, steering)  # refuses what does not fit
        if draft is not None:
            draft.check(tokenizer)
            draft_prefix = draft_prefix or Prefix(draft.model)
        self._model, self._tokenizer = model, tokenizer
        self._prefix, self._draft_prefix = prefix, draft_prefix
        self._chunks, self._last = list(chunks), last
        self._steering, self._sampling, self._max_tokens = steering, sampling, max_tokens
        self._draft, self._brake = draft, brake
        self._finish = "interrupted"
        watched = steering is not None and steering.strength != 0
        self._answer = PartialAnswer(tokenizer, brake if watched else None, tuple(stop))
        self._first: float | None = None
        self._rate, self._peak = 0.0, 0
        self._accepted = self._rounds = 0
        self._new_round = True
        self._brakes: list[Braked] = []
        self._pieces = self._generate()

    def __next__(self) -> str:
        return next(self._pieces)

    def close(self) -> None:
        """End the generation now; ``result`` keeps what was said."""
        self._pieces.close()

    @property
    def result(self) -> Generation:
        drafted = self._draft is not None
        return Generation(
            text=self._answer.text,
            token_ids=tuple(self._answer.ids),
            prompt_tokens=sum(len(chunk.tokens) for chunk in self._chunks) + 1,
            tokens_per_second=self._rate,
            time_to_first_token=self._first or 0.0,
            peak_memory_bytes=self._peak,
            finish_reason=self._finish,
            steering=self._steering,
            draft_accepted=self._accepted if drafted else None,
            draft_proposed=self._rounds * self._draft.tokens if drafted else None,
            brakes=tuple(self._brakes),
        )

    def _generate(self) -> Generator[str, None, None]:
        """Yield text that will not be taken back and cannot be the beginning of a stop text."""
        if self._sampling.seed is not None:
            mx.random.seed(self._sampling.seed)
        mx.reset_peak_memory()
        began = time.perf_counter()
        while self._finish == "interrupted":
            with contextlib.closing(self._responses()) as responses:
                for response in responses:
                    if self._first is None:
                        self._first = time.perf_counter() - began
                    self._take(response)
                    if self._answer.stopped:
                        self._finish = "stop"
                        break
                    if self._answer.loop_start is not None:
                        break
                    if response.finish_reason:
                        self._finish = response.finish_reason
                        break
                    if piece := self._answer.show():
                        yield piece
            if self._finish == "interrupted":
                self._slow_down()
        if piece := self._answer.show_rest():
            yield piece

    def _responses(self) -> Generator:
        """Read what is not read yet, and return mlx-lm's stream of what follows."""
        read = [*self._chunks]
        ids = self._answer.ids
        if ids:  # after a brake: the kept beginning of the answer
            read.append(Chunk((self._last, *ids[:-1]), answer=True))
        self._prefix.fill(read, self._steering, answering=bool(ids))
        caches, self._new_round = list(self._prefix.caches), True
        options = {}
        sampler = make_sampler(temp=self._sampling.temp, top_p=self._sampling.top_p)
        if self._draft is not None:
            drafting = self._draft.steering(self._steering)
            self._draft_prefix.fill(read, drafting, answering=bool(ids))
            caches += self._draft_prefix.caches
            options = {"draft_model": self._draft.model, "num_draft_tokens": self._draft.tokens}
        return stream_generate(
            self._model,
            self._tokenizer,
            [ids[-1] if ids else self._last],
            max_tokens=self._max_tokens - len(ids),
            sampler=getattr(self._model, "ranks", ALONE).agree(sampler),
            prompt_cache=caches,
            **options,
        )

    def _take(self, response: GenerationResponse) -> None:
        if response.token not in self._tokenizer.eos_token_ids:
            self._answer.add(response.token)
        if response.finish_reason:
            self._answer.finalize()
        self._rate, self._peak = response.generation_tps, mx.get_peak_memory()
        self._accepted += response.from_draft
        self._rounds += self._new_round
        self._new_round = not response.from_draft  # the target's own token ends a round

    def _slow_down(self) -> None:
        """Cut the answer to before the loop, and lower the strength."""
        before = self._steering.strength
        number = len(self._brakes) + 1
        after = before * self._brake.factor if number < self._brake.tries else 0.0
        found = len(self._answer.ids)
        self._answer = self._answer.before_the_loop(watch=bool(after))
        kept = len(self._answer.ids)
        self._brakes.append(Braked(kept, found - kept, before, after))
        self._steering = replace(self._steering, strength=after)


def stream(
    model: nn.Module,
    tokenizer: TokenizerWrapper,
    prompt: str | Sequence[int],
    *,
    steering: Steering | None = None,
    system: str | None = None,
    raw: bool = False,
    max_tokens: int = 2048,
    sampling: Sampling = GREEDY,
    stop: Sequence[str] = (),
    draft: Draft | None = None,
    brake: Brake | None = None,
) -> Stream:
    """Return an iterator over the response, piece by piece.

    The response ends at the latest where the model's context does (``finish_reason="length"``).

    Args:
        prompt: a user message (chat template), plain text (``raw``), or token ids.
        steering: what to add to the residual stream; ``None`` is the stock model.
        stop: texts that end the response; they are not part of it.
        draft: speculative decoding; the text stays the same in greedy decoding.
        brake: cut off degenerate repetition, lower the strength and go on. The text then comes
            a few tokens later, so that nothing is taken back; ``None`` lets it repeat.

    Raises:
        ContextError: no room for a response in the model's context.
        InputError, SteeringError, VectorMismatchError: before anything is generated.
    """
    if isinstance(prompt, str):
        tokens: Sequence[int] = encode_prompt(tokenizer, prompt, system=system, raw=raw)
    else:
        tokens = prompt
    if not len(tokens):
        raise InputError("the prompt has no tokens; expected at least one.")
    context = model.args.max_position_embeddings
    if len(tokens) >= context:
        raise ContextError(
            f"the prompt has {len(tokens)} tokens, and the model's context is {context} with the response. "
            "Shorten it."
        )
    *rest, last = (int(token) for token in tokens)
    spread = getattr(model.model, "pipeline_size", 1) > 1  # over several ranks
    return Stream(
        model, tokenizer, PipelinePrefix(model) if spread else Prefix(model), [Chunk(tuple(rest))], last,
        steering=steering, max_tokens=min(max_tokens, context - len(tokens)), sampling=sampling, stop=stop,
        draft=draft, brake=brake,
    )  # fmt: skip


def generate(
    model: nn.Module, tokenizer: TokenizerWrapper, prompt: str | Sequence[int], **options
) -> Generation:
    """Return the whole response; the arguments are those of ``stream``."""
    pieces = stream(model, tokenizer, prompt, **options)
    for _ in pieces:
        pass
    return pieces.result
