import numpy as np
import pytest

from mlx_densesteer.extraction.directions import SPLITS, Halves, MeanDifference, PrincipalComponent

METHODS = [MeanDifference, PrincipalComponent]


def cosine(a, b):
    return float(a @ b / np.linalg.norm(a) / np.linalg.norm(b))


def found(kind, rows, batch=7):
    """Everything added in batches, in an order that is not that of the pairs."""
    method = kind(Halves(len(rows)))
    order = np.random.default_rng(1).permutation(len(rows))
    for at in range(0, len(rows), batch):
        pairs = order[at : at + batch].tolist()
        method.add(pairs, rows[pairs].astype(np.float32))
    return method.direction()


def contrast(count=40, hidden=64, *, size, seed=0):
    """Noise of length about ``sqrt(hidden)``, and one direction in all of them."""
    rng = np.random.default_rng(seed)
    direction = rng.normal(size=hidden)
    direction /= np.linalg.norm(direction)
    strengths = size * rng.uniform(0.5, 1.5, size=(count, 1))
    return rng.normal(size=(count, hidden)) + strengths * direction, direction


def test_every_pair_is_in_one_half_and_the_halves_are_as_large():
    for count in (2, 7, 50):
        weights = Halves(count).weights
        assert weights.shape == (2, 2 * SPLITS, count)
        assert (np.abs(weights).sum(axis=0) == 1).all()
        sizes = np.abs(weights).sum(axis=-1)
        assert (sizes[0] - sizes[1] == count % 2).all()
        assert (weights[:, :SPLITS] >= 0).all() and (weights[:, SPLITS:] < 0).any()
        assert len(np.unique(weights[0, :SPLITS], axis=0)) > 1


def test_the_mean_is_the_mean():
    rows, _ = contrast(size=3)
    vector = found(MeanDifference, rows).vector
    assert vector.dtype == np.float32
    np.testing.assert_allclose(vector, rows.mean(axis=0), atol=1e-6)


def test_the_component_is_the_first_singular_vector_as_long_as_the_mean_component():
    rows, _ = contrast(size=3)
    u = np.linalg.svd(rows)[2][0]
    np.testing.assert_allclose(
        found(PrincipalComponent, rows).vector, u * (rows @ u).mean(), atol=1e-5
    )


@pytest.mark.parametrize("count, hidden", [(5, 64), (100, 8)])
def test_the_component_of_few_and_of_many_pairs(count, hidden):
    rows, direction = contrast(count, hidden, size=30)
    vector = found(PrincipalComponent, rows).vector
    assert cosine(vector, direction) > 0.9
    assert 25 < np.linalg.norm(vector) < 35


@pytest.mark.parametrize("kind", METHODS)
def test_swapping_dense_and_sparse_turns_it_around(kind):
    rows, _ = contrast(size=3)
    np.testing.assert_allclose(found(kind, -rows).vector, -found(kind, rows).vector, atol=1e-6)


@pytest.mark.parametrize("kind", METHODS)
def test_the_order_and_the_batches_do_not_matter(kind):
    rows, _ = contrast(size=3)
    one, other = found(kind, rows, batch=1), found(kind, rows, batch=40)
    np.testing.assert_allclose(one.vector, other.vector, atol=1e-6)
    assert one.agreement == pytest.approx(other.agreement, abs=1e-6)
    assert one.noise == pytest.approx(other.noise, abs=1e-6)


@pytest.mark.parametrize("kind", METHODS)
def test_halves_agree_where_there_is_a_contrast(kind):
    strong = found(kind, contrast(size=20)[0])
    assert strong.agreement > 0.9
    nothing = found(kind, contrast(size=0)[0])
    assert abs(nothing.agreement) < 0.25


def test_noise_of_the_mean_is_that_of_random_directions():
    nothing = found(MeanDifference, contrast(size=0)[0])
    assert 0.4 / np.sqrt(64) < nothing.noise < 2 / np.sqrt(64)


def test_agreement_of_the_mean_grows_with_the_pairs_as_it_must():
    size, hidden = 3.0, 64
    agreements = []
    for count in (10, 40, 160):
        measured = found(MeanDifference, contrast(count, hidden, size=size)[0]).agreement
        signal = size**2
        expected = signal / (signal + 2 * hidden / count)
        assert measured == pytest.approx(expected, abs=0.15)
        agreements.append(measured)
    assert agreements == sorted(agreements)


@pytest.mark.parametrize("kind", METHODS)
def test_one_pair_has_no_halves(kind):
    one = found(kind, np.full((1, 4), 2.0))
    np.testing.assert_allclose(one.vector, 2.0, atol=1e-6)
    assert one.agreement is None and one.noise is None


@pytest.mark.parametrize("kind", METHODS)
def test_pairs_without_a_difference_are_no_contrast(kind):
    rows = np.zeros((6, 4))
    rows[0] = 1.0
    half_empty = found(kind, rows)
    np.testing.assert_allclose(half_empty.vector, 1 / 6, atol=1e-6)
    assert half_empty.agreement == 0
