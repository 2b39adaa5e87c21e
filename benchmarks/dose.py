"""At which relative dose does a steered model lose its thread?

    python benchmarks/dose.py MODEL VECTOR --layers 8,12,16,20 --doses -0.3,-0.1,0.1,0.3,0.6,1.9

One prompt under every (layer, relative dose), all as rows of one batch, greedy. Prints for
each row tokens, steps, density, whether its last number is the answer, and the share of the response
that repeats itself (1 - distinct 4-grams of tokens / 4-grams): near 1 is a collapse.
"""

import argparse
import json
import re
import sys

from mlx_lm.generate import BatchGenerator

from mlx_densesteer import Steering, SteeringVector, load, make_cache
from mlx_densesteer.density import density, split_steps
from mlx_densesteer.dose import mean_norms
from mlx_densesteer.prompt import encode_prompt
from mlx_densesteer.steering import parse_layers

PROMPT = (
    "Anna picks 48 apples in the morning, and in the afternoon half as many. "
    "How many apples does she pick altogether?"
)
ANSWER = "72"


def repeated_share(tokens: list[int], n: int = 4) -> float:
    grams = [tuple(tokens[i : i + n]) for i in range(len(tokens) - n + 1)]
    return 1 - len(set(grams)) / len(grams) if grams else 0.0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("vector")
    parser.add_argument("--layers", default="8,12,16,20")
    parser.add_argument("--doses", default="-0.3,-0.2,-0.1,0.1,0.2,0.3,0.6,1.0,1.9")
    parser.add_argument("--prompt", default=PROMPT)
    parser.add_argument("--answer", default=ANSWER)
    parser.add_argument("--max-tokens", type=int, default=200)
    parser.add_argument("--show", type=int, default=60, help="characters of each response's end")
    options = parser.parse_args()
    model, tokenizer = load(options.model)
    vector = SteeringVector.load(options.vector)
    layers = parse_layers([options.layers], vector.layers)
    prompt = encode_prompt(tokenizer, options.prompt)
    residual, norms = mean_norms(model, tokenizer, vector, layers), vector.norms()
    grid: list[tuple[int | None, float]] = [(None, 0.0)]
    grid += [(layer, float(dose)) for layer in layers for dose in options.doses.split(",")]
    batch = BatchGenerator(
        model, max_tokens=options.max_tokens, stop_tokens=[[t] for t in tokenizer.eos_token_ids]
    )
    caches = []
    for layer, dose in grid:
        steering = layer is not None and Steering(
            vector, dose * residual[layer] / norms[layer], layers=(layer,)
        )
        caches.append(make_cache(model, steering or None))
    uids = batch.insert([list(prompt) for _ in grid], caches=caches)
    responses: dict[int, list[int]] = {uid: [] for uid in uids}
    ended: set[int] = set()
    while len(ended) < len(uids):
        for row in batch.next_generated():
            if row.finish_reason != "stop":
                responses[row.uid].append(row.token)
            if row.finish_reason:
                ended.add(row.uid)
                print(f"\r{len(ended)}/{len(uids)} rows done", end="", file=sys.stderr)
    batch.close()
    print(file=sys.stderr)
    print("layer   dose  strength  tokens  steps  density  right  repeated  end of the response")
    for uid, (layer, dose) in zip(uids, grid, strict=True):
        tokens = responses[uid]
        text = tokenizer.decode(tokens)
        steps = len(split_steps(text))
        right = re.findall(r"\d+", text)[-1:] == [options.answer]
        strength = 0.0 if layer is None else dose * residual[layer] / norms[layer]
        print(
            f"{'-' if layer is None else layer:>5}  {dose:>5g}  {strength:>8.2f}  {len(tokens):>6}"
            f"  {steps:>5}  {density(len(tokens), steps) or 0:>7.1f}  {'yes' if right else 'no':>5}"
            f"  {repeated_share(tokens):>8.2f}  {json.dumps(text[-options.show :])}"
        )


if __name__ == "__main__":
    main()
