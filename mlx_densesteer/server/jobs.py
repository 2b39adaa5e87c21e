"""What the model's thread is asked to do, and what it tells of it."""

from dataclasses import dataclass

from ..generation.batch import Piece
from ..generation.sampling import Sampling
from ..steering.request import Request
from .faults import Fault


@dataclass(frozen=True, eq=False)
class Job:
    """One prompt, answered ``n`` times. ``first`` is the number of its first answer in the reply.

    ``asked`` is the steering, ``None`` for the stock model; a dose becomes a strength on the model's
    thread.
    """

    tokens: list[int]
    asked: Request | None
    max_tokens: int
    sampling: Sampling
    stop: tuple[str, ...] = ()
    n: int = 1
    logprobs: int | None = None
    first: int = 0


@dataclass(frozen=True)
class Taken:
    """The job was taken. ``steering`` is what is applied, ``None`` for the stock model."""

    steering: dict[str, object] | None


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
