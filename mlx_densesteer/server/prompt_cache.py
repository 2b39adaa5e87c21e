"""What prompts have in common is read once, and never under another's steering.

Entries are found by the fingerprint of the steering under which they were read. Where there is none,
an entry of another steering gives what is the same in both: the layers up to the lowest that either
steers (``prefix.py``). A prompt is cut into the same chunks wherever it comes from, so what is taken
from here is bit for bit what reading it anew would give.
"""

from collections import OrderedDict
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace

import mlx.nn as nn
from mlx_lm.models.cache import KVCache

from ..chunks import Chunk, common_beginning
from ..patch import make_cache
from ..prefix import Prefix
from ..steering import UNSTEERED, Steering

SMALL, LARGE = 64, 256  # tokens of a chunk: ended by a message from here on, ended anyway


def cut(tokens: Sequence[int], opens: Collection[int]) -> list[Chunk]:
    """Cut a prompt without its last token into chunks.

    Where a chunk ends depends on what precedes it alone, so prompts that begin alike have the same
    first chunks. It ends before a token that opens a message (``opens``), or when it is long: other
    rows decode in between.
    """
    chunks, start = [], 0
    for at in range(1, len(tokens)):
        length = at - start
        if length == LARGE or (length >= SMALL and tokens[at] in opens):
            chunks.append(Chunk(tuple(tokens[start:at])))
            start = at
    if len(tokens) - 1 > start:
        chunks.append(Chunk(tuple(tokens[start : len(tokens) - 1])))
    return chunks


@dataclass(eq=False)
class _Entry:
    """``layers`` are those that are steered where the prompt was read."""

    fingerprint: str
    layers: frozenset[int]
    prefix: Prefix
    nbytes: int


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
    ) -> "Reading":
        """Begin to read a prompt, with what is known of it."""
        return Reading(self, self._model, tokens, steering, cut(tokens, opens))

    def clear(self) -> None:
        self._entries.clear()

    def while_reading(self, steering: Steering | None) -> Steering | None:
        """Return what steers the prompt itself, its last token aside."""
        if steering is None or not steering.strength:
            return self._usual
        if steering.positions == "generated":
            return replace(steering, strength=0.0)
        return replace(steering, positions="all")

    def lookup(self, chunks: Sequence[Chunk], steering: Steering | None) -> tuple[Prefix, int]:
        """Return the prefix that spares most work, for the caller alone, and how much.

        That is in tokens; one whose lower layers alone are known counts for that part.
        """
        fingerprint, layers = _identity(steering)
        best, most = None, 0.0
        for number, entry in self._entries.items():
            same = common_beginning(entry.prefix.chunks, chunks)
            length = sum(len(chunk.tokens) for chunk in chunks[:same])
            share = 1.0
            if entry.fingerprint != fingerprint:
                share = _shared(entry, layers) / len(entry.prefix.caches)
            if length * share > most:
                best, most = number, length * share
        if best is None:
            return Prefix(self._model, keep_bytes=self._max_bytes), 0
        self._entries.move_to_end(best)
        return self._entries[best].prefix.fork(), int(most)

    def keep(self, prefix: Prefix, steering: Steering | None) -> None:
        """Keep a prompt that was read; what it begins with needs no entry of its own any more."""
        if not prefix.chunks:
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


class Reading:
    """A prompt that is being read, a chunk at a time."""

    def __init__(
        self, cache: PromptCache, model: nn.Module, tokens: Sequence[int],
        steering: Steering | None, chunks: Sequence[Chunk],
    ):  # fmt: skip
        self._cache, self._model, self._steering = cache, model, steering
        self._tokens, self._chunks = tokens, chunks
        self._while_reading = cache.while_reading(steering)
        self._prefix, self.cached_tokens = cache.lookup(chunks, self._while_reading)
        self._filling = self._prefix.filling(chunks, self._while_reading)
        self.done = False

    def advance(self) -> int:
        """Read one chunk and return its tokens; 0 when there is nothing left to read."""
        before = self._prefix.length
        try:
            next(self._filling)
        except StopIteration:
            self.done = True
            self._cache.keep(self._prefix, self._while_reading)
            return 0
        return max(1, self._prefix.length - before)

    def caches(self) -> list[KVCache]:
        """Return caches that hold the prompt but its last token, and go on under its steering."""
        caches = make_cache(self._model, self._steering, prompt_length=len(self._tokens))
        for mine, read in zip(caches, self._prefix.caches, strict=True):
            if read.offset:
                mine.keys = read.keys[..., : read.offset, :]
                mine.values = read.values[..., : read.offset, :]
                mine.offset = read.offset
        return caches


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
