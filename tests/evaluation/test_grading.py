import json
import os
import signal
import subprocess
import sys
import textwrap
import threading

import pytest
from helpers import SHARED

from mlx_densesteer.evaluation import grading
from mlx_densesteer.evaluation.grading import Grade, grade, last_boxed, normalise, stated_answer
from mlx_densesteer.evaluation.numbers import read_number
from mlx_densesteer.evaluation.tasks import Problem, load_task


def ask(rule: str, answer: str, response: str) -> Grade:
    return grade(Problem("p-0", "question", "prompt", answer, rule), response)


@pytest.fixture
def without_math_verify(monkeypatch):
    monkeypatch.setitem(sys.modules, "math_verify", None)


@pytest.fixture
def math_verify():
    pytest.importorskip("math_verify", reason="needs the extra eval")


# What the checkpoint writes, and what is hard about numbers: correct, found, the reference.
NUMBERS = [
    ("72", "In total she sold\n\\[\n48 + 24 = 72\n\\]\nclips: \\(\\boxed{72}\\).", True, "72", True),
    ("72", "She sold $$\\boxed{72}$$", True, "72", False),  # the reference reads "$$"
    ("72", "She sold 72...", True, "72", False),
    ("72", "She sold 72.", True, "72", True),
    ("72", "She earned $72.00.", True, "72.00", False),
    ("72", "48 + 24 = 72 clips in 2 months", False, "2", False),
    ("72", "She sold **72** clips", True, "72", True),
    ("2,125", "That makes $2,125.", True, "2125", True),
    ("109,200,000", "about 109200000 people", True, "109200000", True),
    ("1450000", "1,450,000", True, "1450000", True),
    ("-10", "The change is -10 degrees", True, "-10", True),
    ("10", "The change is -10 degrees", False, "-10", False),
    ("8", "#### 8", True, "8", True),
    ("8", "It is 8 - or so,", True, "8", True),
    ("18", "at 18:30", False, "18:30", False),
    ("3.5", "3.5 hours", True, "3.5", True),
    ("500", "So 9{,}500.", False, "9500", True),  # the reference reads "500"
    ("5", "see section 1.2.3", False, "1.2.3", False),
    ("5", "no idea", False, None, False),
    ("5", "$$ .. ,,", False, None, False),
    ("5", "", False, None, False),
]  # fmt: skip


@pytest.mark.parametrize(("gold", "response", "correct", "found", "by_reference"), NUMBERS)
def test_the_last_number(gold, response, correct, found, by_reference):
    assert ask("number", gold, response) == Grade(correct, found, by_reference, None)


@pytest.mark.parametrize(
    ("text", "content"),
    [
        (r"\boxed{5}", "5"),
        (r"\boxed{4}, no, $\boxed{ \frac{1}{2} }$.", r"\frac{1}{2}"),
        (r"\boxed {5}", "5"),
        (r"\boxed{\{1, 2\}}", r"\{1, 2\}"),
        (r"\boxed{\left\{ x \right.} and }", r"\left\{ x \right."),
        (r"\boxed{\boxed{5}}", "5"),
        (r"\boxed{4} and then \boxed{5", "4"),  # cut off
        (r"\boxed{4} and then \boxed{}, \boxed{ \, }, \boxed{\text{ }}", "4"),
        (r"\boxed{4} and then \boxed 5", "5"),
        (r"\boxed 1.5.", "1.5"),
        (r"\fbox{5}", "5"),
        (r"\boxed{x = \boxed{5", None),
        (r"\boxed{x = \boxed{5}", "5"),
        (r"} \boxed{5} }", "5"),
        (r"\boxed{\begin{pmatrix} 1 \\ 2 \end{pmatrix}}", r"\begin{pmatrix} 1 \\ 2 \end{pmatrix}"),
        (r"\boxed{\emptyset}", r"\emptyset"),
        (r"\boxed", None),
        ("5", None),
        ("", None),
    ],
)
def test_the_last_box(text, content):
    assert last_boxed(text) == content


