"""``densesteer pairs``."""

import json
import os
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, TypedDict

import click

from ..text import Live, aligned, count, note
from . import completers
from .options import json_option, model_option, out_option, run_options, task_options
from .run import answers_progress, load_problems, resumable

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from ..evaluation.tasks import Problem
    from ..extraction.make_pairs import Files, PairsProgress, Summary
    from ..extraction.rewriting import Rewriter
    from ..extraction.sample_pairs import SampleSummary
    from ..generation.sampling import Sampling
    from ..model.model import Model


class RunOptions(TypedDict):
    """What runs with and without a rewriter have in common."""

    count: int | None
    system: str | None
    max_tokens: int
    rows: int


class Endpoint(TypedDict):
    """The options of a rewriter behind an endpoint; ``fields`` is JSON."""

    fields: str
    timeout: float
    attempts: int
    at_once: int
    per_minute: float


FIXED = ("rules", "plain", "brief")  # rewriters that are fixed rules


@click.command()
@model_option()
@task_options
@run_options
@out_option(
    "FILE.jsonl", "File of the pairs. The rejected pairs and the journals are written beside it."
)
@click.option(
    "--rewriter",
    "spec",
    metavar="REWRITER",
    help="rules, which merge steps; plain, the same and formulas without LaTeX's layout; brief, which leaves out only "
    "the plan and the words of formulas, for shorter answers, not denser ones; instruction:TEXT, the model itself, asked "
    "again with a system message such as 'Be brief.'; mlx:MODEL, a folder, Hub id or demo; openai:URL#MODEL, an OpenAI-compatible endpoint, its key in "
    "OPENAI_API_KEY; or file:FILE.jsonl. [default: rules]",
)
@click.option(
    "--count",
    "wanted",
    type=click.IntRange(min=1),
    metavar="N",
    help="Stop once N pairs are accepted. [default: take every problem]",
)
@click.option(
    "--nll-margin",
    type=click.FloatRange(min=0),
    metavar="NATS",
    help="How much the NLL per token of a rewrite may exceed the original's. [default: 0.5]",
)
@click.option(
    "--samples",
    type=click.IntRange(min=2),
    metavar="K",
    help="Draw K answers to each problem. With --rewriter two correct ones are rewritten, at most; without, the "
    "shortest correct one and the longest make a pair. Another run with a larger K goes on.",
)
@click.option(
    "--temp",
    type=click.FloatRange(min=0, min_open=True),
    help="Temperature of the samples. [default: 0.7]",
)
@click.option(
    "--top-p",
    type=click.FloatRange(0, 1, min_open=True),
    help="Draw among the likeliest tokens of this total probability. [default: 1.0]",
)
@click.option("--seed", type=click.IntRange(0, 2**64 - 1), help="Of the samples. [default: 0]")
@click.option(
    "--timeout",
    type=click.FloatRange(min=0, min_open=True),
    default=120.0,
    show_default=True,
    metavar="SECONDS",
    help="How long an endpoint may send nothing.",
)
@click.option(
    "--attempts",
    type=click.IntRange(min=1),
    default=6,
    show_default=True,
    help="How often a request to an endpoint is tried.",
)
@click.option(
    "--at-once",
    type=click.IntRange(1, 64),
    default=4,
    show_default=True,
    help="Requests to an endpoint that run at the same time.",
)
@click.option(
    "--requests-per-minute",
    type=click.FloatRange(min=0),
    default=0.0,
    metavar="N",
    help="Requests to an endpoint in a minute, at most. [default: no limit]",
)
@click.option(
    "--rewriter-fields",
    metavar="JSON",
    help="More fields of a request to an endpoint, such as '{\"temperature\": 0}'.",
)
@json_option
@click.argument("problems", shell_complete=completers.tasks)
def pairs(
    model: str,
    split: str | None,
    skip: int,
    limit: int | None,
    revision: str | None,
    max_tokens: int,
    rows: int,
    system: str | None,
    out: str,
    spec: str | None,
    wanted: int | None,
    nll_margin: float | None,
    samples: int | None,
    temp: float | None,
    top_p: float | None,
    seed: int | None,
    timeout: float,
    attempts: int,
    at_once: int,
    requests_per_minute: float,
    rewriter_fields: str | None,
    as_json: bool,
    problems: str,
) -> None:
    """Make contrastive pairs: solve problems, make the solutions denser, check both.

    With --samples the model answers each problem several times. Without a --rewriter its shortest and its
    longest correct answer make the pair then.

    PROBLEMS is gsm8k, math500, amc23, aime24, olympiad (from the Hub), demo (embedded), or a local
    JSONL file with the fields of one of these. Take no problem that you will evaluate on: without
    --split, gsm8k and demo are taken from their split train. The same command continues a run that was
    interrupted.
    """
    drawn = {"temp": temp, "top_p": top_p, "seed": seed}
    if samples is None and (lonely := [name for name, value in drawn.items() if value is not None]):
        raise click.UsageError(f"--{lonely[0].replace('_', '-')}: needs --samples K.")
    if samples and nll_margin is not None and spec is None:
        raise click.UsageError("--nll-margin: with --samples it needs a --rewriter too.")
    kind, rest = _rewriter_of(spec or "rules")
    endpoint: Endpoint = {
        "fields": rewriter_fields or "{}",
        "timeout": timeout,
        "attempts": attempts,
        "at_once": at_once,
        "per_minute": requests_per_minute,
    }
    rewriter = _without_model(kind, rest, endpoint)

    from ..evaluation.contamination import warn_of_test_problems
    from ..extraction.make_pairs import Files

    files = Files(Path(out))
    files.check(files.samples if samples else files.solved)
    chosen, _ = load_problems(
        problems, split=split, skip=skip, limit=limit, revision=revision, calibration=True
    )
    if warning := warn_of_test_problems(problem.question for problem in chosen):
        note(warning)

    from ..extraction.make_pairs import SAMPLING, make_pairs
    from ..extraction.verification import NLL_MARGIN
    from ..model.model import load

    loaded = load(model)
    run: RunOptions = {"count": wanted, "system": system, "max_tokens": max_tokens, "rows": rows}
    sampling = replace(SAMPLING, **{k: v for k, v in drawn.items() if v is not None})
    if samples and spec is None:
        _sample(loaded, chosen, files, samples, sampling, run, as_json)
        return
    if kind == "instruction":
        from ..extraction.rewriting.model import InstructionRewriter

        rewriter = InstructionRewriter(loaded, rest, system=system, rows=rows)
    elif rewriter is None:
        rewriter = _local(rest, model, loaded, rows)
    solutions = files.samples if samples else files.solved
    with resumable(solutions, files.rewrites) as live:
        summary = make_pairs(
            loaded,
            chosen,
            rewriter,
            out,
            samples=samples,
            sampling=sampling,
            nll_margin=NLL_MARGIN if nll_margin is None else nll_margin,
            progress=_progress(live, wanted),
            **run,
        )
    _tell(summary, files, wanted, samples)
    told = {"sampling": {"samples": samples, **asdict(sampling)}} if samples else {}
    _end(summary, files, as_json, solutions, rewriter=rewriter.name, **told)


