"""Many prompts at once, every row under its own steering. mlx-lm's batch generator decodes.

The weights are read once for all rows of a step, whatever their vectors, strengths and layers.
In greedy decoding each row gives the tokens of its solo run, up to the rounding of products of
another shape. Rows join as others end.

Not covered: rows that arrive while the batch runs, and pieces of text before a row has ended.
"""

import time
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass, field

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.generate import BatchGenerator
from mlx_lm.sample_utils import make_sampler
from mlx_lm.tokenizer_utils import TokenizerWrapper

from .errors import InputError
from .generation import Generation, Sampling
from .patch import make_cache
from .prompt import encode_prompt
from .steering import Steering

ROWS = 16
GREEDY = Sampling()
TOLD_EVERY = 16  # steps between two calls of ``progress``


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
    if bad := [limit for limit in limits if limit < 1]:
        raise InputError(f"max tokens {bad[0]}: expected at least 1.")
    if any(not text for text in stop):
        raise InputError("a stop text is empty; expected at least one character.")
    if rows < 1:
        raise InputError(f"{rows} rows at once: expected at least 1.")
    jobs = [
        _Job(_encode(tokenizer, prompt, system, raw), how, limit)
        for prompt, how, limit in zip(
            prompts, _for_each("steerings", steering, len(prompts)), limits, strict=True
        )
    ]
    for distinct in {id(job.steering): job for job in jobs}.values():
        make_cache(model, distinct.steering, prompt_length=len(distinct.tokens))
    return _run(model, tokenizer, jobs, sampling, tuple(stop), rows, progress or (lambda _: None))


@dataclass
class _Job:
    """One row: what goes in, and what has come out so far."""

    tokens: list[int]
    steering: Steering | None
    limit: int
    ids: list[int] = field(default_factory=list)
    began: float = 0.0
    first: float = 0.0
    reason: str | None = None
    text: str = ""

    def take(self, token: int, reason: str | None, eos: set[int], detokenizer, stops) -> None:
        """Add one token; ``reason`` is set when it was the row's last."""
        self.first = self.first or time.perf_counter()
        if token not in eos:
            self.ids.append(token)
            detokenizer.add_token(token)
        if reason:
            detokenizer.finalize()
        elif not stops:
            return
        self.text, self.reason = detokenizer.text, reason
        found = [at for at in map(self.text.find, stops) if at >= 0]
        if found:
            self.text, self.reason = self.text[: min(found)], "stop"

    def result(self) -> Generation:
        seconds = time.perf_counter() - self.first
        return Generation(
            text=self.text,
            token_ids=tuple(self.ids),
            prompt_tokens=len(self.tokens),
            tokens_per_second=len(self.ids) / seconds if seconds > 0 else 0.0,
            time_to_first_token=self.first - self.began,
            peak_memory_bytes=mx.get_peak_memory(),
            finish_reason=self.reason or "interrupted",
            steering=self.steering,
        )


def _run(
    model: nn.Module,
    tokenizer: TokenizerWrapper,
    jobs: Sequence[_Job],
    sampling: Sampling,
    stops: tuple[str, ...],
    rows: int,
    progress: Callable[[int], None],
) -> Generator[tuple[int, Generation], None, None]:
    if sampling.seed is not None:
        mx.random.seed(sampling.seed)
    mx.reset_peak_memory()
    eos = set(tokenizer.eos_token_ids)
    batch = BatchGenerator(
        model,
        stop_tokens=[[token] for token in eos],
        sampler=make_sampler(temp=sampling.temp, top_p=sampling.top_p),
        completion_batch_size=rows,
        prefill_batch_size=min(rows, 8),
    )
    waiting = iter(range(len(jobs)))
    running: dict[int, tuple[int, object]] = {}  # uid: index, detokenizer
    steps = tokens = 0
    try:
        while True:
            for index in _first(waiting, rows - len(running)):
                job = jobs[index]
                job.began = time.perf_counter()
                cache = make_cache(model, job.steering, prompt_length=len(job.tokens))
                (uid,) = batch.insert([job.tokens], max_tokens=[job.limit], caches=[cache])
                running[uid] = index, tokenizer.detokenizer
            if not running:
                return
            responses, ended = batch.next_generated(), []
            for response in responses:
                index, detokenizer = running[response.uid]
                job = jobs[index]
                job.take(response.token, response.finish_reason, eos, detokenizer, stops)
                if job.reason:
                    ended.append((index, job.result()))
                    del running[response.uid]
                    if response.finish_reason is None:  # a stop text, unknown to the batch
                        batch.remove([response.uid])
            steps, tokens = steps + 1, tokens + len(responses)
            if steps % TOLD_EVERY == 0:
                progress(tokens)
            yield from ended
    finally:
        batch.close()


def _first(numbers, count: int) -> list[int]:
    return [number for _, number in zip(range(count), numbers, strict=False)]


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
