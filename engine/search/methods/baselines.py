"""Rivals of our method, as they are published, each with the same interface."""

from __future__ import annotations

import numpy as np

from engine.config import Plan
from engine.search.methods.estimate import candidate_features
from engine.search.methods.scores import Array, IdentityKey, Rows, Scores, ask, generator, scores, unasked, worker_count
from engine.space import Candidates
from engine.trial import History, Trial
from surrogate.baselines import fit_gp

UCB = 0.5  # of the paper's own notebook
POPULATION, TOURNAMENT = 20, 5
RANDOM_START = 8  # full runs at most, one for each worker, before a model of the full fidelity alone is trusted
ETA = 4


def random(candidates: Candidates, history: History, plan: Plan, slots: int) -> list[Trial]:
    """Full fidelity, uniformly at random, without replacement."""
    high = scores(candidates, history, plan.high)
    free = np.flatnonzero(unasked(candidates, high.asked))
    count = _allowed(plan, high, slots, len(free))
    return ask(candidates, history, plan, generator(history, plan).choice(free, count, replace=False), plan.high)


def macs_only(candidates: Candidates, history: History, plan: Plan, slots: int) -> list[Trial]:
    """Full fidelity, down the order of multiply-accumulates."""
    high = scores(candidates, history, plan.high)
    return _take(candidates, history, plan, high, slots, candidates.macs)


def evolution(candidates: Candidates, history: History, plan: Plan, slots: int) -> list[Trial]:
    """Regularised evolution (Real et al. 2019), asynchronous: a random population, then one changed choice of the
    best of a tournament among the youngest; a random member where all neighbours have been asked."""
    high = scores(candidates, history, plan.high)
    free = unasked(candidates, high.asked)
    rng = generator(history, plan)
    rows: list[int] = []
    for _ in range(_allowed(plan, high, slots, int(free.sum()))):
        options = np.flatnonzero(free)
        if high.trials + len(rows) >= POPULATION and len(high):
            youngest = np.arange(max(0, len(high) - POPULATION), len(high))
            drawn = rng.choice(youngest, min(TOURNAMENT, len(youngest)), replace=False)
            parent = candidates.choices[high.rows[drawn[np.argmax(high.values[drawn])]]]
            near = np.flatnonzero(((candidates.choices != parent).sum(axis=1) == 1) & free)
            options = near if len(near) else options
        rows.append(int(rng.choice(options)))
        free[rows[-1]] = False
    return ask(candidates, history, plan, rows, plan.high)


def halving(candidates: Candidates, history: History, plan: Plan, slots: int) -> list[Trial]:
    """Successive halving with two rungs: random low-fidelity runs, then full ones down the order of their scores."""
    low, high = scores(candidates, history, plan.lows[0]), scores(candidates, history, plan.high)
    wanted = _low_runs(candidates, plan)
    if low.trials < wanted:
        return _random_low(candidates, history, plan, low, min(slots, wanted - low.trials))
    if len(low.pending):
        return []  # a rung is promoted as a whole
    if not len(low):
        return random(candidates, history, plan, slots)
    return _promote(candidates, history, plan, low, high, slots)


