"""The KV caches that hold the steering.

Keys and values are valid only for the steering under which they were computed. So the cache of a
layer holds its steering: a ``Shift``, which is ``lambda * v`` for each row and the positions where
it is added.

Some places depend on the tokens: on each one alone, or on where the answer's thought or its last tool call
is. A cache then has to be told the tokens (``note_tokens``). It keeps the positions of the two marks. Those at
or after its length are of tokens that were taken back, and are looked for anew.

Not covered: rotating caches, mlx-lm's saved prompt caches, more than one range of positions, and taking back
the beginning of a tool call together with the end of the one before it (so no gate at calls goes with a draft).
"""

import copy
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from typing import NamedTuple

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_map
from mlx_lm.models.cache import BatchKVCache, KVCache, QuantizedKVCache

from ..errors import SteeringError
from ..steering.places import EVERYWHERE, FOREVER, Span, Thought
from .families import cache_shapes, stream_dtype
from .marks import Marks

KEPT_BUFFERS = 2**28  # bytes
_MARKS = ("steps", "think", "answer")  # of ``Span.mark``
# Called with the first position and a block's unsteered output, ``(rows, tokens, hidden)``.
Record = Callable[[int, mx.array], None]
KeysValues = tuple[mx.array, mx.array]


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


@partial(mx.compile, shapeless=True)
def _add_two(
    h: mx.array, r: mx.array, delta: mx.array, late: mx.array, mask: mx.array, over: mx.array
) -> mx.array:
    added = mx.where(over, late, mx.where(mask, delta, 0.0))
    return ((h + r).astype(mx.float32) + added).astype(h.dtype)


class Marked(NamedTuple):
    """Which tokens are steered, bool ``(rows, tokens, 1)``; ``over``: those that exceed a thinking budget."""

    within: mx.array
    over: mx.array | None


Where = bool | mx.array | Marked


class Bounds(NamedTuple):
    """The positions of marks in each row, int32 ``(rows, 1)``.

    ``opened`` and ``closed`` are those of the thought, ``FOREVER`` for none yet; ``called`` and ``returned``
    those of the last tool call, -1 for none yet.
    """

    opened: mx.array
    closed: mx.array
    called: mx.array
    returned: mx.array


_NO_BOUNDS = (FOREVER, FOREVER, -1, -1)


class _Rows(NamedTuple):
    """What depends on tokens in each row: bools and int32 ``(rows, 1)``; the three flags are of any row."""

    any_steps: bool
    any_thought: bool
    any_calls: bool
    steps: mx.array
    think: mx.array
    answer: mx.array
    begin: mx.array
    opened: mx.array
    closed: mx.array
    budget: mx.array
    calls: mx.array

    @classmethod
    def of(cls, spans: Sequence[Span]) -> "_Rows":
        thoughts = [span.thought or Thought(FOREVER) for span in spans]
        marks = [mx.array([span.mark == one for span in spans])[:, None] for one in _MARKS]
        numbers = (
            mx.array(column, dtype=mx.int32)[:, None] for column in zip(*thoughts, strict=True)
        )
        return cls(
            any(span.mark == "steps" for span in spans),
            any(span.thought for span in spans),
            any(span.calls != FOREVER for span in spans),
            *marks,
            *numbers,
            mx.array([span.calls for span in spans], dtype=mx.int32)[:, None],
        )


