from dataclasses import asdict

import numpy as np
import pytest

from mlx_densesteer.evaluation.answers import Answer
from mlx_densesteer.evaluation.intervals import mcnemar, wilson
from mlx_densesteer.evaluation.scoring import score


def answers(correct, tokens, steps, nll=None, steering="unsteered", **more):
    return {
        f"p{i}": Answer(
            problem=f"p{i}", content="", steering=steering, text="", token_ids=(1,) * t, steps=s,
            finish_reason="stop", found=None, correct=c, by_reference=c, by_math_verify=None,
            seconds=2.0, nll=None if nll is None else nll[i], **more,
        )
        for i, (c, t, s) in enumerate(zip(correct, tokens, steps, strict=True))
    }  # fmt: skip


def test_figures_of_one_setting():
    one = score(answers([True, True, False, True], [10, 20, 30, 40], [1, 2, 3, 4], [1, 2, 3, 6]))
    assert (one.problems, one.correct, one.accuracy.value) == (4, 3, 0.75)
    assert (one.accuracy.low, one.accuracy.high) == pytest.approx(wilson(3, 4))
    assert (one.steps.value, one.tokens.value, one.density, one.nll.value) == (2.5, 25, 10, 3)
    assert one.tokens.low < 25 < one.tokens.high
    assert (one.truncated, one.disagreements, one.seconds) == (0, 0, 2.0)
    assert one.against_unsteered is None


def test_comparison_is_paired_on_the_problems_that_both_have():
    unsteered = answers([True] * 6 + [False] * 6, [100] * 12, [5] * 12, [1.0] * 12)
    steered = answers([False] + [True] * 11, [80] * 12, [2] * 12, [1.5] * 12, "steered")
    del steered["p11"]
    compared = score(steered, unsteered).against_unsteered
    assert (compared.problems, compared.better, compared.worse) == (11, 5, 1)
    assert compared.p == mcnemar(5, 1)
    assert compared.accuracy.value == pytest.approx(4 / 11)
    assert compared.accuracy.low < 4 / 11 < compared.accuracy.high
    # every difference is the same, so there is nothing to be unsure of
    assert (compared.tokens.value, compared.tokens.low, compared.tokens.high) == (-20, -20, -20)
    assert (compared.steps.value, compared.nll.value) == (-3, 0.5)


def test_responses_without_steps_or_likelihood():
    one = score(answers([False, False], [0, 0], [0, 0]))
    assert (one.density, one.nll, one.tokens.value) == (None, None, 0)
    mixed = answers([True, False], [4, 0], [1, 0], [0.5, None])
    assert (score(mixed).nll.value, score(mixed).density) == (0.5, 4)


def test_disagreements_and_truncation_are_counted():
    rows = answers([True, True, False], [1, 2, 3], [1, 1, 1])
    rows = {
        name: Answer(**(vars(row) | {"by_math_verify": verdict, "finish_reason": reason}))
        for (name, row), verdict, reason in zip(
            rows.items(), [False, True, None], ["length", "stop", "length"], strict=True
        )
    }
    assert (score(rows).disagreements, score(rows).truncated) == (1, 2)


def test_everything_can_be_written_as_json():
    import json

    rows = answers([True, False], [1, 2], [1, 1], [0.1, np.float64(0.3)])
    document = json.dumps(asdict(score(rows, dict(rows))), allow_nan=False)
    assert json.loads(document)["against_unsteered"]["p"] == 1.0


def test_no_differing_answer_is_no_certainty():
    rows = answers([True, False, True, True, False, True], [9] * 6, [1] * 6)
    compared = score(dict(rows), rows).against_unsteered
    assert (compared.accuracy.value, compared.p) == (0, 1)
    assert compared.accuracy.low < -0.3 and compared.accuracy.high > 0.3
