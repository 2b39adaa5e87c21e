"""Many rows at once, each under its own steering, text as it comes. mlx-lm's batch generator decodes.

The weights are read once for all rows of a step, whatever their vectors, strengths and layers.
In greedy decoding each row gives the tokens of its solo run, up to the rounding of products of
another shape. Rows join and leave at any time.

One thread owns a batch, as it owns the model: make it, add to it and step it there.
"""

import contextlib
from collections import deque
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from typing import NamedTuple

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.generate import BatchGenerator
from mlx_lm.models.cache import KVCache
from mlx_lm.tokenizer_utils import TokenizerWrapper

from ..errors import InputError
from ..model.block import make_cache
from ..model.prompt import encode_prompt
from ..steering.steering import Steering
from .batch_row import Row, TokenLogprob, make_row_sampler, own_caches
from .stopping import Pending, check_limits
from .stream import Generation, Sampling

ROWS = 16
GREEDY = Sampling()
TOLD_EVERY = 16  # steps between two calls of ``progress``
PREFILL_ROWS = 8  # rows whose prompts are read together at most
PREFILL = 2048  # prompt tokens of a row that one step reads while nobody waits for it
# Prompt tokens, of all rows together, read between two tokens of the rows that decode. Smaller
# parts are dearer (a 0.5B on two CPU cores: 68, 81, 90 tokens/s in parts of 64, 128, 256),
# larger ones are not cheaper (85 in parts of 512) and hold the others up for longer. Prompts that
# are no longer than this are read whole, all that come together at once: while prompts are read in
# parts, the others decode in a batch that is not full.
PREFILL_BESIDE = 256


@dataclass(frozen=True)
class Piece:
    """Text of one row that can be said now; ``result`` comes with the row's last piece.

    ``logprobs`` are those of the tokens since the row's last piece, where they were asked for.
    """

    row: int
    text: str
    result: Generation | None = None
    logprobs: tuple[TokenLogprob, ...] = ()


