"""A grid of layers x strengths in one pass, and which setting to use.

All settings of all problems share batches, so the weights are read once for many rows. Strength 0
is always one of the settings; it has no layer.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Unpack

import numpy as np

from ..errors import InputError
from ..model.model import Model, takes_model
from ..steering.places import Positions
from ..steering.request import Amount, MeasuredModel, usual_positions
from ..steering.steering import UNSTEERED, Steering
from ..steering.vector import SteeringVector
from .answers import Answer, Answerer, AnswerOptions, answer, by_steering
from .recommendation import Outcome, Recommendation, recommend
from .scoring import Estimate, Score, score
from .tasks import Problem


@dataclass(frozen=True)
class Setting:
    """One cell of the grid: layers that are steered together. At strength 0 it has none, and no steering.

    ``dose`` is that of ``Steering.dose``, with the sign of the strength; 0.2 is 20 %.
    """

    layers: tuple[int, ...] = ()
    strength: float = 0.0
    dose: float = 0.0
    steering: Steering | None = None

    @property
    def fingerprint(self) -> str:
        return self.steering.fingerprint if self.steering else UNSTEERED


@dataclass(frozen=True)
class GridRow:
    """A setting and its figures."""

    setting: Setting
    score: Score

    def describe(self) -> dict[str, object]:
        """Return plain values, as ``plot.plot_sweep`` takes them.

        ``p`` is not corrected for the number of settings.
        """
        setting, s = self.setting, self.score
        return {
            "layers": list(setting.layers) or None,
            "dose": setting.dose,
            "strength": setting.strength,
            "problems": s.problems,
            "accuracy": s.accuracy.value,
            "accuracy_low": s.accuracy.low,
            "accuracy_high": s.accuracy.high,
            **_with_bounds("steps", s.steps),
            **_with_bounds("tokens", s.tokens),
            "density": s.density,
            **_with_bounds("nll", s.nll),
            "truncated": s.truncated,
            "p": s.against_unsteered.p if s.against_unsteered else None,
            "fingerprint": setting.fingerprint,
        }


def _with_bounds(name: str, one: Estimate | None) -> dict[str, float | None]:
    values = (one.value, one.low, one.high) if one else (None, None, None)
    return dict(zip((name, f"{name}_low", f"{name}_high"), values, strict=True))


@dataclass(frozen=True)
class Sweep:
    """The rows of a grid, strength 0 first, and the recommendation."""

    rows: tuple[GridRow, ...]
    recommendation: Recommendation


def settings_of(
    model: MeasuredModel,
    vector: SteeringVector,
    layers: Iterable[int | Sequence[int]],
    strengths: Iterable[str | float | Amount],
    *,
    positions: Positions | None = None,
) -> list[Setting]:
    """Return the settings of a grid, the unsteered one first, then by layers and strength.

        settings_of(model, vector, [12, 14], ["-10%", "10%", "20%"])  # doses
        settings_of(model, vector, [14], [1, "20%", "0.1nats"])       # lambda = 1, a dose, a KL
        settings_of(model, vector, [(8, 12, 16)], ["20%"])            # three layers together

    Without ``positions`` they are those that the vector's file recommends, else ``"all"``.

    Raises:
        InputError: a strength that ``Amount.parse`` cannot read, or that the vector cannot reach.
        SteeringError, VectorMismatchError: a strength or layer that does not fit the vector.
    """
    amounts = [Amount.parse(strength) for strength in strengths]
    where = positions or usual_positions(vector)
    wanted = sorted({(k,) if isinstance(k, int) else tuple(sorted(set(k))) for k in layers})
    norms = model.norms(vector, vector.select({k for one in wanted for k in one}).layers)
    settings = [Setting()]
    for together in wanted:
        found: dict[float, Setting] = {}
        for amount in amounts:
            strength = amount.strength(model, vector, together, where)
            if strength and strength not in found:
                steering = Steering(vector, strength, together, where)
                dose = math.copysign(steering.dose(norms), strength)
                dose = amount.number if amount.unit == "dose" else dose
                found[strength] = Setting(together, strength, dose, steering)
        settings += [found[strength] for strength in sorted(found)]
    return settings


@takes_model
def sweep(
    model: Model,
    problems: Sequence[Problem],
    settings: Sequence[Setting],
    *,
    margin: float = 0.02,
    answer: Answerer = answer,
    **options: Unpack[AnswerOptions],
) -> Sweep:
    """Run all ``settings`` on all problems; return the table and the recommendation.

        settings = settings_of(model, vector, [12, 14], ["10%", "20%"])
        sweep(model, load_task("gsm8k", split="train", limit=300), settings)

    Every response is that of the setting run alone, in greedy decoding. With a journal a killed run
    can go on where it was.

    Args:
        model: what ``load`` returns, or mlx-lm's own ``(model, tokenizer)``.
        settings: what ``settings_of`` returns.
        margin: how much accuracy a recommendation that saves tokens may cost
            (``recommendation.recommend``).
        answer: answers the problems; over several ranks ``distributed.answers.answer_over_ranks``.
        options: see ``answers.AnswerOptions``.

    Raises:
        InputError: no problems, no setting beside strength 0, or a margin that is not between 0 and 1.
    """
    if not problems:
        raise InputError("no problems to sweep on; expected at least one.")
    if not 0 < margin < 1:
        raise InputError(f"margin {margin}: expected a number between 0 and 1, such as 0.02.")
    if not any(setting.steering for setting in settings):
        raise InputError("nothing to sweep: expected at least one strength other than 0.")
    answers = answer(model, problems, [setting.steering for setting in settings], **options)
    return Sweep(tuple(table(settings, answers)), _recommend(settings, answers, margin))


def table(settings: Sequence[Setting], answers: Iterable[Answer]) -> list[GridRow]:
    """Return a row for each setting that has answers."""
    groups = by_steering(answers)
    baseline = groups.get(UNSTEERED)
    return [
        GridRow(setting, score(groups[setting.fingerprint], baseline))
        for setting in settings
        if setting.fingerprint in groups
    ]


def _recommend(
    settings: Sequence[Setting], answers: Sequence[Answer], margin: float
) -> Recommendation:
    groups = by_steering(answers)
    order = list(groups[UNSTEERED])

    def outcome(setting: Setting) -> Outcome:
        rows = [groups[setting.fingerprint][name] for name in order]
        correct = np.array([row.correct for row in rows])
        tokens = np.array([row.tokens for row in rows])
        return Outcome(setting.layers, setting.strength, setting.dose, correct, tokens)

    others = [outcome(setting) for setting in settings if setting.steering]
    return recommend(outcome(Setting()), others, margin=margin)


def with_recommendation(
    vector: SteeringVector, result: Sweep, *, task: Mapping[str, object], positions: Positions
) -> SteeringVector:
    """Return the vector with the grid's figures and recommendation in its metadata.

    ``task`` names the problems. Without a recommendation an older one of a sweep is removed: it was not
    confirmed. The setting at which a vector was trained stays.
    """
    tested = [{"task": task, "positions": positions, **row.describe()} for row in result.rows]
    best, older = result.recommendation, vector.meta.recommended
    recommended = older if older and older.get("reason") == "trained" else None
    if best.layers:
        recommended = {
            "layers": list(best.layers),
            "strength": best.strength,
            "dose": best.dose,
            "positions": positions,
            "reason": best.reason,
            "text": best.text,
            "task": task,
        }
    meta = replace(vector.meta, tested=tuple(tested), recommended=recommended)
    return SteeringVector(vector.layers, meta, name=vector.name)
