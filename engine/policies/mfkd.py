"""Our method, first form: a spread low-fidelity batch, then UCB of the blended surrogate over the whole space."""

from __future__ import annotations

import itertools

import numpy as np

from engine.config import Plan
from engine.journal import History
from engine.policies.known import Rows, Scores, ask, scores, unasked
from engine.space import Candidates
from engine.trial import Trial
from surrogate import xgb
from surrogate.quality import normal_scores


def mfkd(candidates: Candidates, history: History, plan: Plan, slots: int) -> list[Trial]:
    """Low-fidelity scores of candidates spread over MACs, then full-fidelity runs where mean + std is highest."""
    low, high = scores(candidates, history, plan.lows[0]), scores(candidates, history, plan.high)
    wanted = min(plan.max_low, len(candidates))
    if low.trials < wanted:
        rows = _spread(candidates, plan.seed, wanted)[low.trials : low.trials + slots]
        return ask(candidates, history, plan, rows, plan.lows[0])
    if len(low.pending) > wanted // 4 or high.trials >= min(plan.max_high, len(candidates)):
        return []
    mean, std = estimate(candidates, low, high, plan.seed)
    value = np.where(unasked(candidates, high.asked), mean + 0.5 * std, -np.inf)
    count = min(slots, plan.max_high - high.trials, int(np.isfinite(value).sum()))
    return ask(candidates, history, plan, np.argsort(-value, kind="stable")[:count], plan.high)


def _spread(candidates: Candidates, seed: int, count: int) -> Rows:
    """`count` rows, one drawn at random from each of as many equal slices of the order by MACs, shuffled."""
    rng = np.random.default_rng(abs(seed))
    order = np.argsort(candidates.macs, kind="stable")
    edges = np.linspace(0, len(order), count + 1).astype(np.int64)
    picks = np.array([rng.integers(a, b) for a, b in itertools.pairwise(edges)])
    return np.asarray(order[rng.permutation(picks)], dtype=np.int64)


def estimate(candidates: Candidates, low: Scores, high: Scores, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Mean and standard deviation (n,) of full accuracy, in normal scores."""
    x = np.concatenate(
        [candidates.features, np.log(np.stack([candidates.macs + 1, candidates.params + 1], axis=1))], axis=1
    ).astype(np.float32)
    x = (x - x.mean(axis=0)) / (x.std(axis=0) + 1e-6)
    rows = np.concatenate([low.rows, high.rows])
    if not len(rows):
        return normal_scores(candidates.macs), np.ones(len(candidates))
    values = np.concatenate([normal_scores(low.values), normal_scores(high.values) + 0.5])
    return xgb.fit(x[rows], values, abs(seed)).predict(x)
