"""``densesteer vector``."""

import json
import math
from typing import TYPE_CHECKING, Any

import click

from ..text import aligned, count, note
from . import completers
from .options import (
    force_option,
    json_option,
    layers_option,
    out_option,
    output_file,
    vector_out_option,
)
from .steering import at_positions, read_vector

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from ..steering.formats.pt import Towards
    from ..steering.vector import SteeringVector


@click.group()
def vector() -> None:
    """Show steering vectors; import and export the files of other programs."""


@vector.command()
@click.argument("file", shell_complete=completers.vectors)
@json_option
def show(file: str, as_json: bool) -> None:
    """Print a vector's metadata and the norm of each layer. FILE may be demo (embedded)."""
    from ..steering.vector import format_layers

    loaded = read_vector(file)
    document = loaded.describe()
    if as_json:
        click.echo(json.dumps(document | {"norms": loaded.norms(), "sha256": loaded.sha256()}))
        return
    shown = document | {
        "layers": format_layers(loaded.layers),
        "tested": count(len(loaded.meta.tested), "setting") if loaded.meta.tested else None,
        "recommended": _recommended(loaded.meta.recommended),
        "calibration": _calibration(loaded.meta.calibration),
        "default": default_setting(loaded),
        "residual_norms": None,  # these three are columns of the table
        "margin_gain": None,
        "stability": None,
    }
    for key, value in shown.items():
        if value not in (None, [], ()):
            text = json.dumps(value, ensure_ascii=False) if isinstance(value, dict) else value
            click.echo(f"{key:<22}{text}")
    click.echo(f"{'sha256':<22}{loaded.sha256()}\n")
    click.echo("\n".join(layer_table(loaded)))


def _recommended(best: "Mapping[str, object] | None") -> str | None:
    from ..steering.vector import format_layers

    if best is None:
        return None
    where = format_layers(best["layers"])
    return f"layer {where}, strength {best['strength']:g}. {best.get('text', '')}".strip()


def _calibration(found: "Mapping[str, Any] | None") -> str | None:
    if found is None:
        return None
    targets = sorted({math.copysign(p["kl"], p["strength"]) for p in found["points"]})
    listed = ", ".join(f"{kl:g}" for kl in targets)
    return f"{count(len(found['points']), 'setting')}, KL {listed} nats per token"


def default_setting(vector: "SteeringVector") -> str:
    """Describe the default layer, strength and positions, and the reason for the layer."""
    from ..steering.request import request
    from ..steering.vector import format_layers

    asked = request(vector)
    unit = "strength " if asked.amount.unit == "strength" else ""
    where = at_positions(asked.positions)
    return f"layer {format_layers(asked.layers)} ({asked.why}), {unit}{asked.amount}{where}"


def layer_table(vector: "SteeringVector") -> list[str]:
    """Return a line for each layer, with a bar for its norm. Columns without figures are left out."""
    from ..steering.request import format_dose

    norms, residual = vector.norms(), vector.residual_norms or {}
    stability = vector.meta.extra.get("stability")
    stability = stability if isinstance(stability, dict) else {}
    longest = max(norms.values()) or 1.0
    gains = vector.margin_gain
    rows = [["layer", "norm", "residual", "dose of 1", "halves", "noise", "gain"]]
    for layer, norm in norms.items():
        mean, halves = residual.get(layer), stability.get(str(layer))
        halves = halves if isinstance(halves, dict) else {}
        figures = [halves.get(key) for key in ("agreement", "noise")]
        rows.append(
            [
                str(layer),
                f"{norm:.4f}",
                f"{mean:.2f}" if mean else "",
                format_dose(norm / mean) if mean else "",
                *(f"{x:.3f}" if isinstance(x, float) else "" for x in [*figures, gains.get(layer)]),
            ]
        )
    bars = ["", *("#" * round(30 * norm / longest) for norm in norms.values())]
    kept = [i for i in range(7) if any(row[i] for row in rows[1:])]
    lines = aligned([[row[i] for i in kept] for row in rows])
    return [f"{line}  {bar}".rstrip() for line, bar in zip(lines, bars, strict=True)]


