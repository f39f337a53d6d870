"""The opening of a search in a pretrained space: many candidates are scored with inherited weights, without training.

Such a score costs a few percent of a low-fidelity one and ranks networks cut from one pretrained network nearly as
well, so it tells where low-fidelity trials are worth their cost.
"""

from __future__ import annotations

import numpy as np

from engine.config import Plan
from engine.search.methods.estimate import SurrogateInputs, candidate_features, fit_level
from engine.search.methods.scores import Array, IdentityKey, Rows, Scores, ask, scores, top, unasked
from engine.space import Candidates
from engine.trial import History, Trial
from surrogate.acquire import pick_batch

# How many candidates are scored: as many as cost this many full trainings, within bounds. The first third is spread
# over MACs, the others are those that promise most, in rounds.
COST, BOUNDS, ROUND = 8.0, (64, 512), 16
# Weight of the standard deviation in the upper confidence bound.
BETA = 0.5


def opening_size(candidates: Candidates, plan: Plan) -> int:
    """How many candidates the opening scores: none without an opening fidelity."""
    if plan.opening is None:
        return 0
    least, most = BOUNDS
    return min(len(candidates), max(least, min(most, round(COST * plan.high.cost() / plan.opening.cost()))))


def opening_trials(candidates: Candidates, history: History, plan: Plan, slots: int) -> list[Trial] | None:
    """The next trials of the opening, [] while some are pending, None once it is complete."""
    size, fidelity = opening_size(candidates, plan), plan.opening
    if fidelity is None:
        return None
    own = scores(candidates, history, fidelity)
    if own.trials >= size:
        return [] if len(own.pending) else None
    # For a front they all are spread: what promises most depends on what one may spend.
    first = _spread(candidates, plan.cost or "macs", size if plan.cost else size // 3, plan.seed)
    rows = first[unasked(candidates, own.asked)[first]]
    if not len(rows):
        rows = _promising(candidates, own, plan.seed)
    return ask(candidates, history, plan, rows[: min(slots, size - own.trials)].tolist(), fidelity)


def _spread(candidates: Candidates, cost: str, count: int, seed: int) -> Rows:
    rng = np.random.default_rng([seed, 0x09E4])
    return rng.permutation(candidates.spread_by(cost, count, rng))


def _promising(candidates: Candidates, own: Scores, seed: int) -> Rows:
    """The next round, most promising first; none before the last one is known well enough."""
    if len(own) < ROUND or len(own.pending) >= 2 * ROUND:
        return np.zeros(0, dtype=np.int64)
    return best_by_scores(candidates, own, seed, ROUND, own.asked)


def best_by_scores(candidates: Candidates, own: Scores, seed: int, count: int, excluded: Rows) -> Rows:
    """Rows (count,) of high scores that a surrogate predicts, apart from `excluded`: diverse ones, each picked as if
    those before it were measured."""
    level = fit_level(candidates, own, seed, SurrogateInputs())
    bound: Array = level.mean + BETA * np.sqrt(level.variance)
    bound[~unasked(candidates, excluded)] = -np.inf
    rows = top(bound)
    features = candidate_features(IdentityKey(candidates))
    covariance = level.linear.joint(features.trends[rows], features.x[rows])
    picks = pick_batch(level.mean[rows], covariance, BETA, level.noise, 0, count)
    return np.asarray(rows[picks], dtype=np.int64)