# Gold answers of MATH-500, AMC, AIME and OlympiadBench, an answer, the string rule, math-verify.
BOXES = [
    ("25", "025", True, True),
    ("27", "27.0", True, True),
    ("9.5", "9.50", True, True),
    (r"\frac{14}{3}", "14/3", True, True),
    (r"\frac{14}{3}", r"\dfrac{14}{3}", True, True),
    (r"\frac43", r"\frac{4}{3}", True, True),
    (r"\frac{14}{3}", r"4\frac{2}{3}", False, True),
    (r"\frac{14}{3}", "4.67", False, False),
    (r"-\frac{24}{25}", r"\frac{-24}{25}", False, True),
    (r"11\sqrt2", r"11\sqrt{2}", True, True),
    (r".35625", "0.35625", True, True),
    (r"90^\circ", "90", True, True),
    (r"10,\!080", "10080", True, True),
    (r"11,\! 111,\! 111,\! 100", "11111111100", True, True),
    ("58,500", "58500", True, True),
    (r"\$32,\!348", "32,348", True, True),
    (r"\$18.90", "18.9", True, True),
    (r"\$18.90", "18.09", False, False),
    (r"864 \mbox{ inches}^2", "864", True, True),
    (r"5.4 \text{ cents}", "5.4", True, True),
    (r"\text{Evelyn}", "Evelyn", True, True),
    (r"\text{Evelyn}", r"\text{Navin}", False, False),
    (r"\text{(C)}", "C", False, True),
    (r"\text{even}", r"\text{odd}", False, False),
    ("x=5", "5", True, True),
    (r"x \in [-2,7]", "[-2,7]", True, True),
    ("(3,4]", "(3, 4]", True, True),
    ("(3,4]", "(3,4)", False, False),
    (r"\left( 3, \frac{\pi}{2} \right)", r"(3,\frac{\pi}{2})", True, True),
    ("1,-2", "-2,1", False, True),
    ("3, 5, 7", r"\{7,5,3\}", False, True),
    (r"1 \pm \sqrt{19}", r"1+\sqrt{19},1-\sqrt{19}", False, True),
    (r"(-\infty, 2) \cup (3, \infty)", r"(3,\infty)\cup(-\infty,2)", False, True),
    (r"\begin{pmatrix} 1/5 \\ -18/5 \end{pmatrix}", r"\begin{bmatrix} \frac15 \\ -\frac{18}{5} \end{bmatrix}", False, True),
    ("6 - 5i", "-5i+6", False, True),
    (r"52_8", "52_{8}", False, True),
    ("62.5%", r"62.5\%", True, True),
    (r"2^{1009}", "2^1009", False, True),
    (r"\frac{n(n+1)(2 n+1)}{6}", r"\frac{1}{6}n(n+1)(2n+1)", False, True),
    ("2", r"\text{2 hours or 3}", False, False),
    ("352146,362145", "352146, 362145", True, True),
]  # fmt: skip


@pytest.mark.parametrize(("gold", "answer", "by_reference", "by_math_verify"), BOXES)
def test_a_boxed_answer(gold, answer, by_reference, by_math_verify, math_verify):
    response = f"Some words.\n\nFinal Answer: $\\boxed{{{answer}}}$."
    assert ask("boxed", gold, response) == Grade(
        by_math_verify, answer.strip(), by_reference, by_math_verify
    )


@pytest.mark.parametrize(("gold", "answer", "by_reference", "by_math_verify"), BOXES)
def test_without_math_verify_numbers_and_the_string_rule_count(
    gold, answer, by_reference, by_math_verify, without_math_verify
):
    got = ask("boxed", gold, f"\\boxed{{{answer}}}")
    mixed = by_math_verify and "frac" in answer and read_number(answer) is not None
    assert got == Grade(by_reference or mixed, answer.strip(), by_reference, None)


@pytest.mark.parametrize("response", ["", "The answer is 5.", "\\boxed{5", "\\boxed{}"])
def test_no_box_no_answer(response):
    assert ask("boxed", "5", response) == Grade(False, None, False, None)


def test_normalising_twice_changes_nothing_more():
    for gold, answer, *_ in BOXES:
        for text in (gold, answer):
            assert normalise(normalise(text)) == normalise(text)


@pytest.mark.parametrize(
    "name",
    [
        "aime24",
        "amc23",
        "gsm8k-test-first659",
        pytest.param("MATH-500", marks=pytest.mark.slow),
        pytest.param("olympiadbench", marks=pytest.mark.slow),
    ],
)
def test_every_gold_answer_is_right(name):
    path = SHARED / "data" / f"{name}.jsonl"
    if not path.is_file():
        pytest.skip(f"no {path.name} in the shared data")
    for number, problem in enumerate(load_task(path)):
        answer = f"\\boxed{{{problem.answer}}}"
        got = grade(problem, f"Hence \\({answer}\\).")
        assert got.correct and got.by_reference and got.by_math_verify in (True, None), problem
        if number % 5:  # a wrong one in its place is tried for some
            continue
        got = grade(problem, f"Hence \\({answer.replace(problem.answer, '1234567')}\\).")
        assert not got.correct, problem


HOSTILE = ["9^{9^{9^{9}}}", "(" * 1900, "100000000!"]


