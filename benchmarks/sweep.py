"""A grid of 12 settings in shared batches against 12 separate runs, and against 12 processes.

    python benchmarks/sweep.py MODEL [--problems 2] [--max-tokens 48] [--rounds 2] [--json]

Three ways to the same answers, greedy, on the same problems:
  grid       all settings of all problems are rows of shared batches (`densesteer sweep`)
  separate   one setting after the other in one process, its problems in one batch
  processes  one process for each setting, as the reference does with lm-eval: the model is
             loaded every time, the problems of a setting share a batch
A round runs each way once, in turn; a way's figure is its median. With more problems a
separate run fills its batch too, and the grid gains less: vary --problems. The answers of the
grid and of the separate runs are compared.
"""

import argparse
import datetime
import json
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import mlx.core as mx
import mlx_lm
import numpy as np

from mlx_densesteer import SteeringVector, VectorMeta, load
from mlx_densesteer.answering import answer
from mlx_densesteer.dose import mean_norms
from mlx_densesteer.grid import Setting, settings_of
from mlx_densesteer.tasks import load_task

DOSES = (-0.2, 0.1, 0.2, 0.3)


def random_vector(model) -> SteeringVector:
    """Return random unit vectors: their effect on speed is that of any others."""
    width, count = model.args.hidden_size, model.args.num_hidden_layers
    rng = np.random.default_rng(0)
    arrays = {i: rng.normal(size=width) / width**0.5 for i in range(count)}
    meta = VectorMeta(model="random", hidden_size=width, layer_count=count)
    return SteeringVector(arrays, meta)


def run_grid(loaded, problems, settings: list[Setting], options) -> list:
    return answer(
        *loaded, problems, [setting.steering for setting in settings],
        max_tokens=options.max_tokens, rows=options.rows, with_nll=False,
    )  # fmt: skip


def run_separate(loaded, problems, settings: list[Setting], options) -> list:
    return [one for s in settings for one in run_grid(loaded, problems, [s], options)]


def run_processes(file: Path, settings: list[Setting], options) -> None:
    """Call `densesteer eval` once for each setting, with nothing kept in between."""
    for setting in settings:
        with tempfile.TemporaryDirectory() as folder:
            command = [
                sys.executable, "-m", "mlx_densesteer", "eval", "-m", options.model, options.task,
                "-v", str(file), "-l", str(setting.layer), "-s", repr(setting.strength),
                "-n", str(options.max_tokens), "--rows", str(options.rows), "--no-nll",
                "--limit", str(options.problems), "--no-baseline", "-o", f"{folder}/answers.jsonl",
            ]  # fmt: skip
            subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("--task", default="demo")
    parser.add_argument("--problems", type=int, default=2)
    parser.add_argument("--max-tokens", type=int, default=48)
    parser.add_argument("--rows", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--no-processes", action="store_true")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    loaded = load(options.model)
    problems = load_task(options.task, limit=options.problems)
    vector, count = random_vector(loaded[0]), loaded[0].args.num_hidden_layers
    layers = sorted({count // 3, count // 2, 2 * count // 3})
    norms = mean_norms(*loaded, vector, layers)
    settings = [s for s in settings_of(vector, layers, DOSES, residual_norms=norms, relative=True)
                if s.steering]  # fmt: skip
    run_grid(loaded, problems[:1], settings[:1], options)  # warm up
    seconds: dict[str, list[float]] = {"grid": [], "separate": [], "processes": []}
    with tempfile.TemporaryDirectory() as folder:
        file = vector.save(Path(folder) / "random.npz")
        for number in range(options.rounds):
            for way in sorted(seconds, reverse=bool(number % 2)):
                if way == "processes" and options.no_processes:
                    continue
                began = time.perf_counter()
                if way == "grid":
                    together = run_grid(loaded, problems, settings, options)
                elif way == "separate":
                    apart = run_separate(loaded, problems, settings, options)
                else:
                    run_processes(file, settings, options)
                seconds[way].append(time.perf_counter() - began)
                print(f"{way}: {seconds[way][-1]:.1f} s", file=sys.stderr)
    middle = {way: statistics.median(all_) for way, all_ in seconds.items() if all_}
    solo = {(one.problem, one.steering): one.token_ids for one in apart}
    result = {
        "sweep_speedup_vs_separate": middle["separate"] / middle["grid"],
        "sweep_speedup_vs_processes": middle["processes"] / middle["grid"]
        if "processes" in middle else None,
        "seconds": seconds,
        "settings": len(settings),
        "problems": len(problems),
        "tokens": sum(one.tokens for one in together),
        "equal_answers": sum(
            one.token_ids == solo[one.problem, one.steering] for one in together
        ),
        "answers": len(together),
        "dtype": str(loaded[0].model.norm.weight.dtype),
        "device": str(mx.default_device()),
        "machine": f"{platform.system()} {platform.machine()}",
        "versions": {"mlx": mx.__version__, "mlx-lm": mlx_lm.__version__},
        "date": datetime.date.today().isoformat(),
        "command": " ".join(["benchmarks/sweep.py", *sys.argv[1:]]),
    }  # fmt: skip
    if options.json:
        print(json.dumps(result))
        return
    for key, value in result.items():
        print(f"{key:<28}{value}")


if __name__ == "__main__":
    main()
