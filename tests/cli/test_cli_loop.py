"""``eval`` and ``sweep`` as a user calls them, on the embedded demo model."""

import json
import shutil
import sys
from dataclasses import replace
from importlib.util import find_spec

import pytest

import mlx_densesteer as ds
from mlx_densesteer import demo
from mlx_densesteer.cli.run import program
from mlx_densesteer.demo.problems import held_out
from mlx_densesteer.evaluation.tasks import load_task
from mlx_densesteer.steering.request import request
from mlx_densesteer.steering.steering import UNSTEERED

FEW = ("--limit", "3", "-n", "96")


def records(path):
    return [json.loads(line) for line in path.read_text().splitlines()][1:]


def test_a_missing_plot_extra_is_told_before_anything_is_answered(run, monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    refused = run("eval", "-m", "demo", "demo", *FEW, "--plot", "a.png", code=1)
    assert "pictures need matplotlib" in refused.stderr
    assert not list(tmp_path.iterdir())


def test_eval_compares_keeps_every_answer_and_repeats_none(run, tmp_path):
    words = ("eval", "-m", "demo", "demo", *FEW, "-v", "demo", "-s", "20%")
    first = run(*words)
    lines = first.stdout.splitlines()
    assert lines[1].startswith("unsteered") and lines[2].startswith("steered")
    assert "so few problems make the intervals of means" in lines[4]
    assert "McNemar p" in lines[-2] and lines[-1].startswith("steered - unsteered")
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
    assert document["steering"]["layers"] == list(request(ds.SteeringVector.load("demo")).layers)
    assert document["steering"]["dose"] == pytest.approx(0.2)
    assert (
        document["scores"]["steered"]["steps"]["value"]
        < (document["scores"]["unsteered"]["steps"]["value"])
    )
    alone = run("eval", "-m", "demo", "demo", *FEW)
    assert alone.stdout.splitlines()[1] == lines[1]  # the unsteered row is the same row
    refused = run("eval", "-m", "demo", "demo", "--limit", "3", "-n", "60", code=1)
    assert '{"max_tokens": 96}, this one {"max_tokens": 60}' in refused.stderr


def test_eval_compares_baselines_in_the_same_table(run, tmp_path):
    examples = tmp_path / "e.jsonl"
    example = {"prompt": "Tom has 4 cups and buys 5. How many?", "response": "4 + 5 = 9.\n#### 9"}
    examples.write_text(json.dumps(example))
    words = ("eval", "-m", "demo", "demo", "--limit", 2, "-n", 48, "-v", "demo", "--no-nll")
    specs = ("prefix:So", "few-shot:1", "random:3", "budget:20")
    given = [word for spec in specs for word in ("--baseline", spec)]
    table = run(*words, *given, "--examples", examples).stdout
    rows = [line.split("  ")[0] for line in table.splitlines()]
    names = ["unsteered", "steered", *specs]
    assert rows[0] == "" and rows[1:7] == names
    assert [row for row in rows if row.endswith("- unsteered")] == [
        f"{name} - unsteered" for name in names[1:]
    ]
    assert [row for row in rows if row.endswith("- steered")] == [
        f"{name} - steered" for name in specs
    ]
    assert table.splitlines()[-1].endswith("not corrected for the 9 comparisons")
    plot = ("--plot", "a.png") if find_spec("matplotlib") else ()
    document = json.loads(run(*words, *given, "--examples", examples, "--json", *plot).stdout)
    assert list(document["scores"]) == names
    assert (tmp_path / "a.png").exists() == bool(plot)
    prints = {one["steering"] for one in records(tmp_path / "eval-demo-demo.jsonl")}
    assert len(prints) == 6
    described = document["baselines"]
    assert {described[spec]["fingerprint"] for spec in specs} < prints
    assert described["few-shot:1"]["examples"] == 1 and described["prefix:So"]["prefix"] == "So"
    assert described["random:3"]["steering"]["layers"] == document["steering"]["layers"]
    assert document["scores"]["budget:20"]["against_steered"]["problems"] == 2


def test_eval_refuses_baselines_that_cannot_be(run, tmp_path):
    words, steered = ("eval", "-m", "demo", "demo", "--limit", 2), ("-v", "demo")
    examples = tmp_path / "e.jsonl"
    problem = load_task("demo", limit=1)[0]
    examples.write_text(json.dumps({"prompt": problem.prompt, "positive": "4"}))
    some = ("--examples", examples)
    for more, code, message in (
        (("--baseline", "brief"), 1, "expected instruction:TEXT"),
        (("--baseline", "random"), 2, "add -v FILE"),
        (("--baseline", "few-shot:1"), 2, "one needs the other"),
        (some, 2, "one needs the other"),
        (("--baseline", "few-shot:1", *some), 1, "example 1 is demo-test-0, which is among"),
        (("--baseline", "few-shot:2", *some, "--skip", 1), 1, "few-shot:2: there are 1 examples"),
        ((*steered, "-s", "0", "--baseline", "random"), 1, "needs a steering"),
        (("--baseline", "budget:2", "--baseline", "budget:2"), 1, "have one name, or are the same"),
    ):
        assert message in run(*words, *more, code=code).stderr
    assert not list(tmp_path.glob("eval-*"))


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


def test_sweep_writes_table_and_pictures_and_stores_what_it_found(run, tmp_path, monkeypatch):
    vector = shutil.copy(demo.VECTOR, tmp_path / "v.npz")
    words = ("sweep", "-m", "demo", "demo", "--limit", 2, "-n", 48, "-v", vector, "--layers", "4,5",
             "--strengths=0,20%", "-o", "out", "--write")  # fmt: skip
    first = run(*words)
    lines = first.stdout.splitlines()
    assert lines[0].split()[:3] == ["layers", "dose", "strength"]
    cells = [line.split()[:3] for line in lines[1:4]]
    assert [cell[:2] for cell in cells] == [["-", "0%"], ["4", "+20%"], ["5", "+20%"]]
    assert all(float(cell[2]) > 1 for cell in cells[1:])
    assert lines[-4].startswith("No setting is recommended")  # two problems support nothing
    assert lines[-3] == "" and lines[-2].startswith("Next, ")
    assert lines[-1].startswith(f"  {program()} sweep -m demo ")
    folder = tmp_path / "out"
    assert {p.name for p in folder.iterdir()} == {
        "answers.jsonl", "table.json", "heatmap.png", "curves.png",
    }  # fmt: skip
    before = (folder / "answers.jsonl").read_bytes()
    monkeypatch.setattr("mlx_densesteer.evaluation.plot.plot_sweep", lambda *_: [])
    document = json.loads(run(*words, "--json").stdout)
    assert (folder / "answers.jsonl").read_bytes() == before
    assert [row["layers"] for row in document["rows"]] == [None, [4], [5]]
    assert [row["dose"] for row in document["rows"]] == [0, 0.2, 0.2]
    assert not list(folder.glob("*-1.*"))  # the same sweep replaces its own table
    done = run(*words[:-3], "--json", "--strengths=5", "-o", "out")
    grown = json.loads(done.stdout)
    assert [row["strength"] for row in grown["rows"]] == [0, 5, 5]
    assert "its table is now table-1.json" in done.stderr
    assert json.loads((folder / "table-1.json").read_bytes()) == document
    assert {p.name for p in folder.glob("*-1.png")} == {"heatmap-1.png", "curves-1.png"}
    assert json.loads((folder / "table.json").read_bytes()) == grown
    other = run(*words[:-1], "--positions", "prompt")
    assert "its table is now table-2.json" in other.stderr
    answers = [r["steering"] for r in records(folder / "answers.jsonl") if "text" in r]
    assert answers.count(UNSTEERED) == 2  # those that were there were taken
    assert len(answers) == 2 * 7 and len(set(answers)) == 7
    stored = ds.SteeringVector.load(vector).meta
    assert [row["layers"] for row in stored.tested] == [None, [4], [5]]
    assert stored.recommended is None
    assert "3 settings" in run("vector", "show", vector).stdout


@pytest.mark.parametrize(
    ("reason", "needed", "more", "says", "command"),
    [
        ("accuracy", 0, [], "confirm it on other problems", "eval {} -l 5 --strength=4.76 -n 48 --no-nll demo"),
        ("tokens", 0, ["--split", "test"], "confirm it on other problems",
         "eval {} -l 5 --strength=4.76 --skip 2 --split test -n 48 --no-nll demo"),
        ("tokens", 0, ["--split", "test", "--skip", "498"], "try it", "chat {} -l 5 --strength=4.76"),
        ("none", 499, [], "see for yourself what it changes (layer 5, 20%)", "chat {} -l 5 -s 20%"),
        ("none", 0, ["--strict"], "go on with more problems",
         "sweep {} --limit 189 -l 5 -s 20% -n 48 --no-nll demo"),
        ("none", 0, ["--skip", "490", "--strengths=20%,200%"],
         "see for yourself what it changes (1.0 steps instead of ", "chat {} -l 5 -s 20%"),
        ("none", 0, ["--skip", "490", "--strengths=-30%"], "look for another layer", "vector show demo"),
    ],
)  # fmt: skip
def test_a_sweep_ends_with_the_next_command(run, monkeypatch, reason, needed, more, says, command):
    from mlx_densesteer.evaluation import sweep as sweeping
    from mlx_densesteer.evaluation.recommendation import Recommendation, Unproven

    layers, strength = ((), 0.0) if reason == "none" else ((5,), 4.76)
    unproven = Unproven((5,), 4.76, 0.2, 1, 0, needed) if needed else None
    verdict = Recommendation(layers, strength, 0.2, reason, "Two sentences.", unproven)
    monkeypatch.setattr(sweeping, "recommend", lambda *_, **__: verdict)
    monkeypatch.setattr("mlx_densesteer.evaluation.plot.plot_sweep", lambda *_: [])
    words = (
        "sweep",
        "-m",
        "demo",
        "-v",
        "demo",
        "demo",
        "-l",
        "5",
        "--limit",
        2,
        "-n",
        48,
        "--no-nll",
    )
    *_, told, printed = run(*words, "-s", "20%", *more).stdout.splitlines()
    assert told.startswith(f"Next, {says}")
    assert printed == f"  {program()} {command.format('-m demo -v demo')}"


def test_a_sweep_suggests_no_overdose_in_either_direction(run, tmp_path):
    dense = ds.SteeringVector.load(demo.VECTOR)
    sparse = ds.SteeringVector({5: -dense.layers[5]}, dense.meta).save(tmp_path / "sparse.npz")
    words = ("-m", "demo", "-v", sparse, "demo", "--limit", 2, "-n", 48, "--no-nll", "--skip", 490)
    done = run("sweep", *words, "--strengths=-300%")  # one step: the same words over and over
    assert "see for yourself" not in done.stdout and "look for another layer" in done.stdout


def test_what_a_sweep_recommended_is_the_default(run, tmp_path):
    vector = ds.SteeringVector.load(demo.VECTOR)
    best = {
        "layers": [4],
        "strength": 3.5,
        "dose": 0.2,
        "positions": "generated",
        "text": "because",
    }
    made = ds.SteeringVector(vector.layers, replace(vector.meta, recommended=best))
    file = made.save(tmp_path / "best.npz")

    def applied(*words):
        words = ("eval", "-m", "demo", "demo", "--limit", 1, "-n", 4, "-v", file, "--json", *words)
        found = json.loads(run(*words, "--no-unsteered", "--no-nll").stdout)["steering"]
        return found["layers"], found["strength"], found["positions"]

    assert applied() == ([4], 3.5, "generated")
    assert applied("-s", "1", "-l", "4") == ([4], 1.0, "generated")
    assert applied("-l", "5", "-s", "2") == ([5], 2.0, "generated")
    assert "layer 4, strength 3.5" in run("vector", "show", file).stdout


@pytest.mark.parametrize("positions", ["steps", "think", "prompt", "first:8"])
def test_what_adds_a_vector_everywhere_says_that_it_was_found_for_some(run, tmp_path, positions):
    vector = ds.SteeringVector.load(demo.VECTOR)
    best = {"layers": [4], "strength": 3.5, "positions": positions}
    made = ds.SteeringVector({4: vector.layers[4]}, replace(vector.meta, recommended=best))
    file = made.save(tmp_path / "best.npz")
    refused = run("bake", "-m", "demo", "-v", file, "-o", tmp_path / "baked", code=2)
    assert "at every token. Choose a strength" in refused.stderr
    shown = run("vector", "show", file).stdout
    assert f"layer 4 (a sweep recommends it), strength 3.5, positions {positions}\n" in shown
    told = run("vector", "export", file, "-o", tmp_path / "v.gguf").stderr
    assert f"recommended for positions {positions}, and llama.cpp adds it at all" in told


@pytest.mark.slow
@pytest.mark.parametrize(
    ("positions", "given"),
    [("generated", ()), ("first:8", ("-s", "3")), ("first:8", ("-l", "3"))],  # none is found for 3
)
def test_a_baked_vector_that_was_found_for_some_tokens_is_told_to_steer_all(
    run, tmp_path, positions, given
):
    vector = ds.SteeringVector.load(demo.VECTOR)
    best = {"layers": [4], "strength": 3.5, "positions": positions}
    made = ds.SteeringVector(vector.layers, replace(vector.meta, recommended=best))
    file = made.save(tmp_path / "best.npz")
    told = run("bake", "-m", "demo", "-v", file, *given, "-o", tmp_path / "baked").stderr
    assert f"trained for positions {positions}; baked, it is added at every token" in told


def test_the_options_name_all_positions():
    from mlx_densesteer.cli.options import positions_option
    from mlx_densesteer.steering.places import POSITIONS

    command = positions_option()(lambda: None)
    (option,) = command.__click_params__
    assert set(option.type.choices) == set(POSITIONS)


CODE_2 = (
    "need a vector", "expected a number", "nothing to sweep", "embedded", "a KL other than 0",
    "goes without --kl", "add --pairs FILE", "give one",
)  # fmt: skip


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["eval", "-m", "demo", "nothing"], "no such file, and no task"),
        (["eval", "-m", "demo", "demo", "-s", "1"], "need a vector"),
        (["eval", "-m", "demo", "demo", "-v", "demo", "-s", "a lot"], "expected a number"),
        (["eval", "-m", "demo", "demo", "--split", "dev"], "has no split 'dev'"),
        (["sweep", "-m", "demo", "demo", "-v", "demo", "--strengths=1,a"], "strength 'a': expected a number"),
        (["sweep", "-m", "demo", "demo", "-v", "demo", "--strengths=nan%"], "strength 'nan%'"),
        (["sweep", "-m", "demo", "demo", "-v", "demo", "--strengths=0"], "nothing to sweep"),
        (["sweep", "-m", "demo", "demo", "-v", "demo", "-l", "9", "--strengths=1"], "layer 9"),
        (["sweep", "-m", "demo", "demo", "-v", "demo"], "nothing to sweep"),
        (["sweep", "-m", "demo", "demo", "-v", "demo", "--kl=0.1,0"], "a KL other than 0"),
        (["sweep", "-m", "demo", "demo", "-v", "demo", "--kl=0.1", "-s", "1"], "goes without --kl"),
        (["sweep", "-m", "demo", "demo", "-v", "demo", "--kl=0.1", "--best", "2"], "add --pairs FILE"),
        (["eval", "-m", "demo", "demo", "-v", "demo", "-s", "1", "--kl", "0.1"], "give one"),
        (["sweep", "-m", "demo", "demo", "-v", "demo", "--strengths=1", "--write"], "embedded"),
        (["sweep", "-m", "demo", "demo", "-v", "none.npz", "--strengths=1"], "none.npz: no such file. Make one with"),
    ],
)  # fmt: skip
def test_what_cannot_be_done_is_said_before_anything_is_written(run, tmp_path, words, message):
    code = 2 if message in CODE_2 else 1
    result = run(*words, code=code)
    assert message in result.stderr
    assert not [p for p in tmp_path.rglob("*.jsonl") if p.stat().st_size > 2000]


def test_ctrl_c_says_where_the_work_is(run, tmp_path, monkeypatch):
    def stop(*_, progress, **__):
        progress([], 0)
        raise KeyboardInterrupt

    monkeypatch.setattr("mlx_densesteer.distributed.answers.answer", stop)
    for command in (["eval"], ["sweep", "-v", "demo", "--strengths=10%"]):
        result = run(*command, "-m", "demo", "demo", "--limit", "1", code=130)
        assert "interrupted; what is done is in " in result.stderr
        assert "The same command goes on from there." in result.stderr
