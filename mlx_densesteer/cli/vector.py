"""``densesteer vector``."""

import json
from typing import TYPE_CHECKING

import click

from .output import note

if TYPE_CHECKING:
    from pathlib import Path

    from ..vector import SteeringVector


@click.group()
def vector() -> None:
    """Look at steering vectors and import other projects' files."""


@vector.command()
@click.argument("file", type=click.Path(exists=True, dir_okay=False))
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def show(file: str, as_json: bool) -> None:
    """Print a vector's metadata and the norm of each layer."""
    from ..vector import SteeringVector, format_layers

    loaded = SteeringVector.load(file)
    document = loaded.describe()
    norms = loaded.norms()
    if as_json:
        click.echo(json.dumps(document | {"norms": norms, "sha256": loaded.sha256()}))
        return
    for key, value in document.items():
        if key == "layers":
            value = format_layers(loaded.layers)
        if value not in (None, [], ()):
            click.echo(f"{key:<22}{value}")
    click.echo(f"{'sha256':<22}{loaded.sha256()}\n\nlayer  norm")
    longest = max(norms.values()) or 1.0
    for layer, norm in norms.items():
        click.echo(f"{layer:>5}  {norm:>8.4f}  {'#' * round(40 * norm / longest)}".rstrip())


@vector.command("import")
@click.argument("file", type=click.Path(exists=True, dir_okay=False))
@click.option(
    "-o",
    "--out",
    required=True,
    type=click.Path(dir_okay=False),
    metavar="FILE.npz",
    help="File to write.",
)
@click.option(
    "-m",
    "--model",
    required=True,
    metavar="MODEL",
    help="The model that it was made for: a Hub id, or a folder, whose size is then checked.",
)
@click.option("--force", is_flag=True, help="Replace the output file if it exists.")
def import_(file: str, out: str, model: str, force: bool) -> None:
    """Import a steering-vectors .pt file.

    It is read without torch and without being executed. With a Hub id as MODEL nothing is
    fetched: the vector is only labelled with it, and the layer count is taken from the file.
    """
    from pathlib import Path

    from ..interop import import_vector
    from ..model_folder import is_hub_id

    out = str(Path(out).expanduser())
    if Path(out).exists() and not force:
        raise click.ClickException(f"{out}: exists already. Choose another name or use --force.")
    if not (model and Path(model).expanduser().is_dir()) and not is_hub_id(model):
        raise click.UsageError(
            f"--model {model}: neither a folder nor a Hub id (Qwen/Qwen2.5-...)."
        )
    loaded = import_vector(file, model=model)
    if Path(model).expanduser().is_dir():
        loaded = _fit_to_folder(loaded, Path(model).expanduser())
    loaded.save(out)
    note(f"{loaded.name}: {len(loaded.layers)} layers of width {loaded.meta.hidden_size}")
    click.echo(out)


def _fit_to_folder(vector: "SteeringVector", folder: "Path") -> "SteeringVector":
    """Check the vector against the folder's config, and record what the folder is."""
    from dataclasses import replace

    from ..model_folder import origin, read_config, recorded
    from ..vector import SteeringVector

    config = read_config(folder)
    size = {"hidden_size": config["hidden_size"], "layer_count": config["num_hidden_layers"]}
    vector.check_fits(**size, model=str(folder))
    fingerprint = recorded(folder).get("fingerprint")
    meta = replace(vector.meta, **size, model=origin(folder), fingerprint=fingerprint)
    return SteeringVector(vector.layers, meta, name=vector.name)
