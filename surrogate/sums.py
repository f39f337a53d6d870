"""Predicts a positive quantity that adds up from parts, like the time of a network from what its layers do.

The parts have weights that are not negative, so that more work never takes less time; boosted trees correct the
logarithm of the sum if that lowers the cross-validated error.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from surrogate import xgb
from surrogate.linear import Prior
from surrogate.quality import spearman

Array = npt.NDArray[np.float64]
Matrix = npt.NDArray[np.float32]

FOLDS, INNER_FOLDS = 10, 5
LEAST_POINTS = 10
NO_TRENDS = Prior(np.zeros(0), np.zeros(0))
TREES_ONLY = xgb.SurrogateParts(linear=False)


@dataclass(frozen=True)
class Sums:
    """`weights` (k,) of the parts; with `trees`, a correction of the logarithm, of mean `shift` and scale `scale`, that
    reads the parts as shares of `largest` (k,).

    `left_out` (n,) are the predictions of the fitted points, each by a model that was fitted without it.
    """

    weights: Array
    left_out: Array
    trees: xgb.Surrogate | None = None
    shift: float = 0.0
    scale: float = 1.0
    largest: Array | None = None

    def predict(self, parts: Array, x: Matrix) -> Array:
        """The quantity (n,) at parts (n, k) and features x (n, d)."""
        total = parts @ self.weights
        if self.trees is None or self.largest is None:
            return total
        correction, _ = self.trees.predict(_no_trends(x), _joined(parts / self.largest, x))
        return np.asarray(total * np.exp(self.shift + self.scale * correction))


@dataclass(frozen=True)
class Accuracy:
    """How far predictions are from what was measured: the `median` of the relative errors, and a `factor` that 95 of
    100 are within, up or down; `rank_correlation` is Spearman's."""

    median: float
    factor: float
    rank_correlation: float


def accuracy(predicted: Array, measured: Array) -> Accuracy:
    """The accuracy of predictions (n,) of positive measurements (n,)."""
    errors = np.abs(np.log(predicted / measured))
    return Accuracy(
        median=float(np.median(np.abs(predicted / measured - 1))),
        factor=float(np.exp(np.quantile(errors, 0.95))),
        rank_correlation=spearman(predicted, measured),
    )


def fit_sums(parts: Array, x: Matrix, y: Array, seed: int) -> Sums:
    """Fits positive y (n,) on non-negative parts (n, k) and features x (n, d), n at least LEAST_POINTS, to a small
    relative error. The first part should be constant: what even nothing costs. Deterministic for a seed."""
    folds = list(_folds(len(y), FOLDS, seed))
    plain, corrected = np.empty(len(y)), np.empty(len(y))
    for rest, out in folds:
        plain[out] = parts[out] @ non_negative_weights(parts[rest], y[rest])
        corrected[out] = _corrected(parts[rest], x[rest], y[rest], seed).predict(parts[out], x[out])
    if np.abs(np.log(corrected / y)).mean() < np.abs(np.log(plain / y)).mean():
        return replace(_corrected(parts, x, y, seed), left_out=corrected)
    return Sums(non_negative_weights(parts, y), plain)


def _corrected(parts: Array, x: Matrix, y: Array, seed: int) -> Sums:
    """Weights, and trees fitted to what they leave: the residuals of points that the weights were not fitted to."""
    residual = np.empty(len(y))
    for rest, out in _folds(len(y), INNER_FOLDS, seed):
        residual[out] = np.log(y[out] / (parts[out] @ non_negative_weights(parts[rest], y[rest])))
    shift, scale = float(np.median(residual)), float(residual.std()) or 1.0
    largest = np.where(parts.max(axis=0) > 0, parts.max(axis=0), 1.0)
    features, target = _joined(parts / largest, x), (residual - shift) / scale
    trees = xgb.fit(_no_trends(x), features, target, NO_TRENDS, seed, parts=TREES_ONLY)
    return Sums(non_negative_weights(parts, y), y, trees, shift, scale, largest)


def _joined(parts: Array, x: Matrix) -> Matrix:
    """What the trees read (n, d + k): how long a part takes depends on the size of the others, as caches are shared."""
    return np.concatenate([x, parts], axis=1, dtype=np.float32)


def _no_trends(x: Matrix) -> Matrix:
    return np.zeros((len(x), 0), dtype=np.float32)


def _folds(count: int, folds: int, seed: int) -> Iterator[tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]]:
    """Row numbers to fit to, and those left out, which are all rows in turn."""
    order = np.random.default_rng(seed).permutation(count)
    for first in range(folds):
        out = order[first::folds]
        yield np.setdiff1d(order, out), out


def non_negative_weights(parts: Array, y: Array) -> Array:
    """Weights (k,), none negative, of parts (n, k) that minimise the squared relative error of positive y (n,).

    The active-set method of Lawson and Hanson (1974), chapter 23.
    """
    design = parts / y[:, None]
    size = np.linalg.norm(design, axis=0)
    design = design / np.where(size > 0, size, 1.0)
    target, weights, used = np.ones(len(y)), np.zeros(parts.shape[1]), size < 0
    for _ in range(3 * parts.shape[1]):
        gradient = np.where(used | (size == 0), -np.inf, design.T @ (target - design @ weights))
        if gradient.max() < 1e-9 * len(y):
            break
        used[gradient.argmax()] = True
        weights = _feasible(design, target, weights, used)
    return np.asarray(weights / np.where(size > 0, size, 1.0))


def _feasible(design: Array, target: Array, weights: Array, used: npt.NDArray[np.bool_]) -> Array:
    """The least-squares weights of the columns `used`, less those that would be negative, which are taken out of it."""
    while True:
        wanted = np.zeros(len(weights))
        wanted[used] = np.linalg.lstsq(design[:, used], target, rcond=None)[0]
        negative = used & (wanted <= 0)
        if not negative.any():
            return wanted
        step = float(np.min(weights[negative] / np.maximum(weights[negative] - wanted[negative], 1e-300)))
        weights = weights + step * (wanted - weights)
        used &= weights > 1e-12


def spread_out(parts: Array, count: int) -> npt.NDArray[np.int64]:
    """`count` rows of parts (n, k) from which weights can be told apart: each is the one whose total the rows before
    it leave most uncertain (sequential D-optimal design, Fedorov 1972). Only proportions within a row count."""
    scaled = parts / np.where(parts.max(axis=0) > 0, parts.max(axis=0), 1.0)
    scaled = scaled / np.linalg.norm(scaled, axis=1, keepdims=True)
    covariance = np.eye(parts.shape[1]) * 1e3
    rows: list[int] = []
    for _ in range(min(count, len(parts))):
        uncertainty = np.einsum("ij,ij->i", scaled @ covariance, scaled)
        uncertainty[rows] = -1
        rows.append(int(uncertainty.argmax()))
        along = covariance @ scaled[rows[-1]]
        covariance -= np.outer(along, along) / (1 + scaled[rows[-1]] @ along)
    return np.array(rows, dtype=np.int64)
