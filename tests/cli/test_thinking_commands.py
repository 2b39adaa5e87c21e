"""The commands with a model that thinks (``thinking.py``)."""

import json
import subprocess
import sys

import pytest

QUESTION = "17 * 3?"


@pytest.fixture
def steered(thinking_folder):
    return "-m", thinking_folder, "-v", thinking_folder / "out.npz", "-l", 1


def test_generate_prints_the_answer_and_shows_the_thought_on_request(run, thinking_folder):
    asked = "generate", "-m", thinking_folder, "--think-budget", 6, "--think-budget-hard", QUESTION
    done = run(*asked)
    assert done.stdout == "51\n" and "tabc" not in done.stderr
    assert "6 tokens of them thought (ended at its limit)" in done.stderr
    done = run(*asked, "--show-thinking")
    assert done.stdout == "51\n" and "tabc\n\nt\n" in done.stderr
    found = json.loads(run(*asked, "--json").stdout)
    assert (found["thought"], found["answer"], found["thought_tokens"]) == ("tabc\n\nt", "51", 6)
    assert found["text"] == "<think>tabc\n\nt</think>51"


def test_generate_steers_a_long_thought(run, steered):
    done = run("generate", *steered, "-s", 0, "--think-budget", 9, "--think-strength", 2, QUESTION)
    assert done.stdout == "51\n"
    assert "(strength 2) from 9 tokens of thought on" in done.stderr
    found = json.loads(
        run(
            "generate", *steered, "-s", 0, "--think-budget", 9, "--think-strength", 2, "--json",
            "--positions", "think", QUESTION,
        ).stdout
    )  # fmt: skip
    assert found["thought_tokens"] == 9
    assert found["steering"]["budget"] == {"tokens": 9, "strength": 2.0}
    done = run("generate", *steered, "-s", 0, "--think-budget", 9, "-n", 30, QUESTION)
    assert "tokens of thought on" in done.stderr  # a dose of 20 % more, by default


def test_positions_are_checked_before_the_model_is_loaded(run, steered):
    for where in ("first:0", "first:", "first:1.5", "thinking", "all "):
        refused = run("generate", *steered, "--positions", where, QUESTION, code=2)
        assert (
            "expected one of all, generated, prompt, steps, think, answer, first:N"
            in refused.stderr
        )
    done = run("generate", *steered, "-s", 2, "--positions", "first:1", QUESTION)
    assert "positions first:1" in done.stderr


def test_budgets_that_mean_nothing_are_refused(run, steered, thinking_folder):
    for words, told in (
        (("--think-strength", 2), "--think-strength: add --think-budget N"),
        (("--think-budget-hard",), "--think-budget-hard: add --think-budget N"),
        (
            ("--think-budget", 5, "--think-budget-hard", "--think-strength", 2),
            "leave --think-strength",
        ),
        (("--think-budget", 0), "--think-budget"),
    ):
        assert told in run("generate", *steered, *words, QUESTION, code=2).stderr
    alone = "generate", "-m", thinking_folder, "--think-budget", 5, QUESTION
    assert "needs a vector (-v FILE)" in run(*alone, code=2).stderr
    refused = run("generate", "-m", "demo", "--think-budget", 5, "--think-budget-hard", "x", code=1)
    assert "has no tokens around a thought" in refused.stderr
    refused = run("generate", "-m", "demo", "-v", "demo", "--positions", "think", "x", code=1)
    assert "has no tokens around a thought" in refused.stderr


def test_eval_grades_the_answer_and_counts_both(run, steered, tmp_path):
    problems = [{"question": QUESTION, "answer": "#### 51"}, {"question": "2?", "answer": "#### 2"}]
    (tmp_path / "p.jsonl").write_text("".join(json.dumps(p) + "\n" for p in problems))
    asked = (
        "eval",
        *steered,
        "-s",
        0,
        "--think-budget",
        7,
        "--think-strength",
        2,
        "-n",
        30,
        "p.jsonl",
    )
    done = run(*asked, "-o", "a.jsonl")
    assert "thought tokens" in done.stdout
    found = json.loads(run(*asked, "-o", "a.jsonl", "--json").stdout)
    scores = found["scores"]
    assert scores["steered"]["accuracy"]["value"] == 0.5  # 51 is right once
    assert scores["unsteered"]["accuracy"]["value"] == 0.0  # it never ends its thought
    assert scores["steered"]["thought_tokens"]["value"] == 7
    assert scores["steered"]["tokens"]["value"] == 11  # the thought, two marks and the answer
    assert scores["unsteered"]["thought_tokens"]["value"] == 29
    hard = run("eval", "-m", steered[1], "--think-budget", 4, "--think-budget-hard", "-n", 30,
               "p.jsonl", "-o", "b.jsonl", "--json").stdout  # fmt: skip
    assert json.loads(hard)["scores"]["unsteered"]["thought_tokens"]["value"] == 4
    table = run("eval", "-m", steered[1], "--think-budget", 4, "--think-budget-hard", "-n", 30,
                "p.jsonl", "-o", "b.jsonl").stdout  # fmt: skip
    assert "in every row a thought was ended by force after 4 tokens" in table
    refused = run("eval", "-m", steered[1], "-n", 30, "p.jsonl", "-o", "b.jsonl", code=1).stderr
    assert "think_limit" in refused  # the journal is of another setting


def test_a_run_that_was_refused_leaves_no_journal_in_the_way(run):
    asked = "eval", "-m", "demo", "demo", "--limit", 1, "-n", 20, "-o", "x.jsonl"
    run(*asked, "--think-budget", 20, "--think-budget-hard", code=1)
    run(*asked)


def test_chat_loads_a_conversation_and_its_budgets(run, thinking_folder):
    asked = "chat", "-m", thinking_folder
    start = [sys.executable, "-m", "mlx_densesteer", *map(str, asked)]

    def chat(lines, *options):
        return subprocess.run(
            [*start, *map(str, options)], input=lines, capture_output=True, text=True, timeout=120
        )

    chat(f"{QUESTION}\n/save h.json\n", "--think-budget", 4, "--think-budget-hard", "-n", 30)
    done = chat("/retry\n", "--load", "h.json", "-n", 30)
    assert done.stdout == "51\n" and "4 tokens of them thought" in done.stderr
    vector = "-v", thinking_folder / "out.npz", "-l", 1, "-s", 0
    chat(f"{QUESTION}\n/save s.json\n", *vector, "-n", 20)
    budget = "--load", "s.json", "--think-budget", 6, "--think-strength", 2
    done = chat("/retry\n/budget off\n/retry\n/budget 3 2\n/retry\n/budget x\n", *budget)
    assert done.stdout == "51\n51\n" and done.stderr.count("cut off") == 1
    assert "/budget x: expected a number of tokens" in done.stderr


def test_chat_folds_the_thought(run, thinking_folder):
    lines = f"{QUESTION}\n/thought\n/strength 2\n/positions think\nAnd 2?\n/thought\n"
    done = subprocess.run(
        [sys.executable, "-m", "mlx_densesteer", "chat", "-m", thinking_folder, "-v",
         thinking_folder / "out.npz", "-l", "1", "-s", "0", "--think-budget", "6", "--think-strength", "2"],
        input=lines, capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.stdout == "51\ntabc\n\nt\n51\n"
    assert "/thought shows it" in done.stderr
    assert "the last answer has no thought" in done.stderr


def test_bake_and_export_refuse_what_they_cannot_hold(run, steered, tmp_path):
    refused = run(
        "export-function", *steered, "-s", 1, "--positions", "think", "-o", "f.mlxfn", code=1
    )
    assert "cannot be exported" in refused.stderr
