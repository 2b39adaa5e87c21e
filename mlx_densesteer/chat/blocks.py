"""Markdown that is still being written, cut into blocks that are finished. Pure Python."""

import re

_FENCE = re.compile(r" {0,3}(`{3,}|~{3,})")


class Blocks:
    """Cut a growing text at blank lines, where what precedes will not be changed by what follows.

    A fenced code block is never cut, nor is a list item before its indented continuation.
    ``current`` is the block that is being written.
    """

    def __init__(self) -> None:
        self.current = ""
        self._line = 0  # where the line begins that is not yet whole
        self._fence = ""
        self._blank = False  # the last whole line was blank, outside a fence

    def feed(self, text: str) -> list[str]:
        """Add ``text``; return the blocks that are finished by it."""
        self.current += text
        finished = []
        while True:
            line, newline, _ = self.current[self._line :].partition("\n")
            if self._blank and line[:1].strip():
                block, self.current = self.current[: self._line], self.current[self._line :]
                finished.append(block.strip("\n"))
                self._line, self._blank = 0, False
            if not newline:
                return [block for block in finished if block.strip()]
            self._take(line)
            self._line += len(line) + 1

    def _take(self, line: str) -> None:
        fence = _FENCE.match(line)
        if self._fence:
            if fence and fence[1].startswith(self._fence) and not line[fence.end() :].strip():
                self._fence = ""
            self._blank = False
        elif fence:
            self._fence, self._blank = fence[1], False
        else:
            self._blank = not line.strip()
