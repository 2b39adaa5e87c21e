"""The model under measurement, with a random vector and prompt, and the caches of either side."""

from dataclasses import dataclass
from functools import cached_property

import numpy as np
from mlx_lm.models.cache import KVCache, make_prompt_cache

from ..model.block import make_cache, patch, unpatch
from ..model.model import Model, load
from ..steering.steering import Steering
from ..steering.vector import SteeringVector, VectorMeta


@dataclass(frozen=True)
class Subject:
    """A model under measurement; ``name`` is what loaded it."""

    name: str
    model: Model

    @classmethod
    def load(cls, name: str) -> "Subject":
        return cls(name, load(name))

    @property
    def dtype(self) -> str:
        """The dtype of the residual stream, and how weights are quantised."""
        info = self.model.info
        quantised = info.quantization != "none"
        return f"{info.dtype}, weights {info.quantization}" if quantised else info.dtype

    @cached_property
    def vector(self) -> SteeringVector:
        """A random vector of about unit norm at every layer, with an extracted one's metadata."""
        width, count = self.model.hidden_size, self.model.layer_count
        rng = np.random.default_rng(0)
        arrays = {layer: rng.normal(size=width) / width**0.5 for layer in range(count)}
        meta = VectorMeta(
            model="random",
            hidden_size=width,
            layer_count=count,
            fingerprint=self.model.fingerprint,
            residual_norms={str(k): norm for k, norm in self.model.measured_norms.items()},
        )
        return SteeringVector(arrays, meta, name="random")

    def steering(self, layers: tuple[int, ...] | None = None, *, strength: float = 0.1) -> Steering:
        """Return a steering with the random vector, by default at every layer: the dearest case."""
        return Steering(self.vector, strength, layers or tuple(self.vector.layers))

    def tokens(self, count: int) -> list[int]:
        """Return a random prompt."""
        vocabulary = min(self.model.vocabulary, 50_000)
        return np.random.default_rng(0).integers(0, vocabulary, count).tolist()

    def caches(self, steering: Steering | None, prompt_length: int) -> list[KVCache]:
        """Give the network the blocks of a side and return that side's empty caches.

        Without steering these are mlx-lm's own blocks and caches.
        """
        self.take_side(steering)
        if steering is None:
            return make_prompt_cache(self.model.network)
        return make_cache(self.model.network, steering, prompt=range(prompt_length))

    def take_side(self, steering: Steering | None) -> None:
        """Give the network mlx-lm's own blocks without steering, else the steered ones."""
        (unpatch if steering is None else patch)(self.model.network)
