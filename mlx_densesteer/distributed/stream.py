"""The KV caches of a prompt where the blocks are spread over ranks.

``Prefix`` sends the residual stream through the blocks itself, which needs them all. Here the model's own
forward pass does, with what it sends and receives. Nothing is kept between two calls.
"""

from collections.abc import Sequence

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models.cache import KVCache

from ..model.block import make_cache
from ..model.prefix import Chunk, pieces
from ..steering.steering import Steering


class PipelinePrefix:
    """This rank's caches of one sequence, one for each of its own blocks."""

    def __init__(self, model: nn.Module):
        self._model = model
        self.caches: list[KVCache] = make_cache(model)

    def fill(
        self, chunks: Sequence[Chunk], steering: Steering | None, *, answering: bool = False
    ) -> None:
        """Make the caches those of ``chunks`` under ``steering``; as ``Prefix.fill``, from nothing.

        Every rank has to call it with the same arguments.
        """
        prompt = sum(len(chunk.tokens) for chunk in chunks if not chunk.answer)
        self.caches = make_cache(self._model, steering, prompt_length=prompt + 1)
        tokens = [token for chunk in chunks for token in chunk.tokens]
        for piece in pieces(tokens):
            self._model(mx.array([piece]), cache=self.caches)
            mx.eval([cache.state for cache in self.caches])
            mx.clear_cache()
