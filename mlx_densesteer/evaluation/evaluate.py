"""Score one setting on a set of problems, beside the unsteered model."""

from collections.abc import Sequence

import mlx.nn as nn
from mlx_lm.tokenizer_utils import TokenizerWrapper

from ..distributed.ranks import ALONE, Ranks
from ..errors import InputError
from ..generation.batch import ROWS
from ..steering.steering import UNSTEERED, Steering
from .answers import Answer, Progress, answer, by_steering
from .journal import Journal
from .scoring import Score, score
from .tasks import Problem


def evaluate(
    model: nn.Module,
    tokenizer: TokenizerWrapper,
    problems: Sequence[Problem],
    *,
    steering: Steering | None = None,
    baseline: bool = True,
    journal: Journal | None = None,
    system: str | None = None,
    max_tokens: int = 2048,
    rows: int = ROWS,
    with_nll: bool = True,
    ranks: Ranks = ALONE,
    progress: Progress = lambda answers, tokens: None,
) -> tuple[dict[str, Score], list[Answer]]:
    """Return scores by name, ``"unsteered"`` and ``"steered"``, and every answer.

    Both settings are rows of the same batches; the steered score holds the comparison.
    ``baseline=False`` leaves the unsteered rows out where a steering is given.

    Raises:
        InputError: no problems.
    """
    if not problems:
        raise InputError("no problems to evaluate on; expected at least one.")
    steered = steering is not None and steering.fingerprint != UNSTEERED
    settings = ([None] if baseline or not steered else []) + ([steering] if steered else [])
    answers = answer(
        model, tokenizer, problems, settings, journal,
        system=system, max_tokens=max_tokens, rows=rows, with_nll=with_nll,
        ranks=ranks, progress=progress,
    )  # fmt: skip
    groups = by_steering(answers)
    unsteered = groups.get(UNSTEERED)
    scores = {"unsteered": score(unsteered)} if unsteered else {}
    if steered:
        scores["steered"] = score(groups[steering.fingerprint], unsteered)
    return scores, answers
