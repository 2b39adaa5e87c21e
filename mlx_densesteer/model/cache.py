"""The KV caches that hold the steering.

Keys and values are valid only for the steering under which they were computed. So the cache of a
layer holds its steering: a ``Shift``, which is ``lambda * v`` for each row and the positions where
it is added.

Not covered: rotating caches, mlx-lm's saved prompt caches, more than one range of positions.
"""

import copy
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property, partial

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_map
from mlx_lm.models.cache import BatchKVCache, KVCache, QuantizedKVCache

from ..errors import SteeringError
from .families import cache_shapes, stream_dtype
from .places import EVERYWHERE, Span, StepEnds

KEPT_BUFFERS = 2**28  # bytes
# Called with the first position and a block's unsteered output, ``(rows, tokens, hidden)``.
Record = Callable[[int, mx.array], None]


@partial(mx.compile, shapeless=True)
def _add(h: mx.array, r: mx.array, delta: mx.array) -> mx.array:
    return ((h + r).astype(mx.float32) + delta).astype(h.dtype)


@partial(mx.compile, shapeless=True)
def _add_alone(h: mx.array, delta: mx.array) -> mx.array:
    return (h.astype(mx.float32) + delta).astype(h.dtype)


@partial(mx.compile, shapeless=True)
def _add_within(
    h: mx.array, r: mx.array, delta: mx.array, at: mx.array, start: mx.array, stop: mx.array
) -> mx.array:
    within = mx.logical_and(at >= start, at < stop)
    return ((h + r).astype(mx.float32) + mx.where(within, delta, 0.0)).astype(h.dtype)


@partial(mx.compile, shapeless=True)
def _add_where(h: mx.array, r: mx.array, delta: mx.array, mask: mx.array) -> mx.array:
    return ((h + r).astype(mx.float32) + mx.where(mask, delta, 0.0)).astype(h.dtype)


