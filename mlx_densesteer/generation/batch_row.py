"""One row of a batch: what goes in, how its tokens are drawn, and what has come out so far."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models.cache import KVCache
from mlx_lm.sample_utils import apply_top_p, make_sampler
from mlx_lm.tokenizer_utils import StreamingDetokenizer

from ..errors import SteeringError
from ..model.block import make_cache
from ..model.cache import SteeredKVCache
from ..steering.steering import Steering
from .stopping import Pending
from .stream import Generation, Sampling


class TokenLogprob(NamedTuple):
    """A generated token with its log-probability, and the likeliest tokens in its place."""

    token: int
    logprob: float
    top: tuple[tuple[int, float], ...]


@dataclass(eq=False)
class Row:
    """One row: what goes in, and what has come out so far."""

    number: int
    prompt: list[int]
    caches: Sequence[KVCache]
    steering: Steering | None
    limit: int
    sampler: Callable[[mx.array], mx.array]
    pending: Pending
    detokenizer: StreamingDetokenizer
    alternatives: int | None = None  # how many to tell of each token; None: no log-probabilities
    uid: int | None = None
    first: float = 0.0
    reason: str | None = None

    def __post_init__(self) -> None:
        self.prompt_tokens = self.caches[0].offset + len(self.prompt)
        self.ids: list[int] = []
        self.untold: list[TokenLogprob] = []
        self.began = time.perf_counter()

    def take(self, token: int, ended: str | None, eos: set[int], logprobs: mx.array) -> str:
        """Add one token, return what can be said; ``ended`` is set when it was the row's last.

        ``logprobs`` are those of the whole vocabulary, ``(vocabulary,)``.
        """
        self.first = self.first or time.perf_counter()
        if token not in eos:
            self.ids.append(token)
            self.detokenizer.add_token(token)
            if self.alternatives is not None:
                self.untold.append(_logprob(token, logprobs, self.alternatives))
        if ended:
            self.detokenizer.finalize()
        text = self.pending.feed(self.detokenizer.last_segment)
        if self.pending.stopped:
            self.reason = "stop"
        elif ended:
            self.reason = ended
            text += self.pending.finish()
        return text

    def tell(self) -> tuple[TokenLogprob, ...]:
        """Return the log-probabilities that were not told yet."""
        told, self.untold = tuple(self.untold), []
        return told

    def result(self) -> Generation:
        seconds = time.perf_counter() - self.first
        return Generation(
            text=self.pending.text + self.pending.held,
            token_ids=tuple(self.ids),
            prompt_tokens=self.prompt_tokens,
            # from the first token to the last: one less than there are
            tokens_per_second=max(0, len(self.ids) - 1) / seconds if seconds > 0 else 0.0,
            time_to_first_token=self.first - self.began if self.first else 0.0,
            peak_memory_bytes=mx.get_peak_memory(),
            finish_reason=self.reason or "interrupted",
            steering=self.steering,
        )


def _logprob(token: int, logprobs: mx.array, alternatives: int) -> TokenLogprob:
    logprobs = logprobs.astype(mx.float32)
    alternatives = min(alternatives, logprobs.size)
    likeliest: list[int] = []
    if alternatives:
        found = mx.argpartition(-logprobs, kth=alternatives - 1)[:alternatives]
        likeliest = found[mx.argsort(-logprobs[found])].tolist()
    values = logprobs[mx.array([token, *likeliest])].tolist()
    return TokenLogprob(token, values[0], tuple(zip(likeliest, values[1:], strict=True)))


def own_caches(model: nn.Module, caches: Sequence[KVCache]) -> list[KVCache]:
    """Return caches with the content that ``caches`` have now; their owner may go on filling his.

    A slice of an array is a value: later writes into the owner's do not reach it.
    """
    own = make_cache(model)
    kinds = sorted({type(cache).__name__ for cache in caches})
    if len(caches) != len(own) or kinds != [SteeredKVCache.__name__]:
        raise SteeringError(
            f"{len(caches)} caches of class {', '.join(kinds)}: expected {len(own)} SteeredKVCache, "
            "one for each block. Make them with make_cache(model, steering), without kv_bits."
        )
    lengths = sorted({cache.offset for cache in caches})
    if len(lengths) > 1:
        raise SteeringError(f"the caches hold {lengths} tokens: expected as many in every block.")
    for mine, theirs in zip(own, caches, strict=True):
        mine.shift = theirs.shift
        if theirs.offset:
            mine.keys = theirs.keys[..., : theirs.offset, :]
            mine.values = theirs.values[..., : theirs.offset, :]
            mine.offset = theirs.offset
    return own


def make_row_sampler(sampling: Sampling) -> Callable[[mx.array], mx.array]:
    """Return what chooses tokens from log-probabilities ``(rows, vocabulary)``.

    mlx-lm samples all rows in one call while they share one sampler object.
    """
    if not sampling.temp:
        return _shared_sampler(0.0, 1.0)
    if sampling.seed is None:
        return _shared_sampler(sampling.temp, sampling.top_p)
    key = mx.random.key(sampling.seed)

    def draw(logprobs: mx.array) -> mx.array:
        nonlocal key
        if sampling.top_p < 1.0:
            logprobs = apply_top_p(logprobs, sampling.top_p)
        key, this = mx.random.split(key)  # as mlx's global state does after mx.random.seed
        return mx.random.categorical(logprobs * (1.0 / sampling.temp), key=this)

    return draw


@lru_cache(maxsize=64)
def _shared_sampler(temp: float, top_p: float) -> Callable[[mx.array], mx.array]:
    return make_sampler(temp=temp, top_p=top_p)
