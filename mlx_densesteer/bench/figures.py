"""Sides that take turns, and what their seconds say. No mlx."""

import statistics
import time
from collections.abc import Callable, Sequence

Tell = Callable[[str], None]
Side = Callable[[], float]  # does its work once, and returns the seconds of it


def quiet(message: str) -> None:
    """Tell nobody how far it is."""


def alternate(
    sides: Sequence[Side], *, rounds: int, seconds: float = 0.0, tell: Tell = quiet
) -> list[list[float]]:
    """Let every side do its work once a round; return each side's seconds, round by round.

    Another side begins each round, and every second round goes backwards, so that no side
    always follows the same one. With ``seconds`` there is no new round once they are over.
    """
    taken: list[list[float]] = [[] for _ in sides]
    began = time.perf_counter()
    for number in range(rounds):
        if number and 0 < seconds < time.perf_counter() - began:
            break
        turn = number % len(sides)
        order = [*range(turn, len(sides)), *range(turn)]
        for side in order if number % 2 == 0 else reversed(order):
            taken[side].append(sides[side]())
        tell(f"round {number + 1} of {rounds} at most")
    return taken


def timed(work: Callable[[], object]) -> float:
    """Do some work; return its seconds."""
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def over(one: Sequence[float], other: Sequence[float]) -> list[float]:
    """Return ``one / other`` round by round."""
    return [a / b for a, b in zip(one, other, strict=True)]


def spread(values: Sequence[float]) -> dict[str, float]:
    """Return the median and the quartiles; of few values the quartiles are nearly the extremes."""
    ordered = sorted(values)
    quarter = len(ordered) // 4
    return {
        "median": statistics.median(ordered),
        "low": ordered[quarter],
        "high": ordered[-1 - quarter],
        "count": len(ordered),
    }
