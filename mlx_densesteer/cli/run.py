"""Runs over many problems: load the problems, show progress, continue after Ctrl-C."""

import contextlib
import shlex
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from ..text import Live, count, note

if TYPE_CHECKING:
    from ..distributed.ranks import Ranks
    from ..evaluation.answers import Answer, OnAnswers
    from ..evaluation.tasks import Problem
    from ..model.model import Model


def load_problems(
    task: str,
    *,
    split: str | None,
    skip: int,
    limit: int | None,
    revision: str | None,
    calibration: bool = False,
) -> "tuple[list[Problem], dict[str, object]]":
    """Return the problems of a task, and what identifies them in results.

    ``calibration``: gsm8k and demo default to their split train, so that a setting or a vector is not
    judged by the problems that it was made from.
    """
    import hashlib

    from ..evaluation.grading import has_math_verify
    from ..evaluation.tasks import load_task

    if calibration and split is None and task in ("gsm8k", "demo"):
        split = "train"
    problems = load_task(task, split=split, skip=skip, limit=limit, revision=revision)
    if any(problem.rule == "boxed" for problem in problems) and not has_math_verify():
        from ..errors import install_command

        note(
            "boxed answers are graded by the string rule alone; for math-verify, which accepts more "
            f"forms of an answer: {install_command('eval')}"
        )
    ids = "\n".join(f"{p.id} {p.prompt}" for p in problems)
    about = {
        "task": task,
        "split": split,
        "skip": skip,
        "revision": revision,
        "problems": len(problems),
        "problems_sha256": hashlib.sha256(ids.encode()).hexdigest()[:16],
    }
    return problems, about


@contextlib.contextmanager
def resumable(*kept: Path) -> Iterator[Live]:
    """Yield the progress display of a run; on Ctrl-C tell which files hold its work."""
    live = Live()
    try:
        yield live
    except KeyboardInterrupt:
        live.clear()
        files = " and ".join(map(str, kept))
        note(f"interrupted; what is done is in {files}. The same command goes on from there.")
        raise
    finally:
        live.clear()


@contextlib.contextmanager
def journalled(
    path: Path,
    model: "Model",
    ranks: "Ranks",
    expected: int,
    *,
    system: str | None,
    max_tokens: int,
    rows: int,
    with_nll: bool,
    think_limit: int | None = None,
    table: "Callable[[list[Answer]], Sequence[str]]" = lambda answers: (),
) -> Iterator[dict[str, object]]:
    """Open the journal of a run of ``expected`` answers; yield options for ``evaluate`` or ``sweep``.

    ``table`` makes the lines that are shown above the progress.
    """
    from ..distributed.answers import answer_over_ranks, journal_over_ranks
    from ..evaluation.answers import journal_header

    header = journal_header(model, max_tokens, system, think_limit)
    with journal_over_ranks(path, header, ranks) as journal, resumable(path) as live:
        if there := sum("nll_of" not in record for record in journal.records):
            note(f"{path}: {count(there, 'answer')} there already; the ones that fit are used")
        if ranks.size > 1:
            note(f"split over {ranks.size} ranks; the progress is rank 0's")
        yield {
            "journal": journal,
            "answer": answer_over_ranks(ranks),
            "progress": answers_progress(live, expected, table, with_nll=with_nll),
            "system": system,
            "max_tokens": max_tokens,
            "rows": rows,
            "with_nll": with_nll,
            "think_limit": think_limit,
        }


def answers_progress(
    live: Live,
    expected: int,
    table: "Callable[[list[Answer]], Sequence[str]]" = lambda answers: (),
    *,
    with_nll: bool,
) -> "OnAnswers":
    """Return a function that shows the number of answers and the time that the others will take."""
    began, there = time.monotonic(), []

    def show(answers: "list[Answer]", tokens: int) -> None:
        there or there.append(len(answers))
        if not live.due:
            return
        rate = tokens / (time.monotonic() - began)
        done, right = len(answers), sum(one.correct for one in answers)
        doing = f", {rate:.0f} tokens/s" if tokens else ""
        if done == expected and with_nll:
            doing = ", computing the NLL"
        elif done and tokens:
            # by tokens: all rows of a batch are under way long before the first of them ends
            each = sum(len(one.token_ids) for one in answers) / done
            minutes = ((expected - there[0]) * each - tokens) / rate / 60
            doing += f", about {minutes:.0f} min left" if minutes >= 1 else ""
        live.show(f"{done}/{expected} answers, {right} right{doing}", table(answers))

    return show


def program() -> str:
    """Return how this command can be called from the folder that the user is in."""
    own = Path(sys.executable).with_name("densesteer")
    if not own.exists():
        return f"{shlex.quote(sys.executable)} -m mlx_densesteer"
    found = shutil.which("densesteer")
    if found and own.samefile(found):
        return "densesteer"
    here = Path.cwd()
    if own.is_relative_to(here):
        below = own.relative_to(here)
        own = below if below.parent.parts else f"./{below}"
    return shlex.quote(str(own))
