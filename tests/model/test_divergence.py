"""KL(steered || unsteered) against full forward passes, and the search for a strength."""

import math

import mlx.core as mx
import numpy as np
import pytest
from helpers import at_every_layer
from hypothesis import given
from hypothesis import strategies as st

from mlx_densesteer.errors import InputError
from mlx_densesteer.model import divergence
from mlx_densesteer.model.block import make_cache, patch
from mlx_densesteer.model.divergence import (
    DOSES,
    TOLERANCE,
    Branches,
    Divergence,
    divergences,
    solve,
    strengths_for,
)
from mlx_densesteer.steering.steering import Steering

TEXTS = [([1, 2, 3, 9, 8, 7, 6, 5], 3), ([5, *range(40)], 1), ([7, 7, 8, 4], 3)]


def logits(network, text, steering):
    """What mlx-lm's whole forward pass gives before each response token, float64."""
    tokens, first = text
    cache = make_cache(network, steering, prompt=range(first))
    found = network(mx.array([tokens]), cache)[0].astype(mx.float32)
    return np.array(found, np.float64)[first - 1 : -1]


def log_softmax(z):
    z = z - z.max(axis=-1, keepdims=True)
    return z - np.log(np.exp(z).sum(axis=-1, keepdims=True))


def naive(network, text, steering):
    p, q = (log_softmax(logits(network, text, one)) for one in (steering, None))
    return (np.exp(p) * (p - q)).sum(axis=-1)


@pytest.mark.parametrize("positions", ["all", "prompt", "generated"])
@pytest.mark.parametrize("layers", [(0,), (2,), (3,), (0, 3), (1, 2, 3)])
def test_the_divergence_is_that_of_whole_forward_passes(tiny, make_vector, layers, positions):
    patch(tiny)
    steering = Steering(make_vector(), 0.7, layers, positions)
    expected = np.concatenate([naive(tiny, text, steering) for text in TEXTS])
    (found,) = Divergence(tiny, TEXTS, [min(layers)])([steering])
    assert found == pytest.approx(expected.mean(), rel=1e-4, abs=1e-6)
    for text in TEXTS:
        branches = Branches(tiny, text, [min(layers)])
        each = divergences(tiny, branches.steered([steering])[0], branches.unsteered)
        assert each == pytest.approx(naive(tiny, text, steering), rel=1e-3, abs=1e-5)


def test_what_is_shared_below_equals_what_is_not(tiny, make_vector):
    """Settings are rows above the lowest layer; each equals its own whole forward pass."""
    patch(tiny)
    steerings = [
        Steering(make_vector(seed=s), strength, (1, *more), positions)
        for s, strength, more, positions in [
            (0, 0.5, (), "all"), (1, -2.0, (3,), "all"), (0, 0.5, (2,), "generated"), (2, 9.0, (), "prompt"),
        ]
    ]  # fmt: skip
    text = TEXTS[1]
    found = Branches(tiny, text, [1, 2]).steered(steerings)
    tokens, first = text
    for row, steering in zip(found, steerings, strict=True):
        h = tiny.model(mx.array([tokens]), make_cache(tiny, steering, prompt=range(first)))
        assert np.abs(np.array(row - h[0, first - 1 : -1])).max() < 1e-5


def test_a_batch_of_rows_is_cut_to_the_tokens_that_fit(tiny, make_vector, monkeypatch):
    patch(tiny)
    steerings = [Steering(make_vector(), strength, (2,)) for strength in (0.1, 1.0, 3.0)]
    branches = Branches(tiny, TEXTS[0], [2])
    whole = np.array(branches.steered(steerings))
    monkeypatch.setattr(divergence, "BATCH_TOKENS", 1)
    assert np.abs(np.array(branches.steered(steerings)) - whole).max() < 1e-5


def test_the_logits_in_memory_are_bounded(tiny, make_vector, monkeypatch):
    patch(tiny)
    branches = Branches(tiny, TEXTS[1], [0])
    steered = branches.steered([at_every_layer(make_vector())])[0]
    whole = divergences(tiny, steered, branches.unsteered)
    monkeypatch.setattr(
        divergence, "LOGITS", 2 * tiny.args.vocab_size * 3
    )  # three positions at a time
    assert divergences(tiny, steered, branches.unsteered) == pytest.approx(whole, rel=1e-5)
    assert len(whole) == 40 and (whole >= 0).all()


def test_a_long_response_counts_at_some_positions(tiny, make_vector, monkeypatch):
    patch(tiny)
    monkeypatch.setattr(divergence, "POSITIONS", 4)
    monkeypatch.setattr(divergence, "RESPONSE", 20)
    steering = Steering(make_vector(), 0.5, (1,))
    whole = naive(tiny, TEXTS[1], steering)
    (found,) = Divergence(tiny, [TEXTS[1]], [1])([steering])
    assert found == pytest.approx(whole[[0, 5, 10, 15]].mean(), rel=1e-4)


def test_overflow_is_infinite(tiny):
    h = mx.full((1, tiny.args.hidden_size), 1e38)
    assert divergences(tiny, h, mx.zeros_like(h)).tolist() == [math.inf]


def test_texts_that_cannot_be_read(tiny):
    for text, message in [
        (([1, 2], 0), "response at token 0 of 2"),
        (([1, 2], 2), "response at token 2 of 2"),
        (([1, 999], 1), "the text has the token 999"),
    ]:
        with pytest.raises(InputError, match=message):
            Branches(tiny, text, [0])


