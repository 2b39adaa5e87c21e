"""From the shared options to a ``Steering``, and what the user is told about its dose."""

from pathlib import Path
from typing import TYPE_CHECKING

import click

from .output import note

if TYPE_CHECKING:
    from ..model import ModelInfo
    from ..steering import Steering


def read_steering(
    vector: str | None, strength: float | None, layers: tuple[str, ...], positions: str
) -> "Steering | None":
    """Return the steering that the options ask for, ``None`` without a vector."""
    if vector is None:
        if strength is not None or layers or positions != "all":
            raise click.UsageError(
                "--strength, --layer and --positions need a vector: add -v FILE."
            )
        return None
    from ..steering import Steering, parse_layers
    from ..vector import SteeringVector

    if not Path(vector).is_file():
        raise click.UsageError(
            f"{vector}: no such file. Make one, or `densesteer vector import` one."
        )
    loaded = SteeringVector.load(vector)
    if layers:
        chosen = parse_layers(layers, loaded.layers)
    else:
        chosen = (default_layer(loaded.layers, loaded.meta.layer_count),)
        if len(loaded.layers) > 1:
            note(f"layer {chosen[0]} (the middle one of {loaded.meta.layer_count}); choose with -l")
    return Steering(
        loaded,
        strength=1.0 if strength is None else strength,
        layers=chosen,
        positions=positions,  # type: ignore[arg-type]
    )


def default_layer(available, layer_count: int) -> int:
    """Return the layer nearest the middle: there the paper saw steps and tokens both move."""
    return min(available, key=lambda layer: (abs(layer - layer_count // 2), layer))


def tell_fit(steering: "Steering", info: "ModelInfo") -> None:
    """Raise if the vector does not fit the model; warn if it was made for other weights."""
    vector = steering.vector
    vector.check_fits(hidden_size=info.hidden_size, layer_count=info.layer_count, model=info.name)
    if vector.meta.fingerprint and vector.meta.fingerprint != info.fingerprint:
        note(
            f"warning: {vector.name} was extracted from other weights ({vector.meta.model}, "
            f"fingerprint {vector.meta.fingerprint}; this model is {info.name}, {info.fingerprint})"
        )


def tell_dose(steering: "Steering", doses: dict[int, float]) -> None:
    """Say how large the steering is against the residual stream, and warn of an overdose."""
    from ..steering import LARGE_DOSE
    from ..vector import format_layers

    total = sum(doses.values())
    each = f" over {len(doses)} layers, at most {max(doses.values()):.2g} in one"
    each = each if len(doses) > 1 else ""
    note(
        f"steering {steering.vector.name}: layer {format_layers(doses)}, strength "
        f"{steering.strength:g}, positions {steering.positions}, relative dose {total:.2g}{each}"
    )
    if total >= LARGE_DOSE:
        note(
            "warning: a large dose. Our 0.5B test model collapsed at 0.6, others' models at about "
            "1.9: the same words over and over, text without sense, or no text at all. Try a "
            "smaller --strength."
        )
