"""The steered decoder block, and its exact undo.

Steering belongs to the KV cache, not to the model. ``patch`` changes the class of each Qwen2
``TransformerBlock``, so that a block looks at its cache. If the cache has no ``Shift``, the block
is mlx-lm's own, bit for bit. If it has one, the block adds ``lambda * v`` in the same fused
operation that adds its MLP to the residual stream. Where the cache asks for it (``unsteered``), the block records its
output before anything is added. For positions that depend on the tokens it also
changes the class of the ``Qwen2Model`` around them, which sees the tokens before they are embedded.

Not covered: other model families.
"""

from functools import partial
from typing import TYPE_CHECKING, Any

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models.cache import KVCache
from mlx_lm.models.qwen2 import Qwen2Model, TransformerBlock
from mlx_lm.tokenizer_utils import TokenizerWrapper

from ..errors import ModelError, SteeringError
from ..steering.steering import Steering
from .cache import Shift, SteeredKVCache, note_step_ends, where_in
from .places import StepEnds, span_of, step_ends_of

if TYPE_CHECKING:
    from .model import Model


class SteeredBlock(TransformerBlock):
    """mlx-lm's Qwen2 block; it adds ``lambda * v`` to its output where the cache says so."""

    def __call__(
        self, x: mx.array, mask: mx.array | str | None = None, cache: Any | None = None
    ) -> mx.array:
        shift, unsteered = getattr(cache, "shift", None), getattr(cache, "unsteered", None)
        if shift is None and unsteered is None:
            return super().__call__(x, mask, cache)
        offset = cache.offset
        if shift is None:
            h = super().__call__(x, mask, cache)
            unsteered.append((offset, h))
            return h
        where = where_in(cache, offset, x.shape[1])
        cache.expecting = True
        try:
            r = self.self_attn(self.input_layernorm(x), mask, cache)
        finally:
            cache.expecting = False
        h = x + r
        r = self.mlp(self.post_attention_layernorm(h))
        if unsteered is None:
            return shift.add(h, r, where)
        h = h + r
        unsteered.append((offset, h))
        return shift.add_alone(h, where)


class SteeredQwen2Model(Qwen2Model):
    """mlx-lm's stack of Qwen2 blocks; it tells caches that ask for it which tokens end a step."""

    step_ends: StepEnds | None = None

    def __call__(
        self,
        inputs: mx.array,
        cache: Any | None = None,
        input_embeddings: mx.array | None = None,
    ) -> mx.array:
        if cache is not None and self.step_ends is not None:
            note_step_ends(cache, inputs, self.step_ends)
        return super().__call__(inputs, cache, input_embeddings)


def patch(network: nn.Module, tokenizer: TokenizerWrapper | None = None) -> nn.Module:
    """Change the class of every Qwen2 block to ``SteeredBlock``; return ``network``.

    No parameter, weight or output changes, and a second call changes nothing. mlx-lm's
    ``make_prompt_cache(network)`` then makes unsteered ``SteeredKVCache``s, so that every row of a
    batch can have its own steering. While patched, ``make_prompt_cache`` ignores ``max_kv_size``, and
    ``load_prompt_cache`` raises ``KeyError`` for a file that was saved from these caches. After
    ``unpatch`` new caches are stock again.

    Args:
        tokenizer: needed once for positions ``"steps"``; the network remembers what it says.

    Raises:
        ModelError: a block of another class, even a subclass of Qwen2's.
    """
    blocks = decoder_blocks(network)
    for layer, block in blocks.items():
        if type(block) not in (TransformerBlock, SteeredBlock):
            raise ModelError(
                f"layer {layer} is a {type(block).__name__} of {type(block).__module__}, expected "
                "TransformerBlock of mlx_lm.models.qwen2: only the Qwen2 family can be steered."
            )
    for block in blocks.values():
        block.__class__ = SteeredBlock
    if type(network.model) is Qwen2Model:
        network.model.__class__ = SteeredQwen2Model
    known = getattr(network.model, "step_ends", None)
    if tokenizer is not None and (known is None or known.tokenizer is not tokenizer):
        network.model.step_ends = StepEnds(tokenizer, network.args.vocab_size)
    # Not a bound method: the cycle would keep the network alive after its last reference.
    network.make_cache = partial(_unsteered_caches, len(blocks))
    return network


