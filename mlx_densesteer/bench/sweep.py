"""A grid of settings in shared batches against separate runs, and against processes."""

import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from ..evaluation.answers import Answer, answer
from ..evaluation.sweep import Setting, settings_of
from ..evaluation.tasks import Problem, load_task
from .report import Row, ratio
from .subject import Subject
from .timing import Tell, alternate, over, quiet, spread, timed

FIGURES = ("sweep_speedup_vs_separate", "sweep_speedup_vs_processes")
SUITE = {"max_tokens": 16, "rounds": 3, "seconds": 15.0}
QUICK = {"settings": 4, "max_tokens": 12, "rounds": 1}
DOSES = (-0.2, 0.1, 0.2, 0.3)


def run(
    subject: Subject,
    *,
    task: str = "demo",
    problems: int = 2,
    settings: int = 12,
    max_tokens: int = 48,
    rows: int = 64,
    processes: bool = True,
    rounds: int = 2,
    seconds: float = 0.0,
    tell: Tell = quiet,
) -> dict[str, object]:
    """Answer the same problems under the same settings three ways, greedily, in turn.

    The grid: all settings of all problems are rows of shared batches (`densesteer sweep`).
    Separate: one setting after the other in one process, its problems in one batch. Processes: one
    process for each setting, as the reference does with lm-eval, each loading the model. A speed-up
    is the other way's seconds over the grid's. With more problems a separate run fills its batch
    too, and the grid gains less: vary ``problems``. The answers of grid and separate runs are
    compared.

    Args:
        task: problems to answer; as for `densesteer eval`.
        problems: how many.
        settings: how many, of three layers times four doses.
        max_tokens: tokens of an answer at most.
        rows: responses that are generated together at most.
        processes: also run the processes.
        rounds: runs of each way.
        seconds: then no new round is begun; 0 is no limit.
    """
    chosen = load_task(task, limit=problems)
    grid = _settings(subject)[:settings]
    limits = {"max_tokens": max_tokens, "rows": rows}
    answers: dict[str, list[Answer]] = {}

    def together() -> None:
        answers["grid"] = _answer(subject, chosen, grid, limits)

    def separate() -> None:
        answers["separate"] = [a for one in grid for a in _answer(subject, chosen, [one], limits)]

    _answer(subject, chosen[:1], grid[:1], {"max_tokens": 4, "rows": rows})  # warm up
    with tempfile.TemporaryDirectory() as folder:
        file = subject.vector.save(Path(folder) / "random.npz")
        common = ["-m", subject.name, task, "-v", str(file), "--limit", str(problems),
                  "-n", str(max_tokens), "--rows", str(rows)]  # fmt: skip
        ways = [together, separate]
        if processes:
            ways.append(lambda: _processes(grid, common, folder, tell))
        taken = alternate(
            [lambda way=way: timed(way) for way in ways], rounds=rounds, seconds=seconds, tell=tell
        )
    speedups = [spread(over(other, taken[0])) for other in taken[1:]]
    solo = {(one.problem, one.steering): one.token_ids for one in answers["separate"]}
    equal = [one.token_ids == solo[one.problem, one.steering] for one in answers["grid"]]
    return {
        "sweep_speedup_vs_separate": speedups[0]["median"],
        "sweep_speedup_vs_processes": speedups[1]["median"] if processes else None,
        "details": {
            "speedups": speedups,
            "seconds": dict(zip(("grid", "separate", "processes"), taken, strict=False)),
            "task": task,
            "settings": len(grid),
            "problems": len(chosen),
            "max_tokens": max_tokens,
            "tokens": sum(one.tokens for one in answers["grid"]),
            "equal_answers": sum(equal),
            "answers": len(equal),
        },
    }


def rows(result: dict) -> list[Row]:
    """Return the table's rows."""
    d = result["details"]
    what = f"{d['settings']} settings, {d['problems']} problems of {d['max_tokens']} tokens at most"
    same = f"{d['equal_answers']} of {d['answers']} answers equal"
    labels = ("separate runs / grid", "one process each / grid")
    return [
        ratio(f"sweep, seconds: {label}", of, remark=f"{what}; {same}")
        for label, of in zip(labels, d["speedups"], strict=False)
    ]


def _settings(subject: Subject) -> list[Setting]:
    count = subject.layer_count
    layers = sorted({count // 3, count // 2, 2 * count // 3})
    grid = settings_of(
        subject.vector, layers, DOSES, residual_norms=subject.norms, relative=True
    )  # fmt: skip
    return [one for one in grid if one.steering]


def _answer(
    subject: Subject,
    problems: Sequence[Problem],
    settings: Sequence[Setting],
    limits: dict[str, int],
) -> list[Answer]:
    how = [setting.steering for setting in settings]
    return answer(subject.model, subject.tokenizer, problems, how, with_nll=False, **limits)


def _processes(settings: Sequence[Setting], common: list[str], folder: str, tell: Tell) -> None:
    """Call `densesteer eval` once for each setting, with nothing kept in between."""
    for number, setting in enumerate(settings):
        tell(f"process {number + 1} of {len(settings)}")
        with tempfile.TemporaryDirectory(dir=folder) as place:
            command = [
                sys.executable, "-m", "mlx_densesteer", "eval", *common, "-l", str(setting.layer),
                "-s", repr(setting.strength), "--no-nll", "--no-baseline",
                "-o", f"{place}/answers.jsonl",
            ]  # fmt: skip
            subprocess.run(command, check=True, capture_output=True, text=True)
