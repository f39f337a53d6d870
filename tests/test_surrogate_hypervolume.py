"""Expected hypervolume improvement against sampling and geometry."""

import numpy as np
import pytest

from surrogate.hypervolume import Front, Worth, expected_hypervolume

LINE = Worth(np.array([0.0, 1.0]), np.array([0.0, 1.0]), 1.0)
BENT = Worth(np.array([-2.0, -0.5, 0.4, 1.2]), np.array([0.1, 0.6, 0.65, 0.7]), 0.05)


def area(scores, costs, floor, most, worth):
    """The area under a front, from its definition, on a fine grid of costs from 0 to `most`."""
    grid = (np.arange(2_000) + 0.5) * most / 2_000
    best = np.where(costs <= grid[:, None], scores, floor).max(axis=1, initial=floor)
    return worth(best).mean() * most


@pytest.mark.parametrize("worth", [LINE, BENT], ids=["line", "bent"])
@pytest.mark.parametrize("candidate", [(0.3, 0.7, 0.25), (1.5, 0.2, 0.0), (-1.0, 1.0, 0.55), (0.9, 0.4, 0.9)])
def test_the_expected_growth_is_the_mean_growth_of_the_area_over_samples(worth, candidate):
    mean, std, cost = candidate
    known, known_cost = np.array([0.1, 0.9, 0.5, -0.2]), np.array([0.2, 0.7, 0.4, 0.5])
    front = Front.of(known, known_cost, -2.0, 1.0)
    got = float(expected_hypervolume(np.array([mean]), np.array([std]), np.array([cost]), front, worth)[0])
    before = area(known, known_cost, -2.0, 1.0, worth)
    half = np.random.default_rng(0).standard_normal(100)
    draws = mean + std * np.concatenate([half, -half])
    grown = [area(np.append(known, z), np.append(known_cost, cost), -2.0, 1.0, worth) - before for z in draws]
    assert got == pytest.approx(np.mean(grown), abs=3 * np.std(grown) / len(draws) ** 0.5 + 1e-3)


def test_certain_candidates_add_the_area_that_one_can_see():
    front = Front.of(np.array([0.2, 0.6]), np.array([1.0, 2.0]), 0.0, 4.0)
    mean, cost = np.array([0.5, 0.9, 0.1, 0.6]), np.array([1.5, 3.0, 2.0, 0.5])
    got = expected_hypervolume(mean, np.full(4, 1e-9), cost, front, LINE)
    # From 1.5 to 2 the front is 0.2; from 3 to 4 it is 0.6; 0.1 is dominated; the cheap 0.6 adds from 0.5 to 2.
    np.testing.assert_allclose(got, [0.5 * 0.3, 1.0 * 0.3, 0.0, 0.5 * 0.6 + 1.0 * 0.4], atol=1e-6)


def test_without_a_front_a_cheap_candidate_is_worth_more_than_an_equal_dear_one():
    nothing = Front.of(np.zeros(0), np.zeros(0), -1.0, 1.0)
    got = expected_hypervolume(np.zeros(3), np.full(3, 1e-9), np.array([0.0, 0.5, 1.0]), nothing, LINE)
    np.testing.assert_allclose(got, [0.0, 0.0, 0.0], atol=1e-9)  # a score of 0 is worth what less is
    got = expected_hypervolume(np.full(3, 0.8), np.full(3, 1e-9), np.array([0.0, 0.5, 1.0]), nothing, LINE)
    np.testing.assert_allclose(got, [0.8, 0.4, 0.0], atol=1e-6)


def test_the_front_keeps_the_points_that_no_other_beats():
    front = Front.of(np.array([0.5, 0.7, 0.6, 0.4, 0.8]), np.array([1.0, 3.0, 3.0, 2.0, 4.0]), 0.0, 5.0)
    assert (front.scores.tolist(), front.costs.tolist()) == ([0.5, 0.7, 0.8], [1.0, 3.0, 4.0])
    better = front.with_point(0.75, 1.0)
    assert (better.scores.tolist(), better.costs.tolist()) == ([0.75, 0.8], [1.0, 4.0])


def test_many_means_at_once_give_what_each_gives_alone():
    front = Front.of(np.array([0.2, 0.6]), np.array([0.1, 0.5]), -2.0, 1.0)
    rng = np.random.default_rng(1)
    mean, std, cost = rng.standard_normal((5, 3)), rng.random(3) + 0.1, rng.random(3)
    got = expected_hypervolume(mean, std, np.broadcast_to(cost, mean.shape), front, BENT)
    for line, found in zip(mean, got, strict=True):
        np.testing.assert_allclose(found, expected_hypervolume(line, std, cost, front, BENT))
