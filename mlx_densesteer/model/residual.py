"""Read the residual stream: batched, in constant memory, shared beginnings computed once.

Each part of a ``TokenTree`` goes through the blocks once. The parts that follow attend to its keys
and values, block by block.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import NamedTuple

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from ..errors import InputError
from ..steering.vector import format_layers
from .block import decoder_blocks
from .likelihood import pad_right
from .prompt import check_ids
from .token_tree import PairBatch, Tail, TokenTree

KeysValues = tuple[mx.array, mx.array]
Weigh = Callable[[Sequence[int]], np.ndarray]


class PairStates(NamedTuple):
    """The residual stream of some pairs at the output of one block.

    ``pairs`` are their numbers. ``rows``, float32 ``(pairs, 2, hidden)``, is the weighted sum of
    ``h_l`` over each response, the positive one first; ``norms``, float64 ``(pairs, 2)``, is the
    mean of ``||h_l||`` over its tokens.
    """

    layer: int
    pairs: list[int]
    rows: np.ndarray
    norms: np.ndarray


def record_pairs(
    network: nn.Module, tree: TokenTree, layers: Iterable[int], weigh: Weigh
) -> Iterator[PairStates]:
    """Yield the unsteered residual stream of each pair's responses, batch by batch.

        row = sum_t w_t h_l[t]      over the tokens t of the response

    The same as reading each sequence alone, up to the rounding of the model's dtype. In memory are
    one block's activations of one batch, and the keys and values of the root.

    Args:
        layers: layer numbers; ``h_l`` is the output of that block. Hugging Face calls it
            ``hidden_states[l + 1]``; of the last block it is the output before the final norm.
        weigh: maps the token ids of a response to their weights w, float32 ``(tokens,)``.

    Raises:
        InputError: a layer that the model does not have, or a token that it does not know.
    """
    layers = check_layers(network, layers)
    for pair in (pair for batch in tree.batches for pair in batch.stems):
        for tokens in pair.whole:
            check_ids(tokens, network.args.vocab_size, f"pair {pair.number}")
    root: dict[int, KeysValues] = {}
    if tree.root:
        root = {layer: own for layer, _, own in _stream(network, tree.root, layers[-1])}
    for batch in tree.batches:
        yield from _read(network, batch, len(tree.root), root, layers, weigh)
        mx.clear_cache()  # batches differ in shape, so the next one cannot use these buffers


def residual_norms(
    network: nn.Module, tokens: Sequence[int], layers: Iterable[int], *, first: int = 1
) -> dict[int, float]:
    """Return the mean of ``||h_l||`` over the tokens from ``first`` on, at each layer, unsteered.

    The first token of a sequence is the attention sink: its norm is orders of magnitude larger than
    the others. The norms of a chat template's tokens are large too.

    Raises:
        InputError: ``first`` is outside the tokens, or the model does not have a layer or know a token.
    """
    if not 0 <= first < len(tokens):
        raise InputError(f"first token {first} of {len(tokens)}: expected 0 to {len(tokens) - 1}.")
    layers = check_layers(network, layers)
    check_ids(tokens, network.args.vocab_size, "the text")
    norms = {}
    for layer, h, _ in _stream(network, tokens, layers[-1]):
        if layer in layers:
            lengths = _norms(h)[0]
            norms[layer] = float(mx.mean(lengths[first:]))
    return norms


class Following:
    """A block's cache that joins ``earlier`` keys and values with those of the new tokens, ``own``."""

    def __init__(self, offset: int | mx.array, *earlier: KeysValues):
        self.offset, self._earlier = offset, earlier
        self.own: KeysValues | None = None

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> KeysValues:
        self.own = keys, values
        rows = keys.shape[0]
        both = []
        for new, old in zip((keys, values), zip(*self._earlier, strict=True), strict=False):
            wide = [mx.broadcast_to(part, (rows, *part.shape[1:])) for part in old]
            both.append(mx.concatenate([*wide, new], axis=2))
        return (both[0], both[1]) if both else (keys, values)


class _Part:
    """Rows of tokens that go through the blocks together, right-padded; the causal mask hides the padding."""

    def __init__(self, network: nn.Module, rows: Sequence[Sequence[int]]):
        self.h = network.model.embed_tokens(pad_right(rows))
        self.width = self.h.shape[1]

    def pad(self, rows: Sequence[np.ndarray]) -> mx.array:
        """Return ``rows`` padded with zeros, float32 ``(rows, tokens, 1)``."""
        padded = [np.pad(row, (0, self.width - len(row))) for row in rows]
        return mx.array(np.stack(padded).astype(np.float32))[..., None]


