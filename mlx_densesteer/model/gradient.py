"""The log-likelihood of a response as a function of what is added to the residual stream.

``margin.margin_gains`` and ``train.train`` differentiate it. It goes through the blocks that steer.
"""

from collections.abc import Callable, Mapping, Sequence

import mlx.core as mx
import mlx.nn as nn

from ..steering.places import Positions, Thought, span_of
from .block import patch
from .cache import Marked, Passed, Reading, Shift
from .families import decoder_blocks, head_of
from .marks import marks_of

_SLICE = 128  # positions whose logits are in memory at a time


class _Recomputed:
    """In place of a block's cache: the block's backward pass computes it again.

    Args:
        shift: what the block adds, as a function of ``delta``, so that it has a gradient.
    """

    def __init__(self, delta: mx.array | None, shift: Callable[[mx.array], Shift]):
        self._delta, self._shift = delta, shift
        self.shift = None if delta is None else shift(delta)  # it is told the tokens
        self.noted: Marked | None = None

    def instead(self, block: nn.Module, x: mx.array, mask: mx.array | str | None) -> mx.array:
        def output(x: mx.array, delta: mx.array | None = None) -> mx.array:
            cache = Reading(None if delta is None else self._shift(delta))
            cache.noted = self.noted
            return block(x, mask, cache)

        given = [x] if self._delta is None else [x, self._delta]
        return mx.checkpoint(output)(*given)


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
    span, start = span_of(positions, len(prompt)), len(prompt) - 1
    if span.mark == "steps":
        _ = marks_of(network).step_end_table  # raises if it cannot be told
    elif span.mark:
        marks = marks_of(patch(network))
        opened = marks.opens_thought(prompt)
        bounds = marks.thought_in([prompt[-1], *response], start, opened=opened)
        span = span._replace(thought=Thought(start, *bounds))
    lowest = min(deltas)
    if below is None:
        below = stream_below(network, prompt, response, lowest)

    def shift(delta: mx.array) -> Shift:
        return Shift.of(delta.reshape(1, 1, -1), [span])

    def cache_of(layer: int) -> Passed | Reading | _Recomputed:
        delta = deltas.get(layer)
        if layer < lowest:
            return Passed()
        if layer == lowest:
            return Passed(0, below, shift(delta))
        if recompute:
            return _Recomputed(delta, shift)
        return Reading(None if delta is None else shift(delta))

    caches = [cache_of(layer) for layer in decoder_blocks(patch(network))]
    h = network.model(mx.array([[*prompt, *response[:-1]]]), caches)[0, len(prompt) - 1 :]
    parts = [slice(start, start + _SLICE) for start in range(0, len(response), _SLICE)]
    return mx.stack([_score(network, h[part], response[part]) for part in parts]).sum()


def stream_below(
    network: nn.Module, prompt: Sequence[int], response: Sequence[int], layer: int
) -> mx.array:
    """Return the unsteered output of block ``layer`` at every token but the last, ``(1, tokens, hidden)``.

    Nothing that is added at this layer or above changes it, so it can be kept while a vector changes.
    """
    found: list[mx.array] = []
    caches: list[Reading | Passed] = [Reading() for _ in range(layer)]
    caches.append(Reading(record=lambda _, h: found.append(h)))
    caches += [Passed() for _ in range(layer + 1, len(decoder_blocks(patch(network))))]
    network.model(mx.array([[*prompt, *response[:-1]]]), caches)
    return found[0]


def _score(network: nn.Module, h: mx.array, tokens: Sequence[int]) -> mx.array:
    """Return the sum of ``log p(tokens[i])`` given the normed stream ``h``, ``(tokens, hidden)``."""
    head, targets = head_of(network), mx.array(list(tokens))[:, None]

    def score(h: mx.array) -> mx.array:
        logits = head(h).astype(mx.float32)
        picked = mx.take_along_axis(logits, targets, axis=-1)[:, 0]
        return (picked - mx.logsumexp(logits, axis=-1)).sum()

    return mx.checkpoint(score)(h)  # the backward pass computes the logits again: less memory
