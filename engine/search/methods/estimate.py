"""The surrogate: what the evaluations say about every candidate, from low-fidelity scores up to full accuracy.

All quantities are normal scores: 0 is the middle of the candidates, 1 a standard deviation above it.
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

# Prior mean and variance of the slopes of standardised quantities; data correct them from the first score on.
MACS_ON_LOW = (0.5, 0.1)
MACS_ON_FULL = (0.25, 0.1)
LOW_ON_FULL = (0.7, 0.1)
# If the logarithm of MACs has a smaller standard deviation than this, their prior slope shrinks in proportion: under a
# cap on MACs, size says little.
LOG_MACS_STD = 0.5
# Variance of full accuracy that low fidelity and MACs are not expected to explain.
RESIDUAL = 0.3
# A low score is taken to be half its architecture's own deviation and half noise, so it pulls the estimate of its
# architecture this share of the way from the smooth fit.
PULL = 0.5
# Scores needed to fit a fidelity, and full results needed before one may be dropped.
ENOUGH_LOW, ENOUGH_FULL = 4, 12
# A low fidelity may be dropped if its weight is below this share of its prior weight.
LITTLE_WEIGHT = 0.3


@dataclass(frozen=True)
class SurrogateInputs:
    """What the surrogate may use: everything, except in an ablation."""

    low: bool = True
    macs: bool = True
    parts: xgb.SurrogateParts = xgb.BOTH


@dataclass(frozen=True)
class CandidateFeatures:
    """What is known about the candidates before any evaluation.

    `x` (n, d) are standardised features, `macs` (n, 1) normal scores of MACs, and `macs_weight` (0..1) the share of the
    prior slopes of MACs that their range deserves.
    """

    x: Matrix
    macs: Matrix
    macs_weight: float


@dataclass(frozen=True)
class Level:
    """The estimate of one low fidelity's scores.

    `mean` and `variance` (n,) are those of an architecture's own score, `linear` is the linear part of the fit, `noise`
    the variance of one measurement.
    """

    mean: Array
    variance: Array
    linear: Linear
    noise: float


@dataclass(frozen=True)
class Estimate:
    """Full accuracy of each candidate: `mean` and `variance` (n,).

    `trend` (n, 1 + levels) holds the trends of the linear part, `levels` the low fidelities in use and `slopes` their
    weights. `y` (m,) are the full results so far and `noise` is the variance of one around its architecture's true
    score. `dropped` are the indices of the low fidelities that turned out to be useless.
    """

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
def candidate_features(key: IdentityKey) -> CandidateFeatures:
    """The candidates' encoding, log MACs and log parameters, standardised; constant columns are left out."""
    candidates = key.value
    costs = np.log(np.stack([candidates.macs, candidates.params], axis=1) + 1)
    std = np.concatenate([candidates.features.std(axis=0), costs.std(axis=0)])
    mean = np.concatenate([candidates.features.mean(axis=0, dtype=np.float64), costs.mean(axis=0)])
    keep = np.flatnonzero(std > 1e-6)
    encoded = candidates.features.shape[1]
    x = np.empty((len(candidates), len(keep)), dtype=np.float32)
    for place, column in enumerate(keep):
        values = candidates.features[:, column] if column < encoded else costs[:, column - encoded]
        x[:, place] = (values - mean[column]) / std[column]
    macs = normal_scores(candidates.macs)[:, None].astype(np.float32)
    return CandidateFeatures(x, macs, min(1.0, float(costs[:, 0].std()) / LOG_MACS_STD))


def fit_level(candidates: Candidates, scores: Scores, seed: int, inputs: SurrogateInputs) -> Level:
    """The surrogate of one low fidelity, fitted to its scores. Recent fits are cached."""
    return _fit_level(IdentityKey(candidates), scores.rows.tobytes(), scores.values.tobytes(), seed, inputs)


@lru_cache(maxsize=8)
def _fit_level(key: IdentityKey, rows: bytes, values: bytes, seed: int, inputs: SurrogateInputs) -> Level:
    features = candidate_features(key)
    scored, y = np.frombuffer(rows, dtype=np.int64), normal_scores(np.frombuffer(values))
    macs = _macs_trend(features, inputs)
    prior = Prior(np.array([features.macs_weight * MACS_ON_LOW[0]]), np.array([MACS_ON_LOW[1]]))
    model = xgb.fit(macs[scored], features.x[scored], y, prior, seed, parts=inputs.parts)
    mean, variance = model.predict(macs, features.x)
    own = (1 - PULL) * model.linear.noise  # variance of what is particular to an architecture
    variance += own
    mean[scored] += PULL * (y - mean[scored])
    variance[scored] = (1 - PULL) * own
    return Level(mean, variance, model.linear, model.linear.noise)


