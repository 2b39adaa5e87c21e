"""The log-likelihood of a response as a function of what is added to the residual stream.

``margin.margin_gains`` and ``train.train`` differentiate it. It goes through the blocks that steer.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import mlx.core as mx
import mlx.nn as nn

from ..steering.places import Positions, Thought, span_of
from .block import patch
from .cache import KeysValues, Passed, Reading, Shift, SteeredKVCache
from .families import decoder_blocks, head_of
from .marks import marks_of

_SLICE = 128  # positions whose logits are in memory at a time


class Fixed(NamedTuple):
    """What vectors at some layer and above do not change: ``fixed`` computes it once for a response.

    Args:
        start: how many tokens come before the first one that may be steered.
        output: the unsteered output of the block of that layer at every token from ``start`` on but the last,
            ``(1, tokens, hidden)``.
        before: of each layer above, the keys and values of the tokens before ``start``; empty if there are none.
    """

    start: int
    output: mx.array
    before: dict[int, KeysValues]

    @property
    def arrays(self) -> list[mx.array]:
        return [self.output, *(one for both in self.before.values() for one in both)]


class _Recomputed(Reading):
    """A reading whose block is computed again in the backward pass.

    Args:
        shift: what the block adds, as a function of ``delta``, so that it has a gradient.
        before: as of ``Reading``.
    """

    def __init__(
        self,
        delta: mx.array | None,
        shift: Callable[[mx.array], Shift],
        before: KeysValues | None,
    ):
        # a shift here too: it is told the tokens
        super().__init__(None if delta is None else shift(delta), before=before)
        self._delta, self._shift = delta, shift

    def instead(self, block: nn.Module, x: mx.array, mask: mx.array | str | None) -> mx.array:
        def output(x: mx.array, delta: mx.array | None = None) -> mx.array:
            cache = Reading(None if delta is None else self._shift(delta), before=self._before)
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
    known: Fixed | None = None,
    recompute: bool = False,
) -> mx.array:
    """Return ``log p(response | prompt)`` with ``deltas`` added; it has a gradient in each of them.

        log p = sum_t log p(response[t] | prompt, response[:t])

    Args:
        prompt, response: token ids, at least one each. They are not checked.
        deltas: ``lambda * v`` of some layers, at least one, float32 ``(hidden,)``.
        positions: as in ``Steering``.
        known: what ``fixed`` returns for the lowest of these layers, by default computed here.
        recompute: keep only the input of each block for the backward pass, which then computes the block
            again: a third more work, and a fraction of the memory.

    Returns:
        float32 ``()``, in nats; log-softmax in float32.
    """
    span, first = span_of(positions, len(prompt)), len(prompt) - 1
    if span.mark == "steps":
        _ = marks_of(network).step_end_table  # raises if it cannot be told
    elif span.mark:
        marks = marks_of(patch(network))
        opened = marks.opens_thought(prompt)
        bounds = marks.thought_in([prompt[-1], *response], first, opened=opened)
        span = span._replace(thought=Thought(first, *bounds))
    lowest = min(deltas)
    if known is None:
        known = fixed(network, prompt, response, lowest, positions)

    def shift(delta: mx.array) -> Shift:
        return Shift.of(delta.reshape(1, 1, -1), [span])

    def cache_of(layer: int) -> Passed | Reading | _Recomputed:
        delta, before = deltas.get(layer), known.before.get(layer)
        if layer < lowest:
            return Passed(known.start)
        if layer == lowest:
            return Passed(known.start, known.output, shift(delta))
        if recompute:
            return _Recomputed(delta, shift, before)
        return Reading(None if delta is None else shift(delta), before=before)

    caches = [cache_of(layer) for layer in decoder_blocks(patch(network))]
    tokens = [*prompt, *response[:-1]][known.start :]
    h = network.model(mx.array([tokens]), caches)[0, -len(response) :]
    parts = [slice(start, start + _SLICE) for start in range(0, len(response), _SLICE)]
    return mx.stack([_score(network, h[part], response[part]) for part in parts]).sum()


def fixed(
    network: nn.Module,
    prompt: Sequence[int],
    response: Sequence[int],
    layer: int,
    positions: Positions = "all",
) -> Fixed:
    """Return what stays as it is while vectors at ``layer`` and above change, not yet evaluated.

    That is what lies below them, and all that belongs to tokens before the first one that may be steered.
    """
    start = span_of(positions, len(prompt)).start
    found: list[mx.array] = []
    caches: list[SteeredKVCache | Passed] = [
        SteeredKVCache() for _ in decoder_blocks(patch(network))
    ]
    before: dict[int, KeysValues] = {}
    if start:
        network.model(mx.array([prompt[:start]]), caches)
        for k in range(layer + 1, len(caches)):  # copies, without the caches' spare room
            both = caches[k].keys, caches[k].values
            before[k] = tuple(mx.contiguous(one[..., :start, :]) for one in both)
    caches[layer].record = lambda _, h: found.append(h)
    caches[layer + 1 :] = [Passed(start) for _ in caches[layer + 1 :]]
    network.model(mx.array([[*prompt, *response[:-1]][start:]]), caches)
    return Fixed(start, found[0], before)


def _score(network: nn.Module, h: mx.array, tokens: Sequence[int]) -> mx.array:
    """Return the sum of ``log p(tokens[i])`` given the normed stream ``h``, ``(tokens, hidden)``."""
    head, targets = head_of(network), mx.array(list(tokens))[:, None]

    def score(h: mx.array) -> mx.array:
        logits = head(h).astype(mx.float32)
        picked = mx.take_along_axis(logits, targets, axis=-1)[:, 0]
        return (picked - mx.logsumexp(logits, axis=-1)).sum()

    return mx.checkpoint(score)(h)  # the backward pass computes the logits again: less memory
