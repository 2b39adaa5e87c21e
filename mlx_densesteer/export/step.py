"""The steered decode step as a pure function of arrays, which mlx can trace into a file.

The strength comes in as an array and the KV cache goes in and out, so nothing is left to
Python. The blocks are the patched ones: a cache whose shift is made from the traced strength
steers them as any other does.

Not covered: more than one sequence.
"""

from collections.abc import Callable, Mapping

import mlx.core as mx
import mlx.nn as nn

from ..model.cache import EVERYWHERE, Shift
from ..model.likelihood import head_of

Step = Callable[..., tuple[mx.array, ...]]


class FixedCache:
    """Keys and values of one layer in arrays of a fixed length.

    mlx-lm's ``KVCache`` grows with a Python number; here the write position is an array, and
    the mask hides what was not written yet.

    Args:
        keys, values: ``(1, kv_heads, capacity, head_dim)``.
        position: where the next token goes, int32 ``()``.
        shift: what the layer adds to the residual stream, or ``None``.
    """

    expecting = False  # set by SteeredBlock; there is no block here that does not steer

    def __init__(self, keys: mx.array, values: mx.array, position: mx.array, shift: Shift | None):
        self.keys, self.values = keys, values
        self.offset, self.shift = position, shift

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> tuple[mx.array, mx.array]:
        start = self.offset.reshape(1)
        self.keys = mx.slice_update(self.keys, keys, start, axes=(2,))
        self.values = mx.slice_update(self.values, values, start, axes=(2,))
        return self.keys, self.values

    def make_mask(self, count: int, **_: object) -> mx.array:
        """Return which of the ``capacity`` positions each of ``count`` new tokens sees."""
        return mx.arange(self.keys.shape[2]) <= self.offset + mx.arange(count)[:, None]


def next_logits(model: nn.Module, tokens: mx.array, caches: list) -> mx.array:
    """Read ``tokens``, ``(1, count)``, and return the logits after the last, ``(1, vocabulary)``."""
    return head_of(model)(model.model(tokens, caches)[:, -1:])[:, 0]


def steered_step(model: nn.Module, vectors: Mapping[int, mx.array], capacity: int) -> Step:
    """Return ``step(tokens, position, strength, *cache) -> (logits, *cache)``.

    ``cache`` is keys and values of layer 0, of layer 1, ...; see ``FixedCache``. ``tokens`` is
    int32 ``(1, count)``, ``position`` int32 ``()``, ``strength`` float32 ``()``. A position with
    no room for the tokens gives logits that are all NaN, and never writes outside the cache.

    Args:
        vectors: float32 ``(1, 1, hidden)`` for each steered layer.
    """

    def step(
        tokens: mx.array, position: mx.array, strength: mx.array, *cache: mx.array
    ) -> tuple[mx.array, ...]:
        at = mx.clip(position, 0, capacity - tokens.shape[1])
        caches = []
        for layer, (keys, values) in enumerate(zip(cache[::2], cache[1::2], strict=True)):
            shift = None
            if layer in vectors:
                shift = Shift.of(strength * vectors[layer], [EVERYWHERE])
            caches.append(FixedCache(keys, values, at, shift))
        logits = next_logits(model, tokens, caches)
        logits = mx.where(at == position, logits, mx.array(float("nan"), logits.dtype))
        return logits, *(array for one in caches for array in (one.keys, one.values))

    return step


def empty_cache(model: nn.Module, capacity: int) -> list[mx.array]:
    """Return zeros for keys and values of every layer, in the stream's dtype."""
    args = model.args
    shape = (
        1, args.num_key_value_heads, capacity, args.hidden_size // args.num_attention_heads,
    )  # fmt: skip
    dtype = model.model.norm.weight.dtype
    return [mx.zeros(shape, dtype) for _ in range(2 * args.num_hidden_layers)]
