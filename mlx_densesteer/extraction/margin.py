"""How much steering at a layer favours dense responses; this chooses the default layer."""

from collections.abc import Callable, Mapping, Sequence

import mlx.core as mx
import numpy as np

from ..model.gradient import response_log_likelihood
from ..model.model import Model
from ..model.residual import TokenPair
from ..steering.request import SMALLEST


def margin_gains(
    model: Model,
    pairs: Sequence[TokenPair],
    vectors: Mapping[int, np.ndarray],
    norms: Mapping[int, float],
    *,
    dose: float,
    progress: Callable[[int], None] = lambda done: None,
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
        progress: is called with the number of pairs that are done.
    """
    layers = sorted(vectors)
    moves = {}  # lambda_l * v_l
    for layer in layers:
        v = vectors[layer].astype(np.float64)
        size = float(np.linalg.norm(v))
        step = dose * norms[layer] / size if size / norms[layer] >= SMALLEST else 0.0
        moves[layer] = mx.array(step * v).astype(mx.float32)

    def score(turns: mx.array, prompt: Sequence[int], response: Sequence[int]) -> mx.array:
        deltas = {layer: turns[i] * moves[layer] for i, layer in enumerate(layers)}
        return response_log_likelihood(model.network, prompt, response, deltas)

    gradient = mx.grad(score)
    total = np.zeros(len(layers))
    for done, pair in enumerate(pairs, start=1):
        for sign, response in ((1, pair.positive), (-1, pair.negative)):
            slope = gradient(mx.zeros(len(layers)), pair.prompt, response)
            total += sign * np.array(slope) / len(response)
        mx.clear_cache()  # pairs differ in shape: their buffers cannot be used again
        progress(done)
    return dict(zip(layers, (total / len(pairs)).tolist(), strict=True))
