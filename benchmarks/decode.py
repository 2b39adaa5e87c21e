"""Steered against stock mlx-lm on the same model: decode and prefill, paired in one process.

    python benchmarks/decode.py MODEL [--steps 60] [--prefills 12] [--layers all] [--json]

Each pair is one step (or one prefill) with mlx-lm's own blocks and caches (`unpatch`ed) and
one steered, a fraction of a second apart and in alternating order, so that a machine whose
speed drifts favours neither side. The ratio is steered speed over stock speed, pair by pair:
1 is no cost. A null comparison, stock against stock, shows what the noise alone looks like.
"""

import argparse
import datetime
import io
import json
import platform
import statistics
import sys
import time

import mlx.core as mx
import mlx_lm
import numpy as np
from mlx_lm.models.cache import make_prompt_cache

from mlx_densesteer import Steering, SteeringVector, load, make_cache
from mlx_densesteer.patch import patch, unpatch
from mlx_densesteer.steering import parse_layers
from mlx_densesteer.vector import VectorMeta


def new_cache(model, steering: Steering | None, prompt: list[int]) -> list:
    """Put the model into the side's state, and return an empty cache for it."""
    if steering is None:
        return make_prompt_cache(unpatch(model))
    return make_cache(model, steering, prompt_length=len(prompt))


def forward(
    model, steering: Steering | None, tokens: mx.array, cache: list
) -> tuple[mx.array, float]:
    """Run one forward pass; return the next token and the seconds that it took."""
    (unpatch if steering is None else patch)(model)
    mx.synchronize()
    began = time.perf_counter()
    token = model(tokens, cache=cache)[:, -1].argmax(axis=-1, keepdims=True)
    mx.eval(token, [c.state for c in cache])
    return token, time.perf_counter() - began


def paired(model, steering: Steering | None, prompt: list[int], options) -> dict[str, list[float]]:
    """Return stock seconds, and the ratios stock / ``steering``, of prefills and of steps."""
    sides = (None, steering)
    rows: dict[str, list[float]] = {
        "prefill": [],
        "decode": [],
        "stock_prefill": [],
        "stock_decode": [],
    }
    for number in range(options.prefills + options.steps):
        kind = "prefill" if number < options.prefills else "decode"
        seconds = [0.0, 0.0]
        if kind == "prefill":
            caches = [new_cache(model, side, prompt) for side in sides]
            tokens = [mx.array([prompt])] * 2
            following = list(tokens)
        for side in (0, 1) if number % 2 == 0 else (1, 0):
            following[side], seconds[side] = forward(model, sides[side], tokens[side], caches[side])
        tokens = following
        rows[kind].append(seconds[0] / seconds[1])
        rows[f"stock_{kind}"].append(seconds[0])
    return rows


def spread(values: list[float]) -> dict[str, float]:
    ordered = sorted(values)
    quarter = len(ordered) // 4
    return {
        "median": statistics.median(ordered),
        "low": ordered[quarter],
        "high": ordered[-1 - quarter],
    }


def primitives(model, steering: Steering | None) -> int:
    """Count the operations of one decoding step's graph."""
    cache = new_cache(model, steering, [1, 2, 3])
    model(mx.array([[1, 2, 3]]), cache=cache)
    mx.eval([c.state for c in cache])
    graph = io.StringIO()
    mx.export_to_dot(graph, model(mx.array([[4]]), cache=cache))
    return graph.getvalue().count("shape=rectangle")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("--layers", default="all", help="steered layers; all is the worst case")
    parser.add_argument("--prompt-tokens", type=int, default=64)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--prefills", type=int, default=12)
    parser.add_argument("--positions", default="all")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    model, _ = load(options.model)
    width, count = model.args.hidden_size, model.args.num_hidden_layers
    rng = np.random.default_rng(0)
    arrays = {i: (0.01 * rng.normal(size=width)).astype(np.float32) for i in range(count)}
    vector = SteeringVector(
        arrays, VectorMeta(model="random", hidden_size=width, layer_count=count)
    )
    layers = parse_layers([options.layers], range(count))
    steering = Steering(vector, 1.0, layers=layers, positions=options.positions)
    prompt = [
        int(t) for t in rng.integers(0, min(model.args.vocab_size, 50_000), options.prompt_tokens)
    ]
    for side in (None, steering):  # warm up
        forward(model, side, mx.array([prompt]), new_cache(model, side, prompt))
    null = paired(model, None, prompt, options)
    steered = paired(model, steering, prompt, options)
    result = {
        "decode_ratio": spread(steered["decode"]),
        "prefill_ratio": spread(steered["prefill"]),
        "null_decode_ratio": spread(null["decode"]),
        "null_prefill_ratio": spread(null["prefill"]),
        "stock_decode_tokens_per_second": 1 / statistics.median(steered["stock_decode"]),
        "stock_prefill_tokens_per_second": options.prompt_tokens
        / statistics.median(steered["stock_prefill"]),
        "primitives": {"stock": primitives(model, None), "steered": primitives(model, steering)},
        "steered_layers": len(layers),
        "model_layers": count,
        "positions": options.positions,
        "dtype": str(model.model.norm.weight.dtype),
        "device": str(mx.default_device()),
        "machine": f"{platform.system()} {platform.machine()}",
        "versions": {"mlx": mx.__version__, "mlx-lm": mlx_lm.__version__},
        "date": datetime.date.today().isoformat(),
        "command": " ".join(["benchmarks/decode.py", *sys.argv[1:]]),
    }
    if options.json:
        print(json.dumps(result))
        return
    print(f"{len(layers)} of {count} layers steered, positions {options.positions}, {result['dtype']}, "
          f"{result['device']}, {result['machine']}, mlx {mx.__version__}, mlx-lm {mlx_lm.__version__}")  # fmt: skip
    print("speed relative to stock         median   quartiles")
    for name in ("decode_ratio", "null_decode_ratio", "prefill_ratio", "null_prefill_ratio"):
        s = result[name]
        label = f"{name.split('_')[-2]}{', stock against stock' if 'null' in name else ''}"
        print(f"  {label:<30}{s['median']:.3f}    {s['low']:.3f} .. {s['high']:.3f}")
    print(f"stock decode {result['stock_decode_tokens_per_second']:.1f} tokens/s, "
          f"prefill {result['stock_prefill_tokens_per_second']:.1f} tokens/s")  # fmt: skip
    print(f"operations in the graph of one decoding step: stock {result['primitives']['stock']}, "
          f"steered {result['primitives']['steered']}")  # fmt: skip


if __name__ == "__main__":
    main()
