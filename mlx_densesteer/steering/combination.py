"""Several steering vectors as one: a weighted sum, so that one dial turns them together."""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from ..errors import VectorMismatchError
from .vector import SteeringVector


def combine(parts: Sequence[tuple[SteeringVector, float]]) -> SteeringVector:
    """Return ``sum_i w_i * v_i`` at every layer that one of the vectors holds.

    A vector without a layer adds nothing there. What is known of one vector alone (tested strengths,
    a recommendation) is left out; residual norms, which are the model's, are kept where all were made
    for the same weights; the rest is that of the first.

    Raises:
        VectorMismatchError: no vectors, or of models of another width or depth.
    """
    if not parts:
        raise VectorMismatchError("no vectors to combine: expected at least one.")
    first = parts[0][0].meta
    for vector, _ in parts:
        shape = vector.meta.hidden_size, vector.meta.layer_count
        if shape != (first.hidden_size, first.layer_count):
            raise VectorMismatchError(
                f"{vector.name}: width {shape[0]} and {shape[1]} layers, but {parts[0][0].name} has "
                f"{first.hidden_size} and {first.layer_count}. Combine vectors of one model."
            )
    layers = sorted({layer for vector, _ in parts for layer in vector.layers})
    sums = {
        layer: sum(weight * v.layers[layer].astype(np.float64) for v, weight in parts if layer in v.layers)
        for layer in layers
    }  # fmt: skip
    name = " + ".join(f"{weight:g} {vector.name}" for vector, weight in parts)
    same_weights = len({vector.meta.fingerprint for vector, _ in parts}) == 1
    norms: dict[str, float] = {}
    for vector, _ in reversed(parts if same_weights and first.fingerprint else ()):
        norms |= vector.meta.residual_norms or {}
    meta = replace(
        first, method=f"combined: {name}", tested=(), residual_norms=norms or None, recommended=None,
        pair_count=None, pairs_sha256=None, token=None,
        fingerprint=first.fingerprint if same_weights else None,
    )  # fmt: skip
    return SteeringVector(sums, meta, name=name)
