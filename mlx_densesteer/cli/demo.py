"""``densesteer demo``."""

import json
from typing import TYPE_CHECKING

import click

from ..text import Live, aligned, count, note, signed, signed_dose
from .options import json_option
from .sweep import FIGURES, figures

if TYPE_CHECKING:
    from collections.abc import Sequence

    from ..evaluation.answers import Answer
    from ..evaluation.sweep import GridRow
    from ..evaluation.tasks import Problem

WHAT_IT_IS = """\
A toy shows how steering works: a Qwen2 model of 2.5 million parameters, trained for this purpose on
synthetic word problems, and a steering vector extracted from its own solutions. Weights and generation
are real. It is no evidence about Qwen2.5, nor that density makes answers better: here it does not."""


@click.command()
@click.option(
    "--problems",
    type=click.IntRange(1, 500),
    default=40,
    show_default=True,
    help="Held-out problems for the table.",
)
@json_option
def demo(problems: int, as_json: bool) -> None:
    """Show steering at work, offline, on a tiny model inside this package.

    Prints the model's answers to one problem at a negative dose, at 0, at positive doses and at an
    overdose. A table over problems that the model never saw follows: accuracy, steps, tokens,
    density, NLL.
    """
    from ..demo import DOSES, NAME
    from ..evaluation.answers import answer
    from ..evaluation.sweep import settings_of, table
    from ..evaluation.tasks import load_task
    from ..model.model import load
    from ..steering.request import Amount, request
    from ..steering.vector import SteeringVector

    if not as_json:
        click.echo(WHAT_IT_IS)
    model = load(NAME)
    vector = SteeringVector.load(NAME)
    doses = [Amount(dose, "dose") for dose in DOSES]
    layers = request(vector).layers
    settings = settings_of(model, vector, layers, doses)
    settings.sort(key=lambda setting: setting.strength)
    live, chosen = Live(), load_task(NAME, limit=problems)
    expected = len(settings) * len(chosen)
    answers = answer(
        model,
        chosen,
        [setting.steering for setting in settings],
        rows=32,
        max_tokens=200,
        progress=lambda answers, tokens: live.show(f"{len(answers)}/{expected} answers"),
    )
    live.clear()
    rows = table(settings, answers)
    if as_json:
        kept = ("dose", "strength", "problems", "accuracy", "steps", "tokens", "density", "nll")
        described = [row.describe() for row in rows]
        document = {"rows": [{key: row[key] for key in kept} for row in described]}
        click.echo(json.dumps(document, allow_nan=False))
        return
    shown, why = _clearest(chosen, rows, answers)
    click.echo(f"\n{why}: {shown.question}")
    first = {one.steering: one for one in answers if one.problem == shown.id}
    for row in rows:
        one = first[row.setting.fingerprint]
        verdict = "right" if one.correct else "wrong"
        click.echo(
            f"\n--- dose {signed_dose(row.setting.dose)}{_remark(row.setting.dose)}: "
            f"{count(one.steps, 'step')}, {count(one.tokens, 'token')}, {verdict}\n"
            f"{one.text if len(one.text) <= 600 else one.text[:600] + ' ...'}"
        )
    click.echo(
        f"\n{count(len(chosen), 'problem')} that the model never saw, layer {layers[0]}, greedy:\n"
    )
    lines = [["dose", "strength", *FIGURES]]
    for row in rows:
        dose, strength = row.setting.dose, row.setting.strength
        lines.append([signed_dose(dose), signed(strength), *figures(row.describe(), nll_digits=2)])
    click.echo("\n".join(aligned(lines)))
    note(
        "every command takes -m demo and -v demo; try:\n"
        f'densesteer generate -m demo -v demo "{shown.question}"'
    )


def _clearest(
    problems: "Sequence[Problem]", rows: "Sequence[GridRow]", answers: "Sequence[Answer]"
) -> "tuple[Problem, str]":
    """Return the problem that shows the effect best, and how it was chosen; ``rows`` are in order of dose."""
    from ..steering.steering import LARGE_DOSE

    below = [row.setting.fingerprint for row in rows if row.setting.dose < LARGE_DOSE]
    found = {(one.problem, one.steering): one for one in answers}

    def effect(problem: "Problem") -> tuple[int, int]:
        those = [found[problem.id, steering] for steering in below]
        steps = [one.steps for one in those]
        falls = steps == sorted(steps, reverse=True) and all(one.correct for one in those)
        return (len(set(steps)), steps[0] - steps[-1]) if falls else (0, 0)

    best = max(problems, key=effect)
    if effect(best) <= (1, 0):
        return problems[0], "The first problem"
    return best, (
        f"One of {count(len(problems), 'problem')}, chosen because its steps fall and its answers stay right below the "
        "overdose"
    )


def _remark(dose: float) -> str:
    """Say in brackets what a dose does."""
    from ..steering.steering import LARGE_DOSE

    if not dose:
        return " (unsteered)"
    if dose < 0:
        return " (towards sparse)"
    return " (an overdose)" if dose >= LARGE_DOSE else " (towards dense)"
