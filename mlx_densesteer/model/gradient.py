"""The log-likelihood of a response as a function of what is added to the residual stream.

``margin.margin_gains`` and ``train.train`` differentiate it. It goes through the blocks that steer.
"""

from collections.abc import Mapping, Sequence

import mlx.core as mx
import mlx.nn as nn

from ..steering.vector import Positions
from .block import decoder_blocks
from .cache import Shift
from .likelihood import head_of
from .places import span_of, step_ends_of

_SLICE = 128  # positions whose logits are in memory at a time


class _NoCache:
    """In place of a block's cache: keeps nothing, and holds what the block adds."""

    offset = 0
    shift: Shift | None = None
    step_ends: mx.array | None = None

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> tuple[mx.array, mx.array]:
        return keys, values


def response_log_likelihood(
    network: nn.Module,
    prompt: Sequence[int],
    response: Sequence[int],
    deltas: Mapping[int, mx.array],
    *,
    positions: Positions = "all",
    below: mx.array | None = None,
    recompute: bool = False,
) -> mx.array:
    """Return ``log p(response | prompt)`` with ``deltas`` added; it has a gradient in each of them.

        log p = sum_t log p(response[t] | prompt, response[:t])

    Args:
        prompt, response: token ids, at least one each. They are not checked.
        deltas: ``lambda * v`` of some layers, at least one, float32 ``(hidden,)``.
        positions: as in ``Steering``.
        below: what ``stream_below`` returns for the lowest of these layers, by default computed here.
        recompute: keep only the input of each block for the backward pass, which then computes the block
            again: a third more work, and a fraction of the memory.

    Returns:
        float32 ``()``, in nats; log-softmax in float32.
    """
    span = span_of(positions, len(prompt))
    lowest = min(deltas)
    if below is None:
        below = stream_below(network, prompt, response, lowest)

    step_ends = None
    if span.step_ends:
        step_ends = step_ends_of(network).table[mx.array([[*prompt, *response[:-1]]])]

    def shift(delta: mx.array) -> Shift:
        return Shift.of(delta.reshape(1, 1, -1), [span])

    first = shift(deltas[lowest])
    h = first.add_alone(below, first.where(0, below.shape[1], step_ends))
    for layer, block in decoder_blocks(network).items():
        if layer <= lowest:
            continue
        given = [h, deltas[layer]] if layer in deltas else [h]

        def output(
            h: mx.array, delta: mx.array | None = None, block: nn.Module = block
        ) -> mx.array:
            cache = _NoCache()
            if delta is not None:
                cache.shift, cache.step_ends = shift(delta), step_ends
            return block(h, "causal", cache)

        h = (mx.checkpoint(output) if recompute else output)(*given)
    h = network.model.norm(h)[0, len(prompt) - 1 :]
    parts = [slice(start, start + _SLICE) for start in range(0, len(response), _SLICE)]
    return mx.stack([_score(network, h[part], response[part]) for part in parts]).sum()


def stream_below(
    network: nn.Module, prompt: Sequence[int], response: Sequence[int], layer: int
) -> mx.array:
    """Return the unsteered output of block ``layer`` at every token but the last, ``(1, tokens, hidden)``.

    Nothing that is added at this layer or above changes it, so it can be kept while a vector changes.
    """
    h = network.model.embed_tokens(mx.array([[*prompt, *response[:-1]]]))
    for number, block in decoder_blocks(network).items():
        h = block(h, "causal")
        if number == layer:
            break
    return h


def _score(network: nn.Module, h: mx.array, tokens: Sequence[int]) -> mx.array:
    """Return the sum of ``log p(tokens[i])`` given the normed stream ``h``, ``(tokens, hidden)``."""
    head, targets = head_of(network), mx.array(list(tokens))[:, None]

    def score(h: mx.array) -> mx.array:
        logits = head(h).astype(mx.float32)
        picked = mx.take_along_axis(logits, targets, axis=-1)[:, 0]
        return (picked - mx.logsumexp(logits, axis=-1)).sum()

    return mx.checkpoint(score)(h)  # the backward pass computes the logits again: less memory
