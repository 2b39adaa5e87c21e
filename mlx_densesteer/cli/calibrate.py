"""``densesteer calibrate``."""

import json
import shlex
from pathlib import Path
from typing import TYPE_CHECKING

import click

from ..text import Live, aligned, count, note, signed, signed_dose
from .options import (
    json_option,
    layer_sets_option,
    model_option,
    positions_option,
    strict_option,
    vector_option,
)
from .steering import read_vector, tell_fit

if TYPE_CHECKING:
    from collections.abc import Sequence

    from ..extraction.calibrate import Calibration
    from ..extraction.pairs import Pair
    from ..model.model import Model
    from ..steering.places import Positions
    from ..steering.vector import SteeringVector


@click.command()
@model_option()
@vector_option("", required=True)
@click.argument("pairs", type=click.Path(exists=True, dir_okay=False))
@layer_sets_option(
    "[default: the layers of a trained vector, or several that a sweep recommended, together; else five, "
    "the best to first order]"
)
@click.option(
    "--kl",
    default="0.1",
    show_default=True,
    metavar="LIST",
    help="KL(steered || unsteered) in nats per token, separated by commas; negative ones are towards "
    "sparse: --kl=-0.1,0.05,0.1.",
)
@positions_option()
@strict_option
@click.option(
    "--limit",
    type=click.IntRange(min=1),
    default=16,
    show_default=True,
    metavar="N",
    help="Take at most N pairs.",
)
@click.option(
    "--write",
    is_flag=True,
    help="Store the result in the vector's file, so that -s 0.1nats and --kl need no measurement.",
)
@json_option
def calibrate(
    model: str,
    vector: str,
    pairs: str,
    layers: tuple[str, ...],
    kl: str,
    positions: "Positions | None",
    limit: int,
    write: bool,
    as_json: bool,
) -> None:
    """Rank layers, and find how strongly to steer there, in minutes: nothing is generated.

    The strength of a layer is the one at which the steered model is a given KL away from the unsteered
    one. There the gain is how much more it favours the dense responses of PAIRS, in nats per token. PAIRS
    is a JSONL file of `densesteer pairs`, of which the vector was not made. Only forward passes are
    computed, and those of the layers below the steered one once.
    """
    from .. import demo
    from ..extraction.pairs import read_pairs, warn_of_other_model
    from ..files import file_to_replace

    loaded_vector = read_vector(vector)
    if write and vector == demo.NAME:
        raise click.UsageError("--write: the embedded vector cannot be changed; extract your own.")
    if write:
        file_to_replace(Path(vector))
    chosen = read_layer_sets(layers, loaded_vector)
    targets = read_kl(kl)
    read = read_pairs(pairs)
    warn_of_own_pairs(loaded_vector, read)

    from ..model.model import load

    loaded = load(model)
    tell_fit(loaded_vector, loaded)
    if warning := warn_of_other_model(pairs, loaded.fingerprint):
        note(warning)
    found = run(loaded, loaded_vector, read[:limit], chosen, targets, positions)
    if write:
        store(vector, found.on(read_vector(vector)), loaded_vector)
    if as_json:
        click.echo(json.dumps(found.describe(), allow_nan=False))
    else:
        click.echo("\n".join(table(found)))
    words = ["densesteer", "sweep", "-m", model, "-v", vector, "--pairs", pairs]
    note(f"next, on a task: {shlex.join(words)} TASK")


def run(
    model: "Model",
    vector: "SteeringVector",
    pairs: "Sequence[Pair]",
    layers: "list[tuple[int, ...]] | None",
    targets: "Sequence[float]",
    positions: "Positions | None",
) -> "Calibration":
    """Calibrate with progress on standard error; tell what could not be reached."""
    from ..extraction.calibrate import calibrate

    live = Live()
    try:
        found = calibrate(
            model,
            vector,
            pairs,
            layers=layers,
            kl=targets,
            positions=positions,
            progress=lambda what, done, total: live.show(f"{what}: {done}/{total}"),
        )
    except KeyboardInterrupt:
        live.clear()
        note("interrupted while calibrating; nothing was written.")
        raise
    finally:
        live.clear()
    for why in found.unreached:
        note(f"left out: {why}")
    return found


def table(found: "Calibration") -> list[str]:
    """Return the table of the settings with its legend."""
    from ..evaluation.intervals import FEW
    from ..steering.request import joined

    measured = "" if found.positions == "all" else f" Positions: {found.positions}."
    narrow = ", too narrow for so few" if found.pairs < FEW else ""
    lines = [["layers", "KL", "strength", "dose", "gain", "95%"]]
    for row in found.rows:
        gain = row.gain
        cells = [f"{row.kl:g}", signed(row.strength), signed_dose(row.dose), f"{gain.value:+.4f}"]
        lines.append([joined(row.layers), *cells, f"{gain.low:+.4f} to {gain.high:+.4f}"])
    return [
        *aligned(lines),
        "KL: of the steered from the unsteered model, nats per response token; dose: what is added, in",
        "per cent of the residual stream's norm; gain: by how many nats per token the steered model",
        f"favours the dense responses of {count(found.pairs, 'pair')} more than the unsteered one does, "
        "with its",
        f"bootstrap interval over the pairs{narrow}. At each KL the best is the first.{measured}",
    ]


def read_layer_sets(
    texts: tuple[str, ...], vector: "SteeringVector"
) -> "list[tuple[int, ...]] | None":
    """Return the layers of each setting, ``None`` if none are given; refuse those that are not there."""
    from ..steering.request import parse_layer_sets

    if not texts:
        return None
    sets = parse_layer_sets(texts, vector.layers)
    vector.select({layer for one in sets for layer in one})
    return sets


def read_kl(text: str) -> list[float]:
    """Read a list of KLs: ``0.05,0.1``; ``nats`` may follow each."""
    from ..steering.request import Amount

    found = []
    for part in text.split(","):
        amount = Amount.parse_kl(part)
        if not amount.number:
            raise click.UsageError(
                "--kl 0: the unsteered model. Name a KL other than 0, such as 0.1."
            )
        found.append(amount.number)
    return found


def warn_of_own_pairs(vector: "SteeringVector", pairs: "Sequence[Pair]") -> None:
    """Warn if the vector was made of these pairs: their gain says little about others."""
    from ..extraction.pairs import pairs_sha256

    if vector.meta.pairs_sha256 == pairs_sha256(pairs):
        note(
            "warning: the vector was made of these pairs, so the gain is flattered. Keep some pairs apart "
            "for this."
        )


def store(file: str, updated: "SteeringVector", before: "SteeringVector") -> None:
    """Store new metadata in the vector's file, unless the file holds another vector by now."""
    if updated.sha256() != before.sha256():
        raise click.ClickException(
            f"{file}: holds another vector than when the command began; nothing is stored in it."
        )
    updated.save(file)
    note(f"stored in {file}")
