"""Decoding steps and prefills one by one, steered against stock mlx-lm on the same model."""

import io

import mlx.core as mx
from mlx_lm.models.cache import KVCache

from ..steering.steering import Steering
from .figures import Figure, Measurement, Tell, alternate, quiet, ratio, spread, timed
from .subject import Subject

FIGURES = ("decode_ratio", "prefill_ratio", "extra_primitives")
QUICK = {"steps": 30, "prefills": 8, "seconds": 5.0}
PROMPT = 64  # random tokens


def run(
    subject: Subject,
    *,
    steps: int = 300,
    prefills: int = 60,
    seconds: float = 40.0,
    tell: Tell = quiet,
) -> Measurement:
    """Compare single steps, and prefills, of stock blocks and caches with steered ones.

    Three sides take turns: mlx-lm's own blocks and caches, ours with every layer steered, and stock
    ones once more. Each step waits for its token. A ratio is stock seconds over steered seconds of
    the same round: 1 is no cost, stock over stock is the noise. Operations are those in the graph
    of one decoding step.

    Args:
        steps: decoding steps of each side.
        prefills: prompts of each side.
        seconds: after which no new round begins, for steps and for prefills.
    """
    steering, prompt = subject.steering(), subject.tokens(PROMPT)
    sides = [_Decoder(subject, how, prompt) for how in (None, steering, None)]
    for side in sides:  # compile, and warm the processor's caches
        side.prefill()
        side.step()
    table = []
    for name, tokens, works, rounds in (
        ("decode", 1, [side.step for side in sides], steps),
        ("prefill", PROMPT, [side.prefill for side in sides], prefills),
    ):
        stock, steered, again = alternate(works, rounds=rounds, seconds=seconds, tell=tell)
        ours, theirs = (tokens / spread(one)["median"] for one in (steered, stock))
        table.append(
            Figure.of(
                f"{name}_ratio",
                f"{name} speed, steered / stock",
                ratio(stock, steered),
                ratio(stock, again),
                f"every layer steered: {ours:.1f} tokens/s, stock {theirs:.1f}",
            )
        )
    before, after = primitives(subject, None), primitives(subject, steering)
    name, remark = "operations added to a decoding step", f"stock {before}, steered {after}"
    return Measurement([*table, Figure(FIGURES[-1], name, after - before, remark=remark)])


class _Decoder:
    """One side's caches and its next token."""

    def __init__(self, subject: Subject, steering: Steering | None, prompt: list[int]):
        self._subject, self._steering, self._prompt = subject, steering, prompt
        self._cache: list[KVCache] = []
        self._next = mx.array([prompt])

    def prefill(self) -> float:
        self._next = mx.array([self._prompt])
        self._cache = self._subject.caches(self._steering, len(self._prompt))
        return self.step()

    def step(self) -> float:
        """Run one forward pass over what is next; return its seconds."""
        self._subject.take_side(self._steering)
        mx.synchronize()
        return timed(self._forward)

    def _forward(self) -> None:
        logits = self._subject.model.network(self._next, cache=self._cache)
        self._next = logits[:, -1].argmax(axis=-1, keepdims=True)
        mx.eval(self._next, [c.state for c in self._cache])


def primitives(subject: Subject, steering: Steering | None) -> int:
    """Count the operations in the graph of one decoding step."""
    network, prompt = subject.model.network, subject.tokens(3)
    cache = subject.caches(steering, len(prompt))
    network(mx.array([prompt]), cache=cache)
    mx.eval([c.state for c in cache])
    graph = io.StringIO()
    mx.export_to_dot(graph, network(mx.array([prompt[:1]]), cache=cache))
    return graph.getvalue().count("shape=rectangle")
