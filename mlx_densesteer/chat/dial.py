"""Strengths as they are typed: plain numbers, and relative doses with a percent sign."""

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from ..errors import InputError

if TYPE_CHECKING:
    import mlx.nn as nn
    from mlx_lm.tokenizer_utils import TokenizerWrapper

    from ..steering.steering import Steering

DOSES = (-0.1, 0.0, 0.1, 0.2, 0.4)  # of a sweep from strength 0
FACTORS = (0.0, 0.5, 1.0, 1.5, 2.0)  # of a sweep around another strength


class Doses:
    """Relative doses of a model's steerings; the norms that they need are measured once."""

    def __init__(self, model: "nn.Module", tokenizer: "TokenizerWrapper"):
        self._model, self._tokenizer = model, tokenizer
        self._norms: dict[tuple[str, tuple[int, ...]], dict[int, float]] = {}

    def norms(self, steering: "Steering") -> dict[int, float]:
        """Return the mean ``||h_l||`` at the steered layers."""
        from ..model.dose import mean_norms

        vector, layers = steering.vector, steering.layers
        key = vector.sha256(), layers
        if key not in self._norms:
            self._norms[key] = mean_norms(self._model, self._tokenizer, vector, layers)
        return self._norms[key]

    def of(self, steering: "Steering") -> dict[int, float]:
        """Return the relative dose at each steered layer."""
        return steering.relative_dose(self.norms(steering))

    def strength(self, steering: "Steering", dose: float) -> float:
        """Return the strength at which the relative dose is ``dose``."""
        from ..model.dose import strength_for

        return strength_for(steering.vector, self.norms(steering), dose)


def read_strength(text: str, relative: Callable[[float], float]) -> float:
    """Return the strength that ``text`` names: ``1.5``, ``-2``, or ``10%`` of the residual stream.

    ``relative`` turns a relative dose into a strength.

    Raises:
        InputError: neither of them.
    """
    number, percent = text.strip().removesuffix("%"), text.strip().endswith("%")
    try:
        value = float(number)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise InputError(
            f"strength {text!r}: expected a number such as 1.5, -2 or 0, or a relative dose: 10%."
        )
    return relative(value / 100) if percent else value


def sweep_strengths(
    text: str, present: float, relative: Callable[[float], float]
) -> Sequence[float]:
    """Return the strengths to sweep, each once, in order: those in ``text``, else five of our choice.

    Those are around ``present``, 0 among them.
    """
    if words := text.replace(",", " ").split():
        chosen = [read_strength(word, relative) for word in words]
    elif present:
        chosen = [present * factor for factor in FACTORS]
    else:
        chosen = [relative(dose) if dose else 0.0 for dose in DOSES]
    return sorted({one + 0.0 for one in chosen})
