"""Which architecture a search recommends, and how far a measurement of it can be trusted."""

from __future__ import annotations

import numpy as np

from engine.config import Plan
from engine.search.methods.estimate import ENOUGH_LOW, Estimate, SurrogateInputs, estimate
from engine.search.methods.readout import by_best_readout
from engine.search.methods.scores import Array, Scores, scores
from engine.space import Candidates
from engine.trial import Evaluation, History
from surrogate.linear import Linear

# Lower bound on the share of the left-out variance that is the surrogate's own error, not noise of the measurement.
LEAST_MODEL_ERROR = 0.05
# Until repeats have shown how large the noise is, its share of the left-out variance: the least and the most. A
# measurement then counts three times as much as its prediction, down to as much.
UNKNOWN_NOISE = (0.25, 0.5)


def winner(candidates: Candidates, history: History, plan: Plan) -> Evaluation | None:
    """The full-fidelity evaluation to recommend; None if none succeeded.

    It is the best score after shrinking each measured score towards what the surrogate predicts for it from the others:
    by a quarter of the way, by up to half where few validation images make the score noisy, or by as much as repeats
    have shown.
    """
    full = [e for e in history.answered if e.ok and e.trial.fidelity == plan.high]
    high = scores(candidates, history, plan.high)
    if len(high) < ENOUGH_LOW:
        return max(full, key=lambda e: e.accuracy, default=None)
    read = by_best_readout(history, plan)
    lows = [scores(candidates, read, low) for low in plan.below_full]
    fitted = estimate(candidates, lows, high, plan.seed, SurrogateInputs())
    noise = noise_variance(history, plan, high, fitted)
    mean, _ = posterior(fitted.linear, fitted.y, high.counts, noise)
    best = candidates.architecture(int(high.rows[np.argmax(mean)]))
    return max((e for e in full if e.trial.architecture == best), key=lambda e: e.accuracy)


def posterior(linear: Linear, y: Array, counts: Array, noise: Array) -> tuple[Array, Array]:
    """Mean and variance (m,) of the true scores of the measured architectures.

    A measurement y (m,), the mean of `counts` (m,) with variance `noise` (m,) each, and its prediction from the other
    measurements are weighted by their variances.
    """
    prior = linear.left_out_variance  # that of a measurement: the true score varies less, by the noise of one
    variance = noise / counts
    prior = np.maximum(prior - variance, LEAST_MODEL_ERROR * prior)
    weight = prior / (prior + variance)
    return linear.left_out + weight * (y - linear.left_out), weight * variance


def noise_variance(history: History, plan: Plan, high: Scores, fitted: Estimate) -> Array:
    """Variance (m,) of one full measurement around its architecture's true score, on the scale of fitted.y.

    It is estimated from repeats if there are any; otherwise it is the binomial variance of an accuracy on
    plan.valid_images images, within the bounds of UNKNOWN_NOISE.
    """
    groups: dict[tuple[int, ...], list[float]] = {}
    for e in history.answered:
        if e.ok and e.trial.fidelity == plan.high:
            groups.setdefault(e.trial.architecture.choices, []).append(e.accuracy)
    repeated = [np.var(v, ddof=1) for v in groups.values() if len(v) > 1]
    std = float(np.std(high.values))
    scale = (float(np.std(fitted.y)) / std) ** 2 if std else 0.0
    if repeated and scale:
        return np.full(len(high), float(np.mean(repeated)) * scale)
    binomial = high.values * (1 - high.values) / plan.valid_images if plan.valid_images else np.zeros(len(high))
    least, most = (share * fitted.linear.left_out_variance for share in UNKNOWN_NOISE)
    return np.clip(binomial * scale, least, most)
