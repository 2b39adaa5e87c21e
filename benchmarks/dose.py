"""At which relative dose does a steered model lose its thread?"""

import json
import re
from collections.abc import Sequence

from ..generation.batch import generate_batch
from ..generation.answer import split_steps
from ..generation.stream import Generation
from ..model.dose import mean_norms
from ..steering.steering import Steering, parse_layers
from ..steering.vector import SteeringVector
from .subject import Subject
from .timing import Tell, quiet

PROMPT = (
    "Anna picks 48 apples in the morning, and in the afternoon half as many. "
    "How many apples does she pick altogether?"
)
ANSWER = "72"


def run(
    subject: Subject,
    vector: str,
    *,
    layers: str = "8,12,16,20",
    doses: str = "-0.3,-0.2,-0.1,0.1,0.2,0.3,0.6,1.0,1.9",
    prompt: str = PROMPT,
    answer: str = ANSWER,
    max_tokens: int = 200,
    show: int = 60,
    tell: Tell = quiet,
) -> dict[str, object]:
    """Answer one prompt under every (layer, relative dose), all as rows of one batch, greedily.

    For each row: tokens, steps, density, whether its last number is the answer, and the share of the
    response that repeats itself (1 - distinct 4-grams of tokens / 4-grams): near 1 is a collapse.
    No speed is measured.

    Args:
        vector: a steering vector's file.
        layers: layers to steer, one at a time.
        doses: relative doses, 1 being as large as the residual stream.
        prompt: the question.
        answer: the number that is right.
        max_tokens: tokens of a response at most.
        show: characters of each response's end.
    """
    loaded = SteeringVector.load(vector)
    chosen = parse_layers([layers], loaded.layers)
    residual = mean_norms(subject.model, subject.tokenizer, loaded, chosen)
    norms = loaded.norms()
    grid: list[tuple[int | None, float, float]] = [(None, 0.0, 0.0)]
    grid += [
        (layer, float(dose), float(dose) * residual[layer] / norms[layer])
        for layer in chosen
        for dose in doses.split(",")
    ]
    steerings = [
        None if layer is None else Steering(loaded, strength, (layer,))
        for layer, _, strength in grid
    ]
    found: dict[int, Generation] = {}
    for index, response in generate_batch(
        subject.model, subject.tokenizer, [prompt] * len(grid), steering=steerings,
        max_tokens=max_tokens, rows=len(grid),
    ):  # fmt: skip
        found[index] = response
        tell(f"{len(found)}/{len(grid)} rows done")
    settings = [_row(*setting, found[i], answer, show) for i, setting in enumerate(grid)]
    return {"details": {"settings": settings, "prompt": prompt, "vector": vector}}


def _row(
    layer: int | None, dose: float, strength: float, response: Generation, answer: str, show: int
) -> dict[str, object]:
    numbers = re.findall(r"\d+", response.text)
    return {
        "layer": layer, "dose": dose, "strength": strength, "tokens": response.tokens,
        "steps": len(split_steps(response.text)), "density": response.density,
        "right": numbers[-1:] == [answer], "repeated": repeated_share(response.token_ids),
        "end": response.text[-show:] if show else "",
    }  # fmt: skip


def repeated_share(tokens: Sequence[int], n: int = 4) -> float:
    """Return 1 - distinct n-grams / n-grams; 0 for fewer than ``n`` tokens."""
    grams = [tuple(tokens[i : i + n]) for i in range(len(tokens) - n + 1)]
    return 1 - len(set(grams)) / len(grams) if grams else 0.0


def lines(result: dict) -> list[str]:
    """Return the table."""
    table = ["layer   dose  strength  tokens  steps  density  right  repeated  end of the response"]
    for r in result["details"]["settings"]:
        table.append(
            f"{'-' if r['layer'] is None else r['layer']:>5}  {r['dose']:>5g}  {r['strength']:>8.2f}"
            f"  {r['tokens']:>6}  {r['steps']:>5}  {r['density'] or 0:>7.1f}"
            f"  {'yes' if r['right'] else 'no':>5}  {r['repeated']:>8.2f}  {json.dumps(r['end'])}"
        )
    return table
