"""Convert a Hub repository, a Hugging Face folder or a GGUF file to an MLX folder, with mlx-lm."""

import contextlib
import json
import math
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import mlx.core as mx
import mlx_lm

from .._version import __version__
from ..errors import ConversionError, DenseSteerError, ModelError
from ..files import check_disk, file_sha256, full_disk, move_into_place, scratch_folder
from ..text import cause
from . import gguf as gguf_model
from .config import BAKED, RECORD, check_target, is_hub_id, local_path, origin, read_folder
from .hub import fetch_model
from .model import load_folder, mlx_lm_folder

DTYPES = ("bfloat16", "float16", "float32")
BITS = (4, 8)
GROUP_SIZES = (32, 64, 128)
OUT = Path("converted")

Progress = Callable[[str, int, int], None]  # what, done, total (0: unknown)


def _width(dtype: str) -> int:
    return 4 if dtype == "float32" else 2


@dataclass(frozen=True)
class _Target:
    """The precision of the converted model."""

    bits: int | None
    group_size: int
    dtype: str | None

    def __post_init__(self) -> None:
        if self.bits not in (None, *BITS):
            raise ConversionError(f"{self.bits} bits: expected 4, 8 or none.")
        if self.group_size not in GROUP_SIZES:
            raise ConversionError(f"group size {self.group_size}: expected one of {GROUP_SIZES}.")
        if self.dtype not in (None, *DTYPES):
            raise ConversionError(f"dtype {self.dtype!r}: expected one of {', '.join(DTYPES)}.")

    def folder(self, name: str, dtype: str) -> Path:
        return OUT / f"{name}-{f'{self.bits}bit' if self.bits else dtype}"

    def bytes(self, parameters: int, dtype: str) -> int:
        """Estimate the size of the converted weights; each group has a scale and a bias too."""
        plain = _width(dtype)
        per_weight = self.bits / 8 + 2 * plain / self.group_size if self.bits else plain
        return int(parameters * per_weight * 1.02)


@dataclass(frozen=True)
class _Source:
    """Where the weights come from. ``prepare`` returns a Hugging Face folder."""

    name: str  # for the new folder
    record: dict[str, str]  # for the new folder's densesteer.json
    dtype: str
    config: dict[str, object]
    parameters: int
    scratch_bytes: int
    prepare: Callable[[Path, Progress], Path]


def convert(
    source: str | Path,
    out: str | Path | None = None,
    *,
    bits: int | None = 4,
    group_size: int = 64,
    dtype: str | None = None,
    revision: str | None = None,
    force: bool = False,
    progress: Progress = lambda what, done, total: None,
) -> Path:
    """Convert a model for MLX and return the folder, by default in ``converted/``.

    The folder is written under a temporary name, loaded, checked with one forward pass, and
    renamed: an interrupted run leaves no incomplete model.

    Args:
        source: a Hub id, a Hugging Face folder, or a GGUF file (extra ``gguf``).
        out: the folder to write.
        bits: 4 or 8 quantises the matrices; ``None`` keeps ``dtype``.
        dtype: of what is not quantised; by default the source's own, bfloat16 for GGUF.
        revision: branch, tag or commit of a Hub repository.
        force: replace ``out`` if it exists, once the new folder is checked.

    Raises:
        ConversionError: ``out`` exists, an option does not fit the model, or the result fails its
            check.
        DiskError: too little room on the disk.
        UnsupportedModelError: it cannot be steered.
        ModelError, HubError: the source cannot be read.
    """
    target = _Target(bits, group_size, dtype)
    out = None if out is None else Path(out).expanduser()
    if local_path(source).exists() and revision is not None:
        raise ConversionError(f"{source}: is local, so it has no revision {revision!r}.")
    if out is not None or bits is not None or dtype is not None:  # before a download
        check_target(out or target.folder(_name(source), str(dtype)), source, force)
    found = _open_source(source, target, revision, progress)
    folder = out if out is not None else target.folder(found.name, found.dtype)
    check_target(folder, source, force)
    _check_groups(found, target)
    need = target.bytes(found.parameters, found.dtype) + found.scratch_bytes
    check_disk(folder.parent, need, "the conversion")
    with scratch_folder(folder) as work, full_disk(folder):
        hf_folder = found.prepare(work / "hf", progress)
        progress(f"converting to {folder.name}", 0, 0)
        _run_mlx_lm(found.name, hf_folder, work / "mlx", target, found.dtype, folder)
        progress("checking with one forward pass", 0, 0)
        _finish(work / "mlx", found, target)
        move_into_place(work / "mlx", folder, replace=force)
    return folder


def _name(source: str | Path) -> str:
    path = Path(source).expanduser()
    return path.stem if path.is_file() else path.resolve().name if path.is_dir() else path.name


