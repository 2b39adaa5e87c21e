"""The mean norms of the residual stream, measured once for a model; used on the model's thread."""

from collections.abc import Iterable

import mlx.nn as nn
from mlx_lm.tokenizer_utils import TokenizerWrapper

from ..model.dose import mean_norms
from ..model.model import fingerprint
from ..steering.vector import SteeringVector


class Norms:
    """What a relative strength is relative to, as ``dose.mean_norms`` says, remembered."""

    def __init__(self, model: nn.Module, tokenizer: TokenizerWrapper):
        self._model, self._tokenizer = model, tokenizer
        self._fingerprint = fingerprint(model)
        self._measured: dict[int, float] = {}

    def known(self, vector: SteeringVector) -> dict[int, float] | None:
        """Return the norms at the vector's layers if nothing must be computed for it."""
        stored = vector.residual_norms or {}
        if vector.meta.fingerprint == self._fingerprint and set(vector.layers) <= set(stored):
            return stored
        return self._measured or None

    def of(self, vector: SteeringVector, layers: Iterable[int]) -> dict[int, float]:
        """Return ``layer -> mean ||h_l||``."""
        known = self.known(vector)
        if known is None:
            everywhere = range(self._model.args.num_hidden_layers)
            known = self._measured = mean_norms(self._model, self._tokenizer, vector, everywhere)
        return {layer: known[layer] for layer in layers}