def test_a_hostile_answer_gets_no_verdict_and_the_next_one_does(math_verify, monkeypatch):
    judge = grading._Judge(seconds=2)
    monkeypatch.setattr(grading, "_judge", judge)
    for answer in HOSTILE:
        assert ask("boxed", "4", f"\\boxed{{{answer}}}") == Grade(False, answer, False, None)
        assert grading.agree("1/2", "0.5") is True
    assert ask("boxed", "4", f"\\boxed{{{'1' * 50_000}}}").by_math_verify is None
    judge._stop()


def test_a_killed_judge_is_replaced(math_verify, monkeypatch):
    judge = grading._Judge()
    monkeypatch.setattr(grading, "_judge", judge)
    assert grading.agree("5", "5.0") is True
    judge._process.kill()
    judge._process.wait()
    assert grading.agree("5", "5.0") is None
    assert grading.agree("5", "5.0") is True
    judge._stop()


def test_threads_and_the_callers_alarm(math_verify):
    """math-verify's own timeout refuses threads and takes away the caller's alarm."""
    verdicts = []
    cases = [("1/2", "0.5"), ("1/2", "0.6")] * 5
    threads = [
        threading.Thread(target=lambda c=c: verdicts.append((c, grading.agree(*c)))) for c in cases
    ]
    previous = signal.signal(signal.SIGALRM, lambda *_: None)
    signal.alarm(1000)
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert grading.agree("2", "2") is True
    left = signal.alarm(0)
    signal.signal(signal.SIGALRM, previous)
    assert left > 0
    assert sorted(verdicts) == sorted((c, c[1] == "0.5") for c in cases)


def test_ctrl_c_ends_the_caller_and_the_judge(math_verify, tmp_path):
    program = textwrap.dedent("""
        import json, sys
        from mlx_densesteer.evaluation import grading as e
        e._judge = e._Judge(seconds=30)
        e.agree("1", "1")
        print(e._judge._process.pid, flush=True)
        try:
            e.agree("4", "9^{9^{9^{9}}}")
        except KeyboardInterrupt:
            print(json.dumps([e._judge._process is None, e.agree("1", "2")]), flush=True)
    """)
    process = subprocess.Popen(
        [sys.executable, "-c", program], stdout=subprocess.PIPE, text=True, cwd=tmp_path
    )
    pid = int(process.stdout.readline())
    _wait_for_work(pid)
    process.send_signal(signal.SIGINT)
    assert json.loads(process.stdout.readline()) == [True, False]
    assert process.wait(60) == 0
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)


def _wait_for_work(pid: int) -> None:
    """Wait until the judge has computed for some time: the question has arrived."""
    before = _cpu_seconds(pid)
    for _ in range(600):
        if _cpu_seconds(pid) > before + 0.3:
            return
        threading.Event().wait(0.05)
    pytest.fail("the judge does not compute")


def _cpu_seconds(pid: int) -> float:
    done = subprocess.run(["ps", "-o", "time=", "-p", str(pid)], capture_output=True, text=True)
    hours, minutes, seconds = ("0:" * 2 + done.stdout.strip()).replace("-", ":").split(":")[-3:]
    return 3600 * int(hours) + 60 * int(minutes) + float(seconds)


@pytest.mark.parametrize(
    ("response", "answer"),
    [
        ("41-9=32.\n#### 32", "32"),
        ("so\n#### 9,500.0 stones \n", "9500"),
        ("#### 1\nNo: \\boxed{2} or \\boxed{\\$3{,}000}", "3000"),
        ("#### 50%", "50"),
        ("\\boxed{50\\%}", "50"),
        ("#### 0.5%", "0.005"),
        ("#### 0.50", "0.5"),
        ("\\boxed{0.5}", "0.5"),
        ("\\boxed{\\frac{1}{2}}", "0.5"),
        ("\\boxed{-\\frac{2}{6}}", "-1/3"),
        ("#### $12.50", "12.5"),
        ("\\boxed{x + 1}", "x+1"),
        ("\\boxed{\\text{Monday}}", "Monday"),
        ("\\boxed{Monday}", "Monday"),
        ("#### Final Answer: \\boxed{72}", "72"),
        ("So \\boxed{72}.\n#### 1. Setup", "72"),
        ("#### 1.Setup", None),
        ("#### Step 1", None),
        ("It is 5.", None),
        ("", None),
        ("####", None),
        ("#### " + "9" * 5000, None),
        ("\\boxed{" + "9" * 1900 + "}", "9" * 1900),
    ],
)
def test_the_answer_that_a_response_marks(response, answer):
    assert stated_answer(response) == answer
