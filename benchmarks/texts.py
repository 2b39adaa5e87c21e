"""Texts that should be equal: whether they are, and how close a choice was where they part."""

from collections.abc import Sequence
from itertools import zip_longest

import mlx.core as mx
from mlx_lm import stream_generate
from script import main
from speculative import truncated

from mlx_densesteer.bench.figures import Figure, Measurement, Tell, quiet
from mlx_densesteer.bench.subject import Subject
from mlx_densesteer.demo.problems import held_out
from mlx_densesteer.generation.batch import generate_batch
from mlx_densesteer.generation.speculation import Draft
from mlx_densesteer.generation.stream import generate
from mlx_densesteer.model.model import Model
from mlx_densesteer.model.prompt import encode_prompt
from mlx_densesteer.steering.request import resolve
from mlx_densesteer.steering.steering import Steering

Tokens = Sequence[int]


def run(
    subject: Subject, *, questions: int = 4, tokens: int = 64, tell: Tell = quiet
) -> Measurement:
    """Answer questions greedily in two ways each, and compare the tokens.

    Unsteered answers against mlx-lm's own; under a mild steering, rows of one batch and drafted answers against answers by
    themselves. Equal kernels give equal tokens. A GPU chooses its kernels by the number of rows, so
    the last two may part where the two best logits are closer than rounding. For the first
    difference of each answer the margin is told: how far apart the two best logits are there, in a pass
    over the tokens before it; beside it the step from one number of the model's dtype to the next at
    that size.

    Args:
        questions: arithmetic stories to answer.
        tokens: tokens of an answer at most.
    """
    model = subject.model
    prompts = [
        encode_prompt(model.tokenizer, problem.question, raw=not model.tokenizer.has_chat_template)
        for problem in held_out(questions)
    ]
    steering = resolve(model, subject.vector, "10%", [model.layer_count // 2])
    helper = Draft(Model(truncated(model.network, max(1, model.layer_count // 4)), model.tokenizer))

    def alone(prompt: Tokens, **options: object) -> Tokens:
        return generate(model, prompt, max_tokens=tokens, **options).token_ids

    def stock(prompt: Tokens) -> Tokens:
        subject.take_side(None)
        pieces = stream_generate(model.network, model.tokenizer, prompt, max_tokens=tokens)
        return [one.token for one in pieces if one.token not in model.ends(prompt)]

    tell("unsteered, and mlx-lm")
    plain = [alone(prompt) for prompt in prompts], [stock(prompt) for prompt in prompts]
    tell("steered")
    steered = [alone(prompt, steering=steering) for prompt in prompts]
    tell("a batch")
    rows = dict(generate_batch(model, prompts, steering=steering, max_tokens=tokens))
    batch = [rows[number].token_ids for number in range(len(prompts))]
    tell("a draft")
    drafted = [alone(prompt, steering=steering, draft=helper) for prompt in prompts]
    found = {
        "stock": ("unsteered answers are mlx-lm's", *plain, None),
        "batch": ("rows of a batch are answers by themselves", steered, batch, steering),
        "draft": ("drafted answers are those without", steered, drafted, steering),
    }
    figures, differences = [], {}
    for key, (name, ones, others, how) in found.items():
        parts = [
            _difference(subject, prompt, one, other, how)
            for prompt, one, other in zip(prompts, ones, others, strict=True)
        ]
        differences[key] = [part for part in parts if part]
        told = "; ".join(
            f"at token {part['token']} a margin of {part['margin']:.2g} (one step: {part['step']:.2g})"
            for part in differences[key]
        )
        equal = len(prompts) - len(differences[key])
        remark = f"{equal} of {len(prompts)}, {sum(map(len, ones))} tokens{told and ': '}{told}"
        figures.append(Figure(f"texts_{key}_equal", name, not differences[key], remark=remark))
    return Measurement(figures, {"differences": differences})


def _difference(
    subject: Subject, prompt: Tokens, one: Tokens, other: Tokens, steering: Steering | None
) -> dict[str, float] | None:
    """Return where two answers part, and the margin there; ``None`` if they are equal."""
    pairs = enumerate(zip_longest(one, other))
    place = next((number for number, (a, b) in pairs if a != b), None)
    if place is None:
        return None
    caches = subject.caches(steering, len(prompt))
    read = mx.array([[*prompt, *one[:place]]])
    logits = subject.model.network(read, cache=caches)[0, -1]
    second, best = mx.sort(logits.astype(mx.float32))[-2:].tolist()
    step = mx.finfo(logits.dtype).eps * abs(best)
    return {"token": place, "margin": best - second, "step": float(step)}


if __name__ == "__main__":
    main(run)