@dataclass(frozen=True)
class Shift:
    """What one layer adds to the residual stream of each row of a batch.

    ``delta`` is ``lambda * v``, float32 ``(rows, 1, hidden)``, zero for an unsteered row. ``late`` is the same
    for tokens of a thought beyond its budget; ``None`` if no row has one. ``start`` and ``stop`` are int32
    ``(rows, 1, 1)``. ``rows`` is ``None`` where no token matters.
    """

    delta: mx.array
    spans: tuple[Span, ...]
    start: mx.array
    stop: mx.array
    late: mx.array | None = None
    rows: _Rows | None = None

    @cached_property
    def everywhere(self) -> bool:
        """Whether every row is steered at every position."""
        return all(span == EVERYWHERE for span in self.spans)

    @property
    def needs_tokens(self) -> bool:
        """Whether ``where`` has to know the tokens."""
        return self.rows is not None

    @property
    def arrays(self) -> list[mx.array]:
        """What has to be evaluated on the thread that made the shift."""
        made = [self.delta, self.start, self.stop, *(self.rows or ())]
        return [one for one in (*made, self.late) if isinstance(one, mx.array)]

    @classmethod
    def of(cls, delta: mx.array, spans: Sequence[Span], late: mx.array | None = None) -> "Shift":
        bounds = (
            mx.array([getattr(span, name) for span in spans], dtype=mx.int32)[:, None, None]
            for name in ("start", "stop")
        )
        marked = any(span.mark or span.thought or span.calls != FOREVER for span in spans)
        return cls(delta, tuple(spans), *bounds, late, _Rows.of(spans) if marked else None)

    @classmethod
    def stack(cls, rows: Sequence["Shift | None"]) -> "Shift | None":
        """Join single-row shifts; ``None`` if no row is steered."""
        steered = [row for row in rows if row is not None]
        if not steered:
            return None
        zero = mx.zeros_like(steered[0].delta)
        delta = mx.concatenate([zero if row is None else row.delta for row in rows])
        late = None
        if any(row.late is not None for row in steered):
            late = mx.concatenate(
                [zero if row is None or row.late is None else row.late for row in rows]
            )
        spans = [EVERYWHERE if row is None else row.spans[0] for row in rows]
        return cls.of(delta, spans, late)

    def where(self, offset: int | mx.array, length: int) -> bool | mx.array:
        """Tell which of ``length`` tokens from position ``offset`` on are steered, whatever they are.

        Return ``True`` for all, ``False`` for none; else the int32 positions ``(rows, length, 1)``
        to compare with the bounds.

        Args:
            offset: how many tokens the cache holds already, one number or ``(rows,)``: call this
                before attention, which advances it.
        """
        if self.everywhere:
            return True
        if isinstance(offset, int) and len(self.spans) == 1:  # no mask where none is needed
            start, stop = self.spans[0][:2]
            if offset + length <= start or stop <= offset:
                return False
            if start <= offset and offset + length <= stop:
                return True
        return _positions(offset, length)[..., None]

    def marked(
        self, tokens: mx.array, offset: int | mx.array, before: Bounds | None, marks: Marks
    ) -> tuple[Marked, Bounds | None]:
        """Tell which tokens are steered, of a shift that ``needs_tokens``, and where the marks are now.

        Args:
            tokens: the ids, ``(rows, tokens)``.
            offset: as in ``where``.
            before: where the marks were after the last call.
        """
        rows, at = self.rows, _positions(offset, tokens.shape[1])
        within = mx.logical_and(at >= self.start[..., 0], at < self.stop[..., 0])
        over, bounds = None, None
        if rows.any_steps:
            ends = marks.step_end_table[tokens]
            within = mx.logical_and(within, mx.logical_or(ends, mx.logical_not(rows.steps)))
        if rows.any_thought or rows.any_calls:
            bounds = before or Bounds(
                *(mx.full(rows.opened.shape, one, mx.int32) for one in _NO_BOUNDS)
            )
        if rows.any_calls:
            inside, bounds = _calls(tokens, at, rows.calls, bounds, marks.call)
            within = mx.logical_and(within, mx.logical_not(inside))
        if rows.any_thought:
            bounds = self._thoughts(tokens, at, bounds, marks.thought)
            inside = mx.logical_and(at >= bounds.opened, at < bounds.closed)
            within = mx.logical_and(within, mx.logical_or(inside, mx.logical_not(rows.think)))
            within = mx.logical_and(within, mx.logical_not(mx.logical_and(inside, rows.answer)))
            if self.late is not None:
                over = mx.logical_and(inside, at - bounds.opened >= rows.budget)[..., None]
        return Marked(within[..., None], over), bounds

    def _thoughts(
        self, tokens: mx.array, at: mx.array, before: Bounds, marks: tuple[int, int]
    ) -> Bounds:
        rows, (opens, closes) = self.rows, marks
        opened, closed = (
            mx.minimum(known, _kept(held, at, FOREVER))
            for known, held in ((rows.opened, before.opened), (rows.closed, before.closed))
        )
        opening = mx.logical_and(tokens == opens, at >= rows.begin)
        opened = mx.minimum(opened, _first(opening, at))
        closing = mx.logical_and(tokens == closes, at > opened)
        return before._replace(opened=opened, closed=mx.minimum(closed, _first(closing, at)))

    def add_alone(self, h: mx.array, where: Where) -> mx.array:
        """Return ``h``, plus ``delta`` at the steered positions; shapes as in ``add``.

        ``add_alone(h + r, where)`` is ``add(h, r, where)``, bit for bit. ``h`` is a block's unsteered
        output; ``Prefix`` steers one that it kept again with this.
        """
        if where is True:
            return _add_alone(h, self.delta)
        if where is False:
            return h
        return self._add_some(h, mx.zeros((), h.dtype), where)

    def add(self, h: mx.array, r: mx.array, where: Where) -> mx.array:
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

    def _add_some(self, h: mx.array, r: mx.array, where: mx.array | Marked) -> mx.array:
        if not isinstance(where, Marked):
            return _add_within(h, r, self.delta, where, self.start, self.stop)
        if where.over is None:
            return _add_where(h, r, self.delta, where.within)
        return _add_two(h, r, self.delta, self.late, *where)


