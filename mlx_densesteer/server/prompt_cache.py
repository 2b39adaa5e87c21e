"""Prompts that begin alike are read once for each steering, and answers are not read again.

An entry is found by the fingerprint of the steering under which it was read. An entry of another
steering gives the layers up to the lowest one that either steers (``model/prefix.py``). An answer that
was steered as its prompt is kept with it, for the next question of its conversation.

Of an exact cache, what is taken is bit for bit what reading the prompt again would give: equal
beginnings are cut into equal chunks, and no answer is kept.

Short prompts that come at the same time are read together instead (``PromptReading.rest``): that is
faster.
"""

from collections import OrderedDict
from collections.abc import Collection, Generator, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import NamedTuple

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models.cache import KVCache

from ..generation.batch import TokenLogprob
from ..model.block import make_cache
from ..model.cache import twin_of
from ..model.prefix import Chunk, Prefix
from ..steering.steering import UNSTEERED, Steering

# Tokens of a chunk: from SMALL on it ends before a new message, at LARGE in any case.
SMALL, LARGE = 64, 256
FIRST = 16  # the first chunk, mostly the system message, ends before a new message from here on
FEW = 8  # fewer tokens, such as the answer's header, make no second chunk


def cut(tokens: Sequence[int], opens: Collection[int]) -> list[Chunk]:
    """Cut a prompt without its last token into chunks.

    Where a chunk ends depends only on what precedes the end, so prompts that begin alike have the
    same first chunks. A chunk ends before a token that opens a message (``opens``), or when it is
    long, so that other rows decode in between. A small last chunk is added to the one before: a
    forward pass of few tokens costs almost as much as one of many. A first message is a chunk even
    if it is small: Qwen2.5's own system message (21 tokens) begins every conversation.
    """
    ends, start, last = [], 0, len(tokens) - 1
    for at in range(1, last):
        enough = SMALL if ends else FIRST
        if at - start == LARGE or (at - start >= enough and tokens[at] in opens):
            ends.append(at)
            start = at
    if ends and last - start < (SMALL if len(ends) > 1 else FEW):
        ends.pop()
    bounds = [0, *ends, last]
    return [Chunk(tuple(tokens[first:end])) for first, end in pairwise(bounds) if end > first]


@dataclass(eq=False)
class _Entry:
    """A prompt that was read; ``fingerprint`` and ``layers`` are those of its steering."""

    fingerprint: str
    layers: frozenset[int]
    prefix: Prefix
    nbytes: int


class Found(NamedTuple):
    """A prefix with which a prompt begins.

    ``tokens`` is how many need not be read; where only lower layers are known, that share of them.
    ``exact``: it was read under the same steering.
    """

    prefix: Prefix
    tokens: int
    exact: bool


class PromptCache:
    """Caches of the latest prompts, up to ``max_bytes``; used on the model's thread.

    ``usual`` is the steering that most requests ask for. An unsteered prompt keeps the residual
    stream at its lowest layer, so that the same prompt is read faster under ``usual``.
    """

    def __init__(
        self,
        network: nn.Module,
        *,
        max_bytes: int,
        usual: Steering | None = None,
        exact: bool = False,
    ):
        self._network, self._max_bytes, self.exact = network, max_bytes, exact
        self._usual = replace(usual, strength=0.0) if usual else None
        self._entries: OrderedDict[int, _Entry] = OrderedDict()
        self._count = 0

    @property
    def nbytes(self) -> int:
        return sum(entry.nbytes for entry in self._entries.values())

    def __len__(self) -> int:
        return len(self._entries)

    def read(
        self, tokens: Sequence[int], steering: Steering | None, opens: Collection[int]
    ) -> "PromptReading":
        """Begin to read a prompt after the part that is known."""
        return PromptReading(self, self._network, tokens, steering, cut(tokens, opens))

    def clear(self) -> None:
        self._entries.clear()

    def while_reading(self, steering: Steering | None) -> Steering | None:
        """Return the steering of the prompt without its last token."""
        if steering is None or steering.is_zero:
            return self._usual
        return steering.in_prompt or replace(steering, strength=0.0, budget=None)

    def lookup(self, chunks: Sequence[Chunk], steering: Steering | None) -> Found:
        """Return a copy of the prefix that saves most work."""
        fingerprint, layers = _identity(steering)
        best, most, exact = None, 0.0, True
        for number, entry in self._entries.items():
            length, share = entry.prefix.common(chunks), 1.0
            if entry.fingerprint != fingerprint:
                length = min(length, entry.prefix.residual_tokens)
                share = _shared(entry, layers) / len(entry.prefix.caches)
            if length * share > most:
                best, most, exact = number, length * share, entry.fingerprint == fingerprint
        if best is None:
            new = Prefix(self._network, keep_bytes=self._max_bytes, exact=self.exact)
            return Found(new, 0, True)
        self._entries.move_to_end(best)
        return Found(self._entries[best].prefix.fork(), int(most), exact)

    def keep(self, prefix: Prefix, steering: Steering | None) -> None:
        """Keep a prompt, and drop the entries with which it begins."""
        if not prefix.chunks or prefix.nbytes > self._max_bytes:
            return  # too large: it would push out all other entries
        fingerprint, layers = _identity(steering)
        for number, entry in list(self._entries.items()):
            old = entry.prefix
            if entry.fingerprint == fingerprint and prefix.common(old.chunks) == old.length:
                del self._entries[number]
        self._count += 1
        self._entries[self._count] = _Entry(fingerprint, layers, prefix.fork(), prefix.nbytes)
        while self._entries and self.nbytes > self._max_bytes:
            self._entries.popitem(last=False)


