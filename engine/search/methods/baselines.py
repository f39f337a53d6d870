"""Baselines: published search methods with the interface of `mfkd`."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from engine.config import Plan
from engine.search.methods.estimate import candidate_features
from engine.search.methods.scores import Array, IdentityKey, Rows, Scores, ask, generator, scores, unasked, worker_count
from engine.space import PROXY, Candidates
from engine.trial import History, Trial, UsageError
from surrogate.baselines import bore, fit_gp
from surrogate.quality import ranks

BETA = 0.5  # weight of the standard deviation in upper confidence bounds: that of the paper's notebook
POPULATION, TOURNAMENT = 20, 5
RANDOM_START = 8  # most random full trials before a Gaussian process of the full fidelity alone is trusted
ETA = 4
NASWOT = ("proxy:nwot", "proxy:naswot")  # its names among `Candidates.trends`
MFKD2_LOW = (10, 30)  # fewest and most low-fidelity trials of mfkd2, which asks a tenth of the candidates


def random(candidates: Candidates, history: History, plan: Plan, slots: int) -> list[Trial]:
    """Full trials, uniformly at random without replacement."""
    high = scores(candidates, history, plan.high)
    free = np.flatnonzero(unasked(candidates, high.asked))
    count = _full_count(plan, high, slots, len(free))
    return ask(candidates, history, plan, generator(history, plan).choice(free, count, replace=False), plan.high)


def macs_only(candidates: Candidates, history: History, plan: Plan, slots: int) -> list[Trial]:
    """Full trials in descending order of multiply-accumulates."""
    high = scores(candidates, history, plan.high)
    return _highest(candidates, history, plan, high, slots, candidates.macs)


def proxies_only(candidates: Candidates, history: History, plan: Plan, slots: int) -> list[Trial]:
    """Full trials in descending order of all training-free scores together, as AZ-NAS ranks (Lee and Ham 2024, eq. 9).

    That is the sum over the scores of log(rank / n), the highest of n candidates having rank n; one without a score
    counts as in the middle. Raises UsageError if there are no scores.
    """
    value = np.zeros(len(candidates))
    for name in _found(candidates, [name for name in candidates.trends if name.startswith(PROXY)], "proxies"):
        known = np.isfinite(candidates.trends[name])
        share = np.full(len(candidates), 0.5)
        share[known] = ranks(candidates.trends[name][known]) / max(int(known.sum()), 1)
        value += np.log(share)
    return _highest(candidates, history, plan, scores(candidates, history, plan.high), slots, value)


def naswot(candidates: Candidates, history: History, plan: Plan, slots: int) -> list[Trial]:
    """Full trials in descending order of NASWOT (Mellor et al. 2021), those without that score last.

    Raises UsageError if no candidate has it.
    """
    values = candidates.trends[_found(candidates, NASWOT, "naswot")[0]]
    known = np.isfinite(values)
    value = np.where(known, values, values[known].min(initial=0.0) - 1.0)
    return _highest(candidates, history, plan, scores(candidates, history, plan.high), slots, value)


def _found(candidates: Candidates, names: Sequence[str], method: str) -> list[str]:
    """Those of the names that candidates have scores of."""
    found = [name for name in names if name in candidates.trends]
    if not found:
        raise UsageError(f"--method {method} needs training-free scores, which these candidates do not have")
    return found


def bore_search(candidates: Candidates, history: History, plan: Plan, slots: int) -> list[Trial]:
    """BORE (Tiao et al. 2021) on the full fidelity: full trials of the candidates that boosted trees, with the most
    confidence, class with the best third of the results so far."""
    high = scores(candidates, history, plan.high)
    if high.trials < min(RANDOM_START, worker_count(plan, history, slots)) or len(high) < 2:
        return random(candidates, history, plan, slots)
    value = bore(candidate_features(IdentityKey(candidates)).x, high.rows, high.values, plan.seed)
    value += 1e-6 * generator(history, plan).random(len(value))  # trees leave many candidates equal
    return _highest(candidates, history, plan, high, slots, value)


def evolution(candidates: Candidates, history: History, plan: Plan, slots: int) -> list[Trial]:
    """Asynchronous regularised evolution (Real et al. 2019).

    A random population first. Then the best of a tournament among the youngest is mutated in one choice; if all its
    mutants have been asked, a random candidate is taken.
    """
    high = scores(candidates, history, plan.high)
    free = unasked(candidates, high.asked)
    rng = generator(history, plan)
    rows: list[int] = []
    for _ in range(_full_count(plan, high, slots, int(free.sum()))):
        pool = np.flatnonzero(free)
        if high.trials + len(rows) >= POPULATION and len(high):
            youngest = np.arange(max(0, len(high) - POPULATION), len(high))
            drawn = rng.choice(youngest, min(TOURNAMENT, len(youngest)), replace=False)
            parent = candidates.choices[high.rows[drawn[np.argmax(high.values[drawn])]]]
            mutants = np.flatnonzero(((candidates.choices != parent).sum(axis=1) == 1) & free)
            pool = mutants if len(mutants) else pool
        rows.append(int(rng.choice(pool)))
        free[rows[-1]] = False
    return ask(candidates, history, plan, rows, plan.high)


def halving(candidates: Candidates, history: History, plan: Plan, slots: int) -> list[Trial]:
    """Successive halving with two rungs: random low-fidelity trials, then full ones in descending order of score.

    A rung is promoted as a whole.
    """
    low, high = scores(candidates, history, plan.lows[0]), scores(candidates, history, plan.high)
    first = _random_rung(candidates, history, plan, low, slots)
    return _promote(candidates, history, plan, low, high, slots) if first is None else first


def asha(candidates: Candidates, history: History, plan: Plan, slots: int) -> list[Trial]:
    """ASHA (Li et al. 2020) with two rungs.

    An architecture among the best 1 / ETA of the low scores so far is promoted; if there is none, another random
    low-fidelity trial is asked.
    """
    low, high = scores(candidates, history, plan.lows[0]), scores(candidates, history, plan.high)
    if high.trials >= plan.max_high:
        return []  # nothing could be promoted
    best = low.rows[np.argsort(-low.values, kind="stable")][: len(low) // ETA]
    promotable = [int(row) for row in best if row not in high.asked]
    trials = ask(candidates, history, plan, promotable[: _full_count(plan, high, slots, len(promotable))], plan.high)
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
    """The paper's baseline: a Gaussian process on the full fidelity alone, upper confidence bound."""
    high = scores(candidates, history, plan.high)
    if high.trials < min(RANDOM_START, worker_count(plan, history, slots)) or not len(high):
        return random(candidates, history, plan, slots)
    return _highest(candidates, history, plan, high, slots, _gp_bound(candidates, high.rows, high.values))


