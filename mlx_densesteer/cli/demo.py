"""``densesteer demo``."""

import json
from typing import TYPE_CHECKING

import click

from ..text import Live, aligned, count, note, percent, signed, signed_dose

if TYPE_CHECKING:
    from ..evaluation.sweep import GridRow

WHAT_IT_IS = """\
A toy shows the whole of it: a Qwen2 model of 2.5 million parameters, trained for this purpose on
synthetic word problems, and a steering vector extracted from its own solutions. Real weights, real
generation. It is no evidence about Qwen2.5, nor that density makes answers better: here it does not."""


@click.command()
@click.option("--problems", type=click.IntRange(1, 500), default=40, show_default=True,
              help="Held-out problems for the table.")  # fmt: skip
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def demo(problems: int, as_json: bool) -> None:
    """Show steering at work, offline, on a tiny model inside this package.

    Prints one problem solved at a negative strength, at 0, at a positive one and at an overdose,
    then a table over problems that the model never saw: accuracy, steps, tokens, density, NLL.
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
    doses = [Amount(dose, is_dose=True) for dose in DOSES]
    layers = request(vector).layers
    settings = settings_of(model, vector, layers, doses)
    settings.sort(key=lambda setting: setting.strength)
    live, chosen = Live(), load_task(NAME, limit=problems)
    expected = len(settings) * len(chosen)
    answers = answer(
        model, chosen, [setting.steering for setting in settings], rows=32,
        max_tokens=200,
        progress=lambda answers, tokens: live.show(f"{len(answers)}/{expected} answers"),
    )  # fmt: skip
    live.clear()
    rows = table(settings, answers)
    if as_json:
        click.echo(json.dumps({"rows": [_plain(row) for row in rows]}, allow_nan=False))
        return
    click.echo(f"\nThe problem: {chosen[0].question}")
    first = {one.steering: one for one in answers if one.problem == chosen[0].id}
    for row in rows:
        one = first[row.setting.fingerprint]
        verdict = "right" if one.correct else "wrong"
        click.echo(
            f"\n--- dose {signed_dose(row.setting.dose)}{_remark(row.setting.dose)}: "
            f"{count(one.steps, 'step')}, {count(one.tokens, 'token')}, {verdict}\n{_shown(one.text)}"
        )
    click.echo(
        f"\n{count(len(chosen), 'problem')} that the model never saw, layer {layers[0]}, greedy:\n"
    )
    click.echo("\n".join(_lines(rows)))
    note(
        "every command takes -m demo and -v demo; try:\n"
        f'densesteer generate -m demo -v demo "{chosen[0].question}"'
    )


def _remark(dose: float) -> str:
    from ..steering.steering import LARGE_DOSE

    if not dose:
        return " (unsteered)"
    if dose < 0:
        return " (towards sparse)"
    return " (an overdose)" if dose >= LARGE_DOSE else " (towards dense)"


def _shown(text: str, width: int = 600) -> str:
    return text if len(text) <= width else f"{text[:width]} ..."


def _plain(row: "GridRow") -> dict[str, object]:
    described = row.describe()
    kept = ("dose", "strength", "problems", "accuracy", "steps", "tokens", "density", "nll")
    return {key: described[key] for key in kept}


def _lines(rows: "list[GridRow]") -> list[str]:
    lines = [["dose", "strength", "accuracy", "95%", "steps", "tokens", "density", "NLL"]]
    for row in rows:
        d = row.describe()
        lines.append([
            signed_dose(d["dose"]), signed(d["strength"]), percent(d["accuracy"]),
            f"{100 * d['accuracy_low']:.0f}-{100 * d['accuracy_high']:.0f}",
            f"{d['steps']:.1f}", f"{d['tokens']:.0f}",
            "-" if d["density"] is None else f"{d['density']:.1f}",
            "-" if d["nll"] is None else f"{d['nll']:.2f}",
        ])  # fmt: skip
    return aligned(lines)
