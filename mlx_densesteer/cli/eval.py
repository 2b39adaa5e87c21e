"""``densesteer eval``."""

import json
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import click

from ..extras import install_command
from . import completers
from .options import model_option, run_options, steering_options, task_options
from .progress import Live
from .steering import read_steering, tell_dose, tell_fit
from .tables import aligned, estimate, percent, share
from .text import count, note

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from ..distributed.ranks import Ranks
    from ..evaluation.answers import Answer
    from ..evaluation.journal import Journal
    from ..evaluation.scoring import Score
    from ..evaluation.tasks import Problem


@click.command("eval")
@model_option
@steering_options
@task_options
@run_options
@click.option("-o", "--out", type=click.Path(dir_okay=False), metavar="FILE.jsonl",
              help="Keeps every response; a run that was cut off goes on from it. "
                   "[default: eval-TASK-MODEL.jsonl]")  # fmt: skip
@click.option(
    "--no-baseline", is_flag=True, help="Leave out strength 0, and the comparison with it."
)
@click.option(
    "--no-nll", is_flag=True, help="Leave out the NLL, which costs a pass over each response."
)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
@click.argument("task", shell_complete=completers.tasks)
def evaluate(model: str, vector: str | None, strength: float | None, layers: tuple[str, ...],
             positions: str | None, relative: bool, split: str | None, skip: int,
             limit: int | None, revision: str | None, max_tokens: int, rows: int,
             system: str | None, out: str | None, no_baseline: bool, no_nll: bool, as_json: bool,
             task: str) -> None:  # fmt: skip
    """Score a model on a task, steered beside unsteered if a vector is given.

    TASK is gsm8k, math500, amc23, aime24, olympiad (from the Hub), demo (embedded), or a local
    JSONL file with the fields of one of these. Greedy decoding; 95% intervals; the steered rows
    are compared with strength 0 on the same problems.
    """
    request = read_steering(vector, strength, layers, positions, relative)

    from ..evaluation.tasks import load_task

    problems = load_task(task, split=split, skip=skip, limit=limit, revision=revision)

    from ..distributed.ranks import Ranks
    from ..evaluation.answers import by_steering, journal_header
    from ..evaluation.evaluate import evaluate as run
    from ..evaluation.journal import journal_of
    from ..model.dose import mean_norms
    from ..model.model import inspect, load

    ranks = Ranks.connect()
    loaded, tokenizer = load(model)
    info, steering = inspect(loaded, model), None
    if request is not None:
        tell_fit(request.vector, info)
        norms = mean_norms(loaded, tokenizer, request.vector, request.layers)
        steering = request.at(norms)
        steering = replace(steering, strength=ranks.share(steering.strength))
        tell_dose(steering, steering.relative_dose(norms))
        if not steering.strength:
            note("strength 0 is the unsteered model: there is nothing to compare")
    tell_grader(problems)
    path = Path(out or f"eval-{Path(task).stem}-{Path(info.name).name}.jsonl")
    live = Live()
    expected = len(problems) * (2 if steering and steering.strength and not no_baseline else 1)
    header = journal_header(loaded, tokenizer, max_tokens, system)
    with journal_of(path, header, ranks) as journal:
        tell_kept(journal)
        tell_ranks(ranks)
        try:
            scores, answers = run(
                loaded, tokenizer, problems, steering=steering, baseline=not no_baseline,
                journal=journal, system=system, max_tokens=max_tokens, rows=rows,
                with_nll=not no_nll, ranks=ranks, progress=progress(live, expected),
            )  # fmt: skip
        except KeyboardInterrupt:
            live.clear()
            note(f"interrupted; what is done is in {path}, the same command goes on from there.")
            raise
    live.clear()
    if as_json:
        about = which_problems(task, problems, split=split, skip=skip, revision=revision)
        document = about | {
            "model": info.name, "fingerprint": info.fingerprint,
            "steering": steering.describe() if steering else None, "max_tokens": max_tokens,
            "answers": str(path), "scores": {name: s.describe() for name, s in scores.items()},
        }  # fmt: skip
        click.echo(json.dumps(document, ensure_ascii=False, allow_nan=False))
    else:
        click.echo("\n".join(_table(scores)))
    for name, setting in zip(scores, by_steering(answers).values(), strict=True):
        tell_disagreements(name, list(setting.values()))
    note(f"every response is in {path}")


