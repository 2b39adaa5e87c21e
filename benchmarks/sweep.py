"""A grid of settings in shared batches against separate runs, and against processes."""

import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from script import main

from mlx_densesteer.bench.figures import Figure, Measurement, Tell, alternate, quiet, ratio, timed
from mlx_densesteer.bench.subject import Subject
from mlx_densesteer.demo.problems import held_out
from mlx_densesteer.generation.batch import generate_batch
from mlx_densesteer.steering.request import resolve
from mlx_densesteer.steering.steering import Steering

DOSES = ("-20%", "10%", "20%", "30%")


def run(
    subject: Subject,
    *,
    problems: int = 2,
    settings: int = 12,
    max_tokens: int = 48,
    rows: int = 64,
    processes: bool = True,
    rounds: int = 2,
    seconds: float = 0.0,
    tell: Tell = quiet,
) -> Measurement:
    """Answer the same problems under the same settings three ways, greedily, in turn.

    The grid: all settings of all problems are rows of shared batches, as in `densesteer sweep`.
    Separate: one setting after the other in one process, its problems in one batch. Processes: one
    `densesteer eval` for each setting, as the reference does with lm-eval, each loading the model.
    A speed-up is the other way's seconds over the grid's. With more problems a separate run fills
    its batch too, and the grid gains less. The answers of grid and separate runs are compared.

    Args:
        problems: how many of the demo's problems.
        settings: how many, of three layers times four doses.
        max_tokens: tokens of an answer at most.
        rows: responses that are generated together at most.
        processes: also run the processes.
        rounds: runs of each way.
        seconds: after which no new round begins; 0 is no limit.
    """
    model, count = subject.model, subject.model.layer_count
    layers = sorted({count // 3, count // 2, 2 * count // 3})
    grid = [resolve(model, subject.vector, dose, [layer]) for layer in layers for dose in DOSES]
    grid = grid[:settings]
    prompts = [problem.question for problem in held_out(problems)]
    answers: dict[str, list[tuple[int, ...]]] = {}

    def answer(steerings: Sequence[Steering]) -> list[tuple[int, ...]]:
        """Return the token ids of every problem under every steering, in that order."""
        found = generate_batch(
            model,
            prompts * len(steerings),
            steering=[how for how in steerings for _ in prompts],
            raw=not model.tokenizer.has_chat_template,
            max_tokens=max_tokens,
            rows=rows,
        )
        return [one.token_ids for _, one in sorted(found, key=lambda item: item[0])]

    def together() -> None:
        answers["grid"] = answer(grid)

    def separate() -> None:
        answers["separate"] = [tokens for how in grid for tokens in answer([how])]

    answer(grid[:1])  # warm up
    with tempfile.TemporaryDirectory() as folder:
        file = subject.vector.save(Path(folder) / "random.npz")
        common = ["-m", subject.name, "demo", "-v", str(file), "--limit", str(problems)]
        common += ["-n", str(max_tokens), "--rows", str(rows), "--no-nll", "--no-unsteered"]
        ways = [together, separate]
        if processes:
            ways.append(lambda: _evaluate(grid, common, tell))
        works = [lambda way=way: timed(way) for way in ways]
        taken = alternate(works, rounds=rounds, seconds=seconds, tell=tell)
    equal = sum(a == b for a, b in zip(answers["grid"], answers["separate"], strict=True))
    remark = f"{len(grid)} settings, {problems} problems of {max_tokens} tokens at most"
    same = f"{remark}; {equal} of {len(answers['grid'])} answers equal"
    table = [
        Figure.of(
            "sweep_speedup_vs_separate",
            "seconds, separate runs / grid",
            ratio(taken[1], taken[0]),
            remark=same,
        )
    ]
    if processes:
        table.append(
            Figure.of(
                "sweep_speedup_vs_processes",
                "seconds, one process each / grid",
                ratio(taken[2], taken[0]),
                remark=remark,
            )
        )
    return Measurement(table, {"equal_answers": equal, "answers": len(answers["grid"])})


def _evaluate(grid: Sequence[Steering], common: list[str], tell: Tell) -> None:
    """Call `densesteer eval` once for each setting, with nothing kept in between."""
    for number, how in enumerate(grid):
        tell(f"process {number + 1} of {len(grid)}")
        with tempfile.TemporaryDirectory() as place:
            command = [sys.executable, "-m", "mlx_densesteer", "eval", *common]
            command += ["-l", str(how.layers[0]), "-s", repr(how.strength)]
            command += ["-o", f"{place}/answers.jsonl"]
            subprocess.run(command, check=True, capture_output=True, text=True)


if __name__ == "__main__":
    main(run)
