"""Which architecture a search recommends in the end, and what a second measurement of it would be worth."""

from __future__ import annotations

import numpy as np

from engine.config import Plan
from engine.search.journal import History
from engine.search.policies.estimate import ENOUGH_LOW, Use, estimate
from engine.search.policies.known import Array, Scores, scores
from engine.space import Candidates
from engine.trial import Evaluation
from surrogate.linear import Linear

# Part of what left-out predictions are wrong by that is never held for luck in the measurement, and the part that is
# until repeats have shown how much there is: a measurement then counts three times as much as its prediction.
LEAST = 0.05
UNKNOWN_NOISE = 0.25


def winner(candidates: Candidates, history: History, plan: Plan) -> Evaluation | None:
    """The full-fidelity answer to recommend, None where none succeeded: the best measured score, each shrunk towards
    what the surrogate makes of the others (a quarter of the way, unless repeats have shown how noisy one is)."""
    full = [e for e in history.answered if e.ok and e.trial.fidelity == plan.high]
    high = scores(candidates, history, plan.high)
    if len(high) < ENOUGH_LOW:
        return max(full, key=lambda e: e.accuracy, default=None)
    lows = [scores(candidates, history, low) for low in plan.lows]
    known = estimate(candidates, lows, high, plan.seed, Use())
    noise = noise_variance(history, plan, high, known.y)
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


def posterior(linear: Linear, y: Array, counts: Array, noise: float | None) -> tuple[Array, Array]:
    """Mean and variance (m,) of the measured architectures' true scores: the measurement y (m,), a mean of `counts`
    (m,), and the prediction from the others, weighed by their variances. `noise` None: UNKNOWN_NOISE."""
    prior = linear.left_out_variance  # of a measurement: of the true score it is less by the luck in one
    luck = luck_in_one(linear, noise) / counts
    prior = np.maximum(prior - luck, LEAST * prior)
    weight = prior / (prior + luck)
    return linear.left_out + weight * (y - linear.left_out), weight * luck


def luck_in_one(linear: Linear, noise: float | None) -> Array:
    """Variance (m,) of one full measurement around its architecture's true score, on the scale of y."""
    return UNKNOWN_NOISE * linear.left_out_variance if noise is None else np.full(len(linear.left_out), noise)


def noise_variance(history: History, plan: Plan, high: Scores, y: Array) -> float | None:
    """Variance of one full measurement on the scale of y, from repeats; None where there are none."""
    groups: dict[tuple[int, ...], list[float]] = {}
    for e in history.answered:
        if e.ok and e.trial.fidelity == plan.high:
            groups.setdefault(e.trial.architecture.choices, []).append(e.accuracy)
    repeated = [np.var(v, ddof=1) for v in groups.values() if len(v) > 1]
    spread = float(np.std(high.values))
    if not repeated or spread == 0:
        return None
    return float(np.mean(repeated)) * (float(np.std(y)) / spread) ** 2
