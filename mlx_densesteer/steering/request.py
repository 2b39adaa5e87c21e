"""Turn what a user asks for into a ``Steering``: the grammar of strengths, and every default.

The command line, the chat, the server, lm-eval and Python all use it. No mlx: for a dose, the caller
passes the model, which knows its norms.
"""

import math
import re
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Protocol

from ..errors import InputError, SteeringError
from ..text import one_line
from .places import Positions
from .steering import Steering, ThinkBudget
from .vector import SteeringVector, format_layers

DEFAULT_DOSE = 0.2  # visible at the first try, and far from the collapse at about 1
LARGEST = 1e9  # largest |strength|: far above any under which a model still writes text
NEAR = 0.1  # a lower layer is preferred if its gain is within this share of the best
_LONGEST = 10_000  # characters of a list of layers
SMALLEST = 1e-5  # a vector whose strength 1 is a smaller dose consists of rounding errors

_NUMBER = re.compile(r"[+-]?(\d+(\.\d*)?|\.\d+)(e[+-]?\d+)?", re.ASCII | re.IGNORECASE)
_LAYER = re.compile(r"\s*\d{1,4}\s*", re.ASCII)
_LAYERS = re.compile(r"(\d{1,4})(?:-(\d{1,4}))?", re.ASCII)


class MeasuredModel(Protocol):
    """The model that a request is for; ``model.model.Model`` is one."""

    def norms(self, vector: SteeringVector, layers: Iterable[int]) -> Mapping[int, float]:
        """Return the mean ``||h_l||`` at each layer, to which a dose refers."""

    def kl_strength(
        self, vector: SteeringVector, layers: Sequence[int], positions: Positions, kl: float
    ) -> float:
        """Return the strength at which KL(steered || unsteered) is ``|kl|`` nats per token.

        It has the sign of ``kl``.
        """

    def other_weights(self, vector: SteeringVector, *, strict: bool = False) -> str | None:
        """Return a warning if the vector was made for another model."""


@dataclass(frozen=True)
class Amount:
    """How strongly to steer, in one of three units.

    - ``"strength"``: lambda.
    - ``"dose"``: a fraction of the residual stream's norm; 0.2 is 20 %.
    - ``"kl"``: KL(steered || unsteered) in nats per token, with the sign of the strength.
    """

    number: float
    unit: Literal["strength", "dose", "kl"] = "strength"

    @classmethod
    def parse(cls, text: "str | float | Amount") -> "Amount":
        """Read ``1.5``, ``"-2"`` (strengths), ``"20%"``, ``"-10 %"`` (doses), ``"0.1nats"`` (KL).

        Raises:
            InputError: anything else, or a number beyond 1e9.
        """
        if isinstance(text, Amount):
            return text
        words = str(text).strip() if not isinstance(text, bool) else "a truth value"
        end = next((end for end in ("%", "nats") if words.endswith(end)), "")
        digits = words.removesuffix(end).rstrip()
        number = float(digits) if _NUMBER.fullmatch(digits) else math.nan
        if not abs(number) <= LARGEST:
            raise InputError(
                f"strength {one_line(words, 40)!r}: expected a number such as 1.5, -2 or 0, a dose in per cent of the "
                f"residual stream such as 20%, or a KL such as 0.1nats; {LARGEST:g} at most."
            )
        if end == "%":
            return cls(number / 100, "dose")
        return cls(number, "kl" if end else "strength")

    @classmethod
    def parse_kl(cls, text: "str | float | Amount") -> "Amount":
        """Read a KL; the unit may be left out: ``0.1``, ``"0.1nats"``.

        Raises:
            InputError: anything else, or a number beyond 1e9.
        """
        try:
            amount = cls.parse(text)
        except InputError:
            amount = None
        if amount is None or amount.unit == "dose":
            raise InputError(
                f"KL {one_line(text, 40)!r}: expected a number of nats per token, such as 0.1; {LARGEST:g} at most."
            )
        return cls(amount.number, "kl")

    def __str__(self) -> str:
        if self.unit == "dose":
            return format_dose(self.number)
        return f"{self.number:.4g}{'nats' if self.unit == 'kl' else ''}"

    def strength(
        self,
        model: MeasuredModel,
        vector: SteeringVector,
        layers: Sequence[int],
        positions: Positions = "all",
    ) -> float:
        """Return lambda. Only a dose needs the model's norms, and only a KL its forward passes.

        Raises:
            InputError: the vector is zero at these layers, or not above float32's rounding errors;
                or no strength gives this KL.
        """
        if not self.number or self.unit == "strength":
            return self.number
        if self.unit == "kl":
            return model.kl_strength(vector, layers, positions, self.number)
        return self.number / unit_dose(vector, model.norms(vector, layers))


