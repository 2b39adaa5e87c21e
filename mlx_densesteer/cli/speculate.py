"""From ``--draft-model`` and ``--draft-vector`` to a ``Draft``."""

from typing import TYPE_CHECKING

import click

from ..text import note
from .steering import read_vector, tell_fit

if TYPE_CHECKING:
    import mlx.nn as nn
    from mlx_lm.tokenizer_utils import TokenizerWrapper

    from ..generation.answer import Generation
    from ..generation.speculation import Draft
    from ..steering.steering import Steering
    from ..steering.vector import SteeringVector


def check_draft_options(draft_model: str | None, draft_vector: str | None, steered: bool) -> None:
    """Refuse options that cannot go together, before a model is loaded."""
    if draft_vector is not None and draft_model is None:
        raise click.UsageError("--draft-vector needs a --draft-model.")
    if draft_vector is not None and not steered:
        raise click.UsageError("--draft-vector follows the steering of the model: add -v FILE.")


def load_draft(
    name: str | None,
    vector_name: str | None,
    tokens: int,
    model: "nn.Module",
    tokenizer: "TokenizerWrapper",
    steering: "Steering | None",
) -> "Draft | None":
    """Load a draft for ``model``; its vector is applied at the dose of ``steering``."""
    if name is None:
        return None
    from ..generation.speculation import Draft
    from ..model.dose import mean_norms, strength_for
    from ..model.model import inspect, load

    drafting, its_tokenizer = load(name)
    if vector_name is None or steering is None:
        draft = Draft(drafting, its_tokenizer, tokens)
    else:
        vector = read_vector(vector_name)
        tell_fit(vector, inspect(drafting, name))
        layers = (_layer(vector, vector_name),)
        own = strength_for(vector, mean_norms(drafting, its_tokenizer, vector, layers), 1.0)
        norms = mean_norms(model, tokenizer, steering.vector, steering.layers)
        factor = own / strength_for(steering.vector, norms, 1.0)
        draft = Draft(drafting, its_tokenizer, tokens, vector, layers, factor)
        note(f"draft steered by {vector.name}: layer {layers[0]}, {factor:.3g} times the strength")
    draft.check(tokenizer)
    return draft


def _layer(vector: "SteeringVector", name: str) -> int:
    """Return the layer of the demo, of a recommendation, or the middle one."""
    from .. import demo
    from ..demo.settings import LAYER
    from ..steering.request import default_layer

    if name == demo.NAME:
        return LAYER
    middle = default_layer(vector.layers, vector.meta.layer_count)
    return (vector.meta.recommended or {}).get("layer", middle)


def tell_draft(result: "Generation") -> str:
    """Say how many of the draft's tokens were accepted."""
    if not result.draft_proposed:
        return ""
    rate = result.draft_accepted / result.draft_proposed
    return (
        f"; draft {result.draft_accepted} of {result.draft_proposed} tokens accepted ({rate:.0%})"
    )


def tell_brakes(result: "Generation") -> None:
    """Say where repetition was cut off."""
    for one in result.brakes:
        note(
            f"brake: the answer repeated itself; {one.dropped} tokens were cut off behind token "
            f"{one.at_token}, and the strength lowered from {one.strength_before:.3g} to "
            f"{one.strength_after:.3g} (--no-brake lets it repeat)"
        )
