"""``densesteer sweep``."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ..errors import install_command
from ..text import aligned, count, note, percent, signed, signed_dose
from . import completers
from .options import (
    json_option,
    model_option,
    no_nll_option,
    out_option,
    positions_option,
    run_options,
    strict_option,
    task_options,
    vector_option,
)
from .run import journalled, load_problems
from .steering import read_vector, tell_fit

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from ..evaluation.answers import Answer
    from ..evaluation.sweep import GridRow, Setting, Sweep
    from ..steering.steering import Positions
    from ..steering.vector import SteeringVector


@click.command()
@model_option()
@vector_option("", required=True)
@click.option(
    "-l",
    "--layers",
    multiple=True,
    metavar="LAYERS",
    help="0-based: 8,12-16 or all; may be repeated. [default: five around the middle; all if there are "
    "six at most]",
)
@click.option(
    "-s",
    "--strengths",
    required=True,
    metavar="LIST",
    help="Doses in per cent of the residual stream, or strengths (lambda), separated by commas: "
    "--strengths=-10%,10%,20%. 0 is always added.",
)
@positions_option
@strict_option
@task_options
@run_options
@out_option(
    "FOLDER",
    "For answers, table and pictures. The same command continues from what is there.",
    required=False,
    folder=True,
    default="sweep",
    show_default=True,
)
@no_nll_option
@click.option(
    "--margin",
    type=click.FloatRange(0, 1, min_open=True, max_open=True),
    default=0.02,
    show_default=True,
    help="Loss of accuracy up to which a setting that saves tokens is recommended.",
)
@click.option(
    "--write",
    is_flag=True,
    help="Store table and recommendation in the vector's file; every command then uses that layer "
    "and strength by default.",
)
@json_option
@click.argument("task", shell_complete=completers.tasks)
def sweep(
    model: str,
    vector: str,
    layers: tuple[str, ...],
    strengths: str,
    positions: "Positions | None",
    split: str | None,
    skip: int,
    limit: int | None,
    revision: str | None,
    max_tokens: int,
    rows: int,
    system: str | None,
    out: str,
    no_nll: bool,
    margin: float,
    write: bool,
    as_json: bool,
    task: str,
) -> None:
    """Find the layer and strength at which a vector works best, or that none does.

    Tries a grid of layers and strengths on TASK, which is named as for `densesteer eval`. Use problems
    that you will not evaluate on: gsm8k and demo are taken from their split train. The recommendation is
    the most accurate setting whose gain over strength 0 the paired test supports; else the setting with
    the fewest tokens whose accuracy is worse by less than --margin; else none.
    """
    from dataclasses import asdict

    from .. import demo
    from ..files import atomic_file, disk_errors, file_to_replace
    from ..steering.request import Amount

    steering_vector = read_vector(vector)
    if write and vector == demo.NAME:
        raise click.UsageError("--write: the embedded vector cannot be changed; extract your own.")
    if write:
        file_to_replace(Path(vector))
    chosen = _layers(layers, steering_vector)
    amounts = [Amount.parse(part) for part in strengths.split(",")]
    if not any(amount.number for amount in amounts):
        raise click.UsageError("nothing to sweep: name at least one strength other than 0.")
    problems, about = load_problems(
        task, split=split, skip=skip, limit=limit, revision=revision, calibration=True
    )
    where = positions or "all"
    subject = {"vector_sha256": steering_vector.sha256(), "positions": where}
    folder = Path(out)
    _check_folder(folder, {"task": task, "split": about["split"], **subject})

    from ..distributed.loading import load_copies
    from ..distributed.ranks import Ranks
    from ..evaluation.sweep import settings_of, with_recommendation
    from ..evaluation.sweep import sweep as run

    ranks = Ranks.connect()
    loaded = load_copies(model, ranks)
    info = loaded.info
    tell_fit(steering_vector, loaded)
    if write and steering_vector.meta.fingerprint not in (None, info.fingerprint):
        raise click.ClickException(
            "--write: the vector was extracted from other weights, and the recommendation would be "
            "taken for theirs. Leave --write out, or extract a vector from this model."
        )
    settings = settings_of(loaded, steering_vector, chosen, amounts, positions=where)
    with disk_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
    note(
        f"{count(len(settings), 'setting')} x {count(len(problems), 'problem')}; results in {folder}"
    )
    with journalled(
        folder / "answers.jsonl",
        loaded,
        ranks,
        len(settings) * len(problems),
        system=system,
        max_tokens=max_tokens,
        rows=rows,
        with_nll=not no_nll,
        table=lambda answers: _so_far(settings, answers),
    ) as options:
        result = run(loaded, problems, settings, margin=margin, **options)
    if not ranks.speaks:
        return
    document: dict[str, object] = {
        **about,
        "model": info.name,
        "fingerprint": info.fingerprint,
        "vector": steering_vector.name,
        **subject,
        "system": system,
        "max_tokens": max_tokens,
        "margin": margin,
        "rows": [row.describe() for row in result.rows],
        "recommendation": asdict(result.recommendation),
    }
    with atomic_file(folder / "table.json") as file:
        file.write(json.dumps(document, indent=1, ensure_ascii=False, allow_nan=False).encode())
    _draw(folder, result)
    if write:
        if steering_vector.meta.recommended and result.recommendation.layer is None:
            note("this sweep recommends nothing; the vector's older recommendation is removed")
        _write(vector, with_recommendation(steering_vector, result, task=about, positions=where))
    if as_json:
        click.echo(json.dumps(document, ensure_ascii=False, allow_nan=False))
    else:
        click.echo("\n".join([*_table(result.rows), _LEGEND, "", result.recommendation.text]))


_LEGEND = (
    "dose: what is added, in per cent of the residual stream's norm; strength: the same as lambda\n"
    "95%: interval of the accuracy (table.json has the others); p: exact McNemar test against\n"
    "strength 0, not corrected for the number of settings (the recommendation is)"
)


def _check_folder(folder: Path, subject: dict[str, object]) -> None:
    """Refuse a folder with the results of a sweep of another vector, task or positions."""
    from ..errors import InputError
    from ..files import parse_object

    try:
        there = parse_object((folder / "table.json").read_bytes(), "the table")
    except (OSError, InputError):
        return
    if differing := [key for key, value in subject.items() if there.get(key) != value]:
        raise click.ClickException(
            f"{folder}: holds the results of a sweep with other {', '.join(differing)}. Name another "
            "folder (-o), or move this one away."
        )


def _write(file: str, updated: "SteeringVector") -> None:
    """Store the recommendation in the vector's file, unless the file holds another vector by now."""
    if read_vector(file).sha256() != updated.sha256():
        raise click.ClickException(
            f"{file}: holds another vector than when the sweep began; nothing is stored. The table "
            "is kept. For the new vector run the same command again with another folder (-o)."
        )
    updated.save(file)
    note(f"stored in {file}")


