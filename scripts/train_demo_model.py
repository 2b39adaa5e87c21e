"""Train the embedded demo model: data, tokenizer, Muon and AdamW, checkpoint. See train-demo-model.

Block i of batches is drawn from (seed, i), so a continued run trains on the same data in the same
order. No example, of tokenizer or model, is one of the problems that evaluation and calibration
use (``demo.problems``).

With ``--thinking`` the demo model is trained on for some minutes: the steps of a solution stand between
``<think>`` and ``</think>``, and the answer after them.

Each stage saves its state in a file. After Ctrl-C or kill -9 the same command goes on from there.
The checkpoint is written, and the states are removed, when all stages are done.
"""

import json
import math
import random
import sys
import time
from pathlib import Path
from typing import NamedTuple

import click
import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import numpy as np
from mlx.utils import tree_flatten, tree_map, tree_unflatten
from mlx_lm.models.qwen2 import Model, ModelArgs
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

from mlx_densesteer.demo import MODEL
from mlx_densesteer.demo.problems import (
    DemoProblem,
    draw_problem,
    draw_solution,
    reserved_questions,
)
from mlx_densesteer.files import move_into_place, scratch_folder
from mlx_densesteer.model.config import RECORD

SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
VOCABULARY = 576
SPLIT = (  # Qwen2's: digits one by one
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message.role + '\n' + message.content + "
    "'<|im_end|>\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}"
    "{% endif %}"
)
CONFIG = {
    "architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", "hidden_size": 192,
    "num_hidden_layers": 6, "intermediate_size": 512, "num_attention_heads": 3,
    "num_key_value_heads": 1, "rms_norm_eps": 1e-6, "vocab_size": VOCABULARY,
    "rope_theta": 10000.0, "tie_word_embeddings": True, "torch_dtype": "bfloat16",
    "max_position_embeddings": 1024, "eos_token_id": 2, "pad_token_id": 0,
}  # fmt: skip
BATCH = 16
TWO_TURNS = 0.1
BLOCK = 20  # batches that are drawn together
SAVE_EVERY = 100
STAGES = ((1700, 1.0), (900, 0.5))  # steps, and by how much the learning rates are multiplied
THINKING_STAGES = ((400, 0.3),)
THINK = ("<think>", "</think>")
# As Qwen3's: the model opens its thought, and those of earlier answers are left out.
THINKING_TEMPLATE = TEMPLATE.replace(
    "message.content", "message.content.split('</think>')[-1].lstrip('\n')"
)


class Recipe(NamedTuple):
    """What is trained."""

    config: dict[str, object]
    template: str
    stages: tuple[tuple[int, float], ...]
    thinking: bool = False


def make_tokenizer(seed: int) -> Tokenizer:
    """Train a byte-level BPE of 576 entries with Qwen2's split pattern."""
    rng = random.Random(f"{seed}-tokenizer")
    reserved, texts = reserved_questions(), []
    for _ in range(4000):
        problem = draw_unreserved(rng, reserved)
        texts += [
            problem.question,
            draw_solution(problem, rng),
            "user\n",
            "assistant\n",
            "system\n",
        ]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Split(Regex(SPLIT), behavior="isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
    ])  # fmt: skip
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY, special_tokens=list(SPECIAL), show_progress=False,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
    )  # fmt: skip
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in SPECIAL])
    if [tokenizer.token_to_id(token) for token in SPECIAL] != [0, 1, 2]:
        raise SystemExit("the special tokens have other ids than config.json says")
    return tokenizer


def grown(weights: Path, config: dict[str, object]) -> Model:
    """Return a trained model in float32, with rows for new tokens at the end of its vocabulary."""
    model, arrays, name = (
        Model(ModelArgs.from_dict(config)),
        mx.load(str(weights)),
        "model.embed_tokens.weight",
    )
    arrays = {key: array.astype(mx.float32) for key, array in arrays.items()}
    new = model.model.embed_tokens.weight[arrays[name].shape[0] :]
    arrays[name] = mx.concatenate([arrays[name], new])
    model.load_weights(list(arrays.items()))
    return model


def draw_unreserved(rng: random.Random, reserved: frozenset[str]) -> DemoProblem:
    """Return a problem that neither evaluation nor calibration uses."""
    problem = draw_problem(rng)
    while problem.question in reserved:
        problem = draw_problem(rng)
    return problem


def draw_response(problem: DemoProblem, rng: random.Random, thinking: bool) -> str:
    """Return a solution; of a model that thinks, its steps are the thought."""
    text = draw_solution(problem, rng)
    if not thinking:
        return text
    steps, answer = text.rsplit("\n", 1)
    return f"{THINK[0]}\n{steps}\n{THINK[1]}\n\n{answer}"


