"""`densesteer serve` as its user starts it: a process of its own, whose output is kept."""

import contextlib
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path


class ServerProcess:
    """A running server: its ``url``, ``process``, and what it wrote (``said``)."""

    def __init__(self, arguments: list[str], environment: dict[str, str]):
        self.lines: list[str] = []
        self.url = ""
        self.process = subprocess.Popen(
            [sys.executable, "-m", "mlx_densesteer", "serve", *arguments], text=True,
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
        deadline = time.monotonic() + seconds
        while not self.url:
            found = re.search(r"serving .* on (http://\S+)", self.said)
            self.url = found[1] if found else ""
            if self.process.poll() is not None and not found:
                self._reader.join()
                raise RuntimeError(f"the server did not start:\n{self.said}")
            if time.monotonic() > deadline:
                raise RuntimeError(f"the server is not up after {seconds} s:\n{self.said}")
            time.sleep(0.05)
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


@contextlib.contextmanager
def server_process(*arguments: str, **environment: str) -> Iterator[ServerProcess]:
    """Start a server on the demo model and a free port; arguments are added."""
    server = ServerProcess(["-m", "demo", "--port", "0", *arguments], environment)
    try:
        server.await_url()
        yield server
    finally:
        if server.process.poll() is None:
            server.process.kill()
        server.process.wait()
