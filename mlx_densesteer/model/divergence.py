"""KL(steered || unsteered), and the strength at which it reaches a target; forward passes only.

The blocks up to the lowest steered one compute the same under every strength. So their unsteered output
is computed once for each text (``Branches``), and only the blocks above run for each setting.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import NamedTuple

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from ..errors import InputError
from ..steering.places import Positions
from ..steering.steering import Steering
from ..steering.vector import SteeringVector, format_layers
from .block import make_cache, patch
from .cache import Passed, Reading, Shift, SteeredKVCache
from .families import decoder_blocks, head_of
from .likelihood import BATCH_TOKENS, LOGITS, log_sum_exp
from .prompt import check_ids

Text = tuple[Sequence[int], int]  # token ids, and where the response begins

POSITIONS = 48  # of a response at which the KL is measured, spread evenly
RESPONSE = 192  # tokens of a response that are read for the KL at most
TOLERANCE = 0.03  # of the logarithm of the KL
ROUNDS = 12  # of the search at most; a smooth curve takes two or three
FACTOR = 8.0  # by which a guess leaves the measured strengths at most
DOSES = (1e-5, 20.0)  # between which a strength is looked for
PROBE = 0.2  # the dose that is measured first, for a KL of PROBE_KL
PROBE_KL = 0.1
SMALLEST_KL = 1e-4

Measure = Callable[[Sequence[float]], Sequence[float]]


class Branches:
    """One text that is read unsteered once; steered readings continue from its kept residual stream.

    Args:
        network: its blocks steer.
        text: token ids, and where the response begins.
        layers: the lowest steered layers of the settings to come; the stream is kept at their outputs,
            one ``(1, tokens, hidden)`` in the model's dtype each.

    Raises:
        InputError: a token that the model does not know, or no token before the response.
    """

    def __init__(self, network: nn.Module, text: Text, layers: Iterable[int]):
        tokens, first = text
        check_ids(tokens, network.args.vocab_size, "the text")
        if not 0 < first < len(tokens):
            raise InputError(
                f"response at token {first} of {len(tokens)}: expected one after the first."
            )
        self.network, self.first = patch(network), first
        self.response = list(tokens[first:])
        self._prompt = list(tokens[:first])
        self._tokens = mx.array([list(tokens[:-1])])
        self._kept: dict[int, mx.array] = {}
        wanted = set(layers)
        caches = [
            Reading(record=partial(self._keep, layer) if layer in wanted else None)
            for layer in decoder_blocks(network)
        ]
        self.unsteered = self._normed(caches)[0]
        mx.eval(self.unsteered, self._kept)

    def _keep(self, layer: int, _start: int, h: mx.array) -> None:
        self._kept[layer] = h

    def steered(self, steerings: Sequence[Steering]) -> mx.array:
        """Return the normed stream that predicts each response token, ``(steerings, response, hidden)``.

        The steerings have the same lowest layer, and a strength other than 0. They are rows of one batch.
        """
        (lowest,) = {min(steering.layers) for steering in steerings}
        kept = self._kept[lowest]
        rows = max(1, BATCH_TOKENS // kept.shape[1])
        parts = [
            self._steered(steerings[start : start + rows], lowest, kept)
            for start in range(0, len(steerings), rows)
        ]
        return mx.concatenate(parts) if len(parts) > 1 else parts[0]

    def _steered(self, steerings: Sequence[Steering], lowest: int, kept: mx.array) -> mx.array:
        rows = [make_cache(self.network, one, prompt=self._prompt) for one in steerings]
        shifts = [
            Shift.stack([getattr(cache, "shift", None) for cache in caches])
            for caches in zip(*rows, strict=True)
        ]
        caches: list[Passed | SteeredKVCache] = [Passed() for _ in range(lowest)]
        caches.append(
            Passed(0, mx.broadcast_to(kept, (len(rows), *kept.shape[1:])), shifts[lowest])
        )
        caches += [SteeredKVCache(shift) for shift in shifts[lowest + 1 :]]
        h = self._normed(caches)
        mx.eval(h)
        return h

    def _normed(self, caches: Sequence[object]) -> mx.array:
        """Send the text through the network; return the normed stream from the response's first token on."""
        return self.network.model(self._tokens, caches)[:, self.first - 1 :]


