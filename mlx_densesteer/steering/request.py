"""How a vector is used when nobody says how. numpy only."""

from collections.abc import Iterable
from typing import NamedTuple

from .steering import Positions
from .vector import SteeringVector


class Default(NamedTuple):
    """``recommended``: a sweep found it; else the middle layer at strength 1."""

    layers: tuple[int, ...]
    strength: float
    positions: Positions
    recommended: bool


def default_for(vector: SteeringVector, layers: tuple[int, ...] | None = None) -> Default:
    """Return what a sweep recommended, unless other ``layers`` are asked for."""
    best = vector.meta.recommended or {}
    if best and layers in (None, (best["layer"],)):
        strength, positions = float(best["strength"]), best.get("positions") or "all"
        return Default((best["layer"],), strength, positions, True)
    if layers is None:
        layers = (default_layer(vector.layers, vector.meta.layer_count),)
    return Default(layers, 1.0, "all", False)


def default_layer(available: Iterable[int], layer_count: int) -> int:
    """Return the layer nearest the middle: there the paper saw steps and tokens both move."""
    return min(available, key=lambda layer: (abs(layer - layer_count // 2), layer))
