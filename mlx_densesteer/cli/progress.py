"""How far long work is, on standard error."""

import shutil
import sys
import time
from collections.abc import Sequence

import click

from ..distributed.ranks import launched_rank
from .text import note


class Live:
    """A line, or a few, that are rewritten in place on a terminal; elsewhere a line now and then."""

    TERMINAL, ELSEWHERE = 0.5, 30.0  # seconds between two updates

    def __init__(self) -> None:
        self._terminal = sys.stderr.isatty()
        self._lines = 0
        self._next = 0.0 if self._terminal else time.monotonic() + self.ELSEWHERE

    @property
    def due(self) -> bool:
        """Whether an update would be shown now: ask before working one out."""
        return time.monotonic() >= self._next and not launched_rank()

    def show(self, summary: str, lines: Sequence[str] = ()) -> None:
        """Show ``lines`` (on a terminal) and ``summary``, if it is time to."""
        if not self.due:
            return
        self._next = time.monotonic() + (self.TERMINAL if self._terminal else self.ELSEWHERE)
        if not self._terminal:
            note(summary)
            return
        size = shutil.get_terminal_size()
        text = [*lines[: max(0, size.lines - 2)], f"densesteer: {summary}"]
        self.clear()
        click.echo("\n".join(line[: size.columns - 1] for line in text), err=True)
        self._lines = len(text)

    def clear(self) -> None:
        """Take away what is shown in place."""
        if self._lines:
            click.echo(f"\x1b[{self._lines}A\x1b[J", nl=False, err=True)
            self._lines = 0
