"""The steered decoder block and the KV cache that carries the steering.

Steering belongs to the KV cache, not to the model. ``patch`` swaps the class of each
Qwen2 ``TransformerBlock``; a block then looks at its cache. A cache without a ``Shift``
takes mlx-lm's own path and is bit-identical. A cache with one adds ``lambda * v`` where
the block adds its MLP to the residual stream, in the same fused operation.

Not covered: rotating caches, other model families, positions in more than one range.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models.cache import BatchKVCache, KVCache, QuantizedKVCache
from mlx_lm.models.qwen2 import TransformerBlock

from .errors import ModelError, SteeringError
from .steering import Steering

FOREVER = 2**31 - 1


class Span(NamedTuple):
    """Steered positions of one sequence: ``start <= position < stop``."""

    start: int = 0
    stop: int = FOREVER


EVERYWHERE = Span()


@partial(mx.compile, shapeless=True)
def _add(h: mx.array, r: mx.array, delta: mx.array) -> mx.array:
    total = h.astype(mx.float32) + r.astype(mx.float32) + delta
    return total.astype(h.dtype)


@partial(mx.compile, shapeless=True)
def _add_within(
    h: mx.array, r: mx.array, delta: mx.array, at: mx.array, start: mx.array, stop: mx.array
) -> mx.array:
    within = mx.logical_and(at >= start, at < stop)
    total = h.astype(mx.float32) + r.astype(mx.float32) + mx.where(within, delta, 0.0)
    return total.astype(h.dtype)


@dataclass(frozen=True)
class Shift:
    """What one layer adds to the residual stream of each row of a batch.

    ``delta`` is ``lambda * v``, float32 ``(rows, 1, hidden)``; a row that is not steered is
    zero. ``start`` and ``stop`` are int32 ``(rows, 1, 1)``. The arrays are evaluated.
    """

    delta: mx.array
    spans: tuple[Span, ...]
    start: mx.array
    stop: mx.array

    @classmethod
    def of(cls, delta: mx.array, spans: Sequence[Span]) -> "Shift":
        bounds = mx.array(spans, dtype=mx.int32)[:, :, None, None]
        shift = cls(delta, tuple(spans), bounds[:, 0], bounds[:, 1])
        mx.eval(shift.delta, shift.start, shift.stop)  # on this thread: mlx needs its stream
        return shift

    @classmethod
    def stack(cls, rows: Sequence["Shift | None"]) -> "Shift | None":
        """Join single-row shifts; ``None`` if no row is steered."""
        steered = [row for row in rows if row is not None]
        if not steered:
            return None
        zero = mx.zeros_like(steered[0].delta)
        delta = mx.concatenate([zero if row is None else row.delta for row in rows])
        return cls.of(delta, [EVERYWHERE if row is None else row.spans[0] for row in rows])

    def where(self, offset: int | mx.array, length: int) -> bool | mx.array:
        """Tell which of ``length`` tokens from position ``offset`` on are steered.

        All, none, or the int32 positions ``(rows, length, 1)`` to compare with the bounds.
        ``offset`` is one number or ``(rows,)``. Call it before attention: in mlx-lm 0.31 the
        cache advances that array in place.
        """
        if all(span == EVERYWHERE for span in self.spans):
            return True
        if isinstance(offset, int) and len(self.spans) == 1:  # no mask where none is needed
            start, stop = self.spans[0]
            if start <= offset and offset + length <= stop:
                return True
            if offset + length <= start or stop <= offset:
                return False
        return mx.arange(length).reshape(1, -1, 1) + mx.array(offset).reshape(-1, 1, 1)

    def add(self, h: mx.array, r: mx.array, where: bool | mx.array) -> mx.array:
        """Return ``h + r``, and ``+ delta`` at the steered positions.

        ``h`` and ``r`` are ``(rows, tokens, hidden)``, and so is the result, in the dtype of
        ``h``; the sum is made in float32.
        """
        if where is True:
            return _add(h, r, self.delta)
        if where is False:
            return h + r
        return _add_within(h, r, self.delta, where, self.start, self.stop)


class SteeredBlock(TransformerBlock):
    """mlx-lm's Qwen2 block, and ``+ lambda * v`` at its output where the cache says so."""

    def __call__(
        self, x: mx.array, mask: mx.array | str | None = None, cache: Any | None = None
    ) -> mx.array:
        shift = getattr(cache, "shift", None)
        if shift is None:
            return super().__call__(x, mask, cache)
        where = shift.where(cache.offset, x.shape[1])
        cache.expect_update()
        h = x + self.self_attn(self.input_layernorm(x), mask, cache)
        r = self.mlp(self.post_attention_layernorm(h))
        return shift.add(h, r, where)


