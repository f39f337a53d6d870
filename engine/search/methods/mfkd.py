"""Our method: cheap distilled scores teach a surrogate of the whole space, which says what to train in full."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from functools import lru_cache

import numpy as np
import numpy.typing as npt

from engine.config import Plan
from engine.search.methods.estimate import PULL, Estimate, SurrogateInputs, estimate
from engine.search.methods.recommend import noise_variance, posterior
from engine.search.methods.scores import Array, IdentityKey, Rows, Scores, ask, scores, unasked, worker_count
from engine.space import Candidates
from engine.trial import Fidelity, History, Trial
from surrogate.acquire import expected_hypervolume, expected_improvement, spread_out, value_of_looking

# The first, spread batch of low-fidelity runs: worth so many full runs, within these bounds.
FIRST_BATCH_COST = 1.2
FIRST_BATCH = (8, 24)
# Low-fidelity runs whose joint value is weighed against a full run's.
LOOK = 8
# Standard deviations above the mean.
BETA = 0.25
# Picks are made among so many candidates of highest upper bound; variances only shrink from there.
SHORTLIST = 512
# Full results after which every new one refits the surrogate only at multiples of REFIT.
REFIT_ALWAYS, REFIT = 8, 4
# Distinct full results before a repeat may be asked.
BEFORE_REPEATS = 8


@dataclass(frozen=True)
class MfkdOptions:
    """The method's decisions; the defaults are the method, others are ablations of it, and the search for a front."""

    inputs: SurrogateInputs = field(default_factory=SurrogateInputs)
    beta: float = BETA
    gate: bool = False
    guided: bool = True
    front: bool = False


OURS = MfkdOptions()


@dataclass(frozen=True)
class State:
    """One decision's view: the answers of each fidelity, how many trials of each the plan still allows."""

    candidates: Candidates
    history: History
    plan: Plan
    low: Fidelity
    at_low: Scores
    high: Scores
    lows_left: int
    highs_left: int

    @property
    def price(self) -> float:
        """Cost of a low-fidelity run in full ones: measured once there are answers of both."""
        if self.at_low.seconds > 0 and self.high.seconds > 0:
            return self.at_low.seconds / self.high.seconds
        return self.low.cost() / self.plan.high.cost()

    @property
    def scarce(self) -> bool:
        """The plan has chosen many low-fidelity runs for few full ones: they are all made, before the full ones."""
        return self.plan.max_low >= 4 * self.plan.max_high


def mfkd(candidates: Candidates, history: History, plan: Plan, slots: int, options: MfkdOptions = OURS) -> list[Trial]:
    """A first low-fidelity batch spread over MACs; then, for every free slot, what is expected to bring most per
    second: low-fidelity runs of the most promising candidates of the whole space, a full run of the best, or a repeat.
    """
    all_lows = [scores(candidates, history, low) for low in plan.lows]
    high = scores(candidates, history, plan.high)
    highs_left = min(plan.max_high - high.trials, len(candidates) - len(high.asked))
    if highs_left <= 0:
        return []
    asked_low = sum(s.trials for s in all_lows)
    state = State(
        candidates, history, plan, plan.lows[0], all_lows[0], high, max(0, plan.max_low - asked_low), highs_left
    )
    first = _first_batch(state) if options.inputs.low else 0
    if asked_low < first:
        rng = np.random.default_rng(plan.seed)
        spread = rng.permutation(candidates.spread(first, rng))
        rows = spread[unasked(candidates, all_lows[0].asked)[spread]]  # some may come from a study made before
        return ask(candidates, history, plan, rows[: min(slots, first - asked_low)], plan.lows[0])
    # Nothing is decided on a handful of scores while the rest of the batch is under way.
    if len(all_lows[0].pending) > first // 3 and not high.trials:
        return []
    known = _fitted(candidates, tuple(map(_refit, all_lows)), _refit(high), plan.seed, options.inputs)
    if state.scarce and not state.lows_left and len(all_lows[0].pending):
        return []
    if 0 not in known.dropped and options.inputs.low and options.guided and known.levels and state.lows_left:
        looks, wait = _looks(state, known, slots, options)
        if looks or wait:
            return ask(candidates, history, plan, looks, state.low)
    return _full(state, known, slots, options)


