"""Calibrating and generating for the best settings, against generating for a grid of settings."""

import random
import time

from script import main

from mlx_densesteer.bench.figures import Figure, Measurement, Tell, quiet
from mlx_densesteer.bench.subject import Subject
from mlx_densesteer.demo.problems import calibration, draw_solution, held_out
from mlx_densesteer.evaluation.sweep import settings_of
from mlx_densesteer.extraction.calibrate import calibrate
from mlx_densesteer.extraction.pairs import Pair
from mlx_densesteer.extraction.rewriting.rules import merge_steps
from mlx_densesteer.generation.answer import split_steps
from mlx_densesteer.generation.batch import generate_batch
from mlx_densesteer.steering.steering import Steering

DOSES = ("10%", "20%", "40%")
DRAWS = 8  # solutions of a problem that a pair is chosen from
TARGETS = (0.05, 0.1, 0.2)


def run(
    subject: Subject,
    *,
    pairs: int = 16,
    problems: int = 20,
    layers: int = 5,
    best: int = 3,
    max_tokens: int = 200,
    rows: int = 16,
    tell: Tell = quiet,
) -> Measurement:
    """Choose a setting in two ways, greedily, with a random vector, once each.

    The grid: every problem under layers times three doses, as in `densesteer sweep -l LAYERS -s LIST`.
    The calibration: three KLs for the same layers, then every problem under the best settings only, as in
    `densesteer sweep --pairs FILE --best N`. The unsteered answers, which both need, are left out. A
    sweep that can tell takes hundreds of problems: the grid's seconds grow with them, the calibration's do
    not, and `details` has the seconds of each part.

    Args:
        pairs: contrastive pairs, drawn from the demo's problems.
        problems: how many of the demo's problems are answered.
        layers: how many layers around the middle are tried.
        best: settings that are generated for after the calibration.
        max_tokens: tokens of an answer at most.
        rows: responses that are generated together at most.
    """
    model, depth = subject.model, subject.model.layer_count
    tried = sorted({depth * (k + 1) // (layers + 1) for k in range(layers)})
    made = drawn_pairs(pairs)
    prompts = [problem.question for problem in held_out(problems)]
    grid = [one.steering for one in settings_of(model, subject.vector, tried, DOSES)[1:]]

    def answer(steerings: list[Steering]) -> float:
        began = time.perf_counter()
        answers = generate_batch(
            model,
            prompts * len(steerings),
            steering=[how for how in steerings for _ in prompts],
            raw=not model.tokenizer.has_chat_template,
            max_tokens=max_tokens,
            rows=rows,
        )
        for number, _ in enumerate(answers):
            tell(f"{number + 1} of {len(prompts) * len(steerings)} answers")
        return time.perf_counter() - began

    began = time.perf_counter()
    found = calibrate(
        model,
        subject.vector,
        made,
        layers=tried,
        kl=TARGETS,
        progress=lambda what, done, total: tell(f"{what}: {done} of {total}"),
    )
    calibrating = time.perf_counter() - began
    chosen = [Steering(subject.vector, row.strength, row.layers) for row in found.best(best)]
    few, all_of_them = answer(chosen), answer(grid)
    remark = f"{len(grid)} settings against {len(chosen)}, {problems} problems of {max_tokens} tokens at most"
    seconds = {"calibrating": calibrating, "best": few, "grid": all_of_them}
    table = [
        Figure(
            "calibrate_speedup",
            "seconds, grid / calibration and best",
            all_of_them / (calibrating + few),
            remark=remark,
        ),
        Figure(
            "calibrate_problems",
            "problems of the grid in the time of the calibration",
            calibrating / all_of_them * problems,
            remark=f"{len(found.rows)} settings calibrated with {pairs} pairs",
        ),
    ]
    return Measurement(table, {"seconds": seconds, "unreached": list(found.unreached)})


def drawn_pairs(count: int) -> list[Pair]:
    """Return pairs of the demo's problems: the solution with the most steps of a few, and its steps merged."""
    pairs = []
    for problem in calibration(count):
        solutions = [draw_solution(problem, random.Random(seed)) for seed in range(DRAWS)]
        sparse = max(solutions, key=lambda text: len(split_steps(text)))
        pairs.append(Pair(problem.question, merge_steps(sparse), sparse))
    return pairs


if __name__ == "__main__":
    main(run)
