"""The steered decoder block, and its exact undo.

Steering belongs to the KV cache, not to the model. ``patch`` changes the class of each decoder block to
a subclass of that class, so that a block looks at its cache. If the cache has no ``Shift``, the block
is mlx-lm's own, bit for bit. If it has one, the block adds ``lambda * v`` to its output: in the same
fused operation that adds its MLP to the residual stream, where mlx-lm's code for the block is that of
Qwen2 (``families.is_plain``), else in one operation more. Where the cache asks for it (``record``), it
tells its unsteered output before anything is added. ``patch`` also changes the class of the stack around
the blocks, which sees the tokens before they are embedded, for positions that depend on them.
"""

from collections.abc import Iterable
from functools import cache, partial
from typing import TYPE_CHECKING, Any, NamedTuple

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx_lm.models.cache import KVCache
from mlx_lm.tokenizer_utils import TokenizerWrapper

from ..errors import SteeringError
from ..steering.steering import Steering
from .cache import Shift, SteeredKVCache, note_tokens, where_in
from .families import check_network, decoder_blocks, is_plain, stream_dtype
from .marks import Marks, marks_of

if TYPE_CHECKING:
    from .model import Model


class SteeredBlock:
    """Base of the steered classes: adds ``lambda * v`` to a block's output where its cache says so."""

    stock: type[nn.Module]  # the block's own class
    plain: bool  # whether its code is that of Qwen2's block

    def __call__(
        self, x: mx.array, mask: mx.array | str | None = None, cache: Any | None = None
    ) -> mx.array:
        instead = getattr(cache, "instead", None)
        if instead is not None:
            return instead(self, x, mask)
        shift, record = getattr(cache, "shift", None), getattr(cache, "record", None)
        if shift is None and record is None:
            return super().__call__(x, mask, cache)
        offset = cache.offset
        where = where_in(cache, offset, x.shape[1]) if shift is not None else False
        cache.expecting = True
        try:
            if self.plain and record is None:
                r = self.self_attn(self.input_layernorm(x), mask, cache)
            else:
                h = super().__call__(x, mask, cache)
        finally:
            cache.expecting = False
        if self.plain and record is None:
            h = x + r
            return shift.add(h, self.mlp(self.post_attention_layernorm(h)), where)
        if record is not None:
            record(offset, h)
        return h if shift is None else shift.add_alone(h, where)


class SteeredStack:
    """Base of the steered stacks of blocks: tells the tokens to caches that need them."""

    stock: type[nn.Module]
    marks: Marks | None = None

    def __call__(
        self, inputs: mx.array, cache: Any | None = None, *given: Any, **named: Any
    ) -> mx.array:
        if cache is not None:
            note_tokens(cache, inputs, self.marks)
        return super().__call__(inputs, cache, *given, **named)


@cache
def steered_block(stock: type[nn.Module]) -> type[nn.Module]:
    """Return the subclass of a block's class that steers."""
    return _subclass(SteeredBlock, stock, plain=is_plain(stock))


@cache
def steered_stack(stock: type[nn.Module]) -> type[nn.Module]:
    """Return the subclass of a stack's class that tells the tokens to caches."""
    return _subclass(SteeredStack, stock)


def _subclass(base: type, stock: type[nn.Module], **more: object) -> type[nn.Module]:
    names = {"stock": stock, "__module__": __name__, **more}
    return type(f"Steered{stock.__name__}", (base, stock), names)


def patch(network: nn.Module, tokenizer: TokenizerWrapper | None = None) -> nn.Module:
    """Change the class of every decoder block to ``steered_block`` of it; return ``network``.

    No parameter, weight or output changes, and a second call changes nothing. mlx-lm's
    ``make_prompt_cache(network)`` then makes unsteered ``SteeredKVCache``s, so that every row of a
    batch can have its own steering. They keep all keys and values, also those of a block that attends to
    a window only, as mlx-lm's rotating caches do not: so they can be cut back. While patched,
    ``make_prompt_cache`` ignores ``max_kv_size``, and ``load_prompt_cache`` raises ``KeyError`` for a file
    that was saved from these caches. After ``unpatch`` new caches are stock again.

    Args:
        tokenizer: needed once for positions that depend on tokens; the network remembers what it says.

    Raises:
        UnsupportedModelError: the network cannot be steered; the message says why.
    """
    blocks = decoder_blocks(network)
    if not any(isinstance(block, SteeredBlock) for block in blocks.values()):
        check_network(network)
    for block in blocks.values():
        if not isinstance(block, SteeredBlock):
            block.__class__ = steered_block(type(block))
    if not isinstance(network.model, SteeredStack):
        network.model.__class__ = steered_stack(type(network.model))
    known = getattr(network.model, "marks", None)
    if tokenizer is not None and (known is None or known.tokenizer is not tokenizer):
        network.model.marks = Marks(tokenizer, network.args.vocab_size)
    # Not a bound method: the cycle would keep the network alive after its last reference.
    network.make_cache = partial(_unsteered_caches, len(blocks))
    return network


