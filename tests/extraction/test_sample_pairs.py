"""Pairs of a model's own samples: what is chosen, and that a run goes on."""

import json
from dataclasses import replace

import pytest
from click.testing import CliRunner

import mlx_densesteer as ds
from mlx_densesteer.cli import main
from mlx_densesteer.errors import InputError
from mlx_densesteer.evaluation.answers import Answer
from mlx_densesteer.evaluation.tasks import Problem, load_task
from mlx_densesteer.extraction import sample_pairs as module
from mlx_densesteer.extraction.pairs import read_pairs
from mlx_densesteer.extraction.sample_pairs import Sample, choose, sample_pairs
from mlx_densesteer.extraction.verification import Response
from mlx_densesteer.generation.sampling import Sampling

PROBLEM = Problem("p", "1+1?", "1+1?", "2", "number")


def sample(number, tokens, text=None):
    return Sample(number, Response(f"{number}" if text is None else text, tokens))


def chosen(*samples):
    case = choose(PROBLEM, samples)
    sides = (case.positive, case.negative)
    return [one and one.number for one in sides], case.reasons, case.correct


def test_the_shortest_and_the_longest_correct_sample_make_the_pair():
    found = chosen(None, sample(1, 50), sample(2, 30), None, sample(4, 70))
    assert found == ([2, 4], (), 3)


def test_of_equal_lengths_the_steps_decide_then_the_order():
    few, many = "a b", "a\n\nb"
    found = chosen(sample(0, 30, many), sample(1, 30, few), sample(2, 60, few), sample(3, 60, many))
    assert found == ([1, 3], (), 4)
    assert chosen(sample(0, 30, "a"), sample(1, 30, "b"), sample(2, 60, "c"), sample(3, 60, "d"))[
        0
    ] == [0, 2]


def test_a_problem_without_two_different_samples_is_rejected_with_its_reason():
    assert chosen(None, None) == ([None, None], ("no correct sample",), 0)
    assert chosen(None, sample(1, 9)) == ([1, None], ("one correct sample",), 1)
    assert chosen(sample(0, 9, "x"), sample(1, 9, "x")) == ([0, None], ("one correct sample",), 2)
    assert chosen(sample(0, 100), sample(1, 109)) == ([0, 1], ("too alike",), 2)
    assert chosen(sample(0, 100), sample(1, 110)) == ([0, 1], (), 2)


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


TEXTS = [  # of four samples; wrong ones have no 2
    ["2", "1 + 1 = 2 ... so 2", "no", "2"],
    ["no", "no", "3", ""],
    ["so 2", "no", "no", "no"],
]


def test_files_and_summary_of_hand_made_samples(demo_model, tmp_path, monkeypatch):
    problems = [replace(PROBLEM, id=f"p{i}", prompt=f"{i}: 1+1?") for i in range(3)]

    def give(model, problems, conditions, journal, **options):
        assert [one.number for one in conditions] == [0, 1, 2, 3]
        made = []
        for problem in problems:
            for one in conditions:
                text = TEXTS[int(problem.id[1])][one.number]
                made.append(Answer(
                    problem.id, "", one.fingerprint, text, (1,), 1, "stop" if text else "length",
                    "2" in text, None, "2" in text, None, 1.0,
                ))  # fmt: skip
        options["progress"](made, 5)
        return made

    monkeypatch.setattr(module, "answer", give)
    told, out = [], tmp_path / "own.jsonl"
    summary = sample_pairs(
        demo_model, problems, out, samples=4, system="Be brief.", rows=1, count=9,
        progress=lambda answers, tokens: told.append((len(answers), tokens)),
    )  # fmt: skip
    assert told == [(12, 5)]
    tokens = {text: len(demo_model.tokenizer.encode(text)) for texts in TEXTS for text in texts}
    (pair,), rejected = lines(out), lines(tmp_path / "own.rejected.jsonl")
    assert (pair["id"], pair["positive"], pair["negative"]) == ("p0", "2", "1 + 1 = 2 ... so 2")
    assert pair["figures"]["positive"] == {"tokens": 1, "steps": 1, "density": 1.0, "nll": None}
    assert pair["figures"]["negative"]["tokens"] == tokens["1 + 1 = 2 ... so 2"]
    assert pair["sampling"] == {
        "samples": 4, "correct": 3, "temp": 0.7, "top_p": 1.0, "seed": 0, "positive": 0, "negative": 1,
    }  # fmt: skip
    assert [(one["id"], one["positive"], one["reasons"]) for one in rejected] == [
        ("p1", None, ["no correct sample"]), ("p2", "so 2", ["one correct sample"]),
    ]  # fmt: skip
    solutions = lines(tmp_path / "own.solutions.jsonl")
    assert [(one["prompt"], one["response"], one["system"]) for one in solutions] == [
        ("0: 1+1?", "2", "Be brief."), ("2: 1+1?", "so 2", "Be brief."),
    ]  # fmt: skip
    (read,) = read_pairs(out)
    assert (read.positive, read.system) == ("2", "Be brief.")
    assert (summary.problems, summary.samples, summary.correct, summary.truncated) == (3, 12, 4, 1)
    assert (summary.solved, summary.accepted) == (2, 1)
    assert summary.rejected == {"no correct sample": 1, "one correct sample": 1}
    assert (summary.after["tokens"], summary.before["tokens"]) == (
        1,
        pair["figures"]["negative"]["tokens"],
    )
    # the files do not depend on the size of the waves
    before = out.read_bytes()
    few = sample_pairs(demo_model, problems, out, samples=4, count=1, system="Be brief.", rows=16)
    assert (few.problems, few.samples, few.correct) == (1, 4, 3) and out.read_bytes() == before


