"""The search for a front: which candidates are expected to add most to it, through the surrogate.

Accuracy is to be high and a cost low, which is known of every candidate. The hypervolume is the area under the front of
accuracy against cost: the accuracy that one can have, averaged over all budgets from the least cost to the greatest.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import lru_cache

import numpy as np
import numpy.typing as npt

from engine.search.methods.estimate import Estimate
from engine.search.methods.scores import SHORTLIST, Array, IdentityKey, Rows, Scores
from engine.space import Candidates
from surrogate.acquire import condition
from surrogate.hypervolume import Front, Worth, expected_hypervolume

Mask = npt.NDArray[np.bool_]

# Weight of the standard deviation in the upper bound by which candidates are shortlisted.
BETA = 1.0
# Standard deviations below the lowest score at which accuracy counts as 0, the reference of the hypervolume.
TO_NOTHING = 3.0
# The slope of accuracy beyond the best score is that of this share of the scores.
UPPER = 0.25


@dataclass(frozen=True)
class FrontSoFar:
    """The front of the full results: `cost` (n,) of all candidates, from 0 to 1, and what scores are worth."""

    fitted: Estimate
    cost: Array
    front: Front
    worth: Worth

    def growth(self, rows: Rows, mean: Array, std: Array) -> Array:
        """Expected growth (..., k) of the hypervolume by candidates (k,) with normal scores (..., k)."""
        return expected_hypervolume(mean, std, np.broadcast_to(self.cost[rows], mean.shape), self.front, self.worth)

    def believing(self, rows: Rows) -> FrontSoFar:
        """The same with candidates on the front as if each had its mean score."""
        front = self.front
        for row in rows:
            front = front.with_point(float(self.fitted.mean[row]), float(self.cost[row]))
        return replace(self, front=front)

    def shortlist(self, free: Mask) -> Rows:
        """Free rows that cost little for their upper bound, at least SHORTLIST if there are as many.

        They are whole fronts of bound against cost: first the rows that no other beats in both, then those that only
        these beat, and so on. A decision therefore takes about as long for millions of candidates as for thousands.
        """
        left = np.flatnonzero(free)
        bound = self.fitted.mean[left] + BETA * np.sqrt(self.fitted.variance[left])
        order = np.lexsort((-bound, self.cost[left]))
        left, bound = left[order], bound[order]
        found = [left[:0]]
        while len(left) and sum(map(len, found)) < SHORTLIST:
            best = np.maximum.accumulate(bound)
            beaten = np.append(False, bound[1:] <= best[:-1])
            found.append(left[~beaten])
            left, bound = left[beaten], bound[beaten]
        return np.concatenate(found)

    def most_growth(self, free: Mask) -> float:
        """The expected growth by the best of the free candidates."""
        rows = self.shortlist(free)
        return float(self.growth(rows, self.fitted.mean[rows], np.sqrt(self.fitted.variance[rows])).max(initial=0.0))

    def picks(self, pending: Rows, free: Mask, count: int) -> list[int]:
        """`count` free rows of most expected growth, each picked as if the pending ones and those before it were
        measured: with their mean score on the front, and less variance of what is like them."""
        fitted, front_so_far = self.fitted, self
        rows = np.concatenate([pending, self.shortlist(free)])
        covariance = fitted.linear.joint(fitted.trend[rows], fitted.features.x[rows])
        rest = np.maximum(fitted.variance[rows] - np.diag(covariance), 0.0)
        left, found = np.arange(len(rows)) >= len(pending), list(range(len(pending)))
        for place in range(min(len(rows), len(pending) + count)):
            if place >= len(pending):
                std = np.sqrt(np.maximum(np.diag(covariance), 0.0) + rest)
                growth = front_so_far.growth(rows, fitted.mean[rows], std)
                found.append(int(np.argmax(np.where(left, growth, -np.inf))))
            left[found[place]] = False
            condition(covariance, found[place], fitted.linear.noise)
            front_so_far = front_so_far.believing(rows[found[place : place + 1]])
        return [int(rows[place]) for place in found[len(pending) :]]


def front_so_far(candidates: Candidates, cost: str, fitted: Estimate, high: Scores) -> FrontSoFar:
    """The front of accuracy against a cost, by its name. The estimate was fitted to the full results `high`."""
    axis, worth = _cost_axis(IdentityKey(candidates), cost), _worth(fitted, high)
    front = Front.of(fitted.y, axis[high.rows], float(worth.scores[0]), 1.0)
    return FrontSoFar(fitted, axis, front, worth)


@lru_cache(maxsize=2)
def _cost_axis(key: IdentityKey, name: str) -> Array:
    """The cost (n,) of every candidate, 0 for the least and 1 for the greatest."""
    cost = key.value.cost(name)
    return np.asarray((cost - cost.min()) / max(float(np.ptp(cost)), 1e-12))


def _worth(fitted: Estimate, high: Scores) -> Worth:
    """Accuracy as a function of the score, from the full results; a straight line until two of them differ."""
    scores, first = np.unique(fitted.y, return_index=True)
    if len(scores) < 2:
        lowest = float(fitted.mean.min()) - TO_NOTHING
        return Worth(np.array([lowest, lowest + 1.0]), np.array([0.0, 1.0]), 1.0)
    values = high.values[first]
    upper = min(int((1 - UPPER) * len(scores)), len(scores) - 2)
    beyond = (values[-1] - values[upper]) / (scores[-1] - scores[upper])
    return Worth(np.append(scores[0] - TO_NOTHING, scores), np.append(0.0, values), float(beyond))
