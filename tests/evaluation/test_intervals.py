"""Figures to compare with were computed by scipy 1.17 and statsmodels 0.15; see each table."""

import itertools
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlx_densesteer.evaluation.intervals import (
    bootstrap,
    mcnemar,
    paired_difference,
    ratio,
    sign_flip,
    wilson,
)


# statsmodels.stats.proportion.proportion_confint(..., method="wilson")
@pytest.mark.parametrize(
    ("successes", "total", "confidence", "expected"),
    [
        (0, 10, 0.95, (0.0, 0.2775327998628892)),
        (10, 10, 0.95, (0.7224672001371107, 1.0)),
        (7, 10, 0.95, (0.39677814746114537, 0.8922087325936989)),
        (50, 100, 0.95, (0.4038315303659956, 0.5961684696340044)),
        (81, 263, 0.95, (0.2552885198782742, 0.36620957698280004)),
        (1, 100_000, 0.95, (1.7652477303783126e-06, 5.664709659040966e-05)),
        (650, 1000, 0.99, (0.6102754569605812, 0.6877471935683969)),
        (1, 1, 0.9, (0.269865948784054, 1.0)),
        (3, 40, 0.8, (0.0368337385468104, 0.14669024447490364)),
    ],
)
def test_wilson(successes, total, confidence, expected):
    assert wilson(successes, total, confidence) == pytest.approx(expected, rel=1e-9)


counts = st.integers(0, 3000)


@given(counts, counts.filter(bool), st.floats(0.5, 0.999))
def test_wilson_holds_the_share_and_mirrors(successes, more, confidence):
    total = successes + more
    low, high = wilson(successes, total, confidence)
    assert 0 <= low <= successes / total <= high <= 1
    assert low < high
    mirrored = wilson(total - successes, total, confidence)
    assert mirrored == pytest.approx((1 - high, 1 - low), abs=1e-12)
    wider = wilson(successes, total, (1 + confidence) / 2)
    assert wider[0] <= low and high <= wider[1]


# scipy.stats.binomtest(better, better + worse).pvalue
@pytest.mark.parametrize(
    ("better", "worse", "expected"),
    [
        (0, 0, 1.0),
        (1, 0, 1.0),
        (5, 0, 0.0625),
        (0, 6, 0.03125),
        (10, 2, 0.03857421875),
        (7, 7, 1.0),
        (13, 25, 0.07295138851623051),
        (120, 80, 0.005685155996750306),
        (1000, 1100, 0.03072070786424249),
        (5200, 5000, 0.04878796312682234),
        (60_000, 59_000, 0.0037798696347767836),
        (3, 900, 3.6295984285091708e-264),
        (0, 2000, 0.0),  # 2^-1999 is no float
    ],
)
def test_mcnemar(better, worse, expected):
    assert mcnemar(better, worse) == pytest.approx(expected, rel=1e-9, abs=0)


@given(st.integers(0, 60), st.integers(0, 60))
def test_mcnemar_is_the_sum_over_all_outcomes_as_unlikely(better, worse):
    total = better + worse
    tail = sum(math.comb(total, k) for k in range(min(better, worse) + 1))
    assert mcnemar(better, worse) == pytest.approx(min(1.0, 2 * tail / 2**total), rel=1e-12)
    assert mcnemar(better, worse) == mcnemar(worse, better)


# The statistic with the nuisance parameter found by brute force on the likelihood, and scipy's brentq
@pytest.mark.parametrize(
    ("better", "worse", "total", "confidence", "expected"),
    [
        (12, 2, 50, 0.95, (0.06111240623550289, 0.34470874791003864)),
        (0, 0, 50, 0.95, (-0.0713476015810446, 0.07134759913347398)),
        (5, 0, 40, 0.9, (0.05372736889184379, 0.2353237277860208)),
        (20, 35, 500, 0.95, (-0.06033272588552234, -0.0009590183609235432)),
        (3, 3, 659, 0.99, (-0.013755197896664352, 0.013755198093457162)),
    ],
)
def test_paired_difference(better, worse, total, confidence, expected):
    got = paired_difference(better, worse, total, confidence)
    assert got == pytest.approx(expected, abs=1e-7)


@given(st.integers(0, 200), st.integers(0, 200), st.integers(0, 200), st.floats(0.5, 0.999))
def test_paired_difference_holds_the_difference_and_mirrors(better, worse, same, confidence):
    total = better + worse + same
    if not total:
        return
    low, high = paired_difference(better, worse, total, confidence)
    assert -1 <= low <= (better - worse) / total + 1e-12
    assert (better - worse) / total - 1e-12 <= high <= 1
    assert high - low > 1e-4  # never a point, not even without a difference
    assert paired_difference(worse, better, total, confidence) == pytest.approx(
        (-high, -low), abs=1e-9
    )


def test_paired_difference_covers():
    rng = np.random.default_rng(3)
    drawn = rng.multinomial(200, [0.08, 0.05, 0.87], size=2000)
    bounds = {(b, w): paired_difference(b, w, 200) for b, w in {(b, w) for b, w, _ in drawn}}
    covered = sum(bounds[b, w][0] <= 0.03 <= bounds[b, w][1] for b, w, _ in drawn)
    assert 0.93 < covered / 2000 < 0.97


