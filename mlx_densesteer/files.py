"""Files and folders written whole or not at all, JSON lines, and zip archives. No mlx."""

import codecs
import contextlib
import glob
import hashlib
import json
import math
import os
import re
import reprlib
import shutil
import stat
import struct
import tempfile
import zipfile
import zlib
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import IO, Any, BinaryIO

from .errors import DenseSteerError, DiskError, InputError, VectorFormatError


@contextlib.contextmanager
def atomic_file(path: Path) -> Iterator[IO[bytes]]:
    """Open a temporary file beside ``path``; it replaces ``path`` if the block ends without an error.

    Raises:
        DiskError: the folder is missing, or cannot be written.
    """
    check_parent(path)
    with _refusals(path):
        handle, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    temporary = Path(name)
    try:
        with os.fdopen(handle, "wb") as file:
            yield file
        temporary.chmod(0o666 & ~_umask())
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


@contextlib.contextmanager
def scratch_folder(folder: Path) -> Iterator[Path]:
    """Make a scratch folder beside ``folder``, on the same file system; remove it at the end.

    Scratch folders that a killed process left there are removed too.
    """
    with _refusals(folder):
        folder.parent.mkdir(parents=True, exist_ok=True)
    prefix = f".{folder.name}.partial-"
    for left in folder.parent.glob(f"{glob.escape(prefix)}*"):
        if not _is_running(left.name.removeprefix(prefix).partition("-")[0]):
            shutil.rmtree(left, ignore_errors=True)
    with _refusals(folder):
        work = Path(tempfile.mkdtemp(prefix=f"{prefix}{os.getpid()}-", dir=folder.parent))
    try:
        yield work
    finally:
        shutil.rmtree(work, ignore_errors=True)


def move_into_place(made: Path, folder: Path, *, replace: bool) -> None:
    """Rename ``made``, inside a scratch folder, to ``folder``; an older ``folder`` is removed.

    Raises:
        DiskError: another process has made ``folder`` meanwhile, and ``replace`` is not set.
    """
    if not folder.exists() or (folder.is_dir() and not any(folder.iterdir())):
        made.rename(folder)
        return
    if not replace:
        raise DiskError(
            f"{folder}: another process has made it meanwhile. Choose another name (-o)."
        )
    old = made.parent / "old"  # removed with the scratch folder
    folder.rename(old)
    try:
        made.rename(folder)
    except BaseException:
        old.rename(folder)
        raise


def check_parent(path: Path) -> None:
    """Raise ``DiskError`` unless the folder of ``path`` exists."""
    if not path.parent.is_dir():
        raise DiskError(f"{path}: there is no folder {path.parent}. Make it first.")


def check_disk(folder: Path, need: int, what: str) -> None:
    """Raise ``DiskError`` unless ``need`` bytes are free where ``folder`` is or will be."""
    place = folder.absolute()
    while not place.exists():
        place = place.parent
    free = shutil.disk_usage(place).free
    if need > free:
        raise DiskError(
            f"{folder}: {what} needs about {_size(need)} of disk, but {_size(free)} are free. Make "
            "room or choose another place."
        )


def _size(count: int) -> str:
    return f"{count / 1e9:.1f} GB" if count >= 1e9 else f"{count / 1e6:.1f} MB"