def _positions(offset: int | mx.array, length: int) -> mx.array:
    """Return the positions of ``length`` tokens from ``offset`` on, int32 ``(rows, length)``."""
    at = mx.array(offset).reshape(-1, 1)
    return at if length == 1 else at + mx.arange(length)[None]


def _first(found: mx.array, at: mx.array) -> mx.array:
    """Return the first position of each row at which ``found`` is true, ``FOREVER`` for none, ``(rows, 1)``."""
    return mx.where(found, at, FOREVER).min(axis=1, keepdims=True)


def _kept(held: mx.array, at: mx.array, none: int) -> mx.array:
    """Return positions, without those of tokens that were taken back: the next tokens are at ``at``."""
    return mx.where(held < at[:, :1], held, none)


def _calls(
    tokens: mx.array, at: mx.array, start: mx.array, before: Bounds, marks: tuple[int, int]
) -> tuple[mx.array, Bounds]:
    """Tell which tokens are in a tool call, bool ``(rows, tokens)``, and where the marks are now.

    A mark counts from position ``start`` on, ``(rows, 1)``; an opening one in a call, and a closing one outside,
    leave no trace.
    """
    called, returned = (_kept(held, at, -1) for held in (before.called, before.returned))
    begins, ends = (mx.where(mx.logical_and(tokens == mark, at >= start), at, -1) for mark in marks)
    inside = mx.maximum(called, mx.cummax(begins, axis=1)) > mx.maximum(
        returned, mx.cummax(ends, axis=1)
    )
    was = mx.concatenate([called > returned, inside[:, :-1]], axis=1)
    called = mx.maximum(called, mx.where(was, -1, begins).max(axis=1, keepdims=True))
    returned = mx.maximum(returned, mx.where(was, ends, -1).max(axis=1, keepdims=True))
    return inside, before._replace(called=called, returned=returned)


class _Carrier:
    """Base of the steered caches: holds the shift, and raises if a stock block would ignore it."""

    shift: Shift | None = None
    expecting = False  # set by a steered block while it updates the cache
    noted: Marked | None = None  # of the tokens to come
    bounds: tuple[Shift, Bounds | None] | None = None  # where the marks are, under which shift
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
        quantized.shift, quantized.bounds = self.shift, self.bounds
        return quantized


class SteeredQuantizedKVCache(_Carrier, QuantizedKVCache):
    """A ``SteeredKVCache`` with quantised keys and values (mlx-lm's ``kv_bits``)."""


