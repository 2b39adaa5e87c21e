"""``densesteer doctor``."""

import sys

import click

from ..text import count


@click.command()
def doctor() -> None:
    """Print versions, device and memory, and what is wrong.

    Exits with 1 if something is wrong that keeps models from running.
    """
    from .doctor_report import examine

    wrong = fatal = 0
    for finding in examine():
        mark = "ok" if finding.remedy is None else "!!"
        click.echo(f"{mark}  {finding.name:<16}{finding.value}")
        if finding.remedy is not None:
            click.echo(f"    {'':<16}-> {finding.remedy}")
            wrong, fatal = wrong + 1, fatal + finding.fatal
    click.echo(f"\n{count(wrong, 'problem')} found" if wrong else "\nnothing wrong")
    sys.exit(1 if fatal else 0)
