"""The dose at which a steered model repeats itself."""

import json
import re
from collections.abc import Sequence

from script import main

from mlx_densesteer.bench.figures import Measurement, Tell, quiet
from mlx_densesteer.bench.subject import Subject
from mlx_densesteer.generation.answer import Generation
from mlx_densesteer.generation.batch import generate_batch
from mlx_densesteer.steering.request import format_dose, parse_layers, resolve
from mlx_densesteer.steering.vector import SteeringVector
from mlx_densesteer.text import aligned

PROMPT = (
    "Anna picks 48 apples in the morning, and in the afternoon half as many. "
    "How many apples does she pick altogether?"
)
ANSWER = "72"
HEAD = ("layer", "dose", "strength", "tokens", "steps", "density", "right", "repeated")


def run(
    subject: Subject,
    vector: str,
    *,
    layers: str = "8,12,16,20",
    doses: str = "-30%,-20%,-10%,10%,20%,30%,60%,100%,190%",
    prompt: str = PROMPT,
    answer: str = ANSWER,
    max_tokens: int = 200,
    show: int = 60,
    tell: Tell = quiet,
) -> Measurement:
    """Answer one prompt under every (layer, dose), all as rows of one batch, greedily.

    For each row: tokens, steps, density, whether its last number is the answer, and the share of
    the response that repeats itself (1 - distinct 4-grams of tokens / 4-grams): near 1 it only
    repeats. No speed is measured.

    Args:
        vector: a steering vector's file, or demo.
        layers: layers to steer, one at a time.
        doses: doses in per cent of the residual stream.
        prompt: the question.
        answer: the number that is right.
        max_tokens: tokens of a response at most.
        show: characters of each response's end.
    """
    loaded = SteeringVector.load(vector)
    steerings = [
        resolve(subject.model, loaded, dose, [layer])
        for layer in parse_layers([layers], loaded.layers)
        for dose in doses.split(",")
    ]
    grid = [None, *steerings]
    found: dict[int, Generation] = {}
    prompts = [prompt] * len(grid)
    for index, response in generate_batch(
        subject.model, prompts, steering=grid, max_tokens=max_tokens, rows=len(grid)
    ):
        found[index] = response
        tell(f"{len(found)}/{len(grid)} rows done")
    settings = [
        {
            "layer": how.layers[0] if how else None,
            "dose": subject.model.dose(how) * (-1 if how and how.strength < 0 else 1),
            "strength": how.strength if how else 0.0,
            **_figures(found[i], answer, show),
        }
        for i, how in enumerate(grid)
    ]
    table = aligned([HEAD, *(_cells(one) for one in settings)])
    ends = ["end of the response", *(json.dumps(one["end"]) for one in settings)]
    lines = [f"{line}  {end}" for line, end in zip(table, ends, strict=True)]
    return Measurement(lines, {"settings": settings})


def _figures(response: Generation, answer: str, show: int) -> dict[str, object]:
    return {
        "tokens": response.tokens,
        "steps": response.steps,
        "density": response.density,
        "right": re.findall(r"\d+", response.text)[-1:] == [answer],
        "repeated": repeated_share(response.token_ids),
        "end": response.text[-show:] if show else "",
    }


def _cells(one: dict[str, object]) -> tuple[str, ...]:
    return (
        "-" if one["layer"] is None else str(one["layer"]),
        format_dose(one["dose"]),
        f"{one['strength']:.2f}",
        str(one["tokens"]),
        str(one["steps"]),
        f"{one['density'] or 0:.1f}",
        "yes" if one["right"] else "no",
        f"{one['repeated']:.2f}",
    )


def repeated_share(tokens: Sequence[int], n: int = 4) -> float:
    """Return 1 - distinct n-grams / n-grams; 0 for fewer than ``n`` tokens."""
    grams = [tuple(tokens[i : i + n]) for i in range(len(tokens) - n + 1)]
    return 1 - len(set(grams)) / len(grams) if grams else 0.0


if __name__ == "__main__":
    main(run)
