"""Which layers to steer, and how strongly: by forward passes alone, without generating.

A strength is fixed by how far it moves the model, KL(steered || unsteered) in nats per token, whatever the
vector and the layer. There the settings are compared by their margin on held-out pairs.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace

import mlx.core as mx
import numpy as np

from ..errors import InputError
from ..evaluation.intervals import bootstrap
from ..evaluation.scoring import Estimate
from ..model.divergence import Branches, Divergence, strengths_for
from ..model.likelihood import token_log_likelihoods
from ..model.model import Model, takes_model
from ..model.residual import TokenPair
from ..steering.places import Positions
from ..steering.request import DEFAULT_DOSE, joined, joint_layers, unit_dose, usual_positions
from ..steering.steering import Steering
from ..steering.vector import SteeringVector
from .extract import HELD_OUT, ReadOut, encode_pairs
from .margin import margin_gains
from .pairs import Pair, pairs_sha256

BEST = 5  # layers that are measured where none are given
TEXTS = 6  # sparse responses on which the KL is measured
Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Calibrated:
    """One setting: layers that are steered together at the strength that gives the KL.

    - ``kl``: the target in nats per token, with the sign of the strength.
    - ``dose``: that of ``Steering.dose``, with the sign of the strength; 0.2 is 20 %.
    - ``gain``: by how many nats per token it favours the dense responses of held-out pairs, with a
      bootstrap interval over the pairs.
    """

    layers: tuple[int, ...]
    kl: float
    strength: float
    dose: float
    gain: Estimate

    def describe(self) -> dict[str, object]:
        """Return plain values, for JSON."""
        gain = self.gain
        return {
            "layers": list(self.layers),
            "kl": self.kl,
            "strength": self.strength,
            "dose": self.dose,
            "gain": gain.value,
            "gain_low": gain.low,
            "gain_high": gain.high,
        }


@dataclass(frozen=True)
class Calibration:
    """The settings by KL, at each KL the one that favours its side most first.

    ``unreached`` says of which layers a KL could not be reached. ``fingerprint`` and ``quantization`` are
    the model's.
    """

    rows: tuple[Calibrated, ...]
    unreached: tuple[str, ...]
    positions: Positions
    pairs: int
    pairs_sha256: str
    fingerprint: str
    quantization: str

    def best(self, count: int) -> list[Calibrated]:
        """Return ``count`` settings: the best at each KL first, then the second best at each.

        The gain grows with the KL, so that all settings together would be ranked by their KL.
        """
        places: dict[float, int] = {}
        ranked = []
        for row in self.rows:
            place = places[row.kl] = places.get(row.kl, -1) + 1
            ranked.append((place, row))
        return [row for _, row in sorted(ranked, key=lambda one: one[0])][:count]

    def describe(self) -> dict[str, object]:
        """Return plain values: what ``with_calibration`` stores, and ``unreached``."""
        return {**self._stored(), "unreached": list(self.unreached)}

    def _stored(self) -> dict[str, object]:
        points = [
            row.describe() | {"kl": abs(row.kl), "positions": self.positions} for row in self.rows
        ]
        return {
            "fingerprint": self.fingerprint,
            "quantization": self.quantization,
            "pairs": self.pairs,
            "pairs_sha256": self.pairs_sha256,
            "points": points,
        }

    def on(self, vector: SteeringVector) -> SteeringVector:
        """Return the vector with this calibration in its metadata, in place of an older one."""
        meta = replace(vector.meta, calibration=self._stored())
        return SteeringVector(vector.layers, meta, name=vector.name)

    @classmethod
    def read(cls, document: dict[str, object]) -> "Calibration":
        """Return the calibration that ``describe`` wrote down."""
        found = dict(document)
        points, unreached = found.pop("points"), tuple(found.pop("unreached"))  # type: ignore
        rows = [
            Calibrated(
                tuple(point["layers"]),
                math.copysign(point["kl"], point["strength"]),
                point["strength"],
                point["dose"],
                Estimate(point["gain"], point["gain_low"], point["gain_high"]),
            )
            for point in points
        ]
        positions = points[0]["positions"]
        return cls(tuple(rows), unreached, positions, **found)  # type: ignore[arg-type]


@takes_model
def calibrate(
    model: Model,
    vector: SteeringVector,
    pairs: Sequence[Pair],
    *,
    layers: Iterable[int | Sequence[int]] | None = None,
    kl: Sequence[float] = (0.1,),
    positions: Positions | None = None,
    progress: Progress = lambda what, done, total: None,
) -> Calibration:
    """Return the strength at which each setting reaches each KL, and its margin there.

        KL = mean_t sum_v p(v) log(p(v) / q(v))            p steered, q unsteered
        gain = mean_i [ log p(positive_i) / n_i - log p(negative_i) / m_i ]  steered - unsteered

    The KL is the mean over response tokens t of up to ``TEXTS`` sparse responses. All in nats per token, over
    the whole vocabulary. Costs forward passes alone: a few for each setting over the blocks above its lowest
    layer, whatever the number of tokens that a task would generate.

        found = calibrate(model, vector, read_pairs("held-out.jsonl"), kl=[0.05, 0.2])
        found.rows[0].strength

    Args:
        pairs: pairs from which the vector was not made; 8 to 16 are enough.
        layers: layer numbers, or sequences of layers that are steered together. By default those
            of a trained vector, or several that its file recommends together; else the
            ``BEST`` of all layers by the first-order gain (``margin.margin_gains``).
        kl: targets in nats per token; a negative one is for a negative strength.
        positions: as in ``Steering``; by default those that the vector's file recommends, else ``"all"``.
        progress: called with what is done now, and how much of all that is done.

    Raises:
        InputError: no pairs or targets, pairs that do not fit the context, or no setting that reaches a
            target.
        VectorMismatchError: the vector does not fit the model, or lacks a layer.
    """
    model.check_fits(vector)
    if not kl:
        raise InputError("no KL to calibrate for; expected at least one, such as 0.1.")
    targets = list(dict.fromkeys(map(float, kl)))
    encoded = encode_pairs(model, pairs, ReadOut.of("mean-response"))
    joint = joint_layers(vector)
    if layers is not None:
        sets = list(
            dict.fromkeys((k,) if isinstance(k, int) else tuple(sorted(set(k))) for k in layers)
        )
    elif joint:
        sets = [joint]
    else:
        progress("comparing the layers", 0, 1)
        sets = [(layer,) for layer in best_layers(model, vector, encoded)]
    where = positions or usual_positions(vector)
    vector.select({layer for one in sets for layer in one})  # raises for a layer that is not there
    norms = model.norms(vector, {layer for one in sets for layer in one})
    found, unreached = _strengths(
        model, vector, encoded[:TEXTS], sets, targets, where, norms, progress
    )
    if not found:
        raise InputError(f"no setting could be calibrated. {unreached[0]}")
    gains = _gains(model, encoded, list(found.values()), progress)
    rows = []
    for ((together, target), steering), row in zip(found.items(), gains, strict=True):
        if not np.isfinite(row).all():
            unreached.append(
                f"layer {joined(together)}: the log-likelihood overflows at {target:g}."
            )
            continue
        dose = math.copysign(steering.dose(norms), steering.strength)
        gain = Estimate(*bootstrap(row))
        rows.append(Calibrated(together, target, steering.strength, dose, gain))
    rows.sort(key=lambda row: (row.kl, -math.copysign(1, row.kl) * row.gain.value))
    info = model.info
    return Calibration(
        tuple(rows),
        tuple(unreached),
        where,
        len(pairs),
        pairs_sha256(pairs),
        info.fingerprint,
        info.quantization,
    )


def best_layers(
    model: Model, vector: SteeringVector, pairs: Sequence[TokenPair], count: int = BEST
) -> list[int]:
    """Return the layers at which steering favours dense responses most, to first order, in order.

    The gains come from the vector's file, if they were recorded with these weights; else they take a
    backward pass for each response of up to ``HELD_OUT`` pairs.
    """
    if len(vector.layers) <= count:
        return list(vector.layers)
    gains = {layer: gain for layer, gain in vector.margin_gain.items() if layer in vector.layers}
    if vector.meta.fingerprint != model.fingerprint or len(gains) < count:
        norms = model.norms(vector, vector.layers)
        found = margin_gains(model, pairs[:HELD_OUT], vector.layers, norms, dose=DEFAULT_DOSE)
        gains = {layer: gain for layer, gain in found.items() if math.isfinite(gain)}
    return sorted(sorted(gains, key=lambda layer: -gains[layer])[:count])


Found = dict[tuple[tuple[int, ...], float], Steering]


def _strengths(
    model: Model,
    vector: SteeringVector,
    pairs: Sequence[TokenPair],
    sets: Sequence[tuple[int, ...]],
    targets: Sequence[float],
    positions: Positions,
    norms: dict[int, float],
    progress: Progress,
) -> tuple[Found, list[str]]:
    """Return the steering of each setting and target, and what could not be reached."""
    texts = [([*pair.prompt, *pair.negative], len(pair.prompt)) for pair in pairs]
    progress("finding strengths", 0, len(sets))
    measure = Divergence(model.network, texts, {min(one) for one in sets})
    found: Found = {}
    unreached = []
    for done, together in enumerate(sets):
        progress(f"finding strengths, layer {joined(together)}", done, len(sets))
        try:
            unit = unit_dose(vector, {layer: norms[layer] for layer in together})
        except InputError as error:
            unreached.append(str(error))
            continue
        made = strengths_for(measure, vector, together, positions, targets, unit_dose=unit)
        unreached += made.missed.values()
        for target, strength in made.strengths.items():
            found[together, target] = Steering(vector, strength, together, positions)
    return found, unreached


def _gains(
    model: Model, pairs: Sequence[TokenPair], steerings: Sequence[Steering], progress: Progress
) -> np.ndarray:
    """Return the margin of each steering on each pair less that of no steering, ``(steerings, pairs)``.

    Each response is read once up to each lowest steered layer; the settings are rows of batches above it.
    """
    by_lowest: dict[int, list[int]] = {}
    for i, steering in enumerate(steerings):
        by_lowest.setdefault(min(steering.layers), []).append(i)
    gains = np.zeros((len(steerings), len(pairs)))
    for number, pair in enumerate(pairs):
        progress("measuring the gain, pair", number, len(pairs))
        for sign, response in ((1, pair.positive), (-1, pair.negative)):
            branches = Branches(
                model.network, ([*pair.prompt, *response], len(pair.prompt)), by_lowest
            )
            stock = _log_likelihood(model, branches.unsteered, response)
            for rows in by_lowest.values():
                streams = branches.steered([steerings[i] for i in rows])
                for i, h in zip(rows, streams, strict=True):
                    gained = _log_likelihood(model, h, response) - stock
                    gains[i, number] += sign * gained / len(response)
            mx.clear_cache()  # responses differ in length
    return gains


def _log_likelihood(model: Model, h: mx.array, response: Sequence[int]) -> float:
    return float(token_log_likelihoods(model.network, h, response)[0].sum())
