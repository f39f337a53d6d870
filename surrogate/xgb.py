"""The surrogate: a bag of small boosted trees blended with a bag of ridges, with a standard deviation."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import xgboost

from surrogate.baselines import Ridge, fit_ridge

Array = npt.NDArray[np.float64]
Matrix = npt.NDArray[np.float32]

MEMBERS = 8
CHUNK = 262_144
TREES = {
    "max_depth": 3,
    "eta": 0.1,
    "subsample": 0.8,
    "colsample_bynode": 0.5,
    "min_child_weight": 2,
    "tree_method": "hist",
    "max_bin": 64,
    "verbosity": 0,
}


@dataclass(frozen=True)
class Ensemble:
    """Members fitted on bootstrap samples: their mean is the estimate, their spread its standard deviation."""

    ridges: list[Ridge]
    boosters: list[xgboost.Booster]

    def members(self, x: Matrix) -> Array:
        """Each member's prediction (members, n) at x (n, d), computed in chunks of rows."""
        out = np.empty((len(self.ridges), len(x)))
        for start in range(0, len(x), CHUNK):
            part = slice(start, start + CHUNK)
            for i, (ridge, booster) in enumerate(zip(self.ridges, self.boosters, strict=True)):
                out[i, part] = 0.5 * ridge.predict(x[part]) + 0.5 * booster.inplace_predict(x[part])
        return out

    def predict(self, x: Matrix) -> tuple[Array, Array]:
        """Mean and standard deviation (n,) at x (n, d)."""
        members = self.members(x)
        return members.mean(axis=0), members.std(axis=0, ddof=1)


def fit(x: Matrix, y: Array, seed: int, rounds: int = 40, threads: int = 1) -> Ensemble:
    """Fits y (n,) on features x (n, d); deterministic for a seed."""
    rng = np.random.default_rng(seed)
    ridges, boosters = [], []
    for member in range(MEMBERS):
        weight = np.bincount(rng.integers(len(y), size=len(y)), minlength=len(y)).astype(np.float64)
        ridges.append(fit_ridge(x, y, 1.0, weight))
        data = xgboost.DMatrix(x, y, weight=weight, nthread=threads)
        parameters = {**TREES, "seed": seed + member, "nthread": threads, "base_score": float(weight @ y / len(y))}
        boosters.append(xgboost.train(parameters, data, rounds))
    return Ensemble(ridges, boosters)
