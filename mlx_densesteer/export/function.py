"""A steered model as an MLX function file (docs/export-function.md): for C++ and Swift, without Python.

    f()                                      metadata, empty cache
    f(tokens, position, strength, *cache)    logits, cache

Not covered: batches, several vectors that each have a strength, sampling.
"""

import contextlib
import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten
from mlx_lm.tokenizer_utils import TokenizerWrapper

from .._version import __version__
from ..errors import ExportError
from ..files import check_disk, check_parent, move_into_place, scratch_folder
from ..model.block import deltas, make_cache, patch
from ..model.dose import mean_norms
from ..model.model import dtype_name, inspect
from ..steering.steering import LARGE_DOSE, Steering
from .step import empty_cache, next_logits, steered_step

FORMAT = "mlx-densesteer function"
FORMAT_VERSION = 1
SUFFIX = ".mlxfn"
CAPACITY = 2048
CHUNKS = (128, 32, 8)  # lengths of prompt chunks; 1 comes with them

# Largest difference of logits that is still rounding, over the largest logit: the file attends
# over the whole cache, so sums are in another order (docs/export-function.md has what was seen).
TOLERANCES = {mx.float32: 1e-3, mx.float16: 1e-2, mx.bfloat16: 5e-2}

_BLOCK_BYTES = 2**14  # of one decoder block in one trace: 11.5 to 14.4 kB were seen

Progress = Callable[[str], None]


def _silent(what: str) -> None:
    return None


@dataclass(frozen=True)
class FunctionFile:
    """A function file that was written and checked against run-time steering.

    ``largest_difference`` is that of a logit from run-time steering, over ``strengths`` and
    every chunk length; ``largest_logit`` is what it is to be compared with.
    """

    path: Path
    metadata: Mapping[str, object]
    strengths: tuple[float, ...]
    largest_difference: float
    largest_logit: float


def export_function(
    model: nn.Module,
    tokenizer: TokenizerWrapper,
    steering: Steering,
    path: str | Path,
    *,
    name: str | Path = "model",
    norms: dict[int, float] | None = None,
    capacity: int | None = None,
    chunks: Iterable[int] | None = None,
    force: bool = False,
    progress: Progress = _silent,
) -> FunctionFile:
    """Write the steered decode step as ``path``, a ``.mlxfn`` file, and check what was written.

    The strength is an input of the function: that of ``steering``, and its positions, are only
    what the file names as its default. The file is written under a temporary name, imported
    again and compared with run-time steering before it gets its name. The model's blocks are
    patched if they are not yet (``patch.patch``); nothing else of it changes.

    Args:
        name: the model's folder or Hub id, for the metadata.
        norms: the residual stream's mean norm at each steered layer, for the metadata; by default
            those of ``dose.mean_norms``.
        capacity: tokens that the KV cache holds, prompt and answer together; by default 2048,
            or the model's context if that is smaller.
        chunks: lengths in which a prompt can be read, besides 1; by default 128, 32 and 8.
        force: replace ``path`` if it exists.

    Raises:
        ExportError: a wrong path, capacity or chunk length, or the check fails.
        VectorMismatchError, SteeringError: the vector does not fit, or its strength overflows.
        DiskError: no such folder, or not enough room.
    """
    path = Path(path).expanduser()
    check_path(path, force)
    deltas(model, steering)  # refuses what does not fit
    if capacity is None:
        capacity = min(CAPACITY, model.args.max_position_embeddings)
    lengths = _lengths(model, capacity, chunks)
    patch(model)
    mx.eval(model.parameters())  # what is not computed yet would be traced
    if norms is None:
        norms = mean_norms(model, tokenizer, steering.vector, steering.layers)
    metadata = _metadata(model, tokenizer, steering, name, norms, capacity, lengths)
    size = file_size(model, len(lengths))
    check_disk(path.parent, size, "the function file")
    with scratch_folder(path) as work:
        made = work / path.name
        progress(f"writing {path.name}, about {size / 1e6:.0f} MB")
        with _mlx_errors(path):
            _write(made, model, steering, metadata)
        progress("checking it against run-time steering")
        with _mlx_errors(path):
            found = _check(made, model, steering, metadata)
        move_into_place(made, path, replace=force)
    return replace(found, path=path)


