"""A steered model as an MLX function file (docs/export-function.md): for C++, without Python.

    f()                                      metadata, empty cache
    f(tokens, position, strength, *cache)    logits, cache

The strength is an array and the KV cache is input and output, so mlx can trace the decoding step
into a file. The blocks are those of ``model.block``, steered by a cache whose shift is made from the
traced strength.

Not covered: more than one sequence, several vectors with a strength each, sampling.
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

from .._version import __version__
from ..errors import ExportError
from ..files import atomic_path, check_disk, file_to_replace, full_disk
from ..model.block import additions, make_cache
from ..model.cache import Shift
from ..model.families import cache_shapes, head_of, stream_dtype
from ..model.model import Model, dtype_name, takes_model
from ..steering.places import EVERYWHERE, span_of
from ..steering.steering import LARGE_DOSE, Steering
from .closeness import change, float32_share

FORMAT = "mlx-densesteer function"
FORMAT_VERSION = 1
SUFFIX = ".mlxfn"
CAPACITY = 2048
CHUNKS = (128, 32, 8)  # lengths of prompt chunks; 1 is always there

# Largest difference of logits that is rounding, as a share of the largest logit. The file attends
# over the whole cache, so sums are in another order; docs/export-function.md has measurements.
TOLERANCES = {mx.float32: 1e-4, mx.float16: 1e-2, mx.bfloat16: 5e-2}

_BLOCK_BYTES = 2**14  # of one decoder block in one trace; 11.5 to 14.4 kB were measured

Progress = Callable[[str], None]
Step = Callable[..., tuple[mx.array, ...]]


@dataclass(frozen=True)
class FunctionFile:
    """A function file that was written and checked against run-time steering.

    ``largest_difference`` is the largest difference of a logit from run-time steering, over
    ``strengths`` and every chunk length; ``largest_logit`` is the largest logit.
    """

    path: Path
    metadata: Mapping[str, object]
    strengths: tuple[float, ...]
    largest_difference: float
    largest_logit: float


@takes_model
def export_function(
    model: Model,
    steering: Steering,
    path: str | Path,
    *,
    capacity: int | None = None,
    chunks: Iterable[int] | None = None,
    force: bool = False,
    progress: Progress = lambda what: None,
) -> FunctionFile:
    """Write the steered decoding step as ``path``, a ``.mlxfn`` file, and check it.

    The strength is an input of the function. The file names the strength and positions of
    ``steering`` as its defaults. It is written under a temporary name, imported again and compared
    with run-time steering before it gets its name.

    Args:
        capacity: tokens that the KV cache holds, prompt and answer together; by default 2048,
            or the model's context if that is smaller.
        chunks: lengths in which a prompt can be read, besides 1; by default 128, 32 and 8.
        force: replace ``path`` if it exists.

    Raises:
        ExportError: a wrong path, capacity or chunk length, positions ``"steps"``, ``"think"`` or
            ``"answer"``, a budget, or the check fails.
        VectorMismatchError, SteeringError: the vector does not fit, or its strength overflows.
        DiskError: no such folder, or the disk is full.
    """
    path = Path(path).expanduser()
    check_path(path, force)
    network = model.network
    if span_of(steering.positions, 1).mark or steering.budget or not steering.calls:
        more = " and a thinking budget" * bool(steering.budget) + " and a gate at tool calls" * (
            not steering.calls
        )
        raise ExportError(
            f"positions {steering.positions!r}{more} cannot be "
            "exported: the file has no tokenizer, and a program would have to tell it where they are. "
            "Expected positions all, prompt, generated or first:N."
        )
    additions(network, steering)  # refuses what does not fit
    capacity = _capacity(model, capacity)
    lengths = _lengths(capacity, chunks)
    mx.eval(network.parameters())  # lazy arrays would be traced
    metadata = _metadata(model, steering, capacity, lengths)
    size = file_size(network, len(lengths))
    check_disk(path.parent, size, "the function file")
    with atomic_path(path, replace=force) as made, _mlx_errors(path), full_disk(path):
        progress(f"writing {path.name}, about {size / 1e6:.0f} MB")
        _write(made, network, steering, metadata)
        progress("checking it against run-time steering")
        found = _check(made, network, steering, metadata)
    return replace(found, path=path)


def file_size(network: nn.Module, traces: int) -> int:
    """Return the size of a file with that many chunk lengths in bytes, estimated from above."""
    weights = sum(array.nbytes for _, array in tree_flatten(network.parameters()))
    args = network.args
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
        raise ExportError(f"{path}: exists already. Choose another name, or replace it (force).")
    file_to_replace(path)


def _capacity(model: Model, wanted: int | None) -> int:
    """Return the tokens of the KV cache; refuse more than the model's context."""
    room = model.room(0, CAPACITY if wanted is None else wanted)
    if wanted is not None and not 2 <= wanted == room:
        raise ExportError(
            f"capacity {wanted}: expected 2 to {model.context} tokens, which is the model's context."
        )
    return room


