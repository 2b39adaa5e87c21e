"""What is said beside the result."""

import click


def note(message: str) -> None:
    """Say something that is not the result, on standard error."""
    click.echo(f"densesteer: {message}", err=True)


def count(number: int, noun: str) -> str:
    """Return ``1 step``, ``2 steps``."""
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"
