"""Figures as text: aligned columns, and estimates with their interval."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ..evaluation.scoring import Estimate


def aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    """Return lines whose columns are aligned: the first to the left, others to the right."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = []
    for row in rows:
        first, *rest = (cell.ljust(w) if not i else cell.rjust(w)
                        for i, (cell, w) in enumerate(zip(row, widths, strict=True)))  # fmt: skip
        lines.append("  ".join([first, *rest]).rstrip())
    return lines


def percent(value: float) -> str:
    return f"{100 * value:.1f}%"


def signed(strength: float) -> str:
    """Write a strength with its sign; strength 0 has none."""
    return f"{strength:+.3g}" if strength else "0"


def dose(fraction: float) -> str:
    """Write a dose with its sign: ``+20%``; that of strength 0 is 0."""
    from ..steering.request import format_dose

    return f"{'+' if fraction > 0 else ''}{format_dose(fraction)}" if fraction else "0"


def estimate(one: "Estimate | None", digits: int = 1) -> str:
    """Write ``5.1 [4.8, 5.4]``."""
    if one is None:
        return "-"
    return f"{one.value:.{digits}f} [{one.low:.{digits}f}, {one.high:.{digits}f}]"


def share(one: "Estimate") -> str:
    """Write ``45.0% [35.6, 54.8]``."""
    return f"{percent(one.value)} [{100 * one.low:.1f}, {100 * one.high:.1f}]"