def _first_batch(state: State) -> int:
    budget, n = state.plan.max_low, len(state.candidates)
    if state.scarce:
        return min(budget, n, max(FIRST_BATCH[0], budget // 2))
    few, many = FIRST_BATCH
    price = state.low.cost() / state.plan.high.cost()
    return min(budget, n, max(few, min(many, round(FIRST_BATCH_COST / price))))


def _refit(all_scores: Scores) -> Scores:
    """The scores that the surrogate is fitted to: later ones wait for the next refit, and count as pending."""
    n = len(all_scores)
    keep = n if n < REFIT_ALWAYS else n - n % REFIT
    waiting = np.concatenate([all_scores.pending, all_scores.rows[keep:]])
    return replace(
        all_scores,
        rows=all_scores.rows[:keep],
        values=all_scores.values[:keep],
        counts=all_scores.counts[:keep],
        pending=waiting,
    )


def _fitted(candidates: Candidates, lows: tuple[Scores, ...], high: Scores, seed: int, inputs: SurrogateInputs) -> Estimate:
    content = tuple((s.rows.tobytes(), s.values.tobytes(), s.counts.tobytes()) for s in (*lows, high))
    return _estimate(IdentityKey(candidates), content, seed, inputs)


@lru_cache(maxsize=2)
def _estimate(same: IdentityKey, content: tuple[tuple[bytes, bytes, bytes], ...], seed: int, inputs: SurrogateInputs) -> Estimate:
    none = np.zeros(0, dtype=np.int64)
    read = [
        Scores(np.frombuffer(r, dtype=np.int64), np.frombuffer(v), np.frombuffer(c), none, none, {}, 0.0, 0)
        for r, v, c in content
    ]
    return estimate(same.value, read[:-1], read[-1], seed, inputs)


def _looks(state: State, known: Estimate, slots: int, options: MfkdOptions) -> tuple[list[int], bool]:
    """Rows for low-fidelity runs, and whether to wait for those under way before the next full run."""
    level, slope = known.levels[0], max(known.slopes[0], 0.0)
    at_low = _refit(state.at_low)
    free = unasked(state.candidates, state.at_low.asked)
    free[state.high.asked] = False
    value = known.mean + options.beta * np.sqrt(known.variance)
    pending = at_low.pending
    rows = np.concatenate([pending, _top(np.where(free, value, -np.inf))])
    covariance = level.linear.joint(known.features.macs[rows], known.features.x[rows])
    own = (1 - PULL) * level.noise
    covariance[np.diag_indices_from(covariance)] += own
    around = np.maximum(known.variance[rows] - slope**2 * level.variance[rows], 0.0)
    mean = known.mean[rows]
    picks = spread_out(mean + options.beta * np.sqrt(around), slope**2 * covariance, options.beta, own, len(pending), LOOK)
    looked = np.concatenate([np.arange(len(pending)), np.array(picks, dtype=np.int64)])
    rest = unasked(state.candidates, np.concatenate([state.high.asked, rows[looked]]))
    others = (known.mean[rest], np.sqrt(known.variance[rest]))
    best, seed = _to_beat(known), state.plan.seed

    def gain(points: Rows) -> float:
        variance = np.diag(covariance)[points]
        shift = slope * variance / np.sqrt(variance + own)
        return value_of_looking(mean[points], np.sqrt(known.variance[rows[points]]), shift, others, best, seed)

    waiting = gain(looked[: len(pending)]) if len(pending) else 0.0
    more = gain(looked) - waiting
    now = _next_improvement(state, known, best)
    # What the looks tell serves every full run begun before the next ones: of the best of n alike, the surplus
    # grows about as the root of n.
    workers = worker_count(state.plan, state.history, slots)
    rate = now * state.price / np.sqrt(workers)
    if picks and (state.scarce or more > rate * len(picks)):
        return [int(rows[p]) for p in picks[: min(slots, state.lows_left)]], True
    return [], len(state.at_low.pending) > 0 and (state.scarce or waiting > rate)


def _to_beat(known: Estimate) -> float:
    """The best full result so far; before there is one, the best expectation."""
    return float(known.y.max()) if len(known.y) else float(known.mean.max())


def _next_improvement(state: State, known: Estimate, best: float) -> float:
    free = unasked(state.candidates, state.high.asked)
    return float(expected_improvement(known.mean[free], np.sqrt(known.variance[free]), best).max(initial=0.0))


def _full(state: State, known: Estimate, slots: int, options: MfkdOptions) -> list[Trial]:
    """Full runs where the upper bound is highest, or the front is expected to grow most, and repeats."""
    free = unasked(state.candidates, state.high.asked)
    if options.gate and len(state.at_low):
        scored = ~unasked(state.candidates, state.at_low.rows)
        free &= scored
    for_front = options.front and len(known.y) > 0
    repeat = [] if for_front else _repeat(state, known)
    count = min(slots, state.highs_left, int(free.sum())) - len(repeat)
    picks = _for_front(state, known, free, count) if for_front else _highest(state, known, free, count, options)
    seen = replace(state.history, pending=state.history.pending + repeat)
    return repeat + ask(state.candidates, seen, state.plan, picks, state.plan.high)


def _highest(state: State, known: Estimate, free: npt.NDArray[np.bool_], count: int, options: MfkdOptions) -> list[int]:
    """Rows of highest upper bound, the pending ones counted as measured."""
    pending = _refit(state.high).pending
    value = known.mean + options.beta * np.sqrt(known.variance)
    rows = np.concatenate([pending, _top(np.where(free, value, -np.inf))])
    covariance = known.linear.joint(known.trend[rows], known.features.x[rows])
    rest = np.maximum(known.variance[rows] - np.diag(covariance), 0.0)
    mean = known.mean[rows] + options.beta * np.sqrt(rest)
    picks = spread_out(mean, covariance, options.beta, known.linear.noise, len(pending), count)
    return [int(rows[p]) for p in picks]


def _for_front(state: State, known: Estimate, free: npt.NDArray[np.bool_], count: int) -> list[int]:
    """Rows that are expected to add most to the area under the front of accuracy against log MACs; those under way and
    those picked before count as measured, at what is expected of them."""
    high, cost, std = _refit(state.high), np.log(state.candidates.macs + 1), np.sqrt(known.variance)
    front = list(zip(known.y, cost[high.rows], strict=True))
    front += [(known.mean[row], cost[row]) for row in high.pending]

    def growth(rows: Rows) -> Array:
        y, at = map(np.array, zip(*front, strict=True))
        return expected_hypervolume(known.mean[rows], std[rows], cost[rows], y, at)

    rows = _top(np.where(free, growth(np.arange(len(free))), -np.inf))
    picks: list[int] = []
    while len(picks) < min(count, len(rows)):
        picks.append(int(rows[np.argmax(np.where(np.isin(rows, picks), -np.inf, growth(rows)))]))
        front.append((known.mean[picks[-1]], cost[picks[-1]]))
    return picks


def _repeat(state: State, known: Estimate) -> list[Trial]:
    """One more full run, with another seed, of one of the best, where being surer of it is expected to bring more
    than the best new candidate: it would change which one is recommended."""
    high = _refit(state.high)
    if len(high) < BEFORE_REPEATS:
        return []
    noise = noise_variance(state.history, state.plan, high, known)
    mean, variance = posterior(known.linear, known.y, high.counts, noise)
    shift = variance / np.sqrt(variance + noise + 1e-12)
    leader = int(np.argmax(mean))
    rival = np.full(len(mean), mean[leader])
    rival[leader] = np.delete(mean, leader).max()
    gain = expected_improvement(-np.abs(mean - rival), shift, 0.0)
    gain[np.isin(high.rows, state.high.pending)] = 0.0
    row = int(np.argmax(gain))
    if gain[row] <= _next_improvement(state, known, _to_beat(known)):
        return []
    times = state.high.times[int(high.rows[row])]
    return ask(state.candidates, state.history, state.plan, [int(high.rows[row])], state.plan.high, times)


def _top(value: Array) -> Rows:
    """Rows of the SHORTLIST greatest values, finite ones only, in descending order."""
    count = min(SHORTLIST, len(value))
    rows = np.argpartition(-value, count - 1)[:count]
    rows = rows[np.isfinite(value[rows])]
    return np.asarray(rows[np.lexsort((rows, -value[rows]))], dtype=np.int64)