@pytest.fixture(scope="module")
def model(hf_folder, tmp_path_factory):
    folder = ds.convert(hf_folder, tmp_path_factory.mktemp("m") / "t", bits=None, dtype="float32")
    return ds.load(folder)


PROBLEMS = [replace(PROBLEM, id=f"p{i}", prompt=f"{i}?") for i in range(3)]
OPTIONS = {"max_tokens": 8, "rows": 4, "sampling": Sampling(temp=1.0, seed=5)}


def test_a_run_that_was_cut_off_goes_on_with_the_same_draws(model, tmp_path):
    whole, cut = tmp_path / "whole.jsonl", tmp_path / "cut.jsonl"
    sample_pairs(model, PROBLEMS, whole, samples=4, **OPTIONS)
    journal = tmp_path / "whole.jsonl.samples.jsonl"
    data = journal.read_bytes()
    assert data.count(b"\n") == 1 + 12
    left = data[: data.index(b"\n", len(data) // 2) + 40]  # a few answers, and half a line
    (tmp_path / "cut.jsonl.samples.jsonl").write_bytes(left)
    sample_pairs(model, PROBLEMS, cut, samples=4, **OPTIONS)

    def drawn(path):
        return {(r["problem"], r["steering"]): r["token_ids"] for r in lines(path)[1:]}

    assert drawn(tmp_path / "cut.jsonl.samples.jsonl") == drawn(journal)
    assert len({tuple(ids) for ids in drawn(journal).values()}) == 12
    for name in ("{}.jsonl", "{}.rejected.jsonl", "{}.solutions.jsonl"):
        files = [tmp_path / name.format(stem) for stem in ("whole", "cut")]
        assert files[0].read_bytes() == files[1].read_bytes()


def test_more_samples_go_on_and_fewer_use_the_first(model, tmp_path, monkeypatch):
    asked = []
    stock = ds.generate_batch

    def count(model, prompts, **options):
        asked.append(len(prompts))
        return stock(model, prompts, **options)

    monkeypatch.setattr("mlx_densesteer.evaluation.answers.generate_batch", count)
    out = tmp_path / "own.jsonl"
    for samples in (2, 4, 3):
        assert sample_pairs(model, PROBLEMS, out, samples=samples, **OPTIONS).samples == 3 * samples
    other = OPTIONS | {"sampling": Sampling(temp=1.0, seed=6)}
    sample_pairs(model, PROBLEMS, out, samples=2, **other)
    assert asked == [6, 6, 0, 6]


def test_bad_requests_are_refused(model, tmp_path):
    out = tmp_path / "own.jsonl"
    for changes, message in (
        ({"samples": 1}, "1 samples of a problem: expected at least 2"),
        ({"sampling": Sampling(seed=1)}, "temperature 0"),
        ({"sampling": Sampling(temp=1.0)}, "a sampling without a seed"),
    ):
        with pytest.raises(InputError, match=message):
            sample_pairs(model, PROBLEMS, out, **(OPTIONS | changes))
    with pytest.raises(InputError, match="no problems"):
        sample_pairs(model, [], out, **OPTIONS)
    out.write_text("mine")
    with pytest.raises(InputError, match=r"without the journal .*own\.jsonl\.samples\.jsonl"):
        sample_pairs(model, PROBLEMS, out, **OPTIONS)


def call(*words):
    return CliRunner().invoke(main, ["pairs", *map(str, words)], catch_exceptions=False)


def test_the_command(tmp_path):
    out = tmp_path / "own.jsonl"
    words = (
        "-m",
        "demo",
        "demo",
        "-o",
        out,
        "--limit",
        2,
        "-n",
        120,
        "--samples",
        3,
        "--temp",
        1.2,
    )
    result = call(*words, "--seed", 1, "--json")
    document = json.loads(result.stdout)
    assert document["sampling"] == {"temp": 1.2, "top_p": 1.0, "seed": 1}
    assert document["samples"] == 6 and document["solved"] <= 2
    assert "2 problems, 6 samples: " in result.stderr and "solutions.jsonl" in result.stderr
    solved = lines(tmp_path / "own.solutions.jsonl")
    assert [one["id"] for one in solved] == [
        problem.id for problem in load_task("demo", split="train", limit=2)
        if problem.id in {one["id"] for one in solved}
    ]  # fmt: skip
    assert result.exit_code == (0 if document["accepted"] else 1)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            ["--samples", 4, "--nll-margin", 1],
            "--nll-margin: with --samples it needs a --rewriter too",
        ),
        (["--samples", 4, "--rewriter", "short"], "--rewriter short: expected rules, plain, brief"),
        (["--temp", 1], "--temp: needs --samples K"),
        (["--seed", 1], "--seed: needs --samples K"),
        (["--samples", 1], "1 is not in the range x>=2"),
        (["--samples", 4, "--temp", 0], "0.0 is not in the range x>0"),
    ],
)
def test_options_that_do_not_go_together_are_refused(tmp_path, words, message):
    result = call("-m", "demo", "demo", "-o", tmp_path / "o.jsonl", *words)
    assert result.exit_code == 2 and message in result.stderr
