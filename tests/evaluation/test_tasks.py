"""Tasks from files, from the embedded problems, and from a Hub on this machine."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from helpers import QUICK_RETRIES, ROOT, SHARED
from hub_server import HubServer

from mlx_densesteer.errors import InputError, install_command
from mlx_densesteer.evaluation.grading import grade
from mlx_densesteer.evaluation.tasks import Problem, load_task

GSM8K = {"question": "How many clips?", "answer": "She sold 48+24 = <<48+24=72>>72.\n#### 1,072"}
MATH = {
    "problem": "Convert the point.", "solution": "It is $\\boxed{7}$.", "subject": "Precalculus",
    "answer": "\\left( 3, \\frac{\\pi}{2} \\right)", "level": 2, "unique_id": "test/pre/807.json",
}  # fmt: skip
AMC = {"id": 7, "question": "How far?", "answer": 27.0, "url": "https://example.org/1"}
AIME = {"id": 60, "problem": "How many minutes?", "solution": "\\boxed{204}", "url": "u"}
OLYMPIAD = {
    "id": 1606, "context": None, "question": "Find all $n$.", "final_answer": ["$69$,$84$."],
    "is_multiple_answer": True, "unit": "km", "answer_type": "Numerical",
}  # fmt: skip
BOX = "\\boxed{...}"


def write(path: Path, *records: object, end: str = "\n") -> Path:
    path.write_text("".join(json.dumps(record) + end for record in records), newline="")
    return path


@pytest.fixture
def file(tmp_path) -> Path:
    return tmp_path / "mine.jsonl"


@pytest.mark.parametrize(
    ("record", "identifier", "question", "answer", "rule"),
    [
        (GSM8K, "mine-0", "How many clips?", "1,072", "number"),
        ({"question": "Q", "answer": 36}, "mine-0", "Q", "36", "number"),
        (MATH, "mine-test/pre/807.json", "Convert the point.", MATH["answer"], "boxed"),
        (AMC, "mine-7", "How far?", "27", "boxed"),
        (AMC | {"problem": "How far?", "answer": "4.5"}, "mine-7", "How far?", "4.5", "boxed"),
        (AIME, "mine-60", "How many minutes?", "204", "boxed"),
        (AIME | {"answer": "025"}, "mine-60", "How many minutes?", "025", "boxed"),
        (OLYMPIAD, "mine-1606", "Find all $n$.", "69,84", "boxed"),
        (OLYMPIAD | {"context": "Let."}, "mine-1606", "Let.\n\nFind all $n$.", "69,84", "boxed"),
    ],
)
def test_a_record_is_recognised_by_its_fields(file, record, identifier, question, answer, rule):
    [problem] = load_task(write(file, record))
    assert (problem.id, problem.question, problem.answer, problem.rule) == (
        identifier, question, answer, rule
    )  # fmt: skip
    if rule == "number":
        assert problem.prompt == question
    else:
        assert problem.prompt.startswith(f"{question}\n\n")
        assert f"Final Answer: {BOX}" in problem.prompt


@pytest.mark.parametrize(
    ("gold", "answer"),
    [
        ("45 stones", "45"), ("$1,072", "1072"), ("1,072", "1,072"), (" -3.50", "-3.50"),
        ("\u22125 degrees", "-5"), ("9{,}500", "9500"), ("45 m^2", "45"), ("about 45", "45"),
        ("1/2 cup", "1/2"), ("50%", "50%"), ("3 1/2", "3 1/2"),
        ("3.5 million", "3500000"), ("$2 hundred thousand", "200000"), ("2 dozen", "24"),
    ],
)  # fmt: skip
def test_a_gold_answer_loses_its_unit(file, gold, answer):
    [problem] = load_task(write(file, GSM8K | {"answer": f"So.\n#### {gold}"}))
    assert problem.answer == answer
    got = grade(problem, f"So it is {answer}.")
    assert got.correct
    assert grade(problem, "So it is 45 thousand and 7.").correct is False


def test_olympiad_says_what_belongs_into_the_box(file):
    [several] = load_task(write(file, OLYMPIAD))
    assert "separate them by commas" in several.prompt
    assert "The unit is $km$" in several.prompt
    [one] = load_task(write(file, OLYMPIAD | {"is_multiple_answer": False, "unit": None}))
    assert "commas" not in one.prompt and "unit" not in one.prompt


def questions(count: int) -> list[dict]:
    return [{"question": f"Question {i}?", "answer": f"#### {i}"} for i in range(count)]


def test_a_part_of_a_task_has_the_ids_of_the_whole(file):
    write(file, *questions(10))
    whole = load_task(file)
    assert [p.id for p in whole] == [f"mine-{i}" for i in range(10)]
    assert load_task(file, skip=3, limit=4) == whole[3:7]
    assert load_task(str(file), skip=8, limit=4) == whole[8:]


def test_what_editors_do_to_files(file):
    write(file, *questions(3))
    plain = load_task(file)
    write(file, *questions(3), end="\r\n\r\n")
    assert load_task(file) == plain
    file.write_bytes(b"\xef\xbb\xbf" + file.read_bytes() + b"  \n")
    assert load_task(file) == plain
    file.write_text(
        json.dumps({"question": "a\u2028b\x85c é", "answer": "#### 1"}, ensure_ascii=False)
    )
    assert load_task(file)[0].question == "a\u2028b\x85c é"


GOOD = json.dumps(GSM8K).encode()
BROKEN = {
    b"": r"is empty, expected one JSON object a line",
    b"\n \n": r"is empty",
    GOOD + b"\n{'a': 1}\n": r"line 2: is not JSON",
    GOOD + b"\n\n" + GOOD[:-5]: r"line 3: is not JSON",
    b"[1]": r"line 1: is list, expected a JSON object",
    b"[" * 100_000: r"line 1: is not JSON",
    b'{"question": "caf\xe9"}': r"line 1: is not UTF-8 \(byte 0xe9 at 17\)",
    b'{"question": "\\ud800", "answer": 1}': r"line 1: is not JSON",
    GOOD.decode().encode("utf-16"): r"is UTF-16, expected UTF-8",
    b'{"text": "a", "label": 1}': r"line 1: fields text, label; expected, .*question and answer",
    b"{}": r"line 1: fields none; expected",
    b'{"question": " ", "answer": 1}': r"line 1: fields question, answer; expected, none of them empty",
    b'{"question": 3, "answer": 1}': r"line 1: fields question, answer; expected",
    b'{"question": "Q", "answer": null}': r"line 1: fields question, answer; expected",
    b'{"question": "Q", "answer": true}': r"line 1: fields question, answer; expected",
    b'{"question": "Q", "answer": NaN}': r"line 1: is not JSON",
    b'{"question": "Q", "final_answer": []}': r"line 1: fields question, final_answer; expected",
    b'{"problem": "Q", "solution": "no box"}': r"line 1: fields problem, solution; expected",
    b'{"question": "Q", "answer": "So it is 4."}': r"line 1: its `answer` ends in 'So it is 4.', exp",
    b'{"question": "Q", "answer": "#### none"}': r"line 1: its `answer` ends in",
    b'{"question": "Q", "answer": "#### 5 or 6"}': r"line 1: its `answer` ends in '#### 5 or 6', expected",
    b'{"question": "Q", "answer": "#### 3:30"}': r"line 1: its `answer` ends in",
    b'{"question": "Q", "answer": "#### (500)"}': r"line 1: its `answer` ends in",
    b'{"question": "Q", "answer": "#### 3,50"}': r"line 1: its `answer` ends in",
    b'{"question": "Q", "answer": "#### 5 to 7"}': r"line 1: its `answer` ends in",
    b'{"question": "Q", "answer": "#### 5 or more"}': r"line 1: its `answer` ends in",
    b'{"problem": "Q", "answer": "' + b"x" * 10_001 + b'"}': r"line 1: its answer has 10,001 char",
    b'{"question": "Q", "answer": "#### ' + b"1" * 10_001 + b'"}': r"line 1: its answer has 10,001",
    b'{"question": "Q", "answer": 1e999}': r"line 1: ",
    GOOD + b"\n" + GOOD: r"line 2: has the question of line 1\. Remove one",
    b'{"id": 1, "question": "A", "answer": 1}\n{"id": 1, "question": "B", "answer": 1}':
        r"line 2: has the id of line 1",
}  # fmt: skip


@pytest.mark.parametrize(("content", "message"), BROKEN.items())
def test_a_broken_file_is_named_with_its_line(file, content, message):
    file.write_bytes(content)
    with pytest.raises(InputError, match=f"^{re.escape(str(file))}: {message}"):
        load_task(file)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("gsm9k", {}, r"gsm9k: no such file, and no task; the tasks are gsm8k, .*, demo"),
        (".", {}, r"\.: cannot be read \(Is a directory\)"),
        ("demo", {"split": "dev"}, r"demo: has no split 'dev'; it has test and train"),
        ("demo", {"revision": "main"}, r"demo: only tasks of the Hub have a revision"),
        ("demo", {"skip": 10_000}, r"demo: has \d+ problems, none after the first 10000"),
        ("demo", {"skip": -1}, r"skip -1"),
        ("demo", {"limit": 0}, r"limit 0: expected .* limit >= 1"),
        ("math500", {"split": "train"}, r"math500: has no split 'train'; it has test\."),
        ("FILE", {"split": "test"}, r"mine.jsonl: a file has no split 'test'"),
        ("FILE", {"skip": 2}, r"mine.jsonl: has 2 problems, none after the first 2"),
    ],
)
def test_refusals(file, name, options, message):
    write(file, *questions(2))
    with pytest.raises(InputError, match=message):
        load_task(file if name == "FILE" else name, **options)


def test_the_demo_problems():
    test, train = load_task("demo"), load_task("demo", split="train")
    assert load_task("demo", skip=5, limit=3) == test[5:8]
    for problems in (test, train):
        assert len({p.id for p in problems}) == len({p.question for p in problems}) == len(problems)
    assert not {p.question for p in test} & {p.question for p in train}
    assert grade(test[0], f"... ={test[0].answer}.\n#### {test[0].answer}").correct


@pytest.mark.parametrize(
    ("name", "count", "rule"),
    [
        ("gsm8k-train-first1000", 1000, "number"),
        ("gsm8k-test-first659", 659, "number"),
        ("MATH-500", 500, "boxed"),
        ("amc23", 40, "boxed"),
        ("aime24", 30, "boxed"),
        ("olympiadbench", 675, "boxed"),
    ],
)
def test_the_published_files(name, count, rule):
    path = SHARED / "data" / f"{name}.jsonl"
    if not path.is_file():
        pytest.skip(f"no {path.name} in the shared data")
    problems = load_task(path)
    assert len({p.id for p in problems}) == count
    assert {p.rule for p in problems} == {rule}
    assert not any("$" in p.answer.replace("\\$", "") for p in problems)


# Prints the problems that each call gave, or what our error said.
ASK = """
import dataclasses, json, sys
from mlx_densesteer.errors import DenseSteerError
from mlx_densesteer.evaluation.tasks import load_task
if sys.argv[2:] == ["without pyarrow"]:
    sys.modules["pyarrow"] = None
