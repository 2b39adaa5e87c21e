"""A model over the ranks of ``mlx.launch``, or on this machine alone, for ``densesteer generate``."""

from dataclasses import replace
from typing import TYPE_CHECKING

import click

from ..distributed.ranks import launched_rank
from .steering import Request, steering_for, steering_over_ranks
from .text import note

if TYPE_CHECKING:
    import mlx.nn as nn
    from mlx_lm.tokenizer_utils import TokenizerWrapper

    from ..distributed.ranks import Ranks
    from ..steering.steering import Steering

COMMANDS = ("generate", "eval", "sweep")  # what can run on several ranks


def check_spread(pipeline: bool, draft_model: str | None) -> None:
    """Refuse options that cannot go together, before a model is loaded."""
    if pipeline and launched_rank() is None:
        raise click.UsageError(
            "--pipeline is for several ranks: mlx.launch -n 2 -- densesteer generate --pipeline ..."
        )
    if draft_model is not None and launched_rank() is not None:
        raise click.UsageError("--draft-model does not go with mlx.launch: leave it out.")


def load_steered(
    name: str, request: Request | None, *, pipeline: bool
) -> "tuple[nn.Module, TokenizerWrapper, Steering | None, dict[int, float], Ranks]":
    """Return model, tokenizer, steering, the norms that its dose is relative to, and the ranks."""
    from ..distributed.ranks import Ranks

    ranks = Ranks.connect()
    if ranks.size == 1:
        from ..model.model import load

        model, tokenizer = load(name)
        return model, tokenizer, *steering_for(request, model, tokenizer, name), ranks
    from ..distributed.loading import load_sharded, own_layers
    from ..model.model import find
    from ..steering.vector import format_layers

    model, tokenizer, info = load_sharded(find(name), ranks, pipeline=pipeline)
    if pipeline:
        parts = "; ".join(
            f"rank {i}: {format_layers(layers)}"
            for i, layers in enumerate(ranks.gather(own_layers(model)))
        )
        note(f"{info.name} as a pipeline, layers of {parts}")
        steering, norms = steering_over_ranks(request, info)
    else:
        note(f"{info.name} tensor-parallel on {ranks.size} ranks")
        steering, norms = steering_for(request, model, tokenizer, name)
    if steering is not None:
        setting = [steering.vector.sha256(), list(steering.layers), steering.positions]
        ranks.same(setting, "vectors or options")
        steering = replace(steering, strength=ranks.share(steering.strength))
    return model, tokenizer, steering, norms, ranks
