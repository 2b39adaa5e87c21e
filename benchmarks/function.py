"""Single decoding steps of a function file against run-time steering."""

import tempfile
from pathlib import Path

import mlx.core as mx
from script import main

from mlx_densesteer.bench.figures import (
    Figure,
    Measurement,
    Tell,
    alternate,
    quiet,
    ratio,
    spread,
    timed,
)
from mlx_densesteer.bench.subject import Subject
from mlx_densesteer.export.function import export_function

STRENGTH = 0.1


def run(
    subject: Subject,
    *,
    capacity: int = 512,
    prompt_tokens: int = 128,
    steps: int = 60,
    seconds: float = 60.0,
    tell: Tell = quiet,
) -> Measurement:
    """Compare single decoding steps through a function file with steps under run-time steering.

    The file is written to a temporary folder, imported by Python, and steered at every layer, as
    the model is. A ratio is run-time seconds over the file's seconds of the same round: above 1 the
    file is faster. Run-time over run-time is the noise.

    Args:
        capacity: tokens of the file's KV cache; it attends over all of them.
        prompt_tokens: random tokens of the prompt.
        steps: decoding steps of each side at most; prompt and steps must fit the capacity.
        seconds: after which no new round begins; 0 is no limit.
    """
    prompt = subject.tokens(prompt_tokens)
    with tempfile.TemporaryDirectory() as folder:
        made = export_function(
            subject.model,
            subject.steering(strength=STRENGTH),
            Path(folder) / "function.mlxfn",
            capacity=capacity,
            chunks=[prompt_tokens],
            progress=tell,
        )
        sides = [
            _RunTimeSteps(subject, prompt),
            _FunctionSteps(made.path, prompt),
            _RunTimeSteps(subject, prompt),
        ]
        for side in sides:
            side.step()
        works = [lambda side=side: timed(side.step) for side in sides]
        live, file, again = alternate(works, rounds=steps, seconds=seconds, tell=tell)
    rate = 1 / spread(live)["median"]
    figure = Figure.of(
        "function_ratio",
        "decode speed, file / run-time steering",
        ratio(live, file),
        ratio(live, again),
        f"capacity {capacity}, after {prompt_tokens} tokens; run-time steering {rate:.1f} tokens/s",
    )
    return Measurement([figure], {"largest_difference": made.largest_difference})


class _RunTimeSteps:
    """Run-time steering: caches and the next token."""

    def __init__(self, subject: Subject, prompt: list[int]):
        self._network = subject.model.network
        self._cache = subject.caches(subject.steering(strength=STRENGTH), len(prompt))
        self._next = mx.array([prompt])

    def step(self) -> None:
        logits = self._network(self._next, cache=self._cache)[:, -1]
        self._next = logits.argmax(axis=-1, keepdims=True)
        mx.eval(self._next, [one.state for one in self._cache])


class _FunctionSteps:
    """The imported function, its cache and the next token."""

    def __init__(self, path: Path, prompt: list[int]):
        self._function = mx.import_function(str(path))
        _, *self._cache = self._function()
        self._next, self._position = mx.array([prompt]), 0

    def step(self) -> None:
        before, self._cache = self._cache, []  # without another owner it is written in place
        inputs = (self._next, mx.array(self._position), mx.array(STRENGTH), *before)
        del before
        logits, *self._cache = self._function(*inputs)
        del inputs
        self._position += self._next.shape[1]
        self._next = logits.argmax(axis=-1, keepdims=True).astype(mx.int32)
        mx.eval(self._next, self._cache)


if __name__ == "__main__":
    main(run)