class SteeredBatchKVCache(_Carrier, BatchKVCache):
    """mlx-lm's ``BatchKVCache``; every row has its own shift, or none."""

    def __init__(self, left_padding: list[int]):
        super().__init__(left_padding)
        self._rows: list[Shift | None] = [None] * len(left_padding)

    def _carry(self, rows: list[Shift | None], bounds: Sequence[Bounds | None]) -> None:
        """Take the rows' own shifts, and where their marks are as far as that is known."""
        self._rows, self.shift = rows, Shift.stack(rows)
        self.bounds = None
        if self.shift is not None and any(bounds):
            none = [mx.full((1, 1), one, dtype=mx.int32) for one in _NO_BOUNDS]
            columns = zip(*(one or none for one in bounds), strict=True)
            self.bounds = self.shift, Bounds(*(mx.concatenate(column) for column in columns))

    def _bounds(self) -> list[Bounds | None]:
        """Return where the marks of each row are."""
        found = bounds_in(self)
        if found is None:
            return [None] * len(self._rows)
        return [Bounds(*(one[row : row + 1] for one in found)) for row in range(len(self._rows))]

    @classmethod
    def merge(cls, caches: Sequence[KVCache]) -> "SteeredBatchKVCache":
        merged = super().merge(caches)
        merged.__class__ = cls  # if all caches are empty, BatchKVCache.merge returns a BatchKVCache
        merged._carry(
            [getattr(cache, "shift", None) for cache in caches], [*map(bounds_in, caches)]
        )
        return merged

    def filter(self, batch_indices: Sequence[int] | mx.array) -> None:
        super().filter(batch_indices)
        indices = batch_indices.tolist() if isinstance(batch_indices, mx.array) else batch_indices
        bounds = self._bounds()
        self._carry([self._rows[i] for i in indices], [bounds[i] for i in indices])

    def take(self, rows: Sequence[int]) -> "SteeredBatchKVCache":
        """Return a cache of some rows, in this order; a row may occur several times."""
        taken = copy.copy(self)
        taken.filter(rows)  # makes new arrays
        return taken

    def extend(self, other: BatchKVCache) -> None:
        theirs = getattr(other, "_rows", None) or [None] * other.offset.shape[0]
        bounds = [None] * len(theirs)
        if isinstance(other, SteeredBatchKVCache):
            bounds = other._bounds()
        super().extend(other)
        self._carry(self._rows + theirs, self._bounds() + bounds)

    def extract(self, idx: int) -> SteeredKVCache:
        extracted = SteeredKVCache(self._rows[idx])
        extracted.__dict__.update(super().extract(idx).__dict__)
        if (bounds := self._bounds()[idx]) and extracted.shift:
            extracted.bounds = extracted.shift, bounds
        return extracted


class Reading:
    """In place of a block's cache for one reading: keeps nothing.

    Args:
        before: the keys and values of earlier tokens, ``(1, heads, tokens, head size)``; without them the
            reading begins with the first token.
    """

    expecting = False

    def __init__(
        self,
        shift: Shift | None = None,
        record: Record | None = None,
        before: KeysValues | None = None,
    ):
        self.shift, self.record, self._before = shift, record, before
        self.noted: Marked | None = None
        self.offset = before[0].shape[2] if before else 0

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> KeysValues:
        if self._before is None:
            return keys, values
        return tuple(
            mx.concatenate([held, new], axis=2)
            for held, new in zip(self._before, (keys, values), strict=True)
        )

    make_mask = KVCache.make_mask


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
        self.noted: Marked | None = None

    def instead(self, _block: nn.Module, x: mx.array, _mask: mx.array | str | None) -> mx.array:
        """Return what a steered block returns instead of its own output."""
        if self.output is None:
            return x
        if self.shift is None:
            return self.output
        where = where_in(self, self.offset, self.output.shape[1])
        return self.shift.add_alone(self.output, where)


def bounds_in(cache: KVCache) -> Bounds | None:
    """Return where the marks in a cache are; ``None`` if nothing was noted under its present shift."""
    shift, bounds = getattr(cache, "bounds", None) or (None, None)
    return bounds if shift is not None and shift is cache.shift else None


def note_tokens(caches: Sequence[KVCache], tokens: mx.array, marks: Marks | None) -> None:
    """Tell the caches that need it which of ``tokens``, ``(rows, tokens)``, are steered.

    The tokens go through the blocks next. All is lazy: nothing waits for the device. Layers that are steered
    at the same places share what is found.
    """
    if marks is None:
        return
    found: dict[tuple, tuple[Marked, Bounds | None]] = {}
    for cache in caches:
        shift = getattr(cache, "shift", None)
        if shift is None or not shift.needs_tokens:
            continue
        before = bounds_in(cache)
        alike = shift.spans, shift.late is None, id(before)
        if alike not in found:
            offset = getattr(cache, "offset", 0)
            found[alike] = shift.marked(tokens, offset, before, marks)
            if (bounds := found[alike][1]) and tokens.shape[1] > 1:
                mx.async_eval(*bounds)  # here: another thread may go on
        cache.noted, bounds = found[alike]
        cache.bounds = shift, bounds


def where_in(cache: KVCache, offset: int | mx.array, length: int) -> Where:
    """Return where the next ``length`` tokens are steered, for a cache that holds a shift.

    Raises:
        SteeringError: the shift needs to know the tokens, and nothing told the cache.
    """
    if not cache.shift.needs_tokens:
        return cache.shift.where(offset, length)
    noted, cache.noted = cache.noted, None  # of these tokens only
    if noted is None or noted.within.shape[1] != length:
        raise SteeringError(
            "positions that depend on tokens, such as 'steps' and 'think', and a thinking budget need the "
            "token ids: call the patched network with them, not its blocks or embeddings alone."
        )
    return noted


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
