"""``densesteer bake``."""

from typing import TYPE_CHECKING

import click

from ..text import note
from .options import layers_option, model_option, strength_option, vector_option

if TYPE_CHECKING:
    from pathlib import Path

    from ..export.closeness import Closeness
    from ..steering.request import Request
    from ..steering.steering import Steering

NOT_RUN = "nothing here runs a GGUF file: try it in llama.cpp"


@click.command()
@model_option
@vector_option("", required=True)
@strength_option
@layers_option()
@click.option(
    "-o", "--out", required=True, type=click.Path(), metavar="PATH",
    help="Folder to write; for gguf the file.",
)  # fmt: skip
@click.option(
    "--format", "format", type=click.Choice(["mlx", "hf", "gguf"]),
    help="mlx keeps the model's quantisation; hf (transformers) and gguf (llama.cpp) undo it. "
         "[default: gguf for a PATH that ends so, else mlx]",
)  # fmt: skip
@click.option(
    "--check", is_flag=True,
    help="Write nothing: compare PATH with what it was made from. Strength and layer are those "
         "that it says of itself, unless given.",
)  # fmt: skip
@click.option("--force", is_flag=True, help="Replace PATH, if densesteer wrote all of it.")
def bake(model: str, vector: str, strength: float | None, layers: tuple[str, ...],
         out: str, format: str | None, check: bool, force: bool) -> None:  # fmt: skip
    """Bake a steering into a checkpoint that stock software runs.

    Qwen2 is written again as a `llama` model whose biases hold strength times vector: mlx-lm,
    transformers and llama.cpp run it, and know nothing of us. It is compared with run-time steering
    before it gets its name, which is printed. One strength, at every position.
    """
    from pathlib import Path

    from .steering import read_steering, tell_fit, tell_steering

    if check and (force or format):
        raise click.UsageError("--check writes nothing: leave out --force and --format.")
    if check:
        recorded = _recorded(Path(out).expanduser())
        strength = recorded[0] if strength is None else strength
        layers = layers or recorded[1]
    request = read_steering(vector, strength, layers, "all")
    assert request is not None  # a vector is required

    from ..export import bake as baking

    steering = _for_model(request, model) if request.relative else request.steering(request.number)
    if check:
        _tell_check(out, baking.check(out, model, steering))
        return
    format = format or ("gguf" if out.endswith(".gguf") else "mlx")
    baked = baking.bake(model, steering, out, format=format, force=force, progress=note)  # type: ignore[arg-type]
    tell_fit(steering.vector, baked.source)
    tell_steering(steering, baked.relative_dose)
    note(f"written as {baked.source.dtype}, quantisation {baked.quantization}")
    note(str(baked.closeness) if baked.closeness else NOT_RUN)
    click.echo(baked.path)


def _recorded(path: "Path") -> tuple[float, tuple[str, ...]]:
    from ..export.bake import baked_record

    setting = baked_record(path)["baked"]
    return setting["strength"], tuple(map(str, setting["layers"]))  # type: ignore[index]


def _for_model(request: "Request", model: str) -> "Steering":
    """A relative strength needs the model, as it is written: in the dtype of its file."""
    from ..model.model import find, load_folder

    return request.for_model(*load_folder(find(model)))


def _tell_check(out: str, closeness: "Closeness | None") -> None:
    note("every tensor is what it should be; " + (str(closeness) if closeness else NOT_RUN))
    click.echo(out)
