"""Arrange the sequences of contrastive pairs as a tree, to compute shared beginnings once. No mlx.

All prompts begin with the *root* (the chat template). The two sequences of a pair then share a
*stem*: the rest of the prompt and the common beginning of both responses. Their two *tails* differ.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from ..errors import InputError

BATCH_TOKENS = 4096  # about as many tokens go through the blocks together
PADDING = 0.9  # rows padded to one length have at least this share of it

Tokens = Sequence[int]


class TokenPair(NamedTuple):
    """Token ids of a prompt and of its two responses; none is empty."""

    prompt: Tokens
    positive: Tokens
    negative: Tokens


class Tail(NamedTuple):
    """The tokens ``start`` to ``stop`` of one sequence.

    ``row`` is its pair's number in the batch; ``side`` is 0 for positive, 1 for negative.
    """

    row: int
    side: int
    start: int
    stop: int


@dataclass(frozen=True)
class Stem:
    """Pair ``number``: the first ``stop`` tokens of its two ``whole`` sequences are the same.

    ``prompt`` is the length of the prompt. Each tail has at least one token.
    """

    number: int
    whole: tuple[list[int], list[int]]
    prompt: int
    stop: int

    @classmethod
    def of(cls, number: int, pair: TokenPair) -> "Stem":
        whole = ([*pair.prompt, *pair.positive], [*pair.prompt, *pair.negative])
        stop = min(_common(*whole), len(whole[0]) - 1, len(whole[1]) - 1)
        return cls(number, whole, len(pair.prompt), stop)


@dataclass(frozen=True)
class PairBatch:
    """Pairs that are read together: stems of similar length, and groups of tails of similar length."""

    stems: tuple[Stem, ...]
    groups: tuple[tuple[Tail, ...], ...]

    @classmethod
    def of(cls, stems: Sequence[Stem]) -> "PairBatch":
        return cls(tuple(stems), tuple(map(tuple, _groups(stems))))

    def tokens(self, offset: int) -> int:
        """Return how many positions the batch has after ``offset`` tokens of root, padding included."""
        stems = len(self.stems) * (max(stem.stop for stem in self.stems) - offset)
        return stems + sum(len(group) * (group[0].stop - group[0].start) for group in self.groups)


@dataclass(frozen=True)
class TokenTree:
    """The tokens of the root, and the pairs after it in batches.

    ``tokens`` counts the positions that go through the blocks, padding included; ``tokens_apart``
    counts those of the sequences without sharing.
    """

    root: tuple[int, ...]
    batches: tuple[PairBatch, ...]
    tokens: int
    tokens_apart: int

    @classmethod
    def of(cls, pairs: Sequence[TokenPair]) -> "TokenTree":
        """Return the tree of ``pairs``.

        Raises:
            InputError: no pairs, an empty prompt or an empty response.
        """
        if not pairs:
            raise InputError("no pairs to read; expected at least one.")
        for number, pair in enumerate(pairs):
            if not all(map(len, pair)):
                raise InputError(f"pair {number} has an empty prompt or response.")
        stems = [Stem.of(number, pair) for number, pair in enumerate(pairs)]
        first = pairs[0].prompt
        root = min(_common(first, pair.prompt) for pair in pairs)
        root = min(root, min(len(pair.prompt) for pair in pairs) - 1)  # no stem without a token
        batches = tuple(PairBatch.of(batch) for batch in _batches(stems, root))
        tokens = root + sum(batch.tokens(root) for batch in batches)
        apart = sum(len(sequence) for stem in stems for sequence in stem.whole)
        return cls(tuple(first[:root]), batches, tokens, apart)


def _common(one: Tokens, other: Tokens) -> int:
    """Return the length of the common beginning."""
    pairs = enumerate(zip(one, other, strict=False))
    return next((at for at, (a, b) in pairs if a != b), min(len(one), len(other)))


def _groups(stems: Sequence[Stem]) -> list[list[Tail]]:
    """Group the tails of a batch by length, the longest of each group first."""
    tails = [
        Tail(row, side, stem.stop, len(sequence))
        for row, stem in enumerate(stems)
        for side, sequence in enumerate(stem.whole)
    ]
    groups: list[list[Tail]] = []
    for tail in sorted(tails, key=lambda t: t.start - t.stop):
        longest = groups[-1][0].stop - groups[-1][0].start if groups else 0
        if groups and tail.stop - tail.start >= PADDING * longest:
            groups[-1].append(tail)
        else:
            groups.append([tail])
    return groups


def _batches(stems: Sequence[Stem], offset: int) -> Iterator[list[Stem]]:
    """Group pairs with stems of similar length, about ``BATCH_TOKENS`` tokens a group."""
    batch: list[Stem] = []
    total = 0
    for stem in sorted(stems, key=lambda s: -s.stop):
        size = sum(map(len, stem.whole)) - stem.stop - offset
        longest = batch[0].stop - offset if batch else 0
        if batch and (total + size > BATCH_TOKENS or stem.stop - offset < PADDING * longest):
            yield batch
            batch, total = [], 0
        batch.append(stem)
        total += size
    if batch:
        yield batch
