"""Where the questions come from, in the plain form: lines of standard input."""

import sys
from collections.abc import Callable
from typing import TYPE_CHECKING

import click

from ..errors import InputError
from ..text import printable

if TYPE_CHECKING:
    from .status import Status


class Keyboard:
    """Read questions line by line; a backslash at the end of a line goes on in the next.

    The prompt, with the strength in force, goes to standard error; what is read from a pipe is
    repeated there, so that the whole can be read as a conversation.
    """

    interactive = property(lambda self: sys.stdin.isatty())

    def read(self, status: "Callable[[], Status]") -> str:
        """Return the next question.

        Raises:
            EOFError: there are no more.
            InputError: a line that is not UTF-8 text.
        """
        prompt = status().prompt
        lines = []
        while True:
            click.echo(printable(prompt), nl=False, err=True)
            try:
                line = sys.stdin.buffer.readline()
            except KeyboardInterrupt:
                click.echo(err=True)
                raise
            if not line and not lines:
                click.echo(err=True)
                raise EOFError
            text = _decoded(line).removesuffix("\n").removesuffix("\r")
            if not self.interactive:
                click.echo(printable(text), err=True)
            goes_on = text.endswith("\\") and line
            lines.append(text[:-1] if goes_on else text)
            if not goes_on:
                return "\n".join(lines)
            prompt = ". ".rjust(len(prompt))

    def give_back(self, text: str) -> None:
        """Offer ``text`` for editing; on a plain line that cannot be done."""


def _decoded(line: bytes) -> str:
    try:
        return line.decode("utf-8")
    except UnicodeDecodeError as error:
        raise InputError(f"this line is not UTF-8 text ({error}); it was left out.") from error