@vector.command("import")
@click.argument("file", type=click.Path(exists=True, dir_okay=False))
@vector_out_option
@click.option(
    "-m",
    "--model",
    metavar="MODEL",
    shell_complete=completers.models,
    help="The model that it was made for: a Hub id, or a folder, whose size is then checked. "
    "Required unless FILE records it.",
)
@click.option(
    "--layer-offset",
    type=int,
    metavar="N",
    help="Layer K of FILE becomes layer K - N here. [default: what FILE records, else 0; "
    "1 for files of llama.cpp's cvector-generator]",
)
@click.option(
    "--layer",
    type=click.IntRange(0),
    metavar="L",
    help="Of a .pt with a bare tensor: the layer whose output it is added to; of a table, that row.",
)
@click.option(
    "--towards",
    type=click.Choice(["dense", "sparse"]),
    help="Of a .pt with a bare tensor: where it points. Towards sparse it is negated.",
)
@force_option
def import_(
    file: str,
    out: str,
    model: str | None,
    layer_offset: int | None,
    layer: int | None,
    towards: "Towards | None",
    force: bool,
) -> None:
    """Import another program's vector: .pt of torch, .gguf, .safetensors.

    A .pt holds one float tensor for each layer, a SteeringVector of steering-vectors, or a bare tensor, as SEAL, ASC and ReBalance publish. The file is read without torch, and code in it is not run. A Hub id as MODEL fetches nothing: it is
    recorded as the vector's model, and the layer count is taken from FILE. A control vector of
    llama.cpp or repeng steers at the output of the block that its number names, there and here.
    """
    from pathlib import Path

    from .. import demo
    from ..model.config import is_hub_id, origin
    from ..steering.formats import import_vector

    path = output_file(out, force, ending=".npz")
    model = str(demo.MODEL) if model == demo.NAME else model
    folder = Path(model).expanduser() if model else None
    if model is not None and not (folder and folder.is_dir()) and not is_hub_id(model):
        raise click.UsageError(
            f"--model {model}: neither a folder nor a Hub id (Qwen/Qwen2.5-...)."
        )
    loaded = import_vector(
        file,
        model=origin(model) if model else None,
        layer_offset=layer_offset,
        layer=layer,
        towards=towards,
    )
    if folder and folder.is_dir():
        loaded = _fit_to_folder(loaded, folder)
    loaded.save(path)
    note(f"{loaded.name}: {len(loaded.layers)} layers of width {loaded.meta.hidden_size}")
    click.echo(path)


@vector.command()
@click.argument("file", shell_complete=completers.vectors)
@out_option("FILE", "File to write: .gguf or .safetensors.")
@click.option(
    "--to",
    type=click.Choice(["gguf", "safetensors"]),
    help="Format: llama.cpp's control vector, or safetensors. [default: the ending of --out]",
)
@layers_option("Only these. [default: all that FILE holds]")
@click.option(
    "--layer-offset",
    type=int,
    default=0,
    metavar="N",
    show_default=True,
    help="Write layer L as L + N; 1 numbers them as llama.cpp's cvector-generator does.",
)
@force_option
def export(
    file: str, out: str, to: str | None, layers: tuple[str, ...], layer_offset: int, force: bool
) -> None:
    """Export a vector for llama.cpp or as safetensors. FILE may be demo (embedded).

    `densesteer vector import` reads the same vector back: its layers bit for bit, and its metadata.
    """
    from ..steering.formats import export_vector
    from ..steering.request import parse_layers

    path = output_file(out, force)
    loaded = read_vector(file)
    if layers:
        loaded = loaded.select(parse_layers(layers, loaded.layers))
    for remark in export_vector(loaded, path, to=to, layer_offset=layer_offset):
        note(remark)
    is_gguf = (to or path.suffix) in ("gguf", ".gguf")
    if is_gguf and (use := _llama_cpp(loaded, path, layer_offset)):
        note(use)
    click.echo(path)


def _llama_cpp(vector: "SteeringVector", path: "Path", offset: int) -> str:
    """Return llama.cpp's options for the vector at its default layer and strength.

    Empty if llama.cpp cannot steer that layer: it is numbered below 1, or beyond the last block.
    """
    from ..steering.request import request, unit_dose

    asked = request(vector)
    low, high = asked.layers[0], asked.layers[-1]
    if low + offset < 1 or high + offset >= vector.meta.layer_count:
        return ""
    norms = vector.residual_norms or {}
    strength, remark = asked.amount.number, ""
    if asked.amount.unit == "dose" and set(asked.layers) <= set(norms):
        strength /= unit_dose(vector, {layer: norms[layer] for layer in asked.layers})
    elif asked.amount.unit == "dose":
        strength, remark = 1.0, "; the strength 1 is a guess, because no norms are recorded"
    if asked.positions != "all":
        remark += (
            f"; it was recommended for positions {asked.positions}, and llama.cpp adds it at all"
        )
    between = [layer for layer in vector.layers if low <= layer <= high]
    if len(between) > len(asked.layers):
        remark += f"; export only these layers (-l {','.join(map(str, asked.layers))}) for that"
    span = f" --control-vector-layer-range {low + offset} {high + offset}"
    only = span if len(vector.layers) > 1 else ""
    return f"use it: llama-cli -m MODEL.gguf --control-vector-scaled {path}:{strength:.4g}{only}{remark}"


def _fit_to_folder(vector: "SteeringVector", folder: "Path") -> "SteeringVector":
    """Check the vector against the folder's config, and record what the folder is.

    Norms and gains that were measured with other weights than the folder's are left out.
    """
    from dataclasses import replace

    from ..model.config import origin, read_config, recorded
    from ..steering.vector import SteeringVector

    config = read_config(folder)
    size = {"hidden_size": config["hidden_size"], "layer_count": config["num_hidden_layers"]}
    vector.check_fits(**size, model=str(folder))
    meta = replace(vector.meta, **size, model=origin(folder))
    fingerprint = recorded(folder).get("fingerprint")
    if fingerprint not in (None, meta.fingerprint):
        meta = replace(meta, fingerprint=fingerprint, residual_norms=None, margin_gain=None)
    return SteeringVector(vector.layers, meta, name=vector.name)