answers = []
for name, options in json.loads(sys.argv[1]):
    try:
        answers.append([dataclasses.asdict(p) for p in load_task(name, **options)])
    except DenseSteerError as error:
        answers.append(f"{type(error).__name__}: {error}")
print(json.dumps(answers))
"""


@pytest.fixture(scope="module")
def data_sets(tmp_path_factory) -> dict[str, Path]:
    """The Hub's data sets in small, with the names and formats of their files."""
    pyarrow = pytest.importorskip("pyarrow", reason="needs the extra eval")
    from pyarrow import parquet

    part, records = "-00000-of-00001.parquet", questions(5)
    olympiad = "OlympiadBench/OE_TO_maths_en_COMP/OE_TO_maths_en_COMP.parquet"
    files = {
        "openai/gsm8k": {f"main/test{part}": records[:3], f"main/train{part}": records[3:]},
        "HuggingFaceH4/MATH-500": {"test.jsonl": [MATH]},
        "math-ai/amc23": {f"test{part}": [AMC]},
        "math-ai/aime24": {f"test{part}": [AIME]},
        "Hothan/OlympiadBench": {olympiad: [OLYMPIAD]},
    }
    folders = {}
    for repo, contents in files.items():
        folder = folders[f"datasets/{repo}"] = tmp_path_factory.mktemp("data") / repo
        for name, rows in contents.items():
            path = folder / name
            path.parent.mkdir(parents=True, exist_ok=True)
            if path.suffix == ".parquet":
                parquet.write_table(pyarrow.Table.from_pylist(rows), path)
            else:
                write(path, *rows)
    return folders


