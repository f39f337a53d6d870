"""The Gaussian process on known functions."""

import numpy as np
import pytest

from surrogate.baselines import bore, fit_gp


def test_gp_interpolates_a_smooth_function_and_is_uncertain_far_away():
    x = np.linspace(0, 6, 25)[:, None]
    process = fit_gp(x, 10 + np.sin(x[:, 0]))
    mean, std = process.predict(np.array([[1.3], [4.1], [60.0]]))
    np.testing.assert_allclose(mean[:2], 10 + np.sin([1.3, 4.1]), atol=0.1)
    assert std[2] > 3 * std[0]


def test_gp_of_a_constant_predicts_it():
    mean, _ = fit_gp(np.arange(6.0)[:, None], np.full(6, 3.0)).predict(np.array([[2.5]]))
    assert mean[0] == pytest.approx(3.0)


def test_gp_can_be_fitted_to_one_point():
    mean, std = fit_gp(np.zeros((1, 2)), np.array([0.4])).predict(np.ones((3, 2)))
    np.testing.assert_allclose(mean, 0.4)
    assert (std > 0).all()


def test_bore_puts_points_like_the_best_third_first():
    x = np.random.default_rng(0).standard_normal((300, 4)).astype(np.float32)
    y = (x[:, 0] - 0.5 * x[:, 1]).astype(np.float64)
    known, rest = np.arange(60), np.arange(60, 300)
    odds = bore(x, known, y[known], seed=0)[rest]
    assert y[rest][np.argsort(-odds)[:40]].mean() > y[rest].mean() + y.std()
    assert (bore(x, known, y[known], seed=0)[rest] == odds).all()