def _rewriter_of(spec: str) -> tuple[str, str]:
    """Return the kind of a rewriter, and what stands behind its colon."""
    kind, _, rest = spec.partition(":")
    if kind not in (*FIXED, "instruction", "mlx", "openai", "file") or (kind in FIXED) == bool(
        rest.strip()
    ):
        raise click.UsageError(
            f"--rewriter {spec}: expected rules, plain, brief, instruction:TEXT, mlx:MODEL, openai:URL#MODEL or "
            "file:FILE.jsonl."
        )
    return kind, rest


def _without_model(kind: str, rest: str, endpoint: Endpoint) -> "Rewriter | None":
    """Return a rewriter that needs no model of this process; None for the kinds that do.

    What is wrong with it is told before a model is loaded.
    """
    if kind == "openai":
        from ..extraction.rewriting.openai import KEY, OpenAIRewriter
        from ..files import parse_object

        given, error = endpoint["fields"], click.UsageError
        return OpenAIRewriter(
            rest,
            key=os.environ.get(KEY),
            fields=parse_object(given, "--rewriter-fields", error=error, remedy=""),
            warn=note,
            timeout=endpoint["timeout"],
            attempts=endpoint["attempts"],
            at_once=endpoint["at_once"],
            per_minute=endpoint["per_minute"],
        )
    if kind == "file":
        from ..extraction.rewriting.file import FileRewriter

        return FileRewriter(rest)
    if kind in FIXED:
        from ..extraction.rewriting.rules import BriefRewriter, RulesRewriter

        return BriefRewriter() if kind == "brief" else RulesRewriter(plain=kind == "plain")
    return None


def _end(
    summary: "Summary | SampleSummary", files: "Files", as_json: bool, journal: Path, **told: object
) -> None:
    """Print the result; a run without a pair is an error."""
    if as_json:
        document = {
            "pairs": str(files.pairs),
            "rejected_pairs": str(files.rejected),
            **told,
            **asdict(summary),
        }
        click.echo(json.dumps(document, ensure_ascii=False, allow_nan=False))
    else:
        click.echo(files.pairs)
    if not summary.accepted:
        raise click.ClickException(
            f"no pair was accepted; every solution is in {journal}, every rejection and its "
            f"reasons in {files.rejected}."
        )


