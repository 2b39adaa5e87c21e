"""What is measured: a loaded model, steerings for it that cost what any others cost, prompts."""

from dataclasses import dataclass, field
from functools import cached_property

import mlx.nn as nn
import numpy as np
from mlx_lm.models.cache import KVCache, make_prompt_cache
from mlx_lm.tokenizer_utils import TokenizerWrapper

from ..demo.problems import held_out
from ..model.block import make_cache, patch, unpatch
from ..model.dose import mean_norms, strength_for
from ..model.model import dtype_name, fingerprint, load
from ..model.prompt import encode_prompt
from ..steering.steering import Positions, Steering
from ..steering.vector import SteeringVector, VectorMeta

DOSE = 0.1  # where the text matters: a mild one, so that it stays text


@dataclass(frozen=True)
class Subject:
    """A model under measurement; ``name`` is what loaded it."""

    name: str
    model: nn.Module = field(repr=False)
    tokenizer: TokenizerWrapper = field(repr=False)

    @classmethod
    def load(cls, name: str) -> "Subject":
        return cls(name, *load(name))

    @property
    def layer_count(self) -> int:
        return self.model.args.num_hidden_layers

    @property
    def dtype(self) -> str:
        """The dtype of the residual stream, and the bits of quantised weights."""
        bits = getattr(self.model.model.layers[0].mlp.down_proj, "bits", None)
        dtype = dtype_name(self.model.model.norm.weight.dtype)
        return f"{dtype}, weights of {bits} bits" if bits else dtype

    @cached_property
    def vector(self) -> SteeringVector:
        """A random vector of about unit norm at every layer: its speed is that of any other."""
        width = self.model.args.hidden_size
        rng = np.random.default_rng(0)
        arrays = {i: rng.normal(size=width) / width**0.5 for i in range(self.layer_count)}
        meta = VectorMeta(model="random", hidden_size=width, layer_count=self.layer_count)
        return SteeringVector(arrays, meta, name="random")

    def steering(
        self,
        layers: tuple[int, ...] | None = None,
        *,
        strength: float = 0.1,
        positions: Positions = "all",
    ) -> Steering:
        """Return a steering with the random vector, by default at every layer: the worst case."""
        return Steering(self.vector, strength, layers, positions)

    @cached_property
    def norms(self) -> dict[int, float]:
        """The mean norm of the residual stream at each layer (``dose.mean_norms``)."""
        return mean_norms(self.model, self.tokenizer, self.vector, range(self.layer_count))

    def mild(self, layer: int, dose: float = DOSE) -> Steering:
        """Return a steering of a relative dose at one layer."""
        strength = strength_for(self.vector, {layer: self.norms[layer]}, dose)
        return self.steering((layer,), strength=strength)

    @property
    def fingerprint(self) -> str:
        return fingerprint(self.model)

    def tokens(self, count: int) -> list[int]:
        """Return a random prompt."""
        rng = np.random.default_rng(0)
        return [int(t) for t in rng.integers(0, min(self.model.args.vocab_size, 50_000), count)]

    def questions(self, count: int) -> list[list[int]]:
        """Return the token ids of arithmetic stories, in the chat template if there is one."""
        raw = not self.tokenizer.has_chat_template
        return [encode_prompt(self.tokenizer, p.question, raw=raw) for p in held_out(count)]

    def caches(self, steering: Steering | None, prompt_length: int) -> list[KVCache]:
        """Return empty caches: mlx-lm's own for its own blocks without steering, else ours."""
        if steering is None:
            return make_prompt_cache(unpatch(self.model))
        return make_cache(self.model, steering, prompt_length=prompt_length)

    def take_side(self, steering: Steering | None) -> None:
        """Give the model the blocks of a side: stock ones without steering."""
        (unpatch if steering is None else patch)(self.model)
