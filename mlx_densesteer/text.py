"""Text for terminals: notes, figures, tables, progress.

Notes and progress go to standard error; standard output is for results.
"""

import contextlib
import io
import os
import shutil
import sys
import time
from collections.abc import Iterator, Sequence
from typing import TextIO

import click

_silent = False  # of several ranks only rank 0 writes notes


@contextlib.contextmanager
def silence() -> Iterator[None]:
    """Suppress notes and progress of this process until the block ends."""
    global _silent
    before, _silent = _silent, True
    try:
        yield
    finally:
        _silent = before


class _Terminal(io.TextIOWrapper):
    """A stream to a terminal that shows control characters as visible signs."""

    def __init__(self, beneath: io.TextIOWrapper):
        known = beneath.encoding.lower().replace("-", "") != "ascii"  # click would go around ours
        encoding = beneath.encoding if known else "utf-8"
        super().__init__(beneath.buffer, encoding, "replace", None, True, True)
        self.beneath = beneath

    def write(self, text: str) -> int:
        super().write(printable(text))
        return len(text)

    def close(self) -> None:
        """Leave the stream beneath open: it is not ours."""
        self.flush()


def guard_terminals() -> None:
    """From now on let only printable text reach a terminal, whoever writes it.

    Names, metadata, text of a model and messages of other libraries could otherwise move the cursor,
    change the title or reorder a line. Files and pipes get everything as it is.
    """
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if isinstance(stream, io.TextIOWrapper) and not isinstance(stream, _Terminal):
            if stream.isatty():
                setattr(sys, name, _Terminal(stream))
            elif name == "stdout":
                stream.reconfigure(errors="surrogateescape")  # file names that are not UTF-8
    os.environ.setdefault("PYTHON_COLORS", "0")  # Python's tracebacks, without escape sequences


def unguarded(stream: TextIO) -> TextIO:
    """Return the stream to which escape sequences of our own can be written."""
    return getattr(stream, "beneath", stream)


def note(message: str) -> None:
    """Write a message to standard error."""
    if not _silent:
        click.echo(f"densesteer: {message}", err=True)


def count(number: int, noun: str) -> str:
    """Return ``1 step``, ``2 steps``."""
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def percent(fraction: float) -> str:
    """Write ``45.0%``."""
    return f"{100 * fraction:.1f}%"


def signed(strength: float) -> str:
    """Write a strength with its sign; strength 0 has none."""
    return f"{strength:+.3g}" if strength else "0"


def signed_dose(dose: float) -> str:
    """Write a dose in per cent with its sign, ``+20%``; dose 0 has none."""
    return f"{float(f'{100 * dose:.3g}'):+g}%" if dose else "0%"


def aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    """Return lines whose columns are aligned: the first to the left, others to the right."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = []
    for first, *rest in rows:
        cells = [first.ljust(widths[0])]
        cells += [cell.rjust(width) for cell, width in zip(rest, widths[1:], strict=True)]
        lines.append("  ".join(cells).rstrip())
    return lines


class Live:
    """Progress of long work.

    A terminal shows a few lines, rewritten in place; a file gets one line every 30 seconds.
    """

    TERMINAL, ELSEWHERE = 0.5, 30.0  # seconds between two updates

    def __init__(self) -> None:
        self._terminal = sys.stderr.isatty()
        self._lines = 0
        self._next = 0.0 if self._terminal else time.monotonic() + self.ELSEWHERE

    @property
    def due(self) -> bool:
        """Whether ``show`` would show an update now."""
        return time.monotonic() >= self._next and not _silent

    def show(self, summary: str, lines: Sequence[str] = ()) -> None:
        """Show ``lines`` (on a terminal only) and ``summary``, if an update is due."""
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
        """Erase the lines on the terminal."""
        if self._lines:
            click.echo(f"\x1b[{self._lines}A\x1b[J", nl=False, file=unguarded(sys.stderr))
            self._lines = 0


_BIDI = (0x061C, 0x200E, 0x200F, *range(0x202A, 0x202F), *range(0x2066, 0x206A))
_SHOWN = {code: chr(0x2400 + code) for code in range(0x20)}  # Unicode's control pictures
_SHOWN |= {0x7F: "\u2421", ord("\n"): "\n", ord("\t"): "\t", ord("\r"): ""}
_SHOWN |= dict.fromkeys([*range(0x80, 0xA0), *_BIDI, *range(0xD800, 0xE000)], "\ufffd")


def printable(text: str) -> str:
    """Return ``text`` with a visible sign for every control character but newline and tab.

    So it cannot move the cursor, change the terminal's title, or show letters in another order than they
    stand (bidirectional controls). Carriage returns are removed. The pieces of a text may be converted
    one by one.
    """
    return text.translate(_SHOWN)


def one_line(value: object, length: int = 80) -> str:
    """Return the beginning of a text on one line of at most ``length`` characters."""
    line = " ".join(printable(str(value)[: 4 * length + 80]).split())
    return line if len(line) <= length else f"{line[: max(length - 3, 0)]}..."


def cause(error: Exception) -> str:
    """Return the kind of an exception and what it says, on one line."""
    return ": ".join(filter(None, (type(error).__name__, one_line(error, 300))))
