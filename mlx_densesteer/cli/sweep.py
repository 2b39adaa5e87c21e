"""``densesteer sweep``."""

import json
import time
from pathlib import Path
from typing import TYPE_CHECKING

import click

from ..extras import install_command
from . import completers
from .eval import tell_grader, tell_kept, tell_ranks, which_problems
from .options import (
    model_option,
    positions_option,
    relative_option,
    run_options,
    task_options,
    vector_option,
)
from .progress import Live
from .steering import read_vector, tell_fit
from .tables import aligned, percent, signed
from .text import count, note

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from ..evaluation.answers import Answer
    from ..evaluation.sweep import GridRow, Setting, Sweep
    from ..steering.vector import SteeringVector


@click.command()
@model_option
@vector_option("", required=True)
@click.option("-l", "--layers", multiple=True, metavar="LAYERS",
              help="0-based: 8,12-16 or all; may be repeated. [default: five around the middle, or all of six]")  # fmt: skip
@click.option("-s", "--strengths", required=True, metavar="NUMBERS",
              help="Separated by commas: --strengths=-2,-1,1,2,4. 0 is always there.")  # fmt: skip
@relative_option("NUMBERS are fractions")
@positions_option
@task_options
@run_options
@click.option("-o", "--out", type=click.Path(file_okay=False), default="sweep", show_default=True,
              metavar="FOLDER", help="For responses, table and pictures; a run that was cut off "
                                     "goes on from it.")  # fmt: skip
@click.option(
    "--no-nll", is_flag=True, help="Leave out the NLL, which costs a pass over each response."
)
@click.option("--margin", type=click.FloatRange(0, 1, min_open=True, max_open=True), default=0.02, show_default=True,
              help="Accuracy that a recommended saving of tokens may cost at most.")  # fmt: skip
@click.option("--write", is_flag=True,
              help="Store figures and recommendation in the vector's file; `generate` and `eval` "
                   "then use that layer and strength by default.")  # fmt: skip
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
@click.argument("task", shell_complete=completers.tasks)
def sweep(model: str, vector: str, layers: tuple[str, ...], strengths: str, relative: bool,
          positions: str | None, split: str | None, skip: int, limit: int | None,
          revision: str | None, max_tokens: int, rows: int, system: str | None, out: str,
          no_nll: bool, margin: float, write: bool, as_json: bool, task: str) -> None:  # fmt: skip
    """Try a grid of layers and strengths in one pass, and recommend a setting, or none.

    TASK as for `densesteer eval`; use problems that you will not evaluate on: gsm8k and demo are
    taken from their split train. All settings share their batches. The recommendation is the most accurate setting whose gain over strength 0 the
    paired test supports, else the one with the fewest tokens at an accuracy that is no worse,
    else none.
    """
    from .. import demo

    steering_vector = read_vector(vector)
    if write and vector == demo.NAME:
        raise click.UsageError("--write: the embedded vector cannot be changed; extract your own.")
    chosen = _layers(layers, steering_vector)
    steering_vector.select(chosen)  # refuses layers that it does not hold
    numbers = _numbers(strengths)

    from ..evaluation.tasks import load_task

    if split is None and task in ("gsm8k", demo.NAME):
        split = "train"  # what chooses a setting must not be what it is judged by
    problems = load_task(task, split=split, skip=skip, limit=limit, revision=revision)

    from ..distributed.ranks import Ranks
    from ..evaluation.answers import journal_header
    from ..evaluation.journal import journal_of
    from ..evaluation.sweep import settings_of, with_recommendation
    from ..evaluation.sweep import sweep as run
    from ..model.dose import mean_norms
    from ..model.model import inspect, load

    ranks = Ranks.connect()
    loaded, tokenizer = load(model)
    info = inspect(loaded, model)
    tell_fit(steering_vector, info)
    if write and steering_vector.meta.fingerprint not in (None, info.fingerprint):
        raise click.ClickException(
            "--write: the vector was extracted from other weights; what is good for this model would "
            "be taken for those. Leave --write out, or extract a vector from this model."
        )
    where = positions or "all"
    norms = ranks.share(list(mean_norms(loaded, tokenizer, steering_vector, chosen).items()))
    settings = settings_of(
        steering_vector, chosen, numbers, positions=where, relative=relative,  # type: ignore[arg-type]
        residual_norms=dict(norms),
    )  # fmt: skip
    if len(settings) == 1:
        raise click.ClickException("nothing to sweep: name at least one strength other than 0.")
    tell_grader(problems)
    folder = Path(out)
    folder.mkdir(parents=True, exist_ok=True)
    note(
        f"{count(len(settings), 'setting')} x {count(len(problems), 'problem')}; results in {folder}"
    )
    live, journal_path = Live(), folder / "answers.jsonl"
    header = journal_header(loaded, tokenizer, max_tokens, system)
    with journal_of(journal_path, header, ranks) as journal:
        tell_kept(journal)
        tell_ranks(ranks)
        try:
            result = run(
                loaded, tokenizer, problems, settings, journal, system=system,
                max_tokens=max_tokens, rows=rows, with_nll=not no_nll, margin=margin, ranks=ranks,
                progress=_progress(live, settings, len(problems)),
            )  # fmt: skip
        except KeyboardInterrupt:
            live.clear()
            note(f"interrupted; what is done is in {journal_path}, the same command goes on.")
            raise
    live.clear()
    if not ranks.speaks:
        return
    about = which_problems(task, problems, split=split, skip=skip, revision=revision)
    document = _save(
        folder, result, about | {
            "model": info.name, "fingerprint": info.fingerprint, "vector": steering_vector.name,
            "vector_sha256": steering_vector.sha256(), "positions": where, "system": system,
            "max_tokens": max_tokens, "margin": margin,
        },
    )  # fmt: skip
    _draw(folder, result)
    if write:
        if steering_vector.meta.recommended and result.recommendation.layer is None:
            note("this sweep recommends nothing; the vector's older recommendation is removed")
        _write(vector, with_recommendation(steering_vector, result, task=about, positions=where))  # type: ignore[arg-type]
    if as_json:
        click.echo(json.dumps(document, ensure_ascii=False, allow_nan=False))
    else:
        click.echo("\n".join([*_table(result.rows), _LEGEND, "", result.recommendation.text]))