def _sample(
    model: "Model",
    problems: "Sequence[Problem]",
    files: "Files",
    samples: int,
    sampling: "Sampling",
    run: RunOptions,
    as_json: bool,
) -> None:
    """Make pairs of the model's own samples: the shortest and the longest of a problem."""
    from ..extraction.sample_pairs import sample_pairs

    with resumable(files.samples) as live:
        progress = answers_progress(live, samples * len(problems), with_nll=False)
        summary = sample_pairs(
            model,
            problems,
            files.pairs,
            samples=samples,
            sampling=sampling,
            progress=progress,
            **run,
        )
    _tell_samples(summary, files, run["count"])
    told = {"solutions": str(files.solutions), "sampling": asdict(sampling)}
    _end(summary, files, as_json, files.samples, **told)


def _local(name: str, target: str, loaded: "Model", rows: int) -> "Rewriter":
    """Return a rewriter with a local model, which is loaded unless it is the target."""
    from ..extraction.rewriting.model import ModelRewriter
    from ..model.model import find, load

    path = find(name)
    model = loaded if path.resolve() == find(target).resolve() else load(path)
    return ModelRewriter(model, name, rows=rows)


def _progress(live: Live, wanted: int | None) -> "Callable[[PairsProgress], None]":
    import time

    began = time.monotonic()

    def show(state: "PairsProgress") -> None:
        seconds = time.monotonic() - began
        rate = f", {state.tokens / seconds:.0f} tokens/s" if state.tokens and seconds > 1 else ""
        live.show(
            f"{state.solved}/{state.problems} solved, {state.correct} right; {state.rewritten} rewritten, "
            f"{state.checked} checked, {_accepted(state.accepted, wanted)} accepted{rate}"
        )

    return show


def _tell(summary: "Summary", files: "Files", wanted: int | None, samples: int | None) -> None:
    from ..extraction.verification import REASONS

    answers = summary.problems * (samples or 1)
    drawn = f", {count(answers, 'sample')}" if samples else ""
    note(
        f"{count(summary.problems, 'problem')}{drawn}: {_accepted(summary.accepted, wanted)} accepted, "
        f"{sum(summary.rejected.values())} rejected, {summary.wrong} solved wrongly, "
        f"{summary.truncated} cut off"
    )
    _tell_reasons(summary, REASONS)
    _tell_means(summary, ("original", "rewrite"))
    if summary.truncated > answers // 4:
        note(
            "many solutions were cut off at --max-tokens; a larger number may give more pairs (-n)"
        )
    _tell_rest(summary, files, wanted)


def _tell_samples(summary: "SampleSummary", files: "Files", wanted: int | None) -> None:
    from ..extraction.sample_pairs import REASONS

    note(
        f"{count(summary.problems, 'problem')}, {count(summary.samples, 'sample')}: {summary.correct} "
        f"correct, {summary.truncated} cut off; {summary.solved} problems solved, {_accepted(summary.accepted, wanted)} pairs"
    )
    _tell_reasons(summary, REASONS)
    _tell_means(summary, ("longest", "shortest"))
    if summary.truncated > summary.samples // 4:
        note("many samples were cut off at --max-tokens; a larger number may give more pairs (-n)")
    note(f"the shortest correct sample of every solved problem: {files.solutions}")
    _tell_rest(summary, files, wanted)


def _accepted(number: int, wanted: int | None) -> str:
    """Return ``50 of 50``, or the number alone where none was asked for. A batch may hold more than are kept."""
    return f"{min(number, wanted)} of {wanted}" if wanted else f"{number}"


def _tell_reasons(summary: "Summary | SampleSummary", reasons: "Mapping[str, str]") -> None:
    for reason, meaning in reasons.items():
        if number := summary.rejected.get(reason):
            note(f"  {number} {reason}: {meaning}")


def _tell_means(summary: "Summary | SampleSummary", names: tuple[str, str]) -> None:
    if not summary.accepted:
        return
    rows = [["  mean of the accepted", "steps", "tokens", "density", "NLL"]]
    for name, means in zip(names, (summary.before, summary.after), strict=True):
        digits = {"steps": 1, "tokens": 1, "density": 1, "nll": 3}
        cells = (f"{means[k]:.{d}f}" if means[k] is not None else "-" for k, d in digits.items())
        rows.append([f"  {name}", *cells])
    for line in aligned(rows):
        note(line)


def _tell_rest(summary: "Summary | SampleSummary", files: "Files", wanted: int | None) -> None:
    if summary.rejected:
        note(f"rejected pairs with all figures: {files.rejected}")
    if wanted and summary.accepted < wanted:
        note(f"only {summary.accepted} of {wanted} pairs: the problems are used up.")
