"""Turn what a user asks for into a ``Steering``: the grammar of strengths, and every default.

The command line, the chat, the server, lm-eval and Python all use it. No mlx: for a dose, the caller
passes the model, which knows its norms.
"""

import math
import re
import warnings
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from ..errors import InputError, SteeringError
from ..text import one_line
from .steering import Positions, Steering
from .vector import SteeringVector, format_layers

DEFAULT_DOSE = 0.2  # visible at the first try, and far from the collapse at about 1
LARGEST = 1e9  # largest |strength|: far above any under which a model still writes text
NEAR = 0.1  # a lower layer is preferred if its gain is within this share of the best
_LONGEST = 10_000  # characters of a list of layers
SMALLEST = 1e-5  # a vector whose strength 1 is a smaller dose consists of rounding errors

_NUMBER = re.compile(r"[+-]?(\d+(\.\d*)?|\.\d+)(e[+-]?\d+)?", re.ASCII | re.IGNORECASE)
_LAYERS = re.compile(r"(\d{1,4})(?:-(\d{1,4}))?", re.ASCII)


class HasNorms(Protocol):
    """The model that a request is for; ``model.model.Model`` is one."""

    def norms(self, vector: SteeringVector, layers: Iterable[int]) -> Mapping[int, float]:
        """Return the mean ``||h_l||`` at each layer, to which a dose refers."""

    def other_weights(self, vector: SteeringVector, *, strict: bool = False) -> str | None:
        """Return a warning if the vector was made for another model."""


@dataclass(frozen=True)
class Amount:
    """How strongly to steer: a strength (lambda), or a dose as a fraction (0.2 is 20 %)."""

    number: float
    is_dose: bool = False

    @classmethod
    def parse(cls, text: "str | float | Amount") -> "Amount":
        """Read ``1.5``, ``"1.5"``, ``"-2"`` (strengths) or ``"20%"``, ``"-10 %"`` (doses).

        Raises:
            InputError: anything else, or a strength beyond 1e9.
        """
        if isinstance(text, Amount):
            return text
        words = str(text).strip() if not isinstance(text, bool) else "a truth value"
        percent = words.endswith("%")
        digits = words.removesuffix("%").rstrip()
        number = float(digits) if _NUMBER.fullmatch(digits) else math.nan
        if not abs(number) <= LARGEST:
            raise InputError(
                f"strength {one_line(words, 40)!r}: expected a number such as 1.5, -2 or 0, or a dose in per cent of "
                f"the residual stream such as 20%; {LARGEST:g} at most."
            )
        return cls(number / 100, True) if percent else cls(number)

    def __str__(self) -> str:
        return format_dose(self.number) if self.is_dose else f"{self.number:.4g}"

    def strength(self, vector: SteeringVector, norms: Mapping[int, float]) -> float:
        """Return lambda; ``norms`` is the mean ``||h_l||`` of each steered layer.

            lambda = dose / sum_l( ||v_l|| / mean ||h_l|| )

        Raises:
            InputError: the vector is zero at these layers, or not above float32's rounding errors.
        """
        if not self.is_dose or not self.number:
            return self.number
        sizes = vector.norms()
        unit = sum(sizes[layer] / norm for layer, norm in norms.items())
        if unit < SMALLEST:
            raise InputError(
                f"layer {format_layers(norms)}: the vector is {unit:.1g} of the residual stream, no "
                "more than a rounding error, so a dose means nothing there. Choose another layer."
            )
        return self.number / unit


@dataclass(frozen=True)
class Request:
    """A requested steering with every default filled in; a dose still needs the model.

    ``why`` tells the user why this layer was chosen; it is empty if the layers were given.
    """

    vector: SteeringVector
    amount: Amount
    layers: tuple[int, ...]
    positions: Positions = "all"
    why: str = ""

    def steering(self, model: HasNorms) -> Steering:
        """Return the steering. Only a dose needs the model's norms."""
        norms: Mapping[int, float] = {}
        if self.amount.is_dose and self.amount.number:
            norms = model.norms(self.vector, self.layers)
        strength = self.amount.strength(self.vector, norms)
        return Steering(self.vector, strength, self.layers, self.positions)