def _open_source(
    source: str | Path, target: _Target, revision: str | None, progress: Progress
) -> _Source:
    path = Path(source).expanduser()
    if path.is_file():
        return _gguf_source(path, target, progress)
    if path.is_dir():
        if any(path.glob("*.gguf")) and not (path / "config.json").exists():
            files = ", ".join(sorted(p.name for p in path.glob("*.gguf")))
            raise ConversionError(f"{path}: is a folder of GGUF files; name one of {files}.")
        return _folder_source(path, _name(path), {"source": origin(path)}, target)
    repo = str(source)
    if not is_hub_id(repo):
        raise ConversionError(
            f"{repo}: no such file or folder. Expected a Hub id (Qwen/Qwen2.5-1.5B-Instruct), a "
            "Hugging Face folder, or a GGUF file."
        )
    progress(f"downloading {repo}", 0, 0)
    folder = fetch_model(repo, revision=revision)
    return _folder_source(folder, path.name, {"source": repo, "revision": folder.name}, target)


def _folder_source(folder: Path, name: str, record: dict[str, str], target: _Target) -> _Source:
    config, tensors = read_folder(folder)
    if BAKED in config:
        raise ConversionError(
            f"{folder}: has its steering baked in. Convert the model that it was made from, and bake that."
        )
    if "quantization" in config or "quantization_config" in config:
        raise ConversionError(
            f"{folder}: is quantised already. Convert from the original weights "
            "(quantising twice would lose more), or use it as it is."
        )
    parameters = sum(math.prod(tensor.shape) for tensor in tensors.values())
    dtype = target.dtype or config.get("torch_dtype") or config.get("dtype") or "bfloat16"
    return _Source(
        name=name,
        record=record,
        dtype=str(dtype),
        config=config,
        parameters=parameters,
        scratch_bytes=0,
        prepare=lambda work, progress: folder,
    )


def _gguf_source(path: Path, target: _Target, progress: Progress) -> _Source:
    progress(f"reading {path.name}", 0, 0)
    reader = gguf_model.open_gguf(path)
    dtype = target.dtype or "bfloat16"
    parameters = sum(int(tensor.n_elements) for tensor in reader.tensors)
    with gguf_model.damage(path):
        config = gguf_model.read_config(reader, dtype, f"{path}: its metadata")

    def prepare(work: Path, progress: Progress) -> Path:
        label = f"dequantising {path.name}"
        with gguf_model.damage(path):
            gguf_model.write_hf_folder(
                reader, work, config, lambda done, n: progress(label, done, n)
            )
        return work

    return _Source(
        name=_name(path),
        record={"source": path.stem, "gguf_sha256": file_sha256(path)},
        dtype=dtype,
        config=config,
        parameters=parameters,
        scratch_bytes=parameters * _width(dtype),
        prepare=prepare,
    )


def _check_groups(source: _Source, target: _Target) -> None:
    """Raise if the groups do not fit: mlx-lm would silently leave such a matrix unquantised."""
    if not target.bits:
        return
    for key in ("hidden_size", "intermediate_size", "moe_intermediate_size"):
        width = source.config.get(key)
        if isinstance(width, int) and width % target.group_size:
            raise ConversionError(
                f"{source.name}: group size {target.group_size} does not divide its {key} {width}. "
                f"Choose another group size ({', '.join(map(str, GROUP_SIZES))}), or no bits."
            )


def _run_mlx_lm(
    name: str, source: Path, out: Path, target: _Target, dtype: str, folder: Path
) -> None:
    try:
        with (
            full_disk(folder),
            mlx_lm_folder(source) as place,
            contextlib.redirect_stdout(sys.stderr),  # standard output is for results
        ):
            mlx_lm.convert(
                str(place),
                str(out),
                quantize=target.bits is not None,
                q_bits=target.bits,
                q_group_size=target.group_size if target.bits else None,
                dtype=dtype,
            )
    except DenseSteerError:
        raise
    except Exception as error:  # of mlx-lm, transformers or mlx
        raise ConversionError(f"{name}: mlx-lm cannot convert it ({cause(error)}).") from error


def _finish(out: Path, source: _Source, target: _Target) -> None:
    """Load the new folder, run it once, and write its record."""
    _set_config(out / "config.json", source)
    try:
        model = load_folder(out, name=source.name)
        tokens = model.tokenizer.encode("What is 12 + 30?")
        finite = mx.isfinite(model.network(mx.array([tokens]))).all().item()
    except ModelError as error:
        raise ConversionError(
            f"{source.name}: the converted model does not load: {str(error).replace(f'{out}: ', '')}"
        ) from error
    if not finite:
        raise ConversionError(
            f"{source.name}: the converted model gives logits that are not finite. Try the dtype "
            "bfloat16 or float32."
        )
    record = {
        **source.record,
        "bits": target.bits,
        "group_size": target.group_size if target.bits else None,
        "dtype": source.dtype,
        "fingerprint": model.fingerprint,
        "created_by": f"mlx-densesteer {__version__}, mlx-lm {mlx_lm.__version__}",
    }
    (out / RECORD).write_text(json.dumps(record, indent=1, ensure_ascii=False) + "\n", "utf-8")


def _set_config(file: Path, source: _Source) -> None:
    """Correct what mlx-lm writes: the dtype, and a rope that it was not given (``mlx_lm_folder``)."""
    config = json.loads(file.read_text("utf-8"))
    config.pop("dtype", None)
    config["torch_dtype"] = source.dtype
    if "rope_scaling" in source.config:
        config["rope_scaling"] = source.config["rope_scaling"]
    file.write_text(json.dumps(config, indent=4, sort_keys=True), "utf-8")
