"""Decode many rows at once with mlx-lm's batch generator, each under its own steering.

A step reads the weights once for all rows, whatever their vectors, strengths and layers. In greedy
decoding each row gives the tokens that it gives alone, up to the rounding of matrix products of
another shape. Rows join and leave at any time.

Use a batch on one thread only: the one that loaded the model.
"""

import contextlib
import time
from collections import Counter, deque
from collections.abc import Callable, Collection, Generator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import islice
from typing import NamedTuple

import mlx.core as mx
from mlx_lm.generate import BatchGenerator, GenerationBatch
from mlx_lm.models.cache import KVCache

from ..errors import InputError, SteeringError
from ..model.block import make_cache
from ..model.cache import SteeredKVCache, token_bytes, twin_of
from ..model.machine import gpu, working_set
from ..model.marks import marks_of
from ..model.model import Model, takes_model
from ..model.prefix import Chunk, Prefix
from ..model.prompt import check_ids, encode_prompt
from ..steering.steering import UNSTEERED, Steering
from .answer import Generation, PartialAnswer, brake_answer, check_limits
from .brake import Brake, Braked
from .grammar import Grammar
from .logits import LogitBias, gave_up, processors
from .sampling import GREEDY, Sampler, Sampling
from .thought import LogitsProcessor, check_limit
from .wired import Wired

ROWS = 16
TOLD_EVERY = 16  # steps between two calls of ``progress``
PREFILL_ROWS = 8  # prompts that are read together at most
PREFILL = 2048  # prompt tokens of a row that a step reads while no row decodes
# Prompt tokens, of all rows together, that a step reads while other rows decode. A 0.5B on two CPU cores
# reads 68, 81, 90, 85 tokens/s in parts of 64, 128, 256, 512, and larger parts delay the other rows.
# Prompts of at most this length are read whole, all new ones together: the sooner they are read, the
# sooner the batch is full.
PREFILL_BESIDE = 256
SHARED = 64  # tokens of a common beginning that are worth a reading of their own
SHARED_AT_ONCE = 8192  # tokens of common beginnings in memory at most
KEEP_STREAM = 2**30  # bytes of their residual stream, which is far less for so many tokens
# Of the GPU's working set, less what is in use: what the keys and values of a batch may take.
KV_SHARE = 0.8
# Tokens of the vocabulary that are compared as one when the likeliest are looked for. With 20 wanted of
# 152,000, neither of the two sorts is of more than the 2,048 numbers that one Metal kernel takes.
GROUP = 96

# Log-probabilities are gathered beside the next step, which mlx-lm has enqueued on its own stream.
BESIDE = mx.new_thread_local_stream(mx.default_device())


class TokenLogprob(NamedTuple):
    """A token, its log-probability, and the likeliest tokens at its position.

    The first token of a prompt has the log-probability ``None``.

    ``text`` is what the token adds to the answer's text: a character of several tokens comes with
    the last of them.
    """

    token: int
    logprob: float | None
    top: tuple[tuple[int, float], ...]
    text: str = ""


@dataclass(frozen=True)
class Piece:
    """New text of one row; the row's last piece has a ``result``.

    ``logprobs``, if requested, are those of the tokens since the row's previous piece. ``caches``, if
    requested, come with the last piece. They hold what the row has read and decoded, and until they are
    evaluated the memory of all rows. ``shown`` is the thought and the answer so far.
    """

    row: int
    text: str
    result: Generation | None = None
    logprobs: tuple[TokenLogprob, ...] = ()
    caches: Sequence[KVCache] = ()
    shown: tuple[str | None, str] = (None, "")


