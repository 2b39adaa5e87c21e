"""The KV caches of one sequence under one steering; both can change.

When the steering of layer l changes, the keys and values of the layers up to l stay valid: block l
computes them from its input, and the vector is added at its output. So ``Prefix`` keeps the
unsteered residual stream at the lowest steered layer, and computes only the layers above it again.

A chunk of tokens is always read as a whole. So the caches depend only on the chunks and the
steering: bit for bit, they are those of a new ``Prefix``.

Not covered: rotating caches, which cannot be cut back, and pipeline parallelism.
"""

import copy
from collections.abc import Generator, Iterator, Sequence
from typing import NamedTuple

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models.base import create_attention_mask
from mlx_lm.models.cache import KVCache

from ..errors import SteeringError
from ..steering.steering import Steering
from .block import decoder_blocks, deltas, patch
from .cache import (
    Shift,
    SteeredKVCache,
    SteeredQuantizedKVCache,
    note_step_ends,
    twin_of,
    where_in,
)
from .places import span_in_chunk
from .prompt import check_ids

STEP = 2048  # tokens that go through the blocks together at most


class Chunk(NamedTuple):
    """Tokens that are read together: part of a prompt, or an ``answer``.

    An answer's chunk begins with the last token of the question, whose output chose the first token
    of the answer.
    """

    tokens: tuple[int, ...]
    answer: bool = False


def common_beginning(a: Sequence[Chunk], b: Sequence[Chunk]) -> int:
    """Return how many leading chunks are equal."""
    same = 0
    while same < min(len(a), len(b)) and a[same] == b[same]:
        same += 1
    return same


def pieces(tokens: Sequence[int]) -> Iterator[Sequence[int]]:
    """Cut the tokens of a chunk into parts of at most ``STEP``."""
    for start in range(0, len(tokens), STEP):
        yield tokens[start : start + STEP]


class Work(NamedTuple):
    """What a ``fill`` computed.

    ``block_tokens`` is the sum over decoder blocks of the tokens that went through each.
    ``resteered`` counts the tokens that went through the upper blocks only.
    """

    block_tokens: int
    resteered: int


