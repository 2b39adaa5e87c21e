"""The chat's status line, and tables that compare answers."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ..text import aligned, one_line, signed, signed_dose

if TYPE_CHECKING:
    from ..generation.answer import Generation
    from ..steering.steering import Steering
    from .rows import Row

ENDINGS = {"stop": "end", "length": "cut off", "interrupted": "interrupted"}


def strength_of(steering: "Steering | None") -> float:
    """Return lambda, 0 without a steering."""
    return steering.strength if steering else 0.0


@dataclass(frozen=True)
class Status:
    """The settings in force.

    ``dose`` is a fraction of the residual stream, negative where the strength is. The conversation has
    ``tokens`` tokens of at most ``context``.
    """

    model: str
    steering: "Steering | None"
    dose: float
    tokens: int
    context: int

    @property
    def prompt(self) -> str:
        """The prompt before a question: the dose in force."""
        return f"{signed_dose(self.dose)}> " if self.steering else "unsteered> "

    @property
    def amount(self) -> str:
        """The dose and the strength: ``+20% (strength +4.76)``."""
        return f"{signed_dose(self.dose)} (strength {signed(strength_of(self.steering))})"

    @property
    def settings(self) -> list[str]:
        """What is steered, where and how strongly."""
        if self.steering is None:
            return ["unsteered"]
        from ..steering.vector import format_layers

        positions, budget = self.steering.positions, self.steering.budget
        return [
            f"vector {one_line(self.steering.vector.name, 24)}",
            f"layer {one_line(format_layers(self.steering.layers), 20)}",
            f"dose {self.amount}",
            *([f"positions {positions}"] if positions != "all" else []),
            *(
                [f"strength {signed(budget.strength)} from {budget.tokens} tokens of thought on"]
                if budget
                else []
            ),
        ]

    def lines(self, width: int, *more: str) -> list[str]:
        """Return the settings (and ``more``) on as few lines as ``width`` columns allow."""
        tokens = f"{self.tokens}/{self.context} tokens"
        lines: list[str] = []
        for part in (one_line(self.model, 30), *self.settings, tokens, *more):
            joined = f"{lines[-1]} | {part}" if lines else part
            if lines and len(joined) <= width - 2:
                lines[-1] = joined
            else:
                lines.append(one_line(part, max(width - 2, 4)))
        return lines


def sweep_lines(rows: "Sequence[Row]", doses: Sequence[float], width: int) -> list[str]:
    """Return one line for each row; the beginning of the answer fills the line."""
    from ..generation.answer import split_steps

    table = [["dose", "strength", "steps", "tokens", "density", "ending"]]
    for row, dose in zip(rows, doses, strict=True):
        figures = ["-", "-", "..."] if row.result is None else _figures(row.result)
        steps = str(len(split_steps(row.text)))
        table.append([signed_dose(dose), signed(strength_of(row.steering)), steps, *figures])
    left = aligned(table)
    longest = max(map(len, left))
    room = max(width - longest - 2, 8)
    words = ["answer", *(one_line(row.answer, room) for row in rows)]
    return [
        f"{line.ljust(longest)}  {word}".rstrip() for line, word in zip(left, words, strict=True)
    ]


def stats_lines(
    answers: "Sequence[tuple[str, Generation | None]]",
    dose: "Callable[[Steering | None], float]",
) -> list[str]:
    """Return a column of figures for each answer under its title; leave out those still ``None``."""
    columns = [["", "dose", "strength", "tokens", "steps", "density", "tokens/s", "ending"]]
    for title, one in answers:
        if one is None:
            continue
        tokens, density, ending = _figures(one)
        columns.append(
            [
                title,
                signed_dose(dose(one.steering)),
                signed(strength_of(one.steering)),
                tokens,
                str(one.steps),
                density,
                f"{one.tokens_per_second:.1f}",
                ending,
            ]
        )
    return aligned(list(zip(*columns, strict=True)))


def _figures(result: "Generation") -> list[str]:
    density = f"{result.density:.1f}" if result.density else "-"
    return [str(result.tokens), density, ENDINGS[result.finish_reason]]
