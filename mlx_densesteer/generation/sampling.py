"""Choose the next token: greedily, or with a temperature, top-p and a seed."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache

import mlx.core as mx
from mlx_lm.sample_utils import apply_top_p, make_sampler

from ..errors import InputError

COLDEST = 1e-6  # temperature: below it, 1 / temperature soon overflows float32

Sampler = Callable[[mx.array], mx.array]  # log-probabilities (rows, vocabulary) -> tokens (rows,)


@dataclass(frozen=True)
class Sampling:
    """Temperature, top-p and seed. Temperature 0 is greedy, and so is anything below 1e-6.

    Raises:
        InputError: a value out of its range.
    """

    temp: float = 0.0
    top_p: float = 1.0
    seed: int | None = None

    def __post_init__(self) -> None:
        if not 0.0 <= self.temp < float("inf"):
            raise InputError(f"temperature {self.temp}: expected 0 (greedy) or more.")
        if self.temp < COLDEST:
            object.__setattr__(self, "temp", 0.0)
        if self.seed is not None and not 0 <= self.seed < 2**64:
            raise InputError(f"seed {self.seed}: expected a number from 0 to 2**64 - 1.")
        if not 0.0 < self.top_p <= 1.0:
            raise InputError(f"top-p {self.top_p}: expected a number above 0, at most 1.")

    def sampler(self) -> Sampler:
        """Return a sampler that draws from mlx's global random state.

        Equal settings give the same object: mlx-lm samples the rows that share one in one call.
        """
        return _shared_sampler(self.temp, self.top_p) if self.temp else _shared_sampler(0.0, 1.0)

    def row_sampler(self) -> Sampler:
        """Return a sampler for one row of a batch; with a seed, it has its own random state.

        It draws what ``sampler`` draws after ``mx.random.seed(seed)``, whatever the other rows
        draw.
        """
        if not self.temp or self.seed is None:
            return self.sampler()
        key = mx.random.key(self.seed)

        def draw(logprobs: mx.array) -> mx.array:
            nonlocal key
            if self.top_p < 1.0:
                logprobs = apply_top_p(logprobs, self.top_p)
            key, this = mx.random.split(key)  # as mlx's global state does after mx.random.seed
            return mx.random.categorical(logprobs * (1.0 / self.temp), key=this)

        return draw


GREEDY = Sampling()


@lru_cache(maxsize=64)
def _shared_sampler(temp: float, top_p: float) -> Sampler:
    return make_sampler(temp=temp, top_p=top_p)
