"""How sure a figure is: intervals and paired tests, pure functions. numpy only.

Sources: Wilson (1927) for a proportion; McNemar (1947) in its exact form and Tango (1998) for
two settings on the same problems; the percentile bootstrap of Efron (1979) for means; the delta
method for the logarithm of a ratio of means.
"""

import math
from collections.abc import Callable, Sequence
from statistics import NormalDist

import numpy as np

FEW = 20  # values below which the bootstrap's interval is clearly too narrow
_CELLS = 2**22  # drawn at a time by the bootstrap: 16 MB of indices, 32 MB of values


def wilson(successes: int, total: int, confidence: float = 0.95) -> tuple[float, float]:
    """Return Wilson's score interval of a proportion.

    ``(p + z^2/2n -+ z sqrt(p(1-p)/n + z^2/4n^2)) / (1 + z^2/n)`` with p = successes / total.

    Raises:
        ValueError: not 0 <= successes <= total with total > 0, or a confidence outside (0, 1).
    """
    if not 0 <= successes <= total or total == 0:
        raise ValueError(f"{successes} of {total}: expected 0 <= successes <= total, total > 0.")
    z = _quantile(confidence)
    p, z2 = successes / total, z * z / total
    middle = (p + z2 / 2) / (1 + z2)
    reach = math.sqrt(z2 * p * (1 - p) + z2 * z2 / 4) / (1 + z2)
    # exact at the ends, where rounding would leave 1e-17
    low = 0.0 if successes == 0 else middle - reach
    high = 1.0 if successes == total else middle + reach
    return low, high


def mcnemar(better: int, worse: int) -> float:
    """Return the exact two-sided p value of McNemar's test from the discordant counts.

    Of n = better + worse problems that exactly one of two settings solved, ``better`` is
    Binomial(n, 1/2) if the settings are equally good: p = min(1, 2 P(X <= min(better, worse))).

    Raises:
        ValueError: a negative count.
    """
    _check_counts(better, worse, better + worse)
    count, total = min(better, worse), better + worse
    # P(X <= count) from its largest term on; C(n, k-1) = C(n, k) k / (n-k+1)
    term = terms = 1.0
    for k in range(count, 0, -1):
        term *= k / (total - k + 1)
        terms += term
        if term < 1e-18 * terms:
            break
    return min(1.0, 2 * (math.comb(total, count) / 2**total) * terms)  # whole numbers: no overflow


def paired_difference(
    better: int, worse: int, total: int, confidence: float = 0.95
) -> tuple[float, float]:
    """Return Tango's score interval of the difference of two accuracies on the same problems.

    ``better`` of ``total`` problems were solved by the setting only, ``worse`` by the baseline
    only; the difference is (better - worse) / total. Unlike the bootstrap it does not shrink to
    a point where no problem tells the settings apart: the lower bound is then -z^2 / (n + z^2).

    Source: Tango, Statistics in Medicine 17 (1998), 891-908.

    Raises:
        ValueError: counts that do not fit, or a confidence outside (0, 1).
    """
    _check_counts(better, worse, total)
    if total == 0:
        raise ValueError("0 problems: expected at least one.")
    z = _quantile(confidence)
    middle = (better - worse) / total
    low = _cross(lambda d: _tango(better, worse, total, d) - z, -1.0, middle)
    high = _cross(lambda d: _tango(better, worse, total, d) + z, middle, 1.0)
    return low, high


def _tango(better: int, worse: int, total: int, difference: float) -> float:
    """Return the score statistic of a difference; it falls as the difference grows."""
    variance = total * paired_variance(better / total, worse / total, difference)
    distance = better - worse - total * difference
    if variance <= 0:
        return math.copysign(math.inf, distance) if distance else 0.0
    return distance / math.sqrt(variance)


def paired_variance(better: float, worse: float, difference: float) -> float:
    """Return the variance that one problem adds to a difference of accuracies, if ``difference`` is the true one.

    ``better`` and ``worse`` are the shares of the problems that only the one or the other solved. Their
    likeliest values under the difference are q + difference and q; the variance is
    2 q + difference (1 - difference).

    Source: Tango, Statistics in Medicine 17 (1998), 891-908.
    """
    b = (2 - better + worse) * difference - better - worse
    c = -worse * difference * (1 - difference)
    only_worse = (math.sqrt(max(b * b - 8 * c, 0.0)) - b) / 4  # the likeliest P(worse)
    return 2 * only_worse + difference * (1 - difference)


def _cross(function: Callable[[float], float], low: float, high: float) -> float:
    """Return where a falling function crosses zero, by halving the interval."""
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if function(middle) > 0 else (low, middle)
    return (low + high) / 2