class Prefix:
    """The KV caches of one sequence, one for each decoder block.

    Args:
        network: a Qwen2 model of mlx-lm; its blocks are patched.
        keep_bytes: how much of the residual stream to keep for re-steering, in bytes; a token takes
            ``hidden_size`` numbers of the model's dtype. 0 keeps nothing.
        kv_bits: quantise keys and values to 4 or 8 bits.

    Raises:
        SteeringError: keys and values of this model cannot be quantised so.
    """

    def __init__(self, network: nn.Module, *, keep_bytes: int = 0, kv_bits: int | None = None):
        self.network = patch(network)
        self._blocks = list(decoder_blocks(network).values())
        self._keep_bytes = keep_bytes
        self._quantization = _quantization(network, kv_bits)
        self.reset()

    @property
    def length(self) -> int:
        """The number of tokens that were read."""
        return self._ends[-1] if self._ends else 0

    @property
    def residual_bytes(self) -> int:
        """Bytes of the kept residual stream."""
        return sum(h.nbytes for kept in self._residual for h in kept)

    @property
    def nbytes(self) -> int:
        """Bytes of the keys, the values and the kept residual stream."""
        return self.residual_bytes + sum(cache.nbytes for cache in self.caches)

    @property
    def captured(self) -> int | None:
        """The layer whose unsteered output is kept."""
        return self._captured if self._residual else None

    @property
    def chunks(self) -> tuple[Chunk, ...]:
        return tuple(self._chunks)

    def reset(self) -> None:
        """Forget everything."""
        self.caches: list[KVCache] = [self._new_cache() for _ in self._blocks]
        self._chunks: list[Chunk] = []
        self._ends: list[int] = []
        self._plan: dict[int, tuple[str, bytes]] = {}  # positions and delta of each steered layer
        self._deltas: dict[int, mx.array] = {}
        self._positions = "all"
        self._captured: int | None = None
        # The unsteered output of layer _captured, by chunk, as pieces (1, tokens, hidden).
        self._residual: list[list[mx.array]] = []

    def fill(
        self, chunks: Sequence[Chunk], steering: Steering | None, *, answering: bool = False
    ) -> Work:
        """Make the caches those of ``chunks`` under ``steering``, and reuse what is still valid.

        Leave the last token of the prompt out of ``chunks``: the caller feeds it to the caches, and
        then the answer. With ``answering`` the last chunk is already the beginning of that answer.
        The next call cuts off what the caller added. An exception, also Ctrl-C, leaves the prefix
        empty.

        Raises:
            InputError: a token that the model does not know; before anything is changed.
            VectorMismatchError, SteeringError: before anything is changed.
        """
        filling = self.filling(chunks, steering, answering=answering)
        while True:
            try:
                next(filling)
            except StopIteration as end:
                return end.value

    def filling(
        self, chunks: Sequence[Chunk], steering: Steering | None, *, answering: bool = False
    ) -> Generator[None, None, Work]:
        """Do what ``fill`` does, one chunk a step. Closing the iterator leaves the prefix empty."""
        made = deltas(self.network, steering)
        tokens = [token for chunk in chunks for token in chunk.tokens]
        check_ids(tokens, self.network.args.vocab_size, "the prompt")
        positions = steering.positions if steering else "all"
        plan = {layer: (positions, bytes(memoryview(delta))) for layer, delta in made.items()}
        wanted = [chunk for chunk in chunks if chunk.tokens]
        try:
            self._cut(common_beginning(self._chunks, wanted))
            changed = [k for k in {*plan, *self._plan} if plan.get(k) != self._plan.get(k)]
            again: list[Chunk] = []
            if changed and self._chunks:
                again = self._keep_below(min(changed))
            self._plan, self._deltas, self._positions = plan, made, positions
            if not self._chunks and not again and self._keep_bytes:
                self._captured = min(steering.layers) if steering and steering.layers else None
            work = 0
            for done in self._read_above(again):
                work += done
                yield
            for chunk in wanted[len(self._chunks) :]:
                work += self._read(chunk)
                yield
            begun = len(wanted[-1].tokens) if answering and wanted else 0
            self._steer(answer=True, start=self.length - begun)
        except BaseException:
            self.reset()
            raise
        return Work(work, sum(len(chunk.tokens) for chunk in again))

    def cut(self, chunks: Sequence[Chunk]) -> None:
        """Keep the chunks with which ``chunks`` begins, and forget the others."""
        self._cut(common_beginning(self._chunks, [chunk for chunk in chunks if chunk.tokens]))

    def fork(self) -> "Prefix":
        """Return a copy that shares what is computed; filling one does not change the other."""
        twin = copy.copy(self)
        twin.caches = [twin_of(cache) for cache in self.caches]
        twin._chunks, twin._ends = list(self._chunks), list(self._ends)
        twin._residual = list(self._residual)
        return twin

    def _cut(self, count: int) -> None:
        """Keep the first ``count`` chunks, and cut off everything after them."""
        del self._chunks[count:], self._ends[count:], self._residual[count:]
        for cache in self.caches:
            cache.trim(cache.offset - self.length)

    def _keep_below(self, changed: int) -> list[Chunk]:
        """Forget what depends on the steering at layer ``changed`` and above.

        Return the chunks to send through the blocks above the kept residual stream.
        """
        if self._captured is None or self._captured > changed or not self._residual:
            self.reset()
            return []
        self._cut(len(self._residual))
        again, self._chunks, self._ends = self._chunks, [], []
        for layer in range(self._captured + 1, len(self._blocks)):
            self.caches[layer] = self._new_cache()
        return again

    def _read_above(self, chunks: Sequence[Chunk]) -> Iterator[int]:
        """Send the kept residual stream through the blocks above it; yield the work of each chunk."""
        if not chunks:
            return
        first = self._captured + 1
        for chunk, kept in zip(chunks, self._residual, strict=True):
            start = self.length
            self._steer(answer=chunk.answer, start=start)
            for tokens, h in zip(pieces(chunk.tokens), kept, strict=True):
                self._tell(tokens)
                h = self._steered(self._captured, h, start)
                start += h.shape[1]
                self._blocks_from(first, h)
            self._add(chunk)
            yield len(chunk.tokens) * (len(self._blocks) - first)

    def _read(self, chunk: Chunk) -> int:
        """Send a chunk through all blocks, and keep its residual stream if ``keep_bytes`` allows it."""
        self._steer(answer=chunk.answer, start=self.length)
        keep = self._captured is not None and len(self._residual) == len(self._chunks)
        kept = []
        for tokens in pieces(chunk.tokens):
            h = self.network.model.embed_tokens(self._tell(tokens))
            kept.append(self._blocks_from(0, h, capture=keep))
        if keep and self.residual_bytes + sum(h.nbytes for h in kept) <= self._keep_bytes:
            self._residual.append(kept)
        self._add(chunk)
        return len(chunk.tokens) * len(self._blocks)

    def _blocks_from(self, first: int, h: mx.array, *, capture: bool = False) -> mx.array | None:
        """Fill the caches from block ``first`` on; return the unsteered output of layer ``_captured``.

        ``h`` is the input of block ``first``, ``(1, tokens, hidden)``. Only the caches are
        evaluated, so mlx does not compute the last block's MLP.
        """
        if first == len(self._blocks):
            return None
        kept = None
        start = self.caches[first].offset
        mask = create_attention_mask(h, self.caches[first])
        for layer in range(first, len(self._blocks)):
            block, cache = self._blocks[layer], self.caches[layer]
            if capture and layer == self._captured:
                shift, cache.shift = cache.shift, None
                kept = block(h, mask, cache)
                cache.shift = shift
                h = self._steered(layer, kept, start)
            else:
                h = block(h, mask, cache)
        mx.eval([cache.state for cache in self.caches[first:]], [] if kept is None else kept)
        mx.clear_cache()
        return kept

    def _steered(self, layer: int, h: mx.array, start: int) -> mx.array:
        cache = self.caches[layer]
        if cache.shift is None:
            return h
        return cache.shift.add_alone(h, where_in(cache, start, h.shape[1]))

    def _tell(self, tokens: Sequence[int]) -> mx.array:
        """Return the next tokens, ``(1, tokens)``, after telling the caches which end a step."""
        ids = mx.array([tokens])
        step_ends = getattr(self.network.model, "step_ends", None)
        if step_ends is not None:
            note_step_ends(self.caches, ids, step_ends)
        return ids

    def _add(self, chunk: Chunk) -> None:
        self._ends.append(self.length + len(chunk.tokens))
        self._chunks.append(chunk)

    def _steer(self, *, answer: bool, start: int) -> None:
        """Set the shift of every cache for a chunk that begins at ``start``."""
        span = span_in_chunk(self._positions, answer, start)
        for layer, cache in enumerate(self.caches):
            cache.shift = Shift.of(self._deltas[layer], [span]) if layer in self._deltas else None
        shifts = [cache.shift for cache in self.caches if cache.shift]
        mx.eval([shift.arrays for shift in shifts])  # here, on the thread that made them

    def _new_cache(self) -> KVCache:
        if self._quantization is None:
            return SteeredKVCache()
        group_size, bits = self._quantization
        return SteeredQuantizedKVCache(group_size=group_size, bits=bits)


def _quantization(network: nn.Module, bits: int | None) -> tuple[int, int] | None:
    """Return the group size and the bits of quantised keys and values."""
    if bits is None:
        return None
    width = network.args.hidden_size // network.args.num_attention_heads
    group_size = next((size for size in (64, 32) if width % size == 0), None)
    if bits not in (4, 8) or group_size is None:
        raise SteeringError(
            f"{bits} bits for keys and values of width {width}: expected 4 or 8 bits, and a width "
            "that is a multiple of 32. Leave kv_bits out."
        )
    return group_size, bits
