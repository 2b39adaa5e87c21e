"""Sides that take turns, the ratios of their seconds, and the table of figures. No mlx."""

import statistics
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field

Tell = Callable[[str], None]  # is called with how far a benchmark is
Side = Callable[[], float]  # does its work once and returns its seconds
Spread = dict[str, float]  # "median", "low" and "high" (the quartiles), "count"


@dataclass(frozen=True)
class Figure:
    """One line of the table.

    ``key`` is its name at the top level of the JSON object, or empty. ``noise`` is the ratio of the
    same work to itself.
    """

    key: str
    name: str
    value: float | bool | str | None
    spread: Spread | None = None
    noise: Spread | None = None
    remark: str = ""

    @classmethod
    def of(
        cls, key: str, name: str, spread: Spread, noise: Spread | None = None, remark: str = ""
    ) -> "Figure":
        """Return the figure whose value is the median of a spread."""
        return cls(key, name, spread["median"], spread, noise, remark)

    def cells(self) -> tuple[str, ...]:
        """Return name, value, quartiles and noise as text."""
        value = "-" if self.value is None else str(self.value)
        if isinstance(self.value, bool):
            value = "yes" if self.value else "NO"
        elif isinstance(self.value, float):
            value = f"{self.value:.3f}"
        noise = f"{self.noise['median']:.3f} ({quartiles(self.noise)})" if self.noise else ""
        return (self.name, value, quartiles(self.spread) if self.spread else "", noise)


@dataclass(frozen=True)
class Measurement:
    """What a benchmark found: lines of the table, or text, which needs ``figures`` for the JSON."""

    table: Sequence[Figure | str]
    details: dict[str, object] = field(default_factory=dict)
    figures: Mapping[str, object] = field(default_factory=dict)

    @property
    def lines(self) -> list[Figure]:
        return [one for one in self.table if isinstance(one, Figure)]

    def document(self) -> dict[str, object]:
        """Return the figures by key, and all else under ``details``."""
        keyed = {one.key: one.value for one in self.lines if one.key}
        table = [asdict(one) for one in self.lines]
        return {**keyed, **self.figures, "details": {"table": table, **self.details}}


def quiet(message: str) -> None:
    """Show no progress."""


def alternate(
    sides: Sequence[Side], *, rounds: int, seconds: float = 0.0, tell: Tell = quiet
) -> list[list[float]]:
    """Let every side do its work once a round; return each side's seconds, round by round.

    Each round begins with another side, and every second one goes backwards, so that no side always
    follows the same one. After ``seconds`` no new round begins; 0 is no limit.
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
        tell(f"round {number + 1} of at most {rounds}")
    return taken


def timed(work: Callable[[], object]) -> float:
    """Do some work; return its seconds."""
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def spread(values: Sequence[float]) -> Spread:
    """Return the median and the quartiles; of few values the quartiles are nearly the extremes."""
    ordered = sorted(values)
    quarter = len(ordered) // 4
    return {
        "median": statistics.median(ordered),
        "low": ordered[quarter],
        "high": ordered[-1 - quarter],
        "count": len(ordered),
    }


def ratio(one: Sequence[float], other: Sequence[float]) -> Spread:
    """Return the spread of ``one / other``, taken round by round."""
    return spread([a / b for a, b in zip(one, other, strict=True)])


def quartiles(of: Spread) -> str:
    return f"{of['low']:.3f}-{of['high']:.3f}" if of["count"] > 1 else "one round"


def lines(measured: Iterable[tuple[str, Sequence[Figure]]]) -> list[str]:
    """Return the table: for each (benchmark, figures) a line with its name, then the figures."""
    cells: list[tuple[str, ...]] = [("", "value", "quartiles", "the same twice")]
    for name, figures in measured:
        cells.append((name,))
        for figure in figures:
            name, *rest = figure.cells()
            cells.append((f"  {name}", *rest))
            if figure.remark:
                cells.append((f"      {figure.remark}",))
    full = [line for line in cells if len(line) > 1]
    widths = [max(map(len, column)) for column in zip(*full, strict=True)]
    return ["  ".join(map(str.ljust, line, widths)).rstrip() for line in cells]
