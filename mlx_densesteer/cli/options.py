"""Options that commands share."""

from collections.abc import Callable
from typing import Any

import click

from . import completers

Command = Callable[..., Any]


class _Model(click.ParamType):
    """A model's name; where it is missing, the error says what it could be."""

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
    """Add ``-v -s -l --positions``; read them with ``steering.read_steering``."""
    for option in reversed([
        vector_option("Without it nothing is steered."),
        strength_option,
        layers_option(),
        positions_option,
    ]):  # fmt: skip
        command = option(command)
    return command


def vector_option(remark: str, *, required: bool = False) -> Command:
    """Make ``-v/--vector``."""
    return click.option(
        "-v", "--vector", metavar="FILE", required=required, shell_complete=completers.vectors,
        help=f"Steering vector (.npz), or demo (embedded). {remark}".strip(),
    )  # fmt: skip


class StrengthType(click.ParamType):
    """A strength (lambda) or a dose in per cent; the value is a ``steering.request.Amount``."""

    name = "strength"

    def convert(
        self, value: object, param: click.Parameter | None, ctx: click.Context | None
    ) -> object:
        from ..errors import InputError
        from ..steering.request import Amount

        try:
            return Amount.parse(value)
        except InputError as error:
            self.fail(str(error), param, ctx)


strength_option = click.option(
    "-s", "--strength", "--lambda", type=StrengthType(), metavar="STRENGTH",
    help="A dose in per cent of the residual stream (20%), or lambda as a number (1.5). Positive is "
         "towards dense, 0 is the unsteered model. [default: what a sweep recommended, else 20%]",
)  # fmt: skip

_LAYERS = "[default: what a sweep recommended, else the best that extraction measured]"


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


def decoding_options(command: Command) -> Command:
    """Add ``--draft-model --draft-tokens --no-brake``: how an answer is decoded."""
    for option in reversed([
        click.option("--draft-model", metavar="MODEL", shell_complete=completers.models,
                     help="Speculative decoding: a smaller model of the same family proposes tokens. "
                          "The text stays the same at temperature 0."),
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
