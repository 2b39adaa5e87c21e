"""``densesteer extract``."""

import json
from pathlib import Path
from typing import TYPE_CHECKING

import click

from ..text import Live, count, note
from .options import (
    force_option,
    json_option,
    layers_option,
    model_option,
    output_file,
    vector_out_option,
)
from .vector import default_setting, layer_table

if TYPE_CHECKING:
    from ..extraction.extract import Extraction


@click.command()
@model_option()
@click.argument("pairs", type=click.Path(exists=True, dir_okay=False))
@vector_out_option
@click.option(
    "--token",
    default="-1",
    show_default=True,
    metavar="WHERE",
    help="Read-out: -N, counted from the end of the response; mean-response; first-N, the mean of "
    "its first N tokens; or steps, the mean of those that end a step before the last.",
)
@click.option(
    "--method",
    type=click.Choice(["mean", "pca"]),
    default="mean",
    show_default=True,
    help="Mean difference, or first principal component of the differences.",
)
@layers_option("Layers above the last one are not computed. [default: all]")
@force_option
@json_option
def extract(
    model: str,
    pairs: str,
    out: str,
    token: str,
    method: str,
    layers: tuple[str, ...],
    force: bool,
    as_json: bool,
) -> None:
    """Extract a steering vector from contrastive pairs.

    PAIRS is a JSONL file of `densesteer pairs`. The name of the vector's file goes to standard
    output, a table of the layers to standard error.
    """
    path = output_file(out, force, ending=".npz")

    from ..evaluation.contamination import warn_of_test_problems
    from ..extraction.extract import ReadOut, extract_with_report, has_single_step
    from ..extraction.pairs import read_pairs, warn_of_other_model
    from ..model.model import load
    from ..steering.request import parse_layers

    read = read_pairs(pairs)
    if warning := warn_of_test_problems(pair.prompt for pair in read):
        note(warning)
    readout = ReadOut.of(token)  # before the model is loaded
    if readout.step_ends and (single := sum(has_single_step(pair) for pair in read)):
        note(
            f"warning: in {count(single, 'pair')} of {len(read)} a response is one step: its last token is "
            "read, and of the other response the ends of its steps. The vector then tells where an answer "
            "ends. Take rewrites of two steps and more, or another --token."
        )
    loaded = load(model)
    if warning := warn_of_other_model(pairs, loaded.fingerprint):
        note(warning)
    chosen = parse_layers(layers, range(loaded.layer_count)) if layers else None
    live = Live()
    try:
        found = extract_with_report(
            loaded,
            read,
            layers=chosen,
            token=token,
            method=method,
            progress=lambda done, total: live.show(f"reading pairs: {done}/{total}"),
        )
        found.vector.save(path)
    except KeyboardInterrupt:
        note("interrupted; nothing was written.")
        raise
    finally:
        live.clear()
    _tell(found, len(read))
    click.echo(json.dumps(_to_json(found, path), allow_nan=False) if as_json else path)


def _tell(found: "Extraction", pairs: int) -> None:
    """Tell on standard error how large and how stable the vector is."""
    if found.identical:
        numbers = ", ".join(map(str, found.identical[:5]))
        more = ", ..." if len(found.identical) > 5 else ""
        note(
            f"warning: in {count(len(found.identical), 'pair')} (from 0: {numbers}{more}) the two "
            "responses are the same; they only make the vector shorter."
        )
    note(f"{count(pairs, 'pair')}, {found.tokens:,} tokens read")
    from ..steering.request import SMALLEST
    from ..steering.vector import format_layers

    nothing = [layer for layer, row in found.layers.items() if row.unit_dose < SMALLEST]
    if nothing:
        note(
            f"warning: at layer {format_layers(nothing)} the vector is only rounding: the two responses "
            "have the same tokens up to the read-out. Do not steer at these layers."
        )
    click.echo("\n".join(layer_table(found.vector)), err=True)
    click.echo(
        "norm: ||v||; residual: mean ||h|| over the responses; dose of 1: norm / residual, the dose of"
        "\nstrength 1; halves: cosine between the vectors of two random halves of the pairs, 1 is"
        "\nstable; noise: the size of that cosine if dense and sparse were swapped at random; gain: by how"
        "\nmany nats per token a dose of 20% favours the dense responses of held-out pairs.",
        err=True,
    )
    note(f"default: {default_setting(found.vector)}")


def _to_json(found: "Extraction", path: Path) -> dict[str, object]:
    return {
        "vector": str(path),
        "sha256": found.vector.sha256(),
        "meta": found.vector.describe(),
        "layers": {
            layer: vars(row) | {"unit_dose": row.unit_dose} for layer, row in found.layers.items()
        },
        "identical": list(found.identical),
        "tokens": found.tokens,
    }
