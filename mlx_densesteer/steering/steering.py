"""``Steering``: which vector, how strong, at which layers and positions. No mlx."""

import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import get_args

import numpy as np

from ..errors import SteeringError
from .vector import Positions, SteeringVector, format_layers

# Users are warned from this dose on. At about 1 the 0.5B test checkpoint repeats itself without end
# (benchmarks/dose.py); other projects report collapse from about 1.9 on (docs/steering.md).
LARGE_DOSE = 0.8
LARGE_DOSE_WARNING = (
    "warning: a large dose. The 0.5B test model collapsed at about 100%, others' models at about 190%: "
    "the same words over and over, text without sense, or no text at all. Try a smaller strength."
)

UNSTEERED = "unsteered"  # the fingerprint of no steering


def check_positions(positions: str) -> None:
    """Raise ``SteeringError`` unless it is one of ``Positions``."""
    if positions not in get_args(Positions):
        expected = ", ".join(get_args(Positions))
        raise SteeringError(f"positions {positions!r}: expected one of {expected}.")


@dataclass(frozen=True)
class Steering:
    """Add ``lambda * v_l`` to the residual stream at the output of some decoder blocks.

        h_l <- h_l + strength * v_l        for every layer l in ``layers``

    Positive strength is towards dense; 0 is the unsteered model, bit for bit.

    Args:
        vector: the steering vector.
        strength: lambda, any finite number.
        layers: 0-based layer numbers.
        positions: at which tokens of the sequence the vector is added.
            ``"all"``: at every token, as the reference does.
            ``"prompt"``: at every prompt token.
            ``"generated"``: at every token whose output chooses a generated one: from the *last
            prompt token* on (which belongs to ``"prompt"`` too).
            ``"steps"``: at those of ``"generated"`` whose own text holds a blank line: they end a
            step, and their output begins the next one.

    Raises:
        SteeringError: a strength that is not finite, no layers, unknown positions, or
            ``strength * v_l`` overflows float32.
        VectorMismatchError: a layer that the vector does not hold.

    Source: arXiv 2605.29247, section 3; one layer there, any number here. ``"steps"``: SEAL, arXiv
    2504.07986.
    """

    vector: SteeringVector
    strength: float
    layers: tuple[int, ...]
    positions: Positions = "all"
    _deltas: dict[int, np.ndarray] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        check_positions(self.positions)
        strength = float(self.strength)
        if not math.isfinite(strength):
            raise SteeringError(f"strength {self.strength}: expected a finite number.")
        layers = tuple(sorted({int(layer) for layer in self.layers}))
        if not layers:
            raise SteeringError("no layers to steer: name at least one.")
        chosen = self.vector.select(layers).layers
        with np.errstate(over="ignore"):  # an overflow raises below
            deltas = {k: np.float32(strength) * array for k, array in chosen.items()}
        if bad := [layer for layer, delta in deltas.items() if not np.isfinite(delta).all()]:
            raise SteeringError(
                f"strength {strength:g} overflows float32 at layer {format_layers(bad)}: "
                "choose a smaller one."
            )
        for delta in deltas.values():
            delta.setflags(write=False)
        object.__setattr__(self, "strength", strength)
        object.__setattr__(self, "layers", layers)
        object.__setattr__(self, "_deltas", deltas)

    def delta(self, layer: int) -> np.ndarray | None:
        """Return ``strength * v_layer``, float32 ``(hidden_size,)``; ``None`` if nothing is added there."""
        return self._deltas.get(layer) if self.strength else None

    @property
    def fingerprint(self) -> str:
        """Identify what is added to the stream. Strength 0 has the fingerprint of no steering."""
        if not self.strength:
            return UNSTEERED
        digest = hashlib.sha256(json.dumps([self.positions, self.layers]).encode())
        for layer in self._deltas:
            digest.update(self._deltas[layer].astype("<f4").tobytes())
        return digest.hexdigest()[:16]

    def dose(self, residual_norms: Mapping[int, float]) -> float:
        """Return how much is added, relative to the residual stream; 0.2 is 20 %.

            dose = sum_l( |strength| * ||v_l|| / mean ||h_l|| )

        It is a sum because what one layer adds is still in the stream at the next one: the same dose
        moves the stream about as far at one layer as at three. Doses of different vectors can be
        compared, strengths cannot: norms of the reference's vectors lie between 0.06 and 72.

        Args:
            residual_norms: the mean ``||h_l||`` of each steered layer (``Model.norms``).
        """
        norms = self.vector.norms()
        return sum(abs(self.strength) * norms[k] / residual_norms[k] for k in self.layers)

    def describe(self) -> dict[str, object]:
        """Return the settings as plain values, for JSON."""
        return {
            "vector": self.vector.name,
            "strength": self.strength,
            "layers": list(self.layers),
            "positions": self.positions,
            "fingerprint": self.fingerprint,
        }
