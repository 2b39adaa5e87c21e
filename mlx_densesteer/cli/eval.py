"""``densesteer eval``."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

import click

from ..text import aligned, count, note, percent
from . import completers
from .options import (
    json_option,
    model_option,
    no_nll_option,
    out_option,
    run_options,
    steering_options,
    task_options,
)
from .run import journalled, load_problems
from .steering import described, read_steering, steering_for

if TYPE_CHECKING:
    from ..evaluation.answers import Answer
    from ..evaluation.scoring import Estimate, Score
    from ..steering.request import Amount
    from ..steering.steering import Positions


@click.command("eval")
@model_option()
@steering_options
@task_options
@run_options
@out_option(
    "FILE.jsonl",
    "Journal of every answer; the same command continues from what is there. "
    "[default: eval-TASK-MODEL.jsonl]",
    required=False,
)
@click.option(
    "--no-baseline", is_flag=True, help="Leave out strength 0, and the comparison with it."
)
@no_nll_option
@json_option
@click.argument("task", shell_complete=completers.tasks)
def evaluate(
    model: str,
    vector: str | None,
    strength: "Amount | None",
    layers: tuple[str, ...],
    positions: "Positions | None",
    split: str | None,
    skip: int,
    limit: int | None,
    revision: str | None,
    max_tokens: int,
    rows: int,
    system: str | None,
    out: str | None,
    no_baseline: bool,
    no_nll: bool,
    as_json: bool,
    task: str,
) -> None:
    """Measure accuracy, steps, tokens and density on a task, steered beside unsteered.

    TASK is gsm8k, math500, amc23, aime24, olympiad (from the Hub), demo (embedded), or a local
    JSONL file with the fields of one of these. Decoding is greedy, intervals are at 95%, and the
    steered answers are compared with those at strength 0 to the same problems.
    """
    request = read_steering(vector, strength, layers, positions)
    problems, about = load_problems(task, split=split, skip=skip, limit=limit, revision=revision)

    from ..distributed.loading import load_copies
    from ..distributed.ranks import Ranks
    from ..evaluation.answers import by_steering
    from ..evaluation.scoring import evaluate as run

    ranks = Ranks.connect()
    loaded = load_copies(model, ranks)
    info = loaded.info
    steering = steering_for(request, loaded)
    if steering is not None and not steering.strength:
        note("strength 0 is the unsteered model: there is nothing to compare")
    path = Path(out or f"eval-{Path(task).stem}-{Path(info.name).name}.jsonl")
    compared = steering is not None and steering.strength and not no_baseline
    with journalled(
        path,
        loaded,
        ranks,
        len(problems) * (2 if compared else 1),
        system=system,
        max_tokens=max_tokens,
        rows=rows,
        with_nll=not no_nll,
    ) as options:
        scores, answers = run(
            loaded, problems, steering=steering, baseline=not no_baseline, **options
        )
    if as_json:
        document = {
            **about,
            "model": info.name,
            "fingerprint": info.fingerprint,
            "steering": described(steering, loaded),
            "max_tokens": max_tokens,
            "answers": str(path),
            "scores": {name: asdict(one) for name, one in scores.items()},
        }
        click.echo(json.dumps(document, ensure_ascii=False, allow_nan=False))
    else:
        click.echo("\n".join(_table(scores)))
    for name, setting in zip(scores, by_steering(answers).values(), strict=True):
        _tell_disagreements(name, list(setting.values()))
    note(f"every answer is in {path}")


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


def _estimate(one: "Estimate | None", digits: int = 1) -> str:
    """Write ``5.1 [4.8, 5.4]``; ``-`` for none."""
    if one is None:
        return "-"
    return f"{one.value:.{digits}f} [{one.low:.{digits}f}, {one.high:.{digits}f}]"


def _share(one: "Estimate") -> str:
    """Write ``45.0% [35.6, 54.8]``."""
    return f"{percent(one.value)} [{100 * one.low:.1f}, {100 * one.high:.1f}]"


def _table(scores: "dict[str, Score]") -> list[str]:
    rows = [["", "accuracy", "steps", "tokens", "density", "NLL", "truncated", "latency s"]]
    for name, s in scores.items():
        rows.append(
            [
                name,
                _share(s.accuracy),
                _estimate(s.steps),
                _estimate(s.tokens),
                "-" if s.density is None else f"{s.density:.1f}",
                _estimate(s.nll, 3),
                str(s.truncated),
                f"{s.seconds:.1f}",
            ]
        )
    lines = aligned(rows)
    total = next(iter(scores.values())).problems
    lines.append(f"{count(total, 'problem')}, greedy; 95% intervals in brackets")
    compared = scores["steered"].against_unsteered if "steered" in scores else None
    if compared is not None:
        lines += [
            "",
            f"steered - unsteered: accuracy {_share(compared.accuracy)}, "
            f"steps {_estimate(compared.steps)}, tokens {_estimate(compared.tokens)}, "
            f"NLL {_estimate(compared.nll, 3)}",
            f"right only steered: {compared.better}, right only unsteered: {compared.worse}; "
            f"McNemar p = {compared.p:.3g}",
        ]
    return lines
