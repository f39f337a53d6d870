"""The surrogate: what the evaluations say about every candidate, from low-fidelity scores up to full accuracy.

All quantities are normal scores: 0 is the middle of the candidates, 1 a standard deviation above it.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache

import numpy as np
import numpy.typing as npt

from engine.search.methods.scores import Array, IdentityKey, Scores
from engine.space import PROXY, Candidates
from surrogate import evidence, xgb
from surrogate.linear import Linear, Prior
from surrogate.quality import normal_scores

log = logging.getLogger(__name__)
Matrix = npt.NDArray[np.float32]

# Prior mean and variance of the slopes of standardised quantities; data correct them from the first score on.
MACS_ON_LOW = (0.5, 0.1)
MACS_ON_FULL = (0.25, 0.1)
LOW_ON_FULL = (0.7, 0.1)
# Training-free scores (the engine has as many) that together are expected to say as much as MACs.
SCORES = 4
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
# Unknown values of a trend are predicted from this many of the known ones.
FILL_FROM = 512
# A low fidelity may be dropped if its weight is below this share of its prior weight.
LITTLE_WEIGHT = 0.3


@dataclass(frozen=True)
class SurrogateInputs:
    """What the surrogate may use: everything, except in an ablation. `trends` are those of `Candidates.trends`."""

    low: bool = True
    macs: bool = True
    trends: bool = True
    parts: xgb.SurrogateParts = xgb.BOTH


@dataclass(frozen=True)
class CandidateFeatures:
    """What is known about the candidates before any evaluation.

    `x` (n, d) are standardised features. `trends` (n, k) are normal scores of MACs and of what else is known of the
    candidates, by the `names` (k,); where a value is unknown it is predicted, with the variance in `trend_variance` (by
    place of the trend; (n,)). `macs_weight` (0..1) is the share of the prior slopes of MACs that their range deserves.
    """

    x: Matrix
    trends: Matrix
    names: tuple[str, ...]
    trend_variance: dict[int, Array]
    macs_weight: float

    def usable(self, inputs: SurrogateInputs) -> CandidateFeatures:
        """What an ablation leaves: MACs alone, or constant MACs."""
        if inputs == SurrogateInputs():
            return self
        trends = self.trends if inputs.trends else self.trends[:, :1]
        trends = trends * np.array([inputs.macs] + [True] * (trends.shape[1] - 1), dtype=np.float32)
        variance = self.trend_variance if inputs.trends else {}
        return replace(self, trends=trends, names=self.names[: trends.shape[1]], trend_variance=variance)

    def prior(self, slope_of_macs: tuple[float, float], levels: int = 0) -> Prior:
        """The prior of the coefficients of the trends and of `levels` low fidelities, which share theirs.

        Training-free scores are made to be greater for better networks: SCORES or more of them are together expected to
        say as much as MACs, but each may say nothing, or the contrary. Of other trends not even the sign is known.
        """
        others = self.names[1:]
        scores = max(SCORES, sum(name.startswith(PROXY) for name in others))
        expected = [slope_of_macs[0] / scores if name.startswith(PROXY) else 0.0 for name in others]
        mean = [self.macs_weight * slope_of_macs[0], *expected, *[LOW_ON_FULL[0] / max(levels, 1)] * levels]
        variance = [slope_of_macs[1], *[evidence.SLAB] * len(others), *[LOW_ON_FULL[1]] * levels]
        if not others:
            return Prior(np.array(mean), np.array(variance))
        included = [1.0, *[evidence.INCLUDED] * len(others), *[1.0] * levels]
        return evidence.SpikeAndSlab(np.array(mean), np.array(variance), np.array(included))


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

    `trend` (n, k) holds the trends of the linear part: those of `features`, then the estimates of the low fidelities in
    use, `levels`, whose indices are `used` and whose weights are `slopes`. `y` (m,) are the full results so far and
    `noise` is the variance of one around its architecture's true score. `dropped` are the indices of the low fidelities
    that turned out to be useless.
    """

    mean: Array
    variance: Array
    features: CandidateFeatures
    trend: Matrix
    linear: Linear
    levels: list[Level]
    used: list[int]
    slopes: list[float]
    y: Array
    noise: float
    dropped: list[int] = field(default_factory=list)


@dataclass(frozen=True)
class Weight:
    """What a fit has learned of one trend: the weight of a standard deviation of it, in standard deviations of accuracy
    (mean, std), and the probability `included` that it says anything at all, 1 where that was in no doubt."""

    name: str
    mean: float
    std: float
    included: float


def learned_weights(fitted: Estimate, lows: Sequence[str]) -> list[Weight]:
    """The weights that full accuracy gives to what is known of the candidates and to low fidelities, whose names are
    `lows`."""
    names = [*fitted.features.names, *(lows[i] for i in fitted.used)]
    return [
        Weight(name, float(mean), float(std), float(included))
        for name, mean, std, included in zip(names, *fitted.linear.coefficients, fitted.linear.included, strict=True)
    ]


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
    trends, variances = {"macs": normal_scores(candidates.macs).astype(np.float32)}, dict[int, Array]()
    for name, values in candidates.trends.items():
        known = values[np.isfinite(values)]
        if len(known) >= ENOUGH_LOW and np.ptp(known) > 0:
            trends[name], variance = _completed(values, trends["macs"][:, None], x)
            if variance.any():
                variances[len(trends) - 1] = variance
    macs_weight = min(1.0, float(costs[:, 0].std()) / LOG_MACS_STD)
    return CandidateFeatures(x, np.stack(list(trends.values()), axis=1), tuple(trends), variances, macs_weight)


