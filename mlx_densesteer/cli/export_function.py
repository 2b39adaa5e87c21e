"""``densesteer export-function``."""

from pathlib import Path
from typing import TYPE_CHECKING

import click

from ..text import note
from .options import (
    force_option,
    layers_option,
    model_option,
    positions_option,
    strength_option,
    strict_option,
    vector_option,
)
from .steering import read_steering, steering_for

if TYPE_CHECKING:
    from ..steering.places import Positions
    from ..steering.request import Amount


@click.command("export-function")
@model_option()
@vector_option("Steers the function.", required=True)
@click.option("-o", "--out", required=True, metavar="FILE", help="The .mlxfn file to write.")
@strength_option
@layers_option()
@positions_option()
@strict_option
@click.option(
    "--capacity",
    type=click.IntRange(min=2),
    metavar="TOKENS",
    help="Size of the KV cache: prompt and answer together. [default: 2048, or the model's context]",
)
@click.option(
    "--chunk",
    "chunks",
    type=click.IntRange(min=1),
    multiple=True,
    metavar="TOKENS",
    help="A length in which a prompt can be read, besides 1; may be repeated. [default: 128, 32, 8]",
)
@force_option
def export_function(
    model: str,
    vector: str,
    out: str,
    strength: "Amount | None",
    layers: tuple[str, ...],
    positions: "Positions | None",
    capacity: int | None,
    chunks: tuple[int, ...],
    force: bool,
) -> None:
    """Write a steered model as an MLX function for C++.

    One file (.mlxfn) holds the weights. It needs MLX, but no Python. Its inputs are tokens,
    position, strength and KV cache; programs may pass any strength, and -s is the default that
    the file records. The function is compared with run-time steering before the file gets its
    name, which is printed on standard output. docs/export-function.md has the signature,
    examples/cpp a program that generates text with it.
    """
    request = read_steering(vector, strength, layers, positions)

    from ..export.function import check_path
    from ..export.function import export_function as run
    from ..model.model import load

    check_path(Path(out).expanduser(), force)  # before a download
    loaded = load(model)
    steering = steering_for(request, loaded)
    assert steering is not None  # a vector is required
    try:
        made = run(
            loaded,
            steering,
            out,
            capacity=capacity,
            chunks=chunks or None,
            force=force,
            progress=note,
        )
    except KeyboardInterrupt:
        note("interrupted; no file was left.")
        raise
    tested = ", ".join(f"{one:.3g}" for one in made.strengths)
    note(
        f"{made.path.stat().st_size / 1e6:.1f} MB, and {made.metadata['cache_bytes'] / 1e6:.1f} MB of "
        f"memory for {made.metadata['capacity']} tokens; logits differ from run-time steering by "
        f"{made.largest_difference:.2g} at most, at logits up to {made.largest_logit:.3g} "
        f"(strengths {tested})"
    )
    click.echo(made.path)
