"""Time and memory of fit and prediction over whole spaces; quality of predictions from N full results.

`python bench/bench_surrogate.py [TABLE.csv.gz]`; only with a table it measures Kendall's tau and coverage.
"""

from __future__ import annotations

import json
import os
import platform
import resource
import sys
import time
from pathlib import Path

import numpy as np
import xgboost

sys.path.insert(0, str(Path(__file__).parents[1]))

from engine.search.methods.estimate import MACS_ON_LOW, SurrogateInputs, candidate_features, estimate
from engine.search.methods.scores import IdentityKey, Scores
from engine.search.replay.tables import FULL, load
from engine.space import Candidates
from surrogate import xgb
from surrogate.quality import coverage, kendall_tau, normal_scores

LIMIT_S = {15_625: 2.0, 2_097_152: 15.0}


def space(size: int) -> Candidates:
    """A space of the size of NAS-Bench-201 (5 ** 6, one-hot) or of the paper's MobileNetV2 (8 ** 7, ordinal)."""
    if size == 15_625:
        choices = np.indices((5,) * 6, dtype=np.int8).reshape(6, -1).T
        features = (choices[:, :, None] == np.arange(5)).reshape(size, -1).astype(np.float32)
    else:
        choices = np.ascontiguousarray(np.indices((4, 2) * 7, dtype=np.int8).reshape(14, -1).T)
        features = choices.astype(np.float32)
    macs = 1e6 * (1.0 + choices.sum(axis=1, dtype=np.float64))
    return Candidates(choices, features, macs, macs / 10)


def scored(rows: np.ndarray, values: np.ndarray) -> Scores:
    none = np.zeros(0, dtype=np.int64)
    return Scores(rows, values, np.ones(len(rows)), rows, none, {}, 0.0, len(rows))


def speed(size: int) -> dict[str, float | bool]:
    """Seconds of fit and prediction of a single surrogate, and of the estimate from 48 low and 16 full scores."""
    candidates = space(size)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    rng = np.random.default_rng(0)
    start = time.perf_counter()
    features = candidate_features(IdentityKey(candidates))
    prepared = time.perf_counter() - start
    rows = rng.choice(size, 100, replace=False)
    values = candidates.macs[rows] / 3.4e6 + rng.standard_normal(100)  # MACs explain half of the variance
    start = time.perf_counter()
    prior = features.prior(MACS_ON_LOW)
    model = xgb.fit(features.trends[rows], features.x[rows], normal_scores(values), prior, 0)
    mean, _ = model.predict(features.trends, features.x)
    fit_predict = time.perf_counter() - start
    assert kendall_tau(mean[rows], values) > 0.3, "the fit that is timed is wrong"
    start = time.perf_counter()
    low, full = scored(rows[:48], values[:48]), scored(rows[48:64], values[48:64])
    fitted = estimate(candidates, [low], full, 0, SurrogateInputs())
    both = time.perf_counter() - start
    assert kendall_tau(fitted.mean[rows[64:]], values[64:]) > 0.2, "the estimate that is timed is wrong"
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 2**20
    times = {"prepare_s": prepared, "fit_predict_s": fit_predict, "low_and_full_s": both, "memory_gib": grown}
    within = max(fit_predict, both) <= LIMIT_S[size]
    return {name: round(value, 3) for name, value in times.items()} | {"limit_s": LIMIT_S[size], "within": within}


def quality(path: Path, seeds: int = 10) -> dict[str, dict[str, float]]:
    """For each N: test tau of the surrogate and of MACs alone on 1,000 held-out architectures, coverage of 90 %."""
    table = load(path)
    features, n = candidate_features(IdentityKey(table.candidates)), len(table.candidates)
    hold = min(1000, n // 3)
    out: dict[str, dict[str, float]] = {}
    for size in (10, 20, 30, 50, 100, 300):
        if size + hold > n:
            break
        taus, macs_taus, covered = [], [], []
        for seed in range(seeds):
            order = np.random.default_rng(seed).permutation(n)
            train, test = order[:size], order[size : size + hold]
            prior = features.prior(MACS_ON_LOW)
            values = table.valid[FULL]
            model = xgb.fit(features.trends[train], features.x[train], normal_scores(values[train]), prior, seed)
            mean, variance = model.predict(features.trends[test], features.x[test])
            taus.append(kendall_tau(mean, table.test[test]))
            macs_taus.append(kendall_tau(table.candidates.macs[test], table.test[test]))
            truth = _on_scale_of(values[train], values[test])
            covered.append(coverage(truth, mean, np.sqrt(variance + model.noise)))
        out[str(size)] = {
            "tau": round(float(np.mean(taus)), 3),
            "stderr": round(float(np.std(taus, ddof=1) / np.sqrt(seeds)), 3),
            "tau_macs": round(float(np.mean(macs_taus)), 3),
            "coverage_90": round(float(np.mean(covered)), 3),
        }
    return out


def _on_scale_of(train: np.ndarray, values: np.ndarray) -> np.ndarray:
    """Normal scores of values among the training ones, extrapolated along a straight line."""
    x, z = np.sort(train), normal_scores(np.sort(train))
    slope = (z[-1] - z[0]) / max(x[-1] - x[0], 1e-12)
    inside = np.interp(values, x, z)
    return inside + slope * (np.maximum(values - x[-1], 0.0) - np.maximum(x[0] - values, 0.0))


def main() -> None:
    versions = {"python": platform.python_version(), "numpy": np.__version__, "xgboost": xgboost.__version__}
    result: dict[str, object] = {"versions": versions, "cores": os.cpu_count()}
    result["speed"] = {str(size): speed(size) for size in LIMIT_S}
    if len(sys.argv) > 1:
        result["quality"] = quality(Path(sys.argv[1]))
    print(json.dumps(result))


if __name__ == "__main__":
    main()
