"""Rank correlations against their definitions; intervals and coverage on known distributions."""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from surrogate import quality

SMALL = st.lists(st.tuples(st.integers(0, 6), st.integers(0, 6)), min_size=1, max_size=40)


def tau_by_pairs(x, y):
    """Kendall's tau-b from its definition, pair by pair."""
    agree = untied_x = untied_y = 0
    for i, j in itertools.combinations(range(len(x)), 2):
        agree += np.sign(x[i] - x[j]) * np.sign(y[i] - y[j])
        untied_x += x[i] != x[j]
        untied_y += y[i] != y[j]
    return agree / np.sqrt(untied_x * untied_y) if untied_x and untied_y else 0.0


@settings(deadline=None, max_examples=200)
@given(SMALL)
def test_kendall_tau_matches_its_definition_with_ties(pairs):
    x, y = np.array(pairs).T
    assert quality.kendall_tau(x, y) == pytest.approx(tau_by_pairs(x, y), abs=1e-12)


@pytest.mark.parametrize("n", [0, 1, 2, 63, 64, 65, 1000], ids=lambda n: f"n={n}")
def test_kendall_tau_of_an_order_and_its_reverse(n):
    x = np.arange(n, dtype=float)
    assert quality.kendall_tau(x, x**3) == (1.0 if n > 1 else 0.0)
    assert quality.kendall_tau(x, -x) == (-1.0 if n > 1 else 0.0)


def test_kendall_tau_refuses_sequences_of_different_length():
    with pytest.raises(ValueError, match=r"one length, got \(3,\) and \(2,\)"):
        quality.kendall_tau([1, 2, 3], [1, 2])


def test_kendall_tau_of_100_000_points_takes_no_quadratic_time():
    rng = np.random.default_rng(0)
    x = rng.standard_normal(100_000)
    assert quality.kendall_tau(x, x + rng.standard_normal(100_000)) == pytest.approx(0.5, abs=0.01)


def test_partial_tau_vanishes_if_the_covariate_explains_everything():
    rng = np.random.default_rng(1)
    z = rng.standard_normal(4000)
    a, b = z + 0.3 * rng.standard_normal(4000), z + 0.3 * rng.standard_normal(4000)
    own = rng.standard_normal(4000)
    assert quality.kendall_tau(a, b) > 0.7
    assert abs(quality.partial_tau(a, b, z)) < 0.25 < quality.partial_tau(z + own, z + 2 * own, z)
    assert quality.partial_tau(z, z, z) == 0.0


def test_normal_quantile_inverts_the_distribution():
    z = np.linspace(-3.5, 3.5, 71)
    np.testing.assert_allclose(quality.normal_quantile(quality.normal_cdf(z)), z, atol=1e-6)
    assert float(quality.normal_quantile(0.975)) == pytest.approx(1.959964, abs=1e-5)


@given(st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=50))
def test_normal_scores_keep_order_and_ties(values):
    got = quality.normal_scores(values)
    for i, j in itertools.combinations(range(len(values)), 2):
        assert np.sign(values[i] - values[j]) == np.sign(got[i] - got[j])
    assert abs(got.mean()) < 0.5


def test_spearman_and_pearson_of_a_constant_are_zero():
    assert quality.spearman([1, 1, 1], [1, 2, 3]) == 0.0
    assert quality.spearman([1, 2, 3], [1, 10, 100]) == pytest.approx(1.0)
    assert quality.pearson([1, 2, 3], [1, 10, 100]) < 0.95


def test_bootstrap_interval_of_a_mean_has_its_standard_error():
    x = np.random.default_rng(2).standard_normal(400)
    low, high = quality.bootstrap_interval(np.mean, x, level=0.9, draws=2000)
    assert high - low == pytest.approx(2 * 1.645 * x.std() / 20, rel=0.1)
    assert low < x.mean() < high


def test_coverage_of_true_and_of_overconfident_intervals():
    truth = np.random.default_rng(3).standard_normal(20_000)
    zero, one = np.zeros(20_000), np.ones(20_000)
    assert quality.coverage(truth, zero, one, 0.9) == pytest.approx(0.9, abs=0.01)
    assert quality.coverage(truth, zero, one / 2, 0.9) == pytest.approx(0.589, abs=0.01)


def test_batched_correlations_equal_those_of_each_row():
    rng = np.random.default_rng(0)
    a, b, c = rng.integers(0, 6, (3, 300, 9)).astype(float)
    assert quality.kendall_taus(a, b) == pytest.approx([quality.kendall_tau(x, y) for x, y in zip(a, b, strict=True)])
    expected = [quality.partial_tau(x, y, z) for x, y, z in zip(a, b, c, strict=True)]
    assert quality.partial_taus(a, b, c) == pytest.approx(expected, abs=1e-9)
    expected = [quality.spearman(x, y) for x, y in zip(a, b, strict=True)]
    assert quality.spearmans(a, b) == pytest.approx(expected)


@pytest.mark.parametrize("n", [2, 5, 30, 200], ids=lambda n: f"n={n}")
def test_expected_maximum_is_the_mean_maximum_of_draws(n):
    draws = np.random.default_rng(1).standard_normal((20_000, n)).max(axis=1)
    assert float(quality.expected_maximum(n)) == pytest.approx(draws.mean(), abs=0.04)
