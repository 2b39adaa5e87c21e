"""The command line. Modules here import click alone; the rest comes when a command runs."""

import click

from .._version import __version__
from ..errors import DenseSteerError
from .convert import convert
from .doctor import doctor
from .generate import generate
from .vector import vector


class _Commands(click.Group):
    """The one place where an error of ours becomes a message and an exit code."""

    def invoke(self, ctx: click.Context) -> object:
        try:
            return super().invoke(ctx)
        except DenseSteerError as error:
            raise click.ClickException(str(error)) from error


@click.group(cls=_Commands, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="densesteer")
def main() -> None:
    """Run steered small language models on a Mac.

    Add a steering vector to a model's residual stream while it generates, and it reasons in
    fewer, denser steps. No training.
    """


for command in (convert, generate, vector, doctor):
    main.add_command(command)