def mfkd1(candidates: Candidates, history: History, plan: Plan, slots: int) -> list[Trial]:
    """The paper's first algorithm: full trials in descending order of the mean of a Gaussian process fitted to the
    scores of random low-fidelity trials."""
    low, high = scores(candidates, history, plan.lows[0]), scores(candidates, history, plan.high)
    first = _random_rung(candidates, history, plan, low, slots)
    if first is not None:
        return first
    mean, _ = fit_gp(_features(candidates)[low.rows], low.values).predict(_features(candidates))
    return _highest(candidates, history, plan, high, slots, mean)


def mfkd2(candidates: Candidates, history: History, plan: Plan, slots: int) -> list[Trial]:
    """The paper's second algorithm: Gaussian-process search at low fidelity, then at full fidelity, which starts with
    the best low scores."""
    low, high = scores(candidates, history, plan.lows[0]), scores(candidates, history, plan.high)
    fewest, most = MFKD2_LOW
    wanted = min(plan.max_low, most, max(fewest, len(candidates) // 10), len(candidates))
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
    return _highest(candidates, history, plan, high, slots, _gp_bound(candidates, high.rows, high.values))


def cokriging(candidates: Candidates, history: History, plan: Plan, slots: int) -> list[Trial]:
    """Co-kriging (Kennedy and O'Hagan 2000), upper confidence bound: a Gaussian process of the low scores, scaled, plus
    one of the residuals of the full results."""
    low, high = scores(candidates, history, plan.lows[0]), scores(candidates, history, plan.high)
    first = _random_rung(candidates, history, plan, low, slots)
    if first is not None:
        return first
    x = _features(candidates)
    mean, std = fit_gp(x[low.rows], low.values).predict(x)
    if len(high) < 4:
        return _highest(candidates, history, plan, high, slots, mean + BETA * std)
    centred = mean[high.rows] - mean[high.rows].mean()
    rho = float(centred @ (high.values - high.values.mean())) / max(float(centred @ centred), 1e-12)
    residual, residual_std = fit_gp(x[high.rows], high.values - rho * mean[high.rows]).predict(x)
    bound = rho * mean + residual + BETA * np.sqrt((rho * std) ** 2 + residual_std**2)
    return _highest(candidates, history, plan, high, slots, bound)


def _features(candidates: Candidates) -> Array:
    return np.asarray(candidate_features(IdentityKey(candidates)).x, dtype=np.float64)


def _gp_bound(candidates: Candidates, rows: Rows, values: Array) -> Array:
    """Upper confidence bound (n,) of a Gaussian process fitted to `values` (k,) at `rows` (k,)."""
    x = _features(candidates)
    mean, std = fit_gp(x[rows], values).predict(x)
    return mean + BETA * std


def _full_count(plan: Plan, high: Scores, slots: int, free: int) -> int:
    """The number of full trials to ask now: what slots, plan and `free` candidates allow."""
    return max(0, min(slots, plan.max_high - high.trials, free))


def _highest(
    candidates: Candidates, history: History, plan: Plan, high: Scores, slots: int, value: Array
) -> list[Trial]:
    """Full trials of the candidates of greatest value (n,) that have not been asked."""
    free = unasked(candidates, high.asked)
    order = np.argsort(np.where(free, -value, np.inf), kind="stable")
    return ask(candidates, history, plan, order[: _full_count(plan, high, slots, int(free.sum()))], plan.high)


def _random_rung(candidates: Candidates, history: History, plan: Plan, low: Scores, slots: int) -> list[Trial] | None:
    """Random low-fidelity trials, then [] until all are answered, then None.

    They are a third of a small space, so that something is left to find. If none of them gives a score, random full
    trials follow.
    """
    wanted = min(plan.max_low, max(10, len(candidates) // 3), len(candidates))
    if low.trials < wanted:
        return _random_low(candidates, history, plan, low, min(slots, wanted - low.trials))
    if len(low.pending):
        return []
    return None if len(low) else random(candidates, history, plan, slots)


def _random_low(candidates: Candidates, history: History, plan: Plan, low: Scores, count: int) -> list[Trial]:
    free = np.flatnonzero(unasked(candidates, low.asked))
    rows = generator(history, plan).choice(free, min(count, len(free)), replace=False)
    return ask(candidates, history, plan, rows, plan.lows[0])


def _promote(
    candidates: Candidates, history: History, plan: Plan, low: Scores, high: Scores, slots: int
) -> list[Trial]:
    """Full trials in descending order of low-fidelity score; none when all have been asked."""
    order = low.rows[np.argsort(-low.values, kind="stable")]
    rows = [int(row) for row in order if row not in high.asked]
    return ask(candidates, history, plan, rows[: _full_count(plan, high, slots, len(rows))], plan.high)
