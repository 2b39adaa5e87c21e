"""One prompt, a stream of tokens. mlx-lm generates; this adds steering, stops and counts."""

import contextlib
import time
from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass

import mlx.core as mx
import mlx.nn as nn
from mlx_lm import stream_generate
from mlx_lm.sample_utils import make_sampler
from mlx_lm.tokenizer_utils import TokenizerWrapper

from .density import density, split_steps
from .errors import InputError
from .patch import make_cache
from .prompt import encode_prompt
from .steering import Steering


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen. Temperature 0 is greedy."""

    temp: float = 0.0
    top_p: float = 1.0
    seed: int | None = None

    def __post_init__(self) -> None:
        if not 0.0 <= self.temp < float("inf"):
            raise InputError(f"temperature {self.temp}: expected 0 (greedy) or more.")
        if self.seed is not None and not 0 <= self.seed < 2**64:
            raise InputError(f"seed {self.seed}: expected a number from 0 to 2**64 - 1.")
        if not 0.0 < self.top_p <= 1.0:
            raise InputError(f"top-p {self.top_p}: expected a number above 0, at most 1.")


@dataclass(frozen=True)
class Generation:
    """A response, whole or so far.

    ``tokens`` counts what the model wrote, without the end-of-turn token but with those of a
    stop text; ``steps`` and ``density`` as in ``density.py``. Times in seconds,
    ``tokens_per_second`` of decoding alone, ``peak_memory_bytes`` as mlx counts it, weights
    included. ``finish_reason`` is ``"stop"`` (end of turn or a stop text), ``"length"``, or
    ``"interrupted"``.
    """

    text: str
    token_ids: tuple[int, ...]
    prompt_tokens: int
    tokens_per_second: float
    time_to_first_token: float
    peak_memory_bytes: int
    finish_reason: str
    steering: Steering | None = None

    @property
    def tokens(self) -> int:
        return len(self.token_ids)

    @property
    def steps(self) -> int:
        return len(split_steps(self.text))

    @property
    def density(self) -> float | None:
        return density(self.tokens, self.steps)


class Stream(Iterator[str]):
    """Iterate over the pieces of a response; ``result`` is what there is of it so far.

    Stopping early (``break``, Ctrl-C) loses nothing: ``result`` then ends with
    ``finish_reason="interrupted"``.
    """

    def __init__(
        self,
        model: nn.Module,
        tokenizer: TokenizerWrapper,
        prompt: Sequence[int],
        *,
        steering: Steering | None,
        max_tokens: int,
        sampling: Sampling,
        stop: Sequence[str],
    ):
        if max_tokens < 1:
            raise InputError(f"max tokens {max_tokens}: expected at least 1.")
        if any(not text for text in stop):
            raise InputError("a stop text is empty; expected at least one character.")
        self._prompt, self._steering = list(prompt), steering
        self._eos = tokenizer.eos_token_ids
        self._text, self._pending, self._finish = "", "", "interrupted"
        self._ids: list[int] = []
        self._first: float | None = None
        self._rate, self._peak = 0.0, 0
        responses = stream_generate(
            model,
            tokenizer,
            self._prompt,
            max_tokens=max_tokens,
            sampler=make_sampler(temp=sampling.temp, top_p=sampling.top_p),
            prompt_cache=make_cache(model, steering, prompt_length=len(self._prompt)),
        )
        self._pieces = self._until_stop(responses, tuple(stop), sampling.seed)

    def __next__(self) -> str:
        return next(self._pieces)

    def close(self) -> None:
        """End the generation now; ``result`` keeps what was said."""
        self._pieces.close()

    @property
    def result(self) -> Generation:
        return Generation(
            text=self._text + (self._pending if self._finish == "interrupted" else ""),
            token_ids=tuple(self._ids),
            prompt_tokens=len(self._prompt),
            tokens_per_second=self._rate,
            time_to_first_token=self._first or 0.0,
            peak_memory_bytes=self._peak,
            finish_reason=self._finish,
            steering=self._steering,
        )

    def _until_stop(
        self, responses: Generator, stops: tuple[str, ...], seed: int | None
    ) -> Generator[str, None, None]:
        """Yield text as soon as it cannot be the beginning of a stop text."""
        if seed is not None:
            mx.random.seed(seed)
        mx.reset_peak_memory()
        began = time.perf_counter()
        with contextlib.closing(responses):
            for response in responses:
                if self._first is None:
                    self._first = time.perf_counter() - began
                if response.token not in self._eos:
                    self._ids.append(response.token)
                self._rate, self._peak = response.generation_tps, mx.get_peak_memory()
                self._pending += response.text
                found = [at for at in map(self._pending.find, stops) if at >= 0]
                if found:
                    self._pending, self._finish = self._pending[: min(found)], "stop"
                    break
                if response.finish_reason:
                    self._finish = response.finish_reason
                    break
                if ready := len(self._pending) - _held_back(self._pending, stops):
                    yield self._release(ready)
        if self._pending:
            yield self._release(len(self._pending))

    def _release(self, length: int) -> str:
        piece, self._pending = self._pending[:length], self._pending[length:]
        self._text += piece
        return piece


def _held_back(text: str, stops: Sequence[str]) -> int:
    """Return how many last characters of ``text`` could begin one of ``stops``."""
    longest = max((len(stop) for stop in stops), default=1) - 1
    for length in range(min(longest, len(text)), 0, -1):
        if any(stop.startswith(text[-length:]) for stop in stops):
            return length
    return 0


def stream(
    model: nn.Module,
    tokenizer: TokenizerWrapper,
    prompt: str | Sequence[int],
    *,
    steering: Steering | None = None,
    system: str | None = None,
    raw: bool = False,
    max_tokens: int = 2048,
    sampling: Sampling = Sampling(),
    stop: Sequence[str] = (),
) -> Stream:
    """Return an iterator over the response, piece by piece.

    Args:
        prompt: a user message (chat template), plain text (``raw``), or token ids.
        steering: what to add to the residual stream; ``None`` is the stock model.
        stop: texts that end the response; they are not part of it.

    Raises:
        InputError, SteeringError, VectorMismatchError: before anything is generated.
    """
    if isinstance(prompt, str):
        tokens: Sequence[int] = encode_prompt(tokenizer, prompt, system=system, raw=raw)
    else:
        tokens = prompt
    if not len(tokens):
        raise InputError("the prompt has no tokens; expected at least one.")
    return Stream(
        model, tokenizer, tokens,
        steering=steering, max_tokens=max_tokens, sampling=sampling, stop=stop,
    )  # fmt: skip


def generate(
    model: nn.Module, tokenizer: TokenizerWrapper, prompt: str | Sequence[int], **options
) -> Generation:
    """Return the whole response; the arguments are those of ``stream``."""
    pieces = stream(model, tokenizer, prompt, **options)
    for _ in pieces:
        pass
    return pieces.result