def _layers(texts: tuple[str, ...], vector: "SteeringVector") -> tuple[int, ...]:
    from ..steering.request import parse_layers

    if texts:
        return tuple(vector.select(parse_layers(texts, vector.layers)).layers)
    if len(vector.layers) <= 6:
        return tuple(vector.layers)
    wanted = [vector.meta.layer_count * k // 8 for k in (2, 3, 4, 5, 6)]
    near = {min(vector.layers, key=lambda have: (abs(have - want), have)) for want in wanted}
    return tuple(sorted(near))


def _so_far(settings: "Sequence[Setting]", answers: "list[Answer]") -> list[str]:
    """Return the table during the run. It has means only: intervals take long to compute."""
    from ..evaluation.answers import by_steering

    groups = by_steering(answers)
    rows = [[*_SETTING, "problems", "accuracy", "steps", "tokens"]]
    for setting in settings:
        done = list(groups.get(setting.fingerprint, {}).values())
        means = ["-"] * 3
        if done:
            means = [
                percent(sum(a.correct for a in done) / len(done)),
                f"{sum(a.steps for a in done) / len(done):.1f}",
                f"{sum(a.tokens for a in done) / len(done):.0f}",
            ]
        rows.append([*_cells(setting), str(len(done)), *means])
    return aligned(rows)


_SETTING = ("layer", "dose", "strength")
FIGURES = ("accuracy", "95%", "steps", "tokens", "density", "NLL")


def figures(row: "Mapping[str, Any]", *, nll_digits: int) -> list[str]:
    """Return the cells under ``FIGURES`` for a row that ``GridRow.describe`` made."""
    return [
        percent(row["accuracy"]),
        f"{100 * row['accuracy_low']:.0f}-{100 * row['accuracy_high']:.0f}",
        f"{row['steps']:.1f}",
        f"{row['tokens']:.0f}",
        "-" if row["density"] is None else f"{row['density']:.1f}",
        "-" if row["nll"] is None else f"{row['nll']:.{nll_digits}f}",
    ]


def _cells(setting: "Setting") -> list[str]:
    layer = "-" if setting.layer is None else str(setting.layer)
    return [layer, signed_dose(setting.dose), signed(setting.strength)]


def _table(rows: "Sequence[GridRow]") -> list[str]:
    lines = [[*_SETTING, *FIGURES, "truncated", "p"]]
    for row in rows:
        d = row.describe()
        lines.append(
            [
                *_cells(row.setting),
                *figures(d, nll_digits=3),
                str(d["truncated"]),
                "-" if d["p"] is None else f"{d['p']:.2g}",
            ]
        )
    return aligned(lines)


def _draw(folder: Path, result: "Sweep") -> None:
    """Write the pictures; without matplotlib tell how to get them."""
    from importlib.util import find_spec

    if find_spec("matplotlib") is None:
        note(f"no pictures without matplotlib; run this again after: {install_command('plot')}")
        return
    from ..evaluation.plot import plot_sweep

    for path in plot_sweep([row.describe() for row in result.rows], folder):
        note(f"wrote {path}")
