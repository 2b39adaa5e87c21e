"""Servers under measurement, as processes: ours and mlx-lm's, begun and always ended."""

import contextlib
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import mlx.core as mx

from .. import demo
from ..model.model import find
from ..steering.vector import SteeringVector, VectorMeta
from .clients import Address
from .subject import Subject

HOST = "127.0.0.1"
READY = 300.0  # seconds that a server may take to load its model
GRACE = 15.0  # seconds that it may take to end


@dataclass(frozen=True)
class Server:
    """A process that listens; ``log`` holds all that it said."""

    address: Address
    process: subprocess.Popen
    log: Path

    def said(self) -> str:
        return self.log.read_text("utf-8", "replace")

    def resident(self) -> float:
        """Return its resident memory in MiB; what Metal holds is not all in it."""
        status = Path(f"/proc/{self.process.pid}/status")
        if status.exists():
            found = re.search(r"^VmRSS:\s+(\d+) kB", status.read_text("utf-8"), re.MULTILINE)
            return int(found[1]) / 1024 if found else 0.0
        shown = subprocess.run(["ps", "-o", "rss=", "-p", str(self.process.pid)],
                               capture_output=True, text=True, check=False)  # fmt: skip
        return int(shown.stdout.strip() or 0) / 1024

    def open_files(self) -> int | None:
        """Return how many files and sockets it holds open, where the system tells."""
        try:
            return sum(1 for _ in Path(f"/proc/{self.process.pid}/fd").iterdir())
        except OSError:
            return None


def serve_command(model: str | Path, vectors: Sequence[Path]) -> list[str]:
    """Return `densesteer serve` with all defaults, on a free port."""
    named = [word for file in vectors for word in ("-v", str(file))]
    return [
        sys.executable, "-m", "mlx_densesteer", "serve", "-m", str(model), *named, "--port", "0"
    ]  # fmt: skip


@contextlib.contextmanager
def our_server(model: str | Path, vectors: Sequence[Path], place: Path) -> Iterator[Server]:
    """Run `densesteer serve`; it says itself at which port."""
    with _process(serve_command(model, vectors), place / "densesteer.log") as (process, log):

        def listening() -> Address | None:
            found = re.search(rf"http://{re.escape(HOST)}:(\d+)", log.read_text("utf-8", "replace"))
            return Address(HOST, int(found[1])) if found else None

        yield Server(_wait(process, log, listening), process, log)


@contextlib.contextmanager
def stock_server(model: str | Path, place: Path) -> Iterator[Server]:
    """Run `mlx_lm.server` with its own defaults: up to 32 rows decode together, 8 prompts."""
    with socket.socket() as free:
        free.bind((HOST, 0))
        address = Address(HOST, free.getsockname()[1])
    command = [
        sys.executable, "-m", "mlx_lm", "server", "--model", str(model), "--host", HOST,
        "--port", str(address.port), "--log-level", "ERROR",
    ]  # fmt: skip
    with _process(command, place / "mlx_lm.log") as (process, log):

        def listening() -> Address | None:
            try:
                with socket.create_connection(address, timeout=1.0) as made:
                    # on Linux a connection to a free port may meet itself
                    return None if made.getsockname() == made.getpeername() else address
            except OSError:
                return None

        yield Server(_wait(process, log, listening), process, log)


@contextlib.contextmanager
def _process(command: list[str], log: Path) -> Iterator[tuple[subprocess.Popen, Path]]:
    """Run a command; end it whatever happens, SIGTERM included.

    It has a session of its own: a Ctrl-C in the terminal is ours alone to handle.
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
    """End a process, politely first; return the seconds that it took."""
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
    """Let SIGTERM unwind the stack, so that no server is left behind."""
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


def _wait(process: subprocess.Popen, log: Path, listening) -> Address:
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


def common_folder(subject: Subject, place: Path) -> Path:
    """Return a folder that both servers compute in the same dtype.

    The embedded model comes in bfloat16, which we compute in float32 on the CPU, and mlx-lm
    does not: there both get a copy in float32.
    """
    found = find(subject.name)
    if found != demo.MODEL or mx.default_device() != mx.Device(mx.cpu):
        return found
    copy = shutil.copytree(found, place / "demo-float32")
    weights = mx.load(str(copy / "model.safetensors"))
    floats = {name: array.astype(mx.float32) for name, array in weights.items()}
    mx.save_safetensors(str(copy / "model.safetensors"), floats, metadata={"format": "mlx"})
    return copy


def random_vector(subject: Subject, layer: int, name: str) -> SteeringVector:
    """Return the subject's random vector at one layer, with the metadata of an extracted one."""
    meta = VectorMeta(
        model=subject.name, hidden_size=subject.model.args.hidden_size,
        layer_count=subject.layer_count, fingerprint=subject.fingerprint,
        residual_norms={str(layer): norm for layer, norm in subject.norms.items()},
    )  # fmt: skip
    return SteeringVector({layer: subject.vector.layers[layer]}, meta, name=name)
