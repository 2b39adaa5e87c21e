"""Options that commands share."""

from collections.abc import Callable
from typing import Any

import click

from . import completers

Command = Callable[..., Any]


class _Model(click.ParamType):
    """A text; whoever leaves it out is told what it could be."""

    name = "model"

    def get_missing_message(self, param: click.Parameter, ctx: click.Context | None) -> str:
        return "Try -m demo, which is embedded, or a folder that `densesteer convert` wrote."


def model_option(command: Command, *, required: bool = True) -> Command:
    """Add ``-m/--model``."""
    return click.option(
        "-m", "--model", required=required, type=_Model(), metavar="MODEL", shell_complete=completers.models,
        help="A folder that `densesteer convert` wrote, a Hub id, or demo (embedded).",
    )(command)  # fmt: skip


def steering_options(command: Command) -> Command:
    """Add ``-v -s -l --positions --relative``; read them with ``cli.steer.read_steering``."""
    for option in reversed([
        vector_option("Without it nothing is steered."),
        strength_option,
        layers_option(),
        positions_option,
        relative_option("NUMBER is a fraction"),
    ]):  # fmt: skip
        command = option(command)
    return command


def vector_option(remark: str, *, required: bool = False) -> Command:
    """Make ``-v/--vector``."""
    return click.option(
        "-v", "--vector", metavar="FILE", required=required, shell_complete=completers.vectors,
        help=f"Steering vector (.npz), or demo (embedded). {remark}".strip(),
    )  # fmt: skip


strength_option = click.option(
    "-s", "--strength", "--lambda", type=float, metavar="NUMBER",
    help="Lambda; positive is towards dense, 0 is the unsteered model. "
         "[default: what a sweep recommended, else 1]",
)  # fmt: skip

_LAYERS = "[default: what a sweep recommended, the vector's only layer, else the middle one]"


def layers_option(remark: str = _LAYERS) -> Command:
    """Make ``-l/--layer``."""
    return click.option(
        "-l", "--layer", "layers", multiple=True, metavar="LAYERS",
        help=f"0-based: 14, 10-14, 10,12 or all; may be repeated. {remark}",
    )  # fmt: skip


positions_option = click.option(
    "--positions", type=click.Choice(["all", "generated", "prompt"]),
    help="At which tokens to steer. [default: all]",
)  # fmt: skip


def relative_option(what: str) -> Command:
    """Make ``--relative``."""
    return click.option(
        "--relative", is_flag=True,
        help=f"{what} of the mean norm of the residual stream: 0.1 is a mild dose, 0.8 a large one.",
    )  # fmt: skip


def decoding_options(command: Command) -> Command:
    """Add ``--draft-model --draft-vector --draft-tokens --no-brake``: how an answer is decoded."""
    for option in reversed([
        click.option("--draft-model", metavar="MODEL", shell_complete=completers.models,
                     help="Speculative decoding: a smaller model of the same family proposes tokens. "
                          "The text stays the same at temperature 0."),
        click.option("--draft-vector", metavar="FILE", shell_complete=completers.vectors,
                     help="Steer the draft as well, at the same relative dose."),
        click.option("--draft-tokens", type=click.IntRange(1, 16), default=3, show_default=True,
                     help="How many tokens it proposes at a time."),
        click.option("--no-brake", is_flag=True,
                     help="Let an overdosed model repeat itself, instead of cutting that off and "
                          "lowering the strength."),
    ]):  # fmt: skip
        command = option(command)
    return command


def task_options(command: Command) -> Command:
    """Add ``--split --skip --limit --revision``: which problems of a task."""
    for option in reversed([
        click.option("--split", metavar="NAME", help="Of the task: test, or train where there is one."),
        click.option("--skip", type=click.IntRange(min=0), default=0, metavar="N",
                     help="Leave out the first N problems."),
        click.option("--limit", type=click.IntRange(min=1), metavar="N",
                     help="Take at most N problems."),
        click.option("--revision", metavar="REV", help="Branch, tag or commit of the data set."),
    ]):  # fmt: skip
        command = option(command)
    return command


def run_options(command: Command) -> Command:
    """Add ``-n --rows --system``: how problems are answered."""
    for option in reversed([
        click.option("-n", "--max-tokens", type=click.IntRange(min=1), default=2048,
                     show_default=True, help="Length of a response at most."),
        click.option("--rows", type=click.IntRange(min=1), default=16, show_default=True,
                     help="Responses that are generated together; more need more memory."),
        click.option("--system", metavar="TEXT", help="System message."),
    ]):  # fmt: skip
        command = option(command)
    return command
