"""What prompts have in common is read once, and never under another's steering.

Entries are found by the fingerprint of the steering under which they were read. Where there is none,
an entry of another steering gives what is the same in both: the layers up to the lowest that either
steers (``prefix.py``). A prompt is cut into the same chunks wherever it comes from, so what is taken
from here is bit for bit what reading it anew would give.

Short prompts that come together are read together instead (``PromptReading.rest``), which is faster.
"""

from collections import OrderedDict
from collections.abc import Collection, Generator, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import NamedTuple

import mlx.nn as nn
from mlx_lm.models.cache import KVCache

from ..model.block import make_cache
from ..model.cache import twin_of
from ..model.prefix import Chunk, Prefix, common_beginning
from ..steering.steering import UNSTEERED, Steering

SMALL, LARGE = 64, 256  # tokens of a chunk: ended by a message from here on, ended anyway
FIRST = 16  # tokens of a first message that is a chunk, the system message above all
FEW = 8  # tokens that are no chunk even then: the header of the answer


def cut(tokens: Sequence[int], opens: Collection[int]) -> list[Chunk]:
    """Cut a prompt without its last token into chunks.

    Where a chunk ends depends on what precedes it, so prompts that begin alike have the same first
    chunks. It ends before a token that opens a message (``opens``), or when it is long: other rows
    decode in between. What would be a small last chunk belongs to the one before: a forward pass of
    few tokens costs almost as much as one of many. A first message is a chunk even if it is small:
    Qwen2.5's own system message (21 tokens) begins every question.
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
    """``layers`` are those that are steered where the prompt was read."""

    fingerprint: str
    layers: frozenset[int]
    prefix: Prefix
    nbytes: int


class Found(NamedTuple):
    """A prefix that begins a prompt. ``tokens``: what it spares; one whose lower layers alone are
    known counts for that part. ``exact``: it was read under the same steering."""

    prefix: Prefix
    tokens: int
    exact: bool


class PromptCache:
    """Caches of the prompts that were read last, up to ``max_bytes``; used on the model's thread.

    ``usual`` is the steering that most requests will ask for: what an unsteered prompt keeps of the
    residual stream then serves the same prompt under it.
    """

    def __init__(self, model: nn.Module, *, max_bytes: int, usual: Steering | None = None):
        self._model, self._max_bytes = model, max_bytes
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
        """Begin to read a prompt, with what is known of it."""
        return PromptReading(self, self._model, tokens, steering, cut(tokens, opens))

    def clear(self) -> None:
        self._entries.clear()

    def while_reading(self, steering: Steering | None) -> Steering | None:
        """Return what steers the prompt itself, its last token aside."""
        if steering is None or not steering.strength:
            return self._usual
        if steering.positions == "generated":
            return replace(steering, strength=0.0)
        return replace(steering, positions="all")

    def lookup(self, chunks: Sequence[Chunk], steering: Steering | None) -> "Found":
        """Return the prefix that spares most work, for the caller alone."""
        fingerprint, layers = _identity(steering)
        best, most, exact = None, 0.0, True
        for number, entry in self._entries.items():
            same = common_beginning(entry.prefix.chunks, chunks)
            length = sum(len(chunk.tokens) for chunk in chunks[:same])
            share = 1.0
            if entry.fingerprint != fingerprint:
                share = _shared(entry, layers) / len(entry.prefix.caches)
            if length * share > most:
                best, most, exact = number, length * share, entry.fingerprint == fingerprint
        if best is None:
            return Found(Prefix(self._model, keep_bytes=self._max_bytes), 0, True)
        self._entries.move_to_end(best)
        return Found(self._entries[best].prefix.fork(), int(most), exact)

    def keep(self, prefix: Prefix, steering: Steering | None) -> None:
        """Keep a prompt that was read; what it begins with needs no entry of its own any more."""
        if (
            not prefix.chunks or prefix.nbytes > self._max_bytes
        ):  # alone it would push out all others
            return
        fingerprint, layers = _identity(steering)
        for number, entry in list(self._entries.items()):
            same = entry.fingerprint == fingerprint
            if same and common_beginning(entry.prefix.chunks, prefix.chunks) == len(
                entry.prefix.chunks
            ):
                del self._entries[number]
        self._count += 1
        self._entries[self._count] = _Entry(fingerprint, layers, prefix.fork(), prefix.nbytes)
        while self._entries and self.nbytes > self._max_bytes:
            self._entries.popitem(last=False)


class PromptReading:
    """A prompt that is to be read, a chunk at a time."""

    def __init__(
        self, cache: PromptCache, model: nn.Module, tokens: Sequence[int],
        steering: Steering | None, chunks: Sequence[Chunk],
    ):  # fmt: skip
        self._cache, self._model, self._steering = cache, model, steering
        self._tokens, self._chunks = tokens, chunks
        self._while_reading = cache.while_reading(steering)
        self._prefix, self.cached_tokens, self._exact = cache.lookup(chunks, self._while_reading)
        self._filling: Generator[None, None, object] | None = None
        self.done = False

    @property
    def next_chunk(self) -> Chunk | None:
        """The first chunk that is not known."""
        known = common_beginning(self._prefix.chunks, self._chunks)
        return self._chunks[known] if known < len(self._chunks) else None

    def rest(self) -> list[int] | None:
        """Return the tokens that are not known, if they can as well be read beside other prompts.

        ``caches`` then hold what precedes them. That is for short rests: they are not kept.
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

    def caches(self) -> list[KVCache]:
        """Return caches that hold what was read, and go on under the prompt's steering."""
        caches = make_cache(self._model, self._steering, prompt_length=len(self._tokens))
        copies = [twin_of(read) for read in self._prefix.caches]
        for copy, made in zip(copies, caches, strict=True):
            copy.shift = made.shift
        return copies


def _identity(steering: Steering | None) -> tuple[str, frozenset[int]]:
    if steering is None or not steering.strength:
        return UNSTEERED, frozenset()
    return steering.fingerprint, frozenset(steering.layers or ())


def _shared(entry: _Entry, layers: frozenset[int]) -> int:
    """Return how many blocks give the same under both steerings, from what was kept."""
    captured = entry.prefix.captured
    changed = entry.layers | layers
    if captured is None or not changed or captured > min(changed):
        return 0
    return captured + 1