def _unsteered_caches(count: int) -> list[KVCache]:
    return [SteeredKVCache() for _ in range(count)]


def unpatch(network: nn.Module) -> nn.Module:
    """Give every block its stock class again; return ``network``."""
    for part in (*decoder_blocks(network).values(), network.model):
        if isinstance(part, SteeredBlock | SteeredStack):
            part.__class__ = part.stock
    if "make_cache" in vars(network):
        del network.make_cache
    return network


def make_cache(
    model: "Model | nn.Module",
    steering: Steering | None = None,
    *,
    prompt: Iterable[int] | None = None,
) -> list[KVCache]:
    """Return one empty KV cache per decoder block; filling and reading it steers.

    The caches work with mlx-lm's own ``stream_generate(..., prompt_cache=...)`` and
    ``BatchGenerator.insert(..., caches=[...])``; one batch can mix any steerings. Do not insert
    caches that mlx-lm made before the blocks were patched: a stock cache in the first row drops the
    steering of the other rows.

    The blocks are patched if they are not yet. Without a steering, or at strength 0, they compute
    what mlx-lm's blocks do. For positions other than ``"all"``, the first tokens are those of ``prompt``,
    and all others are generated.

    Args:
        model: what ``load`` returns, or a network of mlx-lm.
        steering: what to add, or ``None``.
        prompt: its token ids; needed for positions other than ``"all"``, and for a budget.

    Raises:
        ModelError: a network that cannot be steered, or as ``additions``.
        VectorMismatchError: the vector does not fit the model.
        SteeringError: ``prompt`` is missing, or as ``additions``.
    """
    network = getattr(model, "network", model)
    blocks = decoder_blocks(patch(network))
    caches = dict(zip(blocks, _unsteered_caches(len(blocks)), strict=True))
    if steering is None or steering.is_zero:
        return list(caches.values())
    tokens = None if prompt is None else [int(token) for token in prompt]
    opens = steering.needs_thought and bool(tokens) and marks_of(network).opens_thought(tokens)
    span = steering.span(None if tokens is None else len(tokens), opens)
    for layer, what in additions(network, steering).items():
        caches[layer].shift = Shift.of(what.delta, [span], what.late)
    shifts = [cache.shift for cache in caches.values() if cache.shift]
    # mlx computes an array on the thread that made it, but another thread may use the caches.
    mx.eval([shift.arrays for shift in shifts])
    return list(caches.values())


class Added(NamedTuple):
    """What a steering adds at one layer: ``lambda * v``, float32 ``(1, 1, hidden)``.

    ``late`` is the same beyond the thinking budget; ``None`` without one.
    """

    delta: mx.array
    late: mx.array | None


def additions(network: nn.Module, steering: Steering | None) -> dict[int, Added]:
    """Return what a steering adds at each of its layers; empty if it adds nothing.

    Raises:
        VectorMismatchError: the vector does not fit the model.
        SteeringError: ``lambda * v`` overflows the stream's dtype, or positions that depend on tokens
            without the tokenizer.
        ModelError: the tokenizer has not the marks that the positions need (``marks``).
    """
    if steering is None:
        return {}
    hidden_size, layer_count = network.args.hidden_size, network.args.num_hidden_layers
    steering.vector.select(steering.layers).check_fits(
        hidden_size=hidden_size, layer_count=layer_count, model="the model"
    )
    if steering.positions == "steps":
        _ = marks_of(network).step_end_table  # raises now, and not with the first token
    if steering.needs_thought:
        _ = marks_of(network).thought
    if not steering.calls:
        _ = marks_of(network).call
    if steering.is_zero:
        return {}
    limit = float(mx.finfo(stream_dtype(network)).max)
    zeros = np.zeros(hidden_size, np.float32)
    made = {}
    for layer in sorted(set(steering.layers) & set(decoder_blocks(network))):
        both = [steering.delta(layer)]
        if steering.budget is not None:
            both.append(steering.late_delta(layer))
        strengths = (steering.strength, steering.budget.strength if steering.budget else 0.0)
        for strength, delta in zip(strengths, both, strict=False):
            if delta is not None and abs(delta).max() > limit:
                name = str(stream_dtype(network)).removeprefix("mlx.core.")
                raise SteeringError(
                    f"strength {strength:g} at layer {layer}: lambda * v overflows the model's {name}. "
                    "Choose a smaller strength."
                )
        arrays = (mx.array(zeros if one is None else one).reshape(1, 1, -1) for one in both)
        made[layer] = Added(*arrays, *[None] * (2 - len(both)))
    return made