def _read(
    network: nn.Module,
    batch: PairBatch,
    offset: int,
    root: dict[int, KeysValues],
    layers: Sequence[int],
    weigh: Weigh,
) -> Iterator[PairStates]:
    """Send one batch through the blocks after ``offset`` tokens of root: in each block stems, then tails."""
    stem = _Part(network, [pair.whole[0][offset : pair.stop] for pair in batch.stems])
    tails = [
        _Part(network, [batch.stems[t.row].whole[t.side][t.start : t.stop] for t in group])
        for group in batch.groups
    ]
    masks = [
        _tail_mask(group, offset, stem.width, tail.width)
        for group, tail in zip(batch.groups, tails, strict=True)
    ]
    rows = [mx.array([tail.row for tail in group]) for group in batch.groups]
    starts = [mx.array([tail.start for tail in group]) for group in batch.groups]
    numbers = [pair.number for pair in batch.stems]
    sums = _Sums(batch, offset, stem, tails, weigh)
    for layer, block in decoder_blocks(network).items():
        if layer > layers[-1]:
            return
        before = [root[layer]] if root else []
        cache = Following(offset, *before)
        stem.h = block(stem.h, "causal", cache)
        keys, values = cache.own
        for tail, mask, row, start in zip(tails, masks, rows, starts, strict=True):
            tail.h = block(tail.h, mask, Following(start, *before, (keys[row], values[row])))
        mx.eval(stem.h, [tail.h for tail in tails])
        if layer in layers:
            yield PairStates(layer, numbers, *sums())


class _Share(NamedTuple):
    """The tokens of ``part`` add to the responses ``at`` (rows, sides) with ``weight`` (rows, tokens, 1)."""

    part: _Part
    at: tuple[list[int], list[int]]
    weight: mx.array


class _Sums:
    """The weighted sums over each response of a batch, added up over the parts that hold its tokens."""

    def __init__(
        self, batch: PairBatch, offset: int, stem: _Part, tails: Sequence[_Part], weigh: Weigh
    ):
        self._shape = (len(batch.stems), 2)
        self._streams: list[_Share] = []
        self._norms: list[_Share] = []
        whole = [
            Tail(row, side, offset, pair.stop)
            for side in (0, 1)
            for row, pair in enumerate(batch.stems)
        ]
        half = len(batch.stems)
        places = [
            (stem, whole[:half]),
            (stem, whole[half:]),
            *zip(tails, batch.groups, strict=True),
        ]
        for shares, weights in ((self._streams, weigh), (self._norms, _uniform)):
            for part, tokens in places:
                weight = part.pad([_weights(batch, place, weights) for place in tokens])
                if mx.any(weight):
                    at = [t.row for t in tokens], [t.side for t in tokens]
                    shares.append(_Share(part, at, weight))

    def __call__(self) -> tuple[np.ndarray, np.ndarray]:
        """Return ``rows`` and ``norms`` of ``PairStates`` at the parts' current layer."""
        rows = np.zeros((*self._shape, self._streams[0].part.h.shape[-1]), np.float32)
        norms = np.zeros(self._shape)
        for part, at, weight in self._streams:  # mx.where, because infinity * 0 is not 0
            share = mx.where(weight == 0, 0, part.h.astype(mx.float32) * weight)
            rows[at] += np.array(share.sum(axis=1))
        for part, at, weight in self._norms:
            share = mx.where(weight == 0, 0, _norms(part.h)[..., None] * weight)
            norms[at] += np.array(share.sum(axis=(1, 2)))
        return rows, norms


def _weights(batch: PairBatch, place: Tail, weigh: Weigh) -> np.ndarray:
    """Return the weights of the tokens at ``place``; prompt tokens have weight 0."""
    pair = batch.stems[place.row]
    response = weigh(pair.whole[place.side][pair.prompt :])
    return np.concatenate([np.zeros(pair.prompt), response])[place.start : place.stop]


def _uniform(response: Sequence[int]) -> np.ndarray:
    return np.full(len(response), 1 / len(response), np.float32)


def _norms(h: mx.array) -> mx.array:
    return mx.linalg.norm(h.astype(mx.float32), axis=-1)


def _tail_mask(group: Sequence[Tail], offset: int, stem: int, width: int) -> mx.array:
    """Return what each token of a tail attends to: root, its own stem, the tail up to itself.

    bool ``(rows, 1, tail tokens, root + stem + tail tokens)``.
    """
    lengths = mx.array([t.start - offset for t in group])[:, None, None, None]
    earlier = mx.arange(-offset, stem) < lengths
    causal = mx.arange(width)[:, None] >= mx.arange(width)
    rows = len(group)
    earlier = mx.broadcast_to(earlier, (rows, 1, width, offset + stem))
    return mx.concatenate([earlier, mx.broadcast_to(causal, (rows, 1, width, width))], axis=-1)


def _stream(
    network: nn.Module, tokens: Sequence[int], last: int
) -> Iterator[tuple[int, mx.array, KeysValues]]:
    """Yield layer, ``h`` ``(1, tokens, hidden)`` and the block's keys and values, up to ``last``."""
    h = network.model.embed_tokens(mx.array([list(tokens)]))
    for layer, block in decoder_blocks(network).items():
        if layer > last:
            return
        cache = Following(0)
        h = block(h, "causal", cache)
        mx.eval(h, cache.own)
        yield layer, h, cache.own


def check_layers(network: nn.Module, layers: Iterable[int]) -> list[int]:
    """Return the layers in order, once each.

    Raises:
        InputError: none, or one that the model does not have.
    """
    wanted, there = sorted(set(layers)), decoder_blocks(network)
    if not wanted or (strange := [layer for layer in wanted if layer not in there]):
        raise InputError(
            f"layers {format_layers(strange) if wanted else 'none'}: expected some of "
            f"{format_layers(there)}."
        )
    return wanted