def request(
    vector: SteeringVector,
    strength: str | float | Amount | None = None,
    layers: Iterable[int] | None = None,
    positions: Positions | None = None,
) -> Request:
    """Fill in what is not given; no other function has defaults of its own.

    - ``layers``: the layer that a sweep recommended, if the vector holds it; else ``default_layer``.
    - ``strength``: what a sweep recommended, at the layer that it recommended; else a dose of 20 %.
    - ``positions``: what a sweep recommended, with its layer; else ``"all"``, as in the paper.

    Raises:
        InputError: ``strength`` is neither a number nor per cent.
        SteeringError, VectorMismatchError: as ``Steering``.
    """
    best = vector.meta.recommended or {}
    chosen, why = (None if layers is None else tuple(sorted(set(layers)))), ""
    swept = best.get("layer") in vector.layers and chosen in (None, (best["layer"],))
    if chosen is None:
        layer, why = (best["layer"], "a sweep recommends it") if swept else default_layer(vector)
        chosen = (layer,)
    if strength is not None:
        amount = Amount.parse(strength)
    elif swept:
        amount = Amount(float(best["strength"]))
    else:
        amount = Amount(DEFAULT_DOSE, is_dose=True)
    where = positions or (best.get("positions") if swept else None) or "all"
    # Made only for its checks: what can never be applied fails before a model is loaded.
    # A dose has no lambda yet; 0 stands in.
    Steering(vector, 0.0 if amount.is_dose else amount.number, chosen, where)
    return Request(vector, amount, chosen, where, why)


def resolve(
    model: HasNorms,
    vector: SteeringVector | str | Path,
    strength: str | float | Amount | None = None,
    layers: Iterable[int] | None = None,
    positions: Positions | None = None,
    *,
    strict: bool = False,
) -> Steering:
    """Return a steering for one model, with the defaults of ``request`` where nothing is given.

    A vector that was made for another model is warned of (``warnings``).

        resolve(model, "dense.npz")                    # this vector's own layer and strength
        resolve(model, "dense.npz", "20%")             # a dose: 20 % of the residual stream
        resolve(model, "dense.npz", 1.5, layers=[14])  # lambda = 1.5 at layer 14

    Args:
        model: what ``load`` returns.
        vector: a steering vector, or its ``.npz`` file; ``"demo"`` is the embedded one.
        strength: lambda, or a dose such as ``"20%"``.
        strict: refuse a vector of another model.

    Raises:
        VectorFormatError: the file is not a steering vector.
        InputError, SteeringError, VectorMismatchError: as ``request``, and ``VectorMismatchError`` for a
            vector of another model with ``strict``.
    """
    if not isinstance(vector, SteeringVector):
        vector = SteeringVector.load(vector)
    if warning := model.other_weights(vector, strict=strict):
        warnings.warn(warning.removeprefix("warning: "), stacklevel=2)
    return request(vector, strength, layers, positions).steering(model)


def default_layer(vector: SteeringVector) -> tuple[int, str]:
    """Return the layer to steer where no sweep recommends one, and the reason in words.

    It is the lowest layer whose measured gain (``SteeringVector.margin_gain``) is within a tenth of the
    best: what is added at a lower layer passes through more blocks, and at the last layer it only shifts
    the logits of the next token (arXiv 2509.06608). Without a measurement it is the layer nearest the
    middle, where the paper saw both steps and tokens change.
    """
    measured = {k: v for k, v in vector.margin_gain.items() if k in vector.layers}
    if measured:
        best = max(measured.values())
        lowest = min(k for k, v in measured.items() if v >= best - NEAR * abs(best))
        return lowest, "among the best that extraction measured"
    if len(vector.layers) == 1:
        return min(vector.layers), "it is the vector's only one"
    middle = vector.meta.layer_count // 2
    nearest = min(vector.layers, key=lambda layer: (abs(layer - middle), layer))
    return nearest, f"it is the middle one of {vector.meta.layer_count}"


def parse_layers(texts: Iterable[str], available: Iterable[int]) -> tuple[int, ...]:
    """Read layers as users type them: ``14``, ``10-14``, ``10,12``, ``all``.

    Raises:
        SteeringError: a text of another form.
    """
    layers: set[int] = set()
    for text in texts:
        if len(text) > _LONGEST:
            raise SteeringError(
                f"layers in {len(text):,} characters: expected a list such as 10-14,20 or all."
            )
        for part in text.split(","):
            part = part.strip()
            match = _LAYERS.fullmatch(part)
            first, last = (int(match[1]), int(match[2] or match[1])) if match else (1, 0)
            if part == "all":
                layers.update(available)
            elif first <= last:
                layers.update(range(first, last + 1))
            else:
                raise SteeringError(
                    f"layer {part!r}: expected a number (14), a range (10-14), a list (10,12) or all."
                )
    return tuple(sorted(layers))


def format_dose(dose: float) -> str:
    """Return ``20%`` for 0.2; three digits at most."""
    return f"{float(f'{100 * dose:.3g}'):g}%"
