"""The settings in force in a few words, and the receipt of an answer."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ..cli.speculate import tell_draft
from ..text import count, one_line, signed

if TYPE_CHECKING:
    from ..generation.answer import Generation
    from ..steering.steering import Steering


@dataclass(frozen=True)
class Status:
    """What is always visible; ``tokens`` of at most ``context`` are in the conversation."""

    model: str
    vector: str | None
    layers: str
    strength: float
    positions: str
    tokens: int
    context: int

    @classmethod
    def of(cls, model: str, steering: "Steering | None", tokens: int, context: int) -> "Status":
        if steering is None:
            return cls(model, None, "", 0.0, "", tokens, context)
        from ..steering.vector import format_layers

        return cls(
            model, steering.vector.name, format_layers(steering.layers), steering.strength,
            steering.positions, tokens, context,
        )  # fmt: skip

    @property
    def prompt(self) -> str:
        """What precedes a question: the strength in force."""
        return f"{signed(self.strength)}> " if self.vector else "unsteered> "

    def parts(self) -> list[str]:
        parts = [one_line(self.model, 30)]
        if self.vector is None:
            parts.append("no vector, strength 0")
        else:
            parts += [
                f"vector {one_line(self.vector, 24)}", f"layer {one_line(self.layers, 20)}",
                f"strength {signed(self.strength)}", f"positions {self.positions}",
            ]  # fmt: skip
        return [*parts, f"{self.tokens}/{self.context} tokens"]

    def lines(self, width: int, *more: str) -> list[str]:
        """Return the settings (and ``more``) on as few lines as ``width`` columns allow."""
        lines: list[str] = []
        for part in (*self.parts(), *more):
            joined = f"{lines[-1]} | {part}" if lines else part
            if lines and len(joined) <= width - 2:
                lines[-1] = joined
            else:
                lines.append(one_line(part, max(width - 2, 4)))
        return lines


ENDINGS = {"stop": "", "length": "; cut off, it was as long as allowed",
           "interrupted": "; interrupted"}  # fmt: skip


def receipt(result: "Generation", *, name_strength: bool = False) -> str:
    """Return one line on an answer: ``60 tokens, 1 step, density 60.0, 45.1 tokens/s``."""
    density = f", density {result.density:.1f}" if result.density else ""
    strength = ""
    if name_strength:
        steered = result.steering and result.steering.strength
        strength = f"strength {signed(steered)}: " if steered else "unsteered: "
    return (
        f"{strength}{count(result.tokens, 'token')}, {count(result.steps, 'step')}{density}, "
        f"{result.tokens_per_second:.1f} tokens/s{tell_draft(result)}"
        f"{ENDINGS.get(result.finish_reason, '')}"
    )


def brake_lines(result: "Generation") -> Sequence[str]:
    """Return what the brake did, a line for each time."""
    return [
        f"the answer began to repeat itself: {count(one.dropped, 'token')} cut off after token "
        f"{one.at_token}, strength {signed(one.strength_before)} -> {signed(one.strength_after)}"
        for one in result.brakes
    ]
