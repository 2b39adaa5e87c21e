"""What is said beside the result."""

import click

from ..ranks import launched_rank


def note(message: str) -> None:
    """Say something that is not the result, on standard error."""
    if not launched_rank():  # of several ranks the first one speaks
        click.echo(f"densesteer: {message}", err=True)


def count(number: int, noun: str) -> str:
    """Return ``1 step``, ``2 steps``."""
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"