def bootstrap(
    values: Sequence[float] | np.ndarray,
    *,
    resamples: int = 10_000,
    seed: int = 0,
    confidence: float = 0.95,
) -> tuple[float, float, float]:
    """Return a mean and the bounds of its bootstrap interval.

    ``values``: one number a problem. To compare two settings, give the difference on each problem.
    Problems are drawn with replacement; the bounds are percentiles of the resampled means. Of fewer than
    ``FEW`` problems they are too close: at 8 they hold the mean in 80 to 90 % of the cases, not in 95.

    Raises:
        ValueError: no value, one that is not finite, fewer than 1 resample, or a confidence
            outside (0, 1).
    """
    values = _check_values(values, resamples)
    _quantile(confidence)  # checks it
    rng = np.random.default_rng(seed)
    means = np.empty(resamples)
    rows = max(1, _CELLS // values.size)
    for start in range(0, resamples, rows):
        part = means[start : start + rows]
        part[:] = values[
            rng.integers(values.size, size=(len(part), values.size), dtype=np.int32)
        ].mean(axis=1)
    low, high = np.quantile(means, [(1 - confidence) / 2, (1 + confidence) / 2])
    return float(values.mean()), float(low), float(high)


def ratio(
    tops: Sequence[float] | np.ndarray,
    bottoms: Sequence[float] | np.ndarray,
    confidence: float = 0.95,
) -> tuple[float, float, float]:
    """Return ``sum(tops) / sum(bottoms)`` and the bounds of its interval, one number of each a problem.

        R exp(-+ z s),    s^2 = n/(n-1) sum_i (t_i - R b_i)^2 / (sum t)^2

    by the delta method for log R: the bounds are above 0 and finite, where resampled sums of ``bottoms``
    may be 0. With one problem there is no interval: the bounds are 0 and infinity.

    Raises:
        ValueError: other than as many finite numbers of at least 0 in both, a sum of 0, or a confidence
            outside (0, 1).
    """
    t, b = _check_values(tops, 1), _check_values(bottoms, 1)
    if t.size != b.size or min(t.min(), b.min()) < 0 or not t.sum() or not b.sum():
        raise ValueError(f"{t.size} over {b.size} numbers: expected pairs, with sums above 0.")
    z, value = _quantile(confidence), t.sum() / b.sum()
    if t.size == 1:
        return float(value), 0.0, math.inf
    spread = math.sqrt(t.size / (t.size - 1) * float(((t - value * b) ** 2).sum())) / t.sum()
    return float(value), float(value * math.exp(-z * spread)), float(value * math.exp(z * spread))


def sign_flip(
    differences: Sequence[float] | np.ndarray, *, resamples: int = 10_000, seed: int = 0
) -> float:
    """Return the two-sided p value of paired differences by the sign-flip test.

    If the two settings are exchangeable, every difference may as well have the other sign: p is
    the share of random signs, the observed ones among them, whose mean is as far from 0. It stays right for
    few problems and long tails, where the bootstrap finds too much.

    Source: Fisher, The Design of Experiments (1935), section 21.

    Raises:
        ValueError: see ``bootstrap``.
    """
    values = _check_values(differences, resamples)
    rng, far, rows = np.random.default_rng(seed), 0, max(1, _CELLS // values.size)
    bound = abs(values.sum()) * (1 - 1e-12)  # rounding must not hide a tie
    for start in range(0, resamples, rows):
        shape = (min(rows, resamples - start), values.size)
        positive = rng.integers(2, size=shape, dtype=np.int8)
        sums = 2 * (positive @ values) - values.sum()
        far += int((np.abs(sums) >= bound).sum())
    return (far + 1) / (resamples + 1)


def _check_values(given: Sequence[float] | np.ndarray, resamples: int) -> np.ndarray:
    values = np.asarray(given, dtype=np.float64)
    if values.ndim != 1 or not values.size or not np.isfinite(values).all():
        raise ValueError(f"shape {values.shape}: expected a row of finite numbers, at least one.")
    if resamples < 1:
        raise ValueError(f"{resamples} resamples: expected at least 1.")
    return values


def _quantile(confidence: float) -> float:
    if not 0 < confidence < 1:
        raise ValueError(f"confidence {confidence}: expected a number between 0 and 1.")
    return NormalDist().inv_cdf((1 + confidence) / 2)


def _check_counts(better: int, worse: int, total: int) -> None:
    if better < 0 or worse < 0 or better + worse > total:
        raise ValueError(f"{better} better and {worse} worse of {total}: counts do not fit.")
