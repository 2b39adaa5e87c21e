"""The log-probabilities of a prompt's own tokens, for those who score texts with a server."""

from collections.abc import Generator, Sequence

import mlx.core as mx
from mlx_lm.models.cache import KVCache

from ..model.block import make_cache
from ..model.families import head_of
from ..model.likelihood import LOGITS, log_sum_exp
from ..model.model import Model
from ..steering.steering import Steering
from .answer import Detokenizer
from .batch import PREFILL_BESIDE, TokenLogprob, gather_logprobs


class Echo:
    """Reads a prompt, a part at a time, and keeps the log-probability of each token but the first.

        log p(prompt[t] | prompt[:t]),   in nats, log-softmax in float32

    The server reads with it in place of a ``PromptReading`` of its prompt cache: nothing is taken from there, and
    nothing kept. ``done``: all but the last token is read.

    Args:
        count: how many of the likeliest tokens to tell at each place.
    """

    cached_tokens, keeps_answer, next_chunk = 0, False, None

    def __init__(self, model: Model, prompt: Sequence[int], steering: Steering | None, count: int):
        self.done = False
        self._network, self._tokenizer = model.network, model.tokenizer
        self._prompt, self._count = list(prompt), count
        self._caches = make_cache(model, steering, prompt=prompt)
        self._found: tuple[TokenLogprob, ...] = ()
        self._told: set[int] = set()
        self._reading = self._read()

    def rest(self) -> None:
        """Return nothing: it is not read together with other prompts."""

    def advance(self) -> int:
        """Read a part and return its tokens; 0 when there is nothing left to read."""
        count = next(self._reading, 0)
        self.done = not count
        return count

    def caches(self) -> list[KVCache]:
        """Return the caches of the tokens read."""
        return self._caches

    def echo(self, choice: int) -> tuple[TokenLogprob, ...]:
        """Return all tokens, once for each answer; the first one has the log-probability ``None``."""
        found = () if choice in self._told else self._found
        self._told.add(choice)
        return found

    def _read(self) -> Generator[int, None, None]:
        read, scored = self._prompt[:-1], [TokenLogprob(self._prompt[0], None, ())]
        for start in range(0, len(read), PREFILL_BESIDE):
            part = read[start : start + PREFILL_BESIDE]
            h = self._network.model(mx.array([part]), cache=self._caches)[0]
            scored += self._score(h, self._prompt[start + 1 : start + 1 + len(part)])
            yield len(part)
        text = Detokenizer(self._tokenizer)
        told = [one._replace(text=text.add(one.token)) for one in scored]
        told[-1] = told[-1]._replace(text=told[-1].text + text.finish())
        self._found = tuple(told)

    def _score(self, h: mx.array, tokens: Sequence[int]) -> list[TokenLogprob]:
        head, found = head_of(self._network), []
        step = max(1, LOGITS // self._network.args.vocab_size)
        for start in range(0, len(tokens), step):
            logits = head(h[start : start + step]).astype(mx.float32)
            logprobs = logits - log_sum_exp(logits)[:, None]
            some = tokens[start : start + step]
            found += gather_logprobs(logprobs, some, [self._count] * len(some))
        return found
