"""A few lines at the foot of a terminal that are rewritten in place, from where they differ."""

import re
from collections.abc import Callable, Sequence
from os import terminal_size
from typing import TextIO

from rich.cells import cell_len

_STYLE = re.compile(r"\x1b\[[0-9;]*m")
HIDE, SHOW = "\x1b[?25l", "\x1b[?25h"


class Painter:
    """Keep the last lines of a terminal up to date.

    Lines are written in one piece and only from the first one that has changed, so nothing
    flickers. Lines that have left the screen at its top stay as they are. The cursor rests at
    the end of the last line.

    Args:
        out: the terminal; ``size``: its size, asked for again every time.
    """

    def __init__(self, out: TextIO, size: Callable[[], terminal_size]):
        self._out, self._size = out, size
        self._shown: list[str] = []

    def show(self, lines: Sequence[str]) -> None:
        """Replace what is shown; every line must fit the width, and may hold styles."""
        same = 0
        while same < min(len(lines), len(self._shown)) and lines[same] == self._shown[same]:
            same += 1
        if same == len(lines) == len(self._shown):
            return
        same = min(same, max(len(self._shown) - 1, 0), max(len(lines) - 1, 0))
        columns, height = self._size()
        up = [_rows(line, columns) for line in self._shown]
        while same < len(up) and sum(up[same:]) > height:
            same += 1  # out of reach
        start = HIDE
        if self._shown:
            start += "\r" + (f"\x1b[{sum(up[same:]) - 1}A" if sum(up[same:]) > 1 else "") + "\x1b[J"
        self._write(start + "\n".join(lines[same:]))
        self._shown = list(lines)

    def keep(self, lines: Sequence[str]) -> None:
        """Put ``lines`` in place of what is shown, for good; go on below them."""
        self.show([*lines, ""])
        self._shown = []

    def close(self) -> None:
        """Take away what is shown, and give the cursor back."""
        self.show([""])
        self._shown = []
        self._write(SHOW)

    def _write(self, text: str) -> None:
        self._out.write(text)
        self._out.flush()


def _rows(line: str, columns: int) -> int:
    """Return how many rows a line takes: more than one once the terminal has become narrower."""
    return max(1, -(-cell_len(_STYLE.sub("", line)) // max(columns, 1)))
