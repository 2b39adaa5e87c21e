"""Answers jobs with the model: one thread, no locks, no HTTP.

Each call of ``work`` reads a part of the waiting prompts and decodes one token of every running
row. ``prompt_cache`` reads prompts, ``generation.batch`` decodes rows.
"""

import contextlib
import time
from collections import Counter, deque
from dataclasses import dataclass, replace

import mlx.core as mx
from mlx_lm.generate import generation_stream

from ..errors import DenseSteerError
from ..generation.batch import BESIDE, PREFILL_BESIDE, Batch, Piece
from ..generation.brake import Brake
from ..generation.echo import Echo
from ..generation.grammar import Grammar
from ..generation.logits import LogitBias
from ..generation.sampling import Sampling
from ..generation.wired import Wired
from ..model.block import additions
from ..model.model import Model
from ..steering.steering import Steering
from .faults import Fault, bad, ending, failed
from .prompt_cache import PromptCache, PromptReading

UNWIRE = 300.0  # seconds without a request until the model's memory is no longer wired


@dataclass(frozen=True, eq=False)
class Job:
    """One prompt, answered ``n`` times.

    ``steering`` is ``None`` for the stock model. ``max_tokens`` is a limit; the model's context may
    end an answer earlier. ``logprobs`` is as in ``Batch.add``. ``first`` is the number of the job's
    first answer in the response. ``echo``: the first piece of each has the log-probabilities of the prompt
    too. The others are as in ``Batch.add``.
    """

    tokens: list[int]
    steering: Steering | None
    max_tokens: int
    sampling: Sampling
    stop: tuple[str, ...] = ()
    n: int = 1
    logprobs: int | None = None
    first: int = 0
    think_limit: int | None = None
    grammar: Grammar | None = None
    bias: LogitBias | None = None
    brake: Brake | None = None
    echo: bool = False


@dataclass(frozen=True)
class Taken:
    """The job was taken: its steering can be applied to this model."""


@dataclass(frozen=True)
class Said:
    """A piece of one answer; the last one carries its result."""

    choice: int
    piece: Piece
    cached_tokens: int = 0


@dataclass(frozen=True)
class Failed:
    """The job has ended without all of its answers."""

    fault: Fault


Event = Taken | Said | Failed
Told = list[tuple[Job, Event]]


@dataclass(eq=False)
class _TakenJob:
    """A job that waits, whose prompt is read, or whose rows run."""

    job: Job
    reading: PromptReading | Echo | None = None