@dataclass(frozen=True)
class Shift:
    """What one layer adds to the residual stream of each row of a batch.

    ``delta`` is ``lambda * v``, float32 ``(rows, 1, hidden)``, zero for an unsteered row. ``start``
    and ``stop`` are int32 ``(rows, 1, 1)``. ``any_token``, bool ``(rows, 1, 1)``, says which rows are
    steered at tokens that end no step too; ``None`` for all of them.
    """

    delta: mx.array
    spans: tuple[Span, ...]
    start: mx.array
    stop: mx.array
    any_token: mx.array | None = None

    @cached_property
    def everywhere(self) -> bool:
        """Whether every row is steered at every position."""
        return all(span == EVERYWHERE for span in self.spans)

    @property
    def needs_tokens(self) -> bool:
        """Whether ``where`` has to know which tokens end a step."""
        return self.any_token is not None

    @property
    def arrays(self) -> list[mx.array]:
        """What has to be evaluated on the thread that made the shift."""
        made = [self.delta, self.start, self.stop]
        return made if self.any_token is None else [*made, self.any_token]

    @classmethod
    def of(cls, delta: mx.array, spans: Sequence[Span]) -> "Shift":
        start, stop, step_ends = zip(*spans, strict=True)
        bounds = (mx.array(bound, dtype=mx.int32)[:, None, None] for bound in (start, stop))
        any_token = None
        if any(step_ends):
            any_token = mx.array([not one for one in step_ends])[:, None, None]
        return cls(delta, tuple(spans), *bounds, any_token)

    @classmethod
    def stack(cls, rows: Sequence["Shift | None"]) -> "Shift | None":
        """Join single-row shifts; ``None`` if no row is steered."""
        steered = [row for row in rows if row is not None]
        if not steered:
            return None
        zero = mx.zeros_like(steered[0].delta)
        delta = mx.concatenate([zero if row is None else row.delta for row in rows])
        return cls.of(delta, [EVERYWHERE if row is None else row.spans[0] for row in rows])

    def where(
        self, offset: int | mx.array, length: int, step_ends: mx.array | None = None
    ) -> bool | mx.array:
        """Tell which of ``length`` tokens from position ``offset`` on are steered.

        Return ``True`` for all, ``False`` for none; else the int32 positions ``(rows, length, 1)``
        to compare with the bounds, or with ``needs_tokens`` a bool mask ``(rows, length, 1)``.

        Args:
            offset: how many tokens the cache holds already, one number or ``(rows,)``: call this
                before attention, which advances it.
            step_ends: with ``needs_tokens``, which tokens end a step, bool ``(rows, length)``.
        """
        if self.everywhere:
            return True
        if isinstance(offset, int) and len(self.spans) == 1:  # no mask where none is needed
            start, stop, _ = self.spans[0]
            if offset + length <= start or stop <= offset:
                return False
            if start <= offset and offset + length <= stop:
                return step_ends[..., None] if self.needs_tokens else True
        at = mx.array(offset).reshape(-1, 1, 1)
        at = at if length == 1 else at + mx.arange(length)[None, :, None]
        if not self.needs_tokens:
            return at
        within = mx.logical_and(at >= self.start, at < self.stop)
        return mx.logical_and(within, mx.logical_or(step_ends[..., None], self.any_token))

    def add_alone(self, h: mx.array, where: bool | mx.array) -> mx.array:
        """Return ``h``, plus ``delta`` at the steered positions; shapes as in ``add``.

        ``add_alone(h + r, where)`` is ``add(h, r, where)``, bit for bit. ``h`` is a block's unsteered
        output; ``Prefix`` steers one that it kept again with this.
        """
        if where is True:
            return _add_alone(h, self.delta)
        if where is False:
            return h
        return self._add_some(h, mx.zeros((), h.dtype), where)

    def add(self, h: mx.array, r: mx.array, where: bool | mx.array) -> mx.array:
        """Return ``h + r``, plus ``delta`` at the steered positions.

        ``h``, ``r`` and the result are ``(rows, tokens, hidden)`` in the model's dtype. ``h + r``
        is first rounded to that dtype, as the stock block's output is, then ``delta`` is added in
        float32. So ``add_alone`` can steer a kept residual stream later, exactly.
        """
        if where is True:
            return _add(h, r, self.delta)
        if where is False:
            return h + r
        return self._add_some(h, r, where)

    def _add_some(self, h: mx.array, r: mx.array, where: mx.array) -> mx.array:
        if self.needs_tokens:
            return _add_where(h, r, self.delta, where)
        return _add_within(h, r, self.delta, where, self.start, self.stop)


class _Carrier:
    """Base of the steered caches: holds the shift, and raises if a stock block would ignore it."""

    shift: Shift | None = None
    expecting = False  # set by a steered block while it updates the cache
    step_ends: mx.array | None = None  # which of the tokens to come end a step, (rows, tokens)
    record: Record | None = None

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> tuple:
        if self.shift is not None and not self.expecting:
            raise SteeringError(
                "a steered cache was used by a block that does not steer: the model is not "
                "patched, or was restored. Call make_cache(model, steering) for this model."
            )
        return super().update_and_fetch(keys, values)  # type: ignore[misc]


class SteeredKVCache(_Carrier, KVCache):
    """mlx-lm's ``KVCache`` of one sequence at one layer, with its shift."""

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
    """A ``SteeredKVCache`` with quantised keys and values (mlx-lm's ``kv_bits``)."""


class SteeredBatchKVCache(_Carrier, BatchKVCache):
    """mlx-lm's ``BatchKVCache``; every row has its own shift, or none."""

    def __init__(self, left_padding: list[int]):
        super().__init__(left_padding)
        self._rows: list[Shift | None] = [None] * len(left_padding)

    def _carry(self, rows: list[Shift | None]) -> None:
        self._rows = rows
        self.shift = Shift.stack(rows)

    @classmethod
    def merge(cls, caches: Sequence[KVCache]) -> "SteeredBatchKVCache":
        merged = super().merge(caches)
        merged.__class__ = cls  # if all caches are empty, BatchKVCache.merge returns a BatchKVCache
        merged._carry([getattr(cache, "shift", None) for cache in caches])
        return merged

    def filter(self, batch_indices: Sequence[int] | mx.array) -> None:
        super().filter(batch_indices)
        indices = batch_indices.tolist() if isinstance(batch_indices, mx.array) else batch_indices
        self._carry([self._rows[i] for i in indices])

    def take(self, rows: Sequence[int]) -> "SteeredBatchKVCache":
        """Return a cache of some rows, in this order; a row may occur several times."""
        taken = copy.copy(self)
        taken.filter(rows)  # makes new arrays
        return taken

    def extend(self, other: BatchKVCache) -> None:
        theirs = getattr(other, "_rows", None) or [None] * other.offset.shape[0]
        super().extend(other)
        self._carry(self._rows + theirs)

    def extract(self, idx: int) -> SteeredKVCache:
        extracted = SteeredKVCache(self._rows[idx])
        extracted.__dict__.update(super().extract(idx).__dict__)
        return extracted


