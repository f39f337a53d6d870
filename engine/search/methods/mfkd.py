"""The project's method: low-fidelity scores train a surrogate of the whole space, which picks what to train in full."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, lru_cache
from statistics import NormalDist

import numpy as np
import numpy.typing as npt

from engine.config import Plan
from engine.search.methods.estimate import PULL, Estimate, SurrogateInputs, estimate
from engine.search.methods.hypervolume import FrontSoFar, front_so_far
from engine.search.methods.opening import best_by_scores, opening_trials
from engine.search.methods.recommend import noise_variance, posterior
from engine.search.methods.scores import (
    Array,
    IdentityKey,
    Rows,
    Scores,
    ask,
    find_rows,
    scores,
    top,
    unasked,
    worker_count,
)
from engine.space import Candidates
from engine.trial import History, Trial
from surrogate.acquire import expected_improvement, pick_batch, value_of_information

Mask = npt.NDArray[np.bool_]
# Rows (k,), and means (..., k) and standard deviations of their scores -> the expected gain (..., k) by a full trial.
Gain = Callable[[Rows, Array, Array], Array]

# The first low-fidelity batch, spread over a cost: as many trials as cost this many full ones, within these bounds.
FIRST_BATCH_COST = 1.2
FIRST_BATCH = (8, 24)
# Low-fidelity trials of a later batch, whose joint value is weighed against a full trial's.
LOW_BATCH = 8
# A low-fidelity batch delays every full trial after it, so it is weighed against their average gain, which is far less
# than that of the next one. At most this many of them count.
HORIZON = 48
# Weight of the standard deviation in the upper confidence bound.
BETA = 0.25
# The surrogate is refitted at each of the first results of a fidelity, then at every REFIT-th one.
REFIT_ALWAYS, REFIT = 8, 4
# Architectures that must have a full result before one of them is trained again.
BEFORE_REPEATS = 8


@dataclass(frozen=True)
class MfkdOptions:
    """Options of the method. The defaults are the method itself; others are its ablations.

    `inputs`: what the surrogate may use. `beta`: weight of the standard deviation in the upper bound. `gate`: train in
    full only what has a low-fidelity score. `guided`: ask low-fidelity trials after the first batch.
    """

    inputs: SurrogateInputs = field(default_factory=SurrogateInputs)
    beta: float = BETA
    gate: bool = False
    guided: bool = True


DEFAULT_OPTIONS = MfkdOptions()


@dataclass(frozen=True)
class State:
    """What one decision sees: the scores of each low fidelity, the main one first, of the full one, and of the opening.

    A table of recorded results may have no low fidelity.
    """

    candidates: Candidates
    history: History
    plan: Plan
    lows: tuple[Scores, ...]
    high: Scores
    opening: tuple[Scores, ...] = ()

    @property
    def low(self) -> Scores:
        return self.lows[0]

    @cached_property
    def lows_asked(self) -> int:
        return sum(one.trials for one in self.lows)

    @property
    def lows_left(self) -> int:
        """Low-fidelity trials that the plan still allows."""
        return max(0, self.plan.max_low - self.lows_asked)

    @property
    def highs_left(self) -> int:
        """Full trials that the plan and the candidates still allow."""
        return min(self.plan.max_high - self.high.trials, len(self.candidates) - len(self.high.asked))

    @cached_property
    def eligible(self) -> Mask:
        """True (n,) for the candidates that may be trained: after an opening, those that it has scored."""
        if not self.opening:
            return np.ones(len(self.candidates), dtype=bool)
        return ~unasked(self.candidates, self.opening[0].rows)

    @property
    def planned_cost(self) -> float:
        """Cost of a low-fidelity trial relative to a full one, by images and epochs."""
        return self.plan.lows[0].cost() / self.plan.high.cost()

    @property
    def relative_cost(self) -> float:
        """Cost of a low-fidelity trial relative to a full one: the measured one, as soon as both have been measured."""
        measured = self.low.seconds > 0 and self.high.seconds > 0
        return self.low.seconds / self.high.seconds if measured else self.planned_cost

    @property
    def all_lows_first(self) -> bool:
        """The plan has many low-fidelity trials for few full ones: all of them are made before the full ones."""
        return self.plan.max_low >= 4 * self.plan.max_high


def mfkd(
    candidates: Candidates, history: History, plan: Plan, slots: int, options: MfkdOptions = DEFAULT_OPTIONS
) -> list[Trial]:
    """A first low-fidelity batch spread over MACs; then, for every free slot, what is expected to gain most per second.

    That is a batch of low-fidelity trials of the most promising candidates of the whole space, a full trial of the
    best, or a repeat of a full trial with another seed. In a search for a front, candidates are those that may add most
    to its hypervolume, the first batch is spread over their cost, and nothing is repeated.
    """
    opening = opening_trials(candidates, history, plan, slots)
    if opening is not None:
        return opening
    lows = tuple(scores(candidates, history, low) for low in plan.lows)
    known = tuple(scores(candidates, history, fidelity) for fidelity in plan.below_full[len(lows) :])
    state = State(candidates, history, plan, lows, scores(candidates, history, plan.high), known)
    if state.highs_left <= 0:
        return []
    first = _first_batch_size(state) if options.inputs.low and lows else 0
    if state.lows_asked < first:
        return _first_batch(state, first, slots)
    # Nothing is decided on a handful of scores while the rest of the batch is pending.
    if lows and len(state.low.pending) > first // 3 and not state.high.trials:
        return []
    fitted = _fit(candidates, [*map(_refitted, lows), *known, _refitted(state.high)], plan.seed, options.inputs)
    if lows and state.all_lows_first and not state.lows_left and len(state.low.pending):
        return []
    low_is_useful = options.inputs.low and 0 in fitted.used
    if low_is_useful and options.guided and state.lows_left:
        rows, wait = _low_batch(state, fitted, slots, options)
        if rows or wait:
            return ask(candidates, history, plan, rows, plan.lows[0])
    return _full_trials(state, fitted, slots, options)


def _first_batch_size(state: State) -> int:
    budget, n = state.plan.max_low, len(state.candidates)
    if state.all_lows_first:
        return min(budget, n, max(FIRST_BATCH[0], budget // 2))
    least, most = FIRST_BATCH
    return min(budget, n, max(least, min(most, round(FIRST_BATCH_COST / state.planned_cost))))


def _first_batch(state: State, size: int, slots: int) -> list[Trial]:
    """The next low-fidelity trials of the first batch: what an opening found best, or at random."""
    rng, none = np.random.default_rng(state.plan.seed), np.zeros(0, dtype=np.int64)
    if not state.opening:
        rows = rng.permutation(state.candidates.spread_by(state.plan.cost or "macs", size, rng))
    elif state.plan.cost:
        fitted = _fit(state.candidates, [*state.opening, state.high], state.plan.seed, SurrogateInputs())
        rows = np.array(_front(state, fitted).picks(none, state.eligible, size), dtype=np.int64)
    else:
        rows = best_by_scores(state.candidates, state.opening[0], state.plan.seed, size, none)
    rows = rows[unasked(state.candidates, state.low.asked)[rows]]  # some may come from an earlier fidelity study
    rows = rows[: min(slots, size - state.lows_asked)]
    return ask(state.candidates, state.history, state.plan, rows, state.plan.lows[0])


def _refitted(own: Scores) -> Scores:
    """The scores that the surrogate is fitted to: later ones count as pending until the next refit."""
    n = len(own)
    keep = n if n < REFIT_ALWAYS else n - n % REFIT
    return replace(
        own,
        rows=own.rows[:keep],
        values=own.values[:keep],
        counts=own.counts[:keep],
        pending=np.concatenate([own.pending, own.rows[keep:]]),
    )


def _fit(candidates: Candidates, fidelities: Sequence[Scores], seed: int, inputs: SurrogateInputs) -> Estimate:
    """The estimate from the scores of the low fidelities and, last, of the full one.

    Cached: between two refits, all decisions use the same fit.
    """
    content = tuple((s.rows.tobytes(), s.values.tobytes(), s.counts.tobytes()) for s in fidelities)
    return _fit_content(IdentityKey(candidates), content, seed, inputs)


@lru_cache(maxsize=2)
def _fit_content(
    key: IdentityKey, content: tuple[tuple[bytes, bytes, bytes], ...], seed: int, inputs: SurrogateInputs
) -> Estimate:
    none = np.zeros(0, dtype=np.int64)
    fidelities = [
        Scores(
            np.frombuffer(rows, dtype=np.int64), np.frombuffer(values), np.frombuffer(counts), none, none, {}, 0.0, 0
        )
        for rows, values, counts in content
    ]
    return estimate(key.value, fidelities[:-1], fidelities[-1], seed, inputs)


def _low_batch(state: State, fitted: Estimate, slots: int, options: MfkdOptions) -> tuple[list[int], bool]:
    """Rows for low-fidelity trials, and whether to wait for the pending ones before the next full trial."""
    rows, gain_pending, gain_batch = _value_low_batch(state, fitted, options)
    # What low-fidelity scores tell serves every full trial that starts before the next ones: the maximum of n similar
    # candidates grows about as sqrt(n).
    workers = worker_count(state.plan, state.history, slots)
    # A front can grow at many places, so its later full trials are taken to gain as much as the next one.
    later = 1.0 if state.plan.cost else _average_gain(min(state.highs_left, HORIZON))
    gain_full = _next_gain(state, fitted) * later
    gain_needed = gain_full * state.relative_cost / np.sqrt(workers)  # by each low-fidelity trial
    if rows and (state.all_lows_first or gain_batch > gain_needed * len(rows)):
        return rows[: min(slots, state.lows_left)], True
    return [], len(state.low.pending) > 0 and (state.all_lows_first or gain_pending > gain_needed)


def _average_gain(trials: int) -> float:
    """The average gain of `trials` full trials of similar candidates, as a fraction of the first one's gain.

    The first trial gains the mean of the positive part of a normal draw; all of them together gain the expected maximum
    of as many draws (Blom 1958).
    """
    first = NormalDist().pdf(0.0)
    greatest = NormalDist().inv_cdf((trials - 0.375) / (trials + 0.25))
    return max(first, greatest) / (trials * first)


def _value_low_batch(state: State, fitted: Estimate, options: MfkdOptions) -> tuple[list[int], float, float]:
    """The most valuable low-fidelity batch: its rows, the value of the pending trials, and what the batch adds to it.

    The value is the growth that they cause of the expected gain by the next full trial.
    """
    level, slope = fitted.levels[0], max(fitted.slopes[0], 0.0)
    pending = _refitted(state.low).pending
    own = (1 - PULL) * level.noise  # both the variance particular to an architecture and that of a measurement of it
    if state.plan.cost:
        rows, variance = _low_for_front(state, fitted, own)
    else:
        rows, variance = _low_by_bound(state, fitted, own, options.beta)
    gain = _gain(state, fitted)
    rival = _most_gain(state, fitted, unasked(state.candidates, np.concatenate([state.high.asked, rows])))

    def value(count: int) -> float:
        at = rows[:count]
        shift = slope * variance[:count] / np.sqrt(variance[:count] + own)
        mean, std = fitted.mean[at], np.sqrt(fitted.variance[at])
        return value_of_information(mean, std, shift, lambda m, s: gain(at, m, s), rival, state.plan.seed)

    gain_pending = value(len(pending)) if len(pending) else 0.0
    return rows[len(pending) :].tolist(), gain_pending, value(len(rows)) - gain_pending


def _free_for_low(state: State) -> Mask:
    """The candidates that a low-fidelity trial may tell something new about."""
    free = unasked(state.candidates, state.low.asked) & state.eligible
    free[state.high.asked] = False
    return free


def _low_by_bound(state: State, fitted: Estimate, own: float, beta: float) -> tuple[Rows, Array]:
    """Pending low-fidelity trials, then the batch: rows of highest upper bound; and the variances of their scores."""
    level, slope = fitted.levels[0], max(fitted.slopes[0], 0.0)
    pending = _refitted(state.low).pending
    rows = np.concatenate([pending, _shortlist(fitted, _free_for_low(state), beta)])
    covariance = level.linear.joint(fitted.features.trends[rows], fitted.features.x[rows])
    covariance[np.diag_indices_from(covariance)] += own
    rest = np.maximum(fitted.variance[rows] - slope**2 * level.variance[rows], 0.0)  # not explained by this fidelity
    bound = fitted.mean[rows] + beta * np.sqrt(rest)
    picks = pick_batch(bound, slope**2 * covariance, beta, own, len(pending), LOW_BATCH)
    batch = np.concatenate([np.arange(len(pending)), np.array(picks, dtype=np.int64)])
    return rows[batch], np.diag(covariance)[batch]


def _low_for_front(state: State, fitted: Estimate, own: float) -> tuple[Rows, Array]:
    """Pending low-fidelity trials, then the batch: where the front may grow most; and the variances of their scores."""
    level, pending = fitted.levels[0], _refitted(state.low).pending
    picks = _front(state, fitted).picks(pending, _free_for_low(state), LOW_BATCH)
    rows = np.concatenate([pending, np.array(picks, dtype=np.int64)])
    covariance = level.linear.joint(fitted.features.trends[rows], fitted.features.x[rows])
    return rows, np.diag(covariance) + own


def _front(state: State, fitted: Estimate) -> FrontSoFar:
    """The front of the full results that the estimate was fitted to, and of the pending full trials."""
    high = _refitted(state.high)
    return front_so_far(state.candidates, state.plan.cost, fitted, high).believing(high.pending)


def _gain(state: State, fitted: Estimate) -> Gain:
    """What a full trial is expected to gain: accuracy over the best, or area under the front."""
    if state.plan.cost:
        return _front(state, fitted).growth
    best = _score_to_beat(fitted)
    return lambda _, mean, std: expected_improvement(mean, std, best)


def _most_gain(state: State, fitted: Estimate, free: Mask) -> float:
    """The most that a full trial of a free candidate is expected to gain."""
    free = free & state.eligible
    if state.plan.cost:
        return _front(state, fitted).most_growth(free)
    std = np.sqrt(fitted.variance[free])
    return float(expected_improvement(fitted.mean[free], std, _score_to_beat(fitted)).max(initial=0.0))


def _score_to_beat(fitted: Estimate) -> float:
    """The best full result so far; before there is one, the highest mean."""
    return float(fitted.y.max()) if len(fitted.y) else float(fitted.mean.max())


def _next_gain(state: State, fitted: Estimate) -> float:
    """What the next full trial is expected to gain."""
    return _most_gain(state, fitted, unasked(state.candidates, state.high.asked))


def _full_trials(state: State, fitted: Estimate, slots: int, options: MfkdOptions) -> list[Trial]:
    """Full trials where the upper bound is highest, or where the front is expected to grow most, and repeats."""
    first = find_rows(state.candidates, state.plan.first)
    first = first[(first >= 0) & ~np.isin(first, state.high.asked)][:slots]
    if len(first):
        return ask(state.candidates, state.history, state.plan, first[: state.highs_left].tolist(), state.plan.high)
    free = unasked(state.candidates, state.high.asked) & state.eligible
    if options.gate and state.lows and len(state.low):
        free &= ~unasked(state.candidates, state.low.rows)
    repeat = [] if state.plan.cost else _repeat(state, fitted)
    count = min(slots, state.highs_left, int(free.sum())) - len(repeat)
    if state.plan.cost:
        rows = _most_growth(state, fitted, free, count)
    else:
        rows = _highest_bounds(state, fitted, free, count, options.beta)
    seen = replace(state.history, pending=state.history.pending + repeat)
    return repeat + ask(state.candidates, seen, state.plan, rows, state.plan.high)


def _most_growth(state: State, fitted: Estimate, free: Mask, count: int) -> list[int]:
    """Rows that are expected to add most to the front; pending ones count as measured."""
    high = _refitted(state.high)
    return front_so_far(state.candidates, state.plan.cost, fitted, high).picks(high.pending, free, count)


def _highest_bounds(state: State, fitted: Estimate, free: Mask, count: int, beta: float) -> list[int]:
    """Rows of highest upper bound; pending ones count as measured."""
    pending = _refitted(state.high).pending
    rows = np.concatenate([pending, _shortlist(fitted, free, beta)])
    covariance = fitted.linear.joint(fitted.trend[rows], fitted.features.x[rows])
    rest = np.maximum(fitted.variance[rows] - np.diag(covariance), 0.0)
    mean = fitted.mean[rows] + beta * np.sqrt(rest)
    picks = pick_batch(mean, covariance, beta, fitted.linear.noise, len(pending), count)
    return [int(rows[pick]) for pick in picks]


def _repeat(state: State, fitted: Estimate) -> list[Trial]:
    """One more full trial, with another seed, of an architecture near the top, or none.

    It is asked if knowing that score better is expected to gain more, by changing the recommendation, than the best new
    candidate would.
    """
    high = _refitted(state.high)
    if len(high) < BEFORE_REPEATS:
        return []
    noise = noise_variance(state.history, state.plan, high, fitted)
    mean, variance = posterior(fitted.linear, fitted.y, high.counts, noise)
    shift = variance / np.sqrt(variance + noise + 1e-12)
    leader = int(np.argmax(mean))
    rival = np.full(len(mean), mean[leader])
    rival[leader] = np.delete(mean, leader).max()
    gain = expected_improvement(-np.abs(mean - rival), shift, 0.0)
    gain[np.isin(high.rows, state.high.pending)] = 0.0
    best = int(np.argmax(gain))
    if gain[best] <= _next_gain(state, fitted):
        return []
    row = int(high.rows[best])
    return ask(state.candidates, state.history, state.plan, [row], state.plan.high, state.high.times_asked[row])


def _shortlist(fitted: Estimate, free: Mask, beta: float) -> Rows:
    """Free rows of highest upper bound, in descending order."""
    return top(np.where(free, fitted.mean + beta * np.sqrt(fitted.variance), -np.inf))
