"""``densesteer generate`` over the ranks of ``mlx.launch``."""

from typing import TYPE_CHECKING

import click

from ..distributed.ranks import launched_rank
from ..text import note

if TYPE_CHECKING:
    from ..distributed.ranks import Ranks
    from ..model.model import Model

COMMANDS = ("generate", "eval", "sweep")  # what can run on several ranks


def check_spread(pipeline: bool, draft_model: str | None) -> None:
    """Refuse options that cannot go together, before a model is loaded."""
    if pipeline and launched_rank() is None:
        raise click.UsageError(
            "--pipeline is for several ranks: mlx.launch -n 2 -- densesteer generate --pipeline ..."
        )
    if draft_model is not None and launched_rank() is not None:
        raise click.UsageError("--draft-model does not go with mlx.launch: leave it out.")


def load_spread(name: str, *, pipeline: bool) -> "tuple[Model, Ranks]":
    """Return this rank's part of a model and the ranks; say how the model is spread. Alone, the model."""
    from ..distributed.loading import load_over_ranks
    from ..distributed.ranks import Ranks
    from ..steering.vector import format_layers

    ranks = Ranks.connect()
    model = load_over_ranks(name, ranks, pipeline=pipeline)
    if ranks.size == 1:
        return model, ranks
    if pipeline:
        parts = "; ".join(
            f"rank {rank}: {format_layers(layers)}"
            for rank, layers in enumerate(ranks.gather(model.own_layers))
        )
        note(f"{model.name} as a pipeline, layers of {parts}")
    else:
        note(f"{model.name} tensor-parallel on {ranks.size} ranks")
    return model, ranks