def tell_ranks(ranks: "Ranks") -> None:
    """Say that the work is split."""
    if ranks.size > 1:
        note(f"split over {ranks.size} ranks; what is counted here is this rank's share")


def tell_grader(problems: "Sequence[Problem]") -> None:
    """Say that boxed answers are graded by the string rule alone, if they are."""
    from ..evaluation.equivalence import installed

    if any(problem.rule == "boxed" for problem in problems) and not installed():
        note("boxed answers are graded by the string rule alone; for math-verify, which accepts more "
             f"forms of an answer: {install_command('eval')}")  # fmt: skip


def which_problems(task: str, problems: "Sequence[Problem]", **choice: object) -> dict[str, object]:
    """Return what identifies the problems of a run, for its results."""
    import hashlib

    ids = "\n".join(f"{p.id} {p.prompt}" for p in problems)
    digest = hashlib.sha256(ids.encode()).hexdigest()[:16]
    return {"task": task, **choice, "problems": len(problems), "problems_sha256": digest}


def tell_kept(journal: "Journal") -> None:
    """Say that an earlier run's answers are there."""
    kept = sum("nll_of" not in record for record in journal.records)
    if kept:
        note(f"{journal.path}: {count(kept, 'answer')} there already; what fits is used")


def progress(live: Live, expected: int) -> "Callable[[list[Answer], int], None]":
    """Return a function that shows how many answers there are."""
    import time

    began, first = time.monotonic(), []

    def show(answers: "list[Answer]", tokens: int) -> None:
        first or first.append(len(answers))
        if not live.due:
            return
        seconds = time.monotonic() - began
        done, right = len(answers), sum(one.correct for one in answers)
        rate = f", {tokens / seconds:.0f} tokens/s" if tokens else ""
        left = ""
        if done > first[0]:
            minutes = seconds / (done - first[0]) * (expected - done) / 60
            left = f", about {minutes:.0f} min left" if minutes >= 1 else ""
        if done == expected:
            rate, left = ", working out the NLL", ""
        live.show(f"{done}/{expected} answers, {right} right{rate}{left}")

    return show


def tell_disagreements(name: str, answers: "list[Answer]") -> None:
    """Show where math-verify, which counts, and the reference's string rule differ."""
    differing = [a for a in answers if a.by_math_verify not in (None, a.by_reference)]
    for one in differing[:5]:
        verdict = (
            "right by math-verify, wrong" if one.by_math_verify else "wrong by math-verify, right"
        )
        note(f"{name}, {one.problem}: {one.found!r} is {verdict} by the reference's string rule")
    if len(differing) > 5:
        note(f"... and {len(differing) - 5} more (by_math_verify, by_reference in the file)")


def _table(scores: "dict[str, Score]") -> list[str]:
    header = ["", "accuracy", "steps", "tokens", "density", "NLL", "truncated", "latency s"]
    rows = [header]
    for name, s in scores.items():
        density = f"{s.density:.1f}" if s.density is not None else "-"
        rows.append([
            name, f"{share(s.accuracy)}", estimate(s.steps), estimate(s.tokens), density,
            estimate(s.nll, 3), str(s.truncated), f"{s.seconds:.1f}",
        ])  # fmt: skip
    lines = aligned(rows)
    total = next(iter(scores.values())).problems
    lines.append(f"{count(total, 'problem')}, greedy; 95% intervals in brackets")
    compared = scores["steered"].against_unsteered if "steered" in scores else None
    if compared is not None:
        lines += [
            "",
            f"steered - unsteered: accuracy {percent(compared.accuracy.value)} "
            f"[{100 * compared.accuracy.low:.1f}, {100 * compared.accuracy.high:.1f}], "
            f"steps {estimate(compared.steps)}, tokens {estimate(compared.tokens)}, "
            f"NLL {estimate(compared.nll, 3)}",
            f"right only steered: {compared.better}, right only unsteered: {compared.worse}; "
            f"McNemar p = {compared.p:.3g}",
        ]
    return lines
