"""Files and folders written whole or not at all, JSON lines, and zip archives. No mlx."""

import codecs
import contextlib
import errno
import fcntl
import glob
import hashlib
import io
import json
import math
import os
import platform
import re
import reprlib
import shutil
import stat
import struct
import sys
import tempfile
import zipfile
import zlib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import UnionType
from typing import IO, Any

from .errors import DenseSteerError, DiskError, InputError, VectorFormatError
from .text import one_line


@contextlib.contextmanager
def atomic_file(path: Path) -> Iterator[IO[bytes]]:
    """Open a file that replaces ``path`` as ``atomic_path`` does; raises as that does."""
    with atomic_path(path) as made, made.open("wb") as file:
        yield file


@contextlib.contextmanager
def atomic_path(path: Path, *, replace: bool = True) -> Iterator[Path]:
    """Yield the name of a file to write; it replaces ``path`` if the block ends without an error.

    The new file is on the disk before it gets the name, and has the mode of the file that it replaces.
    A symbolic link stays one: the file that it points to is replaced. What killed writes left is removed.

    Args:
        replace: otherwise a file that another process has made meanwhile is kept.

    Raises:
        DiskError: the folder is missing, ``path`` is read-only or no regular file, or anything that the
            system raises in the block.
    """
    with disk_errors(path):
        target, mode = file_to_replace(path)
        with scratch_folder(target) as work:
            made = work / target.name
            yield made
            _sync(made)
            if mode is not None:
                made.chmod(mode)
            if not replace and target.exists():
                raise _made_meanwhile(path)
            made.replace(target)
            _sync(target.parent)


def file_to_replace(path: Path) -> tuple[Path, int | None]:
    """Return the file that ``atomic_path`` replaces, and its mode if it is there; raises as that does."""
    with disk_errors(path):
        target = Path(os.path.realpath(path)) if path.is_symlink() else path
        if not target.parent.is_dir():
            raise DiskError(f"{path}: there is no folder {target.parent}. Make it first.")
        try:
            mode = target.stat().st_mode
        except FileNotFoundError:
            return target, None
    if stat.S_ISDIR(mode):
        raise DiskError(f"{path}: is a folder. Name a file in it.")
    if not stat.S_ISREG(mode):
        raise DiskError(f"{path}: is not a regular file, so it is not replaced. Name a file.")
    if not mode & 0o222 or not os.access(target, os.W_OK):
        raise DiskError(
            f"{path}: is read-only. Make it writable (chmod u+w), or choose another name."
        )
    return target, stat.S_IMODE(mode)


def _made_meanwhile(path: Path) -> DiskError:
    return DiskError(f"{path}: another process has made it meanwhile. Choose another name.")


@contextlib.contextmanager
def scratch_folder(folder: Path) -> Iterator[Path]:
    """Make a scratch folder beside ``folder``, on the same file system; remove it at the end.

    Scratch folders that a killed process left there are removed too.

    Raises:
        DiskError: there cannot be one.
    """
    prefix = partial_prefix(folder)
    with disk_errors(folder):
        folder.parent.mkdir(parents=True, exist_ok=True)
        for left in folder.parent.glob(f"{glob.escape(prefix)}*"):
            if not _is_running(left.name.removeprefix(prefix).partition("-")[0]):
                shutil.rmtree(left, ignore_errors=True)
        work = Path(tempfile.mkdtemp(prefix=f"{prefix}{os.getpid()}-", dir=folder.parent))
    try:
        yield work
    finally:
        shutil.rmtree(work, ignore_errors=True)


def partial_prefix(path: Path) -> str:
    """Return how the names of this machine's scratch folders for ``path`` begin; a process id follows.

    Another machine that shares the disk has other processes.
    """
    machine = zlib.crc32(platform.node().encode())
    return f".{path.name[:40]}.partial-{machine:x}-"  # with it, the longest name has room too


def move_into_place(made: Path, folder: Path, *, replace: bool) -> None:
    """Rename the folder ``made``, inside a scratch folder, to ``folder``; an older one is removed.

    Raises:
        DiskError: another process has made ``folder`` meanwhile, and ``replace`` is not set; or it
            cannot be renamed.
    """
    with disk_errors(folder):
        for one in (made, *made.rglob("*")):
            _sync(one)
        old = None
        while True:  # at once, unless other processes replace the same folder
            try:
                made.rename(folder)
                break
            except OSError as error:
                if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                    if old is not None:
                        old.rename(folder)
                    raise
            if not replace:
                raise _made_meanwhile(folder)
            with contextlib.suppress(FileNotFoundError):  # removed with the scratch folder
                old = folder.rename(Path(tempfile.mkdtemp(dir=made.parent)) / "old")
        _sync(folder.parent)