@pytest.fixture
def hub(data_sets):
    with HubServer(data_sets) as server:
        yield server


@pytest.fixture
def ask(hub, tmp_path):
    """Return a function that loads tasks in one process with an empty cache."""
    ours = re.compile(r"HF_|HUGGING|TRANSFORMERS_|XDG_CACHE|.*_PROXY$", re.IGNORECASE)
    base = {k: v for k, v in os.environ.items() if not ours.match(k)} | {
        "HOME": str(tmp_path), "HF_HOME": str(tmp_path / "hf"), "HF_ENDPOINT": hub.url,
        "HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_TELEMETRY": "1", "NO_PROXY": "*",
        "PYTHONPATH": os.pathsep.join(
            filter(None, [str(ROOT), str(QUICK_RETRIES), os.environ.get("PYTHONPATH")])
        ),
    }  # fmt: skip

    def run(*calls: tuple[str, dict], mode: str | None = None, **environment: str) -> list:
        done = subprocess.run(
            [sys.executable, "-c", ASK, json.dumps(calls), *filter(None, [mode])],
            cwd=tmp_path, env=base | environment, capture_output=True, text=True, timeout=120,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout)

    return run


TASK_CALLS = [
    ("gsm8k", {}), ("gsm8k", {"split": "train", "skip": 1}), ("math500", {}), ("amc23", {}),
    ("aime24", {}), ("olympiad", {}),
]  # fmt: skip


