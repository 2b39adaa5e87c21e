"""Screen and keyboard for a pipe: answers go to standard output, remarks to standard error.

Text is shown as it comes, without escape codes. ``terminal_screen`` and ``terminal_keyboard`` replace
both on a terminal.
"""

import shutil
import sys
from collections.abc import Callable, Iterable, Sequence

import click

from ..errors import InputError
from .rows import Rows
from .status import Status

Now = Callable[[], Status]  # the settings in force, read again for every picture


class ShownAnswer:
    """Show one answer piece by piece."""

    def __init__(self, echo: Callable[[str], None]):
        self._echo = echo
        self._ends_line = True

    def think(self, thought: str, tokens: int) -> None:
        """Show that a reasoning model thinks, as long as it does; here nothing."""

    def feed(self, piece: str) -> None:
        if piece:
            self._echo(piece)
            self._ends_line = piece.endswith("\n")

    def finish(self) -> None:
        """End the answer with a newline, if it has none."""
        if not self._ends_line:
            self._echo("\n")


class Screen:
    """Show answers, tables and remarks."""

    @property
    def width(self) -> int:
        return shutil.get_terminal_size().columns

    def note(self, text: str) -> None:
        """Show a remark."""
        click.echo(text, err=True)

    def receipt(self, text: str) -> None:
        """Show the receipt of an answer."""
        self.note(f"({text})")

    def warn(self, text: str) -> None:
        """Show an error or a warning."""
        self.note(text)

    def show(self, lines: Iterable[str]) -> None:
        """Show a result line by line."""
        for line in lines:
            self._echo(f"{line}\n")

    def answer(self, now: Now) -> ShownAnswer:
        """Begin to show an answer."""
        return ShownAnswer(self._echo)

    def compare(self, titles: Sequence[str], rows: Rows, now: Now) -> None:
        """Show two answers, one after the other; they are generated at the same time."""
        self.show([f"--- {titles[0]}"])
        first, said = self.answer(now), 0
        try:
            for row, _ in rows:
                if row == 0:
                    first.feed(rows.rows[0].answer[said:])
                    said = len(rows.rows[0].answer)
        finally:
            rows.stop()
            first.feed(rows.rows[0].answer[said:])
            first.finish()
            self.show([f"--- {titles[1]}", rows.rows[1].answer.removesuffix("\n")])

    def table(self, rows: Rows, lines: Callable[[], Sequence[str]], now: Now) -> None:
        """Show a table that grows with the rows; here only when it is complete."""
        try:
            for _ in rows:
                pass
        finally:
            rows.stop()
            self.show(lines())

    def _echo(self, text: str) -> None:
        """Write to standard output."""
        click.echo(text, nl=False)


class Keyboard:
    """Read questions line by line; a backslash at the end of a line continues it in the next.

    The prompt, with the dose in force, goes to standard error. Lines from a pipe are repeated there, so
    that the output reads as a conversation.
    """

    shows_thought = "/thought"
    interactive = property(lambda self: sys.stdin.isatty())

    def read(self, status: Now) -> str:
        """Return the next question.

        Raises:
            EOFError: there are no more.
            InputError: a line that is not UTF-8 text.
        """
        prompt = status().prompt
        lines = []
        while True:
            click.echo(prompt, nl=False, err=True)
            try:
                line = sys.stdin.buffer.readline()
            except KeyboardInterrupt:
                click.echo(err=True)
                raise
            if not line and not lines:
                click.echo(err=True)
                raise EOFError
            try:
                text = line.decode("utf-8").removesuffix("\n").removesuffix("\r")
            except UnicodeDecodeError as error:
                raise InputError(
                    f"this line is not UTF-8 text ({error}); it was left out."
                ) from error
            if not self.interactive:
                click.echo(text, err=True)
            goes_on = text.endswith("\\") and line
            lines.append(text[:-1] if goes_on else text)
            if not goes_on:
                return "\n".join(lines)
            prompt = ". ".rjust(len(prompt))

    def give_back(self, text: str) -> None:
        """Offer ``text`` for editing; does nothing here, where lines cannot be edited."""
