"""``densesteer eval``."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

import click

from ..text import aligned, count, note, one_line, percent
from . import completers
from .options import (
    json_option,
    model_option,
    no_nll_option,
    out_option,
    read_think_budget,
    run_options,
    steering_options,
    task_options,
    think_options,
)
from .run import journalled, load_problems
from .steering import described, read_steering, steering_for

if TYPE_CHECKING:
    from collections.abc import Sequence

    from ..evaluation.answers import Answer
    from ..evaluation.condition import Baseline
    from ..evaluation.scoring import Estimate, Score
    from ..evaluation.solutions import Solution
    from ..evaluation.tasks import Problem
    from ..steering.places import Positions
    from ..steering.request import Amount


@click.command("eval")
@model_option()
@steering_options
@think_options
@task_options
@run_options
@out_option(
    "FILE.jsonl",
    "Journal of every answer; the same command continues from what is there. "
    "[default: eval-TASK-MODEL.jsonl]",
    required=False,
)
@click.option(
    "--baseline",
    "specs",
    multiple=True,
    metavar="SPEC",
    help="Also answer in another way, to compare with; may be repeated. instruction:TEXT, a system message "
    "(after --system); prefix:TEXT, with which the response begins; few-shot:N, the first N of "
    "--examples as earlier turns; budget:N, the question with 'Use at most N tokens.'; random or random:SEED, "
    "a random direction in the place of the vector's, of the same norm.",
)
@click.option(
    "--examples",
    type=click.Path(dir_okay=False),
    metavar="FILE.jsonl",
    help="Pairs or solutions for few-shot:N; none may be among the problems.",
)
@click.option(
    "--no-unsteered", is_flag=True, help="Leave out strength 0, and the comparison with it."
)
@no_nll_option
@click.option(
    "--plot",
    type=click.Path(dir_okay=False, path_type=Path),
    metavar="FILE.png",
    help="Draw accuracy against tokens of every way to answer; needs the extra plot.",
)
@json_option
@click.argument("task", shell_complete=completers.tasks)
def evaluate(
    model: str,
    vector: str | None,
    strength: "Amount | None",
    layers: tuple[str, ...],
    positions: "Positions | None",
    think_budget: int | None,
    think_strength: "Amount | None",
    think_budget_hard: bool,
    split: str | None,
    skip: int,
    limit: int | None,
    revision: str | None,
    max_tokens: int,
    rows: int,
    system: str | None,
    out: str | None,
    specs: tuple[str, ...],
    examples: str | None,
    no_unsteered: bool,
    no_nll: bool,
    plot: Path | None,
    as_json: bool,
    task: str,
) -> None:
    """Measure accuracy, steps, tokens and density on a task, steered beside unsteered and baselines.

    TASK is gsm8k, math500, amc23, aime24, olympiad (from the Hub), demo (embedded), or a local
    JSONL file with the fields of one of these. Decoding is greedy, intervals are at 95%, and the
    answers are compared with those at strength 0, and those of a baseline with the steered ones, problem
    by problem.
    """
    from ..evaluation.condition import Baseline

    if plot is not None:
        from ..evaluation.plot import check_matplotlib

        check_matplotlib()
        if not plot.parent.is_dir():
            raise click.UsageError(f"--plot {plot}: there is no folder {plot.parent}.")
    budget, limit_of_thought = read_think_budget(think_budget, think_strength, think_budget_hard)
    request = read_steering(vector, strength, layers, positions, budget, think_strength)
    baselines = [Baseline.parse(spec) for spec in specs]
    kinds = {baseline.kind for baseline in baselines}
    if "random" in kinds and request is None:
        raise click.UsageError(
            "--baseline random: takes the norm and the place of a vector: add -v FILE."
        )
    if ("few-shot" in kinds) != bool(examples):
        raise click.UsageError("--baseline few-shot:N and --examples FILE: one needs the other.")
    problems, about = load_problems(task, split=split, skip=skip, limit=limit, revision=revision)
    turns = _read_examples(examples, baselines, problems)
    for baseline in baselines:
        if baseline.kind != "random":
            baseline.condition(None, turns)  # raises before the model is loaded

    from ..distributed.loading import load_copies
    from ..distributed.ranks import Ranks
    from ..evaluation.answers import by_steering
    from ..evaluation.scoring import conditions_of
    from ..evaluation.scoring import evaluate as run

    ranks = Ranks.connect()
    loaded = load_copies(model, ranks)
    info = loaded.info
    steering = steering_for(request, loaded)
    if steering is not None and steering.is_zero:
        note("strength 0 is the unsteered model: there is nothing to compare")
    others = [baseline.condition(steering, turns) for baseline in baselines]
    wanted = {"unsteered": not no_unsteered, "baselines": others}
    conditions = conditions_of(steering, **wanted)
    path = Path(out or f"eval-{Path(task).stem}-{Path(info.name).name}.jsonl")
    with journalled(
        path,
        loaded,
        ranks,
        len(problems) * len(conditions),
        system=system,
        max_tokens=max_tokens,
        rows=rows,
        with_nll=not no_nll,
        think_limit=limit_of_thought,
    ) as options:
        scores, answers = run(loaded, problems, steering=steering, **wanted, **options)
    if as_json:
        document = {
            **about,
            "model": info.name,
            "fingerprint": info.fingerprint,
            "steering": described(steering, loaded),
            "baselines": {one.name: one.describe() for one in others},
            "max_tokens": max_tokens,
            "think_limit": limit_of_thought,
            "answers": str(path),
            "scores": {name: asdict(one) for name, one in scores.items()},
        }
        click.echo(json.dumps(document, ensure_ascii=False, allow_nan=False))
    else:
        click.echo("\n".join(_table(scores, limit_of_thought)))
    groups = by_steering(answers)
    for name, condition in conditions.items():
        _tell_disagreements(_short(name), list(groups[condition.fingerprint].values()))
    note(f"every answer is in {path}")
    if plot is not None:
        from ..evaluation.plot import plot_scores

        plot_scores(scores, plot)
        note(f"drew {plot}")


def _read_examples(
    path: str | None, baselines: "Sequence[Baseline]", problems: "Sequence[Problem]"
) -> "list[Solution]":
    """Return as many examples as the baselines take; refuse those that are among the problems."""
    from ..evaluation.condition import check_apart
    from ..evaluation.solutions import read_solutions

    if path is None:
        return []
    most = max(one.number for one in baselines if one.kind == "few-shot")
    examples = read_solutions(path)[:most]
    check_apart(examples, problems)
    return examples


def _tell_disagreements(name: str, answers: "list[Answer]") -> None:
    """Tell where math-verify, whose verdict counts, and the reference's string rule differ."""
    differing = [a for a in answers if a.by_math_verify not in (None, a.by_reference)]
    for one in differing[:5]:
        verdict = (
            "right by math-verify, wrong" if one.by_math_verify else "wrong by math-verify, right"
        )
        note(f"{name}, {one.problem}: {one.found!r} is {verdict} by the reference's string rule")
    if len(differing) > 5:
        note(f"... and {len(differing) - 5} more: see by_math_verify and by_reference in the file")


