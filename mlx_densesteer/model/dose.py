"""Shims for the rooms that are still to be moved to ``Model.norms`` and ``Amount``."""

from ..steering.request import Amount
from .model import Model


def mean_norms(network, tokenizer, vector, layers):
    return Model(network, tokenizer).norms(vector, layers)


def recorded_norms(vector, of, layers):
    wanted, stored = sorted(set(layers)), vector.residual_norms or {}
    if vector.meta.fingerprint != of or not set(wanted) <= set(stored):
        return None
    return {layer: stored[layer] for layer in wanted}


def solutions(tokenizer):
    return Model.solutions(type("T", (), {"tokenizer": tokenizer})())


def strength_for(vector, norms, dose):
    return Amount(dose, True).strength(vector, norms)
