"""Writing so that an interrupted run leaves nothing half-done. No mlx."""

import contextlib
import glob
import hashlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import IO

from .errors import DiskError


@contextlib.contextmanager
def atomic_file(path: Path) -> Iterator[IO[bytes]]:
    """Open a temporary file beside ``path`` that takes its name when the block ends well."""
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
    """Make a scratch folder beside ``folder``, on the same file system; gone afterwards.

    What a killed run left there is swept away; that of a running process is not touched.
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
    """Give ``made``, inside a scratch folder, its final name; an older ``folder`` goes.

    Raises:
        DiskError: ``folder`` has appeared meanwhile, and ``replace`` is not set.
    """
    if not folder.exists() or (folder.is_dir() and not any(folder.iterdir())):
        made.rename(folder)
        return
    if not replace:
        raise DiskError(f"{folder}: was made by somebody else meanwhile; ours is thrown away.")
    old = made.parent / "old"  # inside the scratch folder: it goes with it
    folder.rename(old)
    try:
        made.rename(folder)
    except BaseException:
        old.rename(folder)
        raise


def check_parent(path: Path) -> None:
    """Raise ``DiskError`` unless the folder that ``path`` is to lie in is there."""
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
    except (ValueError, OverflowError, ProcessLookupError):
        return False
    except PermissionError:
        return True
    return True


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
