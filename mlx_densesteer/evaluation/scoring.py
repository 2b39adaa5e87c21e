"""From graded answers to figures with intervals, and the comparison of two conditions.

Accuracy has a Wilson interval, means have a bootstrap interval over problems. Two conditions are
compared on the problems that were answered under both: by McNemar's exact test and Tango's interval
for accuracy, by paired bootstrap for the rest. All intervals are at 95 %. Those of the bootstrap are
too narrow below some 20 problems.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Unpack

import numpy as np

from ..errors import InputError
from ..model.model import Model, takes_model
from ..steering.steering import UNSTEERED, Steering
from ..text import one_line
from .answers import Answer, Answerer, AnswerOptions, answer, by_steering
from .condition import Condition
from .intervals import bootstrap, mcnemar, paired_difference, ratio, wilson
from .tasks import Problem


@dataclass(frozen=True)
class Estimate:
    """A figure and its 95 % interval."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class Comparison:
    """A condition against another one on the same problems: differences are its own less the other's."""

    problems: int
    better: int  # right only under this one
    worse: int  # right only under the other one
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
    - ``seconds_per_correct``: computing time of all responses by the number of correct ones; ``None``
      without a correct one, for a single problem, and where an older journal has no such time.
    - ``thought_tokens``: the mean, among ``tokens``; ``None`` where no response has a thought.
    - ``against_steered``: of a baseline.
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
    seconds_per_correct: Estimate | None = None
    thought_tokens: Estimate | None = None
    against_unsteered: Comparison | None = None
    against_steered: Comparison | None = None


@takes_model
def evaluate(
    model: Model,
    problems: Sequence[Problem],
    *,
    steering: Steering | None = None,
    unsteered: bool = True,
    baselines: Sequence[Condition] = (),
    answer: Answerer = answer,
    **options: Unpack[AnswerOptions],
) -> tuple[dict[str, Score], list[Answer]]:
    """Return scores by name, ``"unsteered"``, ``"steered"`` and the baselines', and every answer.

        evaluate(load("demo"), load_task("demo", limit=40), steering=steering, max_tokens=200)

    All share batches. The scores hold the comparisons with the unsteered and the steered answers.

    Args:
        model: what ``load`` returns, or mlx-lm's own ``(model, tokenizer)``.
        problems: what ``tasks.load_task`` returns.
        unsteered: ``False`` leaves the unsteered responses out if there is anything else.
        baselines: other conditions, each with a name (``condition.Baseline``).
        answer: answers the problems; over several ranks ``distributed.answers.answer_over_ranks``.
        options: see ``answers.AnswerOptions``.

    Raises:
        InputError: no problems, or two conditions that have one name or are the same.
    """
    if not problems:
        raise InputError("no problems to evaluate on; expected at least one.")
    conditions = conditions_of(steering, unsteered=unsteered, baselines=baselines)
    answers = answer(model, problems, list(conditions.values()), **options)
    groups = by_steering(answers)
    found = {name: groups[one.fingerprint] for name, one in conditions.items()}
    base, steered = found.get("unsteered"), found.get("steered")
    return {
        name: score(one, base, None if name == "unsteered" else steered)
        for name, one in found.items()
    }, answers


def conditions_of(
    steering: Steering | None, *, unsteered: bool = True, baselines: Sequence[Condition] = ()
) -> dict[str, Condition]:
    """Return what ``evaluate`` answers the problems under, by name.

    Raises:
        InputError: two conditions have one name, or are the same.
    """
    steered = steering is not None and steering.fingerprint != UNSTEERED
    made = [Condition("steered", steering)] if steered else []
    made += baselines
    if unsteered or not made:
        made.insert(0, Condition("unsteered"))
    for number, one in enumerate(made):
        for other in made[:number]:
            if one.name == other.name or one.fingerprint == other.fingerprint:
                raise InputError(
                    f"{one_line(one.name)} and {one_line(other.name)}: have one name, or are the same. Leave one out."
                )
    return {one.name: one for one in made}


def score(
    answers: Mapping[str, Answer],
    unsteered: Mapping[str, Answer] | None = None,
    steered: Mapping[str, Answer] | None = None,
) -> Score:
    """Return the figures of one condition from its answers by problem id, at least one.

    ``unsteered`` and ``steered`` hold the answers to compare with, if these are others.
    """
    rows = list(answers.values())
    correct = sum(row.correct for row in rows)
    steps = sum(row.steps for row in rows)
    likely = [row.nll for row in rows if row.nll is not None]
    thoughts = [row.thought_tokens for row in rows]
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
        seconds_per_correct=_seconds_per_correct(rows),
        thought_tokens=_mean(thoughts) if any(thoughts) else None,
        against_unsteered=_against(answers, unsteered),
        against_steered=_against(answers, steered),
    )


def _seconds_per_correct(rows: Sequence[Answer]) -> Estimate | None:
    seconds = [row.compute_seconds for row in rows if row.compute_seconds is not None]
    known = len(seconds) == len(rows) > 1 and sum(seconds) and any(row.correct for row in rows)
    return Estimate(*ratio(seconds, [row.correct for row in rows])) if known else None


def _against(
    answers: Mapping[str, Answer], others: Mapping[str, Answer] | None
) -> Comparison | None:
    if others is None or others is answers:
        return None
    shared = [name for name in answers if name in others]
    return _compare([answers[n] for n in shared], [others[n] for n in shared]) if shared else None


def _compare(answers: Sequence[Answer], others: Sequence[Answer]) -> Comparison:
    pairs = list(zip(answers, others, strict=True))
    better = sum(a.correct and not b.correct for a, b in pairs)
    worse = sum(b.correct and not a.correct for a, b in pairs)
    likely = [a.nll - b.nll for a, b in pairs if a.nll is not None and b.nll is not None]
    return Comparison(
        problems=len(pairs),
        better=better,
        worse=worse,
        p=mcnemar(better, worse),
        accuracy=Estimate(
            (better - worse) / len(pairs), *paired_difference(better, worse, len(pairs))
        ),
        steps=_mean([a.steps - b.steps for a, b in pairs]),
        tokens=_mean([a.tokens - b.tokens for a, b in pairs]),
        nll=_mean(likely) if likely else None,
    )


def _mean(values: Sequence[float]) -> Estimate:
    return Estimate(*bootstrap(values))