def draw_example(
    tokenizer: Tokenizer, rng: random.Random, reserved: frozenset[str], thinking: bool = False
) -> tuple:
    """Return token ids of one chat and, for each token, whether it is trained on."""
    ids, trained = [], []
    for _ in range(1 + (rng.random() < TWO_TURNS)):
        problem = draw_unreserved(rng, reserved)
        prompt = f"<|im_start|>user\n{problem.question}<|im_end|>\n<|im_start|>assistant\n"
        asked = tokenizer.encode(prompt).ids
        said = tokenizer.encode(draw_response(problem, rng, thinking) + "<|im_end|>").ids
        ids += asked + said + tokenizer.encode("\n").ids
        trained += [False] * len(asked) + [True] * len(said) + [False]
    return ids, trained


def draw_batches(
    tokenizer: Tokenizer, seed: int, block: int, reserved: frozenset[str], thinking: bool = False
) -> list:
    """Return ``BLOCK`` batches ``(tokens, weights)``, each ``(batch, width)``.

    Examples of like length share a batch, so that little is padding; the batches are shuffled.
    """
    rng = random.Random(f"{seed}-{block}")
    examples = [draw_example(tokenizer, rng, reserved, thinking) for _ in range(BLOCK * BATCH)]
    examples.sort(key=lambda example: len(example[0]))
    groups = [examples[i : i + BATCH] for i in range(0, len(examples), BATCH)]
    rng.shuffle(groups)
    return [pad(group) for group in groups]


def pad(rows: list[tuple]) -> tuple[mx.array, mx.array]:
    width = max(len(ids) for ids, _ in rows)
    tokens, weights = np.zeros((BATCH, width), np.int32), np.zeros((BATCH, width), np.float32)
    for i, (ids, trained) in enumerate(rows):
        tokens[i, : len(ids)], weights[i, : len(ids)] = ids, trained
    return mx.array(tokens), mx.array(weights)


def response_loss(model: nn.Module, tokens: mx.array, weights: mx.array) -> mx.array:
    """Return the mean cross-entropy of response tokens, in nats."""
    losses = nn.losses.cross_entropy(model(tokens[:, :-1]), tokens[:, 1:])
    return (losses * weights[:, 1:]).sum() / weights[:, 1:].sum()


