"""The steered decoder block, and its exact undo.

Steering belongs to the KV cache, not to the model. ``patch`` swaps the class of each
Qwen2 ``TransformerBlock``; a block then looks at its cache. A cache without a ``Shift``
takes mlx-lm's own path and is bit-identical. A cache with one adds ``lambda * v`` where
the block adds its MLP to the residual stream, in the same fused operation.

Not covered: other model families.
"""

from functools import partial
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models.cache import KVCache
from mlx_lm.models.qwen2 import TransformerBlock

from ..errors import ModelError, SteeringError
from ..steering.steering import Steering
from .cache import EVERYWHERE, Shift, Span, SteeredKVCache


class SteeredBlock(TransformerBlock):
    """mlx-lm's Qwen2 block, and ``+ lambda * v`` at its output where the cache says so."""

    def __call__(
        self, x: mx.array, mask: mx.array | str | None = None, cache: Any | None = None
    ) -> mx.array:
        shift = getattr(cache, "shift", None)
        if shift is None:
            return super().__call__(x, mask, cache)
        where = shift.where(cache.offset, x.shape[1])
        cache.expecting = True
        try:
            r = self.self_attn(self.input_layernorm(x), mask, cache)
        finally:
            cache.expecting = False
        h = x + r
        r = self.mlp(self.post_attention_layernorm(h))
        return shift.add(h, r, where)


def patch(model: nn.Module) -> nn.Module:
    """Swap the class of every Qwen2 block to ``SteeredBlock``; return ``model``.

    No parameter, weight or output changes. Calling it again is harmless. mlx-lm's
    ``make_prompt_cache(model)`` then makes our (unsteered) caches, so that every row of a
    batch carries its own steering. It no longer heeds ``max_kv_size``, and mlx-lm's
    ``load_prompt_cache`` does not know them (KeyError): ``unpatch`` for these.

    Raises:
        ModelError: a block of another class, or of a subclass that we do not know.
    """
    blocks = decoder_blocks(model)
    for layer, block in blocks.items():
        if type(block) not in (TransformerBlock, SteeredBlock):
            raise ModelError(
                f"layer {layer} is a {type(block).__name__} of {type(block).__module__}, expected "
                "TransformerBlock of mlx_lm.models.qwen2: only the Qwen2 family can be steered."
            )
    for block in blocks.values():
        block.__class__ = SteeredBlock
    model.make_cache = partial(_unsteered_caches, len(blocks))  # not the model: no cycle
    return model


def _unsteered_caches(count: int) -> list[KVCache]:
    return [SteeredKVCache() for _ in range(count)]


def unpatch(model: nn.Module) -> nn.Module:
    """Give every block its stock class again; return ``model``."""
    for block in decoder_blocks(model).values():
        if type(block) is SteeredBlock:
            block.__class__ = TransformerBlock
    if "make_cache" in vars(model):
        del model.make_cache
    return model


def decoder_blocks(model: nn.Module) -> dict[int, nn.Module]:
    """Return the blocks by layer number; under pipeline parallelism only this rank's own.

    ``model.layers`` is a slice copy in mlx-lm; ``model.model.layers`` is the list itself.
    """
    layers = getattr(getattr(model, "model", None), "layers", None)
    if not layers:
        raise ModelError(
            f"{type(model).__module__}.{type(model).__name__} has no model.layers; "
            "expected a Qwen2 model as mlx_lm.load returns it."
        )
    return {i: block for i, block in enumerate(layers) if block is not None}


def make_cache(
    model: nn.Module, steering: Steering | None = None, *, prompt_length: int | None = None
) -> list[KVCache]:
    """Return one empty KV cache per decoder block, filled and read under ``steering``.

    The caches work with mlx-lm's own ``stream_generate(..., prompt_cache=...)`` and
    ``BatchGenerator.insert(..., caches=[...])``; one batch can mix any steerings. Do not
    insert caches there that were made before the model was patched: a stock cache that leads
    a batch does not know of its neighbours' steering.

    The model's blocks are patched if they are not yet. Without steering, or at strength 0,
    the blocks take the stock path. Positions other than ``"all"`` are those of one turn: the
    prompt is what ``prompt_length`` says, whatever follows is generated.

    Args:
        model: what ``load`` returns, or a Qwen2 network of mlx-lm.
        steering: what to add, or ``None``.
        prompt_length: tokens of the prompt; needed for positions other than ``"all"``.

    Raises:
        ModelError: not a Qwen2 model.
        VectorMismatchError: the vector does not fit the model.
        SteeringError: ``prompt_length`` is missing, or ``lambda * v`` overflows the stream's dtype.
    """
    model = getattr(model, "network", model)
    blocks = decoder_blocks(patch(model))
    caches = dict(zip(blocks, _unsteered_caches(len(blocks)), strict=True))
    if steering is None or not steering.strength:
        return list(caches.values())
    span = _span(steering, prompt_length)
    for layer, delta in deltas(model, steering).items():
        caches[layer].shift = Shift.of(delta, [span])
    shifts = [cache.shift for cache in caches.values() if cache.shift]
    mx.eval([(s.delta, s.start, s.stop) for s in shifts])  # here: mlx needs this thread's stream
    return list(caches.values())


def deltas(model: nn.Module, steering: Steering | None) -> dict[int, mx.array]:
    """Return ``lambda * v`` of each steered layer, float32 ``(1, 1, hidden)``; empty at strength 0.

    Raises:
        VectorMismatchError: the vector does not fit the model.
        SteeringError: ``lambda * v`` overflows the stream's dtype.
    """
    if steering is None:
        return {}
    hidden_size, layer_count = model.args.hidden_size, model.args.num_hidden_layers
    steering.vector.select(steering.layers).check_fits(
        hidden_size=hidden_size, layer_count=layer_count, model="the model"
    )
    if not steering.strength:
        return {}
    dtype = model.model.norm.weight.dtype
    limit = float(mx.finfo(dtype).max)
    made = {}
    for layer in sorted(set(steering.layers) & set(decoder_blocks(model))):
        delta = steering.delta(layer)
        if abs(delta).max() > limit:
            raise SteeringError(
                f"strength {steering.strength:g} at layer {layer}: lambda * v overflows the "
                f"model's {str(dtype).removeprefix('mlx.core.')}. Choose a smaller strength."
            )
        made[layer] = mx.array(delta).reshape(1, 1, hidden_size)
    return made


def _span(steering: Steering, prompt_length: int | None) -> Span:
    if steering.positions == "all":
        return EVERYWHERE
    if prompt_length is None or prompt_length < 1:
        raise SteeringError(
            f"positions {steering.positions!r} need the prompt's length, found {prompt_length}: "
            "make_cache(model, steering, prompt_length=len(tokens))."
        )
    # The last prompt token's output already chooses the first generated token.
    if steering.positions == "generated":
        return Span(start=prompt_length - 1)
    return Span(stop=prompt_length)