def _lengths(capacity: int, chunks: Iterable[int] | None) -> tuple[int, ...]:
    """Return the chunk lengths to trace, longest first."""
    if chunks is None:
        chunks = [count for count in CHUNKS if count <= capacity]
    lengths = sorted({1, *chunks}, reverse=True)
    if lengths[0] > capacity or lengths[-1] < 1:
        raise ExportError(
            f"chunk lengths {', '.join(map(str, lengths))}: expected 1 to {capacity}, the capacity."
        )
    return tuple(lengths)


def _metadata(
    model: Model, steering: Steering, capacity: int, lengths: tuple[int, ...]
) -> dict[str, object]:
    """Return what a program needs to know: numbers, texts and lists of numbers."""
    info = model.info
    cache = empty_cache(model.network, capacity)
    dtype = cache[0].dtype
    largest = max(abs(steering.vector.layers[layer]).max() for layer in steering.layers)
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
        "dose": model.dose(steering),
        "dose_per_strength": model.dose(replace(steering, strength=1.0)),
        "large_dose": LARGE_DOSE,
        "largest_strength": min(float32, limit / float(largest)) if largest else float32,
        "positions": steering.positions,
        "vocab_size": model.vocabulary,
        "eos": sorted({*model.tokenizer.eos_token_ids, model.end_of_turn} - {None}),
        "capacity": capacity,
        "chunks": list(lengths),
        "layer_count": info.layer_count,
        "cache_shape": list(cache[0].shape),
        "cache_dtype": dtype_name(dtype),
        "cache_bytes": sum(array.nbytes for array in cache),
        "device": mx.default_device().type.name,
        "created_by": f"mlx-densesteer {__version__}, mlx {mx.__version__}",
    }


class FixedCache:
    """Keys and values of one layer in arrays of a fixed length.

    mlx-lm's ``KVCache`` counts its tokens in a Python number, which cannot be traced. Here the
    write position is an array, and the mask hides what is not written yet.

    Args:
        keys, values: ``(1, kv_heads, capacity, head_dim)``.
        position: where the next token goes, int32 ``()``.
        shift: what the layer adds to the residual stream, or ``None``.
    """

    expecting = False  # SteeredBlock sets it

    def __init__(self, keys: mx.array, values: mx.array, position: mx.array, shift: Shift | None):
        self.keys, self.values = keys, values
        self.offset, self.shift = position, shift

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> tuple[mx.array, mx.array]:
        start = self.offset.reshape(1)
        self.keys = mx.slice_update(self.keys, keys, start, axes=(2,))
        self.values = mx.slice_update(self.values, values, start, axes=(2,))
        return self.keys, self.values

    def make_mask(self, count: int, window_size: int | None = None, **_: object) -> mx.array:
        """Return which of the ``capacity`` positions each of ``count`` new tokens sees."""
        at, new = mx.arange(self.keys.shape[2]), self.offset + mx.arange(count)[:, None]
        seen = at <= new
        return seen if window_size is None else seen & (new < at + window_size)


def steered_step(network: nn.Module, vectors: Mapping[int, mx.array], capacity: int) -> Step:
    """Return ``step(tokens, position, strength, *cache) -> (logits, *cache)``.

    ``tokens`` is int32 ``(1, count)``, ``position`` int32 ``()``, ``strength`` float32 ``()``.
    ``cache`` is keys and values of layer 0, of layer 1, ... (see ``FixedCache``). Without room for
    the tokens at ``position`` all logits are NaN, and nothing is written outside the cache.

    Args:
        network: its blocks are patched (``model.block.patch``).
        vectors: float32 ``(1, 1, hidden)`` for each steered layer.
    """

    def step(
        tokens: mx.array, position: mx.array, strength: mx.array, *cache: mx.array
    ) -> tuple[mx.array, ...]:
        at = mx.clip(position, 0, capacity - tokens.shape[1])
        caches = []
        for layer, (keys, values) in enumerate(zip(cache[::2], cache[1::2], strict=True)):
            shift = None
            if layer in vectors:
                shift = Shift.of(strength * vectors[layer], [EVERYWHERE])
            caches.append(FixedCache(keys, values, at, shift))
        logits = _next_logits(network, tokens, caches)
        logits = mx.where(at == position, logits, mx.array(float("nan"), logits.dtype))
        return logits, *(array for one in caches for array in (one.keys, one.values))

    return step


def empty_cache(network: nn.Module, capacity: int) -> list[mx.array]:
    """Return zeros for keys and values of every layer, in the residual stream's dtype."""
    dtype = stream_dtype(network)
    shapes = (shape for layer in cache_shapes(network) for shape in layer)
    return [mx.zeros((1, heads, capacity, width), dtype) for _, heads, _, width in shapes]


