"""Qwen2 as ``model_type: llama``: the same arithmetic, with biases that hold a steering.

A Qwen2 block has biases on q, k and v only; mlx-lm's and transformers' ``llama`` have them on
every projection. ``mlp.down_proj.bias`` of layer l becomes ``lambda * v_l``, and every other new
bias is zero. The block's output is then that of run-time steering at every position:

    h + (W_down a + lambda * v)  =  (h + W_down a) + lambda * v

Source: ``models/llama.py`` and ``models/qwen2.py`` of mlx-lm, ``modeling_llama.py`` of transformers.
"""

from collections.abc import Iterator, Mapping
from pathlib import Path

import mlx.core as mx

from ..errors import ExportError, ModelError
from ..model.weights import weight_files

_DOWN = ".mlp.down_proj.weight"
_LEFT_OUT = ("use_sliding_window", "sliding_window", "max_window_layers", "layer_types")


def llama_config(config: Mapping[str, object], name: str) -> dict[str, object]:
    """Return the ``config.json`` with which stock ``llama`` computes what a Qwen2 model computes.

    Args:
        config: what ``read_config`` returns, so that no sliding window hides anything.

    Raises:
        ExportError: quantised by another program.
    """
    if config.get("quantization_config") and not config.get("quantization"):
        raise ExportError(
            f"{name}: is quantised, but not by mlx-lm. Expected a folder that `densesteer convert` wrote."
        )
    kept = {key: value for key, value in config.items() if key not in _LEFT_OUT}
    return kept | {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "attention_bias": True,
        "mlp_bias": True,
        "head_dim": int(config["hidden_size"]) // int(config["num_attention_heads"]),
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
        folder: the Qwen2 model's folder.
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
    for file in weight_files(folder):
        arrays = read_weights(file)
        copies = ["lm_head.weight"] if config["tie_word_embeddings"] else []
        for name in [n for n in arrays if n in copies or n.endswith("rotary_emb.inv_freq")]:
            del arrays[name]  # mlx-swift-lm refuses tensors that the model has no place for
        if dequantize:
            _undo_quantization(arrays, config, own)
        for name in [name for name in arrays if name.endswith(_DOWN)]:
            arrays |= _biases(name.removesuffix(_DOWN), config, deltas, dtype)
        yield arrays


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


def _biases(
    block: str, config: Mapping[str, object], deltas: Mapping[int, mx.array], dtype: mx.Dtype
) -> dict[str, mx.array]:
    hidden, inner = int(config["hidden_size"]), int(config["intermediate_size"])
    delta = deltas.get(int(block.rpartition(".")[2]))
    down = mx.zeros(hidden, dtype) if delta is None else delta.reshape(hidden).astype(dtype)
    return {
        f"{block}.self_attn.o_proj.bias": mx.zeros(hidden, dtype),
        f"{block}.mlp.gate_proj.bias": mx.zeros(inner, dtype),
        f"{block}.mlp.up_proj.bias": mx.zeros(inner, dtype),
        f"{block}.mlp.down_proj.bias": down,
    }


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