def _unsteered_caches(count: int) -> list[KVCache]:
    return [SteeredKVCache() for _ in range(count)]


def unpatch(network: nn.Module) -> nn.Module:
    """Give every block its stock class again; return ``network``."""
    for block in decoder_blocks(network).values():
        if type(block) is SteeredBlock:
            block.__class__ = TransformerBlock
    if type(network.model) is SteeredQwen2Model:
        network.model.__class__ = Qwen2Model
    if "make_cache" in vars(network):
        del network.make_cache
    return network


def decoder_blocks(network: nn.Module) -> dict[int, nn.Module]:
    """Return the blocks by layer number; under pipeline parallelism only this rank's own.

    Raises:
        ModelError: a network without ``model.layers``.
    """
    # mlx-lm's network.layers is a slice copy; network.model.layers is the list itself.
    layers = getattr(getattr(network, "model", None), "layers", None)
    if not layers:
        raise ModelError(
            f"{type(network).__module__}.{type(network).__name__} has no model.layers; "
            "expected a Qwen2 model as mlx_lm.load returns it."
        )
    return {i: block for i, block in enumerate(layers) if block is not None}


def make_cache(
    model: "Model | nn.Module",
    steering: Steering | None = None,
    *,
    prompt_length: int | None = None,
) -> list[KVCache]:
    """Return one empty KV cache per decoder block; filling and reading it steers.

    The caches work with mlx-lm's own ``stream_generate(..., prompt_cache=...)`` and
    ``BatchGenerator.insert(..., caches=[...])``; one batch can mix any steerings. Do not insert
    caches that mlx-lm made before the blocks were patched: a stock cache in the first row drops the
    steering of the other rows.

    The blocks are patched if they are not yet. Without a steering, or at strength 0, they compute
    what mlx-lm's blocks do. For positions other than ``"all"``, the first ``prompt_length`` tokens
    are the prompt and all others are generated.

    Args:
        model: what ``load`` returns, or a Qwen2 network of mlx-lm.
        steering: what to add, or ``None``.
        prompt_length: tokens of the prompt; needed for positions other than ``"all"``.

    Raises:
        ModelError: not a Qwen2 model, or as ``deltas``.
        VectorMismatchError: the vector does not fit the model.
        SteeringError: ``prompt_length`` is missing, or as ``deltas``.
    """
    network = getattr(model, "network", model)
    blocks = decoder_blocks(patch(network))
    caches = dict(zip(blocks, _unsteered_caches(len(blocks)), strict=True))
    if steering is None or not steering.strength:
        return list(caches.values())
    span = span_of(steering.positions, prompt_length)
    for layer, delta in deltas(network, steering).items():
        caches[layer].shift = Shift.of(delta, [span])
    shifts = [cache.shift for cache in caches.values() if cache.shift]
    # mlx computes an array on the thread that made it, but another thread may use the caches.
    mx.eval([shift.arrays for shift in shifts])
    return list(caches.values())


def deltas(network: nn.Module, steering: Steering | None) -> dict[int, mx.array]:
    """Return ``lambda * v`` of each steered layer, float32 ``(1, 1, hidden)``; empty at strength 0.

    Raises:
        VectorMismatchError: the vector does not fit the model.
        SteeringError: ``lambda * v`` overflows the stream's dtype, or positions ``"steps"`` without
            the tokenizer.
        ModelError: positions ``"steps"``, and the tokenizer writes a blank line as several tokens.
    """
    if steering is None:
        return {}
    hidden_size, layer_count = network.args.hidden_size, network.args.num_hidden_layers
    steering.vector.select(steering.layers).check_fits(
        hidden_size=hidden_size, layer_count=layer_count, model="the model"
    )
    if steering.positions == "steps":
        _ = step_ends_of(network).table  # raises now, and not with the first token
    if not steering.strength:
        return {}
    dtype = network.model.norm.weight.dtype
    limit = float(mx.finfo(dtype).max)
    made = {}
    for layer in sorted(set(steering.layers) & set(decoder_blocks(network))):
        delta = steering.delta(layer)
        if abs(delta).max() > limit:
            raise SteeringError(
                f"strength {steering.strength:g} at layer {layer}: lambda * v overflows the "
                f"model's {str(dtype).removeprefix('mlx.core.')}. Choose a smaller strength."
            )
        made[layer] = mx.array(delta).reshape(1, 1, hidden_size)
    return made