def _next_logits(network: nn.Module, tokens: mx.array, caches: list) -> mx.array:
    """Read ``tokens``, ``(1, count)``, and return the logits after the last, ``(1, vocabulary)``."""
    return head_of(network)(network.model(tokens, caches)[:, -1:])[:, 0]


def _write(path: Path, network: nn.Module, steering: Steering, metadata: dict[str, object]) -> None:
    """Trace the step once for each chunk length; the traces share the weights."""
    capacity = metadata["capacity"]
    vectors = {k: mx.array(steering.vector.layers[k])[None, None] for k in steering.layers}
    mx.eval(list(vectors.values()))
    step = steered_step(network, vectors, capacity)
    document = json.dumps(metadata, ensure_ascii=False, allow_nan=False)

    def function(*inputs: mx.array) -> tuple[mx.array, ...]:
        if inputs:
            return step(*inputs)
        # mlx's interfaces for C and Swift cannot read the metadata of a file
        return mx.array(list(document.encode()), mx.uint8), *empty_cache(network, capacity)

    cache = empty_cache(network, capacity)
    with mx.exporter(str(path), function, metadata=document) as exporter:
        exporter()
        for count in metadata["chunks"]:
            exporter(mx.zeros((1, count), mx.int32), mx.array(0), mx.array(0.0), *cache)


def _check(
    path: Path, network: nn.Module, steering: Steering, metadata: dict[str, object]
) -> FunctionFile:
    """Read tokens through the file and through the network; raise unless the logits agree."""
    function = mx.import_function(str(path))
    if json.loads(bytes(function()[0])) != metadata:
        raise ExportError(f"{path.name}: came back with other metadata than was written.")
    # the sum over all layers must not overflow either
    safe = metadata["largest_strength"] / (2 * len(steering.layers))
    strength = steering.strength or min(1.0, safe)
    logits: dict[float, tuple[mx.array, mx.array]] = {}  # of the file, and of the network
    for one in (strength, -strength, 0.0):
        # every chunk length at the first strength, the short ones at the others
        counts = [*metadata["chunks"][-2 if logits else 0 :], 1]
        setting = replace(steering, strength=one, positions="all")
        pairs = _side_by_side(function, network, setting, counts, metadata)
        logits[one] = tuple(map(mx.concatenate, zip(*pairs, strict=True)))
    size = float(np.max([mx.abs(b).max().item() for _, b in logits.values()]))  # NaN if any is NaN
    largest = float(np.max([mx.abs(a - b).max().item() for a, b in logits.values()]))
    dtype = stream_dtype(network)
    limit = max(TOLERANCES[dtype], float32_share()) * size
    moved = change(*(a - b for a, b in zip(logits[-strength], logits[0.0], strict=True)))
    if not (largest <= limit and (dtype != mx.float32 or moved.is_right())):
        raise ExportError(
            f"{path.name}: its logits differ from run-time steering by {largest:.2g}, at logits up to "
            f"{size:.3g}, and move {moved.length:.3f} times as far; expected {limit:.2g} at most and, in float32, "
            f"{1 - moved.room:.3f} to {1 + moved.room:.3f} times. Nothing was written. Please report it, "
            "with the model, the vector and `densesteer doctor`."
        )
    return FunctionFile(path, metadata, (strength, -strength, 0.0), largest, size)


def _side_by_side(
    function: Step,
    network: nn.Module,
    steering: Steering,
    counts: list[int],
    metadata: dict[str, object],
) -> Iterator[tuple[mx.array, mx.array]]:
    """Yield float32 logits of the file and of the network after each chunk; start anew if full."""
    position = capacity = metadata["capacity"]
    strength = mx.array(steering.strength, mx.float32)
    cache, caches = [], []
    for count in counts:
        if position + count > capacity:
            _, *cache = function()
            position, caches = 0, make_cache(network, steering)
        tokens = mx.arange(position, position + count, dtype=mx.int32)[None]
        tokens = (tokens * 7919 + 13) % metadata["vocab_size"]
        logits, *cache = function(tokens, mx.array(position), strength, *cache)
        expected = _next_logits(network, tokens, caches)
        mx.eval(logits, expected, cache)
        position += count
        yield logits.astype(mx.float32), expected.astype(mx.float32)


@contextlib.contextmanager
def _mlx_errors(path: Path) -> Iterator[None]:
    """Raise ``ExportError`` for errors of mlx, such as a full disk."""
    try:
        yield
    except (RuntimeError, ValueError) as error:
        if "There is no Stream" in str(error):
            raise ExportError(
                f"{path}: mlx runs a function file only on the thread of the process that used mlx first. "
                "Call export_function on that thread."
            ) from error
        raise ExportError(f"{path}: mlx cannot write or read it back ({error}).") from error
