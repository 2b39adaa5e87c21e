import math
from decimal import Decimal

import pytest

from mlx_densesteer.quantities import given, written
from mlx_densesteer.tasks import Problem
from mlx_densesteer.verification import REASONS, Response, new_numbers, verify

PROBLEM = Problem(
    "t-1", "Ann has 12 eggs and eats half.", "Ann has 12 eggs and eats half.", "6", "number"
)
ORIGINAL = Response("Ann has 12 eggs.\n\nHalf of 12 is 12/2 = 6.\n\nShe has 6 left.", 30, 0.1)
DENSE = "Ann has 12 eggs. Half of 12 is 12/2 = 6. She has 6 left."


def reasons(text=DENSE, tokens=28, nll=0.2, truncated=False, problem=PROBLEM, **options):
    return verify(problem, ORIGINAL, Response(text, tokens, nll, truncated), **options)


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
        ({"nll": 0.61}, "unlikely"),
        ({"nll": math.nan}, "unlikely"),
    ],
)  # fmt: skip
def test_each_fault_has_its_reason_and_no_other(changes, reason):
    assert reasons(**changes) == (reason,)


def test_no_rewrite_at_all():
    assert verify(PROBLEM, ORIGINAL, None) == ("no rewrite",)
    assert verify(PROBLEM, Response(DENSE, 28, 0.1), None) == ("single step",)


def test_every_fault_is_named_in_the_order_of_the_list():
    found = reasons("3 eggs.\n\n4 eggs.\n\n5 eggs.", 3, 9.0, True)
    assert found == tuple(r for r in REASONS if r not in ("single step", "no rewrite", "empty"))


def test_the_margin_is_above_the_original():
    assert reasons(nll=1.0, nll_margin=1.0) == ()
    assert reasons(nll=1.2, nll_margin=1.0) == ("unlikely",)
    assert reasons(nll=0.0, nll_margin=0.0) == ()
    assert reasons(nll=None) == ()


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
        ("none, done, often", []),
    ],
)  # fmt: skip
def test_numbers_that_are_given(text, numbers):
    assert given(text) == {Decimal(n) for n in numbers}


def test_what_the_question_gives_in_words_or_percent_is_not_new():
    problem = Problem("t", "q", "A third of 90 eggs and 20% more.", "6", "number")
    assert new_numbers(problem, "", "90/3 = 30, and 0.2 of it is 6") == ["30", "6"]
