"""What the answers say of every candidate: the surrogate, from low-fidelity scores up to full accuracy.

Everything is in normal scores: 0 is the middle of the candidates, 1 a standard deviation above it.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import lru_cache

import numpy as np
import numpy.typing as npt

from engine.search.methods.scores import Array, IdentityKey, Scores
from engine.space import Candidates
from surrogate import xgb
from surrogate.linear import Linear, Prior, fit_linear
from surrogate.quality import normal_scores

log = logging.getLogger(__name__)
Matrix = npt.NDArray[np.float32]

# Priors on standardised slopes, mean and variance. Fitted from the first score on.
MACS_ON_LOW = (0.5, 0.1)
MACS_ON_FULL = (0.25, 0.1)
LOW_ON_FULL = (0.7, 0.1)
# MACs that vary less than this (standard deviation of their logarithm) get a proportionally smaller prior slope:
# under a cap on MACs, size says little.
LOG_MACS_SPREAD = 0.5
# Variance of full accuracy around what low fidelity and MACs lead to expect.
RESIDUAL = 0.3
# A low score is half its architecture's own, half luck: it pulls its own estimate this far from the smooth one.
PULL = 0.5
# Scores from which a fidelity is fitted, and full results from which one may be dropped.
ENOUGH_LOW, ENOUGH_FULL = 4, 12
# Part of its prior weight under which a low fidelity may be dropped.
LITTLE_WEIGHT = 0.3


@dataclass(frozen=True)
class SurrogateInputs:
    """What the surrogate may use; all of it, but for an ablation."""

    low: bool = True
    macs: bool = True
    parts: xgb.SurrogateParts = xgb.BOTH


@dataclass(frozen=True)
class CandidateFeatures:
    """What is known of candidates before any answer: standardised features x (n, d), MACs in normal scores (n, 1),
    and the part 0..1 of the prior on MACs that their range deserves."""

    x: Matrix
    macs: Matrix
    weight: float


@dataclass(frozen=True)
class Level:
    """Estimate of one low fidelity's scores: mean (n,), variance (n,) of the architecture's own score, its linear
    part, and the variance of one measurement."""

    mean: Array
    variance: Array
    linear: Linear
    noise: float


@dataclass(frozen=True)
class Estimate:
    """Full accuracy of each candidate: mean and variance (n,). `trend` (n, 1 + levels) is what its linear part rests
    on; `levels` are the low fidelities in use and `slopes` their weight in it; `y` (m,) the full results so far,
    `noise` the variance of one around its architecture's own; `dropped` the low fidelities found to say nothing."""

    mean: Array
    variance: Array
    features: CandidateFeatures
    trend: Matrix
    linear: Linear
    levels: list[Level]
    slopes: list[float]
    y: Array
    noise: float
    dropped: list[int] = field(default_factory=list)


@lru_cache(maxsize=1)
def candidate_features(same: IdentityKey) -> CandidateFeatures:
    """Features of the candidates: their encoding, log MACs and log parameters, standardised; constants go."""
    candidates = same.value
    costs = np.log(np.stack([candidates.macs, candidates.params], axis=1) + 1)
    spread = np.concatenate([candidates.features.std(axis=0), costs.std(axis=0)])
    mean = np.concatenate([candidates.features.mean(axis=0, dtype=np.float64), costs.mean(axis=0)])
    keep = np.flatnonzero(spread > 1e-6)
    x = np.empty((len(candidates), len(keep)), dtype=np.float32)
    for place, column in enumerate(keep):
        known = column < candidates.features.shape[1]
        values = candidates.features[:, column] if known else costs[:, column - candidates.features.shape[1]]
        x[:, place] = (values - mean[column]) / spread[column]
    macs = normal_scores(candidates.macs)[:, None].astype(np.float32)
    return CandidateFeatures(x, macs, min(1.0, float(costs[:, 0].std()) / LOG_MACS_SPREAD))


@lru_cache(maxsize=8)
def _level(same: IdentityKey, rows: bytes, values: bytes, seed: int, inputs: SurrogateInputs) -> Level:
    base, at, y = candidate_features(same), np.frombuffer(rows, dtype=np.int64), normal_scores(np.frombuffer(values))
    macs = base.macs if inputs.macs else np.zeros_like(base.macs)
    prior = Prior(np.array([base.weight * MACS_ON_LOW[0]]), np.array([MACS_ON_LOW[1]]))
    model = xgb.fit(macs[at], base.x[at], y, prior, seed, parts=inputs.parts)
    mean, variance = model.predict(macs, base.x)
    own = (1 - PULL) * model.linear.noise
    variance += own
    mean[at] += PULL * (y - mean[at])
    variance[at] = (1 - PULL) * own
    return Level(mean, variance, model.linear, model.linear.noise)


