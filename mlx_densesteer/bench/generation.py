"""Peak memory and speed of whole responses, through mlx-lm's own generation loop."""

import time

import mlx.core as mx
from mlx_lm.generate import generate_step

from ..steering.steering import Steering
from .figures import Figure, Measurement, Tell, alternate, quiet, ratio
from .subject import Subject

FIGURES = ("peak_memory_ratio", "generation_ratio")
SUITE = {"prompt_tokens": 64, "tokens": 24, "rounds": 30, "seconds": 25.0}
QUICK = {"prompt_tokens": 32, "tokens": 12, "rounds": 3, "seconds": 5.0}


def run(
    subject: Subject,
    *,
    prompt_tokens: int = 64,
    tokens: int = 64,
    rounds: int = 6,
    seconds: float = 0.0,
    tell: Tell = quiet,
) -> Measurement:
    """Generate the same number of tokens with stock and with steered blocks and caches, in turn.

    All layers are steered. mlx-lm's ``generate_step`` computes the next token while the last one is
    read, so this is the speed that its users see; an end-of-turn token does not end it. Peak memory
    is what mlx counts from just before the prompt is read, with the weights and without them. Stock
    mlx-lm runs once more as the noise.

    Args:
        prompt_tokens: random tokens of the prompt.
        tokens: tokens to generate.
        rounds: responses of each side.
        seconds: after which no new round begins; 0 is no limit.
    """
    prompt, steering = subject.tokens(prompt_tokens), subject.steering()
    sides = [_Responder(subject, how, prompt, tokens) for how in (None, steering, None)]
    for how in (None, steering):  # warm up
        _Responder(subject, how, prompt, 2).respond()
    works = [side.respond for side in sides]
    taken = alternate(works, rounds=rounds, seconds=seconds, tell=tell)
    stock, steered, again = sides
    memory = ratio(steered.peaks, stock.peaks), ratio(again.peaks, stock.peaks)
    own = ratio(steered.own, stock.own), ratio(again.own, stock.own)
    speed = ratio(taken[0], taken[1]), ratio(taken[0], taken[2])
    peak, own_peak = max(stock.peaks), max(stock.own)
    return Measurement(
        {"peak_memory_ratio": memory[0]["median"], "generation_ratio": speed[0]["median"]},
        [
            Figure.of("peak memory, steered / stock", *memory, f"stock {peak / 2**20:.0f} MiB"),
            Figure.of("  without the weights", *own, f"stock {own_peak / 2**20:.1f} MiB"),
            Figure.of(
                "speed of a response, steered / stock",
                *speed,
                f"{prompt_tokens} tokens read, {tokens} written, mlx-lm's generate_step",
            ),
        ],
        {
            "peak_memory": {"ratio": memory[0], "null": memory[1]},
            "peak_memory_without_weights": {"ratio": own[0], "null": own[1]},
            "stock_peak_bytes": peak,
            "stock_peak_bytes_without_weights": own_peak,
            "generation": {"ratio": speed[0], "null": speed[1]},
            "prompt_tokens": prompt_tokens,
            "tokens": tokens,
        },
    )


class _Responder:
    """One side, and the peaks of its responses in bytes; ``own`` is without what was there before."""

    def __init__(self, subject: Subject, steering: Steering | None, prompt: list[int], count: int):
        self._subject, self._steering = subject, steering
        self._prompt, self._count = prompt, count
        self.peaks: list[int] = []
        self.own: list[int] = []

    def respond(self) -> float:
        """Write one response; return its seconds."""
        caches = self._subject.caches(self._steering, len(self._prompt))
        prompt, network = mx.array(self._prompt), self._subject.model.network
        mx.synchronize()
        mx.clear_cache()
        before = mx.get_active_memory()
        mx.reset_peak_memory()
        began = time.perf_counter()
        for _ in generate_step(prompt, network, max_tokens=self._count, prompt_cache=caches):
            pass
        mx.synchronize()
        taken = time.perf_counter() - began
        self.peaks.append(mx.get_peak_memory())
        self.own.append(mx.get_peak_memory() - before)
        return taken
