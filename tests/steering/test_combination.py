from dataclasses import replace

import mlx.core as mx
import numpy as np
import pytest
from helpers import at_every_layer

import mlx_densesteer as ds
from mlx_densesteer.errors import VectorMismatchError
from mlx_densesteer.steering.vector import combine


def test_the_sum_is_both_at_once(tiny, make_vector):
    a, b = make_vector((1, 2)), make_vector((2, 3), seed=1)
    both = combine([(a, 1.0), (b, -0.5)])
    np.testing.assert_allclose(both.layers[1], a.layers[1])
    np.testing.assert_allclose(both.layers[2], a.layers[2] - 0.5 * b.layers[2], rtol=1e-6)
    np.testing.assert_allclose(both.layers[3], -0.5 * b.layers[3])
    assert both.name == "1 vector + -0.5 vector" and both.meta.method.startswith("combined")
    tokens = mx.array([[1, 2, 3]])
    zero = combine([(a, 1.0), (a, -1.0)])
    steered = tiny(tokens, cache=ds.make_cache(tiny, at_every_layer(zero, 4.0)))
    assert mx.array_equal(steered, tiny(tokens, cache=ds.make_cache(tiny)))


def test_the_norms_of_the_same_weights_are_kept(make_vector):
    norms = [{"1": 2.0, "2": 3.0}, {"2": 9.0, "3": 4.0}]
    for fingerprints, expected in (
        (("a", "a"), {1: 2.0, 2: 3.0, 3: 4.0}),
        (("a", "b"), None),
        ((None, None), None),
    ):
        parts = []
        for number, fingerprint in enumerate(fingerprints):
            vector = make_vector((number + 1, number + 2))
            meta = replace(vector.meta, fingerprint=fingerprint, residual_norms=norms[number])
            parts.append((ds.SteeringVector(vector.layers, meta), 1.0))
        assert combine(parts).residual_norms == expected


def test_vectors_of_other_models_are_refused(make_vector):
    with pytest.raises(VectorMismatchError, match="width 32"):
        combine([(make_vector(), 1.0), (make_vector(hidden=32), 1.0)])
    with pytest.raises(VectorMismatchError, match="no vectors"):
        combine([])