_LEGEND = (
    "dose: relative dose; 95%: interval of the accuracy (others in table.json); p: exact McNemar test\n"
    "against strength 0, not corrected for the number of settings (the recommendation is)"
)


def _write(file: str, updated: "SteeringVector") -> None:
    """Store the metadata, unless the file holds another vector by now."""
    if read_vector(file).sha256() != updated.sha256():
        raise click.ClickException(
            f"{file}: holds another vector than when the sweep began; nothing is stored. The table "
            "is kept: run the same command again for the new one."
        )
    updated.save(file)
    note(f"stored in {file}")


def _layers(texts: tuple[str, ...], vector) -> tuple[int, ...]:
    from ..steering.steering import parse_layers

    if texts:
        return parse_layers(texts, vector.layers)
    if len(vector.layers) <= 6:
        return tuple(vector.layers)
    wanted = [vector.meta.layer_count * k // 8 for k in (2, 3, 4, 5, 6)]
    near = {min(vector.layers, key=lambda have: (abs(have - want), have)) for want in wanted}
    return tuple(sorted(near))


def _numbers(text: str) -> list[float]:
    try:
        return [float(part) for part in text.split(",")]
    except ValueError as error:
        raise click.UsageError(
            f"--strengths {text!r}: expected numbers separated by commas, --strengths=-1,1,2."
        ) from error


def _progress(
    live: Live, settings: "Sequence[Setting]", problems: int
) -> "Callable[[list[Answer], int], None]":
    began = time.monotonic()
    expected = problems * len({setting.fingerprint for setting in settings})

    def show(answers: "list[Answer]", tokens: int) -> None:
        if live.due:
            rate = f", {tokens / (time.monotonic() - began):.0f} tokens/s" if tokens else ""
            live.show(f"{len(answers)}/{expected} answers{rate}", _so_far(settings, answers))

    return show


def _so_far(settings: "Sequence[Setting]", answers: "list[Answer]") -> list[str]:
    """Return a table of plain means: intervals take too long to be worked out all the time."""
    from ..evaluation.answers import by_steering

    groups = by_steering(answers)
    rows = [["layer", "strength", "problems", "accuracy", "steps", "tokens"]]
    for setting in settings:
        done = list(groups.get(setting.fingerprint, {}).values())
        figures = ["-"] * 3
        if done:
            figures = [
                percent(sum(a.correct for a in done) / len(done)),
                f"{sum(a.steps for a in done) / len(done):.1f}",
                f"{sum(a.tokens for a in done) / len(done):.0f}",
            ]
        rows.append([*_cell(setting), str(len(done)), *figures])
    return aligned(rows)


def _cell(setting: "Setting") -> list[str]:
    return ["-" if setting.layer is None else str(setting.layer), signed(setting.strength)]


def _table(rows: "Sequence[GridRow]") -> list[str]:
    header = ["layer", "strength", "dose", "accuracy", "95%", "steps", "tokens", "density", "NLL",
              "truncated", "p"]  # fmt: skip
    lines = [header]
    for row in rows:
        d = row.describe()
        lines.append([
            *_cell(row.setting),
            "-" if d["relative"] is None else f"{d['relative']:+.2f}",
            percent(d["accuracy"]),
            f"{100 * d['accuracy_low']:.0f}-{100 * d['accuracy_high']:.0f}",
            f"{d['steps']:.1f}", f"{d['tokens']:.0f}",
            "-" if d["density"] is None else f"{d['density']:.1f}",
            "-" if d["nll"] is None else f"{d['nll']:.3f}",
            str(d["truncated"]), "-" if d["p"] is None else f"{d['p']:.2g}",
        ])  # fmt: skip
    return aligned(lines)


def _save(folder: Path, result: "Sweep", about: dict[str, object]) -> dict[str, object]:
    from dataclasses import asdict

    from ..files import atomic_file

    document = about | {
        "rows": [row.describe() for row in result.rows],
        "recommendation": asdict(result.recommendation),
    }
    with atomic_file(folder / "table.json") as file:
        file.write(json.dumps(document, indent=1, ensure_ascii=False, allow_nan=False).encode())
    return document


def _draw(folder: Path, result: "Sweep") -> None:
    """Write the pictures; without matplotlib say how to get them, the table is there."""
    from importlib.util import find_spec

    if find_spec("matplotlib") is None:
        note(f"no pictures without matplotlib; run this again after: {install_command('plot')}")
        return
    from ..evaluation.plot import plot_sweep

    for path in plot_sweep([row.describe() for row in result.rows], folder):
        note(f"wrote {path}")