def asha(candidates: Candidates, history: History, plan: Plan, slots: int) -> list[Trial]:
    """ASHA (Li et al. 2020) with two rungs: whatever is in the best 1 / ETA of the low scores so far is promoted;
    otherwise another random low-fidelity run."""
    low, high = scores(candidates, history, plan.lows[0]), scores(candidates, history, plan.high)
    if high.trials >= plan.max_high:
        return []  # nothing could be promoted
    best = low.rows[np.argsort(-low.values, kind="stable")][: len(low) // ETA]
    promotable = [int(row) for row in best if row not in high.asked]
    trials = ask(candidates, history, plan, promotable[: _allowed(plan, high, slots, len(promotable))], plan.high)
    more = min(slots - len(trials), len(candidates) - len(low.asked), plan.max_low - low.trials)
    if more > 0:
        free = np.flatnonzero(unasked(candidates, low.asked))
        rows = generator(history, plan).choice(free, more, replace=False)
        seen = History(history.answered, history.pending + trials)
        trials += ask(candidates, seen, plan, rows, plan.lows[0])
    if trials or len(low.pending) or len(low):
        return trials or _promote(candidates, history, plan, low, high, slots)
    return random(candidates, history, plan, slots)


def gp(candidates: Candidates, history: History, plan: Plan, slots: int) -> list[Trial]:
    """The paper's rival: a Gaussian process on full fidelity alone, upper confidence bound."""
    high = scores(candidates, history, plan.high)
    if high.trials < min(RANDOM_START, worker_count(plan, history, slots)) or not len(high):
        return random(candidates, history, plan, slots)
    return _take(candidates, history, plan, high, slots, _gp_bound(candidates, high.rows, high.values))


def _low_batch(
    candidates: Candidates, history: History, plan: Plan, low: Scores, slots: int
) -> list[Trial] | None:
    """Random low-fidelity runs, then the wait for them, then None; full runs at random where none gave a score."""
    wanted = _low_runs(candidates, plan)
    if low.trials < wanted:
        return _random_low(candidates, history, plan, low, min(slots, wanted - low.trials))
    if len(low.pending):
        return []
    return None if len(low) else random(candidates, history, plan, slots)


def mfkd1(candidates: Candidates, history: History, plan: Plan, slots: int) -> list[Trial]:
    """The paper's first algorithm: random low-fidelity runs, a Gaussian process of them, full runs down the order of
    its mean."""
    low, high = scores(candidates, history, plan.lows[0]), scores(candidates, history, plan.high)
    first = _low_batch(candidates, history, plan, low, slots)
    if first is not None:
        return first
    mean, _ = fit_gp(_features(candidates)[low.rows], low.values).predict(_features(candidates))
    return _take(candidates, history, plan, high, slots, mean)


def mfkd2(candidates: Candidates, history: History, plan: Plan, slots: int) -> list[Trial]:
    """The paper's second algorithm: Gaussian-process search at low fidelity; the same at full fidelity, begun at the
    best low score."""
    low, high = scores(candidates, history, plan.lows[0]), scores(candidates, history, plan.high)
    wanted = min(plan.max_low, 30, max(10, len(candidates) // 10), len(candidates))
    if low.trials < wanted:
        if not len(low):
            return _random_low(candidates, history, plan, low, min(slots, wanted - low.trials))
        bound = _gp_bound(candidates, low.rows, low.values)
        bound[low.asked] = -np.inf
        rows = np.argsort(-bound, kind="stable")[: min(slots, wanted - low.trials)]
        return ask(candidates, history, plan, rows, plan.lows[0])
    if len(low.pending) or not len(low):
        return [] if len(low.pending) else random(candidates, history, plan, slots)
    if len(high) < 2:  # workers beyond the first take the next best low scores
        return _promote(candidates, history, plan, low, high, slots)
    return _take(candidates, history, plan, high, slots, _gp_bound(candidates, high.rows, high.values))


def cokriging(candidates: Candidates, history: History, plan: Plan, slots: int) -> list[Trial]:
    """Co-kriging (Kennedy and O'Hagan 2000): a Gaussian process of the low scores, scaled, plus one of what is left
    of the full results; upper confidence bound."""
    low, high = scores(candidates, history, plan.lows[0]), scores(candidates, history, plan.high)
    first = _low_batch(candidates, history, plan, low, slots)
    if first is not None:
        return first
    x = _features(candidates)
    mean, std = fit_gp(x[low.rows], low.values).predict(x)
    if len(high) < 4:
        return _take(candidates, history, plan, high, slots, mean + UCB * std)
    at = mean[high.rows] - mean[high.rows].mean()
    rho = float(at @ (high.values - high.values.mean())) / max(float(at @ at), 1e-12)
    left, spread = fit_gp(x[high.rows], high.values - rho * mean[high.rows]).predict(x)
    bound = rho * mean + left + UCB * np.sqrt((rho * std) ** 2 + spread**2)
    return _take(candidates, history, plan, high, slots, bound)


def _low_runs(candidates: Candidates, plan: Plan) -> int:
    """A third of a small table, at most what the plan allows: all of it would leave nothing to find."""
    return min(plan.max_low, max(10, len(candidates) // 3), len(candidates))


def _features(candidates: Candidates) -> Array:
    return np.asarray(candidate_features(IdentityKey(candidates)).x, dtype=np.float64)


def _gp_bound(candidates: Candidates, rows: Rows, values: Array) -> Array:
    x = _features(candidates)
    mean, std = fit_gp(x[rows], values).predict(x)
    return mean + UCB * std


def _allowed(plan: Plan, high: Scores, slots: int, free: int) -> int:
    return max(0, min(slots, plan.max_high - high.trials, free))


def _take(
    candidates: Candidates, history: History, plan: Plan, high: Scores, slots: int, value: Array
) -> list[Trial]:
    """Full runs of the candidates of greatest value (n,) that have not been asked."""
    free = unasked(candidates, high.asked)
    order = np.argsort(np.where(free, -value, np.inf), kind="stable")
    return ask(candidates, history, plan, order[: _allowed(plan, high, slots, int(free.sum()))], plan.high)


def _random_low(candidates: Candidates, history: History, plan: Plan, low: Scores, count: int) -> list[Trial]:
    free = np.flatnonzero(unasked(candidates, low.asked))
    rows = generator(history, plan).choice(free, min(count, len(free)), replace=False)
    return ask(candidates, history, plan, rows, plan.lows[0])


def _promote(
    candidates: Candidates, history: History, plan: Plan, low: Scores, high: Scores, slots: int
) -> list[Trial]:
    """Full runs down the order of low-fidelity scores; nothing once they are used up."""
    order = low.rows[np.argsort(-low.values, kind="stable")]
    rows = [int(row) for row in order if row not in high.asked]
    return ask(candidates, history, plan, rows[: _allowed(plan, high, slots, len(rows))], plan.high)
