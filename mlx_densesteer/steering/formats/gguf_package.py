"""The ``gguf`` package of the llama.cpp project: an extra, and careless with damaged files.

It believes every length that a file claims, so the header is walked here first (GGUF specification of ggml).
"""

import contextlib
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from ...errors import ConversionError, DenseSteerError, install_command


def gguf_package(path: Path, kind: type[DenseSteerError] = ConversionError) -> Any:
    """Return the package, or raise ``kind`` where the extra is not installed."""
    try:
        import gguf
    except ImportError as error:
        raise kind(
            f"{path}: GGUF files need the package gguf: {install_command('gguf')}"
        ) from error
    return gguf


@contextlib.contextmanager
def damage(path: Path, kind: type[DenseSteerError] = ConversionError) -> Iterator[None]:
    """What foreign, truncated or corrupt files raise; gguf has no class of its own for it."""
    try:
        yield
    except (
        ValueError, KeyError, IndexError, TypeError, OverflowError, ZeroDivisionError,
        RecursionError, MemoryError, struct.error,
    ) as error:  # fmt: skip
        raise kind(f"{path}: no complete GGUF file ({error}). Download it again.") from error


_SIZES = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}  # bytes of a value
_STRING, _ARRAY = 8, 9


def check_header(path: Path, kind: type[DenseSteerError] = ConversionError) -> None:
    """Raise ``kind`` unless all that the header claims is in the file; nothing is kept in memory.

    Also for arrays of arrays, which no file of a model or vector has.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        magic = file.read(4)
        if magic != b"GGUF":
            raise kind(f"{path}: is no GGUF file, it begins with {magic!r}.")
        with damage(path, kind):
            version, tensors, fields = struct.unpack("<IQQ", file.read(20))
            if version not in (2, 3):
                raise ValueError(f"version {version}, expected 2 or 3")
            for _ in range(fields):
                _skip(file, _number(file, "<Q"), size)
                _skip_value(file, _number(file, "<I"), size)
            for _ in range(tensors):
                _skip(file, _number(file, "<Q"), size)
                _skip(file, 8 * _number(file, "<I") + 12, size)


def _skip_value(file: IO[bytes], kind: int, size: int) -> None:
    if kind == _STRING:
        _skip(file, _number(file, "<Q"), size)
    elif kind == _ARRAY:
        of, count = struct.unpack("<IQ", file.read(12))
        if of == _STRING:
            for _ in range(count):
                _skip(file, _number(file, "<Q"), size)
        else:
            _skip(file, _SIZES[of] * count, size)
    else:
        _skip(file, _SIZES[kind], size)


def _number(file: IO[bytes], form: str) -> int:
    return struct.unpack(form, file.read(struct.calcsize(form)))[0]


def _skip(file: IO[bytes], count: int, size: int) -> None:
    if file.tell() + count > size:
        raise ValueError(f"it claims {count} bytes at {file.tell()}, but ends at {size}")
    file.seek(count, 1)
