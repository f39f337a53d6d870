"""The surrogate: Bayesian linear regression, corrected by bagged boosted trees; it predicts mean and variance."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import xgboost

from surrogate.linear import Linear, Prior

Array = npt.NDArray[np.float64]
Matrix = npt.NDArray[np.float32]

MEMBERS = 8  # boosters, each of ROUNDS trees
ROUNDS = 20
CALIBRATED_POINTS = 10  # added to the calibration as points whose errors have exactly their predicted size
CHUNK = 65_536  # rows predicted at once, to bound the memory: 2 million rows would not fit as float64
TREES = {
    "max_depth": 3,
    "eta": 0.2,
    "subsample": 0.8,
    "colsample_bynode": 0.5,
    "min_child_weight": 2,
    "tree_method": "hist",
    "max_bin": 64,
    "base_score": 0.0,
    "nthread": 1,  # on a shared machine, more threads wait for each other: slower even on millions of rows
    "verbosity": 0,
}


@dataclass(frozen=True)
class SurrogateParts:
    """Which of its two parts a surrogate has: both, except in an ablation."""

    linear: bool = True
    trees: bool = True


BOTH = SurrogateParts()


@dataclass(frozen=True)
class Surrogate:
    """A linear part, and boosted trees fitted to bootstrap samples of its residuals.

    `scale` calibrates all variances: the ratio of squared errors to predicted variances at left-out points.
    """

    linear: Linear
    boosters: list[xgboost.Booster]
    scale: float

    @property
    def noise(self) -> float:
        """Variance of one measurement around the noiseless target."""
        return self.scale * self.linear.noise

    def predict(self, trend: Matrix, x: Matrix) -> tuple[Array, Array]:
        """Mean and variance (n,) of the noiseless target at trend (n, k), x (n, d)."""
        mean, variance = np.empty(len(x)), np.empty(len(x))
        for start in range(0, len(x), CHUNK):
            part = slice(start, start + CHUNK)
            mean[part], variance[part] = self.linear.predict(trend[part], x[part])
            if self.boosters:
                both = np.concatenate([trend[part], x[part]], axis=1)
                trees = np.stack([booster.inplace_predict(both) for booster in self.boosters])
                mean[part] += trees.mean(axis=0)
                variance[part] += trees.var(axis=0, ddof=1)
        return mean, self.scale * variance


def fit(
    trend: Matrix,
    x: Matrix,
    y: Array,
    prior: Prior,
    seed: int,
    noise: Array | None = None,
    parts: SurrogateParts = BOTH,
) -> Surrogate:
    """Fits y (n,), of about unit variance, on trend (n, k) and standardised features x (n, d).

    Deterministic for a seed. `noise` (n,) multiplies the noise variance of each point, as in `Prior.fit`.
    """
    linear = prior.fit(trend, x, y, noise)
    if not parts.linear:
        linear = linear.without_data(prior)
    if not parts.trees or len(y) < 2:
        return Surrogate(linear, [], _calibration(linear, y, np.zeros((1, len(y)))))
    residuals = y - linear.predict(trend, x)[0]
    boosters, out_of_bag = _bag(np.concatenate([trend, x], axis=1), residuals, seed)
    return Surrogate(linear, boosters, _calibration(linear, y, out_of_bag))


def _calibration(linear: Linear, y: Array, out_of_bag: Array) -> float:
    """Mean ratio of squared error to predicted variance over left-out points, shrunk to 1 by CALIBRATED_POINTS.

    `out_of_bag` (members, n) are the corrections of each point by the members that were not fitted to it, else nan.
    """
    unseen = ~np.isnan(out_of_bag)
    members = np.maximum(unseen.sum(axis=0), 1)
    correction = np.where(unseen, out_of_bag, 0.0).sum(axis=0) / members
    variance = np.where(unseen, (out_of_bag - correction) ** 2, 0.0).sum(axis=0) / members
    ratios = (y - linear.left_out - correction) ** 2 / (linear.left_out_variance + variance)
    return float((ratios.sum() + CALIBRATED_POINTS) / (len(y) + CALIBRATED_POINTS))


def _bag(x: Matrix, y: Array, seed: int) -> tuple[list[xgboost.Booster], Array]:
    """The boosters, and their predictions (members, n) of the points outside their bootstrap samples, nan elsewhere."""
    rng = np.random.default_rng(seed)
    boosters, out_of_bag = [], np.full((MEMBERS, len(y)), np.nan)
    for member in range(MEMBERS):
        weight = np.bincount(rng.integers(len(y), size=len(y)), minlength=len(y))
        data = xgboost.DMatrix(x, y, weight=weight, nthread=1)
        booster = xgboost.train({**TREES, "seed": seed + member}, data, ROUNDS)
        out_of_bag[member, weight == 0] = booster.inplace_predict(x)[weight == 0]
        boosters.append(booster)
    return boosters, out_of_bag