def file_size(model: nn.Module, traces: int) -> int:
    """Return the bytes of a file with that many chunk lengths, a little above what it will be."""
    weights = sum(array.nbytes for _, array in tree_flatten(model.parameters()))
    args = model.args
    return weights + traces * (args.num_hidden_layers + 1) * (_BLOCK_BYTES + 4 * args.hidden_size)


def check_path(path: Path, force: bool) -> None:
    """Raise ``ExportError`` or ``DiskError`` unless a function file may be written there."""
    try:
        str(path.absolute()).encode()
    except UnicodeEncodeError as error:
        raise ExportError(
            f"{str(path)!a}: the name is not UTF-8, which mlx needs. Choose another name."
        ) from error
    if path.suffix != SUFFIX or path.is_dir():
        raise ExportError(f"{path}: expected the name of a file that ends in {SUFFIX}.")
    if path.exists() and not force:
        raise ExportError(
            f"{path}: exists already. Choose another name (-o), or replace it (--force; in Python "
            "force=True)."
        )
    check_parent(path)


def _lengths(model: nn.Module, capacity: int, chunks: Iterable[int] | None) -> tuple[int, ...]:
    """Return the chunk lengths to trace, longest first."""
    context = model.args.max_position_embeddings
    if not 2 <= capacity <= context:
        raise ExportError(
            f"capacity {capacity}: expected 2 to {context} tokens, which is the model's context."
        )
    if chunks is None:
        chunks = [count for count in CHUNKS if count <= capacity]
    lengths = sorted({1, *chunks}, reverse=True)
    if lengths[0] > capacity or lengths[-1] < 1:
        raise ExportError(
            f"chunk lengths {', '.join(map(str, lengths))}: expected 1 to {capacity}, the capacity."
        )
    return tuple(lengths)


def _metadata(
    model: nn.Module,
    tokenizer: TokenizerWrapper,
    steering: Steering,
    name: str | Path,
    norms: dict[int, float],
    capacity: int,
    lengths: tuple[int, ...],
) -> dict[str, object]:
    """Return what a program needs to know: flat, of numbers, texts and lists of numbers."""
    info = inspect(model, name)
    cache = empty_cache(model, capacity)
    dtype = cache[0].dtype
    largest = max(abs(steering.vector.layers[layer]).max() for layer in steering.layers)
    doses = replace(steering, strength=1.0).relative_dose(norms)
    float32, limit = (float(mx.finfo(kind).max) for kind in (mx.float32, dtype))
    return {
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        "model": info.name,
        "fingerprint": info.fingerprint,
        "quantization": info.quantization,
        "vector": steering.vector.name,
        "vector_sha256": steering.vector.sha256(),
        "layers": list(steering.layers),
        "strength": steering.strength,
        "largest_strength": min(float32, limit / float(largest)) if largest else float32,
        "dose_per_strength": sum(doses.values()),
        "large_dose": LARGE_DOSE,
        "positions": steering.positions,
        "vocab_size": model.args.vocab_size,
        "eos": sorted(int(token) for token in tokenizer.eos_token_ids),
        "capacity": capacity,
        "chunks": list(lengths),
        "layer_count": info.layer_count,
        "cache_shape": list(cache[0].shape),
        "cache_dtype": dtype_name(dtype),
        "cache_bytes": sum(array.nbytes for array in cache),
        "device": mx.default_device().type.name,
        "created_by": f"mlx-densesteer {__version__}, mlx {mx.__version__}",
    }


