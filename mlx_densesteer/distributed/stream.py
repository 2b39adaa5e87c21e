"""One answer over several ranks: every rank computes the tokens that rank 0 chooses."""

from collections.abc import Sequence
from dataclasses import replace

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.generate import generation_stream
from mlx_lm.models.cache import KVCache

from ..generation.brake import Brake
from ..generation.grammar import Grammar
from ..generation.sampling import GREEDY, Sampling
from ..generation.speculation import Draft
from ..generation.stream import Stream, stream
from ..model.block import make_cache
from ..model.cache import clear_buffers
from ..model.model import Model
from ..model.prefix import NO_TOKEN, Chunk, Prefix, pieces
from ..steering.steering import Steering
from .loading import is_pipeline
from .ranks import Ranks


def stream_over_ranks(
    model: Model,
    ranks: Ranks,
    tokens: Sequence[int],
    *,
    steering: Steering | None = None,
    max_tokens: int = 2048,
    sampling: Sampling = GREEDY,
    stop: Sequence[str] = (),
    draft: Draft | None = None,
    brake: Brake | None = None,
    think_limit: int | None = None,
    grammar: Grammar | None = None,
) -> Stream:
    """Return an iterator over the response, as ``generation.stream.stream`` does.

    Every rank has to read it to its end, or to the same piece, and then call ``settle``.

    Args:
        model: what ``load_over_ranks`` returns.
        tokens: the prompt.
        draft, grammar: for a single process only.

    Raises:
        DistributedError: the ranks have different prompts, vectors or options.
        InputError, ContextError, VectorMismatchError, SteeringError: as ``stream``.
    """
    options = {"max_tokens": max_tokens, "sampling": sampling, "stop": stop, "brake": brake}
    options["think_limit"] = think_limit
    if ranks.size == 1:
        return stream(model, tokens, steering=steering, draft=draft, grammar=grammar, **options)
    told = {"tokens": list(tokens)} | {name: repr(value) for name, value in options.items()}
    ranks.same(told, "prompts or options")
    if steering is not None:
        late = steering.budget and steering.budget.tokens
        setting = [
            steering.vector.sha256(),
            list(steering.layers),
            steering.positions,
            steering.calls,
            late,
        ]
        ranks.same(setting, "vectors or options")
        strength, late = ranks.share([steering.strength, late and steering.budget.strength])
        budget = steering.budget and replace(steering.budget, strength=late)
        steering = replace(steering, strength=strength, budget=budget)
    *rest, last = tokens
    network = model.network
    return Stream(
        model,
        PipelinePrefix(network) if is_pipeline(network) else Prefix(network),
        [Chunk(tuple(rest))],
        last,
        steering=steering,
        sampler=ranks.agree(sampling.sampler()),
        **options | {"max_tokens": model.room(len(tokens), max_tokens)},
    )


def settle(ranks: Ranks) -> None:
    """Wait until every rank has computed all of its tokens; call it before a rank may end.

    mlx-lm computes one token more than it gives, which needs the other ranks.
    """
    if ranks.size > 1:
        mx.synchronize(generation_stream)
        ranks.wait()


class PipelinePrefix:
    """This rank's caches of one sequence, one for each of its own blocks.

    ``Prefix`` needs all blocks, since it runs them one by one. This class runs the model's own
    forward pass, which sends and receives the residual stream. It keeps nothing between two calls.
    """

    def __init__(self, network: nn.Module):
        self._network = network
        self.reset()

    def reset(self) -> None:
        """Forget everything."""
        self.caches: list[KVCache] = make_cache(self._network)

    def fill(
        self,
        chunks: Sequence[Chunk],
        steering: Steering | None,
        *,
        last: int = NO_TOKEN,
        answering: bool = False,
    ) -> None:
        """Fill new caches with ``chunks`` under ``steering``, as ``Prefix.fill``.

        Every rank has to call it with the same arguments.
        """
        prompt = [token for chunk in chunks if not chunk.answer for token in chunk.tokens]
        last = next((chunk.tokens[0] for chunk in chunks if chunk.answer), last)
        self.caches = make_cache(self._network, steering, prompt=[*prompt, last])
        tokens = [token for chunk in chunks for token in chunk.tokens]
        for piece in pieces(tokens):
            self._network(mx.array([piece]), cache=self.caches)
            mx.eval([cache.state for cache in self.caches])
            clear_buffers()
