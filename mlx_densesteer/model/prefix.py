"""The KV caches of one sequence under one steering; both can change.

When the steering of layer l changes, the keys and values of the layers up to l stay valid: block l
computes them from its input, and the vector is added at its output. So ``Prefix`` keeps the
unsteered residual stream at the lowest steered layer, and computes only the layers above it again.

An exact ``Prefix`` reads every chunk of tokens as a whole. So the caches depend only on the chunks and
the steering: bit for bit, they are those of a new one. One that is not exact takes every token that it
holds, decoded ones too: its keys and values are equal up to the rounding of products of other shapes.

Not covered: rotating caches, which cannot be cut back, and pipeline parallelism.
"""

import copy
from collections.abc import Generator, Iterator, Sequence
from itertools import takewhile
from typing import NamedTuple

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models.cache import KVCache

from ..errors import SteeringError
from ..steering.places import FOREVER
from ..steering.steering import Steering
from ..text import cause
from .block import Added, additions, patch
from .cache import (
    Passed,
    Shift,
    SteeredKVCache,
    SteeredQuantizedKVCache,
    clear_buffers,
    twin_of,
)
from .families import cache_shapes, decoder_blocks
from .marks import marks_of
from .prompt import check_ids

NO_TOKEN = -1
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
        network: a text model of mlx-lm; its blocks are patched.
        keep_bytes: how much of the residual stream to keep for re-steering, in bytes; a token takes
            ``hidden_size`` numbers of the model's dtype. 0 keeps nothing.
        kv_bits: quantise keys and values to 4 or 8 bits.
        exact: reuse whole chunks only, and nothing that was decoded.

    Raises:
        SteeringError: keys and values of this model cannot be quantised so.
    """

    def __init__(
        self,
        network: nn.Module,
        *,
        keep_bytes: int = 0,
        kv_bits: int | None = None,
        exact: bool = True,
    ):
        self.network, self._exact = patch(network), exact
        self._blocks = list(decoder_blocks(network).values())
        self._keep_bytes = keep_bytes
        self._quantization = _quantization(network, kv_bits)
        self.reset()

    @property
    def length(self) -> int:
        """The number of tokens that were read."""
        return sum(len(chunk.tokens) for chunk in self._chunks)

    def with_caches(self, caches: Sequence[KVCache], steering: Steering | None) -> "Prefix":
        """Return a copy with other caches; its tokens are the first ones that they hold.

        All that they hold was computed under ``steering``. The kept stream is shared, unsteered as it is.
        """
        twin = self._with(caches)
        twin._plan = _Plan.of(self.network, steering)
        return twin

    @property
    def residual_tokens(self) -> int:
        """The number of tokens, from the first on, of which the residual stream is kept."""
        return sum(h.shape[1] for h in self._residual)

    @property
    def residual_bytes(self) -> int:
        """Bytes of the kept residual stream."""
        return sum(h.nbytes for h in self._residual)

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
        self._chunks: list[Chunk] = []  # the last one may be the beginning of one
        self._plan = _Plan({}, None)
        self._captured: int | None = None
        # The unsteered output of layer _captured at the first tokens, as pieces (1, tokens, hidden).
        self._residual: list[mx.array] = []
        # What the captured block put out since ``fill``, with the first position of each piece.
        self._recorded: list[tuple[int, mx.array]] = []
        self._begun = False  # whether the last chunk is the beginning of the answer

    def fill(
        self,
        chunks: Sequence[Chunk],
        steering: Steering | None,
        *,
        last: int = NO_TOKEN,
        answering: bool = False,
    ) -> Work:
        """Make the caches those of ``chunks`` under ``steering``, and reuse what is still valid.

        Leave the last token of the prompt out of ``chunks``: the caller feeds it to the caches, and
        then the answer. Name it as ``last``: it may open a thought. With ``answering`` the last chunk is already the beginning of that answer.
        The next call cuts off what the caller added, unless ``keep_decoded`` kept it. An exception, also
        Ctrl-C, leaves the prefix empty.

        Raises:
            InputError: a token that the model does not know; before anything is changed.
            VectorMismatchError, SteeringError: before anything is changed.
        """
        filling = self.filling(chunks, steering, last=last, answering=answering)
        while True:
            try:
                next(filling)
            except StopIteration as end:
                return end.value

    def filling(
        self,
        chunks: Sequence[Chunk],
        steering: Steering | None,
        *,
        last: int = NO_TOKEN,
        answering: bool = False,
    ) -> Generator[None, None, Work]:
        """Do what ``fill`` does, one chunk a step. Closing the iterator leaves the prefix empty."""
        tokens = [token for chunk in chunks for token in chunk.tokens]
        check_ids(tokens, self.network.args.vocab_size, "the prompt")
        plan = _Plan.of(self.network, steering)
        wanted = _not_empty(chunks)
        try:
            self._cut(self._common(wanted), wanted)
            changed = plan.differs(self._plan)
            again: list[Chunk] = []
            if changed and self._chunks:
                again = self._keep_below(min(changed))
            self._plan = plan
            if not self._chunks and not again and self._keep_bytes:
                self._captured = min(steering.layers) if steering and steering.layers else None
            work = 0
            for done in self._read_above(again):
                work += done
                yield
            for number, held in _unread(wanted, self.length):
                work += self._read(wanted, number, held)
                yield
            self._begun = answering and bool(wanted)
            *before, begun = wanted if self._begun else [*wanted, Chunk((last,), answer=True)]
            self._steer(begun, self.length - len(begun.tokens) * self._begun, before)
            self._record()
        except BaseException:
            self.reset()
            raise
        return Work(work, sum(len(chunk.tokens) for chunk in again))

    def keep_decoded(self, tokens: Sequence[int]) -> None:
        """Keep what the caller has fed to the caches since ``fill``, as tokens of an answer.

        Call this only if no step was interrupted. An exact prefix keeps nothing.

        Args:
            tokens: the last token of the prompt and the answer; what the caches do not hold of them, or
                hold after them, is left out.
        """
        if self._exact:
            return
        if self._begun:
            del self._chunks[-1]
            self._begun = False
        held = min(cache.offset for cache in self.caches) - self.length
        if tokens := tuple(tokens[: max(0, held)]):
            self._keep_recorded(self.length + len(tokens))
            self._chunks.append(Chunk(tokens, answer=True))
        self._cut(self.length, self._chunks)

    def common(self, chunks: Sequence[Chunk]) -> int:
        """Return how many tokens ``fill`` would not read again under the same steering."""
        return self._common(_not_empty(chunks))

    def cut(self, chunks: Sequence[Chunk]) -> None:
        """Keep the tokens with which ``chunks`` begins, and forget the others."""
        wanted = _not_empty(chunks)
        self._cut(self._common(wanted), wanted)

    def unread(self, chunks: Sequence[Chunk]) -> list[Chunk]:
        """Return the chunks of which ``fill`` would read at least a part."""
        wanted = _not_empty(chunks)
        return [wanted[number] for number, _ in _unread(wanted, self._common(wanted))]

    def fork(self) -> "Prefix":
        """Return a copy that shares what is computed; filling one does not change the other."""
        return self._with([twin_of(cache) for cache in self.caches])

    def _with(self, caches: Sequence[KVCache]) -> "Prefix":
        twin = copy.copy(self)
        twin.caches = list(caches)
        twin._chunks, twin._residual = list(self._chunks), list(self._residual)
        return twin

    def _common(self, wanted: Sequence[Chunk]) -> int:
        """Return with how many of the held tokens ``wanted`` begins: of whole chunks, if exact."""
        same = common_beginning(self._chunks, wanted)
        count = sum(len(chunk.tokens) for chunk in wanted[:same])
        if self._exact:
            return count
        # whatever is prompt or answer
        alike = self._plan.steering is None or self._plan.steering.is_everywhere
        ours, theirs = (_flat(chunks[same:], alike) for chunks in (self._chunks, wanted))
        equal = takewhile(lambda pair: pair[0] == pair[1], zip(ours, theirs, strict=False))
        return count + sum(1 for _ in equal)

    def _cut(self, count: int, wanted: Sequence[Chunk]) -> None:
        """Keep the first ``count`` tokens, with which ``wanted`` begins."""
        self._chunks = _first(wanted, count)
        self._residual = _slice(self._residual, 0, count)
        for cache in self.caches:
            cache.trim(cache.offset - count)
            cache.record = None
        self._recorded = []

    def _record(self) -> None:
        """Let block ``_captured`` record its unsteered output while the caller decodes."""
        whole = self._captured is not None and self.residual_tokens == self.length
        if whole and not self._exact and self.residual_bytes < self._keep_bytes:
            recorded = self._recorded
            self.caches[self._captured].record = lambda at, h: recorded.append((at, h))

    def _keep_recorded(self, end: int) -> None:
        """Keep the stream that was recorded while the caller decoded, up to token ``end``."""
        if not self._recorded:
            return
        start = stop = self._recorded[0][0]
        kept: list[mx.array] = []
        for at, h in self._recorded:
            while stop > at:  # a draft's tokens were taken back, and others follow
                last = kept.pop()
                stop -= last.shape[1]
                if stop < at:
                    kept.append(last[:, : at - stop])
                    stop = at
            kept.append(h)
            stop += h.shape[1]
        h = mx.concatenate(_slice(kept, 0, end - start), axis=1)
        self._residual = _slice(self._residual, 0, start)
        if self.residual_bytes + h.nbytes <= self._keep_bytes:
            mx.eval(h)
            self._residual.append(h)

    def _keep_below(self, changed: int) -> list[Chunk]:
        """Forget what depends on the steering at layer ``changed`` and above.

        Return the chunks to send through the blocks above the kept residual stream.
        """
        if self._captured is None or self._captured > changed or not self._residual:
            self.reset()
            return []
        self._cut(self.residual_tokens, self._chunks)
        again, self._chunks = self._chunks, []
        for layer in range(self._captured + 1, len(self._blocks)):
            self.caches[layer] = self._new_cache()
        return again

    def _read_above(self, chunks: Sequence[Chunk]) -> Iterator[int]:
        """Send the kept residual stream through the blocks above it; yield the work of each chunk."""
        if not chunks:
            return
        first = self._captured + 1
        for chunk in chunks:
            start = self.length
            self._steer(chunk, start, self._chunks)
            for tokens in pieces(chunk.tokens):
                kept = _slice(self._residual, start, start + len(tokens))
                h = kept[0] if len(kept) == 1 else mx.concatenate(kept, axis=1)
                below: list[KVCache] = [Passed(start) for _ in range(self._captured)]
                below.append(Passed(start, h, self.caches[self._captured].shift))
                self._send(tokens, [*below, *self.caches[first:]])
                start += len(tokens)
            self._chunks.append(chunk)
            yield len(chunk.tokens) * (len(self._blocks) - first)

    def _read(self, wanted: Sequence[Chunk], number: int, held: int) -> int:
        """Send a chunk without its first ``held`` tokens through all blocks.

        Keep its residual stream if ``keep_bytes`` allows it.
        """
        chunk = wanted[number]
        self._steer(chunk, self.length - held, wanted[:number])
        kept: list[mx.array] = []
        if self._captured is not None and self.residual_tokens == self.length:
            self.caches[self._captured].record = lambda _, h: kept.append(h)
        for tokens in pieces(chunk.tokens[held:]):
            self._send(tokens, self.caches, kept)
        if self._captured is not None:
            self.caches[self._captured].record = None
        if self.residual_bytes + sum(h.nbytes for h in kept) <= self._keep_bytes:
            self._residual += kept
        if held:
            del self._chunks[-1]
        self._chunks.append(chunk)
        return (len(chunk.tokens) - held) * len(self._blocks)

    def _send(
        self, tokens: Sequence[int], caches: Sequence[KVCache], kept: Sequence[mx.array] = ()
    ) -> None:
        """Send tokens through the network and fill its caches.

        Only the caches and ``kept`` are evaluated, so mlx does not compute the last block's MLP, nor
        what a ``Passed`` replaces.
        """
        self.network.model(mx.array([tokens]), caches)
        mx.eval([cache.state for cache in caches if cache.keys is not None], list(kept))
        clear_buffers()

    def _steer(self, chunk: Chunk, start: int, before: Sequence[Chunk]) -> None:
        """Set the shift of every cache for a chunk that begins at ``start``, after the chunks ``before``."""
        steering, made = self._plan.steering, self._plan.added
        for cache in self.caches:
            cache.shift = None
        if steering is None:
            return
        thought = (FOREVER, FOREVER)
        if chunk.answer and steering.needs_thought:
            marks = marks_of(self.network)
            prompt = (*(before[-1].tokens if before else ()), *chunk.tokens[:1])
            thought = marks.thought_in(chunk.tokens, start, opened=marks.opens_thought(prompt))
        span = steering.span_in_chunk(chunk.answer, start, thought)
        for layer, what in made.items():
            self.caches[layer].shift = Shift.of(what.delta, [span], what.late)
        shifts = [cache.shift for cache in self.caches if cache.shift]
        mx.eval([shift.arrays for shift in shifts])  # here, on the thread that made them

    def _new_cache(self) -> KVCache:
        if self._quantization is None:
            return SteeredKVCache()
        group_size, bits = self._quantization
        return SteeredQuantizedKVCache(group_size=group_size, bits=bits)


class _Plan(NamedTuple):
    """What is added at each steered layer, and the steering; ``None`` where nothing is added."""

    added: dict[int, Added]
    steering: Steering | None

    @classmethod
    def of(cls, network: nn.Module, steering: Steering | None) -> "_Plan":
        what = additions(network, steering)
        return cls(what, steering if what else None)

    def differs(self, other: "_Plan") -> list[int]:
        """Return the layers at which another plan adds something else, or elsewhere."""
        ours, theirs = (plan._by_layer() for plan in (self, other))
        return [k for k in {*ours, *theirs} if ours.get(k) != theirs.get(k)]

    def _by_layer(self) -> dict[int, tuple]:
        if self.steering is None:
            return {}
        where = self.steering.positions, self.steering.budget and self.steering.budget.tokens
        return {
            layer: (where, *(bytes(memoryview(one)) for one in what if one is not None))
            for layer, what in self.added.items()
        }


def _not_empty(chunks: Sequence[Chunk]) -> list[Chunk]:
    return [chunk for chunk in chunks if chunk.tokens]


def _unread(wanted: Sequence[Chunk], held: int) -> list[tuple[int, int]]:
    """Return the numbers of the chunks that are not among the first ``held`` tokens, and how many of theirs are."""
    found, start = [], 0
    for number, chunk in enumerate(wanted):
        end = start + len(chunk.tokens)
        if end > held:
            found.append((number, max(0, held - start)))
        start = end
    return found


def _first(chunks: Sequence[Chunk], count: int) -> list[Chunk]:
    """Return the chunks of the first ``count`` tokens; the last may be the beginning of one."""
    found = []
    for chunk in chunks:
        if count > 0:
            found.append(chunk._replace(tokens=chunk.tokens[:count]))
        count -= len(chunk.tokens)
    return found


def _flat(chunks: Sequence[Chunk], alike: bool) -> Iterator[tuple[int, bool, bool]]:
    """Yield every token, and its place in its chunk unless all tokens are steered ``alike``."""
    for chunk in chunks:
        answer = chunk.answer and not alike
        for number, token in enumerate(chunk.tokens):
            yield token, answer, answer and not number


def _slice(pieces: Sequence[mx.array], start: int, stop: int) -> list[mx.array]:
    """Return the tokens ``start <= token < stop`` of a stream in pieces ``(1, tokens, hidden)``."""
    found, at = [], 0
    for h in pieces:
        first, last = max(0, start - at), min(h.shape[1], stop - at)
        if last > first:
            found.append(h if last - first == h.shape[1] else h[:, first:last])
        at += h.shape[1]
    return found


def _quantization(network: nn.Module, bits: int | None) -> tuple[int, int] | None:
    """Return the group size and the bits of quantised keys and values."""
    if bits is None:
        return None
    widths = sorted({shape[-1] for layer in cache_shapes(network) for shape in layer})
    sizes = (64, 32)
    group_size = next((s for s in sizes if not any(width % s for width in widths)), None)
    if bits not in (4, 8) or group_size is None:
        shown = ", ".join(map(str, widths))
        raise SteeringError(
            f"{bits} bits for keys and values of width {shown}: expected 4 or 8 bits, and a width "
            "that is a multiple of 32. Leave kv_bits out."
        )
    caches = [
        SteeredQuantizedKVCache(group_size=group_size, bits=bits) for _ in decoder_blocks(network)
    ]
    try:
        network.model(mx.array([[0]]), caches)  # lazy: only the shapes are worked out
    except Exception as error:  # whatever a class of mlx-lm raises
        raise SteeringError(
            f"mlx-lm cannot quantise the keys and values of a {network.model_type} model "
            f"({cause(error)}). Leave kv_bits out."
        ) from error
    return group_size, bits