@pytest.mark.parametrize("positions", ["all", "generated"])
def test_the_strength_that_is_found_gives_the_kl(tiny, make_vector, positions):
    patch(tiny)
    vector, layers = make_vector(), (1, 3)
    measure = Divergence(tiny, TEXTS, [1])
    targets = [0.01, 0.2, -0.05]
    found = strengths_for(measure, vector, layers, positions, targets, unit_dose=0.5)
    assert not found.missed and list(found.strengths) == targets
    for target, strength in found.strengths.items():
        assert math.copysign(1, strength) == math.copysign(1, target)
        (kl,) = measure([Steering(vector, strength, layers, positions)])
        assert kl == pytest.approx(abs(target), rel=0.035)


def test_a_kl_that_no_strength_reaches_is_told(tiny, make_vector):
    patch(tiny)
    measure = Divergence(tiny, TEXTS, [2])
    found = strengths_for(measure, make_vector(), (2,), "all", [0.05, 50.0], unit_dose=0.5)
    assert list(found.strengths) == [0.05]
    (why,) = found.missed.values()
    assert why.startswith("layer 2: a KL of 50 nats per token cannot be reached: it is ")
    assert f"a dose of {100 * DOSES[1]:g}%. Choose a smaller KL, or other layers." in why
    for tiny_kl in (1e-9, math.nan, math.inf):
        with pytest.raises(InputError, match="expected 0.0001 at least"):
            strengths_for(measure, make_vector(), (2,), "all", [tiny_kl], unit_dose=0.5)


BOUNDS = (1e-6, 1e4)


def counted(curve):
    rounds = []

    def measure(strengths):
        rounds.append(list(strengths))
        return [curve(s) for s in strengths]

    return measure, rounds


@given(
    st.floats(1e-2, 1e2), st.floats(1.2, 3), st.floats(2, 20),
    st.lists(st.floats(1e-3, 0.4), min_size=1, max_size=4, unique=True),
)  # fmt: skip
def test_smooth_curves_take_few_rounds(scale, power, most, targets):
    measure, rounds = counted(lambda s: most * -math.expm1(-((s / scale) ** power)))
    found = solve(measure, targets, start=1.0, bounds=BOUNDS)
    assert not found.missed
    for target, strength in found.strengths.items():
        kl = most * -math.expm1(-((strength / scale) ** power))
        assert abs(math.log(kl / target)) <= TOLERANCE * 1.001
    assert len(rounds) <= 9


@pytest.mark.parametrize(
    ("curve", "message"),
    [
        (lambda s: 0.0, "cannot be reached: it is 0 even at strength 1e\\+04"),
        (lambda s: 0.03, "cannot be reached: it is 0.03 even at strength 1e\\+04"),
        (lambda s: 5.0, "cannot be reached: it is 5 even at strength 1e-06, .*a larger KL"),
        (lambda s: math.inf, "cannot be reached: it is inf even at strength 1e-06"),
        (lambda s: 0.0 if s < 3 else 7.0, "it jumps from 0 at .* to 7 at 3"),
        (lambda s: 0.01 if s < 3 else math.inf, "it jumps from 0.01 at .* to inf at 3"),
    ],
)
def test_a_search_that_fails_says_why(curve, message):
    found = solve(lambda strengths: map(curve, strengths), [0.1], start=1.0, bounds=BOUNDS)
    assert not found.strengths
    with pytest.raises(InputError, match=message):
        raise InputError(found.missed[0.1])


def test_one_target_that_is_missed_leaves_the_others():
    measure, _ = counted(lambda s: min(s**2, 0.3))
    found = solve(measure, [0.1, 2.0, 0.01], start=1.0, bounds=BOUNDS)
    assert set(found.strengths) == {0.1, 0.01} and set(found.missed) == {2.0}


def test_the_model_measures_once_and_prefers_what_is_stored(demo_model, monkeypatch):
    from dataclasses import replace

    import mlx_densesteer as ds
    from mlx_densesteer.model.model import Model

    model, vector = Model(*demo_model), ds.SteeringVector.load("demo")
    calls = []
    stock = divergence.Divergence.__call__
    monkeypatch.setattr(
        divergence.Divergence, "__call__", lambda self, one: calls.append(1) or stock(self, one)
    )
    assert model.known_kl_strength(vector, (5,), "all", 0.1) is None
    first = model.kl_strength(vector, (5,), "all", 0.1)
    measured = len(calls)
    assert 0 < measured <= 6
    assert model.kl_strength(vector, [5], "all", 0.1) == first
    assert model.known_kl_strength(vector, (5,), "all", 0.1) == first
    point = {"layers": [5], "positions": "all", "kl": 0.1, "strength": 3.25}
    stored = {"fingerprint": model.fingerprint, "points": [point]}
    calibrated = ds.SteeringVector(vector.layers, replace(vector.meta, calibration=stored))
    assert ds.resolve(model, calibrated, "0.1nats", layers=[5]).strength == 3.25
    assert len(calls) == measured
    assert first == ds.resolve(model, vector, "0.1nats").strength
    with pytest.raises(InputError, match="layer 5: a KL of 90 nats per token cannot be reached"):
        ds.resolve(model, vector, "90nats")
