import math
import subprocess
import sys
from decimal import Decimal

import pytest

from mlx_densesteer.evaluation.tasks import Problem
from mlx_densesteer.extraction.verification import (
    REASONS,
    Response,
    given,
    is_unlikely,
    most_tokens,
    new_numbers,
    verify,
    written,
)

PROBLEM = Problem(
    "t-1", "Ann has 12 eggs and eats half.", "Ann has 12 eggs and eats half.", "6", "number"
)
ORIGINAL = Response("Ann has 12 eggs.\n\nHalf of 12 is 12/2 = 6.\n\nShe has 6 left.", 30, 0.1)
DENSE = "Ann has 12 eggs. Half of 12 is 12/2 = 6. She has 6 left."


def reasons(text=DENSE, tokens=28, truncated=False, **options):
    return verify(PROBLEM, ORIGINAL, Response(text, tokens, truncated=truncated), **options)


def test_a_denser_form_of_the_same_reasoning_is_accepted():
    assert reasons() == ()


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"text": " \n\n "}, "empty"),
        ({"truncated": True}, "truncated"),
        ({"text": DENSE.replace("6 left", "12 left")}, "other answer"),
        ({"text": DENSE.replace("She", "With 3 more gone, 6-3+3, she")}, "new number"),
        ({"text": ORIGINAL.text, "tokens": 60}, "not fewer steps"),
        ({"tokens": 10}, "not denser"),
        ({"tokens": 102}, "too long"),
        ({"longest": 27}, "too long"),
    ],
)  # fmt: skip
def test_each_fault_has_its_reason_and_no_other(changes, reason):
    assert reasons(**changes) == (reason,)


def test_a_shorter_form_need_be_no_denser():
    same_steps = "Ann has 12.\n\n12/2 = 6.\n\nShe has 6 left."
    assert reasons(same_steps, 20) == ("not fewer steps", "not denser")
    assert reasons(same_steps, 20, shorter=True) == ()
    assert reasons(DENSE, 30, shorter=True) == ("not shorter",)
    one = Response(DENSE, 28, 0.1)
    assert verify(PROBLEM, one, Response("12/2 = 6.", 8), shorter=True) == ()


def test_no_rewrite_at_all():
    assert verify(PROBLEM, ORIGINAL, None) == ("no rewrite",)
    assert verify(PROBLEM, Response(DENSE, 28, 0.1), None) == ("single step",)


def test_every_fault_is_named_in_the_order_of_the_list():
    found = reasons("3 eggs.\n\n4 eggs.\n\n5 eggs.", 3, True)
    alone = ("single step", "no rewrite", "empty", "too long", "not shorter", "unlikely")
    assert found == tuple(r for r in REASONS if r not in alone)


def test_the_margin_is_above_the_original():
    assert not is_unlikely(0.1, 1.0, 1.0) and is_unlikely(0.1, 1.2, 1.0)
    assert not is_unlikely(0.1, 0.0, 0.0) and not is_unlikely(0.1, 0.6) and is_unlikely(0.1, 0.61)
    assert is_unlikely(0.1, math.nan) and is_unlikely(math.nan, 0.1)


def test_a_rewrite_may_have_a_quarter_more_and_64_tokens():
    assert most_tokens(30) == 101 and reasons(tokens=101) == ()


def test_a_text_that_is_too_long_is_not_graded(monkeypatch):
    monkeypatch.setattr("mlx_densesteer.extraction.verification.grade", None)
    assert reasons("1 2 " * 6000, 24000, True) == ("too long",)


HOSTILE = {
    "digits": "1" * 100_000, "then blanks": "1" * 50_000 + " " * 50_000, "blanks": "1 " * 50_000,
    "points": "1." * 50_000, "groups": "1" + ",111" * 25_000 + "1", "percent": "1%" * 50_000,
    "commas": "1{,}" * 25_000, "labels": " " * 50_000 + "#" * 50_000, "lines": "\n" * 100_000,
    "stars": "*" * 100_000, "step": "step" + " " * 100_000, "words": "twenty " * 14_000,
    "fraction": "." + "1" * 100_000, "two fractions": f"{'1' * 50_000}.{'1' * 50_000}",
}  # fmt: skip
READ = (
    "import sys\nfrom mlx_densesteer.extraction.verification import given, written\n"
    "text = sys.stdin.read()\nprint(len(written(text)), len(given(text)))"
)


@pytest.mark.parametrize("text", HOSTILE.values(), ids=HOSTILE)
def test_no_text_of_100_000_characters_takes_long(text):
    """A pattern that goes back over what it read takes ten minutes here, a linear one a moment."""
    subprocess.run([sys.executable, "-c", READ], input=text, text=True, check=True, timeout=60)


def test_a_boxed_answer_is_compared_by_its_rule():
    problem = Problem("b-1", "x?", "x?", r"\frac{1}{2}", "boxed")
    original = Response("First.\n\nSo 1/2: \\boxed{\\frac{1}{2}}", 20, 0.1)
    good = Response("First. So \\boxed{\\frac{1}{2}}", 18, 0.1)
    bad = Response("First. So \\boxed{\\frac{2}{1}}", 18, 0.1)
    assert verify(problem, original, good) == ()
    assert verify(problem, original, bad) == ("other answer",)


@pytest.mark.parametrize(
    ("text", "numbers"),
    [
        ("12 eggs, $2.50 and 1,000.", ["12", "2.5", "1000"]),
        (r"1{,}000 and 2\,000 and 12,5", ["1000", "2000", "12", "5"]),
        ("-3 + 0.10 = .1", ["3", "0.1"]),
        ("1. First\n2) Second\n**Step 3:** third\n- 4 eggs", ["4"]),
        (r"\frac{3}{4} \times 2 = 1.5", ["3", "4", "2", "1.5"]),
        ("3.14.", ["3.14"]),
        ("9\u202f500 m\u00b2, \uff14 cm^2 and 1'200 x^{3}", ["9500", "4", "1200"]),
        (r"3{,}5 and 12{,}345{,}678 and 2 500 mL", ["3.5", "12345678", "2", "500"]),
        ("9" * 5000, ["9" * 5000]),
        ("no number, two words", []),
    ],
)  # fmt: skip
def test_numbers_that_are_written(text, numbers):
    assert written(text) == {Decimal(n) for n in numbers}


@pytest.mark.parametrize(
    ("text", "numbers"),
    [
        ("Half a dozen, twenty-five", ["0.5", "1", "2", "12", "20", "5", "25"]),
        (r"35\% of it", ["35", "0.35", "100"]),
        ("1. one", ["1"]),
        ("Twice, once", ["2", "1"]),
        ("1.2.5 %, .5\\%, x3percent", ["1.2", "0.025", "100", "0.005", "0.5", "0.03", "3"]),
        ("12percent and 3 percents", ["12", "0.12", "100", "3"]),
        ("none, done, often", []),
    ],
)  # fmt: skip
def test_numbers_that_are_given(text, numbers):
    assert given(text) == {Decimal(n) for n in numbers}


def test_what_the_question_gives_in_words_or_percent_is_not_new():
    problem = Problem("t", "q", "A third of 90 eggs and 20% more.", "6", "number")
    assert new_numbers(problem, "", "90/3 = 30, and 0.2 of it is 6") == ["30", "6"]
