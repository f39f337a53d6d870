"""The surrogate: a Bayesian linear trend, corrected by a bag of small boosted trees, with a standard deviation."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import xgboost

from surrogate.linear import Linear, Prior, fit_linear

Array = npt.NDArray[np.float64]
Matrix = npt.NDArray[np.float32]

MEMBERS = 8
ROUNDS = 20
PROMISES_KEPT = 10
CHUNK = 65_536  # rows predicted at once: bounds the memory, 2 million rows would not fit as float64
TREES = {
    "max_depth": 3,
    "eta": 0.2,
    "subsample": 0.8,
    "colsample_bynode": 0.5,
    "min_child_weight": 2,
    "tree_method": "hist",
    "max_bin": 64,
    "base_score": 0.0,
    "nthread": 1,  # on a machine that others use, more threads only wait for each other: slower even on millions
    "verbosity": 0,
}


@dataclass(frozen=True)
class SurrogateParts:
    """Which of the two parts a surrogate has; both, but for an ablation."""

    linear: bool = True
    trees: bool = True


BOTH = SurrogateParts()


@dataclass(frozen=True)
class Surrogate:
    """A linear part, and boosted trees fitted to bootstrap samples of what it leaves over.

    `scale` calibrates all variances: how much greater the squared errors were than promised at points left out.
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

    Deterministic for a seed. `noise` (n,): factors on the noise variance of the points (`fit_linear`).
    """
    line = fit_linear(trend, x, y, prior, noise)
    if not parts.linear:
        line = line.without_data(prior)
    left = y - line.predict(trend, x)[0]
    if not parts.trees or len(y) < 2:
        return Surrogate(line, [], _calibration(line, y, np.zeros((1, len(y)))))
    boosters, unseen = _bag(np.concatenate([trend, x], axis=1), left, seed)
    return Surrogate(line, boosters, _calibration(line, y, unseen))


def _calibration(line: Linear, y: Array, trees: Array) -> float:
    """Mean square of the errors in units of their promised size, each point left out; held to 1 as if by
    PROMISES_KEPT more points. `trees` (members, n): corrections from members that have not seen the point, else nan."""
    unseen = ~np.isnan(trees)
    seen_by = np.maximum(unseen.sum(axis=0), 1)
    correction = np.where(unseen, trees, 0.0).sum(axis=0) / seen_by
    spread = np.where(unseen, (trees - correction) ** 2, 0.0).sum(axis=0) / seen_by
    errors = (y - line.left_out - correction) ** 2 / (line.left_out_variance + spread)
    return float((errors.sum() + PROMISES_KEPT) / (len(y) + PROMISES_KEPT))


def _bag(x: Matrix, y: Array, seed: int) -> tuple[list[xgboost.Booster], Array]:
    """The boosters, and their predictions (members, n) of the points left out of their samples, nan elsewhere."""
    rng = np.random.default_rng(seed)
    boosters, unseen = [], np.full((MEMBERS, len(y)), np.nan)
    for member in range(MEMBERS):
        weight = np.bincount(rng.integers(len(y), size=len(y)), minlength=len(y))
        data = xgboost.DMatrix(x, y, weight=weight, nthread=1)
        booster = xgboost.train({**TREES, "seed": seed + member}, data, ROUNDS)
        unseen[member, weight == 0] = booster.inplace_predict(x)[weight == 0]
        boosters.append(booster)
    return boosters, unseen
