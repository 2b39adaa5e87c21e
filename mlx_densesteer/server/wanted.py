"""From what a request says about steering to a ``Steering``; three ways of saying the same."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from ..errors import DenseSteerError
from ..model.dose import strength_for
from ..steering.vector import combine
from ..steering.steering import Positions, Steering
from ..steering.vector import SteeringVector
from .faults import Fault, bad, excerpt
from .model_name import Named
from .schema import STRENGTH, EasySteer, EasySteerVector, SteeringField
from .vectors import Shelf, Shelved


@dataclass(frozen=True)
class Wanted:
    """A steering that was asked for; a relative strength still needs the model's norms.

    ``preset`` is the vector's name where a model name can say the same.
    """

    vector: SteeringVector
    strength: float
    layers: tuple[int, ...]
    positions: Positions
    relative: bool = False
    preset: str | None = None

    @property
    def is_stock(self) -> bool:
        return not self.strength

    def steering(self, norms: Mapping[int, float] | None = None) -> Steering:
        """Return the steering; ``norms`` are the mean ``||h_l||`` of its layers."""
        strength = self.strength
        if self.relative and strength and norms is not None:
            strength = strength_for(self.vector, {k: norms[k] for k in self.layers}, strength)
            if abs(strength) > STRENGTH:
                raise bad(
                    f"this is strength {strength:g}: expected {STRENGTH:g} at most.", "steering"
                )
        return Steering(self.vector, strength, self.layers, self.positions)


def wanted(
    named: Named | None, field: SteeringField | EasySteer | None, shelf: Shelf
) -> Wanted | None:
    """Return what the model's name or the field ``steering`` asks for; ``None``: the stock model.

    Raises:
        Fault: both ask, or for something that there is not.
    """
    if named is not None and field is not None:
        raise bad(
            "the steering stands in the model's name and in `steering`: expected it once. Send the "
            "bare model name with `steering`.",
            "steering",
        )
    try:
        if named is not None:
            field = SteeringField(strength=named.strength, relative=named.relative)
            asked = _one(_get(shelf, named.vector, "model"), field)
        elif isinstance(field, EasySteer):
            asked = _several(field.vectors, shelf)
        elif field is not None:
            asked = _one(_choose(field, shelf), field)
        else:
            return None
        if not asked.relative:
            asked.steering()
        return asked
    except DenseSteerError as error:
        if hasattr(error, "status"):
            raise
        raise bad(str(error), "steering") from error


def _get(shelf: Shelf, name: str, param: str) -> Shelved:
    """Return a vector; a fault names the field that asks for it."""
    try:
        return shelf.get(name)
    except Fault as fault:
        fault.param = param
        raise


def _choose(field: SteeringField, shelf: Shelf) -> Shelved:
    if field.vector is not None:
        return _get(shelf, field.vector, "steering.vector")
    vectors = shelf.all()
    if len(vectors) != 1:
        names = ", ".join(one.name for one in vectors) or "none"
        raise bad(f"steering.vector is missing: this server has {names}.", "steering.vector")
    return vectors[0]


def _one(shelved: Shelved, field: SteeringField) -> Wanted:
    default = shelved.default
    layers = field.chosen or default.layers
    strength = default.strength if field.strength is None else field.strength
    if field.relative and field.strength is None:
        raise bad("steering.relative needs a steering.strength, for example 0.1.", "steering")
    positions = field.positions or default.positions
    shelved.vector.select(layers)
    preset = _preset(shelved, layers, positions)
    return Wanted(shelved.vector, strength, layers, positions, field.relative, preset)


def _preset(shelved: Shelved, layers: Iterable[int], positions: Positions) -> str | None:
    default = shelved.default
    same = set(layers) == set(default.layers) and positions == default.positions
    return shelved.name if same else None


def _several(vectors: list[EasySteerVector], shelf: Shelf) -> Wanted:
    """Read EasySteer's schema; several vectors become their weighted sum at strength 1."""
    parts, positions = [], set()
    for number, one in enumerate(vectors):
        shelved = _get(shelf, one.source, f"steering.vectors[{number}].source")
        layers = one.chosen or shelved.default.layers
        parts.append((shelved.vector.select(layers), one.scale))
        positions.add(_positions(one))
    if len(positions) > 1:
        raise bad(
            "steering.vectors: expected the same `apply` for all of them.", "steering.vectors"
        )
    (where,) = positions
    if where is None:
        return Wanted(parts[0][0], 0.0, tuple(parts[0][0].layers), "all")
    if len(parts) == 1:
        vector, scale = parts[0]
        preset = _preset(shelved, vector.layers, where)
        return Wanted(vector, scale, tuple(vector.layers), where, preset=preset)
    total = combine(parts)
    still = all(not scale for _, scale in parts)
    return Wanted(total, 0.0 if still else 1.0, tuple(total.layers), where)


def _positions(one: EasySteerVector) -> Positions | None:
    """Map EasySteer's two switches to ours; ``None``: steered nowhere."""
    if one.algorithm not in (None, "direct", "add") or one.normalize:
        raise bad(
            f"steering.vectors: algorithm {excerpt(one.algorithm or 'direct')}, normalize "
            f"{one.normalize}: only plain addition (direct, normalize false) is supported.",
            "steering.vectors",
        )
    prompt, answer = one.apply.prompt == "all", one.apply.generation == "all"
    if prompt and answer:
        return "all"
    return "prompt" if prompt else "generated" if answer else None
