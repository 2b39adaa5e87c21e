"""The script that trains the embedded model, on a smaller one: interrupted, it goes on."""

import json
import random
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner
from tokenizers import Tokenizer

from mlx_densesteer import demo
from mlx_densesteer.demo.problems import held_out

STEPS = 4, 4
SAVE_EVERY = 3


class Killed(BaseException):
    """Nothing of the script runs any more, as after kill -9."""


@pytest.fixture
def training(monkeypatch):
    monkeypatch.syspath_prepend(str(Path(__file__).parents[1] / "scripts"))
    import train_demo_model as module

    small = {"hidden_size": 32, "num_hidden_layers": 2, "intermediate_size": 64,
             "num_attention_heads": 2}  # fmt: skip
    monkeypatch.setattr(module, "CONFIG", module.CONFIG | small)
    monkeypatch.setattr(module, "STAGES", tuple(zip(STEPS, (1.0, 0.5), strict=True)))
    monkeypatch.setattr(module, "BATCH", 2)
    monkeypatch.setattr(module, "BLOCK", 1)
    monkeypatch.setattr(module, "SAVE_EVERY", SAVE_EVERY)
    monkeypatch.setattr(module, "make_tokenizer", lambda seed: shipped_tokenizer())
    yield module
    sys.modules.pop("train_demo_model")


def shipped_tokenizer():
    return Tokenizer.from_file(str(demo.MODEL / "tokenizer.json"))


@pytest.fixture
def run(training, monkeypatch):
    """Return a function that runs the command, up to step ``stop``; it returns the steps begun."""
    draw = training.draw_batches

    def run(out, stop=None, how=Killed):
        begun = []

        def draw_or_stop(tokenizer, seed, block, *rest):
            if block == stop:
                raise how
            begun.append(block)
            return draw(tokenizer, seed, block, *rest)

        monkeypatch.setattr(training, "draw_batches", draw_or_stop)
        if stop is not None and how is Killed:
            with pytest.raises(Killed):
                CliRunner().invoke(training.main, ["--out", str(out)])
            return begun, None
        return begun, CliRunner().invoke(training.main, ["--out", str(out)])

    return run


def weights(folder):
    return (folder / "model.safetensors").read_bytes()


@pytest.mark.parametrize(
    ("stop", "kept"), [(2, 0), (3, 3), (4, 4), (5, 4), (6, 4), (7, 7)],
    ids=["early in stage 1", "late in it", "first of stage 2", "early in it", "later", "late"],
)  # fmt: skip
def test_killed_the_same_command_goes_on_and_makes_the_same_model(run, tmp_path, stop, kept):
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    begun, _ = run(whole)
    assert begun == list(range(8))
    begun, _ = run(cut, stop)
    assert begun == list(range(stop))
    assert not cut.exists()  # a half-trained model takes no other's place
    begun, result = run(cut)
    assert result.exit_code == 0
    assert begun == list(range(kept, 8))
    assert weights(cut) == weights(whole)
    assert json.loads((cut / "densesteer.json").read_text("utf-8"))["steps"] == 8
    assert sorted(path.name for path in tmp_path.iterdir()) == ["cut", "whole"]


def test_ctrl_c_says_how_to_go_on_and_keeps_the_model_that_is_there(run, tmp_path):
    out = tmp_path / "model"
    run(out)
    before = weights(out)
    _, result = run(out, 6, KeyboardInterrupt)
    assert result.exit_code == 130
    assert "interrupted; the same command goes on" in result.stderr
    assert weights(out) == before
    begun, result = run(out)
    assert begun == [4, 5, 6, 7]
    assert "going on with stage 2" not in result.stderr  # it had no state yet
    assert "going on with stage 1 after step 4" in result.stderr


def test_the_tokenizer_comes_out_again_and_sees_no_reserved_question(monkeypatch):
    monkeypatch.syspath_prepend(str(Path(__file__).parents[1] / "scripts"))
    import train_demo_model as module

    assert json.loads(module.make_tokenizer(1).to_str()) == json.loads(
        (demo.MODEL / "tokenizer.json").read_text("utf-8")
    )
    reserved, draw, choose = held_out(500), module.draw_problem, random.Random(0)
    solved = []

    def offer(rng):  # every third draw is one that must be refused
        return choose.choice(reserved) if choose.random() < 1 / 3 else draw(rng)

    def solve(problem, rng):
        solved.append(problem.question)
        return "text"

    monkeypatch.setattr(module, "draw_problem", offer)
    monkeypatch.setattr(module, "draw_solution", solve)
    module.make_tokenizer(1)
    assert len(solved) == 4000
    assert not {problem.question for problem in reserved} & set(solved)
    sys.modules.pop("train_demo_model")
