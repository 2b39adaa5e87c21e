"""Feed a reader with damaged inputs: results and this package's errors are all that may come out."""

import contextlib
import io
import random
import signal
import tempfile
import time
import tracemalloc
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import mlx.core as mx
from mutation import mutate
from readers import READERS

from mlx_densesteer.errors import DenseSteerError

SECONDS = 2.0  # of processor time, for one input
TIMES, FLOOR = 10, 2**20  # memory: ten times the file, and a mebibyte for the reader itself
LONGEST = 1500  # characters of a message
EVERY = 5  # memory is traced for each fifth input: tracing is slow
HANGS = 30  # seconds
RAM = Path("/dev/shm")  # writing an input to a disk takes longer than reading it


class Faulty(AssertionError):
    """An input that does what none may."""


def damaged(name: str, seed: int, number: int, whole: list[bytes]) -> bytes:
    """Return input ``number`` of a reader; the same for the same seed."""
    return mutate(READERS[name].form, random.Random(f"{seed} {name} {number}"), whole)


def fuzz(
    name: str, seed: int, begin: int, end: int, keep: Path | None = None
) -> Iterator[tuple[int, str]]:
    """Run a reader on its inputs ``begin`` to ``end``; yield each number and what came out.

    What came out is ``read``, the name of an error, or ``FAULT: ...``. A faulty input is written to the
    folder ``keep``.
    """
    reader = READERS[name]
    with tempfile.TemporaryDirectory(dir=RAM if RAM.is_dir() else None) as scratch:
        folder = Path(scratch)
        whole = reader.whole(folder)
        path = folder / "input" / reader.file
        path.parent.mkdir()
        for data in whole:  # what is whole is read; and what is imported late is imported
            path.write_bytes(data)
            reader.read(path)
        for number in range(begin, end):
            data = damaged(name, seed, number, whole)
            path.write_bytes(data)
            try:
                yield number, _outcome(reader.read, path, data, traced=number % EVERY == 0)
            except Faulty as fault:
                if keep is not None:
                    keep.mkdir(parents=True, exist_ok=True)
                    (keep / f"{name}-{seed}-{number}{path.suffix}").write_bytes(data)
                yield number, f"FAULT: {fault}"


def table(name: str, seed: int, begin: int, end: int, keep: Path | None = None) -> Counter[str]:
    """Count what comes out of a reader."""
    return Counter(outcome for _, outcome in fuzz(name, seed, begin, end, keep))


def _outcome(read, path: Path, data: bytes, *, traced: bool) -> str:
    most = TIMES * len(data) + FLOOR
    if traced:
        mx.reset_peak_memory()
        before = mx.get_active_memory()
        tracemalloc.start()
    began = time.process_time()
    try:
        with _alarm(), contextlib.redirect_stdout(io.StringIO()) as said:
            read(path)
        outcome = "read"
    except DenseSteerError as error:
        message = str(error).replace(str(path.parent), "")
        if len(message) > LONGEST:
            raise Faulty(f"a message of {len(message)} characters: {message[:80]!r}") from error
        outcome = type(error).__name__
    except Faulty:
        raise
    except BaseException as error:
        if isinstance(error, KeyboardInterrupt | SystemExit):
            raise
        raise Faulty(f"{type(error).__name__}: {str(error)[:200]}") from error
    finally:
        seconds = time.process_time() - began
        if traced:
            peak = tracemalloc.get_traced_memory()[1] + mx.get_peak_memory() - before
            tracemalloc.stop()
    if said.getvalue():
        raise Faulty(f"wrote to standard output: {said.getvalue()[:80]!r}")
    if seconds > SECONDS * (3 if traced else 1):  # tracing is slow
        raise Faulty(f"took {seconds:.1f} s for {len(data):,} bytes")
    if traced and peak > most:
        raise Faulty(f"took {peak:,} bytes of memory for {len(data):,} bytes")
    return outcome


@contextlib.contextmanager
def _alarm() -> Iterator[None]:
    def rise(*_: object) -> None:
        raise Faulty(f"no result after {HANGS} s")

    before = signal.signal(signal.SIGALRM, rise)
    signal.alarm(HANGS)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)
