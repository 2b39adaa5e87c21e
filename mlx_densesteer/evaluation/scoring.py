"""From graded answers to figures with intervals, and the comparison with strength 0.

Accuracy has a Wilson interval, means have a bootstrap interval over problems. A steering is
compared with the unsteered model on the problems that both answered: by McNemar's exact test and
Tango's interval for accuracy, by paired bootstrap for the rest. All intervals are at 95 %. Those of
the bootstrap are too narrow below some 20 problems.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Unpack

import numpy as np

from ..errors import InputError
from ..model.model import Model, takes_model
from ..steering.steering import UNSTEERED, Steering
from .answers import Answer, Answerer, AnswerOptions, answer, by_steering
from .intervals import bootstrap, mcnemar, paired_difference, wilson
from .tasks import Problem


@dataclass(frozen=True)
class Estimate:
    """A figure and its 95 % interval."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class Comparison:
    """A steering against strength 0 on the same problems: differences are steered - unsteered."""

    problems: int
    better: int  # right only when steered
    worse: int  # right only when unsteered
    p: float  # McNemar's exact test, two-sided
    accuracy: Estimate
    steps: Estimate
    tokens: Estimate
    nll: Estimate | None


@dataclass(frozen=True)
class Score:
    """The figures of one setting on a set of problems.

    - ``steps``, ``tokens``: means over problems.
    - ``density``: all tokens divided by all steps; ``None`` without a step.
    - ``nll``: the mean over responses, under the unsteered model.
    - ``disagreements``: verdicts on which the reference's string rule and math-verify differ.
    - ``seconds``: the mean time of a response in its batch.
    """

    problems: int
    correct: int
    accuracy: Estimate
    steps: Estimate
    tokens: Estimate
    density: float | None
    nll: Estimate | None
    nll_count: int  # responses with an NLL: an empty one has none
    truncated: int
    disagreements: int
    seconds: float
    against_unsteered: Comparison | None = None


@takes_model
def evaluate(
    model: Model,
    problems: Sequence[Problem],
    *,
    steering: Steering | None = None,
    baseline: bool = True,
    answer: Answerer = answer,
    **options: Unpack[AnswerOptions],
) -> tuple[dict[str, Score], list[Answer]]:
    """Return scores by name, ``"unsteered"`` and ``"steered"``, and every answer.

        evaluate(load("demo"), load_task("demo", limit=40), steering=steering, max_tokens=200)

    Both settings share batches. The steered score holds the comparison.

    Args:
        model: what ``load`` returns, or mlx-lm's own ``(model, tokenizer)``.
        problems: what ``tasks.load_task`` returns.
        baseline: ``False`` leaves the unsteered responses out if a steering is given.
        answer: answers the problems; over several ranks ``distributed.answers.answer_over_ranks``.
        options: see ``answers.AnswerOptions``.

    Raises:
        InputError: no problems.
    """
    if not problems:
        raise InputError("no problems to evaluate on; expected at least one.")
    steered = steering is not None and steering.fingerprint != UNSTEERED
    settings = ([None] if baseline or not steered else []) + ([steering] if steered else [])
    answers = answer(model, problems, settings, **options)
    groups = by_steering(answers)
    unsteered = groups.get(UNSTEERED)
    scores = {"unsteered": score(unsteered)} if unsteered else {}
    if steered:
        scores["steered"] = score(groups[steering.fingerprint], unsteered)
    return scores, answers


def score(answers: Mapping[str, Answer], baseline: Mapping[str, Answer] | None = None) -> Score:
    """Return the figures of one setting from its answers by problem id, at least one.

    ``baseline`` holds the unsteered answers to compare with, if these are others.
    """
    rows = list(answers.values())
    correct = sum(row.correct for row in rows)
    steps = sum(row.steps for row in rows)
    likely = [row.nll for row in rows if row.nll is not None]
    compared = None
    if baseline is not None and baseline is not answers:
        shared = [name for name in answers if name in baseline]
        if shared:
            compared = _compare([answers[n] for n in shared], [baseline[n] for n in shared])
    return Score(
        problems=len(rows),
        correct=correct,
        accuracy=Estimate(correct / len(rows), *wilson(correct, len(rows))),
        steps=_mean([row.steps for row in rows]),
        tokens=_mean([row.tokens for row in rows]),
        density=sum(row.tokens for row in rows) / steps if steps else None,
        nll=_mean(likely) if likely else None,
        nll_count=len(likely),
        truncated=sum(row.truncated for row in rows),
        disagreements=sum(row.by_math_verify not in (None, row.by_reference) for row in rows),
        seconds=float(np.mean([row.seconds for row in rows])),
        against_unsteered=compared,
    )


def _compare(steered: Sequence[Answer], unsteered: Sequence[Answer]) -> Comparison:
    pairs = list(zip(steered, unsteered, strict=True))
    better = sum(s.correct and not u.correct for s, u in pairs)
    worse = sum(u.correct and not s.correct for s, u in pairs)
    likely = [s.nll - u.nll for s, u in pairs if s.nll is not None and u.nll is not None]
    return Comparison(
        problems=len(pairs),
        better=better,
        worse=worse,
        p=mcnemar(better, worse),
        accuracy=Estimate(
            (better - worse) / len(pairs), *paired_difference(better, worse, len(pairs))
        ),
        steps=_mean([s.steps - u.steps for s, u in pairs]),
        tokens=_mean([s.tokens - u.tokens for s, u in pairs]),
        nll=_mean(likely) if likely else None,
    )


def _mean(values: Sequence[float]) -> Estimate:
    return Estimate(*bootstrap(values))