def divergences(network: nn.Module, steered: mx.array, unsteered: mx.array) -> np.ndarray:
    """Return the KL divergence at each position, over the whole vocabulary.

        KL = sum_v p(v) (log p(v) - log q(v)),    p = softmax(head(steered)), q = softmax(head(unsteered))

    Args:
        steered, unsteered: the normed streams, ``(positions, hidden)``.

    Returns:
        float64 ``(positions,)``, in nats, of logits in float32. Infinite where the logits overflow.
    """
    head, found = head_of(network), np.zeros(len(steered))
    step = max(1, LOGITS // (2 * network.args.vocab_size))  # two rows of logits a position
    for start in range(0, len(steered), step):
        part = slice(start, start + step)
        p, q = (
            logits - log_sum_exp(logits)[:, None]
            for logits in (head(h[part]).astype(mx.float32) for h in (steered, unsteered))
        )
        kl = _sums(mx.exp(p) * (p - q))
        mx.eval(kl)
        found[part] = np.array(kl)
    return np.where(np.isfinite(found), np.maximum(found, 0.0), np.inf)


def _sums(values: mx.array) -> mx.array:
    """Return the sum of each row, in two stages as in ``likelihood.log_sum_exp``."""
    rows, width = values.shape
    whole = width - width % 128
    parts = values[:, :whole].reshape(rows, -1, 128).sum(axis=-1).sum(axis=-1)
    return parts + values[:, whole:].sum(axis=-1)


class Divergence:
    """Measures the mean KL of steerings on some texts, over an even selection of response positions.

    At most ``POSITIONS`` of the first ``RESPONSE`` tokens of each response count; the mean is over all
    positions of all texts.

    Args:
        texts: token ids, and where the response begins.
        layers: the lowest steered layers of the settings to come.
    """

    def __init__(self, network: nn.Module, texts: Sequence[Text], layers: Iterable[int]):
        layers = set(layers)
        self._branches = [
            Branches(network, (tokens[: first + RESPONSE], first), layers)
            for tokens, first in texts
        ]
        self._at = [_spread(len(one.response)) for one in self._branches]

    def __call__(self, steerings: Sequence[Steering]) -> list[float]:
        """Return the mean KL of each steering in nats per token; all have the same lowest layer."""
        found: list[list[np.ndarray]] = [[] for _ in steerings]
        for one, at in zip(self._branches, self._at, strict=True):
            for row, h in zip(found, one.steered(steerings), strict=True):
                row.append(divergences(one.network, h[at], one.unsteered[at]))
            mx.clear_cache()  # texts differ in length
        return [float(np.concatenate(row).mean()) for row in found]


def _spread(length: int) -> mx.array:
    """Return the numbers of at most ``POSITIONS`` of ``length`` tokens, the first one included."""
    count = min(length, POSITIONS)
    return mx.array([i * length // count for i in range(count)])


class Found(NamedTuple):
    """The strength for each target KL that was reached, and for each other one the reason."""

    strengths: dict[float, float]
    missed: dict[float, str]


def strengths_for(
    measure: Divergence,
    vector: SteeringVector,
    layers: tuple[int, ...],
    positions: Positions,
    targets: Sequence[float],
    *,
    unit_dose: float,
) -> Found:
    """Find the strength at which each target KL is reached; both have the target's sign.

    Args:
        targets: nats per token; a negative one asks for a negative strength.
        unit_dose: the dose of strength 1.

    Raises:
        InputError: a target below ``SMALLEST_KL``.
    """
    if positions in ("think", "answer"):
        raise InputError(
            f"a KL at positions {positions}: it is measured on texts without thoughts. Name a strength or a "
            "dose such as 20%."
        )
    if small := [target for target in targets if not SMALLEST_KL <= abs(target) < math.inf]:
        raise InputError(
            f"a KL of {small[0]:g} nats per token: expected {SMALLEST_KL:g} at least, below which rounding "
            "errors count. 0.05 to 0.2 is usual."
        )
    found = Found({}, {})
    where = (
        f"layer {format_layers(layers)}{'' if positions == 'all' else f', positions {positions}'}"
    )
    bounds = tuple(dose / unit_dose for dose in DOSES)
    start = PROBE / unit_dose
    for sign in (1.0, -1.0):
        wanted = [abs(target) for target in targets if target * sign > 0]
        if not wanted:
            continue

        def kl_of(strengths: Sequence[float], sign: float = sign) -> list[float]:
            return measure([Steering(vector, sign * s, layers, positions) for s in strengths])

        made = solve(kl_of, wanted, start=start, bounds=bounds)
        # Four digits, more than the KL has: so another run finds the same, and an evaluation goes on.
        rounded = {kl: float(f"{s:.4g}") for kl, s in made.strengths.items()}
        found.strengths.update({sign * kl: sign * s for kl, s in rounded.items()})
        found.missed.update({sign * kl: f"{where}: {why}" for kl, why in made.missed.items()})
    in_order = {target: found.strengths[target] for target in targets if target in found.strengths}
    return Found(in_order, found.missed)


def solve(
    measure: Measure, targets: Sequence[float], *, start: float, bounds: tuple[float, float]
) -> Found:
    """Find for each target the positive strength at which ``measure`` reaches it.

    KL grows about as the square of a small strength and more slowly later, so log KL over log strength is
    nearly straight, and a secant of it converges in two or three rounds. Where the curve bends, the target
    is kept between two measured strengths, which close in. All targets share what was measured.

    Args:
        measure: the KL of some strengths, in one go.
        start: a strength at which the KL may be ``PROBE_KL``.
        bounds: the least and the greatest strength to try.
    """
    known: dict[float, float] = {}  # strength -> KL
    guesses = {t: _clamp(start * math.sqrt(t / PROBE_KL), bounds) for t in targets}
    found = Found({}, {})
    for turn in range(ROUNDS):
        asked = sorted(set(guesses.values()) - set(known))
        if asked:
            known |= dict(zip(asked, measure(asked), strict=True))
        points = sorted(known.items())
        for target in list(guesses):
            close = min(points, key=lambda point: _apart(point[1], target))
            if _apart(close[1], target) <= TOLERANCE:
                found.strengths[target] = close[0]
            elif why := _unreachable(points, target, bounds):
                found.missed[target] = why
            else:
                guesses[target] = _next_guess(points, target, bounds, halve=turn % 3 == 2)
                continue
            del guesses[target]
        if not guesses:
            return found
    for target in guesses:
        found.missed[target] = (
            f"no strength was found at which the KL is {target:g} nats per token: it jumps from "
            f"{_between(points, target)}. Choose another KL, or name the strength."
        )
    return found


def _apart(kl: float, target: float) -> float:
    """Return the distance of two KLs on the logarithmic scale."""
    return abs(math.log(kl / target)) if 0 < kl < math.inf else math.inf


def _unreachable(
    points: Sequence[tuple[float, float]], target: float, bounds: tuple[float, float]
) -> str | None:
    """Return why a target is not reached, if the KL is on one side of it up to a bound."""
    for (s, kl), bound, below in ((points[-1], bounds[1], True), (points[0], bounds[0], False)):
        if s == bound and all((one <= target) == below for _, one in points):
            dose, other = (DOSES[1], "smaller") if below else (DOSES[0], "larger")
            return (
                f"a KL of {target:g} nats per token cannot be reached: it is {kl:.2g} even at strength "
                f"{s:.3g}, a dose of {100 * dose:g}%. Choose a {other} KL, or other layers."
            )
    return None


def _next_guess(
    points: Sequence[tuple[float, float]],
    target: float,
    bounds: tuple[float, float],
    *,
    halve: bool,
) -> float:
    """Return the strength to measure next: within the bracket, or beyond what was measured."""
    high = next(((s, kl) for s, kl in points if kl > target), None)
    low = [(s, kl) for s, kl in points if kl <= target and (high is None or s < high[0])]
    if high is not None and low:
        (s0, kl0), (s1, kl1) = low[-1], high
        if halve or not (kl0 > 0 and kl1 < math.inf):
            return math.sqrt(s0 * s1)
        guess = _parabola(points, target)
        if guess is None or not s0 < guess < s1:
            guess = s0 * (s1 / s0) ** (math.log(target / kl0) / math.log(kl1 / kl0))
        edge = (s1 / s0) ** 0.02  # so that the bracket closes from both sides
        return _clamp(guess, (s0 * edge, s1 / edge))
    s, kl = low[-1] if low else high  # type: ignore[misc]  # one of them is there
    factor = FACTOR if low else 1 / FACTOR
    if 0 < kl < math.inf:
        guess = (target / kl) ** (1 / _slope(points, (s, kl)))
        factor = min(max(guess * 1.02 if low else guess / 1.02, 1 / FACTOR), FACTOR)
    return _clamp(s * factor, bounds)


def _parabola(points: Sequence[tuple[float, float]], target: float) -> float | None:
    """Return where log strength as a parabola of log KL, through the three nearest points, meets the target."""
    usable = [(math.log(s), math.log(kl)) for s, kl in points if 0 < kl < math.inf]
    nearest = sorted(usable, key=lambda point: abs(point[1] - math.log(target)))[:3]
    if len({kl for _, kl in nearest}) < 3:
        return None
    at, total = math.log(target), 0.0
    for i, (s, kl) in enumerate(nearest):
        others = [one for j, (_, one) in enumerate(nearest) if j != i]
        total += s * math.prod((at - one) / (kl - one) for one in others)
    return math.exp(total) if abs(total) < 300 else None


def _slope(points: Sequence[tuple[float, float]], at: tuple[float, float]) -> float:
    """Return d log KL / d log strength beside a measured point; 2, as of small strengths, if it is alone."""
    others = [(s, kl) for s, kl in points if s != at[0] and 0 < kl < math.inf]
    if not others:
        return 2.0
    s, kl = min(others, key=lambda point: abs(math.log(point[0] / at[0])))
    return min(max(math.log(kl / at[1]) / math.log(s / at[0]), 0.7), 8.0)


def _between(points: Sequence[tuple[float, float]], target: float) -> str:
    high = next(((s, kl) for s, kl in points if kl > target), points[-1])
    low = [(s, kl) for s, kl in points if kl <= target and s < high[0]][-1:] or [points[0]]
    return f"{low[0][1]:.3g} at {low[0][0]:.3g} to {high[1]:.3g} at {high[0]:.3g}"


def _clamp(value: float, bounds: tuple[float, float]) -> float:
    return min(max(value, bounds[0]), bounds[1])