def file_sha256(path: Path) -> str:
    """Return the SHA-256 of a file, in hexadecimal."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(2**20):
            digest.update(block)
    return digest.hexdigest()


@contextlib.contextmanager
def _refusals(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise DiskError(
            f"{path}: cannot be written ({error.strerror}). Choose another place (-o)."
        ) from error


def _is_running(pid: str) -> bool:
    try:
        os.kill(int(pid), 0)
    except PermissionError:  # another user's process
        return True
    except (ValueError, OverflowError, ProcessLookupError):
        return False
    return True


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


MAX_JSON_BYTES = 64 * 2**20
MAX_JSON_DEPTH = 64
_SURROGATE = re.compile(rb"\\u[dD][89a-fA-F]")


def parse_json(
    data: bytes | str,
    where: str,
    *,
    error: type[DenseSteerError] = InputError,
    limit: int = MAX_JSON_BYTES,
    bits: int = 64,
    remedy: str = "Repair or replace it.",
) -> object:
    """Return the JSON value in ``data``, text or UTF-8 with or without a byte order mark.

    Stricter than ``json.loads``: at most ``limit`` bytes and ``MAX_JSON_DEPTH`` levels, finite numbers,
    integers of ``bits`` bits, no key twice in one object, and no half of a surrogate pair, so that the
    value can be computed with, written and shown.

    Args:
        where: what ``data`` is, for the message.
        bits: of the largest integer; a tokenizer's ``model_max_length`` has 100.

    Raises:
        error: any of this; the message quotes no more than 30 characters of ``data``.
    """
    try:
        data = data.encode() if isinstance(data, str) else data
        if len(data) > limit:
            raise ValueError(f"{len(data):,} bytes, expected at most {limit:,}")
        if data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
            raise ValueError("it is UTF-16, expected UTF-8")
        value = json.loads(
            data.removeprefix(codecs.BOM_UTF8).decode(),
            object_pairs_hook=_object,
            parse_int=partial(_integer, bits),
            parse_float=_number,
            parse_constant=_number,
        )
        _check_depth(value)
        if _SURROGATE.search(data):
            json.dumps(value, ensure_ascii=False).encode()
    except (ValueError, RecursionError) as cause:
        if isinstance(cause, UnicodeDecodeError):
            found = f"UTF-8 (byte 0x{cause.object[cause.start]:02x} at {cause.start})"
        elif isinstance(cause, UnicodeEncodeError):
            found = "JSON that can be written again (it has half of a surrogate pair)"
        elif isinstance(cause, RecursionError):
            found = f"JSON of at most {MAX_JSON_DEPTH} levels (it is nested too deeply)"
        else:
            found = f"JSON that can be read ({cause})"
        raise error(f"{where}: is not {found}. {remedy}") from cause
    return value


def parse_object(data: bytes | str, where: str, **settings: Any) -> dict[str, object]:
    """Return the JSON object in ``data``; takes and raises what ``parse_json`` does."""
    value = parse_json(data, where, **settings)
    if not isinstance(value, dict):
        raise settings.get("error", InputError)(
            f"{where}: is {type(value).__name__}, expected a JSON object with named fields."
        )
    return value


def _object(pairs: list[tuple[str, object]]) -> dict[str, object]:
    made = dict(pairs)
    if len(made) != len(pairs):
        seen: set[str] = set()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))
        raise ValueError(f"the key {reprlib.repr(twice)} is there twice")
    return made


def _integer(bits: int, text: str) -> int:
    if len(text) > bits or not -(2 ** (bits - 1)) <= int(text) < 2**bits:
        raise ValueError(f"the integer {text[:20]}... has more than {bits} bits")
    return int(text)


def _number(text: str) -> float:
    number = float(text)
    if not math.isfinite(number):
        raise ValueError(f"the number {text[:20]} is not finite")
    return number


def _check_depth(value: object) -> None:
    level = [value] if isinstance(value, dict | list) else []
    for _ in range(MAX_JSON_DEPTH):
        level = [
            inner
            for outer in level
            for inner in (outer.values() if isinstance(outer, dict) else outer)
            if isinstance(inner, dict | list)
        ]
        if not level:
            return
    raise RecursionError


def read_jsonl(path: Path) -> list[tuple[int, dict[str, object]]]:
    """Return the objects of a JSONL file with their line numbers, counted from 1.

    A byte order mark, CRLF and blank lines are ignored.

    Raises:
        InputError: no such file, not UTF-8, a line that is not a JSON object, or no line at all.
    """
    try:
        content = path.read_bytes()
    except OSError as error:
        raise InputError(
            f"{path}: cannot be read ({error.strerror}). Name a JSONL file."
        ) from error
    if content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        raise InputError(f"{path}: is UTF-16, expected UTF-8; convert it first.")
    lines = content.removeprefix(codecs.BOM_UTF8).split(b"\n")
    records = [
        (
            number,
            parse_object(line, f"{path}: line {number}", remedy="Repair or remove the line."),
        )
        for number, line in enumerate(lines, start=1)
        if line.strip()
    ]
    if not records:
        raise InputError(f"{path}: is empty, expected one JSON object a line.")
    return records


MAX_BYTES = 64 * 2**20  # of a vector's file; 80 layers x 8192 float32 (Qwen2-72B) are 2.5 MiB
MAX_MEMBERS = 4096


def read_archive(path: Path) -> dict[str, bytes]:
    """Return every member of a vector's zip file by name, uncompressed.

    Raises:
        VectorFormatError: no such file, not a zip file, truncated, damaged (CRC), encrypted, a
            duplicate name, or more than ``MAX_MEMBERS`` members or ``MAX_BYTES`` bytes unpacked.
    """
    with _open(path) as file:
        try:
            with zipfile.ZipFile(file) as archive:
                members = archive.infolist()
                _check_directory(path, members)
                return {member.filename: _read(archive, member) for member in members}
        except (
            zipfile.BadZipFile, zlib.error, struct.error, EOFError, RuntimeError, ValueError,
            OverflowError, OSError,
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
    kind = "a folder" if stat.S_ISDIR(mode) else "not a regular file"
    raise VectorFormatError(f"{path}: is {kind}; expected a vector's file (.npz).")


def _read(archive: zipfile.ZipFile, member: zipfile.ZipInfo) -> bytes:
    """Read as many bytes as the directory declares; ``archive.read`` would unpack all there are."""
    with archive.open(member) as file:
        data = file.read(member.file_size)
        file.read(1)  # reading the end checks the CRC
    return data


def _check_directory(path: Path, members: list[zipfile.ZipInfo]) -> None:
    if len(members) > MAX_MEMBERS:
        raise VectorFormatError(
            f"{path}: {len(members)} members, but a vector file has at most {MAX_MEMBERS}."
        )
    names = [member.filename for member in members]
    if len(set(names)) != len(names):
        twice = sorted({name for name in names if names.count(name) > 1})
        raise VectorFormatError(f"{path}: {twice[0]} is in the archive more than once.")
    total = sum(member.file_size for member in members)
    if total > MAX_BYTES:
        raise VectorFormatError(
            f"{path}: would unpack to {total:,} bytes, but a vector file has at most "
            f"{MAX_BYTES:,}. It is a zip bomb or no vector; it was not unpacked."
        )
    if encrypted := [member.filename for member in members if member.flag_bits & 0x1]:
        raise VectorFormatError(f"{path}: {encrypted[0]} is encrypted; vectors never are.")
    plain = (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)
    if odd := [member.filename for member in members if member.compress_type not in plain]:
        raise VectorFormatError(f"{path}: {odd[0]} is neither stored nor deflated; save it again.")
