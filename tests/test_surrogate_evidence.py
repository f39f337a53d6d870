"""Learned weights: against an explicit average over all models, and with useful, useless and reversed columns."""

from __future__ import annotations

import itertools
import math
import resource
import time

import numpy as np
import numpy.typing as npt
import pytest

from surrogate import evidence, linear
from surrogate.evidence import INCLUDED, SLAB, fit
from surrogate.quality import kendall_tau

Array = npt.NDArray[np.float64]


def data(m: int, k: int = 3, d: int = 4, seed: int = 0) -> tuple[Array, Array, Array]:
    """The target follows the first trend and the first feature; the other columns are noise."""
    rng = np.random.default_rng(seed)
    trend, x = rng.standard_normal((m, k)), rng.standard_normal((m, d))
    return trend, x, 0.8 * trend[:, 0] + 0.3 * x[:, 0] + 0.4 * rng.standard_normal(m)


def models(
    trend: Array, x: Array, y: Array, loud: Array, believed: Array
) -> list[tuple[float, tuple[int, ...], Array, Array, Array]]:
    """By definition, for each model: (evidence times prior, subset, mean, covariance of all weights, that of y)."""
    found = []
    design = np.concatenate([np.ones((len(y), 1)), trend, x], axis=1)
    k, d = trend.shape[1], x.shape[1]
    for signal, level in itertools.product(linear.SIGNALS, linear.NOISES):
        scales = math.exp(-0.5 * (math.log(signal / linear.SIGNAL) ** 2 + math.log(level / linear.NOISE) ** 2))
        for subset in itertools.chain.from_iterable(itertools.combinations(range(k), size) for size in range(k + 1)):
            prior = np.array([linear.INTERCEPT_VARIANCE, *(SLAB * (j in subset) for j in range(k)), *[signal / d] * d])
            total = (design * prior) @ design.T + np.diag(level * loud)
            gain = (prior[:, None] * design.T) @ np.linalg.inv(total)
            odds = INCLUDED ** len(subset) * (1 - INCLUDED) ** (k - len(subset))
            centre = np.array([0.0, *(believed[j] * (j in subset) for j in range(k)), *[0.0] * d])
            left = y - design @ centre
            likelihood = math.exp(-0.5 * left @ np.linalg.solve(total, left)) / math.sqrt(np.linalg.det(total))
            spread = np.diag(prior) - gain @ (design * prior)
            found.append((scales * odds * likelihood, subset, centre + gain @ left, spread, total))
    return found


@pytest.mark.parametrize("believed", [np.zeros(3), np.array([0.7, 0.0, -0.3])], ids=["no beliefs", "beliefs"])
def test_the_posterior_is_the_average_over_every_model(believed: Array) -> None:
    trend, x, y = data(9)
    loud = np.linspace(0.5, 2.0, 9)
    fitted = fit(trend, x, y, loud, believed)
    each = models(trend, x, y, loud, believed)
    weight = np.array([one[0] for one in each])
    weight /= weight.sum()
    mean = sum(w * one[2] for w, one in zip(weight, each, strict=True))
    second = sum(w * (one[3] + np.outer(one[2], one[2])) for w, one in zip(weight, each, strict=True))
    np.testing.assert_allclose(fitted.linear.weights, mean, atol=1e-9)
    np.testing.assert_allclose(fitted.linear.covariance, second - np.outer(mean, mean), atol=1e-9)
    for j in range(3):
        assert fitted.included[j] == pytest.approx(sum(w for w, one in zip(weight, each, strict=True) if j in one[1]))
    coefficients, std = fitted.coefficients
    np.testing.assert_allclose(coefficients, mean[1:4], atol=1e-9)
    np.testing.assert_allclose(std**2, np.diag(fitted.linear.covariance)[1:4])


def test_left_out_predictions_match_refits() -> None:
    (trend, x, y), believed = data(8), np.array([0.7, 0.2, 0.0])
    fitted = fit(trend, x, y, believed=believed)
    for i in range(8):
        rest = np.arange(8) != i
        again = fit(trend[rest], x[rest], y[rest], believed=believed)
        mean, variance = again.predict(trend[i : i + 1], x[i : i + 1])
        assert fitted.linear.left_out[i] == pytest.approx(float(mean[0]), abs=1e-6)
        assert fitted.linear.left_out_variance[i] == pytest.approx(float(variance[0]) + again.linear.noise, rel=1e-6)


