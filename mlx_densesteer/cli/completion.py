"""``densesteer completion``."""

import os
from pathlib import PurePath

import click

SHELLS = ("bash", "zsh", "fish")


@click.command()
@click.argument("shell", required=False, type=click.Choice(SHELLS), metavar="[SHELL]")
@click.pass_context
def completion(ctx: click.Context, shell: str | None) -> None:
    """Print the script that makes a shell complete commands, options, models and vectors.

    SHELL is bash, zsh or fish, by default that of $SHELL. To have it in every new shell:

    \b
    zsh   in ~/.zshrc, below compinit:  eval "$(densesteer completion zsh)"
    bash  in ~/.bashrc:                 eval "$(densesteer completion bash)"
    fish  densesteer completion fish > ~/.config/fish/completions/densesteer.fish

    bash must be 4.4 or newer. The one of macOS is 3.2: install another, or use zsh.
    """
    from click.shell_completion import get_completion_class

    name = shell or PurePath(os.environ.get("SHELL", "")).name
    kind = get_completion_class(name) if name in SHELLS else None
    if kind is None:
        raise click.UsageError(
            f"$SHELL is {os.environ.get('SHELL') or 'not set'}; name the shell: {', '.join(SHELLS)}."
        )
    root = ctx.find_root().command
    click.echo(kind(root, {}, "densesteer", "_DENSESTEER_COMPLETE").source())
