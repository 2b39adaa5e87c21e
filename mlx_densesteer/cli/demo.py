"""``densesteer demo``."""

import json
import shutil
import textwrap
from typing import TYPE_CHECKING

import click

from ..text import Live, aligned, count, one_line, signed, signed_dose
from .options import json_option
from .run import program
from .sweep import FIGURES, figures

if TYPE_CHECKING:
    from collections.abc import Sequence

    from ..evaluation.answers import Answer
    from ..evaluation.sweep import GridRow
    from ..evaluation.tasks import Problem

WHAT_IT_IS = (
    "This is a toy of 2.5 million parameters, trained for this purpose on such stories. Weights, vector and "
    "answers are real, but they are no evidence about Qwen2.5, nor that density makes answers better: here it "
    "does not. The steered layer is the toy's last one."
)
NARROWEST, WIDEST = 40, 100  # columns of wrapped text
MOST_STEPS = 12  # of an answer that are printed
OWN_MODEL = "Qwen/Qwen2.5-1.5B-Instruct"


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

    Prints the model's answers to one problem, step by step, at a negative dose, at 0, at positive doses
    and at an overdose. A table over problems that the model never saw follows: accuracy, steps, tokens,
    density, NLL; then commands to try next.
    """
    from ..demo import DOSES, NAME
    from ..evaluation.answers import answer
    from ..evaluation.sweep import settings_of, table
    from ..evaluation.tasks import load_task
    from ..model.model import load
    from ..steering.request import Amount, request
    from ..steering.vector import SteeringVector

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
    width = min(max(shutil.get_terminal_size().columns - 1, NARROWEST), WIDEST)
    shown, why = _clearest(chosen, rows, answers)
    own = {one.steering: one for one in answers if one.problem == shown.id}
    click.echo("\n".join(_story(shown.question, rows, own, width)))
    held_out = f"{count(len(chosen), 'problem')} that the model never saw, answered at each dose:"
    lines = [["dose", "strength", *FIGURES]]
    for row in rows:
        dose, strength = row.setting.dose, row.setting.strength
        lines.append([signed_dose(dose), signed(strength), *figures(row.describe(), nll_digits=2)])
    click.echo("\n".join([*_wrapped(held_out, width), "", *aligned(lines), ""]))
    click.echo("\n".join(["Try next:", "", *_next(width), ""]))
    click.echo("\n".join(_wrapped(f"{WHAT_IT_IS} {why}", width)))


def _story(
    question: str, rows: "Sequence[GridRow]", own: "dict[str, Answer]", width: int
) -> list[str]:
    """Return the lines of one problem: for each dose a bar of its steps, and the steps, numbered."""
    from ..generation.answer import split_steps
    from ..steering.steering import LARGE_DOSE

    lines = ["The same question at five doses of one steering vector:", ""]
    lines += [*_wrapped(question, width, "  "), ""]
    longest = min(max(own[row.setting.fingerprint].steps for row in rows), MOST_STEPS)
    for row in rows:
        dose, one = row.setting.dose, own[row.setting.fingerprint]
        found = "no answer" if one.found is None else f"answer {one_line(one.found, 20)}"
        bar = "#" * min(one.steps, longest)
        lines.append(
            f"{signed_dose(dose):>5}  {bar:<{longest}}  {count(one.steps, 'step'):<8}  "
            f"{found}, {'right' if one.correct else 'wrong'} ({_remark(dose)})"
        )
        steps = split_steps(one.text.partition("\n####")[0])
        room = (1 if dose >= LARGE_DOSE else 4) * (width - 9)
        for number, step in enumerate(steps[:MOST_STEPS], 1):
            lines += _wrapped(one_line(step, room), width, f"{number:>7}  ")
        lines += ["    ..."] * (len(steps) > MOST_STEPS)
        lines.append("")
    return lines


def _wrapped(text: str, width: int, begin: str = "") -> list[str]:
    """Return ``text`` in lines of at most ``width`` columns; the first begins with ``begin``."""
    return textwrap.wrap(
        text,
        width,
        initial_indent=begin,
        subsequent_indent=" " * len(begin),
        break_on_hyphens=False,
    )


def _next(width: int) -> list[str]:
    """Return what to try next. A command stands alone on its line, so that it can be pasted."""
    called, name = program(), OWN_MODEL.rpartition("/")[2]
    tries = {
        "Turn the strength while you talk (/strength 10%, /compare, /help):": (
            "chat -m demo -v demo",
        ),
        "The same on a page with a dial, at http://127.0.0.1:8080:": ("serve -m demo",),
        "Your own model (3.1 GB, fetched once), and what a vector for it begins with:": (
            f"convert {OWN_MODEL}",
            f"pairs -m converted/{name}-4bit gsm8k --count 50 -o pairs.jsonl",
        ),
    }
    lines = []
    for what, commands in tries.items():
        lines += [*_wrapped(what, width), *(f"  {called} {command}" for command in commands)]
    return lines


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
    if len(problems) == 1 or effect(best) <= (1, 0):
        return problems[0], "The question is the first problem."
    return best, (
        f"The question is one of {count(len(problems), 'problem')}, chosen because its steps fall while its "
        "answers stay right."
    )


def _remark(dose: float) -> str:
    """Say what a dose does."""
    from ..steering.steering import LARGE_DOSE

    if not dose:
        return "unsteered"
    if dose < 0:
        return "towards sparse"
    return "an overdose" if dose >= LARGE_DOSE else "towards dense"