def _write(path: Path, model: nn.Module, steering: Steering, metadata: dict[str, object]) -> None:
    """Trace the step once for each chunk length; the traces share the weights."""
    capacity = metadata["capacity"]
    vectors = {k: mx.array(steering.vector.layers[k])[None, None] for k in steering.layers}
    mx.eval(list(vectors.values()))
    step = steered_step(model, vectors, capacity)
    document = json.dumps(metadata, ensure_ascii=False, allow_nan=False)

    def function(*inputs: mx.array) -> tuple[mx.array, ...]:
        if inputs:
            return step(*inputs)
        # mlx's front ends for C and Swift have no call that reads the metadata
        return mx.array(list(document.encode()), mx.uint8), *empty_cache(model, capacity)

    cache = empty_cache(model, capacity)
    with mx.exporter(str(path), function, metadata=document) as exporter:
        exporter()
        for count in metadata["chunks"]:
            exporter(mx.zeros((1, count), mx.int32), mx.array(0), mx.array(0.0), *cache)


def _check(
    path: Path, model: nn.Module, steering: Steering, metadata: dict[str, object]
) -> FunctionFile:
    """Read tokens through the file and through the model; raise unless the logits agree."""
    function = mx.import_function(str(path))
    if json.loads(bytes(function()[0])) != metadata:
        raise ExportError(f"{path.name}: came back with other metadata than was written.")
    # what all layers add must not overflow together either
    room = metadata["largest_strength"] / (2 * len(steering.layers))
    strength = steering.strength or min(1.0, room)
    differences, sizes = [], []
    for one in (strength, -strength, 0.0):
        # every trace once; then the short ones will do
        counts = [*metadata["chunks"][-2 if differences else 0 :], 1]
        setting = replace(steering, strength=one, positions="all")
        for ours, theirs in _side_by_side(function, model, setting, counts, metadata):
            differences.append(float(mx.abs(ours - theirs).max()))
            sizes.append(float(mx.abs(theirs).max()))
    largest, size = float(np.max(differences)), float(np.max(sizes))  # NaN if there is one
    tolerance = TOLERANCES[model.model.norm.weight.dtype]
    if not largest <= tolerance * size:
        raise ExportError(
            f"{path.name}: its logits differ from run-time steering by {largest:.2g}, at logits up "
            f"to {size:.3g}; expected {tolerance * size:.2g} at most. Nothing was written. Please "
            "report it, with the model, the vector and `densesteer doctor`."
        )
    return FunctionFile(path, metadata, (strength, -strength, 0.0), largest, size)


def _side_by_side(
    function: Callable[..., tuple[mx.array, ...]],
    model: nn.Module,
    steering: Steering,
    counts: list[int],
    metadata: dict[str, object],
) -> Iterator[tuple[mx.array, mx.array]]:
    """Yield float32 logits of the file and of the model after each chunk; new caches where needed."""
    position = capacity = metadata["capacity"]
    strength = mx.array(steering.strength, mx.float32)
    cache, reference = [], []
    for count in counts:
        if position + count > capacity:
            _, *cache = function()
            position, reference = 0, make_cache(model, steering)
        tokens = mx.arange(position, position + count, dtype=mx.int32)[None]
        tokens = (tokens * 7919 + 13) % metadata["vocab_size"]
        logits, *cache = function(tokens, mx.array(position), strength, *cache)
        expected = next_logits(model, tokens, reference)
        mx.eval(logits, expected, cache)
        position += count
        yield logits.astype(mx.float32), expected.astype(mx.float32)


@contextlib.contextmanager
def _mlx_errors(path: Path) -> Iterator[None]:
    """Disk full, or a graph that this mlx cannot put into a file."""
    try:
        yield
    except (RuntimeError, ValueError) as error:
        if "There is no Stream" in str(error):
            raise ExportError(
                f"{path}: mlx runs a function file only on the thread of the process that used mlx first. "
                "Call export_function on that thread."
            ) from error
        raise ExportError(f"{path}: mlx cannot write or read it back ({error}).") from error