def schedule(peak: float, steps: int):
    """Return a rate that warms up, is flat to 40 % of the steps, then a cosine down to zero."""
    warm, flat = min(30, steps // 10 + 1), int(0.4 * steps)

    def rate(step: mx.array) -> mx.array:
        step = step.astype(mx.float32)  # it is unsigned
        progress = mx.clip((step - flat) / (steps - flat), 0.0, 1.0)
        return peak * mx.minimum(1.0, (step + 1) / warm) * 0.5 * (1 + mx.cos(math.pi * progress))

    return rate


def is_matrix(name: str, weight: mx.array) -> bool:
    return weight.ndim == 2 and "embed" not in name


def make_optimizer(model: Model, stage: tuple[int, float]) -> optim.MultiOptimizer:
    steps, factor = stage
    optimizer = optim.MultiOptimizer(
        [
            optim.Muon(schedule(0.02 * factor, steps), weight_decay=0.0),
            optim.AdamW(schedule(3e-3 * factor, steps), betas=[0.9, 0.98], weight_decay=0.0),
        ],
        [is_matrix],
    )
    optimizer.init(model.trainable_parameters())
    return optimizer


def train(
    model: Model, tokenizer: Tokenizer, recipe: Recipe, stage: int, seed: int, state_file: Path
) -> float:
    """Train one stage in place; return the seconds it took, those of earlier runs included."""
    steps, offset = recipe.stages[stage][0], sum(count for count, _ in recipe.stages[:stage])
    optimizer = make_optimizer(model, recipe.stages[stage])
    reserved, first, spent = reserved_questions(), 0, 0.0
    if state_file.exists():
        arrays, info = mx.load(str(state_file), return_metadata=True)
        first, spent = int(info["step"]), float(info["seconds"])
        parts = tree_unflatten(list(arrays.items()))
        model.update(parts["model"])
        optimizer.state = parts["optimizer"]
        say(f"going on with stage {stage + 1} after step {first}")
    loss_and_gradients = nn.value_and_grad(model, response_loss)
    began, losses = time.perf_counter() - spent, []
    for step in range(first, steps):
        if step == first or step % BLOCK == 0:
            batches = draw_batches(
                tokenizer, seed, (offset + step) // BLOCK, reserved, recipe.thinking
            )
        tokens, weights = batches[step % BLOCK]
        loss, gradients = loss_and_gradients(model, tokens, weights)
        optimizer.update(model, gradients)
        mx.eval(model.parameters(), optimizer.state, loss)
        losses.append(loss.item())
        spent = time.perf_counter() - began
        done = step + 1
        if done % 20 == 0 or done == steps:
            left = spent / done * (steps - done)
            say(
                f"stage {stage + 1}, step {done}/{steps}, loss {np.mean(losses[-50:]):.4f}, "
                f"{spent / 60:.1f} min, about {left / 60:.0f} min left"
            )
        if done % SAVE_EVERY == 0 or done == steps:
            save_state(state_file, model, optimizer, done, spent)
    return spent


def save_state(
    path: Path, model: Model, optimizer: optim.Optimizer, step: int, spent: float
) -> None:
    tree = {"model": model.parameters(), "optimizer": optimizer.state}
    temporary = path.with_name(f".{path.name}")
    mx.save_safetensors(
        str(temporary), dict(tree_flatten(tree)), {"step": str(step), "seconds": str(spent)}
    )
    temporary.replace(path)


def save(folder: Path, model: Model, tokenizer: Tokenizer, recipe: Recipe, seed: int) -> None:
    """Write the checkpoint in bfloat16, as an MLX folder."""
    with scratch_folder(folder) as scratch:
        made = scratch / "model"
        made.mkdir()
        half = tree_map(lambda a: a.astype(mx.bfloat16), model.parameters())
        mx.save_safetensors(
            str(made / "model.safetensors"), dict(tree_flatten(half)), {"format": "mlx"}
        )
        (made / "config.json").write_text(json.dumps(recipe.config, indent=1) + "\n")
        tokenizer.save(str(made / "tokenizer.json"))
        settings = {
            "tokenizer_class": "Qwen2TokenizerFast", "eos_token": "<|im_end|>",
            "pad_token": "<|endoftext|>", "chat_template": recipe.template, "model_max_length": 1024,
        }  # fmt: skip
        (made / "tokenizer_config.json").write_text(json.dumps(settings, indent=1) + "\n")
        steps = sum(count for count, _ in recipe.stages)
        record = {"source": folder.name if recipe.thinking else "demo",
                  "trained_by": "scripts/train-demo-model", "seed": seed,
                  "steps": steps, "examples": steps * BATCH}  # fmt: skip
        (made / RECORD).write_text(json.dumps(record, indent=1) + "\n")
        move_into_place(made, folder, replace=True)


def say(message: str) -> None:
    print(f"train-demo-model: {message}", file=sys.stderr, flush=True)


@click.command()
@click.option("--seed", default=1, show_default=True)
@click.option("--out", type=click.Path(path_type=Path), default=MODEL, help="Folder to write.")
@click.option(
    "--thinking", is_flag=True, help="Teach the demo model to think; needs another --out."
)
def main(seed: int, out: Path, thinking: bool) -> None:
    """Train the demo model. Interrupted or killed, the same command goes on."""
    if thinking and out == MODEL:
        raise click.UsageError("--thinking: name another folder (--out); the demo does not think.")
    mx.random.seed(seed)
    if thinking:
        config = CONFIG | {"vocab_size": VOCABULARY + len(THINK)}
        recipe = Recipe(config, THINKING_TEMPLATE, THINKING_STAGES, thinking=True)
        tokenizer = Tokenizer.from_file(str(MODEL / "tokenizer.json"))
        tokenizer.add_tokens([AddedToken(one, special=False, normalized=False) for one in THINK])
        model = grown(MODEL / "model.safetensors", config)
    else:
        recipe = Recipe(CONFIG, TEMPLATE, STAGES)
        model, tokenizer = Model(ModelArgs.from_dict(CONFIG)), make_tokenizer(seed)
    states = [
        out.with_name(f"{out.name}-{seed}-{stage + 1}.training.safetensors")
        for stage in range(len(recipe.stages))
    ]
    say(f"the state is kept every {SAVE_EVERY} steps; interrupted, the same command goes on")
    spent = 0.0
    for stage, state_file in enumerate(states):
        if stage:  # from rounded weights, as the checkpoint would hold them
            model.set_dtype(mx.bfloat16)
            model.set_dtype(mx.float32)
        try:
            spent += train(model, tokenizer, recipe, stage, seed, state_file)
        except KeyboardInterrupt:
            say("interrupted; the same command goes on")
            raise SystemExit(130) from None
    save(out, model, tokenizer, recipe, seed)
    for file in states:
        file.unlink(missing_ok=True)
    say(f"{spent / 60:.1f} minutes")
    print(out)


if __name__ == "__main__":
    main()
