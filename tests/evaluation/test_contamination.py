import json

import numpy as np
import pytest
from click.testing import CliRunner
from helpers import SHARED

from mlx_densesteer.cli import main
from mlx_densesteer.demo.problems import calibration, held_out
from mlx_densesteer.evaluation.contamination import (
    HASHES,
    known_test_problem,
    question_hash,
    warn_of_test_problems,
)
from mlx_densesteer.evaluation.tasks import TASKS, load_task

FILES = {
    "gsm8k": "gsm8k-test-first659.jsonl", "math500": "MATH-500.jsonl", "amc23": "amc23.jsonl",
    "aime24": "aime24.jsonl", "olympiad": "olympiadbench.jsonl",
}  # fmt: skip


@pytest.fixture
def asked(monkeypatch, tmp_path):
    """A test set of two questions in the place of the real ones."""
    texts = ["What is 2 + 3?", "A robe takes 2 bolts.\n\nHow many bolts, in total?"]
    np.save(tmp_path / "gsm8k.npy", np.array(sorted(map(question_hash, texts)), "<u8"))
    from mlx_densesteer.evaluation import contamination

    monkeypatch.setattr(contamination, "HASHES", tmp_path)
    contamination._known.cache_clear()
    yield texts
    contamination._known.cache_clear()


def test_a_question_is_found_in_any_dress(asked):
    small, large = asked
    for text in (
        small, f"  {small.upper()}\n", "What\u00a0is 2+3 ?", f"Solve this:\n\n{small}",
        f"{small}\n\nReason step by step.\nFinal Answer: \\boxed{{...}}", large,
        large.replace("\n\n", " "), f"{large}\n\nBe brief.\n \nThink.", f"Hello.\n\n{large}",
    ):  # fmt: skip
        assert known_test_problem(text) == "gsm8k", text
    for text in ("", "?", "What is 2 - 3?", "What is 2 + 33?", "A robe takes 2 bolts.", "\ud800"):
        assert known_test_problem(text) is None, text
    assert known_test_problem("x\n\n" * 50_000) is None


def test_the_warning_is_one_sentence_with_a_remedy(asked):
    found = warn_of_test_problems(["other", *asked])
    assert "2 problems of known test sets in the data (2 of gsm8k)" in found
    assert found.endswith("such as gsm8k's split train.") and "\n" not in found
    assert warn_of_test_problems(["other"]) is None and warn_of_test_problems([]) is None


def test_the_hashes_are_sorted_and_of_tasks():
    files = sorted(HASHES.glob("*.npy"))
    assert {path.stem for path in files} < set(TASKS)
    for path in files:
        hashes = np.load(path, allow_pickle=False)
        assert hashes.dtype == np.uint64 and (np.diff(hashes) > 0).all() and len(hashes) > 20


def test_no_problem_of_the_demo_is_one():
    for problem in (*calibration(200), *held_out(200)):
        assert known_test_problem(problem.question) is None


@pytest.mark.skipif(not SHARED.is_dir(), reason="the data sets are not there")
def test_every_problem_of_the_files_is_found_and_none_of_the_training_split():
    for name, file in FILES.items():
        problems = load_task(SHARED / "data" / file)
        assert {known_test_problem(problem.prompt) for problem in problems[:60]} == {name}
        made = sorted({question_hash(problem.question) for problem in problems})
        assert np.load(HASHES / f"{name}.npy").tolist() == made
    train = load_task(SHARED / "data" / "gsm8k-train-first1000.jsonl")
    assert warn_of_test_problems(problem.prompt for problem in train) is None


def test_extract_and_pairs_warn(asked, hf_folder, tmp_path):
    file, problems = tmp_path / "pairs.jsonl", tmp_path / "problems.jsonl"
    row = {"prompt": asked[0], "positive": "It is 5.", "negative": "We add.\n\nIt is 5."}
    file.write_text(json.dumps(row))
    words = ["extract", "-m", str(hf_folder), str(file), "-o", str(tmp_path / "v.npz")]
    done = CliRunner().invoke(main, words)
    assert done.exit_code == 0 and "1 problem of known test sets" in done.stderr
    problems.write_text(json.dumps({"question": asked[0], "answer": "#### 5"}))
    words = ["pairs", "-m", str(hf_folder), str(problems), "-n", "1"]
    words += ["-o", str(tmp_path / "p.jsonl")]
    done = CliRunner().invoke(main, words)
    assert "1 problem of known test sets in the data (1 of gsm8k)" in done.stderr
