"""Whole responses through mlx-lm's own generation loop: speed and peak memory."""

import mlx.core as mx
from mlx_lm.generate import generate_step
from mlx_lm.models.cache import KVCache

from ..steering.steering import Steering
from .figures import Figure, Measurement, Tell, alternate, quiet, ratio, timed
from .subject import Subject

FIGURES = ("peak_memory_ratio", "generation_ratio")
QUICK = {"tokens": 12, "rounds": 3, "seconds": 5.0}
PROMPT = 64  # random tokens


def run(
    subject: Subject,
    *,
    tokens: int = 24,
    rounds: int = 30,
    seconds: float = 25.0,
    tell: Tell = quiet,
) -> Measurement:
    """Generate the same number of tokens with stock and with steered blocks and caches, in turn.

    Every layer is steered. mlx-lm's ``generate_step`` computes the next token while the last one is
    read, so this is the speed that its users see; an end-of-turn token does not end it. Peak memory
    is what mlx counts from just before the prompt is read, with the weights and without them. Stock
    mlx-lm runs once more as the noise.

    Args:
        tokens: tokens to generate.
        rounds: responses of each side.
        seconds: after which no new round begins.
    """
    prompt, steering = subject.tokens(PROMPT), subject.steering()
    sides = [_Responder(subject, how, prompt, tokens) for how in (None, steering, None)]
    for how in (None, steering):  # warm up
        _Responder(subject, how, prompt, 2).respond()
    works = [side.respond for side in sides]
    taken = alternate(works, rounds=rounds, seconds=seconds, tell=tell)
    stock, steered, again = sides
    peak, own = max(stock.peaks) / 2**20, max(stock.own) / 2**20
    return Measurement(
        [
            Figure.of(
                "peak_memory_ratio",
                "peak memory, steered / stock",
                ratio(steered.peaks, stock.peaks),
                ratio(again.peaks, stock.peaks),
                f"stock {peak:.0f} MiB",
            ),
            Figure.of(
                "",
                "  without the weights",
                ratio(steered.own, stock.own),
                ratio(again.own, stock.own),
                f"stock {own:.1f} MiB",
            ),
            Figure.of(
                "generation_ratio",
                "speed of a response, steered / stock",
                ratio(taken[0], taken[1]),
                ratio(taken[0], taken[2]),
                f"{PROMPT} tokens read, {tokens} written, mlx-lm's generate_step",
            ),
        ]
    )


class _Responder:
    """One side; ``peaks`` of its responses in bytes, ``own`` without what was allocated before."""

    def __init__(self, subject: Subject, steering: Steering | None, prompt: list[int], tokens: int):
        self._subject, self._steering = subject, steering
        self._prompt, self._tokens = mx.array(prompt), tokens
        self.peaks: list[int] = []
        self.own: list[int] = []

    def respond(self) -> float:
        """Write one response; return its seconds."""
        caches = self._subject.caches(self._steering, self._prompt.size)
        mx.synchronize()
        mx.clear_cache()
        before = mx.get_active_memory()
        mx.reset_peak_memory()
        seconds = timed(lambda: self._generate(caches))
        self.peaks.append(mx.get_peak_memory())
        self.own.append(mx.get_peak_memory() - before)
        return seconds

    def _generate(self, caches: list[KVCache]) -> None:
        network = self._subject.model.network
        for _ in generate_step(self._prompt, network, max_tokens=self._tokens, prompt_cache=caches):
            pass
        mx.synchronize()
