"""Which architecture a search recommends in the end, and what a second measurement of it would be worth."""

from __future__ import annotations

import numpy as np

from engine.config import Plan
from engine.search.methods.estimate import ENOUGH_LOW, Estimate, SurrogateInputs, estimate
from engine.search.methods.scores import Array, Scores, scores
from engine.space import Candidates
from engine.trial import Evaluation, History
from surrogate.linear import Linear

# Part of what left-out predictions are wrong by that is never held for luck in the measurement, and the least and most
# that is until repeats have shown how much there is: a measurement counts one to three times as much as its prediction.
LEAST = 0.05
UNKNOWN_NOISE = (0.25, 0.5)


def winner(candidates: Candidates, history: History, plan: Plan) -> Evaluation | None:
    """The full-fidelity answer to recommend, None where none succeeded: the best measured score, each shrunk towards
    what the surrogate makes of the others (a quarter of the way, up to half where few validation images make it luck,
    or as far as repeats have shown)."""
    full = [e for e in history.answered if e.ok and e.trial.fidelity == plan.high]
    high = scores(candidates, history, plan.high)
    if len(high) < ENOUGH_LOW:
        return max(full, key=lambda e: e.accuracy, default=None)
    lows = [scores(candidates, history, low) for low in plan.lows]
    known = estimate(candidates, lows, high, plan.seed, SurrogateInputs())
    noise = noise_variance(history, plan, high, known)
    best = candidates.architecture(int(high.rows[np.argmax(posterior(known.linear, known.y, high.counts, noise)[0])]))
    return max((e for e in full if e.trial.architecture == best), key=lambda e: e.accuracy)


def front(history: History, plan: Plan) -> list[Evaluation]:
    """The full-fidelity answers that no other one beats in both accuracy and multiply-accumulates, cheapest first.

    Of an architecture that was trained more than once the best answer counts, as for the winner.
    """
    full = [e for e in history.answered if e.ok and e.trial.fidelity == plan.high]
    best: list[Evaluation] = []
    for evaluation in sorted(full, key=lambda e: (e.macs, -e.accuracy)):
        if not best or evaluation.accuracy > best[-1].accuracy:
            best.append(evaluation)
    return best


def posterior(linear: Linear, y: Array, counts: Array, noise: Array) -> tuple[Array, Array]:
    """Mean and variance (m,) of the measured architectures' true scores: the measurement y (m,), a mean of `counts`
    (m,) of variance `noise` (m,) each, and the prediction from the others, weighed by their variances."""
    prior = linear.left_out_variance  # of a measurement: of the true score it is less by the luck in one
    luck = noise / counts
    prior = np.maximum(prior - luck, LEAST * prior)
    weight = prior / (prior + luck)
    return linear.left_out + weight * (y - linear.left_out), weight * luck


def noise_variance(history: History, plan: Plan, high: Scores, known: Estimate) -> Array:
    """Variance (m,) of one full measurement around its architecture's true score, on the scale of known.y.

    From repeats where there are some; else what counting right answers among so many validation images makes it
    (binomial), within the bounds of UNKNOWN_NOISE.
    """
    groups: dict[tuple[int, ...], list[float]] = {}
    for e in history.answered:
        if e.ok and e.trial.fidelity == plan.high:
            groups.setdefault(e.trial.architecture.choices, []).append(e.accuracy)
    repeated = [np.var(v, ddof=1) for v in groups.values() if len(v) > 1]
    spread = float(np.std(high.values))
    scale = (float(np.std(known.y)) / spread) ** 2 if spread else 0.0
    if repeated and scale:
        return np.full(len(high), float(np.mean(repeated)) * scale)
    counted = high.values * (1 - high.values) / plan.valid_images if plan.valid_images else np.zeros(len(high))
    least, most = (part * known.linear.left_out_variance for part in UNKNOWN_NOISE)
    return np.clip(counted * scale, least, most)
