"""Steered against stock mlx-lm on the same model: decode and prefill, step by step in turn."""

import io
import time

import mlx.core as mx
from mlx_lm.models.cache import KVCache

from ..steering.steering import Positions, Steering, parse_layers
from .report import Row, ratio
from .subject import Subject
from .timing import Tell, alternate, over, quiet, spread

FIGURES = ("decode_ratio", "prefill_ratio", "extra_primitives")
SUITE = {"steps": 300, "prefills": 60, "seconds": 40.0}
QUICK = {"steps": 30, "prefills": 8, "seconds": 5.0}


def run(
    subject: Subject,
    *,
    layers: str = "all",
    positions: Positions = "all",
    prompt_tokens: int = 64,
    steps: int = 60,
    prefills: int = 12,
    seconds: float = 0.0,
    tell: Tell = quiet,
) -> dict[str, object]:
    """Compare single steps (and prefills) of stock blocks and caches with steered ones.

    Three sides in one process take turns: mlx-lm's own blocks and caches (the model is
    ``unpatch``ed), steered ones, and stock ones once more. Each step waits for its token. A ratio
    is stock seconds over steered seconds of the same round, so 1 is no cost; stock over stock is
    the noise. Operations are those in the graph of one decoding step.

    Args:
        layers: steered layers; all is the worst case.
        positions: all, generated or prompt.
        prompt_tokens: random tokens of the prompt.
        steps: decoding steps of each side.
        prefills: prompts of each side.
        seconds: for steps, and for prefills: then no new round is begun; 0 is no limit.
    """
    chosen = parse_layers([layers], range(subject.layer_count))
    steering = subject.steering(chosen, positions=positions)
    prompt = subject.tokens(prompt_tokens)
    sides = [_Side(subject, how, prompt) for how in (None, steering, None)]
    for side in sides:  # compiled, and in the caches of the processor
        side.prefill()
        side.step()
    limits = {"seconds": seconds, "tell": tell}
    prefill = alternate([s.prefill for s in sides], rounds=prefills, **limits)
    decode = alternate([s.step for s in sides], rounds=steps, **limits)
    operations = {"stock": primitives(subject, None), "steered": primitives(subject, steering)}
    details = {
        name: {
            "ratio": spread(over(stock, steered)),
            "null": spread(over(stock, again)),
            "stock_seconds": spread(stock),
        }
        for name, (stock, steered, again) in (("decode", decode), ("prefill", prefill))
    }
    return {
        "decode_ratio": details["decode"]["ratio"]["median"],
        "prefill_ratio": details["prefill"]["ratio"]["median"],
        "extra_primitives": operations["steered"] - operations["stock"],
        "details": details
        | {
            "primitives": operations,
            "steered_layers": len(chosen),
            "positions": positions,
            "prompt_tokens": prompt_tokens,
        },
    }


def rows(result: dict) -> list[Row]:
    """Return the table's rows."""
    d = result["details"]
    decode, prefill = d["decode"], d["prefill"]
    rate = 1 / decode["stock_seconds"]["median"]
    fill = d["prompt_tokens"] / prefill["stock_seconds"]["median"]
    where = f"{d['steered_layers']} layers steered, positions {d['positions']}"
    counted = f"stock {d['primitives']['stock']}, steered {d['primitives']['steered']}"
    return [
        ratio("decode speed, steered / stock", decode["ratio"], decode["null"],
              f"{where}; stock {rate:.1f} tokens/s"),
        ratio("prefill speed, steered / stock", prefill["ratio"], prefill["null"],
              f"{d['prompt_tokens']} tokens; stock {fill:.1f} tokens/s"),
        Row("operations added to a decoding step", str(result["extra_primitives"]), remark=counted),
    ]  # fmt: skip


class _Side:
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
        began = time.perf_counter()
        logits = self._subject.model(self._next, cache=self._cache)
        self._next = logits[:, -1].argmax(axis=-1, keepdims=True)
        mx.eval(self._next, [c.state for c in self._cache])
        return time.perf_counter() - began


def primitives(subject: Subject, steering: Steering | None) -> int:
    """Count the operations of one decoding step's graph."""
    prompt = subject.tokens(3)
    cache = subject.caches(steering, len(prompt))
    subject.model(mx.array([prompt]), cache=cache)
    mx.eval([c.state for c in cache])
    graph = io.StringIO()
    mx.export_to_dot(graph, subject.model(mx.array([prompt[:1]]), cache=cache))
    return graph.getvalue().count("shape=rectangle")
