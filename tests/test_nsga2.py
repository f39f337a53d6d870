"""NSGA-II: its sorting against the definition, and that it finds a front."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.config import Plan
from engine.search.methods.nsga2 import crowding, sorted_fronts, survivors
from tests.test_methods import FULL, LOW, SPACE, TRUTH, full, run


def beats(one, other):
    return all(a <= b for a, b in zip(one, other, strict=True)) and tuple(one) != tuple(other)


@settings(deadline=None, max_examples=50)
@given(st.lists(st.tuples(st.integers(0, 5), st.integers(0, 5)), min_size=1, max_size=20))
def test_the_fronts_are_those_of_the_definition(points):
    left, wanted = dict(enumerate(points)), []
    while left:
        level = [i for i, one in left.items() if not any(beats(other, one) for other in left.values())]
        wanted.append(level)
        left = {i: one for i, one in left.items() if i not in level}
    assert [front.tolist() for front in sorted_fronts(np.array(points, dtype=float))] == wanted


def test_crowding_is_the_normalised_distance_between_neighbours():
    points = np.array([[0.0, 10.0], [1.0, 6.0], [4.0, 0.0], [2.0, 5.0]])
    np.testing.assert_allclose(crowding(points), [np.inf, 2 / 4 + 5 / 10, np.inf, 3 / 4 + 6 / 10])
    np.testing.assert_allclose(crowding(np.ones((3, 2))), [np.inf, 0.0, np.inf])  # equal points: no division by zero


def test_survivors_come_by_front_and_then_by_crowding():
    points = np.array([[5.0, 5.0], [0.0, 4.0], [1.0, 2.9], [1.1, 2.8], [3.0, 1.0], [4.0, 0.0]])
    assert survivors(points, 6)[-1] == 0  # the only one that is beaten
    assert set(survivors(points, 4)) == {1, 3, 4, 5}  # 2 and 3 are close: the one with more room stays
    assert survivors(points[:1], 4).tolist() == [0]


@pytest.mark.parametrize("cost", ["macs", ""])
def test_it_finds_better_networks_than_random_search(cost):
    """At every cost that random search has a network of, on average over seeds."""
    budgets = np.unique(SPACE.macs)[1::2]

    def best(method):
        plans = [Plan((LOW,), FULL, method, max_high=60, seed=seed, cost=cost) for seed in range(6)]
        found = [[SPACE.row(e.trial.architecture) for e in full(run(plan))] for plan in plans]
        at = [[max([0.0, *TRUTH[[r for r in rows if SPACE.macs[r] <= b]]]) for b in budgets] for rows in found]
        return np.mean(at, axis=0)

    ours, random = best("nsga2"), best("random")
    assert (ours.mean() > random.mean() + 0.01) if cost else ours[-1] > random[-1]