def _sync(path: Path) -> None:
    """Wait until a file's content, or a folder's names, are on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        if sys.platform == "darwin":  # its fsync leaves the data in the drive's cache
            with contextlib.suppress(OSError):  # not on every file system
                fcntl.fcntl(handle, fcntl.F_FULLFSYNC)
        os.fsync(handle)
    except OSError:
        if path.is_file():  # not every file system can sync a folder
            raise
    finally:
        os.close(handle)


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
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextlib.contextmanager
def disk_errors(path: Path) -> Iterator[None]:
    """Raise ``DiskError`` for what the system raises while ``path`` is written."""
    try:
        yield
    except OSError as error:
        raise _refused(path, error) from error


_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
# mlx and numpy say in their own words that a write came to nothing
_FULL_TEXTS = (
    *map(os.strerror, _FULL),
    "[write]",
    "requested and",
    "Not enough free space",
    "No usable temporary directory",
)


@contextlib.contextmanager
def full_disk(path: Path, choice: str = "") -> Iterator[None]:
    """Raise ``DiskError`` for what another package raises when the disk under ``path`` is full.

    Args:
        choice: how to choose another place, such as ``TMPDIR``.
    """
    try:
        yield
    except DenseSteerError:
        raise
    except Exception as error:
        if not any(text in str(error) for text in _FULL_TEXTS):
            raise
        raise _refused(path, error, choice) from error


def _refused(path: Path, error: Exception, choice: str = "") -> DiskError:
    full = any(text in str(error) for text in _FULL_TEXTS)
    remedy = "Make room on the disk, or choose another place" if full else "Choose another place"
    reason = getattr(error, "strerror", None) or error
    how = f" ({choice})" if choice else ""
    return DiskError(f"{path}: cannot be written ({reason}). {remedy}{how}.")


def _is_running(pid: str) -> bool:
    try:
        os.kill(int(pid), 0)
    except PermissionError:  # another user's process
        return True
    except (ValueError, OverflowError, ProcessLookupError):
        return False
    return True


MAX_JSON_BYTES = 64 * 2**20
MAX_JSON_DEPTH = 64
_LONG_NUMBER = re.compile(rb"\d{19}|[eE]\+?\d{3}")  # all others are finite and have 64 bits
_SURROGATE = re.compile(rb"\\u[dD][89a-fA-F]")


def parse_json(
    data: bytes | str,
    where: str,
    *,
    error: Callable[[str], Exception] = InputError,
    limit: int = MAX_JSON_BYTES,
    remedy: str = "Repair or replace it.",
    repair: bool = False,
) -> object:
    """Return the JSON value in ``data``, text or UTF-8 with or without a byte order mark.

    Stricter than ``json.loads``: at most ``limit`` bytes and ``MAX_JSON_DEPTH`` levels, finite numbers,
    integers of 64 bits, no key twice in one object, and no half of a surrogate pair, so that the
    value can be computed with, written and shown.

    Args:
        where: what ``data`` is, for the message.
        repair: put U+FFFD in place of half of a surrogate pair.

    Raises:
        error: any of this; the message quotes no more than 30 characters of ``data``.
    """
    try:
        data = data.encode() if isinstance(data, str) else data
        if len(data) > limit:
            raise ValueError(f"{len(data):,} bytes, expected at most {limit:,}")
        if data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
            raise ValueError("it is UTF-16, expected UTF-8")
        checked = _LONG_NUMBER.search(data)  # slower by far: for these documents only
        value = json.loads(
            data.removeprefix(codecs.BOM_UTF8).decode(),
            object_pairs_hook=_object,
            parse_int=_integer if checked else None,
            parse_float=_number if checked else None,
            parse_constant=_number,
        )
        _check_depth(value)
        if _SURROGATE.search(data):
            text = json.dumps(value, ensure_ascii=False)
            if repair:
                value = json.loads(whole_characters(text))
            else:
                text.encode()
    except (ValueError, RecursionError) as cause:
        if isinstance(cause, UnicodeDecodeError):
            found = f"UTF-8 (byte 0x{cause.object[cause.start]:02x} at {cause.start})"
        elif isinstance(cause, UnicodeEncodeError):
            found = "JSON that can be written again (it has half of a surrogate pair)"
        elif isinstance(cause, RecursionError):
            found = f"JSON of at most {MAX_JSON_DEPTH} levels (it is nested too deeply)"
        else:
            found = f"JSON that can be read ({cause})"
        raise error(f"{where}: is not {found}. {remedy}".rstrip()) from cause
    return value


def parse_object(
    data: bytes | str,
    where: str,
    *,
    error: Callable[[str], Exception] = InputError,
    remedy: str = "Repair or replace it.",
    **settings: Any,
) -> dict[str, object]:
    """Return the JSON object in ``data``; takes and raises what ``parse_json`` does."""
    value = parse_json(data, where, error=error, remedy=remedy, **settings)
    if not isinstance(value, dict):
        found = f"is {type(value).__name__}, expected a JSON object with named fields"
        raise error(f"{where}: {found}. {remedy}".rstrip())
    return value


def whole_characters(text: str) -> str:
    """Return ``text`` with U+FFFD for each lone surrogate; two that make a pair are joined."""
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def check_fields(record: Mapping[str, object], **kinds: type | UnionType) -> None:
    """Raise unless every named field of a JSON object has its type; a whole number is a float, too.

    Raises:
        KeyError: a field is missing.
        TypeError: a field is something else.
    """
    for name, kind in kinds.items():
        found, allowed = type(record[name]), getattr(kind, "__args__", (kind,))
        if found not in allowed and not (found is int and float in allowed):
            raise TypeError(f"{name} is {reprlib.repr(record[name])}")


def token_ids(value: object, vocabulary: int) -> tuple[int, ...]:
    """Return a JSON list as token ids: mlx reads foreign memory at an id outside the vocabulary.

    Raises:
        TypeError: not a list of integers.
        ValueError: a number below 0, or not below ``vocabulary``.
    """
    if not isinstance(value, list | tuple) or not all(type(one) is int for one in value):
        raise TypeError(f"{reprlib.repr(value)} is no list of token ids")
    if outside := [one for one in value if not 0 <= one < vocabulary]:
        raise ValueError(f"token {outside[0]} is outside the vocabulary of {vocabulary}")
    return tuple(value)


def _object(pairs: list[tuple[str, object]]) -> dict[str, object]:
    made = dict(pairs)
    if len(made) != len(pairs):
        seen: set[str] = set()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))
        raise ValueError(f"the key {reprlib.repr(twice)} is there twice")
    return made


def _integer(text: str) -> int:
    if len(text) > 20 or not -(2**63) <= int(text) < 2**64:
        raise ValueError(f"the integer {text[:20]}... has more than 64 bits")
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


def read_file(
    path: Path,
    what: str = "a vector's file (.npz)",
    *,
    error: type[DenseSteerError] = VectorFormatError,
    limit: int = MAX_BYTES + 2**20,
    make: str = "Make one with `densesteer extract`, or import one with `densesteer vector import`.",
) -> bytes:
    """Return the content of a regular file.

    Args:
        what: what it is, and ``make``, how to get one, for the message.

    Raises:
        error: no such file, a folder, a device or a pipe, unreadable, or more than ``limit`` bytes.
    """
    try:
        state = path.stat()
        if stat.S_ISDIR(state.st_mode):
            raise error(f"{path}: is a folder; expected {what}.")
        if not stat.S_ISREG(state.st_mode):
            raise error(f"{path}: is not a regular file; expected {what}.")
        if state.st_size > limit:
            raise error(f"{path}: has {state.st_size:,} bytes; {what} has at most {limit:,}.")
        return path.read_bytes()
    except (FileNotFoundError, NotADirectoryError) as cause:
        raise error(f"{path}: no such file. {make}") from cause
    except (OSError, ValueError) as cause:  # ValueError: a zero byte in the name
        reason = getattr(cause, "strerror", None) or cause
        raise error(f"{path}: cannot be read ({reason}). Name {what}.") from cause


def read_archive(path: Path, data: bytes | None = None) -> dict[str, bytes]:
    """Return every member of a vector's zip file by name, uncompressed.

    Args:
        data: the file's content, if it has been read already.

    Raises:
        VectorFormatError: no such file, not a zip file, truncated, damaged (CRC), encrypted, a
            duplicate name, more than ``MAX_MEMBERS`` members or ``MAX_BYTES`` bytes unpacked, or packed
            more tightly than a vector can be.
    """
    data = read_file(path) if data is None else data
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            members = archive.infolist()
            _check_directory(path, members, len(data))
            return {member.filename: _read(archive, member) for member in members}
    except (
        zipfile.BadZipFile, zlib.error, struct.error, EOFError, RuntimeError, ValueError,
        OverflowError, OSError,
    ) as error:  # fmt: skip
        raise VectorFormatError(
            f"{path}: not a complete zip archive ({one_line(error)}). The file is truncated, damaged or "
            "of another kind; copy or download it again."
        ) from error


def _read(archive: zipfile.ZipFile, member: zipfile.ZipInfo) -> bytes:
    """Read as many bytes as the directory declares; ``archive.read`` would unpack all there are."""
    with archive.open(member) as file:
        data = file.read(member.file_size)
        file.read(1)  # reading the end checks the CRC
    return data


def _check_directory(path: Path, members: list[zipfile.ZipInfo], size: int) -> None:
    if len(members) > MAX_MEMBERS:
        raise VectorFormatError(
            f"{path}: {len(members)} members, but a vector file has at most {MAX_MEMBERS}."
        )
    names = [member.filename for member in members]
    if len(set(names)) != len(names):
        twice = sorted({name for name in names if names.count(name) > 1})
        raise VectorFormatError(f"{path}: {one_line(twice[0])} is in the archive more than once.")
    total = sum(member.file_size for member in members)
    most = min(MAX_BYTES, 4 * size + 2**18)  # floats hardly become smaller
    if total > most:
        raise VectorFormatError(
            f"{path}: would unpack to {total:,} bytes, but a vector file of {size:,} bytes has at most "
            f"{most:,}. It is a zip bomb or no vector; it was not unpacked."
        )
    plain = (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)
    if odd := [member.filename for member in members if member.compress_type not in plain]:
        raise VectorFormatError(
            f"{path}: {one_line(odd[0])} is neither stored nor deflated; save it again."
        )