class Worker:
    """Takes jobs and returns events.

    Args:
        rows: most answers that are decoded together.
        cache_bytes: most bytes of the prompt cache.
        usual: the steering that most requests ask for.
        opens: tokens that begin a message (``prompt_cache.cut``).
        exact: give what reading every prompt anew would give, bit for bit.
    """

    def __init__(
        self,
        model: Model,
        *,
        rows: int,
        cache_bytes: int,
        usual: Steering | None = None,
        opens: frozenset[int] = frozenset(),
        exact: bool = False,
    ):
        options = {"max_bytes": cache_bytes, "usual": usual, "exact": exact}
        self.prompts = PromptCache(model.network, **options)
        self._model, self._limit, self._opens = model, rows, opens
        self._waiting: deque[_TakenJob] = deque()
        self._reading: deque[_TakenJob] = deque()
        self._batch: Batch | None = None
        self._rows: dict[int, tuple[_TakenJob, int]] = {}  # row of the batch -> job, choice
        self._owed: dict[Job, int] = {}  # answers that have not ended yet
        self._wired: Wired | None = None
        self._asked = 0.0  # when the last job came

    @property
    def busy(self) -> bool:
        return bool(self._waiting or self._reading or self._rows)

    @property
    def running(self) -> int:
        """Answers that are decoded or whose prompt is read."""
        return len(self._rows) + sum(taken.job.n for taken in self._reading)

    @property
    def waiting(self) -> int:
        return sum(taken.job.n for taken in self._waiting)

    def take(self, job: Job) -> Event:
        """Take a job, or refuse it now if its steering cannot be applied."""
        self._owed[job], self._asked = job.n, time.monotonic()
        self._wired = self._wired or Wired()
        try:
            additions(self._model.network, job.steering)
        except DenseSteerError as error:
            del self._owed[job]
            return Failed(bad(str(error), "steering"))
        self._waiting.append(_TakenJob(job))
        return Taken()

    def cancel(self, job: Job) -> None:
        """Forget a job; harmless if it has ended."""
        for queue in (self._waiting, self._reading):
            for taken in [one for one in queue if one.job is job]:
                queue.remove(taken)
        for row in [row for row, (taken, _) in self._rows.items() if taken.job is job]:
            del self._rows[row]
            self._batch.cancel(row)
        self._owed.pop(job, None)

    def work(self) -> Told:
        """Read a part of the prompts, decode one token of every row, and return the events."""
        # A prompt that cannot be read is told at once, before the decoding may fail too.
        return self._read() or self._decode()

    def close(self) -> Told:
        """End all jobs because the server ends."""
        self._waiting.clear()
        told = self._end_begun(ending())
        self._unwire()
        return told

    def recover(self, fault: Fault) -> Told:
        """Go on after a failed step: end all jobs but those that wait, and free what they used.

        Raises:
            RuntimeError: the device fails again.
        """
        told = self._end_begun(fault)
        for stream in (generation_stream, BESIDE):
            with contextlib.suppress(RuntimeError):
                mx.synchronize(stream)  # what else fails there is of rows that have ended
        self._free()
        return told

    def rest(self) -> None:
        """Free memory while no answers run, and unwire it after ``UNWIRE`` seconds without a request.

        Not between two requests of one client: it takes time to allocate memory again.
        """
        if self._batch is not None and not self._rows:
            self._batch.close()
            self._batch = None
            mx.clear_cache()
        if not self._owed and time.monotonic() - self._asked >= UNWIRE:
            self._unwire()

    def _unwire(self) -> None:
        if self._wired is not None:
            self._wired.close()
            self._wired = None

    def _end_begun(self, fault: Fault) -> Told:
        """End all jobs but those that wait; return an event for each."""
        waiting = {taken.job: taken.job.n for taken in self._waiting}
        told: Told = [(job, Failed(fault)) for job in self._owed if job not in waiting]
        self._owed = waiting
        self._reading.clear()
        self._rows.clear()
        self.rest()
        return told

    def _keep(self, reading: PromptReading, ended: Piece) -> None:
        """Keep an answer with its prompt; if that fails, the answer is told all the same."""
        try:
            reading.keep_answer(ended.result.token_ids, ended.caches)
        except Exception as error:
            failed("keeping an answer", error)
            self._free()

    def _free(self) -> None:
        """Free what a failed computation may have lacked; raise if the rows' step or the device fails too."""
        self.prompts.clear()
        mx.clear_cache()
        own = mx.default_stream(mx.default_device())
        with contextlib.suppress(RuntimeError):
            mx.synchronize(own)  # what else fails there is of the same prompt
        for stream in (own, generation_stream, BESIDE):
            with mx.stream(stream):
                mx.eval(mx.zeros(1) + 1)

    def _read(self) -> Told:
        """Read prompts in order of arrival, a few at a time so that running rows can decode.

        Return an event if one cannot be read: it ends that job, and no other.
        """
        # A job with more answers than rows is taken when nothing else runs; the batch queues them.
        while self._waiting and (
            not self.running or self.running + self._waiting[0].job.n <= self._limit
        ):
            self._reading.append(self._waiting.popleft())
        budget = PREFILL_BESIDE
        while self._reading and budget > 0:
            taken = self._reading[0]
            if taken.reading is None:
                self._join_together()
                continue
            try:
                budget -= taken.reading.advance()
                if taken.reading.done:
                    self._reading.popleft()
                    self._join(taken, taken.job.tokens[-1:])
            except Exception as error:
                self._free()  # before the job is forgotten: if this fails too, ``recover`` tells it
                self.cancel(taken.job)
                return [(taken.job, Failed(failed("reading a prompt", error)))]
        return []

    def _join_together(self) -> None:
        """Begin to read: several short prompts that begin differently at once, else the first."""
        for taken in self._reading:
            job = taken.job
            if job.echo:
                taken.reading = Echo(self._model, job.tokens, job.steering, job.logprobs)
            else:
                taken.reading = self.prompts.read(job.tokens, job.steering, self._opens)
        next_chunks = Counter(taken.reading.next_chunk for taken in self._reading)
        rests = {
            taken: taken.reading.rest()
            for taken in self._reading
            if taken.job.n == 1 and next_chunks[taken.reading.next_chunk] == 1
        }
        together = {taken: rest for taken, rest in rests.items() if rest}
        if len(together) > 1:
            self._reading = deque(taken for taken in self._reading if taken not in together)
            for taken, rest in together.items():
                self._join(taken, rest)
        for taken in list(self._reading)[len(together) <= 1 :]:
            taken.reading = None  # looked up again in its turn: more may be cached then

    def _join(self, taken: _TakenJob, tokens: list[int]) -> None:
        """Let a job's rows join the batch; ``tokens`` are those that its caches do not hold."""
        if self._batch is None:
            self._batch = Batch(self._model, rows=self._limit)
        job, caches = taken.job, taken.reading.caches()
        for choice in range(job.n):
            row = self._batch.add(
                tokens,
                steering=job.steering,
                max_tokens=job.max_tokens,
                sampling=_sampling(job.sampling, choice),
                stop=job.stop,
                cache=caches,
                logprobs=job.logprobs,
                whole=job.tokens,
                think_limit=job.think_limit,
                grammar=job.grammar,
                bias=job.bias,
                brake=job.brake,
                keep=job.n == 1 and taken.reading.keeps_answer,
            )
            self._rows[row] = taken, choice

    def _decode(self) -> Told:
        pieces: list[Piece] = [] if self._batch is None else self._batch.step()
        told: Told = []
        for piece in pieces:
            taken, choice = self._rows[piece.row]
            told_piece = replace(
                piece, caches=(), logprobs=(*taken.reading.echo(choice), *piece.logprobs)
            )  # another thread holds it as long as its client likes
            said = Said(taken.job.first + choice, told_piece, taken.reading.cached_tokens)
            told.append((taken.job, said))
            if piece.result:
                if piece.caches:
                    self._keep(taken.reading, piece)
                del self._rows[piece.row]
                self._owed[taken.job] -= 1
                if not self._owed[taken.job]:
                    del self._owed[taken.job]
        return told


def _sampling(sampling: Sampling, choice: int) -> Sampling:
    """Return the sampling of one of several answers: with a seed each draws its own."""
    if sampling.seed is None or not choice:
        return sampling
    return replace(sampling, seed=(sampling.seed + choice) % 2**64)
