"""All that happens with the model while it serves; one thread, no locks, no HTTP.

Each turn of ``work`` reads a part of the prompts that arrive and decodes one token of every row that
runs. Prompts are read by ``prompt_cache``, rows decoded by ``batch``.
"""

from collections import Counter, deque
from dataclasses import dataclass

import mlx.core as mx

from ..errors import DenseSteerError
from ..generation.batch import PREFILL_BESIDE, Batch, Piece
from ..generation.sampling import Sampling
from ..model.block import deltas
from ..model.model import Model
from ..steering.steering import LARGE_DOSE, Steering
from .faults import Fault, bad, ending
from .jobs import Event, Failed, Job, Said, Taken
from .prompt_cache import PromptCache, PromptReading

Told = list[tuple[Job, Event]]


@dataclass(eq=False)
class _Work:
    """A job that was taken: it waits, its prompt is read, its rows run."""

    job: Job
    steering: Steering | None
    reading: PromptReading | None = None
    cached_tokens: int = 0


class Worker:
    """Jobs in, events out.

    Args:
        rows: how many answers are decoded together at most.
        cache_bytes: what the prompt cache may hold.
        usual: the steering that most requests will ask for.
        opens: tokens that open a message (``prompt_cache.cut``).
    """

    def __init__(
        self, model: Model, *, rows: int, cache_bytes: int,
        usual: Steering | None = None, opens: frozenset[int] = frozenset(),
    ):  # fmt: skip
        self.prompts = PromptCache(model.network, max_bytes=cache_bytes, usual=usual)
        self._model, self._limit, self._opens = model, rows, opens
        self._waiting: deque[_Work] = deque()
        self._reading: deque[_Work] = deque()
        self._batch: Batch | None = None
        self._rows: dict[int, tuple[_Work, int]] = {}  # row of the batch -> job, choice
        self._owed: dict[Job, int] = {}  # answers that were promised and are not told yet

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
        """Take a job, or say why not: what is refused must not fail in the middle of a step."""
        self._owed[job] = job.n
        try:
            steering = self._steering(job)
            deltas(self._model.network, steering)
            applied = None if steering is None else self._applied(steering)
        except DenseSteerError as error:
            del self._owed[job]
            return Failed(error if isinstance(error, Fault) else bad(str(error), "steering"))
        self._waiting.append(_Work(job, steering))
        return Taken(applied)

    def cancel(self, job: Job) -> None:
        """Forget a job; harmless if it has ended."""
        self._owed.pop(job, None)
        for queue in (self._waiting, self._reading):
            for taken in [one for one in queue if one.job is job]:
                queue.remove(taken)
        for row in [row for row, (taken, _) in self._rows.items() if taken.job is job]:
            del self._rows[row]
            self._batch.cancel(row)

    def work(self) -> Told:
        """Read some, decode one token of every row; return what there is to tell."""
        self._read()
        return self._decode()

    def fail(self, fault: Fault) -> Told:
        """End everything; return what to tell those who wait, wherever their jobs are."""
        told: Told = [(job, Failed(fault)) for job in self._owed]
        for those in (self._owed, self._waiting, self._reading, self._rows):
            those.clear()
        self.rest()
        return told

    def close(self) -> Told:
        """End everything because the server ends."""
        return self.fail(ending())

    def recover(self, fault: Fault) -> Told:
        """Go on after half a step: everything that ran is lost, the prompt cache too."""
        told = self.fail(fault)
        self.prompts.clear()
        mx.clear_cache()
        return told

    def _steering(self, job: Job) -> Steering | None:
        if job.asked is None or not job.asked.amount.number:
            return None
        return job.asked.steering(self._model)

    def _applied(self, steering: Steering) -> dict[str, object]:
        """Say what is applied: the steering, its dose, and a warning of an overdose."""
        dose, warning = self._model.dose(steering), None
        if dose >= LARGE_DOSE:
            warning = "a large dose: the answer may repeat itself or lose its sense."
        return steering.describe() | {"dose": dose, "warning": warning}

    def _read(self) -> None:
        """Read prompts, in the order in which they came, as far as rows that decode can wait."""
        # more answers than rows in one job: the batch lets the rest wait
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
            budget -= taken.reading.advance()
            if taken.reading.done:
                self._reading.popleft()
                self._join(taken, taken.job.tokens[-1:])

    def _join_together(self) -> None:
        """Begin to read: several short prompts with nothing in common at once, else the first one."""
        for taken in self._reading:
            taken.reading = self.prompts.read(taken.job.tokens, taken.steering, self._opens)
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
            taken.reading = None  # looked up again when its turn comes: more is known then

    def _join(self, taken: _Work, tokens: list[int]) -> None:
        """Let a job's rows join the batch; ``tokens`` are what its caches do not hold."""
        if self._batch is None:
            self._batch = Batch(self._model, rows=self._limit)
        job, caches = taken.job, taken.reading.caches()
        for choice in range(job.n):
            row = self._batch.add(
                tokens, steering=taken.steering, max_tokens=job.max_tokens,
                sampling=_sampling(job.sampling, choice), stop=job.stop, cache=caches,
                logprobs=job.logprobs,
            )  # fmt: skip
            self._rows[row] = taken, choice
        taken.cached_tokens, taken.reading = taken.reading.cached_tokens, None

    def _decode(self) -> Told:
        pieces: list[Piece] = [] if self._batch is None else self._batch.step()
        told: Told = []
        for piece in pieces:
            taken, choice = self._rows[piece.row]
            said = Said(taken.job.first + choice, piece, taken.cached_tokens)
            told.append((taken.job, said))
            if piece.result:
                del self._rows[piece.row]
                self._owed[taken.job] -= 1
                if not self._owed[taken.job]:
                    del self._owed[taken.job]
        return told

    def rest(self) -> None:
        """Give back what is not needed while nothing runs.

        Not between two requests of one client: memory that is given back must be got again.
        """
        if self._batch is not None and not self._rows:
            self._batch.close()
            self._batch = None
            mx.clear_cache()


def _sampling(sampling: Sampling, choice: int) -> Sampling:
    """Return the sampling of one of several answers: with a seed each draws its own."""
    if sampling.seed is None or not choice:
        return sampling
    return Sampling(sampling.temp, sampling.top_p, (sampling.seed + choice) % 2**64)
