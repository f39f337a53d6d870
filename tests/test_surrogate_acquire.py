"""Acquisition functions against sampling and geometry."""

import numpy as np
import pytest

from surrogate import acquire


@pytest.mark.parametrize(("mean", "std", "best"), [(0.0, 1.0, 0.0), (1.0, 0.3, 1.5), (2.0, 0.5, 0.0)])
def test_expected_improvement_is_the_mean_over_samples(mean, std, best):
    draws = mean + std * np.random.default_rng(0).standard_normal(400_000)
    want = np.maximum(draws - best, 0).mean()
    assert float(acquire.expected_improvement(mean, std, best)) == pytest.approx(want, abs=0.003)


def test_expected_hypervolume_of_certain_candidates_is_the_area_they_add():
    known, known_cost = np.array([0.2, 0.6]), np.array([1.0, 2.0])
    mean, cost = np.array([0.5, 0.9, 0.1, 0.6]), np.array([1.5, 3.0, 2.0, 0.5])
    got = acquire.expected_hypervolume(mean, np.full(4, 1e-9), cost, known, known_cost)
    # Over [1.5, 2] the front is 0.2; at 3.0 there is no width left; 0.1 is dominated;
    # the cheap 0.6 beats the floor of 0.2 over [0.5, 1] and the front of 0.2 over [1, 2].
    np.testing.assert_allclose(got, [0.5 * 0.3, 0.0, 0.0, 0.5 * 0.4 + 1.0 * 0.4], atol=1e-6)


def test_pick_batch_avoids_correlated_points():
    twins = np.array([[1.0, 0.99, 0.0], [0.99, 1.0, 0.0], [0.0, 0.0, 1.0]])
    mean = np.array([0.1, 0.09, 0.0])
    assert acquire.pick_batch(mean, twins, beta=1.0, noise=0.1, pending=0, count=2) == [0, 2]
    assert acquire.pick_batch(mean, np.eye(3), beta=1.0, noise=0.1, pending=0, count=2) == [0, 1]


def test_pick_batch_conditions_on_pending_points_and_never_picks_them():
    twins = np.array([[1.0, 0.99, 0.0], [0.99, 1.0, 0.0], [0.0, 0.0, 1.0]])
    picks = acquire.pick_batch(np.array([0.5, 0.1, 0.0]), twins, beta=1.0, noise=0.1, pending=1, count=5)
    assert picks == [2, 1]


def test_the_value_of_information_is_zero_without_any_and_grows_with_it():
    mean, std = np.array([0.0, 0.0, 0.0]), np.ones(3)
    others = (np.array([-1.0]), np.array([0.1]))
    values = [acquire.value_of_information(mean, std, np.full(3, s), others, 1.0, seed=0) for s in (0.0, 0.4, 0.8)]
    assert values[0] == pytest.approx(0.0, abs=1e-9)
    assert values[0] < values[1] < values[2]


def test_information_about_hopeless_candidates_has_no_value():
    others = (np.array([2.0]), np.array([0.5]))
    value = acquire.value_of_information(np.array([-4.0]), np.array([0.3]), np.array([0.2]), others, 1.0, seed=0)
    assert value == pytest.approx(0.0, abs=1e-9)


def test_an_empty_batch_has_no_value():
    """As when every candidate of a small space has its low score."""
    none = np.zeros(0)
    assert acquire.value_of_information(none, none, none, (np.array([0.3]), np.array([1.0])), 0.5, seed=0) == 0.0
