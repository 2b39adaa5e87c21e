"""The embedded demo: real, honest, and its effect where it is a plateau."""

import hashlib
import json
import random
import re
import sys

import numpy as np
import pytest
from click.testing import CliRunner
from helpers import ROOT

import mlx_densesteer as ds
from mlx_densesteer import demo
from mlx_densesteer.cli import main
from mlx_densesteer.demo import DOSES
from mlx_densesteer.demo import problems as stories
from mlx_densesteer.evaluation.answers import answer, by_steering
from mlx_densesteer.evaluation.scoring import score
from mlx_densesteer.evaluation.sweep import settings_of
from mlx_densesteer.evaluation.tasks import load_task
from mlx_densesteer.generation.answer import split_steps
from mlx_densesteer.steering.request import Amount, request

(LAYER,) = request(ds.SteeringVector.load("demo")).layers


@pytest.fixture(scope="module")
def vector():
    return ds.SteeringVector.load(demo.VECTOR)


def test_it_fits_into_the_wheel():
    files = [demo.VECTOR, *demo.MODEL.iterdir()]
    assert sum(file.stat().st_size for file in files) <= 10_000_000


def test_problems_are_the_same_everywhere_and_solved_by_their_clauses():
    texts = [p.question for p in (*stories.held_out(500), *stories.calibration(500))]
    assert len(set(texts)) == 1000
    assert hashlib.sha256("\n".join(texts).encode()).hexdigest()[:16] == "3022cbae8804792d"
    for problem in stories.held_out(500):
        assert 2 <= len(problem.clauses) <= 6
        numbers = [int(n) for n in re.findall(r"\d+", problem.question)]
        value = numbers[0]
        for clause in problem.clauses:
            first, sign, second, result = re.fullmatch(
                r"(\d+)([-+*/])(\d+)=(\d+)", clause.sum
            ).groups()
            a, b = int(first), int(second)
            assert {"+": a + b, "-": a - b, "*": a * b, "/": a // b}[sign] == int(result)
            assert a == value
            value = int(result)
        assert value == problem.answer and 1 <= value <= stories.LARGEST


def test_styles_differ_in_grouping_alone():
    problem = max(stories.held_out(20), key=lambda p: len(p.clauses))
    seen = set()
    for seed in range(200):
        text = stories.draw_solution(problem, random.Random(seed))
        assert text.endswith(f"#### {problem.answer}")
        assert re.findall(r"\d+[-+*/]\d+=\d+", text) == [c.sum for c in problem.clauses]
        seen.add(len(split_steps(text)))
    assert {1, len(problem.clauses)} < seen
    assert max(seen) > 2 * len(problem.clauses) and len(seen) >= 8  # and much in between


def test_no_training_example_holds_an_evaluation_or_calibration_problem(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    import train_demo_model as training
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(demo.MODEL / "tokenizer.json"))
    reserved = stories.reserved_questions()
    hit, original = random.Random(0), training.draw_problem
    wanted = stories.held_out(500)
    offered = []

    def draw(rng):  # every second draw is one that must be refused
        problem = hit.choice(wanted) if len(offered) % 2 == 0 else original(rng)
        offered.append(problem.question)
        return problem

    monkeypatch.setattr(training, "draw_problem", draw)
    for n in range(100):
        ids, trained = training.draw_example(tokenizer, random.Random(n), reserved)
        text = tokenizer.decode(ids, skip_special_tokens=False)
        assert not any(question in text for question in reserved)
        assert len(ids) == len(trained)
    assert sum(question in reserved for question in offered) >= 100
    sys.modules.pop("train_demo_model")


def test_the_vector_is_of_this_model(demo_model, vector):
    assert vector.meta.fingerprint == demo_model.fingerprint
    assert vector.meta.model == "demo"
    assert vector.meta.pair_count == 50
    assert set(vector.residual_norms) == set(vector.layers) == set(range(6))


@pytest.mark.slow
def test_the_vector_comes_out_again_from_the_models_own_solutions(vector, tmp_path):
    runner, pairs = CliRunner(), tmp_path / "pairs.jsonl"
    made = runner.invoke(main, [
        "pairs", "-m", "demo", "demo", "--split", "train", "--rewriter", "rules", "--count", "50",
        "-n", "300", "--rows", "32", "-o", str(pairs),
    ])  # fmt: skip
    assert made.exit_code == 0, made.output
    file = tmp_path / "v.npz"
    made = runner.invoke(
        main, ["extract", "-m", "demo", str(pairs), "--token", "mean-response", "-o", str(file)]
    )
    assert made.exit_code == 0, made.output
    again = ds.SteeringVector.load(file)
    for layer in (4, 5):
        a, b = vector.layers[layer], again.layers[layer]
        assert a @ b > 0.95 * np.linalg.norm(a) * np.linalg.norm(b)


def test_the_effect_on_its_plateaus_with_a_random_direction_as_the_null(demo_model, vector):
    rng = np.random.default_rng(0)
    arrays = {k: rng.normal(size=v.shape) for k, v in vector.layers.items()}
    norms = vector.norms()
    arrays = {k: a * norms[k] / np.linalg.norm(a) for k, a in arrays.items()}
    noise = ds.SteeringVector(arrays, vector.meta, name="random")
    overdose = Amount(DOSES[-1], "dose")
    dense = settings_of(demo_model, vector, [LAYER], ["25%", overdose])
    null = settings_of(demo_model, noise, [LAYER], ["-25%", "25%"])[1:]
    answers = answer(
        demo_model, load_task("demo", limit=20), [s.steering for s in dense + null], rows=64,
        max_tokens=120,
    )  # fmt: skip
    groups = by_steering(answers)
    unsteered, steered, overdose = (score(groups[s.fingerprint]) for s in dense)
    assert unsteered.accuracy.value >= 0.7
    assert steered.steps.value < 0.5 * unsteered.steps.value
    assert steered.density > 2 * unsteered.density
    assert steered.nll.value < 0.5 < 1.0 < overdose.nll.value
    assert overdose.accuracy.value <= 0.15
    for setting in null:
        random_direction = score(groups[setting.fingerprint])
        assert random_direction.steps.value == pytest.approx(unsteered.steps.value, rel=0.1)


def test_the_command_prints_what_it_says():
    rows = json.loads(CliRunner().invoke(main, ["demo", "--problems", "2", "--json"]).stdout)[
        "rows"
    ]
    assert [row["dose"] for row in rows] == list(DOSES)
    for row in rows:
        assert {"dose", "strength", "accuracy", "steps", "tokens", "density", "nll"} <= set(row)
    shown = CliRunner().invoke(main, ["demo", "--problems", "1"]).stdout
    words = " ".join(shown.split())
    assert "This is a toy" in words and "no evidence about Qwen2.5" in words
    assert (
        stories.held_out(1)[0].question in words and "The question is the first problem." in words
    )


def test_other_input_gets_a_word_about_what_the_model_is():
    strange = CliRunner().invoke(main, ["generate", "-m", "demo", "-n", "3", "Who are you?"])
    assert "is a toy" in strange.stderr and strange.exit_code == 0
    known = stories.held_out(1)[0].question
    assert "is a toy" not in CliRunner().invoke(
        main, ["generate", "-m", "demo", "-v", "demo", "-s", "10%", "-n", "3", known]
    ).stderr  # fmt: skip


def test_what_the_page_suggests_is_answered_rightly_steered_or_not(demo_model, vector):
    for problem in stories.held_out(3):  # server/overview.py offers these
        for strength in (0.0, 4.76):
            steering = ds.Steering(vector, strength, (LAYER,))
            text = ds.generate(demo_model, problem.question, steering=steering).text
            assert text.endswith(f"#### {problem.answer}")


def test_the_demo_shows_a_problem_in_which_the_effect_is_seen(monkeypatch):
    monkeypatch.setenv("COLUMNS", "67")
    shown = CliRunner().invoke(main, ["demo", "--problems", "8"]).stdout
    told = re.findall(
        r"^ *(\S+%)  (#+) +(\d+) steps? +(?:no answer|answer \d+), (\w+) \(.*\)$",
        shown,
        re.MULTILINE,
    )
    assert [dose for dose, *_ in told] == ["-30%", "0%", "+10%", "+20%", "+100%"]
    assert all(len(bar) == int(steps) for _, bar, steps, _ in told)
    steps = [int(steps) for _, _, steps, _ in told[:-1]]
    assert steps == sorted(steps, reverse=True) and steps[0] > steps[-1] == 1
    assert [verdict for *_, verdict in told] == ["right"] * 4 + ["wrong"]
    numbered = re.findall(r"^ {6}(\d)  ", shown, re.MULTILINE)  # every step has its number
    assert len(numbered) == sum(int(steps) for _, _, steps, _ in told)
    table, after = shown.index("dose   strength"), shown.index("Try next:")
    assert table < after < shown.index("This is a toy")  # caveats come last
    commands = [line for line in shown.splitlines() if "densesteer " in line]
    assert len(commands) == 4
    assert all(len(line) <= 67 for line in shown.splitlines() if line not in commands)


def test_the_commands_that_the_demo_suggests_can_be_pasted(tmp_path, monkeypatch):
    from mlx_densesteer.cli.run import program as called

    program = tmp_path / "my env" / "bin" / "densesteer"
    program.parent.mkdir(parents=True)
    monkeypatch.setattr("sys.executable", str(program.with_name("python")))
    monkeypatch.setenv("PATH", "/nowhere")
    assert called() == f"'{program.with_name('python')}' -m mlx_densesteer"
    program.touch(0o755)
    assert called() == f"'{program}'"
    monkeypatch.chdir(tmp_path)
    assert called() == "'my env/bin/densesteer'"
    with monkeypatch.context() as there:
        there.chdir(program.parent)
        assert called() == "./densesteer"
    monkeypatch.setenv("PATH", str(program.parent))
    assert called() == "densesteer"
