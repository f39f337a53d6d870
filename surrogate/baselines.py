"""The models of the baseline methods: the Gaussian process of the paper, and the classifier of BORE."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import xgboost

Array = npt.NDArray[np.float64]
Matrix = npt.NDArray[np.float32] | Array

CHUNK = 65_536  # points predicted at once
# The grid of the marginal likelihood: length scales in units of the median distance between the points, and noise
# variances of targets of variance 1.
LENGTHS = (0.35, 0.5, 0.7, 1.0, 1.4, 2.0, 2.8, 5.6)
NOISES = (0.01, 0.05, 0.1, 0.25, 0.5, 1.0)
# BORE: the share of the results that are of the better class, and the trees, which have to do with a dozen results.
BETTER, ROUNDS = 1 / 3, 30
TREES = {
    "objective": "binary:logistic",
    "max_depth": 3,
    "eta": 0.2,
    "min_child_weight": 0.1,
    "nthread": 1,
    "verbosity": 0,
}


@dataclass(frozen=True)
class GaussianProcess:
    """Exact regression with a squared-exponential kernel; targets are standardised internally.

    `x` (m, d) are the points fitted, `length` is the length scale, `factor` (m, m) the Cholesky factor of their
    covariance and `alpha` (m,) its inverse times the targets; `mean` and `scale` undo the standardisation.
    """

    x: Array
    length: float
    factor: Array
    alpha: Array
    mean: float
    scale: float

    def predict(self, x: Matrix) -> tuple[Array, Array]:
        """Mean and standard deviation (n,) of the noiseless function at x (n, d), in chunks to bound the memory."""
        means, stds = np.empty(len(x)), np.empty(len(x))
        for start in range(0, len(x), CHUNK):
            part = slice(start, start + CHUNK)
            cross = _kernel(np.asarray(x[part], dtype=np.float64), self.x, self.length)
            solved = np.linalg.solve(self.factor, cross.T)
            means[part] = cross @ self.alpha
            stds[part] = np.sqrt(np.maximum(1.0 - (solved**2).sum(axis=0), 1e-12))
        return means * self.scale + self.mean, stds * self.scale


def fit_gp(x: Matrix, y: Array) -> GaussianProcess:
    """The process of greatest marginal likelihood for y (n,) at x (n, d), over LENGTHS and NOISES."""
    x = np.asarray(x, dtype=np.float64)
    mean, scale = float(y.mean()), float(y.std()) or 1.0
    target = (y - mean) / scale
    distance = _squared_distances(x, x)
    typical = float(np.sqrt(np.median(distance[distance > 0]))) if (distance > 0).any() else 1.0
    best: tuple[float, float, float, Array] | None = None
    for length in typical * np.array(LENGTHS):
        kernel = np.exp(-0.5 * distance / length**2)
        for noise in NOISES:
            factor = np.linalg.cholesky(kernel + noise * np.eye(len(y)))
            white = np.linalg.solve(factor, target)
            # The best process variance is known in closed form, mean(white ** 2); constants are left out.
            likelihood = -0.5 * len(y) * np.log((white @ white) / len(y) + 1e-12) - np.log(np.diag(factor)).sum()
            if best is None or likelihood > best[0]:
                best = (float(likelihood), float(length), noise, factor)
    assert best is not None
    _, length, noise, factor = best
    white = np.linalg.solve(factor, target)
    amplitude = max(float(np.sqrt((white @ white) / len(y))), 1e-6)
    alpha = np.linalg.solve(factor.T, white) / amplitude
    return GaussianProcess(x, length, factor, alpha, mean, scale * amplitude)


def bore(x: Matrix, rows: npt.NDArray[np.int64], y: Array, seed: int) -> Array:
    """Log odds (n,) that each point x (n, d) is among the best third, by a classifier of those at `rows` (m,), whose
    results are y (m,). They order points as the expected improvement over that third does (Tiao et al. 2021)."""
    better = (y >= np.quantile(y, 1 - BETTER)).astype(np.float64)
    data = xgboost.DMatrix(x[rows], better, nthread=1)
    booster = xgboost.train({**TREES, "seed": seed}, data, ROUNDS)
    return np.asarray(booster.inplace_predict(x, predict_type="margin"), dtype=np.float64)


def _squared_distances(a: Array, b: Array) -> Array:
    squared = (a**2).sum(axis=1)[:, None] + (b**2).sum(axis=1)[None, :] - 2.0 * a @ b.T
    return np.maximum(squared, 0.0)


def _kernel(a: Array, b: Array, length: float) -> Array:
    return np.exp(-0.5 * _squared_distances(a, b) / length**2)
