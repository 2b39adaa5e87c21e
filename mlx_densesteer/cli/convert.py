"""``densesteer convert``."""

import sys

import click

from ..text import note, printable, unguarded
from . import completers
from .options import force_option, out_option


@click.command()
@click.argument("source", shell_complete=completers.files)
@out_option(
    "FOLDER",
    "Folder to write. [default: converted/NAME-4bit, named after --bits]",
    required=False,
    folder=True,
)
@click.option(
    "--bits",
    type=click.Choice(["4", "8", "none"]),
    default="4",
    show_default=True,
    help="Quantisation of the matrices.",
)
@click.option(
    "--group-size",
    type=click.Choice(["32", "64", "128"]),
    default="64",
    show_default=True,
    help="Weights that share a scale.",
)
@click.option(
    "--dtype",
    type=click.Choice(["bfloat16", "float16", "float32"]),
    help="Number format of what is not quantised. [default: the source's; bfloat16 for GGUF]",
)
@click.option("--revision", metavar="REV", help="Branch, tag or commit on the Hub.")
@force_option
def convert(
    source: str,
    out: str | None,
    bits: str,
    group_size: str,
    dtype: str | None,
    revision: str | None,
    force: bool,
) -> None:
    """Convert a model for MLX.

    SOURCE is a Hub id (Qwen/Qwen2.5-1.5B-Instruct), a local Hugging Face folder, or a GGUF
    file. The folder is checked with one forward pass before it gets its name, which is
    printed on standard output.
    """
    from ..model.convert import convert as run
    from ..model.machine import chip, emulates_bfloat16

    if dtype in (None, "bfloat16") and emulates_bfloat16():
        note(f"hint: {chip()} emulates bfloat16; --dtype float16 makes a faster model")
    try:
        folder = run(
            source,
            out,
            bits=None if bits == "none" else int(bits),
            group_size=int(group_size),
            dtype=dtype,
            revision=revision,
            force=force,
            progress=_show,
        )
    except KeyboardInterrupt:
        note("interrupted; nothing half-done was left. Files that were downloaded whole are kept.")
        raise
    click.echo(folder)


def _show(what: str, done: int, total: int) -> None:
    """Show a step of the conversion: counted in place on a terminal, elsewhere when it is done."""
    if not total:
        note(what)
    elif sys.stderr.isatty():
        line = f"\rdensesteer: {printable(what)}: {done}/{total}"
        click.echo(line, nl=done == total, file=unguarded(sys.stderr))
    elif done == total:
        note(f"{what}: {total} tensors")
