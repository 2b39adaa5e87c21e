"""The model under measurement, with steerings, prompts and caches that cost what any others cost."""

import shutil
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import mlx.core as mx
import numpy as np
from mlx_lm.models.cache import KVCache, make_prompt_cache

from .. import demo
from ..demo.problems import held_out
from ..model.block import make_cache, patch, unpatch
from ..model.model import Model, find, load
from ..model.prompt import encode_prompt
from ..steering.request import Amount
from ..steering.steering import Positions, Steering
from ..steering.vector import SteeringVector, VectorMeta

MILD = 0.1  # a dose at which text stays text


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
        return info.dtype + (
            f", weights {info.quantization}" if info.quantization != "none" else ""
        )

    @cached_property
    def vector(self) -> SteeringVector:
        """A random vector of about unit norm at every layer, with the metadata of an extracted one."""
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

    def steering(
        self,
        layers: tuple[int, ...] | None = None,
        *,
        strength: float = 0.1,
        positions: Positions = "all",
    ) -> Steering:
        """Return a steering with the random vector, by default at every layer: the dearest case."""
        chosen = tuple(self.vector.layers) if layers is None else layers
        return Steering(self.vector, strength, chosen, positions)

    def dosed(self, layer: int, dose: float = MILD) -> Steering:
        """Return a steering at one layer by its dose; 0.1 is 10 % of the residual stream."""
        norms = self.model.norms(self.vector, [layer])
        return self.steering((layer,), strength=Amount(dose, True).strength(self.vector, norms))

    def tokens(self, count: int) -> list[int]:
        """Return a random prompt."""
        vocabulary = min(self.model.network.args.vocab_size, 50_000)
        return np.random.default_rng(0).integers(0, vocabulary, count).tolist()

    def questions(self, count: int) -> list[list[int]]:
        """Return the token ids of arithmetic stories, in the chat template if there is one."""
        tokenizer = self.model.tokenizer
        raw = not tokenizer.has_chat_template
        return [encode_prompt(tokenizer, p.question, raw=raw) for p in held_out(count)]

    def caches(self, steering: Steering | None, prompt_length: int) -> list[KVCache]:
        """Give the network the blocks of a side and return that side's empty caches.

        Without steering these are mlx-lm's own blocks and caches.
        """
        self.take_side(steering)
        if steering is None:
            return make_prompt_cache(self.model.network)
        return make_cache(self.model.network, steering, prompt_length=prompt_length)

    def take_side(self, steering: Steering | None) -> None:
        """Give the network mlx-lm's own blocks without steering, else the steered ones."""
        (unpatch if steering is None else patch)(self.model.network)

    def folder(self, place: Path) -> Path:
        """Return a model folder that mlx-lm and this package compute in the same dtype.

        The embedded model is in bfloat16. On the CPU this package computes it in float32 and mlx-lm
        does not, so there it is a copy in float32, made in ``place``.
        """
        found = find(self.name)
        if found != demo.MODEL or mx.default_device() != mx.Device(mx.cpu):
            return found
        copy = shutil.copytree(found, place / "demo-float32")
        weights = mx.load(str(copy / "model.safetensors"))
        floats = {name: array.astype(mx.float32) for name, array in weights.items()}
        mx.save_safetensors(str(copy / "model.safetensors"), floats, metadata={"format": "mlx"})
        return copy
