"""Learned weights: against an explicit average over all models, and with useful, useless and reversed columns."""

from __future__ import annotations

import itertools
import math
import resource
import time
from dataclasses import astuple, replace

import numpy as np
import numpy.typing as npt
import pytest

from surrogate import evidence, linear, xgb
from surrogate.evidence import INCLUDED, SLAB, SpikeAndSlab, unknown
from surrogate.quality import kendall_tau

Array = npt.NDArray[np.float64]


def data(m: int, k: int = 3, d: int = 4, seed: int = 0) -> tuple[Array, Array, Array]:
    """The target follows the first trend and the first feature; the other columns are noise."""
    rng = np.random.default_rng(seed)
    trend, x = rng.standard_normal((m, k)), rng.standard_normal((m, d))
    return trend, x, 0.8 * trend[:, 0] + 0.3 * x[:, 0] + 0.4 * rng.standard_normal(m)


def believing(*mean: float) -> SpikeAndSlab:
    """The prior of trends that matter with these coefficients, if they matter."""
    return replace(unknown(len(mean)), mean=np.array(mean))


def models(
    trend: Array, x: Array, y: Array, loud: Array, belief: SpikeAndSlab
) -> list[tuple[float, tuple[int, ...], Array, Array]]:
    """By definition, for each model: (evidence times prior, subset, mean, covariance of all weights), at the variances
    of features and noise of greatest evidence."""
    found = []
    design = np.concatenate([np.ones((len(y), 1)), trend, x], axis=1)
    k, d = trend.shape[1], x.shape[1]
    for signal, level in itertools.product(linear.SIGNALS, linear.NOISES):
        found.append([])
        scales = math.exp(-0.5 * (math.log(signal / linear.SIGNAL) ** 2 + math.log(level / linear.NOISE) ** 2))
        for subset in itertools.chain.from_iterable(itertools.combinations(range(k), size) for size in range(k + 1)):
            slabs = [belief.variance[j] * (j in subset) for j in range(k)]
            prior = np.array([linear.INTERCEPT_VARIANCE, *slabs, *[signal / d] * d])
            total = (design * prior) @ design.T + np.diag(level * loud)
            gain = (prior[:, None] * design.T) @ np.linalg.inv(total)
            odds = math.prod(p if j in subset else 1 - p for j, p in enumerate(belief.included))
            centre = np.array([0.0, *(belief.mean[j] * (j in subset) for j in range(k)), *[0.0] * d])
            left = y - design @ centre
            likelihood = math.exp(-0.5 * left @ np.linalg.solve(total, left)) / math.sqrt(np.linalg.det(total))
            spread = np.diag(prior) - gain @ (design * prior)
            found[-1].append((scales * odds * likelihood, subset, centre + gain @ left, spread))
    return max(found, key=lambda given: sum(one[0] for one in given))


@pytest.mark.parametrize(
    "belief",
    [
        unknown(3),
        believing(0.7, 0.0, -0.3),
        SpikeAndSlab(np.array([0.25, 0.0, 0.7]), np.array([0.1, 0.2, 0.05]), np.array([1.0, 0.5, 0.9])),
    ],
    ids=["nothing known", "beliefs", "one in no doubt"],
)
def test_the_posterior_is_the_average_over_every_model(belief: SpikeAndSlab) -> None:
    trend, x, y = data(9)
    loud = np.linspace(0.5, 2.0, 9)
    fitted = belief.fit(trend, x, y, loud)
    each = models(trend, x, y, loud, belief)
    weight = np.array([one[0] for one in each])
    weight /= weight.sum()
    mean = sum(w * one[2] for w, one in zip(weight, each, strict=True))
    second = sum(w * (one[3] + np.outer(one[2], one[2])) for w, one in zip(weight, each, strict=True))
    np.testing.assert_allclose(fitted.weights, mean, atol=1e-9)
    np.testing.assert_allclose(fitted.covariance, second - np.outer(mean, mean), atol=1e-9)
    for j in range(3):
        assert fitted.included[j] == pytest.approx(sum(w for w, one in zip(weight, each, strict=True) if j in one[1]))
    coefficients, std = fitted.coefficients
    np.testing.assert_allclose(coefficients, mean[1:4], atol=1e-9)
    np.testing.assert_allclose(std**2, np.diag(fitted.covariance)[1:4])


