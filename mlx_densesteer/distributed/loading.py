"""A model over several ranks: tensor-parallel, as a pipeline, or whole on each of them.

mlx-lm cuts the model; this module checks and loads it. Tensor-parallel: every rank has a slice of
every block's heads and MLP; the slices' outputs are summed, and ``lambda * v`` is added to the sum,
once on each rank's copy of the residual stream. Pipeline: every rank has some of the blocks, the
last rank the first ones; the residual stream passes from rank to rank. Layers keep their numbers.
"""

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import mlx_lm
from mlx_lm.tokenizer_utils import TokenizerWrapper

from .._version import __version__
from ..errors import DistributedError
from ..model.block import make_cache, patch
from ..model.config import origin
from ..model.families import decoder_blocks, parallel_ways
from ..model.model import Model, check_finite, find, load, open_network, open_tokenizer, set_dtype
from ..steering.places import Positions
from ..steering.vector import SteeringVector
from .ranks import Ranks


class RankModel(Model):
    """One rank's part of a model, or its copy.

    ``info``, ``context`` and ``norms`` are those of the whole model. All ranks have to call
    ``norms``.
    """

    def __init__(
        self, network: nn.Module, tokenizer: TokenizerWrapper, name: str | None, ranks: Ranks
    ):
        super().__init__(network, tokenizer, name)
        self.ranks = ranks

    @property
    def own_layers(self) -> list[int]:
        """The layers that this rank computes."""
        return list(decoder_blocks(self.network))

    def norms(self, vector: SteeringVector, layers: Iterable[int]) -> dict[int, float]:
        """Return what ``Model.norms`` returns on rank 0, so that every rank has the same doses."""
        self.ranks.same([vector.sha256(), vector.residual_norms is None], "vectors")
        return dict(self.ranks.share(list(super().norms(vector, layers).items())))

    def kl_strength(
        self, vector: SteeringVector, layers: Sequence[int], positions: Positions, kl: float
    ) -> float:
        """Return what ``Model.kl_strength`` returns on rank 0; all ranks have to call it.

        Raises:
            DistributedError: it would have to be measured, and each rank has only some of the blocks.
        """
        unknown = self.known_kl_strength(vector, layers, positions, kl) is None
        if unknown and is_pipeline(self.network):
            raise DistributedError(
                f"a KL of {kl:g} nats: its strength cannot be measured over a pipeline. Store it first on "
                "one machine (densesteer calibrate --write), or name a strength or dose."
            )
        return float(self.ranks.share(super().kl_strength(vector, layers, positions, kl)))

    @cached_property
    def measured_norms(self) -> dict[int, float]:
        if not is_pipeline(self.network):
            return super().measured_norms
        own = _norms_of_own_layers(self)
        return {
            layer: norm for part in self.ranks.gather(list(own.items())) for layer, norm in part
        }


def load_over_ranks(name: str | Path, ranks: Ranks, *, pipeline: bool = False) -> Model:
    """Return this rank's part of a model; a single process gets the whole model.

    A tensor-parallel rank reads each block whole and keeps a slice; a pipeline rank reads its own
    blocks.

    Args:
        name: as ``load``; the same model on every rank.
        pipeline: give every rank some of the blocks, not a slice of each.

    Raises:
        DistributedError: the model cannot be cut into so many parts, or ranks have different
        models.
        UnsupportedModelError, ModelError, HubError: as ``load``.
    """
    if ranks.size == 1:
        return load(name)
    folder = find(name)
    network, config = open_network(folder)
    tokenizer = open_tokenizer(folder, config)
    check_way(network, str(name), pipeline=pipeline)
    check_pipeline(config, ranks) if pipeline else check_tensor(config, ranks)
    set_dtype(network, folder)
    model = RankModel(network, tokenizer, origin(name), ranks)
    # before the cut: the fingerprint is that of all blocks, and the model keeps it
    ranks.same(_identity(model, config), "models")
    if pipeline:
        network.model.pipeline(ranks.group)
    else:
        network.shard(ranks.group)
    patch(network)  # again, for one cache for each block that is left
    for block in decoder_blocks(network).values():  # one at a time: only slices stay in memory
        mx.eval(block.parameters())
    mx.eval(network.parameters())
    ranks.wait()
    check_finite(network, str(folder))
    return model


def load_copies(name: str | Path, ranks: Ranks) -> Model:
    """Return the whole model on each rank, with the same doses on all. Raises as ``load``."""
    model = load(name)
    return model if ranks.size == 1 else RankModel(*model, model.name, ranks)


def is_pipeline(network: nn.Module) -> bool:
    """Return whether the blocks are spread over ranks."""
    return getattr(network.model, "pipeline_size", 1) > 1


def _norms_of_own_layers(model: RankModel) -> dict[int, float]:
    """Return the mean ``||h_l||`` at this rank's layers, as ``Model.measured_norms``.

    Runs the model's own forward pass, which sends and receives the residual stream.
    """
    texts = model.solutions()
    layers = list(decoder_blocks(model.network))
    totals = dict.fromkeys(layers, 0.0)
    for tokens, first in texts:
        outputs: dict[int, mx.array] = {}
        caches = make_cache(model.network)
        for layer, cache in zip(layers, caches, strict=True):
            cache.record = lambda _, h, layer=layer, outputs=outputs: outputs.update({layer: h})
        mx.eval(model.network.model(mx.array([tokens]), caches))
        for layer, h in outputs.items():
            lengths = mx.linalg.norm(h.astype(mx.float32), axis=-1)[0]
            totals[layer] += float(mx.mean(lengths[first:])) / len(texts)
    return totals


def _identity(model: Model, config: Mapping[str, object]) -> dict[str, object]:
    """Return what must be equal on all ranks, so that they compute the same tokens."""
    text = json.dumps(config, sort_keys=True, default=str)
    return {
        "weights": model.info.fingerprint,
        "quantization": model.info.quantization,
        "config.json": hashlib.sha256(text.encode()).hexdigest()[:12],
        "end tokens": sorted(int(token) for token in model.tokenizer.eos_token_ids),
        "chat template": model.chat_template_sha256,
        "versions": f"{__version__}, mlx-lm {mlx_lm.__version__}, mlx {mx.__version__}",
    }


def check_way(network: nn.Module, name: str, *, pipeline: bool) -> None:
    """Raise ``DistributedError`` unless mlx-lm can spread this family over ranks."""
    if ("pipeline" if pipeline else "tensor") not in parallel_ways(network):
        raise DistributedError(
            f"{name}: mlx-lm cannot cut a {network.model_type} model into {'a pipeline' if pipeline else 'slices'}. "
            "`densesteer doctor -m MODEL` tells how it can."
        )


def check_tensor(config: Mapping[str, object], ranks: Ranks) -> None:
    """Raise ``DistributedError`` unless the ranks divide heads, MLP and quantisation groups."""
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
            f"{', '.join(uneven)} cannot be cut into {ranks.size} equal parts. Use another number "
            "of ranks, or a pipeline."
        )


def check_pipeline(config: Mapping[str, object], ranks: Ranks) -> None:
    """Raise ``DistributedError`` unless every rank gets a block."""
    if int(config["num_hidden_layers"]) < ranks.size:
        raise DistributedError(
            f"{config['num_hidden_layers']} blocks are too few for {ranks.size} ranks: every rank "
            "needs one. Use fewer ranks."
        )
