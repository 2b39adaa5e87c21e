"""``densesteer sweep``."""

import json
import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from click.core import ParameterSource

from ..errors import install_command
from ..text import aligned, count, note, percent, signed, signed_dose
from . import completers
from .calibrate import read_kl, read_layer_sets, store, warn_of_own_pairs
from .calibrate import run as calibrate
from .calibrate import table as calibration_table
from .options import (
    json_option,
    layer_sets_option,
    model_option,
    no_nll_option,
    out_option,
    positions_option,
    run_options,
    strict_option,
    task_options,
    vector_option,
)
from .run import journalled, load_problems, program
from .steering import at_positions, read_vector, tell_fit

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from ..distributed.ranks import Ranks
    from ..evaluation.answers import Answer
    from ..evaluation.sweep import GridRow, Setting, Sweep
    from ..extraction.calibrate import Calibration
    from ..extraction.pairs import Pair
    from ..model.model import Model
    from ..steering.places import Positions
    from ..steering.request import Amount
    from ..steering.vector import SteeringVector


PAIRS = 16  # with which a sweep calibrates, at most


@click.command()
@model_option()
@vector_option("", required=True)
@layer_sets_option(
    "[default: the layers of a trained vector, or several that a sweep recommended, together; else five "
    "around the middle, with --pairs the best five; all if there are six at most]"
)
@click.option(
    "-s",
    "--strengths",
    metavar="LIST",
    help="Doses in per cent of the residual stream, strengths (lambda) or KLs, separated by commas: "
    "--strengths=-10%,10%,20%,0.1nats. 0 is always added.",
)
@click.option(
    "--kl",
    metavar="LIST",
    help="KL(steered || unsteered) in nats per token, in place of -s. [default with --pairs: "
    "0.05,0.1,0.2]",
)
@click.option(
    "--pairs",
    type=click.Path(exists=True, dir_okay=False),
    metavar="FILE",
    help="Calibrate first, as `densesteer calibrate` does with these pairs, and generate only for the "
    "best settings.",
)
@click.option(
    "--best",
    type=click.IntRange(min=1),
    default=3,
    show_default=True,
    metavar="N",
    help="With --pairs: settings to generate for. The best at each KL come first.",
)
@positions_option()
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
    help="Store table and recommendation in the vector's file; every command then uses these "
    "layers and that strength by default.",
)
@json_option
@click.argument("task", shell_complete=completers.tasks)
def sweep(
    model: str,
    vector: str,
    layers: tuple[str, ...],
    strengths: str | None,
    kl: str | None,
    pairs: str | None,
    best: int,
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

    Tries a grid of layers and strengths on TASK, which is named as for `densesteer eval`; with --pairs
    only the best settings by a calibration, which takes minutes. Use problems that you will not evaluate
    on: gsm8k and demo are taken from their split train. The recommendation is the most accurate setting
    whose gain over strength 0 the paired test supports; else the setting with the fewest tokens whose
    accuracy is worse by less than --margin; else none, and what it would take to know.
    """
    from dataclasses import asdict

    from .. import demo
    from ..files import atomic_file, disk_errors, file_to_replace
    from ..steering.request import usual_positions

    steering_vector = read_vector(vector)
    if write and vector == demo.NAME:
        raise click.UsageError("--write: the embedded vector cannot be changed; extract your own.")
    if write:
        file_to_replace(Path(vector))
    amounts = _amounts(strengths, kl, pairs)
    chosen = read_layer_sets(layers, steering_vector)
    held_out = _read_pairs(pairs, steering_vector) if pairs else []
    problems, about = load_problems(
        task, split=split, skip=skip, limit=limit, revision=revision, calibration=True
    )
    left = _problems_after(about, skip + len(problems))
    where = positions or usual_positions(steering_vector)
    folder = Path(out)

    from ..distributed.loading import load_copies
    from ..distributed.ranks import Ranks
    from ..evaluation.sweep import Setting, settings_of, with_recommendation
    from ..evaluation.sweep import sweep as run
    from ..extraction.pairs import warn_of_other_model
    from ..steering.steering import Steering

    ranks = Ranks.connect()
    loaded = load_copies(model, ranks)
    info = loaded.info
    tell_fit(steering_vector, loaded)
    if pairs and (warning := warn_of_other_model(pairs, info.fingerprint)):
        note(warning)
    if write and steering_vector.meta.fingerprint not in (None, info.fingerprint):
        raise click.ClickException(
            "--write: the vector was extracted from other weights, and the recommendation would be "
            "taken for theirs. Leave --write out, or extract a vector from this model."
        )
    with disk_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
    found = None
    if pairs:
        targets = [amount.number for amount in amounts]
        found = _calibrated(
            folder, loaded, ranks, steering_vector, held_out, chosen, targets, where
        )
        settings = [Setting()]
        for row in found.best(best):
            steering = Steering(steering_vector, row.strength, row.layers, where)
            settings.append(Setting(row.layers, row.strength, row.dose, steering))
    else:
        chosen = chosen or _usual_layers(steering_vector)
        settings = settings_of(loaded, steering_vector, chosen, amounts, positions=where)
    note(
        f"{count(len(settings), 'setting')} x {count(len(problems), 'problem')}{at_positions(where)}; "
        f"results in {folder}"
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
    what_next, command = _next(result, about, left, where, stored=write)
    document: dict[str, object] = {
        **about,
        "model": info.name,
        "fingerprint": info.fingerprint,
        "vector": steering_vector.name,
        "vector_sha256": steering_vector.sha256(),
        "positions": where,
        "system": system,
        "max_tokens": max_tokens,
        "margin": margin,
        "rows": [row.describe() for row in result.rows],
        "recommendation": asdict(result.recommendation),
        "calibration": found and found.describe(),
        "next": f"densesteer {command}",
    }
    _keep_earlier(folder, document)
    with atomic_file(folder / "table.json") as file:
        file.write(json.dumps(document, indent=1, ensure_ascii=False, allow_nan=False).encode())
    _draw(folder, result)
    if write:
        from ..steering.request import joined

        updated = with_recommendation(steering_vector, result, task=about, positions=where)
        if (older := steering_vector.meta.recommended) and updated.meta.recommended != older:
            found_now = "removed" if updated.meta.recommended is None else "replaced"
            note(
                f"{vector}: its earlier recommendation is {found_now}: layer {joined(older['layers'])}, "
                f"strength {older['strength']:.4g}"
            )
        store(vector, found.on(updated) if found else updated, read_vector(vector))
    if as_json:
        click.echo(json.dumps(document, ensure_ascii=False, allow_nan=False))
    else:
        lines = [*_table(result.rows), _LEGEND, "", result.recommendation.text]
        click.echo("\n".join([*lines, "", f"Next, {what_next}:", f"  {program()} {command}"]))


_LEGEND = (
    "dose: what is added, in per cent of the residual stream's norm; strength: the same as lambda\n"
    "95%: interval of the accuracy (table.json has the others); p: exact McNemar test against\n"
    "strength 0, not corrected for the number of settings (the recommendation is)"
)


def _keep_earlier(folder: Path, document: "Mapping[str, Any]") -> None:
    """Rename the table and pictures of an earlier sweep, unless it was of the same settings and problems.

    A setting is the vector, its layers and strength, and the positions.
    """
    from itertools import count as numbers

    from ..errors import InputError
    from ..files import parse_object

    def identity(one: "Mapping[str, Any]") -> list[object]:
        settings = [row["fingerprint"] for row in one["rows"]]
        return [settings, one["problems_sha256"], one["margin"]]

    if not (table := folder / "table.json").exists():
        return
    try:
        if identity(parse_object(table.read_bytes(), "the table")) == identity(document):
            return
    except (OSError, InputError, KeyError, TypeError):
        pass  # damaged, or of an older form: kept too
    there = [table, folder / "heatmap.png", folder / "curves.png"]
    for number in numbers(1):
        kept = [old.with_stem(f"{old.stem}-{number}") for old in there]
        if not any(map(Path.exists, kept)):
            break
    for old, new in zip(there, kept, strict=True):
        if old.exists():
            old.rename(new)
    note(
        f"{folder}: has an earlier sweep of another vector, other settings or problems; its table is now "
        f"table-{number}.json"
    )


def _amounts(strengths: str | None, kl: str | None, pairs: str | None) -> "list[Amount]":
    """Return the strengths to try: those that are named, or those at some KL."""
    from ..steering.request import Amount

    if strengths and (kl or pairs):
        raise click.UsageError(
            "--strengths goes without --kl and --pairs, which find the strengths."
        )
    if not pairs and _given("best"):
        raise click.UsageError("--best chooses among calibrated settings: add --pairs FILE.")
    if kl or pairs:
        return [Amount(target, "kl") for target in read_kl(kl or "0.05,0.1,0.2")]
    if not strengths:
        raise click.UsageError(
            "nothing to sweep: name strengths (--strengths=10%,20%), or pairs to calibrate with (--pairs "
            "FILE)."
        )
    amounts = [Amount.parse(part) for part in strengths.split(",")]
    if not any(amount.number for amount in amounts):
        raise click.UsageError("nothing to sweep: name at least one strength other than 0.")
    return amounts


def _given(option: str) -> bool:
    """Tell whether the command line names an option of this command."""
    source = click.get_current_context().get_parameter_source(option)
    return source is ParameterSource.COMMANDLINE


def _next(
    result: "Sweep", about: "Mapping[str, Any]", left: int, where: "Positions", *, stored: bool
) -> tuple[str, str]:
    """Return what to do after a verdict, and the command for it, without the program's name.

    Args:
        about: what identifies the problems (``load_problems``).
        left: how many problems the task has after these.
        stored: whether the vector's file has the recommendation.
    """
    from ..evaluation.recommendation import problems_needed
    from ..steering.request import joined
    from ..steering.steering import LARGE_DOSE

    params = click.get_current_context().params
    best, task, after = result.recommendation, params["task"], params["skip"] + about["problems"]
    same = ["-m", params["model"], "-v", params["vector"]]
    place = ["--positions", where] * (where != "all" or _given("positions"))
    kept = ["split", "revision", "max_tokens", "rows", "system", "no_nll"]
    if best.layers:
        if not stored:
            same += ["-l", joined(best.layers), f"--strength={best.strength!r}", *place]
        if about["split"] == params["split"]:  # else eval takes the split test by itself
            if not left:
                return "try it", _command("chat", same, ["system"])
            same += ["--skip", str(after)]
        return "confirm it on other problems", _command("eval", same, kept, task)
    one = best.unproven
    if one and left >= one.problems_needed:
        same += ["-l", joined(one.layers), f"--strengths={one.strength!r}"]
        same += ["--skip", str(after), "--limit", str(one.problems_needed), *place]
        same += ["-o", f"{Path(params['out'])}-confirm"]
        command = _command("sweep", same, [*kept, "margin"], task)
        return "try that setting alone on other problems", command
    need = problems_needed(len(result.rows) - 1, params["margin"])
    if not one and 0 < need - about["problems"] <= left:
        every = [option.name for option in click.get_current_context().command.params]
        kept = [name for name in every if name not in ("model", "vector", "limit", "as_json")]
        command = _command("sweep", [*same, "--limit", str(need)], kept, task)
        return "go on with more problems", command
    if one:
        look, seen = one, ""
    else:
        unsteered, *steered = result.rows
        sound = [row for row in steered if abs(row.setting.dose) < LARGE_DOSE]
        fewest = min(sound, key=lambda row: row.score.steps.value, default=unsteered)
        before, now = (row.score.steps.value for row in (unsteered, fewest))
        if now >= before:
            return "look for another layer", _command("vector", ["show", params["vector"]], [])
        look, seen = fewest.setting, f"{now:.1f} steps instead of {before:.1f} at "
    layer, dose = joined(look.layers), signed_dose(look.dose).lstrip("+")
    same += ["-l", layer, "-s", dose, *place]
    what = f"see for yourself what it changes ({seen}layer {layer}, {dose})"
    return what, _command("chat", same, ["system"])


def _problems_after(about: "Mapping[str, Any]", number: int) -> int:
    """Return how many problems the task has after the first ``number``."""
    from ..errors import InputError
    from ..evaluation.tasks import load_task

    chosen = {key: about[key] for key in ("split", "revision")}
    try:
        return len(load_task(about["task"], skip=number, **chosen))
    except InputError:
        return 0


def _command(name: str, words: list[str], kept: list[str], *task: str) -> str:
    """Return a command with ``words`` and those options of this one in ``kept`` that were given.

    Without the program's name, and without what is no parameter (``--strict``).
    """
    ctx = click.get_current_context()
    for option in ctx.command.params:
        named = isinstance(option, click.Option) and option.name in kept
        if named and option.name in ctx.params and _given(option.name):
            value = ctx.params[option.name]
            for one in value if option.multiple else [value]:
                words = [*words, option.opts[0], *([] if option.is_flag else [str(one)])]
    return shlex.join([name, *words, *task])


def _read_pairs(file: str, vector: "SteeringVector") -> "list[Pair]":
    from ..extraction.pairs import read_pairs

    found = read_pairs(file)
    warn_of_own_pairs(vector, found)
    return found[:PAIRS]


def _calibrated(
    folder: Path,
    model: "Model",
    ranks: "Ranks",
    vector: "SteeringVector",
    pairs: "list[Pair]",
    layers: "list[tuple[int, ...]] | None",
    targets: list[float],
    positions: "Positions",
) -> "Calibration":
    """Return the calibration in the sweep's folder if it is of the same things; else make and keep it.

    A sweep that goes on must have the same strengths to the last digit, and takes no minutes for them.
    """
    from ..extraction.calibrate import Calibration
    from ..extraction.pairs import pairs_sha256
    from ..files import atomic_file, parse_object

    path = folder / "calibration.json"
    asked = {
        "fingerprint": model.info.fingerprint,
        "quantization": model.info.quantization,
        "dtype": model.info.dtype,
        "vector_sha256": vector.sha256(),
        "pairs_sha256": pairs_sha256(pairs),
        "layers": layers and [list(one) for one in layers],
        "kl": targets,
        "positions": positions,
    }
    kept = None
    if ranks.speaks and path.exists():
        kept = parse_object(path.read_bytes(), f"{path}")
        kept = kept["calibration"] if kept.get("asked") == json.loads(json.dumps(asked)) else None
    if (kept := ranks.share(kept)) is None:
        made = calibrate(model, vector, pairs, layers, targets, positions)
        kept = ranks.share(made.describe())
        if ranks.speaks:
            with atomic_file(path) as file:
                document = {"asked": asked, "calibration": kept}
                file.write(json.dumps(document, indent=1, allow_nan=False).encode())
    try:
        found = Calibration.read(kept)
    except (KeyError, TypeError, ValueError, IndexError) as error:
        raise click.ClickException(f"{path}: is damaged ({error!r}). Delete it.") from error
    if ranks.speaks:
        click.echo("\n".join([*calibration_table(found), ""]), err=True)
    return found


def _usual_layers(vector: "SteeringVector") -> list[tuple[int, ...]]:
    from ..steering.request import joint_layers

    if joint := joint_layers(vector):
        return [joint]
    if len(vector.layers) <= 6:
        return [(layer,) for layer in vector.layers]
    wanted = [vector.meta.layer_count * k // 8 for k in (2, 3, 4, 5, 6)]
    near = {min(vector.layers, key=lambda have: (abs(have - want), have)) for want in wanted}
    return [(layer,) for layer in sorted(near)]


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


_SETTING = ("layers", "dose", "strength")
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
    from ..steering.request import joined

    return [joined(setting.layers) or "-", signed_dose(setting.dose), signed(setting.strength)]


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
