"""A real pseudo-terminal with a screen that can be read: pexpect runs, pyte draws."""

import re
import time
from collections.abc import Mapping, Sequence

import pexpect
import pyte


class Terminal:
    """Run a command in a terminal of ``columns`` x ``lines``."""

    def __init__(self, command: Sequence[str], env: Mapping[str, str], *, columns=80, lines=24,
                 term="xterm-256color"):  # fmt: skip
        self.pyte = pyte.HistoryScreen(columns, lines, history=2000, ratio=1)
        self._stream = pyte.ByteStream(self.pyte)
        self.raw = b""
        self.process = pexpect.spawn(
            command[0], list(command[1:]), env={**env, "TERM": term}, dimensions=(lines, columns)
        )
        self.pyte.write_process_input = self.process.send  # answers where the cursor is

    def send(self, keys: str) -> None:
        self.process.send(keys)

    def resize(self, columns: int, lines: int) -> None:
        self.pyte.resize(lines, columns)
        self.process.setwinsize(lines, columns)

    @property
    def text(self) -> str:
        """What is on the screen now, and what has left it at its top."""
        gone = ["".join(line[x].data for x in sorted(line)) for line in self.pyte.history.top]
        return "\n".join(line.rstrip() for line in [*gone, *self.pyte.display])

    @property
    def screen(self) -> list[str]:
        return [line.rstrip() for line in self.pyte.display]

    def pump(self, seconds: float = 0.1) -> bool:
        """Take in what the program writes; ``False`` once it has ended."""
        until = time.monotonic() + seconds
        while time.monotonic() < until:
            try:
                data = self.process.read_nonblocking(65536, timeout=0.05)
            except pexpect.TIMEOUT:
                continue
            except pexpect.EOF:
                return False
            self.raw += data
            self._stream.feed(data)
        return True

    def wait(self, pattern: str, *, count: int = 1, seconds: float = 90) -> str:
        """Wait until ``pattern`` is there ``count`` times; return all text."""
        until = time.monotonic() + seconds
        while len(re.findall(pattern, self.text)) < count:
            alive = self.pump()
            if len(re.findall(pattern, self.text)) >= count:
                break
            assert alive and time.monotonic() < until, f"{pattern!r} is not in:\n{self.text}"
        return self.text

    def end(self) -> int:
        """Wait for the program's end; return its exit status, or minus the signal."""
        until = time.monotonic() + 90
        while self.pump():
            assert time.monotonic() < until, self.text
        while self.process.isalive():  # its output has ended; `close` would kill it after 0.1 s
            assert time.monotonic() < until, self.text
            time.sleep(0.02)
        self.process.close()
        status = self.process.exitstatus
        return -self.process.signalstatus if status is None else status