@dataclass(eq=False)
class _Row:
    """The input of one row, and its output so far.

    ``prompt`` is what is read next, after what ``caches`` hold; ``whole`` is the request's prompt.
    ``alternatives`` is the number of likeliest tokens to return for each token; ``None`` for no
    log-probabilities. ``uid`` is mlx-lm's number of the row, ``None`` while it waits.
    """

    number: int
    prompt: list[int]
    whole: Sequence[int]
    caches: Sequence[KVCache]
    steering: Steering | None
    limit: int
    sampler: Sampler
    answer: PartialAnswer
    ends: Collection[int]
    changes: Mapping[str, object]  # of the logits: arguments of ``processors``
    brake: Brake | None = None
    alternatives: int | None = None
    keep: bool = False
    uid: int | None = None
    read: int = 0  # tokens of ``prompt`` so far
    seconds: float = 0.0  # its share of the steps so far
    first: float = 0.0
    reason: str | None = None
    arriving: bool = True  # until its prompt is read
    active: list[LogitsProcessor] = field(default_factory=list)
    told: int = 0  # tokens whose log-probabilities were returned
    told_text: int = 0  # characters of their text
    untold: list[TokenLogprob] = field(default_factory=list)
    brakes: list[Braked] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.prompt_tokens = self.caches[0].offset + len(self.prompt)
        self.longest = self.prompt_tokens + self.limit  # tokens of its keys and values at most
        self.began = time.perf_counter()

    @property
    def looped(self) -> bool:
        """Whether the answer repeats itself, so that it has to be cut and goes on otherwise."""
        return self.reason is None and self.answer.loop_start is not None

    def take(self, token: int, ended: str | None, logprob: TokenLogprob | None) -> str:
        """Add a token, and return the text to show; ``ended`` is the reason if it is the row's last."""
        self.first, self.arriving = self.first or time.perf_counter(), False
        if token in self.ends:
            ended = "length" if gave_up(self.active) else "stop"
        else:
            text = self.answer.add(token)
            if logprob is not None:
                self.untold.append(logprob._replace(text=text))
        if ended and (rest := self.answer.finalize()) and self.untold:
            last = self.untold[-1]
            self.untold[-1] = last._replace(text=last.text + rest)
        self.reason = "stop" if self.answer.stopped else ended
        if self.answer.stopped:
            self._leave_out_stop_text()
        if self.looped:
            return ""
        return self.answer.show_rest() if self.reason else self.answer.show()

    def _leave_out_stop_text(self) -> None:
        """Shorten what was not told yet of the log-probabilities to the text that the answer has."""
        room, kept = len(self.answer.text) - self.told_text, []
        for one in self.untold:
            if room <= 0:
                break
            kept.append(one._replace(text=one.text[:room]))
            room -= len(one.text)
        self.untold = kept

    def tell(self) -> tuple[TokenLogprob, ...]:
        """Return the log-probabilities that were not returned yet, of tokens whose text is shown for good."""
        count, text = 0, self.told_text
        for one in self.untold:
            shown = text + len(one.text) <= self.answer.shown_length
            if not self.reason and not (shown and self.told + count < self.answer.safe):
                break
            count, text = count + 1, text + len(one.text)
        told, self.untold = tuple(self.untold[:count]), self.untold[count:]
        self.told, self.told_text = self.told + count, text
        return told

    def slow_down(self, model: Model) -> None:
        """Cut off the loop, lower the strength, and have all be read again under it."""
        self.answer, self.steering, done = brake_answer(
            self.answer, self.steering, self.brake, len(self.brakes) + 1
        )
        self.brakes.append(done)
        self.untold = self.untold[: done.at_token - self.told]
        self.prompt, self.read = [*self.whole, *self.answer.ids], 0
        self.caches = make_cache(model, self.steering, prompt=self.whole)
        self.uid, self.arriving = None, True
        self.keep = False  # its caches are of another steering than the request's

    def result(self) -> Generation:
        seconds, tokens = time.perf_counter() - self.first, len(self.answer.ids)
        return Generation(
            text=self.answer.text,
            token_ids=tuple(self.answer.ids),
            prompt_tokens=self.prompt_tokens,
            # the first token falls outside the time
            tokens_per_second=max(0, tokens - 1) / seconds if seconds > 0 else 0.0,
            time_to_first_token=self.first - self.began if self.first else 0.0,
            peak_memory_bytes=mx.get_peak_memory(),
            finish_reason=self.reason or "interrupted",
            steering=self.steering,
            compute_seconds=self.seconds,
            brakes=tuple(self.brakes),
            thought_limit=self.changes.get("think_limit"),
            gave_up=gave_up(self.active),
            **self.answer.parts,
        )