class Reading:
    """In place of a block's cache for one reading from the first token on: keeps nothing."""

    offset = 0
    expecting = False

    def __init__(self, shift: Shift | None = None, record: Record | None = None):
        self.shift, self.record = shift, record
        self.step_ends: mx.array | None = None

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> tuple[mx.array, mx.array]:
        return keys, values


class Passed(KVCache):
    """In place of a block's cache: the block computes nothing, and passes its input on.

    With ``output`` it returns that instead, as if the block had computed it, and ``shift`` steers it. So a
    network's own forward pass continues from a stream that was kept.

    Args:
        offset: the position of the first token.
        output: ``(rows, tokens, hidden)``, unsteered.
    """

    def __init__(self, offset: int = 0, output: mx.array | None = None, shift: Shift | None = None):
        super().__init__()
        self.offset, self.output, self.shift = offset, output, shift
        self.step_ends: mx.array | None = None

    def instead(self, _block: nn.Module, x: mx.array, _mask: mx.array | str | None) -> mx.array:
        """Return what a steered block returns instead of its own output."""
        if self.output is None:
            return x
        if self.shift is None:
            return self.output
        where = where_in(self, self.offset, self.output.shape[1])
        return self.shift.add_alone(self.output, where)


def note_step_ends(caches: Sequence[KVCache], tokens: mx.array, step_ends: StepEnds) -> None:
    """Tell the caches that need it which of ``tokens``, ``(rows, tokens)``, end a step.

    The tokens go through the blocks next. The look-up is lazy: nothing waits for the device.
    """
    shifts = [(cache, getattr(cache, "shift", None)) for cache in caches]
    if curious := [cache for cache, shift in shifts if shift is not None and shift.needs_tokens]:
        found = step_ends.table[tokens]
        for cache in curious:
            cache.step_ends = found


def where_in(cache: KVCache, offset: int | mx.array, length: int) -> bool | mx.array:
    """Return ``Shift.where`` of the next ``length`` tokens for a cache that holds a shift.

    Raises:
        SteeringError: the shift needs to know which of them end a step, and nothing told the cache.
    """
    step_ends = None
    if cache.shift.needs_tokens:
        step_ends, cache.step_ends = cache.step_ends, None  # of these tokens only
        if step_ends is None or step_ends.shape[-1] != length:
            raise SteeringError(
                "positions 'steps' need the token ids: call the patched network with them, not its "
                "blocks or embeddings alone."
            )
    return cache.shift.where(offset, length, step_ends)


def token_bytes(network: nn.Module) -> int:
    """Return how many bytes the keys and values of one token take, in the network's dtype."""
    shapes = (shape for layer in cache_shapes(network) for shape in layer)
    return sum(math.prod(shape) for shape in shapes) * stream_dtype(network).size


def clear_buffers() -> None:
    """Free the buffers that mlx keeps for later arrays if they are large: to allocate others takes time."""
    if mx.get_cache_memory() > KEPT_BUFFERS:
        mx.clear_cache()


def twin_of(cache: KVCache) -> KVCache:
    """Return a copy of a cache of one sequence, quantised or not.

    Both share what is computed so far; filling, trimming or steering one does not change the other.
    """
    twin = copy.copy(cache)
    twin.record = None
    if cache.keys is not None:
        # A cache writes new keys into its array object in place, so the twin needs its own objects.
        twin.keys, twin.values = tree_map(
            lambda a: a[..., : cache.offset, :], (cache.keys, cache.values)
        )
    return twin
