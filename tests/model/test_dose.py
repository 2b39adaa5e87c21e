from dataclasses import replace

import pytest

import mlx_densesteer as ds
from mlx_densesteer import demo
from mlx_densesteer.errors import InputError
from mlx_densesteer.model.dose import mean_norms, strength_for


@pytest.fixture(scope="module")
def loaded():
    return ds.load("demo")


@pytest.fixture
def vector():
    return ds.SteeringVector.load(demo.VECTOR)


def without_norms(vector, **changes):
    meta = replace(vector.meta, **{"residual_norms": None} | changes)
    return ds.SteeringVector(vector.layers, meta)


def test_recorded_and_measured_norms_mean_the_same(loaded, vector):
    stored = mean_norms(*loaded, vector, [1, 4, 5])
    assert stored == {k: vector.residual_norms[k] for k in (1, 4, 5)}
    measured = mean_norms(*loaded, without_norms(vector), [1, 4, 5])
    assert measured != stored
    assert measured == pytest.approx(stored, rel=0.1)
    assert mean_norms(*loaded, without_norms(vector), [5]) == pytest.approx({5: measured[5]})


def test_norms_recorded_from_other_weights_are_not_used(loaded, vector):
    other = without_norms(vector, residual_norms={"5": 1.0}, fingerprint="0" * 16)
    assert mean_norms(*loaded, other, [5])[5] > 100


def test_a_dose_becomes_the_strength_that_has_it(vector):
    norms = {4: 2000.0, 5: 3000.0}
    strength = strength_for(vector, norms, -0.2)
    doses = ds.Steering(vector, strength, (4, 5)).relative_dose(norms)
    assert sum(doses.values()) / 2 == pytest.approx(0.2) and strength < 0


def test_a_vector_that_is_only_rounding_has_no_relative_strength(vector):
    tiny = {5: vector.layers[5] * 1e-6}
    with pytest.raises(InputError, match="no more than rounding"):
        strength_for(ds.SteeringVector(tiny, vector.meta), {5: 2000.0}, 0.2)
