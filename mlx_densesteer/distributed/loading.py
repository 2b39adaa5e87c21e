"""A model over several ranks: tensor-parallel or as a pipeline. mlx-lm cuts it; this checks and loads.

Tensor-parallel: every rank has a slice of every block's heads and MLP; what they compute is summed, and
``lambda * v`` is added to the sum, once on each rank's copy of the residual stream. Pipeline: every
rank has some of the blocks, the last rank the first ones, and the residual stream goes from rank to rank; a layer
keeps its number, so its vector finds it wherever it is.
"""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import mlx_lm
from mlx_lm.generate import generation_stream
from mlx_lm.tokenizer_utils import TokenizerWrapper
from mlx_lm.utils import load_model, load_tokenizer

from .._version import __version__
from ..errors import DistributedError
from ..model.block import decoder_blocks, patch
from ..model.config import read_config, rope
from ..model.model import ModelInfo, chat_template_sha256, inspect, loading, quiet, set_dtype
from .ranks import Ranks


def load_sharded(
    folder: Path, ranks: Ranks, *, pipeline: bool = False
) -> tuple[nn.Module, TokenizerWrapper, ModelInfo]:
    """Return this rank's part of a model, patched; its tokenizer; and what the whole model is.

    Tensor-parallel, one block at a time is read whole and cut; a pipeline reads only its own blocks.

    Args:
        folder: the same model on every rank.

    Raises:
        DistributedError: the model cannot be cut into so many parts, or ranks hold different models.
        UnsupportedModelError, ModelError: as ``model.load``.
    """
    config = read_config(folder)
    check_pipeline(config, ranks) if pipeline else check_tensor(config, ranks)
    with loading(folder):
        model, config = load_model(folder, lazy=True, model_config=rope(config))
        tokenizer = quiet(load_tokenizer(folder, eos_token_ids=config.get("eos_token_id")))
    set_dtype(model, folder)
    info = inspect(model, folder)  # before blocks go: the fingerprint is that of all
    ranks.same(_identity(info, config, tokenizer), "models")
    if pipeline:
        if not hasattr(model.model, "pipeline"):
            raise DistributedError(
                "this mlx-lm cuts Qwen2 models only tensor-parallel; a pipeline needs mlx-lm 0.32, and that Python "
                "3.11 or newer. Leave --pipeline out, or install these."
            )
        model.model.pipeline(ranks.group)
    else:
        model.shard(ranks.group)
    patch(model)
    model.ranks = ranks  # whose tokens are rank 0's
    for block in decoder_blocks(model).values():  # of each, the slice is kept
        mx.eval(block.parameters())
    mx.eval(model.parameters())
    ranks.wait()
    return model, tokenizer, info


def _identity(
    info: ModelInfo, config: Mapping[str, object], tokenizer: TokenizerWrapper
) -> dict[str, object]:
    """What must be equal on all ranks for them to go through the same tokens."""
    text = json.dumps(config, sort_keys=True, default=str)
    return {
        "weights": info.fingerprint,
        "quantization": info.quantization,
        "config.json": hashlib.sha256(text.encode()).hexdigest()[:12],
        "end tokens": sorted(int(token) for token in tokenizer.eos_token_ids),
        "chat template": chat_template_sha256(tokenizer),
        "versions": f"{__version__}, mlx-lm {mlx_lm.__version__}, mlx {mx.__version__}",
    }


def settle(ranks: Ranks) -> None:
    """Return when every rank is done with what it generated; call it before a rank may go.

    mlx-lm works out one token more than it gives, which needs the other ranks.
    """
    if ranks.size > 1:
        mx.synchronize(generation_stream)
        ranks.wait()


def own_layers(model: nn.Module) -> list[int]:
    """Return the layers that this rank computes."""
    return list(decoder_blocks(model))


def check_tensor(config: Mapping[str, object], ranks: Ranks) -> None:
    """Raise ``DistributedError`` unless heads, keys, MLP and quantisation groups divide by the ranks."""
    hidden, inner = int(config["hidden_size"]), int(config["intermediate_size"])
    parts = {
        "attention heads": int(config["num_attention_heads"]),
        "key and value heads": int(config["num_key_value_heads"]),
        "MLP channels": inner,
    }
    quantization = config.get("quantization")
    if isinstance(quantization, dict) and "group_size" in quantization:
        size = int(quantization["group_size"])
        parts |= {"groups of the MLP": inner // size, "groups of the attention": hidden // size}
    if uneven := [f"{count} {what}" for what, count in parts.items() if count % ranks.size]:
        raise DistributedError(
            f"{', '.join(uneven)} cannot be cut into {ranks.size} equal parts. Use another number of "
            "ranks, or --pipeline."
        )


def check_pipeline(config: Mapping[str, object], ranks: Ranks) -> None:
    """Raise ``DistributedError`` unless every rank gets a block."""
    if int(config["num_hidden_layers"]) < ranks.size:
        raise DistributedError(
            f"{config['num_hidden_layers']} blocks are too few for {ranks.size} ranks: every rank needs one."
        )
