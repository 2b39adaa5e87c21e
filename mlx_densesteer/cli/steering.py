"""From the shared options to a ``Steering``, and what the user is told about its dose."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import click

from ..text import note

if TYPE_CHECKING:
    import mlx.nn as nn
    from mlx_lm.tokenizer_utils import TokenizerWrapper

    from ..model.model import ModelInfo
    from ..steering.steering import Steering
    from ..steering.vector import SteeringVector


@dataclass(frozen=True)
class Request:
    """What the steering options ask for; a relative strength needs the model."""

    vector: "SteeringVector"
    number: float
    layers: tuple[int, ...]
    positions: str
    relative: bool

    def steering(self, strength: float) -> "Steering":
        from ..steering.steering import Steering

        return Steering(self.vector, strength, self.layers, self.positions)  # type: ignore[arg-type]

    def at(self, norms: dict[int, float]) -> "Steering":
        """Return the steering; a relative number is one of ``norms``, the mean norms of its layers."""
        from ..model.dose import strength_for

        relative = self.relative
        return self.steering(
            strength_for(self.vector, norms, self.number) if relative else self.number
        )

    def for_model(self, model: "nn.Module", tokenizer: "TokenizerWrapper") -> "Steering":
        """Return the steering; the vector must fit the model (``tell_fit``)."""
        if not self.relative:
            return self.steering(self.number)
        from ..model.dose import mean_norms

        return self.at(mean_norms(model, tokenizer, self.vector, self.layers))


def steering_for(
    request: Request | None, model: "nn.Module", tokenizer: "TokenizerWrapper", name: str
) -> "tuple[Steering | None, dict[int, float]]":
    """Return the steering for a loaded model, and the mean norms that its dose is relative to.

    Raises if the vector does not fit; the user is told the dose.
    """
    if request is None:
        return None, {}
    from ..model.dose import mean_norms
    from ..model.model import inspect

    tell_fit(request.vector, inspect(model, name))
    norms = mean_norms(model, tokenizer, request.vector, request.layers)
    steering = request.at(norms)
    tell_dose(steering, steering.relative_dose(norms))
    return steering, norms


def steering_over_ranks(
    request: Request | None, info: "ModelInfo"
) -> "tuple[Steering | None, dict[int, float]]":
    """Return what ``steering_for`` does, where this rank has only some of the blocks.

    The mean norms are those that the vector's file records, if it does; no rank can measure them.
    """
    if request is None:
        return None, {}
    from ..model.dose import recorded_norms

    tell_fit(request.vector, info)
    norms = recorded_norms(request.vector, info.fingerprint, request.layers)
    if norms is None:
        if request.relative:
            raise click.UsageError(
                "--relative under --pipeline needs a vector that records the norms of this model's "
                "residual stream (`densesteer extract` writes them). Give the raw strength."
            )
        note(
            f"steering {request.vector.name}, strength {request.number:g}; relative dose not known"
        )
        return request.steering(request.number), {}
    steering = request.at(norms)
    tell_dose(steering, steering.relative_dose(norms))
    return steering, norms


def read_vector(name: str) -> "SteeringVector":
    """Return the vector of a file, or the embedded one for ``demo``."""
    from ..steering.vector import SteeringVector

    if Path(name).suffix in (".gguf", ".pt", ".safetensors"):
        raise click.UsageError(
            f"{name}: is another program's file. `densesteer vector import {name} -o FILE.npz` first."
        )
    return SteeringVector.load(name)


def read_steering(
    vector: str | None,
    strength: float | None,
    layers: tuple[str, ...],
    positions: str | None,
    relative: bool = False,
) -> Request | None:
    """Return what the options ask for, ``None`` without a vector; wrong ones are refused here."""
    if vector is None:
        if strength is not None or layers or positions or relative:
            raise click.UsageError(
                "--strength, --layer, --positions and --relative need a vector: add -v FILE."
            )
        return None
    from .. import demo
    from ..demo.settings import DOSES, LAYER
    from ..steering.request import default_for, parse_layers

    if relative and strength is None:
        raise click.UsageError("--relative needs a --strength, for example -s 0.1.")
    loaded = read_vector(vector)
    if vector == demo.NAME and not layers:
        layers = (str(LAYER),)
        if strength is None:
            strength, relative = DOSES[-2], True
        note(f"layer {LAYER}, where `densesteer demo` shows it; choose with -l and -s")
    default = default_for(loaded, parse_layers(layers, loaded.layers) if layers else None)
    if default.recommended:
        positions = positions or default.positions
        if strength is None:
            strength = default.strength
            note(f"layer {default.layers[0]}, strength {strength:g}: what a sweep recommended")
    elif not layers and len(loaded.layers) > 1:
        note(
            f"layer {default.layers[0]} (the middle one of {loaded.meta.layer_count}); choose with -l"
        )
    number = 1.0 if strength is None else strength
    request = Request(loaded, number, default.layers, positions or "all", relative)
    request.steering(number)  # refuses what can never be applied, before a model is loaded
    return request


def tell_fit(vector: "SteeringVector", info: "ModelInfo") -> None:
    """Raise if the vector does not fit the model; warn if it was made for other weights."""
    vector.check_fits(hidden_size=info.hidden_size, layer_count=info.layer_count, model=info.name)
    if vector.meta.fingerprint and vector.meta.fingerprint != info.fingerprint:
        note(
            f"warning: {vector.name} was extracted from other weights ({vector.meta.model}, "
            f"fingerprint {vector.meta.fingerprint}; this model is {info.name}, {info.fingerprint})"
        )


def tell_dose(steering: "Steering", doses: dict[int, float]) -> None:
    """Say how large the steering is against the residual stream, and warn of an overdose."""
    from ..steering.steering import LARGE_DOSE
    from ..steering.vector import format_layers

    total = sum(doses.values())
    each = f" over {len(doses)} layers, at most {max(doses.values()):.2g} in one"
    each = each if len(doses) > 1 else ""
    note(
        f"steering {steering.vector.name}: layer {format_layers(doses)}, strength "
        f"{steering.strength:g}, positions {steering.positions}, relative dose {total:.2g}{each}"
    )
    if total >= LARGE_DOSE:
        note(
            "warning: a large dose. Our 0.5B test model collapsed at about 1, others' models at about "
            "1.9: the same words over and over, text without sense, or no text at all. Try a "
            "smaller --strength."
        )