class Batch:
    """Rows that decode together; new ones join while others run.

    ``add`` adds a row, ``step`` decodes one token of every row, ``cancel`` ends a row; call them in
    any order. At most ``rows`` rows are in the KV cache; others wait. While rows decode, a step
    reads a part of at most ``PREFILL_BESIDE`` tokens of new prompts. On a Mac's GPU a row also waits while the
    cache, in which every row is as long as the longest may become, would not fit; a row alone never does.

    The time of a step is divided among its rows (``Generation.compute_seconds``): equally among those that
    decode, and by tokens among those that read. Where a step does both, decoding bears what the last
    step without reading took, reading the rest.

    If ``step`` raises (out of memory, Ctrl-C), the batch is closed, because half a step is done.
    ``cancel`` still returns a row's text.

    Raises:
        InputError: ``rows`` is below 1.
    """

    @takes_model
    def __init__(self, model: Model, *, rows: int = ROWS):
        if rows < 1:
            raise InputError(f"{rows} rows at once: expected at least 1.")
        self.tokens = 0  # generated by all rows so far, end-of-turn tokens included
        self._model, self._limit = model, rows
        self._rows: dict[int, _Row] = {}  # by number: all that wait or decode
        self._waiting: deque[_Row] = deque()
        self._inside: dict[int, _Row] = {}  # by mlx-lm's number: those in the KV cache
        self._count = 0
        self._decoding: float | None = None  # seconds of the last step that only decoded
        self._working_set = working_set(gpu())
        mx.reset_peak_memory()
        self._wired = Wired()
        self._generator: BatchGenerator | None = BatchGenerator(
            self._model.network,
            stop_tokens=[[token] for token in self._model.tokenizer.eos_token_ids],
            completion_batch_size=rows,
            prefill_batch_size=min(rows, PREFILL_ROWS),
            prefill_step_size=PREFILL,
        )
        self._generator._old_wired_limit = None  # the limit is not its to set back

    def __enter__(self) -> "Batch":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def running(self) -> int:
        """The number of rows that wait or decode; 0 once the batch is closed."""
        return 0 if self._generator is None else len(self._rows)

    def add(
        self,
        prompt: Sequence[int],
        *,
        steering: Steering | None = None,
        max_tokens: int = 2048,
        sampling: Sampling = GREEDY,
        stop: Sequence[str] = (),
        cache: Sequence[KVCache] | None = None,
        logprobs: int | None = None,
        whole: Sequence[int] | None = None,
        keep: bool = False,
        think_limit: int | None = None,
        grammar: Grammar | None = None,
        bias: LogitBias | None = None,
        brake: Brake | None = None,
    ) -> int:
        """Add a row, and return its number.

        Args:
            prompt: token ids, at least one.
            sampling: with a seed, the row draws what it draws alone.
            stop: texts that end the response; they are not part of it.
            cache: filled caches, one for each block, of what precedes ``prompt``. They hold their
                steering, so ``steering`` is then only recorded. They are not changed.
                ``Generation.prompt_tokens`` counts their tokens too.
            logprobs: return each token's log-probability, and so many of the likeliest tokens.
            whole: the whole prompt, if ``cache`` holds a part of it.
            keep: return the row's caches with its last piece.
            think_limit: end a thought of so many tokens by force.
            grammar: what the answer has to match.
            bias: numbers added to logits.
            brake: cut off degenerate repetition of a steered answer, lower the strength and go on.

        Raises:
            InputError, SteeringError, VectorMismatchError: the row is not added.
            ContextError: the prompt fills the model's context.
        """
        check_limits(max_tokens, stop)
        self._model.check_length(prompt)
        tokens = encode_prompt(self._model.tokenizer, prompt)
        check_ids(tokens, self._model.vocabulary, "the prompt")
        if self._generator is None:
            raise InputError("the batch is closed. Make a new Batch.")
        if cache is None:
            caches = make_cache(self._model, steering, prompt=tokens)
        else:
            caches = _own_caches(cache, self._model.layer_count)
        room = self._model.room(caches[0].offset + len(tokens), max_tokens)
        if cache is not None and brake is not None and (whole is None or steering is None):
            raise InputError(
                "a brake reads all again under less strength: give the whole prompt and the steering too."
            )
        whole = tokens if whole is None else list(whole)
        if len(whole) != caches[0].offset + len(tokens) and (cache is None or brake is not None):
            raise InputError(
                f"the whole prompt has {len(whole)} tokens; expected {caches[0].offset + len(tokens)}, as "
                "the caches and the prompt have."
            )
        opened = self._model.opens_thought(whole)
        if steering is None or steering.is_zero:
            brake = None
        answer = PartialAnswer(self._model.tokenizer, brake, stop, opens_thought=opened)
        if bias is not None:
            bias.check(self._model.vocabulary)
        if think_limit is not None:
            check_limit(think_limit)
            _ = marks_of(self._model.network).thought  # raises if the model has no such marks
        changes = {"grammar": grammar, "bias": bias, "think_limit": think_limit, "opened": opened}
        row = _Row(
            self._count, tokens, whole, caches, steering, room, sampling.row_sampler(), answer,
            self._model.ends(whole), changes, brake, logprobs, keep,
        )  # fmt: skip
        self._count += 1
        self._rows[row.number] = row
        self._waiting.append(row)
        return row.number

    def cancel(self, row: int) -> Generation | None:
        """End a row; return all its text so far, or ``None`` if it has ended before."""
        found = self._rows.get(row)
        if found is None:
            return None
        self._drop(found)
        return found.result()

    def step(self) -> list[Piece]:
        """Decode one token of every row whose prompt is read; return the pieces with new text."""
        if not self.running:
            return []
        with contextlib.ExitStack() as half_done:
            half_done.callback(self.close)
            began = time.perf_counter()
            self._admit()
            reading, responses = self._generator.next()
            self._charge(
                time.perf_counter() - began,
                [self._inside[one.uid] for one in responses],
                [(self._inside[one.uid], one.progress[0]) for one in reading],
            )
            logprobs = self._logprobs(responses)
            pieces = [
                self._take(self._inside[one.uid], one, logprobs.get(one.uid)) for one in responses
            ]
            half_done.pop_all()
        return [piece for piece in pieces if piece.text or piece.result]

    def close(self) -> None:
        """End all rows, free their caches and unwire memory; a second call does nothing."""
        generator, self._generator = self._generator, None
        if generator is not None:
            for row in self._waiting:
                row.caches = ()
            self._waiting.clear()
            self._inside.clear()
            generator.close()
            self._wired.close()

    def _admit(self) -> None:
        while self._waiting and len(self._inside) < self._limit:
            if self._inside and not self._fits(self._waiting[0]):
                break
            row = self._waiting.popleft()
            answer = row.answer.ids  # of a row that was braked
            row.active = processors(
                self._model.network, answer, skip=len(row.prompt), **row.changes
            )
            (row.uid,) = self._generator.insert(
                [row.prompt], max_tokens=[row.limit - len(answer)], caches=[row.caches],
                samplers=[row.sampler], logits_processors=[row.active],
            )  # fmt: skip
            row.caches = ()  # mlx-lm has merged them into its own
            self._inside[row.uid] = row
        self._generator.prefill_step_size = self._part()

    @cached_property
    def _token_bytes(self) -> int:
        return token_bytes(self._model.network)

    def _fits(self, row: _Row) -> bool:
        """Tell whether the GPU can keep the cache with one more row; all rows are as long as the longest."""
        if self._working_set is None:
            return True
        longest = max(one.longest for one in (row, *self._inside.values()))
        wanted = longest * (len(self._inside) + 1) * self._token_bytes
        others = mx.get_active_memory() - self._generator.prompt_cache_nbytes
        return wanted <= KV_SHARE * (self._working_set - others)

    def _charge(
        self, seconds: float, decoding: Sequence[_Row], reading: Sequence[tuple[_Row, int]]
    ) -> None:
        """Divide the time of a step among its rows. ``reading`` has the tokens that were read so far."""
        tokens = sum(read - row.read for row, read in reading)
        if not tokens:
            share = 1.0 if decoding else 0.0
            self._decoding = seconds if decoding else self._decoding
        elif self._decoding is None:
            share = len(decoding) / (len(decoding) + tokens)
        else:
            share = min(1.0, self._decoding / seconds) if decoding else 0.0
        for row in decoding:
            row.seconds += seconds * share / len(decoding)
        for row, read in reading:
            row.seconds += seconds * (1 - share) * (read - row.read) / max(1, tokens)
            row.read = read

    def _part(self) -> int:
        """Return how many tokens of each prompt the next step reads."""
        arriving = [len(row.prompt) for row in self._inside.values() if row.arriving]
        if len(arriving) == len(self._inside):
            return PREFILL
        if max(arriving, default=0) <= PREFILL_BESIDE:
            return PREFILL_BESIDE
        return max(1, PREFILL_BESIDE // min(len(arriving), PREFILL_ROWS))

    def _logprobs(self, responses: Sequence[GenerationBatch.Response]) -> dict[int, TokenLogprob]:
        """Gather the log-probabilities of the rows that ask for them, all at once; by mlx-lm's number."""
        asked = [one for one in responses if self._inside[one.uid].alternatives is not None]
        if not asked:
            return {}
        counts = [self._inside[one.uid].alternatives for one in asked]
        with mx.stream(BESIDE):
            logprobs = mx.stack([one.logprobs for one in asked]).astype(mx.float32)
            found = gather_logprobs(logprobs, [one.token for one in asked], counts)
        return {one.uid: logprob for one, logprob in zip(asked, found, strict=True)}

    def _take(
        self, row: _Row, one: GenerationBatch.Response, logprob: TokenLogprob | None
    ) -> Piece:
        self.tokens += 1
        text = row.take(one.token, one.finish_reason, logprob)
        if row.looped:
            self._leave(row, known=False)
            row.slow_down(self._model)
            self._waiting.appendleft(row)
        if row.reason is None:
            if not text:
                return Piece(row.number, text)
            return Piece(row.number, text, logprobs=row.tell(), shown=row.answer.shown)
        known, caches = one.finish_reason is not None, ()
        if row.keep:
            caches = (
                one.prompt_cache if known else self._generator.extract_cache([row.uid])[row.uid][0]
            )
        self._drop(row, known=known)
        return Piece(row.number, text, row.result(), row.tell(), caches, row.answer.shown)

    def _drop(self, row: _Row, *, known: bool = False) -> None:
        """Remove a row, from mlx-lm too unless it has ended the row itself (``known``)."""
        del self._rows[row.number]
        if self._generator is None:
            return
        if row.uid is None:
            self._waiting.remove(row)
        else:
            self._leave(row, known=known)

    def _leave(self, row: _Row, *, known: bool) -> None:
        del self._inside[row.uid]
        if not known:
            self._generator.remove([row.uid])


@takes_model
def generate_batch(
    model: Model,
    prompts: Sequence[str | Sequence[int]],
    *,
    steering: Steering | Sequence[Steering | None] | None = None,
    system: str | None = None,
    raw: bool = False,
    special_tokens: bool = False,
    max_tokens: int | Sequence[int] = 2048,
    sampling: Sampling | Sequence[Sampling] = GREEDY,
    stop: Sequence[str] = (),
    think_limit: int | None = None,
    grammar: Grammar | None = None,
    rows: int = ROWS,
    progress: Callable[[int], None] | None = None,
) -> Generator[tuple[int, Generation], None, None]:
    """Yield ``(index, response)`` for every prompt, in the order in which they end.

    Closing the iterator ends the rows that run. ``Generation.peak_memory_bytes`` is that of the
    whole batch. A beginning of ``SHARED`` tokens or more that several prompts have in common is read once up
    to the lowest steered layer, and above it once for each steering; its time is divided among them.

    Args:
        prompts: user messages (chat template), plain text (``raw``), or token ids.
        special_tokens: let the text of control tokens in a message be control tokens.
        steering: one for all rows, or one (or ``None``) for each.
        max_tokens: one for all rows, or one for each.
        sampling: one for all rows, whose draws then depend on each other; or one for each: with a seed a
            row draws what it draws alone.
        stop: texts that end a response; they are not part of it.
        think_limit: end a thought of so many tokens by force.
        grammar: what every response has to match.
        rows: how many decode together at most; memory grows with it.
        progress: called with the number of tokens generated so far, every few steps.

    Raises:
        InputError, SteeringError, VectorMismatchError: before anything is generated.
        ContextError: names the first prompt that fills the model's context.
    """
    limits = _for_each("max tokens", max_tokens, len(prompts))
    check_limits(min(limits, default=1), stop)
    if rows < 1:
        raise InputError(f"{rows} rows at once: expected at least 1.")
    if think_limit is not None:
        check_limit(think_limit)
        _ = marks_of(model.network).thought  # raises if the model has no such marks
    steerings = _for_each("steerings", steering, len(prompts))
    if isinstance(sampling, Sampling) and sampling.seed is not None:
        # Of each row, the seed would give equal prompts equal answers.
        seed, sampling = sampling.seed, replace(sampling, seed=None)
    else:
        seed = None
    samplings = _for_each("samplings", sampling, len(prompts))
    for number, prompt in enumerate(prompts):
        model.check_length(prompt, system, what=f"prompt {number}")
    options = {"system": system, "raw": raw, "special_tokens": special_tokens}
    jobs = [
        _Prompt(encode_prompt(model.tokenizer, prompt, **options), how, limit, drawn)
        for prompt, how, limit, drawn in zip(prompts, steerings, limits, samplings, strict=True)
    ]
    for number, job in enumerate(jobs):
        check_ids(job.tokens, model.vocabulary, f"prompt {number}")
        model.room(len(job.tokens), job.limit, what=f"prompt {number}")
    for distinct in {id(job.steering): job for job in jobs}.values():
        make_cache(model, distinct.steering, prompt=distinct.tokens)
    _find_beginnings(jobs, model.layer_count)
    options = {"stop": tuple(stop), "think_limit": think_limit, "grammar": grammar}
    return _run(model, jobs, seed, options, rows, progress or (lambda _: None))


class _Beginning:
    """The first tokens of several prompts, read once, and above the lowest steered layer once for each steering.

    Args:
        jobs: the prompts that begin so.
        tokens: their first tokens.
    """

    def __init__(self, jobs: "Sequence[_Prompt]", tokens: list[int]):
        self.tokens, self.left = tokens, len(jobs)  # prompts that are still to be added
        self._rows = Counter(job.read_under for job in jobs)
        self._base = jobs[0].reading
        if len(self._rows) > 1:
            lowest = min(
                (job.reading for job in jobs if job.reading), key=lambda one: min(one.layers)
            )
            self._base = replace(lowest, strength=0.0)
        self._prefix: Prefix | None = None
        self._seconds: dict[str, float] = {}  # of a row, by what it is read under

    def saves(self, layers: int) -> bool:
        """Tell whether reading it once takes less than reading it in every prompt, of a model of so many layers."""
        again = 0
        if len(self._rows) > 1:
            again = layers - 1 - min(self._base.layers)
        return layers + again * len(self._rows.keys() - {UNSTEERED}) < layers * self.left

    def caches(self, model: Model, job: "_Prompt") -> tuple[list[KVCache], float]:
        """Return the caches of the tokens under the job's steering, and its share of the seconds they took."""
        if self._prefix is None:
            keep = KEEP_STREAM if len(self._rows) > 1 else 0
            self._prefix = Prefix(model.network, keep_bytes=keep)
            seconds = self._fill(self._base) / self._rows.total()
            self._seconds = dict.fromkeys(self._rows, seconds)
        self._seconds[job.read_under] += self._fill(job.reading) / self._rows[job.read_under]
        return [twin_of(cache) for cache in self._prefix.caches], self._seconds[job.read_under]

    def _fill(self, steering: Steering | None) -> float:
        began = time.perf_counter()
        self._prefix.fill([Chunk(tuple(self.tokens))], steering)
        return time.perf_counter() - began

    def forget(self) -> None:
        self._prefix = None


@dataclass(eq=False)
class _Prompt:
    tokens: list[int]
    steering: Steering | None
    limit: int
    sampling: Sampling
    beginning: _Beginning | None = None

    @cached_property
    def reading(self) -> Steering | None:
        """The steering of all prompt tokens but the last."""
        return self.steering and self.steering.in_prompt

    @cached_property
    def read_under(self) -> str:
        """Identifies ``reading``."""
        return UNSTEERED if self.reading is None else self.reading.fingerprint

    @property
    def order(self) -> tuple:
        """Prompts of one length follow each other, of one beginning too, and there those of one steering."""
        first = self.beginning.tokens if self.beginning else self.tokens
        return len(first), first, self.read_under, len(self.tokens)


def _find_beginnings(jobs: Sequence[_Prompt], layers: int) -> None:
    """Give a beginning to the jobs whose prompts begin alike; ``layers`` are the model's."""
    alike, depth = [], 0
    for job in [*sorted(jobs, key=lambda job: job.tokens), None]:
        same = _common(job.tokens, alike[-1].tokens) if job and alike else 0
        if same >= SHARED:
            depth = min(depth, same) if len(alike) > 1 else same
            alike.append(job)
            continue
        if len(alike) > 1:
            beginning = _Beginning(alike, alike[0].tokens[:depth])
            if beginning.saves(layers):
                for one in alike:
                    one.beginning = beginning
        alike = [job]


def _common(a: Sequence[int], b: Sequence[int]) -> int:
    """Return how many first tokens are equal, without the last token of either."""
    length = min(len(a), len(b)) - 1
    return next((i for i in range(length) if a[i] != b[i]), length)


def _run(
    model: Model,
    jobs: Sequence[_Prompt],
    seed: int | None,
    options: dict[str, object],
    rows: int,
    progress: Callable[[int], None],
) -> Generator[tuple[int, Generation], None, None]:
    if seed is not None:
        mx.random.seed(seed)
    # Prompts that are read together are padded to the longest: so those of one length follow each other.
    order = sorted(range(len(jobs)), key=lambda number: jobs[number].order, reverse=True)
    waiting = iter(order)  # added when there is room: each row's steering takes memory
    steps = 0
    with Batch(model, rows=rows) as batch:
        held: set[_Beginning] = set()
        while True:
            for number in islice(waiting, rows - batch.running):
                _add(batch, model, jobs[number], options, held)
            if not batch.running:
                return
            before, pieces = batch.tokens, batch.step()
            if batch.tokens > before:
                steps += 1
                if steps % TOLD_EVERY == 0:
                    progress(batch.tokens)
            yield from ((order[piece.row], piece.result) for piece in pieces if piece.result)


def _add(
    batch: Batch, model: Model, job: _Prompt, shared: dict[str, object], held: set[_Beginning]
) -> None:
    """Add a job, after its beginning if that is in memory (``held``) or has room there."""
    options = {"max_tokens": job.limit, "sampling": job.sampling, **shared}
    beginning = job.beginning
    if beginning is not None and beginning not in held:
        total = sum(len(one.tokens) for one in held) + len(beginning.tokens)
        if total <= SHARED_AT_ONCE and beginning.left > 1:
            held.add(beginning)
    if beginning is None or beginning not in held:
        batch.add(job.tokens, steering=job.steering, **options)
    else:
        caches = make_cache(model, job.steering, prompt=job.tokens)
        begun, seconds = beginning.caches(model, job)
        for cache, filled in zip(caches, begun, strict=True):
            cache.keys, cache.values, cache.offset = filled.keys, filled.values, filled.offset
        rest = job.tokens[len(beginning.tokens) :]
        row = batch.add(rest, steering=job.steering, cache=caches, whole=job.tokens, **options)
        batch._rows[row].seconds = seconds
    if beginning is not None:
        beginning.left -= 1
        if not beginning.left:
            held.discard(beginning)
            beginning.forget()


def _for_each(what: str, value, count: int) -> list:
    if not isinstance(value, Sequence):
        return [value] * count
    if len(value) != count:
        raise InputError(f"{len(value)} {what} for {count} prompts: expected one for each.")
    return list(value)


def gather_logprobs(
    logprobs: mx.array, tokens: Sequence[int], counts: Sequence[int]
) -> list[TokenLogprob]:
    """Return the log-probability of one token for each row of ``logprobs``, and of so many of the likeliest.

    ``logprobs`` is float32 ``(rows, vocabulary)``. There is one wait for all rows.
    """
    ids = mx.array(tokens)[:, None]
    if most := min(max(counts), logprobs.shape[-1]):
        ids = mx.concatenate([ids, _likeliest(logprobs, most)], axis=1)
    values = mx.take_along_axis(logprobs, ids, axis=1)
    # one array, so that there is one wait; float32 holds ids below 2**24
    found = mx.stack([ids.astype(mx.float32), values], axis=-1).tolist()
    return [
        TokenLogprob(token, own, tuple((int(t), value) for t, value in top[:count]))
        for token, count, ((_, own), *top) in zip(tokens, counts, found, strict=True)
    ]


def _likeliest(logprobs: mx.array, count: int) -> mx.array:
    """Return the ids of the likeliest tokens, int32 ``(rows, count)``, likeliest first.

    They are in the ``count`` groups of ids with the largest maxima, so the vocabulary is not sorted.
    ``logprobs`` is ``(rows, vocabulary)``.
    """
    rows, size = logprobs.shape
    padded = mx.pad(logprobs, ((0, 0), (0, -size % GROUP)), constant_values=-mx.inf)
    groups = mx.argsort(-padded.reshape(rows, -1, GROUP).max(axis=-1), axis=-1)[:, :count, None]
    ids = (groups.astype(mx.int32) * GROUP + mx.arange(GROUP)).reshape(rows, -1)
    order = mx.argsort(-mx.take_along_axis(padded, ids, axis=1), axis=-1)[:, :count]
    return mx.take_along_axis(ids, order, axis=1)


def _own_caches(caches: Sequence[KVCache], count: int) -> list[KVCache]:
    """Return copies of ``caches``, so that filling the originals does not change them."""
    kinds = sorted({type(cache).__name__ for cache in caches})
    if len(caches) != count or kinds != [SteeredKVCache.__name__]:
        raise SteeringError(
            f"{len(caches)} caches of class {', '.join(kinds)}: expected {count} SteeredKVCache, "
            "one for each block. Make them with make_cache(model, steering), without kv_bits."
        )
    lengths = sorted({cache.offset for cache in caches})
    if len(lengths) > 1:
        raise SteeringError(f"the caches hold {lengths} tokens: expected as many in every block.")
    return [twin_of(cache) for cache in caches]
