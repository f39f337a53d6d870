"""Expected hypervolume improvement: how much candidates of known cost are expected to add to a front of two objectives.

Scores are normal scores, in which predictions are normal. The hypervolume is measured in what scores are `Worth`.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from surrogate.acquire import expected_improvement

Array = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Worth:
    """A value that rises with the score, piecewise linearly through the knots `scores`, `values` (k,).

    It is constant below the first knot and goes on with the slope `beyond` above the last one.
    """

    scores: Array
    values: Array
    beyond: float

    def __call__(self, scores: Array) -> Array:
        above = np.maximum(scores - self.scores[-1], 0.0)
        return np.asarray(np.interp(scores, self.scores, self.values) + self.beyond * above)

    def expected_gains(self, mean: Array, std: Array, levels: Array) -> Array:
        """E[max(worth(Z) - worth(level), 0)] (..., m) of normal Z (...,) over each of the levels (m,).

        This is the integral of slope * P(Z > z) from the level up. Over a piece of one slope, the integral of P(Z > z)
        is the difference of the expected improvements over its ends.
        """
        knots = np.unique(np.concatenate([self.scores, levels]))
        slopes = np.append(np.diff(self(knots)) / np.diff(knots), self.beyond)
        over_knots = expected_improvement(mean[..., None], std[..., None], knots)
        pieces = -slopes * np.diff(over_knots, axis=-1, append=0.0)
        from_knot_up = np.cumsum(pieces[..., ::-1], axis=-1)[..., ::-1]
        return np.asarray(from_knot_up[..., np.searchsorted(knots, levels)])


@dataclass(frozen=True)
class Front:
    """The best known score at each cost: `scores[i]` from `costs[i]` on (k,), both rising; below the first, `floor`.

    Costs up to `most` count.
    """

    scores: Array
    costs: Array
    floor: float
    most: float

    @classmethod
    def of(cls, scores: Array, costs: Array, floor: float, most: float) -> Front:
        """The front of points with these scores and costs (m,)."""
        order = np.lexsort((-scores, costs))
        best = np.maximum.accumulate(np.append(floor, scores[order]))
        rises = order[best[1:] > best[:-1]]
        return cls(scores[rises], costs[rises], floor, most)

    def with_point(self, score: float, cost: float) -> Front:
        """The front with one more point."""
        return Front.of(np.append(self.scores, score), np.append(self.costs, cost), self.floor, self.most)


def expected_hypervolume(mean: Array, std: Array, cost: Array, front: Front, worth: Worth) -> Array:
    """Expected growth (...,) of the area under a front by one candidate with a normal score and this cost (...,).

    The area is that under the front's worth, over cost. A candidate lifts it at all costs from its own up: the growth
    is the expected gain over the front, integrated over these costs (Emmerich et al. 2006, with one objective certain).
    """
    edges = np.concatenate([[-np.inf], front.costs, [front.most]])
    widths = np.maximum(edges[1:] - np.maximum(cost[..., None], edges[:-1]), 0.0)
    gains = worth.expected_gains(mean, std, np.append(front.floor, front.scores))
    return np.asarray((widths * gains).sum(axis=-1))