def estimate(
    candidates: Candidates, lows: Sequence[Scores], high: Scores, seed: int, inputs: SurrogateInputs
) -> Estimate:
    """Full accuracy of every candidate, from the scores of the full fidelity and of any number of low ones.

    Low fidelities with fewer than ENOUGH_LOW scores are left out. One that makes left-out predictions of the full
    results worse is dropped, and the log says so.
    """
    features = candidate_features(IdentityKey(candidates))
    levels = {
        i: fit_level(candidates, scores, seed, inputs)
        for i, scores in enumerate(lows)
        if inputs.low and len(scores) >= ENOUGH_LOW
    }
    macs = _macs_trend(features, inputs)
    dropped: list[int] = []
    while True:
        kept = [levels[i] for i in levels if i not in dropped]
        trend = np.concatenate([macs, *(level.mean[:, None] for level in kept)], axis=1, dtype=np.float32)
        prior = _full_prior(features, len(kept))
        y = _targets(high.values, trend[high.rows] @ prior.mean)
        useless = _useless_level(trend[high.rows], features.x[high.rows], y, prior, 1 / high.counts, features)
        if useless is None:
            break
        dropped.append([i for i in levels if i not in dropped][useless])
        log.info("low fidelity %d carries no signal beyond MACs after %d full results: dropped", dropped[-1], len(y))
    parts = xgb.SurrogateParts(inputs.parts.linear, inputs.parts.trees and len(y) >= ENOUGH_LOW)
    model = xgb.fit(trend[high.rows], features.x[high.rows], y, prior, seed, 1 / high.counts, parts)
    mean, variance = model.predict(trend, features.x)
    slopes = [float(slope) for slope in model.linear.weights[2 : 2 + len(kept)]]
    for slope, level in zip(slopes, kept, strict=True):
        variance += slope**2 * level.variance
    return Estimate(mean, variance, features, trend, model.linear, kept, slopes, y, model.noise, dropped)


def _macs_trend(features: CandidateFeatures, inputs: SurrogateInputs) -> Matrix:
    return features.macs if inputs.macs else np.zeros_like(features.macs)


def _full_prior(features: CandidateFeatures, levels: int) -> Prior:
    """Prior slopes of MACs and of each low fidelity, which share theirs."""
    mean = [features.macs_weight * MACS_ON_FULL[0]] + [LOW_ON_FULL[0] / levels for _ in range(levels)]
    return Prior(np.array(mean), np.array([MACS_ON_FULL[1]] + [LOW_ON_FULL[1]] * levels))


def _targets(values: Array, expected: Array) -> Array:
    """Full results as normal scores, with the mean and the spread that the prior expects.

    The architectures trained in full are no random sample of the candidates.
    """
    if len(values) < 2:
        return np.asarray(expected, dtype=np.float64)
    ranked = normal_scores(values)
    scale = np.sqrt(expected.var() + RESIDUAL) / max(float(ranked.std()), 1e-9)
    return np.asarray(ranked * scale + expected.mean(), dtype=np.float64)


def _useless_level(
    trend: Matrix, x: Matrix, y: Array, prior: Prior, noise: Array, features: CandidateFeatures
) -> int | None:
    """The index of a level that has next to no weight and without which full results are predicted no worse."""
    levels = len(prior.mean) - 1
    if len(y) < ENOUGH_FULL or not levels:
        return None
    fitted = fit_linear(trend, x, y, prior, noise)
    level = int(np.argmin(fitted.weights[2 : 2 + levels]))
    if fitted.weights[2 + level] > LITTLE_WEIGHT * prior.mean[1 + level]:
        return None
    without = fit_linear(np.delete(trend, 1 + level, axis=1), x, y, _full_prior(features, levels - 1), noise)
    return level if _left_out_likelihood(without, y) > _left_out_likelihood(fitted, y) else None


def _left_out_likelihood(fitted: Linear, y: Array) -> float:
    error = (y - fitted.left_out) ** 2 / fitted.left_out_variance + np.log(fitted.left_out_variance)
    return -0.5 * float(error.sum())