def _completed(values: Array, macs: Matrix, x: Matrix) -> tuple[Matrix, Array]:
    """Normal scores (n,) of a trend, and the variance (n,) of each: where a value is not finite, a surrogate fitted to
    the others predicts the score.

    The mean of that posterior is shrunk as much as the score is uncertain, so that it is worth its prediction.
    """
    known = np.flatnonzero(np.isfinite(values))
    trend, variance = np.zeros(len(values), dtype=np.float32), np.zeros(len(values))
    trend[known] = normal_scores(values[known])
    missing = np.flatnonzero(~np.isfinite(values))
    if len(missing):
        sample = np.random.default_rng(0).permutation(known)[:FILL_FROM]
        prior = Prior(np.zeros(1), np.ones(1))
        model = xgb.fit(macs[sample], x[sample], trend[sample].astype(np.float64), prior, 0)
        mean, spread = model.predict(macs[missing], x[missing])
        trend[missing], variance[missing] = mean, spread + model.noise
    return trend, variance


def fit_level(candidates: Candidates, scores: Scores, seed: int, inputs: SurrogateInputs) -> Level:
    """The surrogate of one low fidelity, fitted to its scores. Recent fits are cached."""
    return _fit_level(IdentityKey(candidates), scores.rows.tobytes(), scores.values.tobytes(), seed, inputs)


@lru_cache(maxsize=8)
def _fit_level(key: IdentityKey, rows: bytes, values: bytes, seed: int, inputs: SurrogateInputs) -> Level:
    features = candidate_features(key).usable(inputs)
    scored, y = np.frombuffer(rows, dtype=np.int64), normal_scores(np.frombuffer(values))
    model = xgb.fit(
        features.trends[scored], features.x[scored], y, features.prior(MACS_ON_LOW), seed, parts=inputs.parts
    )
    mean, variance = model.predict(features.trends, features.x)
    _add_variance_of_trends(variance, features, model.linear)
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
    features = candidate_features(IdentityKey(candidates)).usable(inputs)
    levels = {
        i: fit_level(candidates, scores, seed, inputs)
        for i, scores in enumerate(lows)
        if inputs.low and len(scores) >= ENOUGH_LOW
    }
    dropped: list[int] = []
    priors = [features.prior(MACS_ON_FULL, count) for count in range(len(levels) + 1)]
    while True:
        used = [i for i in levels if i not in dropped]
        trend = np.concatenate([features.trends, *(levels[i].mean[:, None] for i in used)], axis=1, dtype=np.float32)
        prior = priors[len(used)]
        y = _targets(high.values, trend[high.rows] @ prior.mean)
        useless = _useless_level(trend[high.rows], features.x[high.rows], y, priors[: len(used) + 1], 1 / high.counts)
        if useless is None:
            break
        dropped.append(used[useless])
        log.info("low fidelity %d carries no signal beyond MACs after %d full results: dropped", dropped[-1], len(y))
    parts = xgb.SurrogateParts(inputs.parts.linear, inputs.parts.trees and len(y) >= ENOUGH_LOW)
    model = xgb.fit(trend[high.rows], features.x[high.rows], y, prior, seed, 1 / high.counts, parts)
    mean, variance = model.predict(trend, features.x)
    _add_variance_of_trends(variance, features, model.linear)
    slopes = [float(slope) for slope in model.linear.coefficients[0][len(features.names) :]]
    for slope, i in zip(slopes, used, strict=True):
        variance += slope**2 * levels[i].variance
    kept = [levels[i] for i in used]
    return Estimate(mean, variance, features, trend, model.linear, kept, used, slopes, y, model.noise, dropped)


def _add_variance_of_trends(variance: Array, features: CandidateFeatures, linear: Linear) -> None:
    """Adds to the variances (n,) of predictions what unknown values of trends, which are predicted, add to them."""
    for place, of_trend in features.trend_variance.items():
        variance += linear.weights[1 + place] ** 2 * of_trend


def _targets(values: Array, expected: Array) -> Array:
    """Full results as normal scores, with the mean and the spread that the prior expects.

    The architectures trained in full are no random sample of the candidates.
    """
    if len(values) < 2:
        return np.asarray(expected, dtype=np.float64)
    ranked = normal_scores(values)
    scale = np.sqrt(expected.var() + RESIDUAL) / max(float(ranked.std()), 1e-9)
    return np.asarray(ranked * scale + expected.mean(), dtype=np.float64)


def _useless_level(trend: Matrix, x: Matrix, y: Array, priors: list[Prior], noise: Array) -> int | None:
    """The index of a level that has next to no weight and without which full results are predicted no worse.

    `priors` are those with each number of levels, from none to all that are in the trend.
    """
    levels = len(priors) - 1
    if len(y) < ENOUGH_FULL or not levels:
        return None
    fitted, first = priors[-1].fit(trend, x, y, noise), trend.shape[1] - levels
    slopes = fitted.weights[1 + first :][:levels]
    level = int(np.argmin(slopes))
    if slopes[level] > LITTLE_WEIGHT * priors[-1].mean[first + level]:
        return None
    without = priors[-2].fit(np.delete(trend, first + level, axis=1), x, y, noise)
    return level if _left_out_likelihood(without, y) > _left_out_likelihood(fitted, y) else None


def _left_out_likelihood(fitted: Linear, y: Array) -> float:
    error = (y - fitted.left_out) ** 2 / fitted.left_out_variance + np.log(fitted.left_out_variance)
    return -0.5 * float(error.sum())
