"""Options that commands share."""

from collections.abc import Callable
from typing import Any

import click

Command = Callable[..., Any]


def model_option(command: Command) -> Command:
    """Add ``-m/--model``."""
    return click.option(
        "-m", "--model", required=True, metavar="MODEL",
        help="A folder that `densesteer convert` wrote, or a Hub id.",
    )(command)  # fmt: skip


def steering_options(command: Command) -> Command:
    """Add ``-v -s -l --positions``; read them with ``cli.steer.read_steering``."""
    for option in reversed([
        click.option("-v", "--vector", type=click.Path(dir_okay=False), metavar="FILE",
                     help="Steering vector (.npz). Without it nothing is steered."),
        click.option("-s", "--strength", "--lambda", type=float, metavar="NUMBER",
                     help="Lambda; positive is towards dense, 0 is the unsteered model. [default: 1]"),
        click.option("-l", "--layer", "layers", multiple=True, metavar="LAYERS",
                     help="0-based: 14, 10-14, 10,12 or all; may be repeated. "
                          "[default: the vector's only layer, else the middle one]"),
        click.option("--positions", type=click.Choice(["all", "generated", "prompt"]),
                     default="all", show_default=True, help="At which tokens to steer."),
    ]):  # fmt: skip
        command = option(command)
    return command