def test_left_out_predictions_match_refits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(evidence, "SIGNALS", (0.6,))
    monkeypatch.setattr(evidence, "NOISES", (0.3,))
    (trend, x, y), belief = data(8), believing(0.7, 0.2, 0.0)
    fitted = belief.fit(trend, x, y)
    for i in range(8):
        rest = np.arange(8) != i
        again = belief.fit(trend[rest], x[rest], y[rest])
        mean, variance = again.predict(trend[i : i + 1], x[i : i + 1])
        assert fitted.left_out[i] == pytest.approx(float(mean[0]), abs=1e-6)
        assert fitted.left_out_variance[i] == pytest.approx(float(variance[0]) + again.noise, rel=1e-6)


def test_trends_in_no_doubt_have_the_posterior_of_the_normal_prior() -> None:
    (trend, x, y), normal = data(9), linear.Prior(np.array([0.5, 0.0, 0.1]), np.array([0.1, 0.2, 0.3]))
    certain = SpikeAndSlab(normal.mean, normal.variance, np.ones(3)).fit(trend, x, y)
    for one, other in zip(astuple(normal.fit(trend, x, y)), astuple(certain), strict=True):
        np.testing.assert_allclose(one, other, atol=1e-9)


def test_the_sign_of_a_column_does_not_matter() -> None:
    trend, x, y = data(20)
    turned = trend * np.array([-1.0, 1.0, -1.0])
    one, other = unknown(3).fit(trend, x, y), unknown(3).fit(turned, x, y)
    np.testing.assert_allclose(one.predict(trend, x), other.predict(turned, x), atol=1e-9)
    assert one.coefficients[0][0] > 0.4
    assert other.coefficients[0][0] < -0.4


def test_evidence_separates_useful_from_useless_columns() -> None:
    fitted = unknown(6).fit(*data(40, k=6))
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
            prior = unknown(columns) if learned else linear.Prior(np.zeros(columns), np.full(columns, SLAB))
            model = prior.fit(trend[known], x[known], y[known])
            taus.append(kendall_tau(model.predict(trend[10:], x[10:])[0], y[10:]))
        return float(np.mean(taus))

    lost, ridge_lost = rank(1, True) - rank(6, True), rank(1, False) - rank(6, False)
    assert lost < 0.09
    assert lost < ridge_lost


def test_it_works_without_data_or_without_trends() -> None:
    trend, x, y = data(5)
    nothing = unknown(3).fit(trend[:0], x[:0], y[:0])
    mean, variance = nothing.predict(trend, x)
    np.testing.assert_allclose(mean, 0.0)
    assert (variance > 0.1).all()
    np.testing.assert_allclose(nothing.included, INCLUDED)
    mean, _ = believing(0.7, 0.0, 0.0).fit(trend[:0], x[:0], y[:0]).predict(trend, x)
    np.testing.assert_allclose(mean, INCLUDED * 0.7 * trend[:, 0])
    bare = unknown(0).fit(trend[:, :0], x, y)
    assert bare.included.shape == (0,)
    assert np.isfinite(bare.predict(trend[:, :0], x)).all()


def test_a_prior_belief_that_the_results_refute_is_dropped() -> None:
    """As with the authors' MobileNetV2 under a cap, where the low fidelity says next to nothing, despite the prior."""
    trend, x, y = data(30)
    fitted = believing(0.7, 0.7).fit(trend[:, 1:], x, y)
    assert np.abs(fitted.coefficients[0]).max() < 0.2


def test_repeated_results_get_more_weight() -> None:
    trend, x, y = data(12)
    sure = unknown(3).fit(trend, x, y, np.full(12, 0.25))
    assert sure.predict(trend, x)[1].mean() < unknown(3).fit(trend, x, y).predict(trend, x)[1].mean()


def test_the_useful_column_is_found_among_many() -> None:
    fitted = unknown(40).fit(*data(60, k=40))
    assert sum(map(len, evidence._indices((True,) * 40))) <= evidence.MODELS
    assert int(fitted.included.argmax()) == 0


def test_it_predicts_two_million_rows_in_seconds() -> None:
    rows = 2**21
    rng = np.random.default_rng(0)
    trend, x = (rng.standard_normal((rows, n), dtype=np.float32) for n in (8, 14))
    y = trend[:100, 0] + 0.3 * rng.standard_normal(100)
    before, start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.process_time()
    model = xgb.fit(trend[:100], x[:100], y, unknown(8), 0, parts=xgb.SurrogateParts(trees=False))
    mean, variance = model.predict(trend, x)
    assert time.process_time() - start < 15
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 2**20  # KiB
    assert kendall_tau(mean[1000:3000], trend[1000:3000, 0]) > 0.8
    assert (variance > 0).all()
