"""Which setting of a sweep to use, if the evidence supports one. numpy only.

The best of many settings looks good by chance alone. So every statement here is corrected for the
number of settings: if no setting has an effect, a sweep recommends one with a probability of at
most 5 %.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import NormalDist
from typing import Literal

import numpy as np

from ..steering.request import format_dose, joined
from ..text import count
from .intervals import bootstrap, mcnemar, paired_difference, paired_variance, sign_flip

RISK = 0.05  # of recommending a setting if none has an effect
POWER = 0.8  # the chance that the problems asked for show an effect that is there


@dataclass(frozen=True, eq=False)
class Outcome:
    """The results of one setting, problem by problem, in the order of the baseline's.

    ``correct``: bool, shape ``(problems,)``. ``tokens``: whole numbers, shape ``(problems,)``.
    ``dose`` has the sign of the strength; 0.2 is 20 %. ``layers`` is empty for the baseline.
    """

    layers: tuple[int, ...]
    strength: float
    dose: float
    correct: np.ndarray
    tokens: np.ndarray


@dataclass(frozen=True)
class Unproven:
    """The setting that looked best where none is supported: an impression, not a recommendation.

    ``problems_needed`` is for a test of this setting alone on other problems (``problems_to_know``): those that
    show its gain, or those that show that it saves tokens and loses less than the margin, whichever are fewer.
    """

    layers: tuple[int, ...]
    strength: float
    dose: float
    better: int
    worse: int
    problems_needed: int


@dataclass(frozen=True)
class Recommendation:
    """A setting, the reason for it, and two sentences with the figures for the user.

    Without a reason ("none") there are no layers and the strength is 0: the unsteered model. ``unproven`` is
    then what looked best, if anything did.
    """

    layers: tuple[int, ...]
    strength: float
    dose: float
    reason: Literal["accuracy", "tokens", "none"]
    text: str
    unproven: Unproven | None = None


@dataclass(frozen=True)
class _Comparison:
    """A setting against the baseline; ``gain`` and ``saving`` are means over the problems."""

    outcome: Outcome
    better: int
    worse: int
    p: float  # of McNemar's test, after Holm
    gain: float
    saving: float

    @property
    def name(self) -> str:
        one = self.outcome
        return (
            f"layer {joined(one.layers)} at {format_dose(one.dose)} (strength {one.strength:.3g})"
        )

    @property
    def accuracy(self) -> float:
        return float(self.outcome.correct.mean())

    @property
    def tokens(self) -> float:
        return float(self.outcome.tokens.mean())


def recommend(
    baseline: Outcome,
    others: Sequence[Outcome],
    *,
    margin: float = 0.02,
) -> Recommendation:
    """Return the setting that is better than the unsteered model beyond chance, or none.

    1. "accuracy": of the settings that solve more problems than the baseline with a p value of at
       most 5 % (McNemar, exact, two-sided, after Holm over all settings), the one that solves most.
    2. "tokens": of the settings that lose less accuracy than ``margin`` at worst (lower bound of
       Tango's interval) and save tokens, the one with the fewest tokens. Saving tokens means that
       the paired bootstrap's interval is above 0 and the sign-flip test agrees: the bootstrap alone
       is wrong too often for few problems and responses that run to the limit. All at the
       confidence 1 - 5 % / settings (Bonferroni).
    3. "none", with the setting that looked best as ``unproven``: of those that solve more problems than
       the baseline the one that solves most; else, of those that save tokens and lose less than
       ``margin``, the one with the fewest tokens.

    Strength 0 among ``others`` is left out.

    Raises:
        ValueError: no problems, outcomes of different lengths, or a margin outside (0, 1).
    """
    _check(baseline, others, margin)
    comparisons = _compare(baseline, [o for o in others if o.strength != 0])
    if not comparisons:
        return Recommendation((), 0.0, 0.0, "none", "Nothing but strength 0 was tried.")
    supported = [c for c in comparisons if c.gain > 0 and c.p <= RISK]
    if supported:
        best = max(supported, key=lambda c: (c.accuracy, -c.tokens, -abs(c.outcome.strength)))
        text = _say_accuracy(best, baseline, len(comparisons))
        return _recommendation(best, "accuracy", text)
    each = 1 - RISK / len(comparisons)
    for c in sorted(comparisons, key=lambda c: (-c.saving, abs(c.outcome.strength))):
        loss = -paired_difference(c.better, c.worse, len(c.outcome.correct), each)[0]
        if loss >= margin or c.saving <= 0:
            continue
        if (saving := _saving(c, baseline, each)) is not None:
            text = _say_tokens(c, baseline, len(comparisons), loss, saving, margin)
            return _recommendation(c, "tokens", text)
    looks_best = _looks_best(comparisons, margin)
    unproven = looks_best and _unproven(looks_best, baseline, margin)
    text = _say_none(comparisons, looks_best, unproven, baseline, margin)
    return Recommendation((), 0.0, 0.0, "none", text, unproven)


def _looks_best(comparisons: Sequence[_Comparison], margin: float) -> _Comparison | None:
    better = [c for c in comparisons if c.gain > 0]
    if better:
        return max(better, key=lambda c: (c.gain, c.saving, -abs(c.outcome.strength)))
    shorter = [c for c in comparisons if c.gain > -margin and c.saving > 0]
    return max(shorter, key=lambda c: (c.saving, c.gain), default=None)


def _unproven(c: _Comparison, baseline: Outcome, margin: float) -> Unproven:
    count = len(baseline.correct)
    ways = []
    if c.gain > 0:
        ways.append(problems_to_know(c.better, c.worse, count))
    if c.saving > 0:
        saved = baseline.tokens - c.outcome.tokens.astype(np.float64)
        spread = float(saved.std(ddof=1)) if count > 1 else 0.0
        shorter = math.ceil((sum(_quantiles()) * spread / c.saving) ** 2)
        ways.append(max(shorter, problems_to_know(c.better, c.worse, count, margin=margin)))
    o = c.outcome
    return Unproven(o.layers, o.strength, o.dose, c.better, c.worse, min(ways))


def problems_to_know(better: int, worse: int, total: int, *, margin: float | None = None) -> int:
    """Return how many problems show a difference of accuracies as large as the one observed.

    ``better`` and ``worse`` of ``total`` problems were solved by the setting or the baseline only. If these
    shares are the true ones, psi = (better + worse) / total and d = (better - worse) / total, McNemar's test
    of this one setting finds the difference with a probability (power) of 80 % from

        n = (z sqrt(psi) + z' sqrt(psi - d^2))^2 / d^2        z, z': quantiles of 95 % and of the power

    problems on. With ``margin`` the question is whether the setting loses less than that, by the lower bound
    of Tango's interval, and

        n = (z sqrt(v) + z' sqrt(psi - d^2))^2 / (d + margin)^2        v: ``paired_variance`` at -margin

    at least ``problems_needed(1)``.

    Sources: Connor, Biometrics 43 (1987), 207-211; with a margin Nam, Biometrics 53 (1997), 1422-1430.

    Raises:
        ValueError: no difference, or with ``margin`` a loss that is not below it.
    """
    share, difference = (better + worse) / total, (better - worse) / total
    z, power = _quantiles()
    spread = max(share - difference**2, 0.0)
    if margin is not None:
        if difference <= -margin:
            raise ValueError(f"a difference of {difference:g}: expected more than {-margin:g}.")
        null = paired_variance(better / total, worse / total, -margin)
        root = (z * math.sqrt(null) + power * math.sqrt(spread)) / (difference + margin)
        return max(math.ceil(root**2), problems_needed(1, margin))
    if not difference:
        raise ValueError("no difference: no number of problems shows it.")
    root = (z * math.sqrt(share) + power * math.sqrt(spread)) / difference
    return math.ceil(root**2)


def _quantiles() -> tuple[float, float]:
    normal = NormalDist()
    return normal.inv_cdf(1 - RISK / 2), normal.inv_cdf(POWER)


def _recommendation(
    c: _Comparison, reason: Literal["accuracy", "tokens"], text: str
) -> Recommendation:
    return Recommendation(c.outcome.layers, c.outcome.strength, c.outcome.dose, reason, text)


def _check(baseline: Outcome, others: Sequence[Outcome], margin: float) -> None:
    count = len(baseline.correct)
    if not count:
        raise ValueError("no problem: expected results on at least one.")
    for outcome in (baseline, *others):
        if outcome.correct.shape != (count,) or outcome.tokens.shape != (count,):
            raise ValueError(
                f"layer {joined(outcome.layers)}, strength {outcome.strength:g}: results of shape "
                f"{outcome.correct.shape} and {outcome.tokens.shape}, expected ({count},)."
            )
    if not 0 < margin < 1:
        raise ValueError(f"margin {margin}: expected a number between 0 and 1.")


def _compare(baseline: Outcome, others: Sequence[Outcome]) -> list[_Comparison]:
    right = baseline.correct.astype(bool)
    counts = []
    for outcome in others:
        correct = outcome.correct.astype(bool)
        counts.append((int((correct & ~right).sum()), int((~correct & right).sum())))
    adjusted = holm([mcnemar(better, worse) for better, worse in counts])
    comparisons = []
    for outcome, (better, worse), p in zip(others, counts, adjusted, strict=True):
        gain = (better - worse) / len(right)
        saving = float((baseline.tokens - outcome.tokens.astype(np.float64)).mean())
        comparisons.append(_Comparison(outcome, better, worse, p, gain, saving))
    return comparisons


def holm(values: Sequence[float]) -> list[float]:
    """Return p values adjusted for their number by Holm's step-down method, in the same order.

    Source: Holm, Scandinavian Journal of Statistics 6 (1979), 65-70.
    """
    adjusted, largest = [0.0] * len(values), 0.0
    for rank, index in enumerate(sorted(range(len(values)), key=values.__getitem__)):
        largest = max(largest, min(1.0, (len(values) - rank) * values[index]))
        adjusted[index] = largest
    return adjusted


def _saving(c: _Comparison, baseline: Outcome, confidence: float) -> tuple[float, float] | None:
    """Return the interval of the tokens saved, or ``None`` if the saving is not beyond chance."""
    differences = baseline.tokens - c.outcome.tokens.astype(np.float64)
    resamples = max(10_000, math.ceil(40 / (1 - confidence)))  # for the far percentiles
    if sign_flip(differences, resamples=resamples) > 1 - confidence:
        return None
    low, high = bootstrap(differences, resamples=resamples, confidence=confidence)[1:]
    return (low, high) if low > 0 else None


def _say_accuracy(best: _Comparison, baseline: Outcome, settings: int) -> str:
    return (
        f"Use {best.name}: it solves {_solved(best.outcome)}, the unsteered model "
        f"{baseline.correct.mean():.1%} ({best.better} more and {best.worse} lost, p = {best.p:.2g}, exact "
        f"McNemar test, {_corrected(settings, 'Holm')}). It writes {_tokens(best, baseline)}; the gain of the "
        "best of several settings is overestimated, so confirm it on other problems."
    )


def _say_tokens(
    c: _Comparison,
    baseline: Outcome,
    settings: int,
    loss: float,
    saving: tuple[float, float],
    margin: float,
) -> str:
    return (
        f"Use {c.name}: it writes {_tokens(c, baseline)} ({saving[0]:.1f} to {saving[1]:.1f} fewer), and solves "
        f"{_solved(c.outcome)} instead of {baseline.correct.mean():.1%}, at worst {100 * loss:.1f} points lost, "
        f"less than the {100 * margin:g} allowed (both intervals are {_corrected(settings, 'Bonferroni')}). No "
        "setting is more accurate than the unsteered model beyond chance."
    )


def _say_none(
    comparisons: Sequence[_Comparison],
    looks_best: _Comparison | None,
    unproven: Unproven | None,
    baseline: Outcome,
    margin: float,
) -> str:
    problems, settings = len(baseline.correct), len(comparisons)
    text = (
        "No setting is recommended: none is more accurate than the unsteered model "
        f"({_solved(baseline)}, {baseline.tokens.mean():.1f} tokens) beyond chance, and none is "
        f"shorter beyond chance and surely no more than {100 * margin:g} points less accurate. "
    )
    if looks_best and unproven:
        return text + _say_unproven(looks_best, unproven, problems, settings)
    if problems < (need := problems_needed(settings, margin)):
        return text + (
            f"{problems} problems are too few to tell: with {count(settings, 'setting')}, even one that "
            f"changes no answer is known to lose less than {100 * margin:g} points only from "
            f"{need} problems on."
        )
    best = max(comparisons, key=lambda c: (c.accuracy, c.saving))
    shortest = max(comparisons, key=lambda c: (c.saving, c.accuracy))
    return text + (
        f"Most accurate was {best.name} with {best.accuracy:.1%} (p = {best.p:.2g}, "
        f"{_corrected(settings, 'Holm')}), shortest {shortest.name} with {shortest.tokens:.1f} tokens and "
        f"{shortest.accuracy:.1%}."
    )


def _say_unproven(c: _Comparison, unproven: Unproven, problems: int, settings: int) -> str:
    seen = f"{c.better} of {problems} problems gained and {c.worse} lost"
    if c.saving > 0:
        seen += f", {c.saving:.1f} tokens saved"
    return (
        f"{c.name.capitalize()} looks best but is unproven ({seen}, p = {c.p:.2g}, "
        f"{_corrected(settings, 'Holm')}): if that is its true effect, about {unproven.problems_needed} other "
        f"problems with this setting alone would be enough to recommend it ({POWER:.0%} power)."
    )


def problems_needed(settings: int, margin: float = 0.02) -> int:
    """Return how many problems a setting that changes no answer needs to count as no less accurate.

    Tango's lower bound is then -z^2 / (n + z^2), so n > z^2 (1 - margin) / margin. Settings that
    change answers need more.
    """
    z = NormalDist().inv_cdf(1 - RISK / settings / 2)
    return math.floor(z * z * (1 - margin) / margin) + 1


def _solved(outcome: Outcome) -> str:
    return f"{outcome.correct.mean():.1%} of {len(outcome.correct)} problems"


def _tokens(c: _Comparison, baseline: Outcome) -> str:
    return f"{c.tokens:.1f} tokens a response instead of {baseline.tokens.mean():.1f}"


def _corrected(settings: int, method: str) -> str:
    return (
        f"corrected for {count(settings, 'setting')} by {method}'s method"
        if settings > 1
        else "1 setting"
    )