class _Carrier:
    """What the steered caches share: the shift, and a guard against blocks that ignore it."""

    shift: Shift | None = None
    _expected = False

    def expect_update(self) -> None:
        self._expected = True

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> tuple:
        if self.shift is not None and not self._expected:
            raise SteeringError(
                "a steered cache was used by a block that does not steer: the model is not "
                "patched, or was restored. Call make_cache(model, steering) for this model."
            )
        self._expected = False
        return super().update_and_fetch(keys, values)  # type: ignore[misc]


class SteeredKVCache(_Carrier, KVCache):
    """mlx-lm's ``KVCache`` of one sequence at one layer, and the shift that filled it."""

    def __init__(self, shift: Shift | None = None):
        super().__init__()
        self.shift = shift

    @classmethod
    def merge(cls, caches: Sequence[KVCache]) -> "SteeredBatchKVCache":
        return SteeredBatchKVCache.merge(caches)

    def to_quantized(self, group_size: int = 64, bits: int = 4) -> QuantizedKVCache:
        stock = super().to_quantized(group_size=group_size, bits=bits)
        quantized = SteeredQuantizedKVCache(group_size=group_size, bits=bits)
        quantized.__dict__.update(stock.__dict__)
        quantized.shift = self.shift
        return quantized


class SteeredQuantizedKVCache(_Carrier, QuantizedKVCache):
    """A ``SteeredKVCache`` whose keys and values were quantised (mlx-lm's ``kv_bits``)."""


class SteeredBatchKVCache(_Carrier, BatchKVCache):
    """mlx-lm's ``BatchKVCache`` with a shift of its own, or none, for every row."""

    def __init__(self, left_padding: list[int]):
        super().__init__(left_padding)
        self._rows: list[Shift | None] = [None] * len(left_padding)

    def _carry(self, rows: list[Shift | None]) -> None:
        self._rows = rows
        self.shift = Shift.stack(rows)

    @classmethod
    def merge(cls, caches: Sequence[KVCache]) -> "SteeredBatchKVCache":
        merged = super().merge(caches)
        merged.__class__ = cls  # for empty caches BatchKVCache.merge names its own class
        merged._carry([getattr(cache, "shift", None) for cache in caches])
        return merged

    def filter(self, batch_indices: Sequence[int] | mx.array) -> None:
        super().filter(batch_indices)
        self._carry([self._rows[int(i)] for i in batch_indices])

    def extend(self, other: BatchKVCache) -> None:
        theirs = getattr(other, "_rows", None) or [None] * other.offset.shape[0]
        super().extend(other)
        self._carry(self._rows + theirs)

    def extract(self, idx: int) -> SteeredKVCache:
        extracted = SteeredKVCache(self._rows[idx])
        extracted.__dict__.update(super().extract(idx).__dict__)
        return extracted


def patch(model: nn.Module) -> nn.Module:
    """Swap the class of every Qwen2 block to ``SteeredBlock``; return ``model``.

    Nothing else changes: no parameter, no weight, no output. Calling it again is harmless.

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
    return model


def unpatch(model: nn.Module) -> nn.Module:
    """Give every block its stock class again; return ``model``."""
    for block in decoder_blocks(model).values():
        if type(block) is SteeredBlock:
            block.__class__ = TransformerBlock
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
    ``BatchGenerator.insert(..., caches=[...])``; one batch can mix any steerings. There,
    give *every* row a cache from here (``make_cache(model)`` for an unsteered one): a stock
    cache that leads a batch does not know of its neighbours' steering.

    The model's blocks are patched if they are not yet. Without steering, or at strength 0,
    the blocks take the stock path.

    Args:
        model: a Qwen2 model of mlx-lm.
        steering: what to add, or ``None``.
        prompt_length: tokens of the prompt; needed for positions other than ``"all"``.

    Raises:
        ModelError: not a Qwen2 model.
        VectorMismatchError: the vector does not fit the model.
        SteeringError: ``prompt_length`` is missing, or ``lambda * v`` overflows the stream's dtype.
    """
    blocks = decoder_blocks(patch(model))
    caches = {layer: SteeredKVCache() for layer in blocks}
    if steering is None or not steering.strength:
        return list(caches.values())
    hidden_size, dtype = model.args.hidden_size, model.model.norm.weight.dtype
    layer_count = model.args.num_hidden_layers
    steering.vector.select(steering.layers).check_fits(
        hidden_size=hidden_size, layer_count=layer_count, model="the model"
    )
    span = _span(steering, prompt_length)
    for layer in set(steering.layers) & set(caches):
        delta = mx.array(steering.delta(layer)).reshape(1, 1, hidden_size)
        if not mx.isfinite(delta.astype(dtype)).all():
            raise SteeringError(
                f"strength {steering.strength:g} at layer {layer}: lambda * v overflows the "
                f"model's {dtype}. Choose a smaller strength."
            )
        caches[layer].shift = Shift.of(delta, [span])
    return list(caches.values())


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
