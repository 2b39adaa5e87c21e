"""Peak memory and speed of whole responses, through mlx-lm's own generation loop."""

import time

import mlx.core as mx
from mlx_lm.generate import generate_step

from ..steering.steering import Steering
from .report import Row, ratio
from .subject import Subject
from .timing import Tell, alternate, over, quiet, spread

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
) -> dict[str, object]:
    """Generate the same number of tokens with stock and with steered blocks and caches, in turn.

    All layers are steered. mlx-lm's ``generate_step`` runs ahead of what is read, as it does for
    its users, so this is the speed that they see; its end-of-turn token ends nothing here. Peak
    memory is what mlx counts from just before the prompt is read, the weights included
    (``peak_memory_ratio``) and without them. Stock mlx-lm runs once more as the null.

    Args:
        prompt_tokens: random tokens of the prompt.
        tokens: tokens to generate.
        rounds: responses of each side.
        seconds: then no new round is begun; 0 is no limit.
    """
    prompt = subject.tokens(prompt_tokens)
    sides = [_Side(subject, how, prompt, tokens) for how in (None, subject.steering(), None)]
    for side in sides[:2]:
        _Side(subject, side.steering, prompt, 2).respond()  # warm up
    stock, steered, again = alternate(
        [side.respond for side in sides], rounds=rounds, seconds=seconds, tell=tell
    )
    memory = [spread(over(sides[i].peaks, sides[0].peaks)) for i in (1, 2)]
    own = [spread(over(sides[i].own, sides[0].own)) for i in (1, 2)]
    speed = spread(over(stock, steered))
    return {
        "peak_memory_ratio": memory[0]["median"],
        "generation_ratio": speed["median"],
        "details": {
            "peak_memory": {"ratio": memory[0], "null": memory[1]},
            "peak_memory_without_weights": {"ratio": own[0], "null": own[1]},
            "stock_peak_bytes": max(sides[0].peaks),
            "stock_peak_bytes_without_weights": max(sides[0].own),
            "generation": {"ratio": speed, "null": spread(over(stock, again))},
            "prompt_tokens": prompt_tokens,
            "tokens": tokens,
        },
    }


def rows(result: dict) -> list[Row]:
    """Return the table's rows."""
    d = result["details"]
    whole, own, speed = d["peak_memory"], d["peak_memory_without_weights"], d["generation"]
    return [
        ratio("peak memory, steered / stock", whole["ratio"], whole["null"],
              f"stock {d['stock_peak_bytes'] / 2**20:.0f} MiB"),
        ratio("  without the weights", own["ratio"], own["null"],
              f"stock {d['stock_peak_bytes_without_weights'] / 2**20:.1f} MiB"),
        ratio("speed of a response, steered / stock", speed["ratio"], speed["null"],
              f"{d['prompt_tokens']} tokens read, {d['tokens']} written, mlx-lm's generate_step"),
    ]  # fmt: skip


class _Side:
    """One side, and the peaks of its responses in bytes: ``own`` without what was there before."""

    def __init__(self, subject: Subject, steering: Steering | None, prompt: list[int], count: int):
        self.steering = steering
        self._subject = subject
        self._prompt, self._count = prompt, count
        self.peaks: list[int] = []
        self.own: list[int] = []

    def respond(self) -> float:
        """Write one response; return its seconds."""
        caches = self._subject.caches(self.steering, len(self._prompt))
        mx.synchronize()
        mx.clear_cache()
        before = mx.get_active_memory()
        mx.reset_peak_memory()
        began = time.perf_counter()
        for _ in generate_step(
            mx.array(self._prompt), self._subject.model, max_tokens=self._count, prompt_cache=caches
        ):
            pass
        mx.synchronize()
        taken = time.perf_counter() - began
        self.peaks.append(mx.get_peak_memory())
        self.own.append(mx.get_peak_memory() - before)
        return taken
