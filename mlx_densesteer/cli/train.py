"""``densesteer train``."""

import json
from pathlib import Path
from typing import TYPE_CHECKING

import click

from ..errors import DiskError
from ..text import Live, count, note, percent
from .options import (
    StrengthType,
    force_option,
    json_option,
    layers_option,
    model_option,
    output_file,
    positions_option,
    vector_out_option,
)

if TYPE_CHECKING:
    from collections.abc import Callable

    from ..extraction.train import Progress, Recipe, Training
    from ..steering.places import Positions
    from ..steering.request import Amount

# The defaults are the recipe of the one vector that shortened a real model's answers with no fewer right (docs/results.md).
POSITIONS: "Positions" = "first:48"


@click.command()
@model_option()
@click.argument("data", type=click.Path(exists=True, dir_okay=False))
@vector_out_option
@click.option(
    "--loss",
    type=click.Choice(["sft", "bipo"]),
    default="sft",
    show_default=True,
    help="sft makes the good responses likelier; bipo prefers the dense response of a pair to the "
    "sparse one, and the reverse at negative strength.",
)
@layers_option("Each has its own vector. [default: three around the middle]")
@positions_option(POSITIONS)
@click.option(
    "--epochs",
    type=click.IntRange(min=1),
    default=2,
    show_default=True,
    help="How often each example is seen, at most.",
)
@click.option(
    "--batch-tokens",
    type=click.IntRange(min=1),
    default=400,
    show_default=True,
    metavar="N",
    help="Response tokens of a step, at least.",
)
@click.option(
    "--rate",
    type=click.FloatRange(0, 1, min_open=True, max_open=True),
    default=0.007,
    show_default=True,
    help="How far a step can move a vector: 0.01 is 1% of the residual stream.",
)
@click.option(
    "--max-dose",
    type=StrengthType(),
    default="10%",
    show_default=True,
    metavar="DOSE",
    help="How long each vector may become, in per cent of the residual stream.",
)
@click.option(
    "--max-length",
    type=click.IntRange(min=1),
    default=1024,
    show_default=True,
    metavar="N",
    help="Leave out examples of more tokens, the prompt included.",
)
@click.option(
    "--more-memory",
    is_flag=True,
    help="Keep all activations for the backward pass: a quarter faster, many times the memory.",
)
@click.option("--seed", type=click.IntRange(0, 2**32 - 1), default=0, show_default=True)
@force_option
@json_option
def train(
    model: str,
    data: str,
    out: str,
    loss: str,
    layers: tuple[str, ...],
    positions: "Positions | None",
    epochs: int,
    batch_tokens: int,
    rate: float,
    max_dose: "Amount",
    max_length: int,
    more_memory: bool,
    seed: int,
    force: bool,
    as_json: bool,
) -> None:
    """Train a steering vector on good responses, everything else frozen.

    DATA is a JSONL file of `densesteer pairs`, or of solutions: prompt and response, or GSM8K's question
    and answer. A tenth of it is held out, and the vector with the lowest loss there is kept. The name of
    the vector's file goes to standard output. The same command continues a run that was interrupted.
    """
    if max_dose.unit != "dose" or max_dose.number <= 0:
        raise click.UsageError("--max-dose: expected a dose above 0 in per cent, such as 5%.")
    path = output_file(out, force, ending=".npz")
    state = path.with_name(f"{path.name}.training")

    from ..evaluation.contamination import warn_of_test_problems
    from ..evaluation.solutions import read_solutions
    from ..extraction.pairs import read_pairs, warn_of_other_model
    from ..extraction.train import Recipe
    from ..extraction.train import train as run
    from ..model.model import load
    from ..steering.request import parse_layers

    read = read_pairs(data) if loss == "bipo" else read_solutions(data)
    if warning := warn_of_test_problems(one.prompt for one in read):
        note(warning)
    loaded = load(model)
    if warning := warn_of_other_model(data, loaded.fingerprint):
        note(warning)
    every = range(loaded.layer_count)
    recipe = Recipe(
        loss=loss,
        layers=parse_layers(layers, every) if layers else _usual_layers(loaded.layer_count),
        positions=positions or POSITIONS,
        epochs=epochs,
        batch_tokens=batch_tokens,
        rate=rate,
        max_dose=max_dose.number,
        seed=seed,
        max_length=max_length,
        recompute=not more_memory,
    )
    live = Live()
    try:
        if state.exists():
            note(f"going on from {state}")
        done = run(loaded, read, recipe, state=state, progress=_progress(live))
        done.vector.save(path)
        state.unlink(missing_ok=True)
    except (KeyboardInterrupt, DiskError):
        live.clear()
        if state.exists():
            note(f"stopped; what is done is in {state}. The same command goes on from there.")
        else:
            note("stopped before the first step; nothing was written.")
        raise
    finally:
        live.clear()
    _tell(done, recipe, loaded.norms(done.vector, done.vector.layers))
    click.echo(json.dumps(_to_json(done, path), allow_nan=False) if as_json else path)
    if done.ended == "not finite":
        raise click.ClickException(
            f"a loss was not finite at step {done.steps + 1}: {path} holds the vector of step {done.step}. Try "
            "a smaller --rate, or a model in float32."
        )


def _usual_layers(count: int) -> tuple[int, ...]:
    """Return the middle layer and one a seventh of the depth to each side: 10, 14, 18 of 28."""
    return tuple(sorted({count // 2 - count // 7, count // 2, count // 2 + count // 7}))


def _progress(live: Live) -> "Callable[[Progress], None]":
    import time

    began = time.monotonic()
    first: list[int] = []

    def show(state: "Progress") -> None:
        first or first.append(state.step - 1)
        seconds = time.monotonic() - began
        done = state.step - first[0]
        left = seconds / done * (state.steps - state.step) / 60
        held = "" if state.held_out is None else f", held out {state.held_out:.4f}"
        live.show(
            f"step {state.step}/{state.steps}, epoch {state.epoch + 1}: loss {state.loss:.4f}{held}, "
            f"about {left:.0f} min left"
        )

    return show


def _tell(done: "Training", recipe: "Recipe", norms: "dict[int, float]") -> None:
    """Tell on standard error what was trained and how far it went."""
    if done.left_out:
        note(
            f"{count(len(done.left_out), 'example')} of more than {recipe.max_length} tokens left out "
            "(--max-length)"
        )
    reasons = {
        "done": "all epochs done",
        "no better": "stopped early: the held-out loss no longer falls",
        "not finite": "stopped: a loss was not finite",
    }
    note(f"{count(done.steps, 'step')} on {count(done.examples, 'example')}; {reasons[done.ended]}")
    if done.held_out:
        note(
            f"held-out loss {done.held_out[0]:.4f} unsteered, {done.held_out[done.step]:.4f} at step "
            f"{done.step}, whose vector is kept"
        )
    else:
        note("too few examples to hold some out: the last step's vector is kept")
    sizes = done.vector.norms()
    note(
        "dose of strength 1: "
        + ", ".join(f"{percent(sizes[k] / norms[k])} at layer {k}" for k in sizes)
    )


def _to_json(done: "Training", path: Path) -> dict[str, object]:
    return {
        "vector": str(path),
        "sha256": done.vector.sha256(),
        "meta": done.vector.describe(),
        "step": done.step,
        "steps": done.steps,
        "ended": done.ended,
        "losses": list(done.losses),
        "held_out": {str(step): loss for step, loss in done.held_out.items()},
        "examples": done.examples,
        "left_out": list(done.left_out),
    }
