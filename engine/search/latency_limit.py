"""Which candidates are fast enough on this device: some are measured, the others predicted, with a margin."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from engine.run_folder import write_atomically
from engine.space import Candidates
from engine.trial import Architecture, EnvironmentUnusable, UsageError
from surrogate.linear import Prior, fit_linear

Array = npt.NDArray[np.float64]
Measure = Callable[[Sequence[Architecture]], list[float]]

SAMPLE = 64
# A predicted candidate must stay this many standard deviations of the prediction error below the limit.
MARGIN = 2.0


@dataclass(frozen=True)
class Latencies:
    """Milliseconds of candidates (n,), which were `measured`, and the relative error of the others (0: no others)."""

    milliseconds: Array
    error: float
    measured: npt.NDArray[np.bool_]

    def within(self, limit: float) -> npt.NDArray[np.bool_]:
        """True (n,) where a candidate takes at most `limit` milliseconds: as measured, or as predicted plus margin."""
        return self.milliseconds * np.where(self.measured, 1.0, np.exp(MARGIN * self.error)) <= limit


def within_latency_limit(
    candidates: Candidates, limit: float, path: Path, begun: bool, seed: int, measure: Measure
) -> tuple[Candidates, str]:
    """The candidates that take at most `limit` milliseconds, and a line that says how that is known.

    Once the search has `begun`, it reads the latencies in the file `path`, since its decisions depend on them. Until
    then each call measures again, as its settings and its device may differ from the last. Raises UsageError if no
    candidate meets the limit, EnvironmentUnusable if a search that has begun has lost its file.
    """
    if not begun:
        rows = candidates.spread_by_macs(min(SAMPLE, len(candidates)), np.random.default_rng(seed))
        sample = [candidates.architecture(row) for row in rows]
        taken = dict(zip(map(str, sample), measure(sample), strict=True))
        write_atomically(path, json.dumps({"milliseconds": taken}, indent=1) + "\n")
    elif not path.exists():
        raise EnvironmentUnusable(f"{path} is missing; the candidates depend on it: restore it from a copy")
    stored: dict[str, Any] = json.loads(path.read_text())
    latencies = estimate(candidates, stored["milliseconds"])
    keep = latencies.within(limit)
    if not keep.any():
        least = min(stored["milliseconds"].values())
        raise UsageError(
            f"no architecture takes at most {limit:g} ms here (--max-latency-ms): the fastest measured takes "
            f"{least:.3g}, and predictions keep a margin of {100 * (np.exp(MARGIN * latencies.error) - 1):.0f} %"
        )
    how = f"{len(stored['milliseconds'])} measured"
    if not latencies.measured.all():
        error = f"{100 * latencies.error:.0f} %"
        how += f", the others predicted with an error of {error} and {MARGIN:g} times that as margin"
    return candidates.where(keep), f"latency: {keep.sum():,} candidates take at most {limit:g} ms ({how})"


def estimate(candidates: Candidates, measured: dict[str, float]) -> Latencies:
    """Milliseconds of every candidate: a linear model of the logarithm on log MACs, log parameters and the encoding.

    Its error is the root mean square of the leave-one-out predictions of the measured ones.
    """
    rows = [candidates.row(Architecture.parse(name)) for name in measured]
    at = np.array([row for row in rows if row is not None], dtype=np.int64)
    y = np.log([ms for ms, row in zip(measured.values(), rows, strict=True) if row is not None])
    known = np.zeros(len(candidates), dtype=bool)
    known[at] = True
    if known.all():
        milliseconds = np.empty(len(candidates))
        milliseconds[at] = np.exp(y)
        return Latencies(milliseconds, 0.0, known)
    costs = _standardised(np.log(np.stack([candidates.macs, candidates.params], axis=1) + 1), at)
    features = _standardised(candidates.features, at)
    scale = float(y.std()) or 1.0
    prior = Prior(np.zeros(costs.shape[1]), np.ones(costs.shape[1]))
    model = fit_linear(costs[at], features[at], (y - y.mean()) / scale, prior)
    mean, _ = model.predict(costs, features)
    error = float(np.sqrt(np.mean(((y - y.mean()) / scale - model.left_out) ** 2))) * scale
    milliseconds = np.exp(mean * scale + y.mean())
    milliseconds[at] = np.exp(y)
    return Latencies(milliseconds, error, known)


def _standardised(columns: npt.NDArray[Any], at: npt.NDArray[np.int64]) -> npt.NDArray[np.float32]:
    """Columns with mean 0 and standard deviation 1 over the rows `at`, without those that are constant there."""
    sample = columns[at].astype(np.float64)
    deviation = sample.std(axis=0)
    keep = deviation > 1e-6
    return ((columns[:, keep] - sample.mean(axis=0)[keep]) / deviation[keep]).astype(np.float32)
