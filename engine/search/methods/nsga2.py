"""NSGA-II (Deb et al. 2002), asynchronous: a child for every free worker, from the best results so far."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from engine.config import Plan
from engine.search.methods.scores import Array, Rows, ask, find_rows, generator, scores, unasked
from engine.space import Candidates
from engine.trial import Architecture, History, Trial

POPULATION = 8  # a search trains tens of networks: of 8, 12 and 20, 8 does best in them
CROSSOVER = 0.9  # probability that a child has two parents (section IV of the paper)
# Children that are drawn at once, of which the first that is a candidate and has not been asked is trained.
LITTER = 64


def nsga2(candidates: Candidates, history: History, plan: Plan, slots: int) -> list[Trial]:
    """Full trials: a random population, then children of parents that binary tournaments choose.

    The objectives are accuracy and the plan's cost, if it has one. Parents are the best POPULATION of all results so
    far, by front and then by crowding distance. A child takes each option from either parent, and each is then mutated
    with probability 1 / choices. If no child is new, a random candidate is taken.
    """
    high = scores(candidates, history, plan.high)
    free, rng = unasked(candidates, high.asked), generator(history, plan)
    count = max(0, min(slots, plan.max_high - high.trials, int(free.sum())))
    objectives = [-high.values] + ([candidates.cost(plan.cost)[high.rows]] if plan.cost else [])
    best = survivors(np.stack(objectives, axis=1), POPULATION)
    rows: list[int] = []
    for _ in range(count):
        born = np.zeros(0, dtype=np.int64)
        if high.trials + len(rows) >= POPULATION and len(high):
            born = _children(candidates, candidates.choices[high.rows[best]], rng)
            born = born[free[born]]
        rows.append(int(born[0]) if len(born) else int(rng.choice(np.flatnonzero(free))))
        free[rows[-1]] = False
    return ask(candidates, history, plan, rows, plan.high)


def _children(candidates: Candidates, parents: npt.NDArray[np.integer], rng: np.random.Generator) -> Rows:
    """The rows of those of LITTER children that are candidates. `parents` (k, d) are in order, the best first."""
    d = parents.shape[1]
    one, other = (parents[rng.integers(len(parents), size=(LITTER, 2)).min(axis=1)] for _ in range(2))
    mixed = (rng.random((LITTER, d)) < 0.5) & (rng.random((LITTER, 1)) < CROSSOVER)
    children = np.where(mixed, other, one).astype(np.int64)
    options = candidates.choices.max(axis=0).astype(np.int64) + 1
    shifted = (children + 1 + rng.integers(np.maximum(options - 1, 1), size=(LITTER, d))) % options
    children = np.where(rng.random((LITTER, d)) < 1 / d, shifted, children)
    rows = find_rows(candidates, [Architecture(tuple(line)) for line in children.tolist()])
    return rows[rows >= 0]


def survivors(objectives: Array, count: int) -> Rows:
    """The `count` best of points whose objectives (n, k) are to be small, best first: by front, then by crowding."""
    kept: list[int] = []
    for level in sorted_fronts(objectives):
        kept += level[np.argsort(-crowding(objectives[level]), kind="stable")].tolist()
        if len(kept) >= count:
            break
    return np.array(kept[:count], dtype=np.int64)


def sorted_fronts(objectives: Array) -> list[Rows]:
    """Non-dominated sorting: the indices of points that none dominates, then of those that only these dominate, ..."""
    no_worse: npt.NDArray[np.bool_] = np.all(objectives[:, None] <= objectives[None], axis=2)
    dominates = no_worse & ~no_worse.T
    left, fronts = np.ones(len(objectives), dtype=bool), []
    while left.any():
        level = left & ~dominates[left].any(axis=0)
        fronts.append(np.flatnonzero(level))
        left &= ~level
    return fronts


def crowding(objectives: Array) -> Array:
    """Crowding distance (n,) of points (n, k): the sides of the box between their neighbours; infinite at the ends."""
    distance = np.zeros(len(objectives))
    for values in objectives.T:
        order = np.argsort(values, kind="stable")
        spread = float(values[order[-1]] - values[order[0]])
        distance[order[[0, -1]]] = np.inf
        if spread > 0:
            distance[order[1:-1]] += (values[order[2:]] - values[order[:-2]]) / spread
    return distance
