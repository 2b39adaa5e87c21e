"""A grid of layers x strengths in one pass, and which setting to use.

Every setting of every problem is a row of shared batches, so the weights are read once for all
of them. Strength 0 is one setting, whatever the layer, and always there.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

import mlx.nn as nn
import numpy as np
from mlx_lm.tokenizer_utils import TokenizerWrapper

from ..distributed.ranks import ALONE, Ranks
from ..errors import InputError
from ..generation.batch import ROWS
from ..model.dose import strength_for
from ..steering.steering import UNSTEERED, Positions, Steering
from ..steering.vector import SteeringVector
from .answers import Answer, Progress, answer, by_steering
from .journal import Journal
from .recommendation import Outcome, Recommendation, recommend
from .scoring import Estimate, Score, score
from .tasks import Problem


@dataclass(frozen=True)
class Setting:
    """One cell of the grid. ``layer`` is ``None`` for strength 0, which has no layer.

    ``relative`` is the signed relative dose ``lambda * ||v_l|| / mean ||h_l||`` where the mean
    norm is known.
    """

    layer: int | None
    strength: float
    relative: float | None = None
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
        """Return the row of a table: plain values, also read by ``plot.plot_sweep``."""
        setting, s = self.setting, self.score
        return {
            "layer": setting.layer,
            "strength": setting.strength,
            "relative": setting.relative,
            "problems": s.problems,
            "accuracy": s.accuracy.value,
            "accuracy_low": s.accuracy.low,
            "accuracy_high": s.accuracy.high,
            **_with_bounds("steps", s.steps),
            **_with_bounds("tokens", s.tokens),
            "density": s.density,
            **_with_bounds("nll", s.nll),
            "truncated": s.truncated,
            "p": s.against_unsteered.p if s.against_unsteered else None,  # not corrected
            "fingerprint": setting.fingerprint,
        }


def _with_bounds(name: str, one: Estimate | None) -> dict[str, float | None]:
    values = (one.value, one.low, one.high) if one else (None, None, None)
    return dict(zip((name, f"{name}_low", f"{name}_high"), values, strict=True))


@dataclass(frozen=True)
class Sweep:
    """A grid's rows, strength 0 first, and what they recommend."""

    rows: tuple[GridRow, ...]
    recommendation: Recommendation


def settings_of(
    vector: SteeringVector,
    layers: Iterable[int],
    strengths: Iterable[float],
    *,
    positions: Positions = "all",
    residual_norms: Mapping[int, float] | None = None,
    relative: bool = False,
) -> list[Setting]:
    """Return the settings of a grid, the unsteered one first.

    With ``relative`` the numbers in ``strengths`` are fractions of ``residual_norms``:
    ``lambda = a * mean ||h_l|| / ||v_l||``.

    Raises:
        InputError: relative strengths without norms, or where the vector is as good as zero.
        SteeringError, VectorMismatchError: a strength or layer that the vector cannot give.
    """
    norms, settings = vector.norms(), [Setting(None, 0.0, 0.0)]
    if relative and residual_norms is None:
        raise InputError("relative strengths need the mean norms of the residual stream.")
    for layer in sorted(set(layers)):
        vector.select([layer])
        unit = None  # the relative dose of strength 1
        if residual_norms is not None and layer in residual_norms:
            unit = norms[layer] / residual_norms[layer]
        for number in sorted({float(strength) for strength in strengths}):
            if number:
                strength = number
                if relative:
                    strength = strength_for(vector, {layer: residual_norms[layer]}, number)
                steering = Steering(vector, strength, (layer,), positions)
                dose = None if unit is None else strength * unit
                settings.append(Setting(layer, steering.strength, dose, steering))
    return settings


def sweep(
    model: nn.Module,
    tokenizer: TokenizerWrapper,
    problems: Sequence[Problem],
    settings: Sequence[Setting],
    journal: Journal | None = None,
    *,
    system: str | None = None,
    max_tokens: int = 2048,
    rows: int = ROWS,
    with_nll: bool = True,
    margin: float = 0.02,
    ranks: Ranks = ALONE,
    progress: Progress = lambda answers, tokens: None,
) -> Sweep:
    """Run all ``settings`` (``settings_of``) on all problems and return the table.

    Every row equals the same setting run alone in greedy decoding. With a journal the run can
    be killed and goes on where it was (``answering.answer``). ``margin`` is how much accuracy a
    recommendation that saves tokens may cost at most (``recommendation.recommend``).

    Raises:
        InputError: no setting beside strength 0, or a margin that is not between 0 and 1.
    """
    if not 0 < margin < 1:
        raise InputError(f"margin {margin}: expected a number between 0 and 1, such as 0.02.")
    if not any(setting.steering for setting in settings):
        raise InputError("nothing to sweep: expected at least one strength other than 0.")
    answers = answer(
        model, tokenizer, problems, [setting.steering for setting in settings], journal,
        system=system, max_tokens=max_tokens, rows=rows, with_nll=with_nll,
        ranks=ranks, progress=progress,
    )  # fmt: skip
    return Sweep(tuple(table(settings, answers)), _recommend(settings, answers, margin))


def table(settings: Sequence[Setting], answers: Iterable[Answer]) -> list[GridRow]:
    """Return the rows of the settings that have answers, complete or so far."""
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
        return Outcome(setting.layer, setting.strength, correct, tokens)

    steered = [setting for setting in settings if setting.steering]
    others = [outcome(setting) for setting in steered]
    return recommend(outcome(Setting(None, 0.0)), others, margin=margin)


def with_recommendation(
    vector: SteeringVector, result: Sweep, *, task: Mapping[str, object], positions: Positions
) -> SteeringVector:
    """Return the vector with the grid's figures and recommendation in its metadata.

    ``task`` says which problems these were. Without a recommendation an older one is removed:
    it was not confirmed.
    """
    tested = []
    for row in result.rows:
        kept = row.describe()
        tested.append({"task": task, "positions": positions} | kept)
    best, recommended = result.recommendation, None
    if best.layer is not None:
        recommended = {
            "layer": best.layer, "strength": best.strength, "positions": positions,
            "reason": best.reason, "text": best.text, "task": task,
        }  # fmt: skip
    meta = replace(vector.meta, tested=tuple(tested), recommended=recommended)
    return SteeringVector(vector.layers, meta, name=vector.name)
