"""Servers under measurement, `densesteer serve` and mlx-lm's: processes that end with a block."""

import contextlib
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import mlx.core as mx
from clients import Address

from mlx_densesteer import demo
from mlx_densesteer.bench.subject import Subject
from mlx_densesteer.model.model import find

HOST = "127.0.0.1"
READY = 300.0  # seconds that a server may take to load its model
GRACE = 15.0  # seconds that it may take to end


@dataclass(frozen=True)
class ServerProcess:
    """A server that listens; ``log`` holds all of its output."""

    address: Address
    process: subprocess.Popen
    log: Path

    def said(self) -> str:
        return self.log.read_text("utf-8", "replace")

    def resident(self) -> float:
        """Return its resident memory in MiB; not all of Metal's memory is in it."""
        command = ["ps", "-o", "rss=", "-p", str(self.process.pid)]
        shown = subprocess.run(command, capture_output=True, text=True, check=False).stdout
        return int(shown.strip() or 0) / 1024

    def open_files(self) -> int | None:
        """Return how many files and sockets it holds open; ``None`` where there is no /proc."""
        try:
            return sum(1 for _ in Path(f"/proc/{self.process.pid}/fd").iterdir())
        except OSError:
            return None


def model_folder(subject: Subject, place: Path) -> Path:
    """Return a model folder that mlx-lm and this package compute in the same dtype.

    The embedded model is in bfloat16. On the CPU this package computes it in float32 and mlx-lm
    does not, so there it is a copy in float32, made in ``place``.
    """
    found = find(subject.name)
    if found != demo.MODEL or mx.default_device() != mx.Device(mx.cpu):
        return found
    copy = shutil.copytree(found, place / "demo-float32")
    weights = mx.load(str(copy / "model.safetensors"))
    floats = {name: array.astype(mx.float32) for name, array in weights.items()}
    mx.save_safetensors(str(copy / "model.safetensors"), floats, metadata={"format": "mlx"})
    return copy


def serve_command(model: str | Path, vectors: Sequence[Path]) -> list[str]:
    """Return `densesteer serve` with all defaults, on a free port."""
    named = [word for file in vectors for word in ("-v", str(file))]
    words = [sys.executable, "-m", "mlx_densesteer", "serve", "-m", str(model)]
    return [*words, *named, "--port", "0"]


@contextlib.contextmanager
def our_server(model: str | Path, vectors: Sequence[Path], place: Path) -> Iterator[ServerProcess]:
    """Run `densesteer serve`, which chooses a port and prints it."""
    with _process(serve_command(model, vectors), place / "densesteer.log") as (process, log):

        def listening() -> Address | None:
            found = re.search(rf"http://{re.escape(HOST)}:(\d+)", log.read_text("utf-8", "replace"))
            return Address(HOST, int(found[1])) if found else None

        yield ServerProcess(_wait(process, log, listening), process, log)


@contextlib.contextmanager
def stock_server(model: str | Path, place: Path) -> Iterator[ServerProcess]:
    """Run `mlx_lm.server` with its own defaults: up to 32 rows decode together, 8 prompts."""
    with socket.socket() as free:
        free.bind((HOST, 0))
        address = Address(HOST, free.getsockname()[1])
    command = [sys.executable, "-m", "mlx_lm", "server", "--model", str(model)]
    command += ["--host", HOST, "--port", str(address.port), "--log-level", "ERROR"]
    with _process(command, place / "mlx_lm.log") as (process, log):

        def listening() -> Address | None:
            try:
                with socket.create_connection(address, timeout=1.0) as made:
                    # on Linux a connection to a free port may meet itself
                    return None if made.getsockname() == made.getpeername() else address
            except OSError:
                return None

        yield ServerProcess(_wait(process, log, listening), process, log)


@contextlib.contextmanager
def _process(command: list[str], log: Path) -> Iterator[tuple[subprocess.Popen, Path]]:
    """Run a command and end it whatever happens, SIGTERM included.

    The process has its own session, so that Ctrl-C in the terminal does not reach it.
    """
    with _terminated(), log.open("wb") as out:
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=out, stderr=out, start_new_session=True
        )
        try:
            yield process, log
        finally:
            stop(process)


def stop(process: subprocess.Popen) -> float:
    """End a process by SIGTERM, after ``GRACE`` seconds by SIGKILL; return the seconds it took."""
    began = time.perf_counter()
    process.terminate()
    try:
        process.wait(GRACE)
    except BaseException:  # a second Ctrl-C too
        process.kill()
        process.wait()
    return time.perf_counter() - began


@contextlib.contextmanager
def _terminated() -> Iterator[None]:
    """Let SIGTERM unwind the stack, so that no server keeps running."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def leave(*_: object) -> None:
        sys.exit(128 + signal.SIGTERM)

    before = signal.signal(signal.SIGTERM, leave)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _wait(process: subprocess.Popen, log: Path, listening: Callable[[], Address | None]) -> Address:
    """Return the address as soon as ``listening()`` does.

    Raises:
        subprocess.CalledProcessError: the process ended; ``RuntimeError``: it takes too long.
    """
    until = time.perf_counter() + READY
    while time.perf_counter() < until:
        if process.poll() is not None:
            said = log.read_text("utf-8", "replace")
            raise subprocess.CalledProcessError(process.returncode, process.args, stderr=said)
        if address := listening():
            return address
        time.sleep(0.1)
    raise RuntimeError(f"{' '.join(process.args[1:4])}: does not listen after {READY:g} s")
