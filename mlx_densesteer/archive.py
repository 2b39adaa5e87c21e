"""Reading a zip archive of arrays that somebody else made, without trusting it.

A vector file is a few hundred kilobytes. Whatever its directory claims, no more than
``max_bytes`` are unpacked, and nothing is written to disk.
"""

import re
import stat
import struct
import zipfile
import zlib
from pathlib import Path
from typing import BinaryIO

import numpy as np

from .errors import VectorFormatError

MAX_BYTES = 64 * 2**20  # 80 layers x 8192 float32 (the largest Qwen2) are 2.5 MiB
MAX_MEMBERS = 4096


def read_archive(
    path: str | Path, *, max_bytes: int = MAX_BYTES, max_members: int = MAX_MEMBERS
) -> dict[str, bytes]:
    """Return every member of the zip file at ``path`` by name, uncompressed.

    Raises:
        VectorFormatError: no such file, no zip file, truncated, damaged (CRC), encrypted, a
            duplicate name, or more than ``max_members`` members or ``max_bytes`` bytes unpacked.
    """
    path = Path(path)
    with _open(path) as file:
        try:
            with zipfile.ZipFile(file) as archive:
                members = archive.infolist()
                _check_directory(path, members, max_bytes, max_members)
                return {member.filename: _read(archive, member) for member in members}
        # What zipfile lets through on damaged files, beside its own BadZipFile.
        except (
            zipfile.BadZipFile, zlib.error, struct.error, EOFError, NotImplementedError,
            RuntimeError, ValueError, OverflowError, OSError,
        ) as error:  # fmt: skip
            raise VectorFormatError(
                f"{path}: not a complete zip archive ({error}). The file is truncated, damaged or "
                "of another kind; copy or download it again."
            ) from error


def _open(path: Path) -> BinaryIO:
    try:
        mode = path.stat().st_mode
        if stat.S_ISREG(mode):
            return path.open("rb")
    except (FileNotFoundError, NotADirectoryError) as error:
        raise VectorFormatError(
            f"{path}: no such file. Make one with `densesteer extract`, or import one with "
            "`densesteer vector import`."
        ) from error
    except OSError as error:
        raise VectorFormatError(
            f"{path}: cannot be read ({error.strerror}). Name a vector's file."
        ) from error
    kind = "a folder" if stat.S_ISDIR(mode) else "no regular file"
    raise VectorFormatError(f"{path}: is {kind}; expected a vector's file (.npz).")


def _read(archive: zipfile.ZipFile, member: zipfile.ZipInfo) -> bytes:
    """Read what the directory declares and no more: ``archive.read`` unpacks first."""
    with archive.open(member) as file:
        data = file.read(member.file_size)
        file.read(1)  # at the end the CRC is checked
    return data


def _check_directory(
    path: Path, members: list[zipfile.ZipInfo], max_bytes: int, max_members: int
) -> None:
    if len(members) > max_members:
        raise VectorFormatError(
            f"{path}: {len(members)} members, but a vector file has at most {max_members}."
        )
    names = [member.filename for member in members]
    if len(set(names)) != len(names):
        twice = sorted({name for name in names if names.count(name) > 1})
        raise VectorFormatError(f"{path}: {twice[0]} is in the archive more than once.")
    total = sum(member.file_size for member in members)
    if total > max_bytes:
        raise VectorFormatError(
            f"{path}: would unpack to {total:,} bytes, but a vector file has at most "
            f"{max_bytes:,}. It is a zip bomb or no vector; it was not unpacked."
        )
    encrypted = [member.filename for member in members if member.flag_bits & 0x1]
    if encrypted:
        raise VectorFormatError(f"{path}: {encrypted[0]} is encrypted; vectors never are.")
    plain = (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)
    if odd := [member.filename for member in members if member.compress_type not in plain]:
        raise VectorFormatError(f"{path}: {odd[0]} is neither stored nor deflated; save it again.")


_HEADER = re.compile(
    rb"\{'descr': '(<f4|\|u1)', 'fortran_order': False, 'shape': \((\d{1,9}),\), \} *\n"
)


def parse_npy(path: Path, entry: str, data: bytes, dtype: str) -> np.ndarray:
    """Read one ``.npy`` member of one dimension.

    ``dtype`` is ``"<f4"`` or ``"|u1"``. The header is a Python literal; only the one that the format names is read, and no
    other is evaluated.
    """
    length = int.from_bytes(data[8:10], "little")
    header = _HEADER.fullmatch(data[10 : 10 + length])
    if data[:8] != b"\x93NUMPY\x01\x00" or header is None or header[1].decode() != dtype:
        raise VectorFormatError(
            f"{path}: {entry} is not a .npy array of one dimension and dtype {dtype} "
            f"({np.dtype(dtype)}); it begins with {data[:100]!r}."
        )
    body = data[10 + length :]
    count, itemsize = int(header[2]), np.dtype(dtype).itemsize
    if count * itemsize != len(body):
        raise VectorFormatError(
            f"{path}: {entry} claims {count} values, {count * itemsize} bytes, but holds {len(body)}."
        )
    return np.frombuffer(body, dtype=dtype)
