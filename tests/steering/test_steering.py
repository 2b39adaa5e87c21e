import math

import numpy as np
import pytest

from mlx_densesteer.errors import SteeringError, VectorMismatchError
from mlx_densesteer.steering.steering import Steering


def test_delta_is_lambda_times_v(make_vector):
    vector = make_vector()
    steering = Steering(vector, -1.5, layers=(1, 3))
    assert np.array_equal(steering.delta(3), np.float32(-1.5) * vector.layers[3])
    assert steering.delta(3).dtype == np.float32
    assert steering.delta(2) is None


def test_strength_zero_adds_nothing_and_is_the_unsteered_model(make_vector):
    for strength in (0, 0.0, -0.0):
        steering = Steering(make_vector(), strength, (1,))
        assert steering.delta(1) is None
        assert steering.fingerprint == "unsteered"


def test_layers_are_sorted_and_named_once(make_vector):
    assert Steering(make_vector(), 1.0, layers=(2, 1, 2)).layers == (1, 2)
    with pytest.raises(TypeError, match="layers"):
        Steering(make_vector(), 1.0)


def test_fingerprint_tells_apart_what_is_added(make_vector):
    settings = [
        Steering(make_vector(), 1.0, layers=(1,)),
        Steering(make_vector(), 1.5, layers=(1,)),
        Steering(make_vector(), -1.0, layers=(1,)),
        Steering(make_vector(), 1.0, layers=(2,)),
        Steering(make_vector(), 1.0, layers=(1, 2)),
        Steering(make_vector(), 1.0, layers=(1,), positions="generated"),
        Steering(make_vector(seed=1), 1.0, layers=(1,)),
    ]
    assert len({s.fingerprint for s in settings}) == len(settings)
    assert settings[0].fingerprint == Steering(make_vector(), 1.0, layers=(1,)).fingerprint
    # what counts is the product, not how it came about
    doubled = Steering(make_vector(size=2.0), 0.5, layers=(1,))
    assert doubled.fingerprint == settings[0].fingerprint


def test_the_dose_is_the_sum_over_the_layers(make_vector):
    norms = {layer: float(np.linalg.norm(array)) for layer, array in make_vector().layers.items()}
    one = Steering(make_vector(), -2.0, layers=(1,))
    assert one.dose({1: 4.0}) == pytest.approx(2.0 * norms[1] / 4.0)
    both = Steering(make_vector(), -2.0, layers=(1, 3))
    assert both.dose({1: 4.0, 3: 5.0}) == pytest.approx(2 * (norms[1] / 4 + norms[3] / 5))
    assert Steering(make_vector(), 0.0, layers=(1,)).dose({1: 4.0}) == 0


@pytest.mark.parametrize("strength", [math.nan, math.inf, -math.inf])
def test_strength_must_be_finite(make_vector, strength):
    with pytest.raises(SteeringError, match="expected a finite number"):
        Steering(make_vector(), strength, (1,))


def test_overflow_is_refused_with_the_layer(make_vector):
    with pytest.raises(SteeringError, match=r"strength 1e\+39 overflows float32 at layer 2"):
        Steering(make_vector(), 1e39, layers=(2,))


def test_unknown_positions_and_layers(make_vector):
    with pytest.raises(SteeringError, match="expected one of all, generated, prompt"):
        Steering(make_vector(), 1.0, (1,), positions="everywhere")
    with pytest.raises(VectorMismatchError, match="no vector for layer 9; it holds 0-3"):
        Steering(make_vector(), 1.0, layers=(9,))
    with pytest.raises(SteeringError, match="no layers"):
        Steering(make_vector(), 1.0, layers=())


def test_a_steering_cannot_be_changed(make_vector):
    steering = Steering(make_vector(), 1.0, (1,))
    with pytest.raises(ValueError, match="read-only"):
        steering.delta(1)[:] = 0
    with pytest.raises(AttributeError):
        steering.strength = 2.0