def test_the_sign_of_a_column_does_not_matter() -> None:
    trend, x, y = data(20)
    turned = trend * np.array([-1.0, 1.0, -1.0])
    one, other = fit(trend, x, y), fit(turned, x, y)
    np.testing.assert_allclose(one.predict(trend, x), other.predict(turned, x), atol=1e-9)
    assert one.coefficients[0][0] > 0.4
    assert other.coefficients[0][0] < -0.4


def test_evidence_separates_useful_from_useless_columns() -> None:
    fitted = fit(*data(40, k=6))
    assert fitted.included[0] > 0.99
    assert fitted.included[1:].mean() < 0.4
    assert np.abs(fitted.coefficients[0][1:]).mean() < 0.1


def test_useless_columns_cost_little_rank() -> None:
    """Ten results and five columns of noise, averaged over twenty draws; a ridge of the same variance loses more."""

    def rank(columns: int, learned: bool) -> float:
        taus = []
        for seed in range(20):
            trend, x, y = data(310, k=6, seed=seed)
            trend, known = trend[:, :columns], slice(0, 10)
            prior = linear.Prior(np.zeros(columns), np.full(columns, SLAB))
            model = (
                fit(trend[known], x[known], y[known])
                if learned
                else linear.fit_linear(trend[known], x[known], y[known], prior)
            )
            taus.append(kendall_tau(model.predict(trend[10:], x[10:])[0], y[10:]))
        return float(np.mean(taus))

    lost, ridge_lost = rank(1, True) - rank(6, True), rank(1, False) - rank(6, False)
    assert lost < 0.09
    assert lost < ridge_lost


def test_it_works_without_data_or_without_trends() -> None:
    trend, x, y = data(5)
    nothing = fit(trend[:0], x[:0], y[:0])
    mean, variance = nothing.predict(trend, x)
    np.testing.assert_allclose(mean, 0.0)
    assert (variance > 0.1).all()
    np.testing.assert_allclose(nothing.included, INCLUDED)
    mean, _ = fit(trend[:0], x[:0], y[:0], believed=np.array([0.7, 0.0, 0.0])).predict(trend, x)
    np.testing.assert_allclose(mean, INCLUDED * 0.7 * trend[:, 0])
    bare = fit(trend[:, :0], x, y)
    assert bare.included.shape == (0,)
    assert np.isfinite(bare.predict(trend[:, :0], x)).all()


def test_a_prior_belief_that_the_results_refute_is_dropped() -> None:
    """As with the authors' MobileNetV2 under a cap, where the low fidelity says next to nothing, despite the prior."""
    trend, x, y = data(30)
    fitted = fit(trend[:, 1:], x, y, believed=np.array([0.7, 0.7]))
    assert np.abs(fitted.coefficients[0]).max() < 0.2


def test_repeated_results_get_more_weight() -> None:
    trend, x, y = data(12)
    sure = fit(trend, x, y, np.full(12, 0.25))
    assert sure.predict(trend, x)[1].mean() < fit(trend, x, y).predict(trend, x)[1].mean()


def test_the_useful_column_is_found_among_many() -> None:
    fitted = fit(*data(60, k=40))
    assert sum(map(len, evidence._indices(40))) <= evidence.MODELS
    assert int(fitted.included.argmax()) == 0


def test_it_predicts_two_million_rows_in_seconds() -> None:
    rows = 2**21
    rng = np.random.default_rng(0)
    trend, x = (rng.standard_normal((rows, n), dtype=np.float32) for n in (8, 14))
    y = trend[:100, 0] + 0.3 * rng.standard_normal(100)
    before, start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.process_time()
    mean, variance = fit(trend[:100], x[:100], y).predict(trend, x)
    assert time.process_time() - start < 15
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 2**20  # KiB
    assert kendall_tau(mean[1000:3000], trend[1000:3000, 0]) > 0.8
    assert (variance > 0).all()
