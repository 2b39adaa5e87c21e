"""How much steering at a layer favours dense responses; this chooses the default layer."""

from collections.abc import Mapping, Sequence

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from ..model.block import decoder_blocks
from ..model.cache import Shift
from ..model.likelihood import head_of
from ..model.model import Model
from ..model.places import EVERYWHERE
from ..model.token_tree import TokenPair
from ..steering.request import SMALLEST

_SLICE = 128  # positions whose logits are in memory at a time


def margin_gains(
    model: Model,
    pairs: Sequence[TokenPair],
    vectors: Mapping[int, np.ndarray],
    norms: Mapping[int, float],
    *,
    dose: float,
) -> dict[int, float]:
    """Return how much steering at each layer favours the dense responses of held-out pairs.

        gain_l = lambda_l * d/dlambda_l mean_i( log p(positive_i) / n_i - log p(negative_i) / m_i )
        lambda_l = dose * mean ||h_l|| / ||v_l||,   derivative at lambda = 0, n and m tokens

    In nats per token: the negative has more tokens, so a sum over tokens would count what favours
    both against the layer. To first order, so one backward pass for each response gives all layers.
    A layer whose vector is zero, or no more than rounding, gains 0.

    Args:
        pairs: token ids; the vectors must come from other pairs.
        vectors: ``v_l``, float32 ``(hidden,)``.
        norms: the mean ``||h_l||`` of the same layers.
        dose: a fraction of the residual stream's norm.
    """
    layers = sorted(vectors)
    moves = {}  # lambda_l * v_l
    for layer in layers:
        v = vectors[layer].astype(np.float64)
        size = float(np.linalg.norm(v))
        step = dose * norms[layer] / size if size / norms[layer] >= SMALLEST else 0.0
        moves[layer] = mx.array(step * v).astype(mx.float32)

    def score(turns: mx.array, prompt: Sequence[int], response: Sequence[int]) -> mx.array:
        shifts = {layer: turns[i] * moves[layer] for i, layer in enumerate(layers)}
        return _log_likelihood(model.network, prompt, response, shifts)

    gradient = mx.grad(score)
    total = np.zeros(len(layers))
    for pair in pairs:
        for sign, response in ((1, pair.positive), (-1, pair.negative)):
            slope = gradient(mx.zeros(len(layers)), pair.prompt, response)
            total += sign * np.array(slope) / len(response)
        mx.clear_cache()  # pairs differ in shape: their buffers cannot be used again
    return dict(zip(layers, (total / len(pairs)).tolist(), strict=True))


def _log_likelihood(
    network: nn.Module,
    prompt: Sequence[int],
    response: Sequence[int],
    shifts: Mapping[int, mx.array],
) -> mx.array:
    """Return ``log p(response | prompt)`` under ``shifts``, float32 ``()``, in nats."""
    h = network.model.embed_tokens(mx.array([[*prompt, *response[:-1]]]))
    for layer, block in decoder_blocks(network).items():
        shift = None
        if layer in shifts:
            shift = Shift.of(shifts[layer].reshape(1, 1, -1), [EVERYWHERE])
        h = block(h, "causal", _NoCache(shift))
    h = network.model.norm(h)[0, len(prompt) - 1 :]
    parts = [slice(start, start + _SLICE) for start in range(0, len(response), _SLICE)]
    return mx.stack([_score(network, h[part], response[part]) for part in parts]).sum()


def _score(network: nn.Module, h: mx.array, tokens: Sequence[int]) -> mx.array:
    """Return the sum of ``log p(tokens[i])`` given the normed stream ``h``, ``(tokens, hidden)``."""
    head, targets = head_of(network), mx.array(list(tokens))[:, None]

    def score(h: mx.array) -> mx.array:
        logits = head(h).astype(mx.float32)
        return (
            mx.take_along_axis(logits, targets, axis=-1)[:, 0] - mx.logsumexp(logits, axis=-1)
        ).sum()

    return mx.checkpoint(score)(h)  # the backward pass computes the logits again: less memory


class _NoCache:
    """The cache of a steered block for a sequence that is read once, from its beginning."""

    offset = 0
    expecting = False

    def __init__(self, shift: Shift | None):
        self.shift = shift

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> tuple[mx.array, mx.array]:
        return keys, values