class PromptReading:
    """Reads a prompt, a chunk at a time."""

    def __init__(
        self,
        cache: PromptCache,
        network: nn.Module,
        tokens: Sequence[int],
        steering: Steering | None,
        chunks: Sequence[Chunk],
    ):
        self._cache, self._network, self._steering = cache, network, steering
        self._tokens, self._chunks = tokens, chunks
        self._while_reading = cache.while_reading(steering)
        self._prefix, self.cached_tokens, self._exact = cache.lookup(chunks, self._while_reading)
        self._filling: Generator[None, None, object] | None = None
        self.done = False

    @property
    def next_chunk(self) -> Chunk | None:
        """The first chunk that is not known as a whole."""
        unread = self._prefix.unread(self._chunks)
        return unread[0] if unread else None

    def rest(self) -> list[int] | None:
        """Return the unknown tokens, if they may be read together with other prompts.

        ``caches`` then hold the tokens before. Only a short rest is returned, as it is not kept.
        """
        if not self._exact or self._filling is not None:
            return None
        self._prefix.cut(self._chunks)
        rest = list(self._tokens[self._prefix.length :])
        return rest if 1 < len(rest) <= LARGE else None

    def advance(self) -> int:
        """Read one chunk and return its tokens; 0 when there is nothing left to read."""
        if self._filling is None:
            self._filling = self._prefix.filling(self._chunks, self._while_reading)
        before = self._prefix.length
        try:
            next(self._filling)
        except StopIteration:
            self.done = True
            self._cache.keep(self._prefix, self._while_reading)
            return 0
        return max(1, self._prefix.length - before)

    def echo(self, choice: int) -> tuple[TokenLogprob, ...]:
        """Return nothing: the prompt's log-probabilities are not asked for."""
        return ()

    @property
    def keeps_answer(self) -> bool:
        """Whether an answer can be kept: as part of the next prompt it must be steered alike."""
        how = self._steering
        return (how is None or how.is_everywhere) and not self._cache.exact

    def keep_answer(self, tokens: Sequence[int], caches: Sequence[KVCache]) -> None:
        """Keep an answer with its prompt; ``caches`` are those with which its row ended."""
        mx.async_eval([cache.state for cache in caches])  # else they hold the memory of all rows
        answered = self._prefix.with_caches(caches, self._while_reading)
        answered.keep_decoded([*self._tokens, *tokens][self._prefix.length :])
        self._cache.keep(answered, self._while_reading)

    def caches(self) -> list[KVCache]:
        """Return caches of the tokens read so far; they go on under the prompt's steering."""
        caches = [twin_of(cache) for cache in self._prefix.caches]
        steered = make_cache(self._network, self._steering, prompt=self._tokens)
        for cache, other in zip(caches, steered, strict=True):
            cache.shift = other.shift
        return caches


def _identity(steering: Steering | None) -> tuple[str, frozenset[int]]:
    if steering is None or steering.is_zero:
        return UNSTEERED, frozenset()
    return steering.fingerprint, frozenset(steering.layers)


def _shared(entry: _Entry, layers: frozenset[int]) -> int:
    """Return how many blocks of an entry are valid under a steering of ``layers`` too."""
    captured = entry.prefix.captured
    changed = entry.layers | layers
    if captured is None or not changed or captured > min(changed):
        return 0
    return captured + 1
