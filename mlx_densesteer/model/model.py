"""Load a Qwen2 model and say what it is."""

import contextlib
import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import mlx_lm
from mlx.utils import tree_flatten
from mlx_lm.tokenizer_utils import TokenizerWrapper

from .. import demo
from ..errors import ModelError
from .block import decoder_blocks, patch
from .config import is_hub_id, origin, read_config, rope
from .hub import fetch_config, fetch_model

_FILES = {  # what somebody may take for a model
    ".gguf": "is a GGUF file; make an MLX folder of it with `densesteer convert {}`.",
    ".npz": "is a steering vector's file: -v takes it. A model is a folder.",
    ".mlxfn": "is a function file, which programs run (docs/export-function.md). Name the model's folder.",
    ".safetensors": "is one file of a model; name its folder.",
}
_TOO_LONG = "sequence-length-is-longer-than-the-specified-maximum"  # warned of once, by this name


@dataclass(frozen=True)
class ModelInfo:
    """What a steering vector needs to know of a model.

    ``fingerprint`` is that of the original weights: the same for every precision.
    """

    name: str
    layer_count: int
    hidden_size: int
    dtype: str
    quantization: str
    fingerprint: str


def load(
    path_or_repo: str | Path, *, revision: str | None = None, adapter_path: str | None = None
) -> tuple[nn.Module, TokenizerWrapper]:
    """Return a patched model and its tokenizer, from a folder or a Hub id.

    ``"demo"`` is the embedded demo model; it comes in bfloat16, which mlx's CPU backend does
    slowly, so there it is computed in float32. Until a cache carries a steering
    (``make_cache``), the model is the stock model.

    Raises:
        UnsupportedModelError: not of the Qwen2 family.
        ModelError: no model there, or its files are damaged.
        HubError: the Hub did not give us the files.
    """
    path = find(path_or_repo, revision=revision)
    model, tokenizer = load_folder(path, adapter_path=adapter_path)
    set_dtype(model, path)
    return model, tokenizer


def set_dtype(model: nn.Module, path: Path) -> None:
    """Give the demo model the dtype that it is computed in; every other keeps that of its file."""
    if path == demo.MODEL and mx.default_device() == mx.Device(mx.cpu):
        model.set_dtype(mx.float32)


def load_folder(
    path: Path, *, adapter_path: str | None = None
) -> tuple[nn.Module, TokenizerWrapper]:
    """Return the patched model of a folder, in the dtype of its file; raises as ``load`` does."""
    told = rope(read_config(path))
    with loading(path):
        model, tokenizer = mlx_lm.load(str(path), model_config=told, adapter_path=adapter_path)[:2]
    return patch(model), quiet(tokenizer)


def quiet(tokenizer: TokenizerWrapper) -> TokenizerWrapper:
    """Return the tokenizer, which no longer warns of long texts: who generates checks how long a prompt is.

    transformers would foretell indexing errors.
    """
    tokenizer.deprecation_warnings[_TOO_LONG] = True
    return tokenizer


@contextlib.contextmanager
def loading(path: Path) -> Iterator[None]:
    """What mlx-lm raises for a folder that it cannot load becomes a ``ModelError``."""
    try:
        yield
    except (ValueError, KeyError, TypeError, RuntimeError, OSError) as error:
        raise ModelError(
            f"{path}: cannot be loaded ({error}). Convert or download it again."
        ) from error


def find(path_or_repo: str | Path, *, revision: str | None = None) -> Path:
    """Return the local folder of a model, from the Hub if it is no folder here.

    ``demo`` is the embedded model; a folder of that name is ``./demo``.
    """
    if str(path_or_repo) == demo.NAME:
        return demo.MODEL
    path = Path(path_or_repo).expanduser()
    if path.is_dir():
        return path
    if path.is_file():
        found = _FILES.get(path.suffix, "is a file, expected a folder.")
        raise ModelError(f"{path}: {found.format(path)}")
    repo = str(path_or_repo)
    if not is_hub_id(repo):
        raise ModelError(
            f"{repo}: no such folder. Expected one that `densesteer convert` wrote, or a Hub id "
            "such as Qwen/Qwen2.5-1.5B-Instruct."
        )
    fetch_config(repo, revision=revision)
    return fetch_model(repo, revision=revision)


def inspect(model: nn.Module, path_or_repo: str | Path) -> ModelInfo:
    """Return what a vector's metadata records of a loaded model."""
    layers = model.model.layers
    quantized = getattr(layers[-1].mlp.down_proj, "bits", None)
    group_size = getattr(layers[-1].mlp.down_proj, "group_size", None)
    mode = getattr(layers[-1].mlp.down_proj, "mode", "affine")
    mode = "" if mode == "affine" else f"{mode}, "
    return ModelInfo(
        name=origin(path_or_repo),
        layer_count=model.args.num_hidden_layers,
        hidden_size=model.args.hidden_size,
        dtype=dtype_name(model.model.norm.weight.dtype),
        quantization=f"{mode}{quantized}-bit, group {group_size}" if quantized else "none",
        fingerprint=fingerprint(model),
    )


def dtype_name(dtype: mx.Dtype) -> str:
    """Return ``bfloat16`` for ``mx.bfloat16``."""
    return str(dtype).removeprefix("mlx.core.")


def fingerprint(model: nn.Module) -> str:
    """Identify the weights: SHA-256 (first 16 digits) over every RMSNorm weight as bfloat16.

    Norm weights are never quantised and survive a change of dtype, so each precision of one
    checkpoint has one fingerprint; checkpoints that were trained apart differ.
    """
    digest = hashlib.sha256()
    for block in decoder_blocks(model).values():
        for norm in (block.input_layernorm, block.post_attention_layernorm):
            digest.update(_bfloat16_bytes(norm.weight))
    digest.update(_bfloat16_bytes(model.model.norm.weight))
    return digest.hexdigest()[:16]


def weights_digest(model: nn.Module) -> str:
    """Identify the weights exactly, adapters and precision included: SHA-256, first 16 digits.

    Over each parameter's name, shape, dtype and the sum of its bit patterns as integers.
    """
    words = {1: mx.uint8, 2: mx.uint16, 4: mx.uint32, 8: mx.uint64}
    digest = hashlib.sha256()
    for name, array in sorted(tree_flatten(model.parameters())):
        total = array.reshape(-1).view(words[array.dtype.size]).astype(mx.uint64).sum().item()
        digest.update(f"{name} {array.shape} {array.dtype} {total}\n".encode())
    return digest.hexdigest()[:16]


def _bfloat16_bytes(array: mx.array) -> bytes:
    return bytes(memoryview(array.astype(mx.bfloat16).view(mx.uint16)))


def chat_template_sha256(tokenizer: TokenizerWrapper) -> str | None:
    """Return the SHA-256 of the chat template, or ``None`` if there is none."""
    template = tokenizer.chat_template
    return hashlib.sha256(template.encode()).hexdigest() if isinstance(template, str) else None
