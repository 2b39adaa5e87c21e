"""``densesteer bake``."""

from typing import TYPE_CHECKING

import click

from ..text import note
from .options import layers_option, model_option, strength_option, strict_option, vector_option

if TYPE_CHECKING:
    from pathlib import Path

    from ..export.bake import Format
    from ..export.closeness import Closeness
    from ..steering.request import Amount


@click.command()
@model_option()
@vector_option("", required=True)
@strength_option
@layers_option()
@strict_option
@click.option(
    "-o",
    "--out",
    required=True,
    type=click.Path(),
    metavar="PATH",
    help="Folder to write; for gguf the file.",
)
@click.option(
    "--format",
    "format",
    type=click.Choice(["mlx", "hf", "gguf"]),
    help="mlx keeps the model's quantisation; hf (transformers) and gguf (llama.cpp) undo it. "
    "[default: gguf for a PATH that ends in .gguf, else mlx]",
)
@click.option(
    "--check",
    is_flag=True,
    help="Write nothing: compare PATH with the model and vector that it was made from. Strength and "
    "layer are those that PATH records, unless given.",
)
@click.option("--force", is_flag=True, help="Replace PATH, if densesteer wrote all of it.")
def bake(
    model: str,
    vector: str,
    strength: "Amount | None",
    layers: tuple[str, ...],
    out: str,
    format: "Format | None",
    check: bool,
    force: bool,
) -> None:
    """Bake a steering into a checkpoint that other programs run unchanged.

    Qwen2, Llama and Mistral are written as a `llama` model whose biases hold strength times vector,
    SmolLM3 as itself, for mlx-lm, transformers or llama.cpp. The checkpoint has one strength, at every position. It is compared
    with run-time steering before it gets its name, which is printed on standard output.
    """
    from dataclasses import replace
    from pathlib import Path

    from .steering import read_steering, steering_for

    if check and (force or format):
        raise click.UsageError("--check writes nothing: leave out --force and --format.")
    path = Path(out).expanduser()
    format = format or ("gguf" if path.suffix == ".gguf" else "mlx")
    if check:
        strength, layers = _recorded(path, strength, layers)
    request = read_steering(vector, strength, layers, None)
    assert request is not None  # a vector is required
    found = strength is None and request.amount.unit == "strength"  # in the file, for its positions
    if found and request.positions not in ("all", "generated"):
        raise click.UsageError(
            f"{vector}: its strength was found for positions {request.positions}, and a baked vector is "
            "added at every token. Choose a strength for that: -s STRENGTH."
        )
    if request.positions != "all" and not check:
        note(
            f"{vector} was found or trained for positions {request.positions}; baked, it is added at every "
            "token. What that does, `eval --positions all` measures"
        )
    request = replace(request, positions="all")

    from ..export import bake as baking
    from ..model.model import load

    if not check:
        baking.check_out(path, model, format, force)  # before a download
    steering = steering_for(request, load(model))
    assert steering is not None  # a vector is required
    if check:
        closeness = baking.check(path, model, steering)
        note(f"every tensor is what it should be; {_told(closeness)}")
    else:
        baked = baking.bake(model, steering, path, format=format, force=force, progress=note)
        note(f"written as {baked.source.dtype}, quantisation {baked.quantization}")
        note(_told(baked.closeness))
    click.echo(out)


def _recorded(
    path: "Path", strength: "Amount | None", layers: tuple[str, ...]
) -> "tuple[Amount, tuple[str, ...]]":
    """Fill in strength and layers from what a baked checkpoint records."""
    from ..export.bake import baked_record
    from ..steering.request import Amount

    setting = baked_record(path)["baked"]
    recorded = tuple(map(str, setting["layers"]))  # type: ignore[index]
    return strength or Amount(setting["strength"]), layers or recorded  # type: ignore[index]


def _told(closeness: "Closeness | None") -> str:
    return str(closeness) if closeness else "nothing here runs a GGUF file: try it in llama.cpp"