def level(candidates: Candidates, scores: Scores, seed: int, inputs: SurrogateInputs = SurrogateInputs()) -> Level:
    """The surrogate of one low fidelity, fitted to its scores."""
    return _level(IdentityKey(candidates), scores.rows.tobytes(), scores.values.tobytes(), seed, inputs)


def estimate(candidates: Candidates, lows: Sequence[Scores], high: Scores, seed: int, inputs: SurrogateInputs) -> Estimate:
    """Full accuracy of every candidate, from the scores of any number of low fidelities and of the full one.

    Low fidelities with fewer than ENOUGH_LOW scores are left out; one whose scores make predictions of the full
    results worse, each left out in turn, is dropped, and the log says so.
    """
    base = candidate_features(IdentityKey(candidates))
    levels = {i: level(candidates, s, seed, inputs) for i, s in enumerate(lows) if inputs.low and len(s) >= ENOUGH_LOW}
    macs = base.macs if inputs.macs else np.zeros_like(base.macs)
    dropped: list[int] = []
    while True:
        kept = [levels[i] for i in levels if i not in dropped]
        trend = np.concatenate([macs, *(one.mean[:, None] for one in kept)], axis=1, dtype=np.float32)
        prior = _prior(base, len(kept))
        y = _targets(high.values, trend[high.rows] @ prior.mean)
        worst = _useless(trend[high.rows], base.x[high.rows], y, 1 / high.counts, len(kept), base)
        if worst is None:
            break
        dropped.append([i for i in levels if i not in dropped][worst])
        log.info("low fidelity %d carries no signal beyond MACs after %d full results: dropped", dropped[-1], len(y))
    parts = xgb.SurrogateParts(inputs.parts.linear, inputs.parts.trees and len(y) >= ENOUGH_LOW)
    model = xgb.fit(trend[high.rows], base.x[high.rows], y, prior, seed, 1 / high.counts, parts)
    mean, variance = model.predict(trend, base.x)
    slopes = [float(s) for s in model.linear.weights[2 : 2 + len(kept)]]
    for slope, one in zip(slopes, kept, strict=True):
        variance += slope**2 * one.variance
    return Estimate(mean, variance, base, trend, model.linear, kept, slopes, y, model.noise, dropped)


def _prior(base: CandidateFeatures, levels: int) -> Prior:
    mean = [base.weight * MACS_ON_FULL[0]] + [LOW_ON_FULL[0] / levels for _ in range(levels)]
    return Prior(np.array(mean), np.array([MACS_ON_FULL[1]] + [LOW_ON_FULL[1]] * levels))


def _targets(values: Array, believed: Array) -> Array:
    """Full results as normal scores, spread as the few that were chosen are believed to differ."""
    if len(values) < 2:
        return np.asarray(believed, dtype=np.float64)
    ranked = normal_scores(values)
    scale = np.sqrt(believed.var() + RESIDUAL) / max(float(ranked.std()), 1e-9)
    return np.asarray(ranked * scale + believed.mean(), dtype=np.float64)


def _useless(
    trend: Matrix, x: Matrix, y: Array, noise: Array, levels: int, base: CandidateFeatures
) -> int | None:
    """The level, if any, that is given next to no weight and without which full results are predicted no worse."""
    if len(y) < ENOUGH_FULL or not levels:
        return None
    prior = _prior(base, levels)
    whole = fit_linear(trend, x, y, prior, noise)
    level = int(np.argmin(whole.weights[2 : 2 + levels]))
    if whole.weights[2 + level] > LITTLE_WEIGHT * prior.mean[1 + level]:
        return None
    rest = fit_linear(np.delete(trend, 1 + level, axis=1), x, y, _prior(base, levels - 1), noise)
    return level if _left_out_likelihood(rest, y) > _left_out_likelihood(whole, y) else None


def _left_out_likelihood(fitted: Linear, y: Array) -> float:
    error = (y - fitted.left_out) ** 2 / fitted.left_out_variance + np.log(fitted.left_out_variance)
    return -0.5 * float(error.sum())
