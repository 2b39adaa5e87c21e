"""What the chat shows: results on standard output, every other word on standard error.

This is the plain form: text as it comes, no escape codes. ``terminal_screen`` adds to it.
"""

import shutil
import sys
from collections.abc import Callable, Iterable, Sequence

import click

from ..text import printable
from .rows import Rows
from .status import Status

Now = Callable[[], Status]  # the settings in force, read again for every picture


class Answer:
    """An answer that is being shown, piece by piece."""

    def __init__(self, echo: Callable[[str], None]):
        self._echo = echo
        self._ends_line = True

    def feed(self, piece: str) -> None:
        if piece:
            self._echo(piece)
            self._ends_line = piece.endswith("\n")

    def finish(self) -> None:
        """The answer is whole; what follows begins on a line of its own."""
        if not self._ends_line:
            self._echo("\n")


class Screen:
    """Show answers, tables and remarks in a pipe or on a plain terminal."""

    @property
    def width(self) -> int:
        return shutil.get_terminal_size().columns

    def note(self, text: str) -> None:
        """Say something that is not a result."""
        click.echo(printable(text), err=True)

    def receipt(self, text: str) -> None:
        """Say what an answer cost."""
        self.note(f"({text})")

    def warn(self, text: str) -> None:
        self.note(text)

    def show(self, lines: Iterable[str]) -> None:
        """Show a result line by line."""
        for line in lines:
            self._echo(f"{line}\n")

    def answer(self, now: Now) -> Answer:
        """Begin to show an answer."""
        return Answer(self._echo)

    def compare(self, titles: Sequence[str], rows: Rows, now: Now) -> None:
        """Show two answers that come at the same time, one after the other."""
        self.show([f"--- {titles[0]}"])
        first, said = self.answer(now), 0
        try:
            for row, piece in rows:
                if row == 0:
                    first.feed(piece)
                    said += len(piece)
        finally:
            rows.stop()
            first.feed(rows.states[0].text[said:])
            first.finish()
            self.show([f"--- {titles[1]}", rows.states[1].text.removesuffix("\n")])

    def table(self, rows: Rows, lines: Callable[[], Sequence[str]], now: Now) -> None:
        """Show a table that grows with the rows; here, when it is whole."""
        try:
            for _ in rows:
                pass
        finally:
            rows.stop()
            self.show(lines())

    def _echo(self, text: str) -> None:
        """Write to standard output: to a terminal without control characters, else as it is."""
        click.echo(printable(text) if sys.stdout.isatty() else text, nl=False)
