"""``eval`` and ``sweep`` as a user calls them, on the embedded demo model."""

import json
import shutil
from dataclasses import replace

import pytest
from click.testing import CliRunner

import mlx_densesteer as ds
from mlx_densesteer import demo
from mlx_densesteer.cli import main
from mlx_densesteer.demo.problems import held_out

FEW = ("--limit", "3", "-n", "120")


@pytest.fixture
def run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    def call(*words, code=0):
        result = CliRunner().invoke(main, [str(word) for word in words])
        assert result.exit_code == code, result.output
        return result

    return call


def records(path):
    return [json.loads(line) for line in path.read_text().splitlines()][1:]


def test_eval_compares_keeps_every_answer_and_repeats_none(run, tmp_path):
    words = ("eval", "-m", "demo", "demo", *FEW, "-v", "demo", "-s", "0.2", "--relative")
    first = run(*words)
    lines = first.stdout.splitlines()
    assert lines[1].startswith("unsteered") and lines[2].startswith("steered")
    assert "McNemar p = " in lines[-1]
    kept = tmp_path / "eval-demo-demo.jsonl"
    answers = [r for r in records(kept) if "text" in r]
    assert {(r["problem"], r["steering"]) for r in answers} == {
        (f"demo-test-{i}", steering)
        for i in range(3)
        for steering in {a["steering"] for a in answers}
    }
    assert len(answers) == 6 and sum("nll_of" in r for r in records(kept)) == 6
    before = kept.read_bytes()
    again = run(*words, "--json")
    assert kept.read_bytes() == before
    assert "6 answers there already" in again.stderr
    document = json.loads(again.stdout)
    assert document["scores"]["steered"]["against_unsteered"]["problems"] == 3
    assert document["steering"]["layers"] == [5]
    assert (
        document["scores"]["steered"]["steps"]["value"]
        < (document["scores"]["unsteered"]["steps"]["value"])
    )
    alone = run("eval", "-m", "demo", "demo", *FEW)
    assert alone.stdout.splitlines()[1] == lines[1]  # the unsteered row is the same row
    refused = run("eval", "-m", "demo", "demo", "--limit", "3", "-n", "60", code=1)
    assert '{"max_tokens": 120}, this one {"max_tokens": 60}' in refused.stderr


def test_eval_reads_a_local_file_and_grades_it(run, tmp_path):
    (story,) = held_out(1)
    rows = [
        {"question": story.question, "answer": f"Some words.\n#### {story.answer}"},
        {"question": "Tom has 4 cups. Then Tom buys 5. How many cups does Tom have now?",
         "answer": "#### 1,000"},
    ]  # fmt: skip
    file = tmp_path / "mine.jsonl"
    file.write_text("\n".join(map(json.dumps, rows)))
    result = run("eval", "-m", "demo", file, "-n", "120", "--no-nll", "-o", "a.jsonl", "--json")
    scores = json.loads(result.stdout)["scores"]["unsteered"]
    verdicts = {r["problem"]: r["correct"] for r in records(tmp_path / "a.jsonl")}
    assert verdicts["mine-1"] is False
    assert scores["correct"] == sum(verdicts.values())
    assert scores["nll"] is None


def test_sweep_writes_table_and_pictures_and_stores_what_it_found(run, tmp_path):
    vector = shutil.copy(demo.VECTOR, tmp_path / "v.npz")
    words = ("sweep", "-m", "demo", "demo", *FEW, "-v", vector, "--layers", "4,5",
             "--strengths=0,0.2", "--relative", "-o", "out", "--write")  # fmt: skip
    first = run(*words)
    lines = first.stdout.splitlines()
    assert [line.split()[0] for line in lines[1:4]] == ["-", "4", "5"]
    assert "No setting is recommended" in lines[-1]  # three problems support nothing
    folder = tmp_path / "out"
    assert {p.name for p in folder.iterdir()} == {
        "answers.jsonl", "table.json", "heatmap.png", "curves.png",
    }  # fmt: skip
    before = (folder / "answers.jsonl").read_bytes()
    document = json.loads(run(*words, "--json").stdout)
    assert (folder / "answers.jsonl").read_bytes() == before
    assert [row["layer"] for row in document["rows"]] == [None, 4, 5]
    assert [row["relative"] for row in document["rows"]] == pytest.approx([0, 0.2, 0.2])
    stored = ds.SteeringVector.load(vector).meta
    assert [row["layer"] for row in stored.tested] == [None, 4, 5]
    assert stored.recommended is None
    assert "3 settings" in run("vector", "show", vector).stdout


def test_what_a_sweep_recommended_is_the_default(run, tmp_path):
    vector = ds.SteeringVector.load(demo.VECTOR)
    best = {"layer": 4, "strength": 3.5, "positions": "generated", "text": "because"}
    made = ds.SteeringVector(vector.layers, replace(vector.meta, recommended=best))
    file = made.save(tmp_path / "best.npz")
    question = "Tom has 4 cups. Then Tom buys 5. How many cups does Tom have now?"

    def applied(*words):
        words = ("generate", "-m", "demo", "-v", file, "-n", "4", "--json", *words, question)
        found = json.loads(run(*words).stdout)["steering"]
        return found["layers"], found["strength"], found["positions"]

    assert applied() == ([4], 3.5, "generated")
    assert applied("-l", "4") == ([4], 3.5, "generated")
    assert applied("-s", "1") == ([4], 1.0, "generated")
    assert applied("-l", "5") == ([5], 1.0, "all")
    assert applied("--positions", "prompt") == ([4], 3.5, "prompt")
    assert "layer 4, strength 3.5. because" in run("vector", "show", file).stdout


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["eval", "-m", "demo", "nothing"], "no such file, and no task"),
        (["eval", "-m", "demo", "demo", "-s", "1"], "need a vector"),
        (["eval", "-m", "demo", "demo", "-v", "demo", "--relative", "-l", "5"], "needs a --strength"),
        (["eval", "-m", "demo", "demo", "--split", "dev"], "has no split 'dev'"),
        (["sweep", "-m", "demo", "demo", "-v", "demo", "--strengths=a"], "expected numbers"),
        (["sweep", "-m", "demo", "demo", "-v", "demo", "--strengths=nan"], "finite"),
        (["sweep", "-m", "demo", "demo", "-v", "demo", "--strengths=0"], "nothing to sweep"),
        (["sweep", "-m", "demo", "demo", "-v", "demo", "-l", "9", "--strengths=1"], "layer 9"),
        (["sweep", "-m", "demo", "demo", "-v", "demo", "--strengths=1", "--write"], "embedded"),
        (["sweep", "-m", "demo", "demo", "-v", "none.npz", "--strengths=1"], "none.npz: no such file. Make one with"),
    ],
)  # fmt: skip
def test_what_cannot_be_done_is_said_before_anything_is_written(run, tmp_path, words, message):
    code = 2 if message in ("need a vector", "needs a --strength", "expected numbers", "embedded") else 1  # fmt: skip
    result = run(*words, code=code)
    assert message in result.stderr
    assert not [p for p in tmp_path.rglob("*.jsonl") if p.stat().st_size > 2000]
