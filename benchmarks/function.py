"""A function file (``.mlxfn``) against run-time steering: single decoding steps in turn."""

import tempfile
import time
from pathlib import Path

import mlx.core as mx

from ..export.function import export_function
from .report import Row, ratio
from .subject import Subject
from .timing import Tell, alternate, over, quiet, spread

FIGURES = ("function_ratio",)


def run(
    subject: Subject,
    *,
    capacity: int = 512,
    prompt_tokens: int = 128,
    steps: int = 60,
    seconds: float = 60.0,
    tell: Tell = quiet,
) -> dict[str, object]:
    """Compare single steps through a function file with steps under run-time steering.

    The file is written to a temporary folder, imported by Python, and steered at every layer, as
    the model is. A ratio is run-time seconds over the file's seconds of the same round, so
    above 1 the file is faster; run-time over run-time is the noise.

    Args:
        capacity: tokens of the file's KV cache; it attends over all of them.
        prompt_tokens: random tokens of the prompt.
        steps: decoding steps of each side at most; prompt and steps must fit the capacity.
        seconds: then no new round is begun; 0 is no limit.
    """
    steering, prompt = subject.steering(), subject.tokens(prompt_tokens)
    with tempfile.TemporaryDirectory() as folder:
        made = export_function(
            subject.model, subject.tokenizer, steering, Path(folder) / "function.mlxfn",
            name=subject.name, capacity=capacity, chunks=[prompt_tokens], progress=tell,
        )  # fmt: skip
        sides = [_Live(subject, prompt), _File(made.path, prompt), _Live(subject, prompt)]
        for side in sides:
            side.step()
        live, file, again = alternate(
            [side.step for side in sides], rounds=steps, seconds=seconds, tell=tell
        )
    return {
        "function_ratio": spread(over(live, file))["median"],
        "details": {
            "ratio": spread(over(live, file)),
            "null": spread(over(live, again)),
            "live_seconds": spread(live),
            "capacity": capacity,
            "prompt_tokens": prompt_tokens,
            "largest_difference": made.largest_difference,
        },
    }


def rows(result: dict) -> list[Row]:
    """Return the table's rows."""
    d = result["details"]
    remark = (
        f"capacity {d['capacity']}, after {d['prompt_tokens']} tokens; run-time steering "
        f"{1 / d['live_seconds']['median']:.1f} tokens/s"
    )
    return [ratio("decode speed, file / run-time steering", d["ratio"], d["null"], remark)]


class _Live:
    """Run-time steering: caches and the next token."""

    def __init__(self, subject: Subject, prompt: list[int]):
        self._model = subject.model
        self._cache = subject.caches(subject.steering(), len(prompt))
        self._next = mx.array([prompt])

    def step(self) -> float:
        mx.synchronize()
        began = time.perf_counter()
        logits = self._model(self._next, cache=self._cache)[:, -1]
        self._next = logits.argmax(axis=-1, keepdims=True)
        mx.eval(self._next, [one.state for one in self._cache])
        return time.perf_counter() - began


class _File:
    """The imported function, its cache and the next token."""

    def __init__(self, path: Path, prompt: list[int]):
        self._function = mx.import_function(str(path))
        _, *self._cache = self._function()
        self._next, self._position = mx.array([prompt]), 0

    def step(self) -> float:
        mx.synchronize()
        began = time.perf_counter()
        before, self._cache = self._cache, []  # nobody else holds it: written in place
        inputs = (self._next, mx.array(self._position), mx.array(0.1), *before)
        del before
        logits, *self._cache = self._function(*inputs)
        del inputs
        self._position += self._next.shape[1]
        self._next = logits.argmax(axis=-1, keepdims=True).astype(mx.int32)
        mx.eval(self._next, self._cache)
        return time.perf_counter() - began
