"""Acquisition functions against sampling."""

import numpy as np
import pytest

from surrogate import acquire


@pytest.mark.parametrize(("mean", "std", "best"), [(0.0, 1.0, 0.0), (1.0, 0.3, 1.5), (2.0, 0.5, 0.0)])
def test_expected_improvement_is_the_mean_over_samples(mean, std, best):
    draws = mean + std * np.random.default_rng(0).standard_normal(400_000)
    want = np.maximum(draws - best, 0).mean()
    assert float(acquire.expected_improvement(mean, std, best)) == pytest.approx(want, abs=0.003)


def test_pick_batch_avoids_correlated_points():
    twins = np.array([[1.0, 0.99, 0.0], [0.99, 1.0, 0.0], [0.0, 0.0, 1.0]])
    mean = np.array([0.1, 0.09, 0.0])
    assert acquire.pick_batch(mean, twins, beta=1.0, noise=0.1, pending=0, count=2) == [0, 2]
    assert acquire.pick_batch(mean, np.eye(3), beta=1.0, noise=0.1, pending=0, count=2) == [0, 1]


def test_pick_batch_conditions_on_pending_points_and_never_picks_them():
    twins = np.array([[1.0, 0.99, 0.0], [0.99, 1.0, 0.0], [0.0, 0.0, 1.0]])
    picks = acquire.pick_batch(np.array([0.5, 0.1, 0.0]), twins, beta=1.0, noise=0.1, pending=1, count=5)
    assert picks == [2, 1]


def value(mean, std, shift, best, rival):
    improvement = lambda mean, std: acquire.expected_improvement(mean, std, best)  # noqa: E731
    return acquire.value_of_information(mean, std, shift, improvement, rival, seed=0)


def test_the_value_of_information_is_zero_without_any_and_grows_with_it():
    values = [value(np.zeros(3), np.ones(3), np.full(3, shift), 1.0, 0.0) for shift in (0.0, 0.4, 0.8)]
    assert values[0] == pytest.approx(0.0, abs=1e-9)
    assert values[0] < values[1] < values[2]


def test_information_about_hopeless_candidates_has_no_value():
    assert value(np.array([-4.0]), np.array([0.3]), np.array([0.2]), 1.0, 1.1) == pytest.approx(0.0, abs=1e-9)


def test_an_empty_batch_has_no_value():
    """As when every candidate of a small space has its low score."""
    none = np.zeros(0)
    assert value(none, none, none, 0.5, 0.3) == pytest.approx(0.0, abs=1e-12)