def test_tasks_of_the_hub(ask, hub):
    test, train, math, amc, aime, olympiad = ask(*TASK_CALLS)
    assert [p["id"] for p in test] == ["gsm8k-test-0", "gsm8k-test-1", "gsm8k-test-2"]
    assert Problem(**train[0]) == Problem(
        "gsm8k-train-1", "Question 4?", "Question 4?", "4", "number"
    )
    assert [p["id"] for p in math + amc + aime + olympiad] == [
        "math500-test/pre/807.json", "amc23-7", "aime24-60", "olympiad-1606"
    ]  # fmt: skip
    assert [p["answer"] for p in amc + aime + olympiad] == ["27", "204", "69,84"]
    before = len(hub.gets("/datasets/"))
    hub.stop()
    assert ask(*TASK_CALLS) == [test, train, math, amc, aime, olympiad]  # from the cache
    assert before == 6


def test_the_hub_refuses(ask, hub):
    gated = {"X-Error-Code": "GatedRepo"}
    hub.faults.refuse = {
        "datasets/openai/gsm8k": (401, gated),
        "datasets/math-ai/amc23": (401, {"X-Error-Message": "Invalid credentials"}),
        "datasets/math-ai/aime24": (404, {"X-Error-Code": "RepoNotFound"}),
    }
    del hub.folders["datasets/Hothan/OlympiadBench"]
    calls = {
        ("gsm8k", None): r"HubError: data set openai/gsm8k: is gated.*`hf auth login`",
        ("amc23", None): r"HubError: .*amc23: the Hub answered with 401. Check your token",
        ("aime24", None): r"HubError: .*aime24: is not on the Hub, or it is private",
        ("olympiad", None): r"HubError: .*OlympiadBench: is not on the Hub, or it is private",
        ("math500", "v9"): r"HubError: .*MATH-500: has no revision 'v9'\.",
    }
    answers = ask(*[(name, {"revision": revision}) for name, revision in calls])
    for answer, pattern in zip(answers, calls.values(), strict=True):
        assert re.match(pattern, answer), answer
        assert "\n" not in answer


def test_a_data_set_that_has_changed(ask, hub, tmp_path):
    repo = "datasets/math-ai/aime24"
    hub.folders |= {repo: tmp_path / "empty"}
    [answer] = ask(("aime24", {}))
    assert answer.startswith("HubError: data set math-ai/aime24: has no file test-00000-of-00001.")
    damaged = tmp_path / "empty" / "test-00000-of-00001.parquet"
    damaged.parent.mkdir()
    damaged.write_bytes(b"PAR1 and nothing more")
    [answer] = ask(("aime24", {}))
    assert re.match(r"InputError: .*\.parquet: is no Parquet file", answer), answer


def test_without_a_network(ask, hub):
    hub.stop()
    [answer] = ask(("math500", {}))
    assert "MATH-500: the Hub cannot be reached, and there is no complete copy" in answer
    assert "name a local JSONL file" in answer


def test_a_silent_hub_is_asked_once(ask, hub):
    ask(("math500", {}))
    before = len(hub.requests)
    hub.faults.silent = True
    [answer] = ask(("math500", {}), HF_HUB_ETAG_TIMEOUT="1")
    assert answer[0]["id"] == "math500-test/pre/807.json"
    assert len(hub.requests) - before <= 2


def test_a_failing_hub(ask, hub):
    ask(("math500", {}))
    hub.faults.status = 503
    [answer] = ask(("math500", {}))
    assert answer[0]["id"] == "math500-test/pre/807.json"


def test_without_pyarrow(ask, hub):
    parquet, jsonl = ask(("gsm8k", {}), ("math500", {}), mode="without pyarrow")
    assert install_command("eval") in parquet
    assert "name a local JSONL file" in parquet
    assert jsonl[0]["rule"] == "boxed"
