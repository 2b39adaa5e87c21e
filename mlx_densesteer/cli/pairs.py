"""``densesteer pairs``."""

import json
import os
from pathlib import Path
from typing import TYPE_CHECKING

import click

from ..text import Live, aligned, count, note
from . import completers
from .options import json_option, model_option, run_options, task_options
from .run import load_problems, resumable

if TYPE_CHECKING:
    from collections.abc import Callable

    from ..extraction.make_pairs import Files, PairsProgress, Summary
    from ..extraction.rewriting import Rewriter
    from ..model.model import Model


@click.command()
@model_option()
@task_options
@run_options
@click.option(
    "-o",
    "--out",
    required=True,
    type=click.Path(dir_okay=False),
    metavar="FILE.jsonl",
    help="File of the pairs. The rejected pairs and the journals are written beside it.",
)
@click.option(
    "--rewriter",
    "spec",
    default="rules",
    show_default=True,
    metavar="REWRITER",
    help="rules; mlx:MODEL, a folder, Hub id or demo; openai:URL#MODEL, an OpenAI-compatible "
    "endpoint, its key in OPENAI_API_KEY; or file:FILE.jsonl.",
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
    spec: str,
    wanted: int | None,
    nll_margin: float | None,
    timeout: float,
    attempts: int,
    at_once: int,
    requests_per_minute: float,
    rewriter_fields: str | None,
    as_json: bool,
    problems: str,
) -> None:
    """Make contrastive pairs: solve problems, make the solutions denser, check both.

    PROBLEMS is gsm8k, math500, amc23, aime24, olympiad (from the Hub), demo (embedded), or a local
    JSONL file with the fields of one of these. Take no problem that you will evaluate on: without
    --split, gsm8k and demo are taken from their split train. The same command continues a run that was
    interrupted.
    """
    kind, _, rest = spec.partition(":")
    if kind not in ("rules", "mlx", "openai", "file") or (kind == "rules") == bool(rest):
        raise click.UsageError(
            f"--rewriter {spec}: expected rules, mlx:MODEL, openai:URL#MODEL or file:FILE.jsonl."
        )
    rewriter: Rewriter | None = None
    if kind == "openai":
        from ..extraction.rewriting.openai import KEY, OpenAIRewriter

        rewriter = OpenAIRewriter(
            rest,
            key=os.environ.get(KEY),
            fields=_read_fields(rewriter_fields),
            warn=note,
            timeout=timeout,
            attempts=attempts,
            at_once=at_once,
            per_minute=requests_per_minute,
        )
    elif kind == "file":
        from ..extraction.rewriting.file import FileRewriter

        rewriter = FileRewriter(rest)
    elif kind == "rules":
        from ..extraction.rewriting.rules import RulesRewriter

        rewriter = RulesRewriter()

    from ..evaluation.contamination import warn_of_test_problems
    from ..extraction.make_pairs import Files

    files = Files(Path(out))
    files.check()
    chosen, _ = load_problems(
        problems, split=split, skip=skip, limit=limit, revision=revision, calibration=True
    )
    if warning := warn_of_test_problems(problem.question for problem in chosen):
        note(warning)

    from ..extraction.make_pairs import make_pairs
    from ..extraction.verification import NLL_MARGIN
    from ..model.model import load

    loaded = load(model)
    if rewriter is None:
        rewriter = _local(rest, model, loaded, rows)
    with resumable(files.solved, files.rewrites) as live:
        summary = make_pairs(
            loaded,
            chosen,
            rewriter,
            out,
            count=wanted,
            nll_margin=NLL_MARGIN if nll_margin is None else nll_margin,
            system=system,
            max_tokens=max_tokens,
            rows=rows,
            progress=_progress(live, wanted),
        )
    _tell(summary, files, wanted)
    if as_json:
        document = {
            "pairs": str(files.pairs),
            "rejected_pairs": str(files.rejected),
            "rewriter": rewriter.name,
            **summary.describe(),
        }
        click.echo(json.dumps(document, ensure_ascii=False, allow_nan=False))
    else:
        click.echo(files.pairs)
    if not summary.accepted:
        raise click.ClickException(
            f"no pair was accepted; every solution is in {files.solved}, every rejection and its "
            f"reasons in {files.rejected}."
        )


def _read_fields(text: str | None) -> dict[str, object]:
    from ..files import parse_object

    return parse_object(text or "{}", "--rewriter-fields", error=click.UsageError, remedy="")


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
        goal = f" of {wanted}" if wanted else ""
        live.show(
            f"{state.solved}/{state.problems} solved, {state.correct} right; "
            f"{state.rewritten} rewritten, {state.checked} checked, {state.accepted}{goal} accepted{rate}"
        )

    return show


def _tell(summary: "Summary", files: "Files", wanted: int | None) -> None:
    from ..extraction.verification import REASONS

    note(
        f"{count(summary.problems, 'problem')}: {summary.accepted} accepted, "
        f"{sum(summary.rejected.values())} rejected, {summary.wrong} solved wrongly, "
        f"{summary.truncated} cut off"
    )
    for reason in REASONS:
        if number := summary.rejected.get(reason):
            note(f"  {number} {reason}: {REASONS[reason]}")
    if summary.accepted:
        rows = [["  mean of the accepted", "steps", "tokens", "density", "NLL"]]
        for name, means in (("original", summary.before), ("rewrite", summary.after)):
            digits = {"steps": 1, "tokens": 1, "density": 1, "nll": 3}
            cells = (
                f"{means[k]:.{d}f}" if means[k] is not None else "-" for k, d in digits.items()
            )
            rows.append([f"  {name}", *cells])
        for line in aligned(rows):
            note(line)
    if summary.truncated > summary.problems // 4:
        note(
            "many solutions were cut off at --max-tokens; a larger number may give more pairs (-n)"
        )
    if summary.rejected:
        note(f"rejected pairs with all figures: {files.rejected}")
    if wanted and summary.accepted < wanted:
        note(f"only {summary.accepted} of {wanted} pairs: the problems are used up.")
