"""What a relative strength is relative to: the mean norm of the residual stream in a solution."""

import random
from collections.abc import Iterable

import mlx.nn as nn
from mlx_lm.tokenizer_utils import TokenizerWrapper

from ..demo.problems import calibration, draw_solution
from ..errors import InputError
from ..steering.steering import SMALLEST
from ..steering.vector import SteeringVector, format_layers
from .model import fingerprint
from .prompt import encode_prompt
from .residual import residual_norms

SOLUTIONS = 3


def mean_norms(
    model: nn.Module, tokenizer: TokenizerWrapper, vector: SteeringVector, layers: Iterable[int]
) -> dict[int, float]:
    """Return the mean ``||h_l||`` over the tokens of solutions, unsteered, at some layers.

    As the vector's file records it from the responses of its pairs, if these were read from
    these weights; else measured on three fixed solutions of arithmetic stories. The prompt's
    tokens are left out: the norms of a chat template's tokens are several times those of text.
    Either way it is the same in every run, so a relative strength always means the same.
    """
    layers = sorted(set(layers))
    if (recorded := recorded_norms(vector, fingerprint(model), layers)) is not None:
        return recorded
    totals = dict.fromkeys(layers, 0.0)
    for tokens, first in solutions(tokenizer):
        norms = residual_norms(model, tokens, layers, first=first)
        for layer, norm in norms.items():
            totals[layer] += norm / SOLUTIONS
    return totals


def recorded_norms(
    vector: SteeringVector, of: str, layers: Iterable[int]
) -> dict[int, float] | None:
    """Return the norms that the vector's file records, if they are those of the model ``of`` (a fingerprint)."""
    wanted, stored = sorted(set(layers)), vector.residual_norms or {}
    if vector.meta.fingerprint != of or not set(wanted) <= set(stored):
        return None
    return {layer: stored[layer] for layer in wanted}


def solutions(tokenizer: TokenizerWrapper) -> list[tuple[list[int], int]]:
    """Return three fixed solutions of arithmetic stories: token ids, and where the response begins."""
    made = []
    for problem in calibration(SOLUTIONS):
        raw = not tokenizer.has_chat_template
        prompt = encode_prompt(tokenizer, problem.question, raw=raw)
        text = draw_solution(problem, random.Random(problem.id))
        response = tokenizer.encode(text, add_special_tokens=False)
        made.append(([*prompt, *response], len(prompt)))
    return made


def strength_for(vector: SteeringVector, norms: dict[int, float], dose: float) -> float:
    """Return the strength at which the relative dose is ``dose``, the mean over ``norms``' layers.

        lambda = a / mean_l( ||v_l|| / mean ||h_l|| )

    Raises:
        InputError: the vector is zero there, or no larger than float32's rounding.
    """
    sizes = vector.norms()
    unit = sum(sizes[layer] / norm for layer, norm in norms.items()) / len(norms)
    if unit < SMALLEST:
        raise InputError(
            f"layer {format_layers(norms)}: the vector is {unit:.1g} of the residual stream, no more "
            "than rounding, so a relative strength means nothing there. Choose another layer."
        )
    return dose / unit