def unit_dose(vector: SteeringVector, norms: Mapping[int, float]) -> float:
    """Return the dose of strength 1; ``norms`` is the mean ``||h_l||`` of each steered layer.

        dose = sum_l( ||v_l|| / mean ||h_l|| )

    Raises:
        InputError: the vector is zero at these layers, or not above float32's rounding errors.
    """
    sizes = vector.norms()
    unit = sum(sizes[layer] / norm for layer, norm in norms.items())
    if unit < SMALLEST:
        raise InputError(
            f"layer {format_layers(norms)}: the vector is {unit:.1g} of the residual stream, no "
            "more than a rounding error, so a dose means nothing there. Choose another layer."
        )
    return unit


def stored_strength(
    vector: SteeringVector,
    layers: Sequence[int],
    positions: Positions,
    kl: float,
    *,
    fingerprint: str,
) -> float | None:
    """Return the strength for a KL from the vector's calibration, or ``None`` if it has none.

    The calibration must be of the model with this ``fingerprint``. Between two of its points, at the same
    layers and positions and of the same sign, log strength is linear in log KL; nothing is extrapolated.
    """
    found = vector.meta.calibration or {}
    if found.get("fingerprint") != fingerprint:
        return None
    sign, wanted = math.copysign(1, kl), tuple(sorted(layers))
    points = sorted(
        (math.log(point["kl"]), math.log(abs(point["strength"])))
        for point in found["points"]  # type: ignore[attr-defined]
        if tuple(sorted(point["layers"])) == wanted
        and point["positions"] == positions
        and point["strength"] * sign > 0
    )
    at = math.log(abs(kl))
    for x, y in points:
        if math.isclose(x, at, abs_tol=1e-9):
            return sign * math.exp(y)
    below = [point for point in points if point[0] < at]
    above = [point for point in points if point[0] > at]
    if not below or not above:
        return None
    (x0, y0), (x1, y1) = below[-1], above[0]
    return sign * math.exp(y0 + (y1 - y0) * (at - x0) / (x1 - x0))


@dataclass(frozen=True)
class Request:
    """A requested steering with every default filled in; a dose or KL still needs the model.

    ``why`` tells the user why this layer was chosen; it is empty if the layers were given. ``usual`` says
    that the strength is the default. ``budget`` is how many tokens a thought has before it is steered at
    ``late``; ``None`` for that adds a dose of 20 % to the strength.
    """

    vector: SteeringVector
    amount: Amount
    layers: tuple[int, ...]
    positions: Positions = "all"
    why: str = ""
    usual: bool = False
    budget: int | None = None
    late: Amount | None = None

    def steering(self, model: MeasuredModel) -> Steering:
        """Return the steering; raises as ``Amount.strength``."""
        where = model, self.vector, self.layers
        strength, budget = self.amount.strength(*where, self.positions), None
        if self.budget is not None:  # beyond it every token is steered, whatever the positions
            late = (self.late or Amount(DEFAULT_DOSE, "dose")).strength(*where, "all")
            budget = ThinkBudget(self.budget, late if self.late else strength + late)
        return Steering(self.vector, strength, self.layers, self.positions, budget)


def request(
    vector: SteeringVector,
    strength: str | float | Amount | None = None,
    layers: Iterable[int] | None = None,
    positions: Positions | None = None,
    *,
    budget: int | None = None,
    late: str | float | Amount | None = None,
) -> Request:
    """Fill in what is not given; no other function has defaults of its own.

    - ``layers``: those that the file recommends, from a sweep or from training, if the vector holds
      them; else ``default_layer``.
    - ``strength``: what the file recommends, at the layers that it recommends, or at some of the layers that
      were trained; else a dose of 20 %.
    - ``positions``: what the file recommends, whatever the layers; else ``"all"``, as in the paper.
    - ``late``, with a thinking ``budget``: a dose of 20 % more.

    Raises:
        InputError: ``strength`` is no number, per cent or KL.
        SteeringError, VectorMismatchError: as ``Steering``.
    """
    best = vector.meta.recommended or {}
    chosen, why = (None if layers is None else tuple(sorted(set(layers)))), ""
    usual = recommended_layers(vector)
    trained = _is_trained(vector)
    known = bool(usual) and (chosen in (None, usual) or (trained and set(chosen) <= set(usual)))
    if chosen is None and known:
        chosen, why = usual, "trained so" if trained else "a sweep recommends it"
    elif chosen is None:
        layer, why = default_layer(vector)
        chosen = (layer,)
    if strength is not None:
        amount = Amount.parse(strength)
    elif known:
        amount = Amount(float(best["strength"]))
    else:
        amount = Amount(DEFAULT_DOSE, "dose")
    where = positions or usual_positions(vector)
    # Made only for its checks: what can never be applied fails before a model is loaded.
    # A dose and a KL have no lambda yet; 0 stands in.
    if budget is None and late is not None:
        raise InputError(
            "a strength for beyond a thinking budget, but no budget: name its tokens too."
        )
    limit = None if budget is None else ThinkBudget(budget, 0.0)
    Steering(vector, amount.number if amount.unit == "strength" else 0.0, chosen, where, limit)
    late = None if late is None else Amount.parse(late)
    return Request(vector, amount, chosen, where, why, strength is None, budget, late)


