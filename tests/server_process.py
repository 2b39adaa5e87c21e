"""`densesteer serve` as its user starts it: a process of its own, whose output is kept."""

import contextlib
import os
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

from mlx_densesteer import demo

PROGRAM = ("-m", "mlx_densesteer")


class ServerProcess:
    """A running server: its ``url``, ``process``, and what it wrote (``said``)."""

    def __init__(
        self, arguments: list[str], environment: dict[str, str], program: tuple[str, ...] = PROGRAM
    ):
        self.lines: list[str] = []
        self.url = ""
        self._up = threading.Event()
        self.process = subprocess.Popen(
            [sys.executable, *program, "serve", *arguments], text=True,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, env=os.environ | environment,
        )  # fmt: skip
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    @property
    def said(self) -> str:
        return "".join(self.lines)

    @property
    def resident_mib(self) -> float:
        pages = int(Path(f"/proc/{self.process.pid}/statm").read_text().split()[1])
        return pages * os.sysconf("SC_PAGE_SIZE") / 2**20

    def await_url(self, seconds: float = 60) -> str:
        """Wait until the server listens; raise with what it said if it does not."""
        if not self._up.wait(seconds) or not self.url:
            self.process.kill()
            self._reader.join()
            raise RuntimeError(f"the server did not start:\n{self.said}")
        return self.url

    def stop(self, number: int = signal.SIGTERM, seconds: float = 60) -> int:
        """Send a signal, wait for the end, and return the exit code."""
        if self.process.poll() is None:
            self.process.send_signal(number)
        code = self.process.wait(seconds)
        self._reader.join()
        return code

    def _read(self) -> None:
        for line in self.process.stdout or ():
            self.lines.append(line)
            if found := re.search(r"serving .* on (http://\S+)", line):
                self.url = found[1]
                self._up.set()
        self._up.set()  # it has ended


@contextlib.contextmanager
def server_process(
    *arguments: str, program: tuple[str, ...] = PROGRAM, **environment: str
) -> Iterator[ServerProcess]:
    """Start a server on the demo model and a free port; arguments are added.

    ``program`` are Python's own arguments, for a test that changes something first.
    """
    server = ServerProcess(["-m", "demo", "--port", "0", *arguments], environment, program)
    try:
        server.await_url()
        yield server
    finally:
        if server.process.poll() is None:
            server.process.kill()
        server.process.wait()


def assert_no_internals(text: str) -> None:
    """Check that a text for clients, or a log, has no traceback and no path of this machine."""
    assert "Traceback" not in text and "Exception" not in text
    assert str(Path(demo.__file__).parent) not in text and "/site-packages" not in text