class Batch:
    """Rows that decode together; new ones join while others run.

    ``add`` puts a row in, ``step`` decodes one token of every row, ``cancel`` takes one out; all
    three may be called in any order, also in the middle of the pieces of a step. At most ``rows``
    rows are in the KV cache, later ones wait for their turn. A prompt is read in parts, one part
    a step, so that it holds up the rows that decode by ``PREFILL_BESIDE`` tokens at most; short ones
    that come together are read together.

    When ``step`` raises (out of memory, Ctrl-C), half a step is done and nobody can go on: the
    batch is then closed. ``cancel`` still tells what a row has said.

    Raises:
        InputError: ``rows`` is below 1.
    """

    def __init__(self, model: nn.Module, tokenizer: TokenizerWrapper, *, rows: int = ROWS):
        if rows < 1:
            raise InputError(f"{rows} rows at once: expected at least 1.")
        self.tokens = 0  # generated so far, by all rows, with their end-of-turn tokens
        self._model, self._tokenizer, self._limit = model, tokenizer, rows
        self._eos = set(tokenizer.eos_token_ids)
        self._rows: dict[int, Row] = {}  # by number: waiting or in the KV cache
        self._waiting: deque[Row] = deque()
        self._inside: dict[int, Row] = {}  # by mlx-lm's number: in the KV cache
        self._count = 0
        mx.reset_peak_memory()
        self._generator: BatchGenerator | None = BatchGenerator(
            model,
            stop_tokens=[[token] for token in self._eos],
            completion_batch_size=rows,
            prefill_batch_size=min(rows, PREFILL_ROWS),
            prefill_step_size=PREFILL,
        )

    def __enter__(self) -> "Batch":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def running(self) -> int:
        """How many rows wait or decode; 0 once the batch is closed."""
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
    ) -> int:
        """Let a row join, and return its number.

        Args:
            prompt: token ids, at least one.
            sampling: with a seed, the row draws what its solo run draws, whoever is beside it.
            stop: texts that end the response; they are not part of it.
            cache: filled caches, one for each block, of what precedes ``prompt``. They hold their
                steering, so ``steering`` is then only recorded. They are not changed, and may be
                used further. ``Generation.prompt_tokens`` counts their tokens too.
            logprobs: tell each token's log-probability, and so many of the likeliest tokens.

        Raises:
            InputError, SteeringError, VectorMismatchError: the row does not join.
        """
        check_limits(max_tokens, stop)
        if not len(prompt):
            raise InputError("a prompt has no tokens; expected at least one.")
        if self._generator is None:
            raise InputError("the batch is closed; expected an open one. Make a new Batch.")
        if cache is None:
            caches = make_cache(self._model, steering, prompt_length=len(prompt))
        else:
            caches = own_caches(self._model, cache)
        row = Row(
            self._count, list(prompt), caches, steering, max_tokens, make_row_sampler(sampling),
            Pending(stop), self._tokenizer.detokenizer, logprobs,
        )  # fmt: skip
        self._count += 1
        self._rows[row.number] = row
        self._waiting.append(row)
        return row.number

    def cancel(self, row: int) -> Generation | None:
        """End a row that waits or runs; return what it has said, ``None`` if it has ended before.

        The text is whole, with what was held back as the possible beginning of a stop text.
        """
        found = self._rows.get(row)
        if found is not None:
            self._drop(found)
        return None if found is None else found.result()

    def step(self) -> list[Piece]:
        """Decode one token of every row; return pieces of the rows that have something to say.

        While no row decodes yet, this only reads on in the prompts.
        """
        if not self.running:
            return []
        with contextlib.ExitStack() as half_done:
            half_done.callback(self.close)
            self._admit()
            _, responses = self._generator.next()
            pieces = [
                self._take(self._inside[one.uid], one.token, one.finish_reason, one.logprobs)
                for one in responses
            ]
            half_done.pop_all()
        return [piece for piece in pieces if piece.text or piece.result]

    def close(self) -> None:
        """End all rows, free their caches and return the wired memory; harmless when repeated."""
        generator, self._generator = self._generator, None
        if generator is not None:
            for row in self._waiting:
                row.caches = ()
            self._waiting.clear()
            self._inside.clear()
            generator.close()

    def _admit(self) -> None:
        while self._waiting and len(self._inside) < self._limit:
            row = self._waiting.popleft()
            (row.uid,) = self._generator.insert(
                [row.prompt], max_tokens=[row.limit], caches=[row.caches], samplers=[row.sampler]
            )
            row.caches = ()  # mlx-lm has them now, merged into the batch's own
            self._inside[row.uid] = row
        self._generator.prefill_step_size = self._part()

    def _part(self) -> int:
        """Return how many tokens of each prompt the next step reads."""
        arriving = [len(row.prompt) for row in self._inside.values() if not row.first]
        if len(arriving) == len(self._inside):
            return PREFILL
        if max(arriving, default=0) <= PREFILL_BESIDE:
            return PREFILL_BESIDE
        return max(1, PREFILL_BESIDE // min(len(arriving), PREFILL_ROWS))

    def _take(self, row: Row, token: int, ended: str | None, logprobs: mx.array) -> Piece:
        self.tokens += 1
        text = row.take(token, ended, self._eos, logprobs)
        if row.reason is None:
            return Piece(row.number, text, logprobs=row.tell() if text else ())
        self._drop(row, known=ended is not None)
        return Piece(row.number, text, row.result(), row.tell())

    def _drop(self, row: Row, *, known: bool = False) -> None:
        """Forget a row; mlx-lm is told unless it has ended the row itself (``known``)."""
        del self._rows[row.number]
        if self._generator is None:
            return
        if row.uid is None:
            self._waiting.remove(row)
            return
        del self._inside[row.uid]
        if not known:
            self._generator.remove([row.uid])


def generate_batch(
    model: nn.Module,
    tokenizer: TokenizerWrapper,
    prompts: Sequence[str | Sequence[int]],
    *,
    steering: Steering | Sequence[Steering | None] | None = None,
    system: str | None = None,
    raw: bool = False,
    max_tokens: int | Sequence[int] = 2048,
    sampling: Sampling = GREEDY,
    stop: Sequence[str] = (),
    rows: int = ROWS,
    progress: Callable[[int], None] | None = None,
) -> Generator[tuple[int, Generation], None, None]:
    """Yield ``(index, response)`` for every prompt, in the order in which they end.

    Args:
        prompts: user messages (chat template), plain text (``raw``), or token ids.
        steering: one for all rows, or one (or ``None``) for each.
        max_tokens: one for all rows, or one for each.
        sampling: of all rows; with a temperature a row depends on its neighbours' draws.
        stop: texts that end a response; they are not part of it.
        rows: how many are decoded together at most; memory grows with it.
        progress: called now and then with the number of tokens generated so far.

    Closing the iterator ends the rows that run. ``Generation.peak_memory_bytes`` is that of the
    whole batch.

    Raises:
        InputError, SteeringError, VectorMismatchError: before anything is generated.
    """
    limits = _for_each("max tokens", max_tokens, len(prompts))
    check_limits(min(limits, default=1), stop)
    if rows < 1:
        raise InputError(f"{rows} rows at once: expected at least 1.")
    steerings = _for_each("steerings", steering, len(prompts))
    jobs = [
        _Job(_encode(tokenizer, prompt, system, raw), how, limit)
        for prompt, how, limit in zip(prompts, steerings, limits, strict=True)
    ]
    for distinct in {id(job.steering): job for job in jobs}.values():
        make_cache(model, distinct.steering, prompt_length=len(distinct.tokens))
    return _run(model, tokenizer, jobs, sampling, tuple(stop), rows, progress or (lambda _: None))


class _Job(NamedTuple):
    tokens: list[int]
    steering: Steering | None
    limit: int


def _run(
    model: nn.Module,
    tokenizer: TokenizerWrapper,
    jobs: Sequence[_Job],
    sampling: Sampling,
    stop: tuple[str, ...],
    rows: int,
    progress: Callable[[int], None],
) -> Generator[tuple[int, Generation], None, None]:
    if sampling.seed is not None:  # one sequence of draws for all rows, else equal prompts agree
        mx.random.seed(sampling.seed)
        sampling = replace(sampling, seed=None)
    waiting = iter(jobs)  # added one by one: the steering of a row is an array for each layer
    steps = 0
    with Batch(model, tokenizer, rows=rows) as batch:
        while True:
            for job in islice(waiting, rows - batch.running):
                batch.add(
                    job.tokens, steering=job.steering, max_tokens=job.limit,
                    sampling=sampling, stop=stop,
                )  # fmt: skip
            if not batch.running:
                return
            before, pieces = batch.tokens, batch.step()
            if batch.tokens > before:
                steps += 1
                if steps % TOLD_EVERY == 0:
                    progress(batch.tokens)
            yield from ((piece.row, piece.result) for piece in pieces if piece.result)


def _for_each(what: str, value, count: int) -> list:
    if not isinstance(value, Sequence):
        return [value] * count
    if len(value) != count:
        raise InputError(f"{len(value)} {what} for {count} prompts: expected one for each.")
    return list(value)


def _encode(tokenizer: TokenizerWrapper, prompt, system: str | None, raw: bool) -> list[int]:
    if isinstance(prompt, str):
        return encode_prompt(tokenizer, prompt, system=system, raw=raw)
    if not len(prompt):
        raise InputError("a prompt has no tokens; expected at least one.")
    return list(prompt)
