"""The tables of ``/sweep`` and ``/stats``: pure functions on answers, whole or so far."""

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from ..generation.answer import split_steps
from ..text import aligned, one_line, signed

if TYPE_CHECKING:
    from ..generation.answer import Generation
    from ..steering.steering import Steering
    from .rows import State

ENDINGS = {"stop": "end", "length": "cut off", "interrupted": "stopped"}


def sweep_lines(states: "Sequence[State]", width: int) -> list[str]:
    """Return one line for each strength; the first words take what room there is."""
    table = [["strength", "steps", "tokens", "density", "ending"]]
    for state in states:
        strength = state.steering.strength if state.steering else 0.0
        figures = [str(len(split_steps(state.text))), "-", "-", "..."]
        if (result := state.result) is not None:
            density = f"{result.density:.1f}" if result.density else "-"
            figures = [str(result.steps), str(result.tokens), density, ending(result)]
        table.append([signed(strength), *figures])
    left = aligned(table)
    words = [
        "answer",
        *(one_line(state.text, max(width - len(left[0]) - 2, 8)) for state in states),
    ]
    return [f"{line}  {word}".rstrip() for line, word in zip(left, words, strict=True)]


def stats_lines(
    steered: "Generation | None",
    unsteered: "Generation | None",
    dose: "Callable[[Steering], float]",
) -> list[str]:
    """Return the receipts of two answers to one question beside each other; ``None`` is not there."""
    shown = [one for one in (steered, unsteered) if one is not None]
    heads = [name for name, one in (("steered", steered), ("unsteered", unsteered)) if one]
    return aligned([
        ["", *heads],
        ["strength", *(signed(_strength(one)) for one in shown)],
        ["relative dose", *(f"{dose(one.steering):.2g}" if _strength(one) else "-" for one in shown)],
        ["tokens", *(str(one.tokens) for one in shown)],
        ["steps", *(str(one.steps) for one in shown)],
        ["density", *(f"{one.density:.1f}" if one.density else "-" for one in shown)],
        ["tokens/s", *(f"{one.tokens_per_second:.1f}" for one in shown)],
        ["ending", *(ending(one) for one in shown)],
    ])  # fmt: skip


def ending(result: "Generation") -> str:
    return ENDINGS.get(result.finish_reason, result.finish_reason)


def _strength(result: "Generation") -> float:
    return result.steering.strength if result.steering else 0.0
