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
    "verbosity": 0,
}


@dataclass(frozen=True)
class Parts:
    """Which of the two parts a surrogate has; both, but for an ablation."""

    linear: bool = True
    trees: bool = True


BOTH = Parts()


@dataclass(frozen=True)
class Surrogate:
    """A linear part, and boosted trees fitted to bootstrap samples of what it leaves over.

    Where the linear part is left out it is the prior mean, known exactly.
    """

    linear: Linear
    boosters: list[xgboost.Booster]
    threads: int

    def predict(self, trend: Matrix, x: Matrix) -> tuple[Array, Array]:
        """Mean and variance (n,) of the noiseless target at trend (n, k), x (n, d)."""
        # Threads pay on millions of rows; on thousands they wait for each other on a busy machine.
        for booster in self.boosters:
            booster.set_param({"nthread": self.threads if len(x) > CHUNK else 1})
        mean, variance = np.empty(len(x)), np.empty(len(x))
        for start in range(0, len(x), CHUNK):
            part = slice(start, start + CHUNK)
            mean[part], variance[part] = self.linear.predict(trend[part], x[part])
            if self.boosters:
                both = np.concatenate([trend[part], x[part]], axis=1)
                trees = np.stack([booster.inplace_predict(both) for booster in self.boosters])
                mean[part] += trees.mean(axis=0)
                variance[part] += trees.var(axis=0, ddof=1)
        return mean, variance


def fit(
    trend: Matrix,
    x: Matrix,
    y: Array,
    prior: Prior,
    seed: int,
    noise: Array | None = None,
    parts: Parts = BOTH,
    threads: int = 1,
) -> Surrogate:
    """Fits y (n,), of about unit variance, on trend (n, k) and standardised features x (n, d).

    Deterministic for a seed. `noise` (n,): factors on the noise variance of the points (`fit_linear`).
    """
    line = fit_linear(trend, x, y, prior, noise)
    if not parts.linear:
        line = line.without_data(prior)
    left = y - line.predict(trend, x)[0]
    boosters = _bag(np.concatenate([trend, x], axis=1), left, seed) if parts.trees and len(y) > 1 else []
    return Surrogate(line, boosters, threads)


def _bag(x: Matrix, y: Array, seed: int) -> list[xgboost.Booster]:
    rng = np.random.default_rng(seed)
    boosters = []
    for member in range(MEMBERS):
        weight = np.bincount(rng.integers(len(y), size=len(y)), minlength=len(y))
        data = xgboost.DMatrix(x, y, weight=weight, nthread=1)
        parameters = {**TREES, "seed": seed + member, "nthread": 1}
        boosters.append(xgboost.train(parameters, data, ROUNDS))
    return boosters
