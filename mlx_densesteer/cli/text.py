"""What is said beside the result."""

from pathlib import Path

import click

from ..distributed.ranks import launched_rank


def note(message: str) -> None:
    """Say something that is not the result, on standard error."""
    if not launched_rank():  # of several ranks the first one speaks
        click.echo(f"densesteer: {message}", err=True)


def refuse_existing(path: str | Path, force: bool) -> None:
    """Refuse a file that is there, unless it may be replaced."""
    if Path(path).exists() and not force:
        raise click.ClickException(f"{path}: exists already. Choose another name or use --force.")


def count(number: int, noun: str) -> str:
    """Return ``1 step``, ``2 steps``."""
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"
