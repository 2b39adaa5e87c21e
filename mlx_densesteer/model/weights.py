"""Find a model folder's weight files, and read what tensors they hold. No mlx."""

import json
import os
import re
from dataclasses import dataclass
from pathlib import Path

from ..errors import ModelError
from ..files import parse_object

INDEX = "model.safetensors.index.json"
# model.safetensors, model-00001-of-00002.safetensors, model-00000.safetensors; no model_backup.safetensors.
_NAME = re.compile(r"model(?:\.safetensors)?(?:-\d+(?:-of-0*(\d+))?)?\.safetensors")
_AGAIN = "Copy or download it again"


@dataclass(frozen=True)
class Tensor:
    """Where a tensor lies: bytes ``start`` to ``stop`` of ``file``."""

    file: Path
    dtype: str  # as safetensors spells it: F32, BF16, U32
    shape: tuple[int, ...]
    start: int
    stop: int


def weight_files(folder: Path) -> list[Path]:
    """Return the weight files of a model folder; raises as ``read_tensors`` does."""
    return sorted({tensor.file for tensor in read_tensors(folder).values()})


def read_tensors(folder: Path) -> dict[str, Tensor]:
    """Return the tensors of a model folder by name, from the headers of its weight files.

    The weight files are those that the index names. Without an index they are ``model.safetensors``
    and the numbered shards; other files, such as ``model_backup.safetensors``, are no part of the
    model.

    Raises:
        ModelError: no weights; a file or a tensor of the index is missing; a file is damaged; two
            files hold a tensor of one name.
    """
    index = _read_index(folder)
    names = _find_files(folder) if index is None else sorted(set(index.values()))
    found: dict[str, Tensor] = {}
    for file in (folder / name for name in names):
        for name, tensor in _read_header(file).items():
            if name in found:
                raise ModelError(
                    f"{folder}: {found[name].file.name} and {file.name} both hold {name[:80]}, so one "
                    "of them is left over from another model. Remove it."
                )
            found[name] = tensor
    if index is None:
        _check_complete(folder, names)
    elif missing := sorted(index.keys() - found.keys()):
        raise ModelError(
            f"{folder}: {index[missing[0]]} lacks {missing[0][:80]}, which {INDEX} expects there. {_AGAIN}."
        )
    return found


def same_bytes(one: Tensor, other: Tensor) -> bool:
    """Tell whether two tensors are equal bit for bit."""
    if (one.dtype, one.shape) != (other.dtype, other.shape):
        return False
    with one.file.open("rb") as a, other.file.open("rb") as b:
        a.seek(one.start)
        b.seek(other.start)
        left = one.stop - one.start
        while left > 0:
            size = min(left, 2**24)
            if a.read(size) != b.read(size):
                return False
            left -= size
    return True


def _read_index(folder: Path) -> dict[str, str] | None:
    """Return the index: tensor name to file name; ``None`` without one."""
    if not (folder / INDEX).is_file():
        return None
    places = parse_index((folder / INDEX).read_bytes(), str(folder))
    for name in places.values():
        if not os.path.isfile(folder / name):  # noqa: PTH113  (no error for a name that is too long)
            raise ModelError(
                f"{folder}: lacks {name[:80]}, which {INDEX} names. {_AGAIN}, or remove the index if it is "
                "another model's."
            )
    return places


def parse_index(content: bytes, model: str) -> dict[str, str]:
    """Return what an index says: tensor name to file name.

    Raises:
        ModelError: it is no index, or names other than safetensors files of its own folder.
    """
    where = f"{model}: {INDEX}"
    places = parse_object(content, where, error=ModelError, remedy=f"{_AGAIN}.").get("weight_map")
    if not isinstance(places, dict) or not places:
        raise ModelError(f"{where} has no weight_map of tensors and files. {_AGAIN}.")
    for name in places.values():
        if not isinstance(name, str) or "/" in name or not name.endswith(".safetensors"):
            raise ModelError(
                f"{where} names {str(name)[:80]!r}, expected a safetensors file of the folder. {_AGAIN}."
            )
    return places


def _find_files(folder: Path) -> list[str]:
    names = sorted(file.name for file in folder.iterdir() if _NAME.fullmatch(file.name))
    if names:
        return names
    others = sorted(file.name for file in folder.iterdir())
    remedy = "Get the model's safetensors version."
    found = next((name for name in others if name.endswith(".safetensors")), None)
    if found:
        remedy = f"Rename it, or add its index ({INDEX})."
    else:
        found = next((name for name in others if name.endswith((".bin", ".pt", ".pth"))), "none")
    raise ModelError(
        f"{folder}: no model.safetensors or numbered shards (model-00001-of-00002.safetensors); found "
        f"{found[:80]}. {remedy}"
    )


def _check_complete(folder: Path, names: list[str]) -> None:
    """Raise ``ModelError`` unless files that are called N of M are M."""
    totals = [match[1] for name in names if (match := _NAME.fullmatch(name)) and match[1]]
    for total in sorted(set(totals)):
        if totals.count(total) != int(total):
            raise ModelError(
                f"{folder}: has {totals.count(total)} of {total} shards (model-*-of-*.safetensors). "
                "Copy or download the others."
            )


def _read_header(file: Path) -> dict[str, Tensor]:
    from safetensors import safe_open

    if not file.is_file():
        raise ModelError(f"{file}: is no file, or a link to none. {_AGAIN}.")
    try:
        with file.open("rb") as opened:
            if opened.read(11) == b"version htt":
                raise ModelError(f"{file}: is a Git LFS pointer, not the file. Run `git lfs pull`.")
            with safe_open(file, framework="numpy"):  # checks the header, and the file's length
                opened.seek(0)
            length = int.from_bytes(opened.read(8), "little")
            header = json.loads(opened.read(length))
    except ModelError:
        raise
    except Exception as error:  # safetensors has an error of its own, and raises others too
        raise ModelError(f"{file}: is damaged or incomplete ({error}). {_AGAIN}.") from error
    header.pop("__metadata__", None)
    return {
        name: Tensor(
            file,
            entry["dtype"],
            tuple(entry["shape"]),
            *(8 + length + o for o in entry["data_offsets"]),
        )
        for name, entry in header.items()
    }
