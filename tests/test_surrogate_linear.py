"""The Bayesian linear part against the same posterior computed in weight space."""

import numpy as np
import pytest

from surrogate import linear
from surrogate.linear import Prior, fit_linear

PRIOR = Prior(np.array([0.5]), np.array([0.1]))


def data(n, d=6, seed=0):
    rng = np.random.default_rng(seed)
    trend, x = rng.standard_normal((n, 1)), rng.standard_normal((n, d))
    return trend, x, 0.8 * trend[:, 0] + 0.4 * x[:, 0] + 0.2 * rng.standard_normal(n)


def test_the_posterior_equals_the_one_computed_in_weight_space(monkeypatch):
    monkeypatch.setattr(linear, "SIGNALS", (0.6,))
    monkeypatch.setattr(linear, "NOISES", (0.3,))
    trend, x, y = data(25)
    loud = np.linspace(0.5, 2.0, 25)
    fitted = fit_linear(trend, x, y, PRIOR, loud)
    design = np.concatenate([np.ones((25, 1)), trend, x], axis=1)
    before = np.diag(1 / np.array([linear.INTERCEPT_VARIANCE, 0.1, *[0.6 / 6] * 6]))
    centre = np.array([0, 0.5, *[0] * 6])
    covariance = np.linalg.inv(before + design.T @ np.diag(1 / (0.3 * loud)) @ design)
    weights = covariance @ (before @ centre + design.T @ (y / (0.3 * loud)))
    np.testing.assert_allclose(fitted.weights, weights, atol=1e-9)
    np.testing.assert_allclose(fitted.covariance, covariance, atol=1e-9)


def test_left_out_predictions_equal_those_of_refits(monkeypatch):
    monkeypatch.setattr(linear, "SIGNALS", (0.6,))
    monkeypatch.setattr(linear, "NOISES", (0.3,))
    trend, x, y = data(12)
    fitted = fit_linear(trend, x, y, PRIOR)
    for i in range(12):
        rest = np.arange(12) != i
        mean, variance = fit_linear(trend[rest], x[rest], y[rest], PRIOR).predict(trend[i : i + 1], x[i : i + 1])
        assert fitted.left_out[i] == pytest.approx(float(mean[0]), abs=1e-9)
        assert fitted.left_out_variance[i] == pytest.approx(float(variance[0]) + 0.3, abs=1e-9)


def test_without_data_the_prediction_is_the_prior():
    trend, x, _ = data(5)
    mean, variance = fit_linear(trend[:0], x[:0], np.zeros(0), PRIOR).predict(trend, x)
    np.testing.assert_allclose(mean, 0.5 * trend[:, 0])
    assert (variance > 0.1).all()


def test_data_can_refute_a_prior_trend():
    rng = np.random.default_rng(4)
    trend, x = rng.standard_normal((60, 1)), rng.standard_normal((60, 3))
    fitted = fit_linear(trend, x, x[:, 0], PRIOR)
    assert abs(fitted.weights[1]) < 0.1
    assert fitted.weights[2] > 0.8


def test_joint_covariance_has_the_predicted_variances_on_its_diagonal():
    trend, x, y = data(20)
    fitted = fit_linear(trend, x, y, PRIOR)
    np.testing.assert_allclose(np.diag(fitted.joint(trend, x)), fitted.predict(trend, x)[1], atol=1e-12)
