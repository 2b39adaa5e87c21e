"""From the shared options to a ``Steering``, and the notes about it."""

import math
from pathlib import Path
from typing import TYPE_CHECKING

import click
from click.core import ParameterSource

from ..text import note, signed_dose
from .options import STRICT

if TYPE_CHECKING:
    from ..model.model import Model
    from ..steering.places import Positions
    from ..steering.request import Amount, Request
    from ..steering.steering import Steering
    from ..steering.vector import SteeringVector


def read_vector(name: str) -> "SteeringVector":
    """Return the vector of a file, or the embedded one for ``demo``."""
    from ..steering.vector import SteeringVector

    if Path(name).suffix in (".gguf", ".pt", ".safetensors"):
        raise click.UsageError(
            f"{name}: is another program's file. Convert it first: "
            f"`densesteer vector import {name} -o FILE.npz`."
        )
    return SteeringVector.load(name)


def read_steering(
    vector: str | None,
    strength: "Amount | None",
    layers: tuple[str, ...],
    positions: "Positions | None",
    budget: int | None = None,
    late: "Amount | None" = None,
) -> "Request | None":
    """Return what the options ask for, ``None`` without a vector; refuse wrong ones."""
    if vector is None:
        need_no_vector(strength, layers, positions, budget)
        return None
    from ..steering.request import parse_layers, request

    loaded = read_vector(vector)
    chosen = parse_layers(layers, loaded.layers) if layers else None
    return request(loaded, strength, chosen, positions, budget=budget, late=late)


def need_no_vector(
    strength: "Amount | None",
    layers: tuple[str, ...],
    positions: "Positions | None",
    budget: int | None = None,
) -> None:
    """Refuse options of a steering where no vector is given; the error names those that are."""
    kl = click.get_current_context().get_parameter_source("kl") is ParameterSource.COMMANDLINE
    options = {"--kl" if kl else "-s": strength, "-l": layers, "--positions": positions}
    if given := [option for option, value in options.items() if value not in (None, ())]:
        raise click.UsageError(f"{', '.join(given)}: need a vector; add -v FILE.")
    if budget is not None:
        raise click.UsageError(
            "--think-budget steers a long thought: it needs a vector (-v FILE). With "
            "--think-budget-hard it ends the thought by force instead."
        )


def steering_for(request: "Request | None", model: "Model") -> "Steering | None":
    """Return the steering for a loaded model, and tell the user what it is.

    Raises:
        VectorMismatchError: the vector does not fit the model.
    """
    if request is None:
        return None
    tell_fit(request.vector, model)
    asked = request.vector, request.layers, request.positions, request.amount.number
    if request.amount.unit == "kl" and request.amount.number:
        if model.known_kl_strength(*asked) is None:
            note(f"finding the strength at which the KL is {asked[-1]:g} nats per token ...")
        else:
            note(f"the strength for a KL of {asked[-1]:g} nats is that of the vector's calibration")
    steering = request.steering(model)
    tell_steering(request, steering, model)
    return steering


def tell_fit(vector: "SteeringVector", model: "Model") -> None:
    """Raise if the vector does not fit the model; warn if it was made for other weights.

    With ``--strict`` raise then too.
    """
    model.check_fits(vector)
    if warning := model.other_weights(vector, strict=is_strict()):
        note(warning)


def is_strict() -> bool:
    """Tell whether the command was given ``--strict``."""
    ctx = click.get_current_context(silent=True)
    return ctx is not None and ctx.meta.get(STRICT, False)


def at_positions(positions: "Positions") -> str:
    """Return what a line says of the positions: nothing where all are steered."""
    return "" if positions == "all" else f", positions {positions}"


def tell_steering(request: "Request", steering: "Steering", model: "Model") -> None:
    """Tell what is added to the residual stream, and which of it is a default; warn of an overdose."""
    from ..steering.request import format_dose
    from ..steering.steering import LARGE_DOSE, LARGE_DOSE_WARNING
    from ..steering.vector import format_layers

    dose = model.dose(steering)
    where = at_positions(steering.positions)
    if steering.budget is not None:
        late = steering.beyond_budget
        where += (
            f", {signed_dose(math.copysign(model.dose(late), late.strength))} (strength {late.strength:.3g}) "
            f"from {steering.budget.tokens} tokens of thought on"
        )
    usual = "this vector's defaults" if request.usual else "this vector's default layer"
    reason = f"; {usual} (the layer: {request.why})" if request.why else ""
    note(
        f"using {steering.vector.name} at layer {format_layers(steering.layers)}, "
        f"{'-' if steering.strength < 0 else ''}{format_dose(dose)} of the residual stream "
        f"(strength {steering.strength:.3g}){where}{reason}"
    )
    if model.largest_dose(steering) >= LARGE_DOSE:
        note(LARGE_DOSE_WARNING)


def described(steering: "Steering | None", model: "Model") -> dict[str, object] | None:
    """Return a steering with its dose, for JSON."""
    return steering.describe() | {"dose": model.dose(steering)} if steering else None
