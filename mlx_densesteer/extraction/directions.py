"""From the differences of many pairs to one direction, and how stable it is. No mlx.

The pairs are split into two random halves. The cosine between the directions of the halves says
whether more of the same pairs would still change the result. The same differences with random
signs say how large that cosine is without a contrast.
"""

from dataclasses import dataclass

import numpy as np

SPLITS = 16  # random halves, and as many again with random signs


@dataclass(frozen=True)
class Direction:
    """A vector, float32 ``(hidden,)``, and the stability of its direction.

    ``agreement`` is the mean cosine between the vectors of two random halves of the pairs.
    ``noise`` is the root mean square of that cosine with random signs. Both are ``None`` for one
    pair.
    """

    vector: np.ndarray
    agreement: float | None
    noise: float | None


class Halves:
    """The random halves of ``count`` pairs, the same for every layer and every run.

    ``weights`` is float64 ``(2, SPLITS * 2, count)``: 1 for a pair of that half, else 0. In the
    second ``SPLITS`` rows the ones have random signs.
    """

    def __init__(self, count: int):
        self.count = count
        rng = np.random.default_rng(0)
        first = np.array([rng.permutation(count) < (count + 1) // 2 for _ in range(2 * SPLITS)])
        signs = rng.choice([-1.0, 1.0], (2 * SPLITS, count))
        signs[:SPLITS] = 1.0
        self.weights = np.stack([first, ~first]) * signs

    def compare(self, first: np.ndarray, second: np.ndarray) -> tuple[float | None, float | None]:
        """Return agreement and noise of two halves' vectors, each ``(SPLITS * 2, hidden)``."""
        if self.count < 2:
            return None, None
        dot = (first * second).sum(axis=-1)
        size = np.linalg.norm(first, axis=-1) * np.linalg.norm(second, axis=-1)
        cosines = np.divide(dot, size, out=np.zeros_like(dot), where=size > 0)
        noise = np.sqrt(np.mean(cosines[SPLITS:] ** 2))
        return float(cosines[:SPLITS].mean()), float(noise)


class MeanDifference:
    """The paper's method: ``v = mean_i d_i``. Only running sums are kept.

    Source: arXiv 2605.29247, section 3.
    """

    name = "mean difference"

    def __init__(self, halves: Halves):
        self._halves = halves
        self._sums: np.ndarray | float = 0.0  # (2, SPLITS * 2, hidden) float64

    def add(self, pairs: list[int], differences: np.ndarray) -> None:
        """Take positive minus negative of ``pairs``, float32 ``(pairs, hidden)``."""
        weights = self._halves.weights[..., pairs]
        self._sums = self._sums + weights @ differences.astype(np.float64)

    def vector(self) -> np.ndarray:
        """Return the direction of all differences together, float32 ``(hidden,)``."""
        mean = (self._sums[0, 0] + self._sums[1, 0]) / self._halves.count
        return mean.astype(np.float32)

    def direction(self) -> Direction:
        """Return ``vector()`` and how stable its direction is."""
        return Direction(self.vector(), *self._halves.compare(*self._sums))


class PrincipalComponent:
    """The first principal component of the differences; methods as ``MeanDifference``.

        v = u (u . mean_i d_i),     u = argmax over unit vectors of sum_i (u . d_i)^2

    The differences are not centred: centring would remove what all pairs share. The length is the
    mean of the pairs' components along u, so a strength means the same as for the mean difference.
    The sign is that of positive minus negative. Every difference is kept, float32.
    """

    name = "first principal component"

    def __init__(self, halves: Halves):
        self._halves = halves
        self._rows: np.ndarray | None = None

    def add(self, pairs: list[int], differences: np.ndarray) -> None:
        if self._rows is None:
            self._rows = np.zeros((self._halves.count, differences.shape[1]), np.float32)
        self._rows[pairs] = differences

    def vector(self) -> np.ndarray:
        rows, gram = self._gram()
        return (_component(np.ones(len(rows)), gram) @ rows).astype(np.float32)

    def direction(self) -> Direction:
        rows, gram = self._gram()
        halves = [[_component(w, gram) @ rows for w in half] for half in self._halves.weights]
        return Direction(self.vector(), *self._halves.compare(*map(np.array, halves)))

    def _gram(self) -> tuple[np.ndarray, np.ndarray]:
        rows = self._rows.astype(np.float64)
        return rows, rows @ rows.T


def _component(weights: np.ndarray, gram: np.ndarray) -> np.ndarray:
    """Return c ``(pairs,)`` such that ``c @ rows`` is v of the rows whose weight is 1 or -1.

    R holds these rows times their weights; a is the first eigenvector of R R^T, with eigenvalue
    s^2. Then u = R^T a / s, the components R u are s a, and v = R^T a mean(a).
    """
    c = np.zeros_like(weights)
    chosen = np.flatnonzero(weights)
    signs = weights[chosen]
    values, vectors = np.linalg.eigh(gram[np.ix_(chosen, chosen)] * np.outer(signs, signs))
    if len(chosen) and values[-1] > 0:
        a = vectors[:, -1]
        c[chosen] = signs * a * a.mean()
    return c