VALUES = np.array([3.0, -1.0, 4.0, 1.5, -5.0, 9.0, 2.0, 6.0, -5.0, 3.5] * 8) + np.arange(80) / 10


# scipy.stats.bootstrap(..., method="percentile", n_resamples=200_000)
@pytest.mark.parametrize(
    ("confidence", "low", "high"), [(0.95, 4.69125, 6.8025), (0.8, 5.05625, 6.44)]
)
def test_bootstrap(confidence, low, high):
    got = bootstrap(VALUES, resamples=100_000, confidence=confidence)
    assert got == pytest.approx((5.75, low, high), abs=0.02)
    assert bootstrap(list(VALUES), resamples=100_000, confidence=confidence) == got


def test_bootstrap_is_reproducible_and_follows_its_seed():
    assert bootstrap(VALUES, seed=1) == bootstrap(VALUES, seed=1)
    assert bootstrap(VALUES, seed=1) != bootstrap(VALUES, seed=2)


def test_bootstrap_in_many_pieces(monkeypatch):
    """The memory limit changes the draws' layout and not what they are."""
    whole = bootstrap(VALUES)
    monkeypatch.setattr("mlx_densesteer.evaluation.intervals._CELLS", 1000)
    assert bootstrap(VALUES) == whole


@given(st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=50))
def test_bootstrap_stays_within_the_values(values):
    mean, low, high = bootstrap(values, resamples=200)
    slack = 1e-9 * (1 + max(map(abs, values)))
    assert min(values) - slack <= low <= high <= max(values) + slack
    assert mean == pytest.approx(np.mean(values))


@pytest.mark.parametrize("values", [[5, 3, -1, 8, 2, -4, 6, 1], [1, 1, 1, 1, 1, 1], [0, 0, 0]])
def test_sign_flip_is_the_share_of_all_signs(values):
    signs = np.array(list(itertools.product([-1, 1], repeat=len(values))))
    share = (np.abs(signs @ values) >= abs(sum(values))).mean()
    assert sign_flip(values, resamples=40_000) == pytest.approx(share, abs=0.01)
    assert sign_flip(np.negative(values), resamples=40_000) == pytest.approx(share, abs=0.01)


def test_sign_flip_is_right_where_the_bootstrap_is_not():
    """Differences of two equal settings, one response in thirty running to the limit."""
    rng = np.random.default_rng(2)
    flip = boot = 0
    for seed in range(400):
        lengths = np.where(rng.random((2, 40)) < 1 / 30, 2048, rng.normal(150, 20, (2, 40)))
        differences = lengths[0] - lengths[1]
        flip += sign_flip(differences, resamples=1000, seed=seed) <= 0.02
        _, low, high = bootstrap(differences, resamples=1000, seed=seed, confidence=0.98)
        boot += not low <= 0 <= high
    assert flip <= 16  # 8 expected at most
    assert boot > flip


def test_a_ratio_covers_the_true_one():
    """Seconds by correct answers: 40 problems, 30 % right, wrong answers twice as long."""
    rng, covered = np.random.default_rng(4), 0
    for _ in range(400):
        right = rng.random(40) < 0.3
        seconds = rng.normal(5, 1, 40) * np.where(right, 1, 2)
        value, low, high = ratio(seconds, right)
        assert low < value < high and value == pytest.approx(seconds.sum() / right.sum())
        covered += low <= (0.3 * 5 + 0.7 * 10) / 0.3 <= high
    assert 365 <= covered <= 395  # 380 expected


def test_a_ratio_of_few_or_equal_problems():
    assert ratio([2, 2, 2], [1, 1, 1]) == (2, 2, 2)
    assert ratio([3.0], [1]) == (3, 0, math.inf)
    value, low, high = ratio([1, 1, 1, 1], [0, 0, 0, 1])
    assert value == 4 and 0 < low < 4 < high < math.inf


@pytest.mark.parametrize(
    "call",
    [
        lambda: ratio([1.0], [0.0]),
        lambda: ratio([0.0], [1.0]),
        lambda: ratio([1.0, 2.0], [1.0]),
        lambda: ratio([1.0, -1.0], [1.0, 1.0]),
        lambda: ratio([], []),
        lambda: wilson(1, 0),
        lambda: wilson(3, 2),
        lambda: wilson(-1, 2),
        lambda: wilson(1, 2, 1.0),
        lambda: mcnemar(-1, 2),
        lambda: paired_difference(3, 3, 5),
        lambda: paired_difference(0, 0, 0),
        lambda: paired_difference(1, 1, 5, 0.0),
        lambda: bootstrap([]),
        lambda: bootstrap([[1.0]]),
        lambda: bootstrap([1.0, math.nan]),
        lambda: bootstrap([1.0], resamples=0),
        lambda: bootstrap([1.0], confidence=95),
        lambda: sign_flip([]),
        lambda: sign_flip([1.0], resamples=0),
    ],
)
def test_refusals(call):
    with pytest.raises(ValueError, match="expected|fit"):
        call()