def _short(name: str) -> str:
    return one_line(name, 32)


def _estimate(one: "Estimate | None", digits: int = 1) -> str:
    """Write ``5.1 [4.8, 5.4]``; ``-`` for none."""
    if one is None:
        return "-"
    return f"{one.value:.{digits}f} [{one.low:.{digits}f}, {one.high:.{digits}f}]"


def _share(one: "Estimate") -> str:
    """Write ``45.0% [35.6, 54.8]``."""
    return f"{percent(one.value)} [{100 * one.low:.1f}, {100 * one.high:.1f}]"


def _table(scores: "dict[str, Score]", think_limit: int | None) -> list[str]:
    from ..evaluation.intervals import FEW

    titles = [
        "accuracy",
        "steps",
        "tokens",
        "density",
        "NLL",
        "truncated",
        "latency s",
        "s/correct",
    ]
    thinks = any(s.thought_tokens for s in scores.values())
    rows = [["", *titles, *["thought tokens"] * thinks]]
    for name, s in scores.items():
        rows.append(
            [
                _short(name),
                _share(s.accuracy),
                _estimate(s.steps),
                _estimate(s.tokens),
                "-" if s.density is None else f"{s.density:.1f}",
                _estimate(s.nll, 3),
                str(s.truncated),
                f"{s.seconds:.1f}",
                _estimate(s.seconds_per_correct),
                *[_estimate(s.thought_tokens)] * thinks,
            ]
        )
    lines = aligned(rows)
    total = next(iter(scores.values())).problems
    lines.append(f"{count(total, 'problem')}, greedy; 95% intervals in brackets")
    if total < FEW:
        lines.append(
            "so few problems make the intervals of means (all but the accuracy's) too narrow"
        )
    if think_limit is not None:
        lines.append(
            f"in every row a thought was ended by force after {think_limit} tokens; the NLL counts that token too"
        )
    differences = [_differences(scores, other) for other in ("unsteered", "steered")]
    for rows in filter(None, differences):
        lines += ["", *aligned(rows)]
    if (tests := sum(len(rows) - 1 for rows in differences if rows)) > 1:
        lines.append(f"p: McNemar's exact test, not corrected for the {tests} comparisons")
    return lines


def _differences(scores: "dict[str, Score]", other: str) -> list[list[str]]:
    """Return the rows of the differences from one of the conditions; nothing if there are none."""
    rows = [["", "accuracy, points", "gained", "lost", "McNemar p", "steps", "tokens", "NLL"]]
    for name, s in scores.items():
        compared = s.against_unsteered if other == "unsteered" else s.against_steered
        if compared is None:
            continue
        accuracy = compared.accuracy
        rows.append(
            [
                f"{_short(name)} - {other}",
                f"{100 * accuracy.value:+.1f} [{100 * accuracy.low:.1f}, {100 * accuracy.high:.1f}]",
                str(compared.better),
                str(compared.worse),
                f"{compared.p:.3g}",
                _estimate(compared.steps),
                _estimate(compared.tokens),
                _estimate(compared.nll, 3),
            ]
        )
    return rows if len(rows) > 1 else []
