"""A model with biases on every projection: the same arithmetic, and the biases hold a steering.

mlx-lm's and transformers' ``llama`` have such biases, and their ``smollm3``; Qwen2 and Mistral become a
``llama``. ``mlp.down_proj.bias`` of layer l becomes ``lambda * v_l``, and every other new bias is zero.
The block's output is then that of run-time steering at every position:

    h + (W_down a + lambda * v)  =  (h + W_down a) + lambda * v

Source: ``models/llama.py`` and ``models/qwen2.py`` of mlx-lm, ``modeling_llama.py`` of transformers.
"""

import re
from collections.abc import Iterator, Mapping
from pathlib import Path

import mlx.core as mx

from ..errors import ExportError, ModelError
from ..model.weights import read_tensors, weight_files

_LAST = ".mlp.down_proj"
_PROJECTION = re.compile(r"model\.layers\.\d+\.(self_attn\.[qkvo]_proj|mlp\.(gate|up|down)_proj)")
# mlx-lm's and transformers' class of the baked model
BAKES = {
    "qwen2": ("llama", "LlamaForCausalLM"),
    "llama": ("llama", "LlamaForCausalLM"),
    "mistral": ("llama", "LlamaForCausalLM"),
    "smollm3": ("smollm3", "SmolLM3ForCausalLM"),
}
_LEFT_OUT = ("use_sliding_window", "sliding_window", "max_window_layers", "layer_types")


def llama_config(config: Mapping[str, object], name: str) -> dict[str, object]:
    """Return the ``config.json`` with which a stock class with biases computes what a model computes.

    Args:
        config: what ``read_config`` returns, so that no sliding window hides anything.

    Raises:
        ExportError: quantised by another program, or of a family that has no biases.
    """
    if config["model_type"] not in BAKES:
        raise ExportError(
            f"{name}: a {config['model_type']} model has no place for a vector: its blocks have no bias on their "
            f"output, as {', '.join(BAKES)} can. Steer it while it runs, or give llama.cpp the vector "
            "(`densesteer vector export`)."
        )
    if config.get("quantization_config") and not config.get("quantization"):
        raise ExportError(
            f"{name}: is quantised, but not by mlx-lm. Expected a folder that `densesteer convert` wrote."
        )
    kept = {key: value for key, value in config.items() if key not in _LEFT_OUT}
    family, architecture = BAKES[str(config["model_type"])]
    size = config.get("head_dim") or int(config["hidden_size"]) // int(
        config["num_attention_heads"]
    )
    return kept | {
        "architectures": [architecture],
        "model_type": family,
        "attention_bias": True,
        "mlp_bias": True,
        "head_dim": size,
        "hidden_act": "silu",
    }


def llama_shards(
    folder: Path,
    config: Mapping[str, object],
    deltas: Mapping[int, mx.array],
    *,
    dequantize: bool = False,
    bias_dtype: mx.Dtype | None = None,
) -> Iterator[dict[str, mx.array]]:
    """Yield the weights file by file: those that the source computes with, bit for bit, and the new biases.

    The arrays are lazy: ``pop`` each as it is used, so that one at a time is in memory.

    Args:
        folder: the model's folder.
        config: its ``config.json``.
        deltas: ``lambda * v`` of each steered layer, float32, ``hidden`` values.
        dequantize: return quantised matrices as plain ones, in the model's dtype.
        bias_dtype: dtype of the new biases, by default the model's. ``lambda * v`` is rounded to it.
            In mlx a wider one would widen the residual stream.

    Raises:
        ModelError: no weights, or damaged ones.
    """
    own = weights_dtype(folder)
    dtype = bias_dtype or own
    there = read_tensors(folder)
    for file in weight_files(folder):
        arrays = read_weights(file)
        copies = ["lm_head.weight"] if config["tie_word_embeddings"] else []
        for name in [n for n in arrays if n in copies or n.endswith("rotary_emb.inv_freq")]:
            del arrays[name]  # mlx-swift-lm refuses tensors that the model has no place for
        if dequantize:
            _undo_quantization(arrays, config, own)
        for name in list(arrays):
            matrix, _, kind = name.rpartition(".")
            bias = f"{matrix}.bias"
            new = kind == "weight" and bias not in there
            if _PROJECTION.fullmatch(matrix) and (new or kind == "bias"):
                zeros = mx.zeros(arrays[name].shape[0], dtype)
                arrays[bias] = _with_delta(arrays.get(bias, zeros), matrix, deltas, bias_dtype)
        yield arrays


def _with_delta(
    bias: mx.array, matrix: str, deltas: Mapping[int, mx.array], dtype: mx.Dtype | None
) -> mx.array:
    """Return the bias of a projection, plus ``lambda * v`` if it is the block's last."""
    delta = deltas.get(int(matrix.split(".")[2]))
    if delta is None or not matrix.endswith(_LAST):
        return bias
    return (bias.astype(mx.float32) + delta.reshape(-1)).astype(dtype or bias.dtype)


def weights_dtype(folder: Path) -> mx.Dtype:
    """Return the dtype of the residual stream: that of the final norm."""
    for file in weight_files(folder):
        if (norm := read_weights(file).get("model.norm.weight")) is not None:
            return norm.dtype
    raise ModelError(f"{folder}: has no model.norm.weight. Convert or download it again.")


def read_weights(file: Path) -> dict[str, mx.array]:
    """Return the arrays of a weight file by name.

    Raises:
        ModelError: damaged or incomplete.
    """
    try:
        return mx.load(str(file))  # lazy: only what is used is read
    except (RuntimeError, ValueError) as error:
        raise ModelError(f"{file}: is damaged or incomplete ({error}).") from error


def _undo_quantization(
    arrays: dict[str, mx.array], config: Mapping[str, object], dtype: mx.Dtype
) -> None:
    """Dequantise every matrix that has ``scales`` beside it."""
    settings = config.get("quantization") or config.get("quantization_config")
    for name in [name for name in arrays if name.endswith(".scales")]:
        matrix = name.removesuffix(".scales")
        own = settings.get(matrix)
        own = own if isinstance(own, dict) else settings
        plain = mx.dequantize(
            arrays[f"{matrix}.weight"],
            arrays.pop(name),
            arrays.pop(f"{matrix}.biases", None),
            group_size=int(own["group_size"]),
            bits=int(own["bits"]),
            mode=str(own.get("mode", "affine")),
        )
        arrays[f"{matrix}.weight"] = plain.astype(dtype)
