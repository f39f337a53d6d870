"""Sums of non-negative parts, corrected by trees."""

from __future__ import annotations

import numpy as np
import pytest

from surrogate.sums import accuracy, fit_sums, non_negative_weights, spread_out

Array = np.ndarray


def layers(count: int, seed: int = 0) -> Array:
    """A constant, and what 20 layers of three kinds do: skewed like the costs of networks."""
    rng = np.random.default_rng(seed)
    return np.column_stack([np.ones(count), rng.gamma(2.0, 1.0, (count, 3)), rng.gamma(0.5, 2.0, (count, 2))])


WEIGHTS = np.array([0.3, 0.0, 1.5, 0.2, 0.0, 4.0])


def test_weights_are_found_and_none_is_negative() -> None:
    parts = layers(40)
    np.testing.assert_allclose(non_negative_weights(parts, parts @ WEIGHTS), WEIGHTS, atol=1e-8)
    noisy = parts @ WEIGHTS * np.exp(np.random.default_rng(1).normal(0, 0.1, 40))
    found = non_negative_weights(parts, noisy)
    assert (found >= 0).all()
    # Nothing near it that is allowed has a smaller squared relative error.
    least = np.sum((parts @ found / noisy - 1) ** 2)
    for step in np.random.default_rng(2).normal(0, 0.02, (500, len(found))):
        assert np.sum((parts @ np.maximum(found + step, 0) / noisy - 1) ** 2) >= least - 1e-12


def test_columns_without_content_and_equal_columns_do_no_harm() -> None:
    parts = layers(40)
    parts = np.column_stack([parts, np.zeros(40), parts[:, 2]])
    found = non_negative_weights(parts, parts[:, :6] @ WEIGHTS)
    np.testing.assert_allclose(parts @ found, parts[:, :6] @ WEIGHTS, rtol=1e-6)


@pytest.mark.parametrize("bent", [False, True], ids=["a sum", "a sum that caches bend"])
def test_forty_points_predict_others(bent: bool) -> None:
    """Where time is more than a sum, the trees lower the error; the accuracy on left-out points is that on new ones."""
    parts = layers(400)
    truth = parts @ WEIGHTS * (1 + 0.6 * (parts[:, 2] > 2) if bent else 1.0)
    y = truth * np.exp(np.random.default_rng(3).normal(0, 0.03, 400))
    x = np.zeros((400, 1), dtype=np.float32)
    model = fit_sums(parts[:40], x[:40], y[:40], seed=0)
    new = accuracy(model.predict(parts[40:], x[40:]), y[40:])
    assert new.median < (0.12 if bent else 0.04)
    assert new.rank_correlation > 0.95
    assert abs(accuracy(model.left_out, y[:40]).median - new.median) < 0.05
    assert (model.trees is not None) == bent
    if bent:
        plain = accuracy(parts[40:] @ non_negative_weights(parts[:40], y[:40]), y[40:])
        assert new.median < 0.8 * plain.median


def test_the_accuracy_of_predictions() -> None:
    measured = np.arange(1.0, 101.0)
    found = accuracy(measured * np.where(np.arange(100) < 4, 2.0, 1.1), measured)
    assert found.median == pytest.approx(0.1)
    assert found.factor == pytest.approx(1.1)  # four of a hundred may be worse
    assert accuracy(measured[::-1], measured).rank_correlation == pytest.approx(-1)


def test_rare_parts_are_among_the_rows_that_are_spread_out() -> None:
    parts = layers(1000)
    parts[:, 5] = 0
    parts[[17, 600], 5] = 1.0
    rows = spread_out(parts, 8)
    assert {17, 600} & set(rows.tolist())
    assert len(set(rows.tolist())) == 8
