"""The log-probabilities of a prompt's own tokens, for those who score texts with a server."""

from collections.abc import Generator, Sequence

import mlx.core as mx
import mlx.nn as nn

from ..model.cache import SteeredKVCache
from ..model.families import head_of
from ..model.likelihood import LOGITS, log_sum_exp
from ..model.model import Model
from .answer import Detokenizer
from .batch import TokenLogprob, gather_logprobs


class Echo:
    """Reads a prompt, a part at a time, and keeps the log-probability of each token but the first.

        log p(prompt[t] | prompt[:t]),   in nats, log-softmax in float32

    Args:
        caches: empty ones, with the steering.
        count: how many of the likeliest tokens to tell at each place.

    ``found`` has all tokens once ``read`` has ended; the first one's log-probability is ``None``.
    """

    def __init__(
        self, model: Model, prompt: Sequence[int], caches: Sequence[SteeredKVCache], count: int
    ):
        self.found: list[TokenLogprob] = []
        self.caches = caches
        self._network, self._tokenizer = model.network, model.tokenizer
        self._prompt, self._count = list(prompt), count

    def read(self, part: int) -> Generator[int, None, None]:
        """Read the prompt but for its last token; yield the number of tokens after each part."""
        scored = [TokenLogprob(self._prompt[0], None, ())]
        for start in range(0, len(self._prompt) - 1, part):
            inputs = self._prompt[start : min(start + part, len(self._prompt) - 1)]
            h = self._network.model(mx.array([inputs]), cache=self.caches)[0]
            scored += self._score(h, self._prompt[start + 1 : start + 1 + len(inputs)])
            yield len(inputs)
        text = Detokenizer(self._tokenizer)
        told = [one._replace(text=text.add(one.token)) for one in scored]
        told[-1] = told[-1]._replace(text=told[-1].text + text.finish())
        self.found = told

    def _score(self, h: mx.array, tokens: Sequence[int]) -> list[TokenLogprob]:
        head: nn.Module = head_of(self._network)
        step, found = max(1, LOGITS // self._network.args.vocab_size), []
        for start in range(0, len(tokens), step):
            logits = head(h[start : start + step]).astype(mx.float32)
            logprobs = logits - log_sum_exp(logits)[:, None]
            some = tokens[start : start + step]
            found += gather_logprobs(logprobs, some, [self._count] * len(some))
        return found
