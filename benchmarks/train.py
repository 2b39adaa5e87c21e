"""Training a vector against mlx-lm's LoRA trainer: the same model, the same texts, one pass."""

import random
from collections.abc import Sequence

import mlx.core as mx
import mlx.nn as nn
import mlx_lm
import numpy as np
from mlx.optimizers import Adam
from mlx_lm.tuner.trainer import default_loss, grad_checkpoint
from mlx_lm.tuner.utils import linear_to_lora_layers
from script import main

from mlx_densesteer.bench.figures import Figure, Measurement, Tell, alternate, quiet, ratio, timed
from mlx_densesteer.bench.subject import Subject
from mlx_densesteer.demo.problems import calibration, draw_solution
from mlx_densesteer.evaluation.solutions import Solution, read_solutions
from mlx_densesteer.extraction.train import Recipe, train
from mlx_densesteer.model.model import find
from mlx_densesteer.model.prompt import encode_prompt, encode_text

RANK, SCALE = 8, 20.0  # mlx-lm's defaults


def run(
    subject: Subject,
    *,
    data: str | None = None,
    examples: int = 6,
    layer: int = -1,
    batch_tokens: int = 256,
    positions: str = "all",
    recompute: bool = True,
    rounds: int = 2,
    seconds: float = 0.0,
    tell: Tell = quiet,
) -> Measurement:
    """Train on the same texts in turn: one vector, and LoRA adapters (rank 8) of the blocks from there on.

    Both see each example once, one sequence at a time, and make a step of Adam after as many tokens.
    Tokens are those of prompts and responses. `train_ratio` is mlx-lm's seconds over ours,
    `train_memory_ratio` our peak of memory over mlx-lm's, both with the weights.

    Args:
        data: a file of solutions or pairs; by default solutions of the demo's problems.
        examples: how many of them.
        layer: of the vector; by default the middle one.
        batch_tokens: response tokens of a step at least.
        positions: where the vector is added; "generated" leaves the prompt out of the steps.
        recompute: gradient checkpointing, on both sides.
        rounds: passes of each side.
        seconds: after which no new round begins; 0 is no limit.
    """
    model = subject.model
    layer = model.layer_count // 2 if layer < 0 else layer
    solutions = read_solutions(data)[:examples] if data else drawn_solutions(examples)
    recipe = Recipe(
        layers=(layer,),
        positions=positions,
        epochs=1,
        batch_tokens=batch_tokens,
        max_dose=None,
        recompute=recompute,
    )
    lora = _Lora(subject, model.layer_count - layer, recompute)
    texts = [lora.encode(model, one) for one in solutions]
    tokens = sum(len(prompt) + len(response) for prompt, response in texts)
    peaks: dict[str, list[int]] = {"ours": [], "lora": []}

    def ours() -> float:
        mx.reset_peak_memory()
        taken = timed(lambda: train(model, solutions, recipe))
        peaks["ours"].append(mx.get_peak_memory() - lora.bytes)
        return taken

    def theirs() -> float:
        mx.reset_peak_memory()
        taken = timed(lambda: lora.train(texts, batch_tokens))
        peaks["lora"].append(mx.get_peak_memory() - _bytes(model.network))
        return taken

    ours(), theirs()  # warm up
    mine, other, again = alternate(
        [ours, theirs, theirs], rounds=rounds, seconds=seconds, tell=tell
    )
    speeds = [tokens / sorted(taken)[len(taken) // 2] for taken in (mine, other)]
    memory = max(peaks["ours"]) / max(peaks["lora"])
    return Measurement(
        [
            Figure.of(
                "train_ratio",
                "seconds of training, LoRA / ours",
                ratio(other, mine),
                ratio(other, again),
                f"{len(texts)} texts, {tokens:,} tokens, layer {layer}, {positions}: {speeds[0]:.0f} tokens/s, LoRA "
                f"{speeds[1]:.0f}",
            ),
            Figure(
                "train_memory_ratio",
                "peak of memory, ours / LoRA",
                memory,
                remark=f"{max(peaks['ours']) / 1e9:.2f} GB, LoRA {max(peaks['lora']) / 1e9:.2f} GB",
            ),
        ],
        {"tokens": tokens, "tokens_per_second": speeds, "peak_bytes": peaks},
    )


def drawn_solutions(count: int) -> list[Solution]:
    return [
        Solution(problem.question, draw_solution(problem, random.Random(problem.id)))
        for problem in calibration(count)
    ]


class _Lora:
    """mlx-lm's LoRA on a network of its own."""

    def __init__(self, subject: Subject, blocks: int, recompute: bool):
        self.network = mlx_lm.load(str(find(subject.name)))[0]
        self.network.freeze()
        settings = {"rank": RANK, "scale": SCALE, "dropout": 0.0}
        linear_to_lora_layers(self.network, blocks, settings)
        if recompute:
            # patches the class: give this network's blocks one that is not the steered blocks' base
            kind = type(self.network.layers[0])
            own = type(kind.__name__, (kind,), {"__call__": kind.__call__})
            for block in self.network.layers:
                block.__class__ = own
            grad_checkpoint(self.network.layers[0])
        self.network.train()
        self.bytes = _bytes(self.network)

    def encode(self, model, one: Solution) -> tuple[list[int], list[int]]:
        prompt = encode_prompt(model.tokenizer, one.prompt, system=one.system)
        return prompt, [*encode_text(model.tokenizer, one.response), model.tokenizer.eos_token_id]

    def train(self, texts: Sequence[tuple[list[int], list[int]]], batch_tokens: int) -> None:
        optimizer = Adam(learning_rate=1e-5)
        step = nn.value_and_grad(self.network, default_loss)
        gradient, waiting = None, 0
        for number, (prompt, response) in enumerate(texts):
            tokens = mx.array([[*prompt, *response]])
            lengths = mx.array([[len(prompt), len(prompt) + len(response)]])
            (_, _), found = step(self.network, tokens, lengths)
            gradient = found if gradient is None else _sum(gradient, found)
            mx.eval(gradient)
            waiting += len(response)
            if waiting >= batch_tokens or number == len(texts) - 1:
                optimizer.update(self.network, gradient)
                mx.eval(self.network.trainable_parameters(), optimizer.state)
                gradient, waiting = None, 0
            mx.clear_cache()


def _sum(one: dict, other: dict) -> dict:
    from mlx.utils import tree_map

    return tree_map(lambda a, b: a + b, one, other)


def _bytes(network: nn.Module) -> int:
    from mlx.utils import tree_flatten

    return int(np.sum([array.nbytes for _, array in tree_flatten(network.parameters())]))


if __name__ == "__main__":
    main(run)
