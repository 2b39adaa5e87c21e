"""Read the residual stream: batched, in constant memory."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from typing import NamedTuple

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from ..errors import InputError
from ..steering.vector import format_layers
from .block import patch
from .cache import Passed, Reading
from .families import decoder_blocks
from .likelihood import pad_right
from .prompt import check_ids

BATCH_TOKENS = 4096  # about as many tokens go through the blocks together

Tokens = Sequence[int]
Weigh = Callable[[Tokens], np.ndarray]


class TokenPair(NamedTuple):
    """Token ids of a prompt and of its two responses; none is empty."""

    prompt: Tokens
    positive: Tokens
    negative: Tokens

    @property
    def sequences(self) -> tuple[list[int], list[int]]:
        """The prompt with the positive and with the negative response."""
        return [*self.prompt, *self.positive], [*self.prompt, *self.negative]


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
    network: nn.Module, pairs: Sequence[TokenPair], layers: Iterable[int], weigh: Weigh
) -> Iterator[PairStates]:
    """Yield the unsteered residual stream of each pair's responses, batch by batch.

        row = sum_t w_t h_l[t]      over the tokens t of the response

    The same as reading each sequence alone, up to the rounding of the model's dtype. In memory are
    one block's activations of one batch.

    Args:
        layers: layer numbers; ``h_l`` is the output of that block. Hugging Face calls it
            ``hidden_states[l + 1]``; of the last block it is the output before the final norm.
        weigh: maps the token ids of a response to their weights w, float32 ``(tokens,)``.

    Raises:
        InputError: no pairs, an empty prompt or response, a layer that the model does not have, or a
            token that it does not know.
    """
    layers = check_layers(network, layers)
    if not pairs:
        raise InputError("no pairs to read; expected at least one.")
    for number, pair in enumerate(pairs):
        if not all(map(len, pair)):
            raise InputError(f"pair {number} has an empty prompt or response.")
        for tokens in pair.sequences:
            check_ids(tokens, network.args.vocab_size, f"pair {number}")
    for numbers in _batches(pairs):
        yield from _read(network, pairs, numbers, layers, weigh)
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

    def measure(layer: int, h: mx.array) -> None:
        norms[layer] = float(mx.mean(_norms(h)[0, first:]))

    _each_output(network, mx.array([list(tokens)]), layers, measure)
    return norms


def _each_output(
    network: nn.Module,
    tokens: mx.array,
    layers: Sequence[int],
    take: Callable[[int, mx.array], None],
) -> None:
    """Call ``take(layer, h)`` with the unsteered output of each of the layers, in their order.

    ``h`` is ``(rows, tokens, hidden)``. ``take`` evaluates what it needs, so one block's activations are in
    memory at a time. What lies above the last layer is not computed.
    """

    def cache_of(layer: int) -> Reading | Passed:
        if layer > layers[-1]:
            return Passed()
        return Reading(record=partial(_take, take, layer)) if layer in layers else Reading()

    network.model(tokens, [cache_of(layer) for layer in decoder_blocks(patch(network))])


def _take(take: Callable[[int, mx.array], None], layer: int, _start: int, h: mx.array) -> None:
    take(layer, h)


def _batches(pairs: Sequence[TokenPair]) -> Iterator[list[int]]:
    """Group the numbers of pairs of similar length, about ``BATCH_TOKENS`` tokens a group."""
    lengths = [sum(map(len, pair.sequences)) for pair in pairs]
    batch: list[int] = []
    for number in sorted(range(len(pairs)), key=lambda number: -lengths[number]):
        if batch and lengths[batch[0]] * (len(batch) + 1) > BATCH_TOKENS:
            yield batch
            batch = []
        batch.append(number)
    yield batch


def _read(
    network: nn.Module,
    pairs: Sequence[TokenPair],
    numbers: list[int],
    layers: Sequence[int],
    weigh: Weigh,
) -> Iterator[PairStates]:
    """Send the positive sequences of a batch through the network, then the negative ones."""
    prompts = [len(pairs[number].prompt) for number in numbers]
    rows = list(zip(*(pairs[number].sequences for number in numbers), strict=True))
    sums: dict[int, list[np.ndarray]] = {layer: [] for layer in layers}
    norms: dict[int, list[np.ndarray]] = {layer: [] for layer in layers}
    for side in rows:
        tokens = pad_right(side)  # the causal mask hides the padding
        asked, uniform = (
            _weights(side, prompts, how, tokens.shape[1]) for how in (weigh, _uniform)
        )

        def take(
            layer: int, h: mx.array, asked: mx.array = asked, uniform: mx.array = uniform
        ) -> None:
            # mx.where, because infinity * 0 is not 0
            total = mx.where(asked == 0, 0, h.astype(mx.float32) * asked).sum(axis=1)
            norm = mx.where(uniform == 0, 0, _norms(h)[..., None] * uniform).sum(axis=(1, 2))
            mx.eval(total, norm)
            sums[layer].append(np.array(total))
            norms[layer].append(np.array(norm))

        _each_output(network, tokens, layers, take)
    for layer in layers:
        rows, lengths = (np.stack(found[layer], axis=1) for found in (sums, norms))
        yield PairStates(layer, numbers, rows, lengths.astype(np.float64))


def _weights(
    sequences: Sequence[Tokens], prompts: Sequence[int], weigh: Weigh, width: int
) -> mx.array:
    """Return the weight of every token, float32 ``(sequences, width, 1)``; 0 in the prompt and the padding."""
    made = np.zeros((len(sequences), width, 1), np.float32)
    for row, tokens, start in zip(made, sequences, prompts, strict=True):
        row[start : len(tokens), 0] = weigh(tokens[start:])
    return mx.array(made)


def _uniform(response: Tokens) -> np.ndarray:
    return np.full(len(response), 1 / len(response), np.float32)


def _norms(h: mx.array) -> mx.array:
    return mx.linalg.norm(h.astype(mx.float32), axis=-1)


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
