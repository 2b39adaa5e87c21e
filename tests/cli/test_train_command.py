"""``densesteer train`` as a user calls it, on the embedded demo model."""

import json
import signal
import subprocess
import sys
import time

import pytest
from helpers import ROOT

from mlx_densesteer.errors import DiskError
from mlx_densesteer.steering.vector import SteeringVector

PAIRS = ROOT / "scripts" / "demo-pairs.jsonl"
FAST = ("--epochs", "2", "--batch-tokens", "150", "--rate", "0.02", "-l", "4")


def test_a_vector_is_trained_told_and_used(run, tmp_path):
    done = run("train", "-m", "demo", PAIRS, "-o", "t.npz", *FAST)
    assert done.stdout == "t.npz\n"
    assert "held-out loss" in done.stderr and "whose vector is kept" in done.stderr
    assert "dose of strength 1: " in done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["t.npz"]
    told = run("generate", "-m", "demo", "-v", "t.npz", "Ben has 2 stones.", "-n", "8").stderr
    assert "using t.npz at layer 4" in told and "(strength 1)" in told
    document = json.loads(
        run("train", "-m", "demo", PAIRS, "-o", "t.npz", *FAST, "--force", "--json").stdout
    )
    vector = SteeringVector.load(tmp_path / "t.npz")
    assert document["sha256"] == vector.sha256()
    assert document["held_out"][str(document["step"])] < document["held_out"]["0"]
    assert vector.describe()["training"]["rate"] == 0.02
    shown = run("vector", "show", "t.npz").stdout
    assert "trained: sft" in shown


def test_a_sweep_measures_a_trained_vector_where_it_was_trained(run):
    short = ("--positions", "generated", "--max-dose", "3%")
    run("train", "-m", "demo", PAIRS, "-o", "t.npz", *FAST, *short)
    few = ("--limit", "1", "-n", "8", "--no-nll", "--json")
    swept = ("sweep", "-m", "demo", "demo", "-v", "t.npz", "--strengths=1", *few)
    for number, (given, positions) in enumerate(
        [((), "generated"), (("-l", "4"), "generated"), (("-l", "4", "--positions", "all"), "all")]
    ):
        done = run(*swept, *given, "-o", f"sweep-{number}")
        found = json.loads(done.stdout)
        assert (f"1 problem, positions {positions}; results" in done.stderr) == (positions != "all")
        assert found["positions"] == positions
        assert [row["layers"] for row in found["rows"]] == [None, [4]]
        assert found["rows"][1]["dose"] == pytest.approx(0.03, rel=1e-3)


def test_the_command_and_python_have_the_same_recipe():
    from dataclasses import fields

    from mlx_densesteer.cli.train import POSITIONS, train
    from mlx_densesteer.extraction.train import Recipe

    told = {option.name: option.default for option in train.params}
    told |= {"max_dose": float(told["max_dose"].rstrip("%")) / 100, "positions": POSITIONS}
    recipe = {field.name: field.default for field in fields(Recipe)}
    del recipe["layers"], recipe["recompute"]  # need the model; --more-memory is its opposite
    assert recipe.items() <= told.items()


def test_what_is_refused(run, tmp_path):
    (tmp_path / "there.npz").write_bytes(b"")
    (tmp_path / "one.jsonl").write_text('{"prompt": "a", "response": "b"}\n')
    assert "exists already" in run("train", "-m", "demo", PAIRS, "-o", "there.npz", code=1).stderr
    assert "ends in .npz" in run("train", "-m", "demo", PAIRS, "-o", "x", code=2).stderr
    words = ("train", "-m", "demo", "one.jsonl", "-o", "x.npz")
    assert "positive or" in run(*words, "--loss", "bipo", code=1).stderr
    assert "layers 9: expected some of 0-5" in run(*words, "-l", "9", code=1).stderr
    for dose in ("0.05", "0%", "-5%", "0.1nats"):
        refused = run(*words, f"--max-dose={dose}", code=2).stderr
        assert "expected a dose above 0 in per cent, such as 5%" in refused
    assert not (tmp_path / "x.npz").exists()


def test_a_test_problem_in_the_data_is_told(run, tmp_path):
    question = (
        "Janet\u2019s ducks lay 16 eggs per day. She eats three for breakfast every morning and bakes muffins "
        "for her friends every day with four. She sells the remainder at the farmers' market daily for $2 "
        "per fresh duck egg. How much in dollars does she make every day at the farmers' market?"
    )
    line = json.dumps({"prompt": question, "response": "It is 18."})
    (tmp_path / "test.jsonl").write_text(line)
    words = ("train", "-m", "demo", "test.jsonl", "-o", "x.npz", "-l", "9")
    assert "1 of gsm8k" in run(*words, code=1).stderr


def test_answers_of_another_model_are_told(run, tmp_path):
    lines = [json.loads(line) for line in PAIRS.read_text().splitlines()[:3]]
    for line in lines[1:]:
        line["model"] = {"name": "elsewhere/other", "fingerprint": "0123456789abcdef"}
    (tmp_path / "p.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    said = "p.jsonl has answers of another model (2 lines of elsewhere/other)"
    words = ("-m", "demo", "p.jsonl", "-o")
    assert said in run("train", *words, "t.npz", *FAST).stderr
    assert said in run("extract", *words, "e.npz").stderr
    assert said in run("calibrate", "-m", "demo", "-v", "e.npz", "p.jsonl", "-l", "4").stderr
    words = (
        "-m",
        "demo",
        "-v",
        "e.npz",
        "--pairs",
        "p.jsonl",
        "-l",
        "4",
        "--limit",
        "1",
        "-n",
        "4",
    )
    assert said in run("sweep", *words, "demo").stderr
    assert "another model" not in run("train", "-m", "demo", PAIRS, "-o", "p.npz", *FAST).stderr


def test_a_vector_that_cannot_be_saved_does_not_lose_the_training(run, tmp_path, monkeypatch):
    words = ("train", "-m", "demo", PAIRS, "-o", "t.npz", *FAST)

    def full(self, path):
        raise DiskError(f"{path}: no space left")

    with monkeypatch.context() as patch:
        patch.setattr(SteeringVector, "save", full)
        failed = run(*words, code=1).stderr
    assert "no space left" in failed and "t.npz.training. The same command goes on" in failed
    with monkeypatch.context() as patch:
        patch.setattr("mlx_densesteer.extraction.train.Adam.apply_gradients", None)  # no step more
        assert run(*words).stdout == "t.npz\n"
    assert [path.name for path in tmp_path.iterdir()] == ["t.npz"]


@pytest.mark.slow
def test_ctrl_c_keeps_the_work(run, tmp_path):
    words = [
        "train",
        "-m",
        "demo",
        str(PAIRS),
        "-o",
        "t.npz",
        *FAST,
        "--epochs",
        "4000",
        "--rate",
        "1e-5",
    ]
    process = subprocess.Popen(
        [sys.executable, "-m", "mlx_densesteer", *words],
        cwd=tmp_path,
        stderr=subprocess.PIPE,
        text=True,
    )
    state = tmp_path / "t.npz.training"
    until = time.monotonic() + 120
    while not state.exists() and process.poll() is None and time.monotonic() < until:
        time.sleep(0.2)  # it is written every ten seconds
    process.send_signal(signal.SIGINT)
    said = process.communicate(timeout=60)[1]
    assert process.returncode == 130, said
    assert "t.npz.training. The same command goes on from there." in said
    assert not (tmp_path / "t.npz").exists()
    refused = run(*words, "--seed", "1", code=1).stderr
    assert "belongs to another training" in refused
    assert state.exists()
