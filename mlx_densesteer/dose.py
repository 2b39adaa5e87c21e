"""What a relative strength is relative to: the mean norm of the residual stream."""

from collections.abc import Iterable

import mlx.nn as nn
from mlx_lm.tokenizer_utils import TokenizerWrapper

from .demo.problems import calibration
from .model import fingerprint
from .prompt import encode_prompt
from .record import residual_norms
from .vector import SteeringVector

QUESTIONS = 8


def mean_norms(
    model: nn.Module, tokenizer: TokenizerWrapper, vector: SteeringVector, layers: Iterable[int]
) -> dict[int, float]:
    """Return the mean ``||h_l||`` of some layers, unsteered.

    As the vector's file records it from its extraction, if that was from these weights; else
    measured on eight fixed questions in the chat template. Either way it is the same in every
    run, so a relative strength always means the same.
    """
    layers = sorted(set(layers))
    stored = vector.residual_norms or {}
    if vector.meta.fingerprint == fingerprint(model) and set(layers) <= set(stored):
        return {layer: stored[layer] for layer in layers}
    totals = dict.fromkeys(layers, 0.0)
    for problem in calibration(QUESTIONS):
        tokens = encode_prompt(
            tokenizer, problem.question, raw=not tokenizer.has_chat_template
        )  # fmt: skip
        for layer, norm in residual_norms(model, tokens, layers).items():
            totals[layer] += norm / QUESTIONS
    return totals


def strength_for(vector: SteeringVector, norms: dict[int, float], dose: float) -> float:
    """Return the strength at which the relative dose is ``dose``, the mean over ``norms``' layers.

    lambda = a / mean_l( ||v_l|| / mean ||h_l|| )
    """
    sizes = vector.norms()
    unit = sum(sizes[layer] / norm for layer, norm in norms.items()) / len(norms)
    return dose / unit if unit else 0.0
