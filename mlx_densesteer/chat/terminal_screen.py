"""The screen of a terminal: Markdown while it streams, and the settings in force below it.

Finished blocks are printed for good, so they scroll like any output; only the block that is
being written is painted again. Needs rich.
"""

import contextlib
import shutil
import sys
import termios
import textwrap
import time
from collections.abc import Callable, Iterator, Sequence

import click
from rich.cells import cell_len
from rich.console import Console

from ..text import printable
from .blocks import Blocks
from .markdown import has_table, render, render_block
from .painter import Painter
from .rows import Rows
from .screen import Answer, Now, Screen

OFTEN = 0.05  # seconds between two pictures at least
SHARE = 4  # a picture may take one part in so many of the time
COLUMN = 34  # narrower columns cannot be read: the answers then go below each other


class TerminalScreen(Screen):
    """Show answers as Markdown, receipts dim, and a line with the settings while text comes."""

    def __init__(self) -> None:
        self._console = Console(highlight=False, markup=False, emoji=False)

    def note(self, text: str) -> None:
        click.echo(_wrapped(text), err=True)

    def receipt(self, text: str) -> None:
        click.echo(click.style(_wrapped(text), dim=True), err=True)

    def warn(self, text: str) -> None:
        click.echo(click.style(_wrapped(text), bold=True), err=True)

    def answer(self, now: Now) -> Answer:
        return _Streaming(self._console, now)

    def compare(self, titles: Sequence[str], rows: Rows, now: Now) -> None:
        def lines() -> list[str]:
            texts = [printable(state.text) for state in rows.states]
            if (_width() - 3) // 2 < COLUMN:
                return self._below_each_other(titles, texts, _width())
            return self._side_by_side(titles, texts, (_width() - 3) // 2)

        self._watch(rows, lines, now)

    def table(self, rows: Rows, lines: Callable[[], Sequence[str]], now: Now) -> None:
        self._watch(rows, lambda: [printable(line)[: _width()] for line in lines()], now)

    def _watch(self, rows: Rows, lines: Callable[[], Sequence[str]], now: Now) -> None:
        """Paint ``lines`` while the rows run, and leave them there at the end."""
        with _live(now) as live:
            try:
                live.show_tail(lines)
                for _ in rows:
                    live.show_tail(lines)
            finally:
                rows.stop()
                live.keep(lines())

    def _side_by_side(self, titles: Sequence[str], texts: Sequence[str], width: int) -> list[str]:
        columns = [
            [click.style(title[:width], bold=True), *render(text, self._console, width)]
            for title, text in zip(titles, texts, strict=True)
        ]
        height = max(map(len, columns))
        for column in columns:
            column += [""] * (height - len(column))
        return [f"{_padded(a, width)} | {b}".rstrip() for a, b in zip(*columns, strict=True)]

    def _below_each_other(
        self, titles: Sequence[str], texts: Sequence[str], width: int
    ) -> list[str]:
        lines: list[str] = []
        for title, text in zip(titles, texts, strict=True):
            lines += [
                click.style(title[:width], bold=True),
                *render(text, self._console, width),
                "",
            ]
        return lines[:-1]


class _Live:
    """The painted foot of the screen: some lines, and the settings below them."""

    def __init__(self, now: Now):
        self._now = now
        self._painter = Painter(sys.stdout, shutil.get_terminal_size)
        self._due = 0.0

    def show(self, lines: Callable[[], Sequence[str]]) -> None:
        """Paint ``lines`` if it is time to."""
        began = time.monotonic()
        if began < self._due:
            return
        below = self._now().lines(_width(), "Ctrl-C stops")
        self._painter.show([*lines(), *(click.style(line, reverse=True) for line in below)])
        ended = time.monotonic()
        self._due = ended + max(OFTEN, SHARE * (ended - began))

    def show_tail(self, lines: Callable[[], Sequence[str]]) -> None:
        """Paint as much of the end of ``lines`` as the screen holds, if it is time to."""
        self.show(lambda: lines()[-max(1, shutil.get_terminal_size().lines - 6) :])

    def keep(self, lines: Sequence[str]) -> None:
        """Leave ``lines`` on the screen for good."""
        self._painter.keep(lines)
        self._due = 0.0

    def close(self) -> None:
        self._painter.close()


class _Streaming(Answer):
    """An answer as Markdown, block by block."""

    def __init__(self, console: Console, now: Now):
        self._console, self._blocks = console, Blocks()
        self._said = False
        self._stack = contextlib.ExitStack()
        self._live = self._stack.enter_context(_live(now))
        self._live.show(list)

    def feed(self, piece: str) -> None:
        for block in self._blocks.feed(printable(piece)):
            self._keep(block)
        current = self._blocks.current.strip("\n")
        show = self._live.show_tail if has_table(current) else self._live.show
        show(lambda: self._rendered(current))

    def finish(self) -> None:
        with self._stack:
            if block := self._blocks.current.strip():
                self._keep(self._blocks.current.strip("\n") if block else "")

    def _keep(self, block: str) -> None:
        self._live.keep(self._rendered(block))
        self._said = True

    def _rendered(self, block: str) -> list[str]:
        if not block.strip():
            return []
        above = [""] if self._said else []
        return above + render_block(block, self._console, _width())


@contextlib.contextmanager
def _live(now: Now) -> Iterator[_Live]:
    """Paint at the foot of the screen; what is typed meanwhile is not echoed into the picture."""
    live = _Live(now)
    with _no_echo():
        try:
            yield live
        finally:
            live.close()


@contextlib.contextmanager
def _no_echo() -> Iterator[None]:
    """Keep the terminal from echoing keys; what was typed is read by the next prompt."""
    try:
        number = sys.stdin.fileno()
        before = termios.tcgetattr(number)
    except (OSError, termios.error):
        yield
        return
    quiet = [*before]
    quiet[3] &= ~termios.ECHO
    termios.tcsetattr(number, termios.TCSANOW, quiet)
    try:
        yield
    finally:
        termios.tcsetattr(number, termios.TCSANOW, before)


def _width() -> int:
    return max(shutil.get_terminal_size().columns - 1, 10)


def _wrapped(text: str) -> str:
    lines = printable(text).split("\n")
    return "\n".join(textwrap.fill(line, _width(), break_on_hyphens=False) for line in lines)


def _padded(line: str, width: int) -> str:
    return line + " " * max(0, width - cell_len(click.unstyle(line)))
