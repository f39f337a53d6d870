"""The surrogate: what it learns, how well its intervals are calibrated, and that it is deterministic."""

import numpy as np
import pytest

from surrogate import xgb
from surrogate.linear import Prior
from surrogate.quality import coverage, kendall_tau

PRIOR = Prior(np.array([0.3]), np.array([0.1]))


def problem(n, seed, noise=0.3):
    """A target with a trend, a linear part and an interaction that only trees can learn; about unit variance."""
    rng = np.random.default_rng(seed)
    x = rng.choice([-1.0, 1.0], size=(n, 8)).astype(np.float32)
    trend = rng.standard_normal((n, 1)).astype(np.float32)
    truth = 0.5 * trend[:, 0] + 0.4 * x[:, 0] + 0.7 * x[:, 1] * x[:, 2]
    return trend, x, truth, truth + noise * rng.standard_normal(n)


def test_trees_find_the_interaction_that_the_linear_part_cannot():
    trend, x, _, y = problem(300, 0)
    new_trend, new_x, truth, _ = problem(500, 1)
    whole = xgb.fit(trend, x, y, PRIOR, seed=0).predict(new_trend, new_x)[0]
    line = xgb.fit(trend, x, y, PRIOR, seed=0, parts=xgb.SurrogateParts(trees=False)).predict(new_trend, new_x)[0]
    assert kendall_tau(whole, truth) > kendall_tau(line, truth) + 0.15


def test_the_linear_part_extrapolates_where_trees_cannot():
    trend, x, _, y = problem(40, 2)
    far = np.full((1, 1), 4.0, dtype=np.float32)
    whole = xgb.fit(trend, x, y, PRIOR, seed=0).predict(far, x[:1])[0]
    assert whole[0] > y.max()


@pytest.mark.parametrize("n", [0, 1, 2, 3, 10], ids=lambda n: f"n={n}")
def test_a_handful_of_points_is_enough_for_a_finite_prediction(n):
    trend, x, _, y = problem(n, 3)
    new_trend, new_x, _, _ = problem(50, 4)
    mean, variance = xgb.fit(trend, x, y, PRIOR, seed=0).predict(new_trend, new_x)
    assert np.isfinite(mean).all()
    assert (variance > 0).all()


def test_the_same_seed_gives_the_same_prediction_and_another_seed_another():
    trend, x, _, y = problem(60, 5)
    first, again, other = (xgb.fit(trend, x, y, PRIOR, seed=s).predict(trend, x) for s in (7, 7, 8))
    np.testing.assert_array_equal(first, again)
    assert not np.array_equal(first[0], other[0])


def test_chunks_do_not_change_the_prediction(monkeypatch):
    trend, x, _, y = problem(200, 6)
    whole = xgb.fit(trend, x, y, PRIOR, seed=0).predict(trend, x)
    monkeypatch.setattr(xgb, "CHUNK", 37)
    pieces = xgb.fit(trend, x, y, PRIOR, seed=0).predict(trend, x)
    np.testing.assert_allclose(pieces, whole, atol=1e-9)


def test_intervals_of_90_percent_cover_80_to_97():
    covered = []
    for seed in range(12):
        trend, x, _, y = problem(60, 10 + seed)
        new_trend, new_x, _, measured = problem(400, 50 + seed)
        model = xgb.fit(trend, x, y, PRIOR, seed=0)
        mean, variance = model.predict(new_trend, new_x)
        covered.append(coverage(measured, mean, np.sqrt(variance + model.noise)))
    assert 0.80 < np.mean(covered) < 0.97