def resolve(
    model: MeasuredModel,
    vector: SteeringVector | str | Path,
    strength: str | float | Amount | None = None,
    layers: Iterable[int] | None = None,
    positions: Positions | None = None,
    *,
    budget: int | None = None,
    late: str | float | Amount | None = None,
    strict: bool = False,
) -> Steering:
    """Return a steering for one model, with the defaults of ``request`` where nothing is given.

    A vector that was made for another model is warned of (``warnings``).

        resolve(model, "dense.npz")                    # this vector's own layer and strength
        resolve(model, "dense.npz", "20%")             # a dose: 20 % of the residual stream
        resolve(model, "dense.npz", 1.5, layers=[14])  # lambda = 1.5 at layer 14
        resolve(model, "dense.npz", "0.1nats")         # what moves the model by a KL of 0.1

    Args:
        model: what ``load`` returns.
        vector: a steering vector, or its ``.npz`` file; ``"demo"`` is the embedded one.
        strength: lambda, a dose such as ``"20%"``, or a KL in nats per token such as ``"0.1nats"``,
            which takes some forward passes unless the vector holds its calibration.
        budget: tokens of a reasoning model's thought, from which on it is steered at ``late``.
        late: a strength as above; by default a dose of 20 % more.
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
    made = request(vector, strength, layers, positions, budget=budget, late=late)
    return made.steering(model)


def recommended_layers(vector: SteeringVector) -> tuple[int, ...]:
    """Return the layers at which the vector's file recommends it together; empty if it does not."""
    listed = (vector.meta.recommended or {}).get("layers") or ()
    found = tuple(sorted(listed))  # type: ignore[call-overload]
    return found if set(found) <= set(vector.layers) else ()


def joint_layers(vector: SteeringVector) -> tuple[int, ...]:
    """Return the layers that a sweep or a calibration takes together where none are given.

    Those of a trained vector, or several that its file recommends together; empty: each layer is a setting.
    """
    layers = recommended_layers(vector)
    return layers if _is_trained(vector) or len(layers) > 1 else ()


def _is_trained(vector: SteeringVector) -> bool:
    return (vector.meta.recommended or {}).get("reason") == "trained"


def usual_positions(vector: SteeringVector) -> Positions:
    """Return the positions where none are given: those that the file recommends, else ``"all"``."""
    return (vector.meta.recommended or {}).get("positions") or "all"  # type: ignore[return-value]


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
    """Read layers as users type them: ``14``, ``10-14``, ``10,12``, ``10+12``, ``all``.

    Raises:
        SteeringError: a text of another form.
    """
    return tuple(sorted({k for one in parse_layer_sets(texts, available) for k in one}))


def parse_layer_sets(texts: Iterable[str], available: Iterable[int]) -> list[tuple[int, ...]]:
    """Read the layers of several settings: commas part them, ``+`` joins layers that are steered together.

    ``8,12`` and ``8-12`` are layers alone, ``8+12+16`` is one setting of three layers, ``all`` is each
    layer alone.

    Raises:
        SteeringError: a text of another form.
    """
    found: dict[tuple[int, ...], None] = {}  # in their order, once each
    for text in texts:
        if len(text) > _LONGEST:
            raise SteeringError(
                f"layers in {len(text):,} characters: expected a list such as 10-14,20 or all."
            )
        for part in text.split(","):
            part = part.strip()
            together = part.split("+")
            match = _LAYERS.fullmatch(part)
            first, last = (int(match[1]), int(match[2] or match[1])) if match else (1, 0)
            if part == "all":
                found |= dict.fromkeys((layer,) for layer in available)
            elif first <= last:
                found |= dict.fromkeys((layer,) for layer in range(first, last + 1))
            elif len(together) > 1 and all(map(_LAYER.fullmatch, together)):
                found[tuple(sorted({int(one) for one in together}))] = None
            else:
                raise SteeringError(
                    f"layer {part!r}: expected a number (14), a range (10-14), a list (10,12), layers "
                    "together (10+12) or all."
                )
    return list(found)


def joined(layers: Iterable[int]) -> str:
    """Write the layers of one setting as ``parse_layer_sets`` reads them: ``8+12+16``."""
    return "+".join(map(str, layers))


def format_dose(dose: float) -> str:
    """Return ``20%`` for 0.2; three digits at most."""
    return f"{float(f'{100 * dose:.3g}'):g}%"
