"""Acquisition functions: expected improvement, batches of upper bounds, value of information."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import numpy.typing as npt

from surrogate.quality import normal_cdf

Array = npt.NDArray[np.float64]

DRAWS = 256  # samples of a value of information: half of them drawn, half mirrored


def expected_improvement(mean: npt.ArrayLike, std: npt.ArrayLike, best: npt.ArrayLike) -> Array:
    """E[max(Z - best, 0)] of normal Z, element by element (Jones et al. 1998, eq. 15)."""
    std = np.maximum(np.asarray(std, dtype=np.float64), 1e-12)
    u = (np.asarray(mean, dtype=np.float64) - np.asarray(best, dtype=np.float64)) / std
    density = np.exp(-0.5 * u**2) / np.sqrt(2 * np.pi)
    return np.asarray(std * (u * normal_cdf(u) + density))


def pick_batch(mean: Array, covariance: Array, beta: float, noise: float, pending: int, count: int) -> list[int]:
    """Picks `count` of n points by mean + beta * std, reducing the variances after each pick as if it were measured.

    mean (n,), covariance (n, n). The first `pending` points are already being measured: they reduce the variances
    before the first pick, and are never picked (GP-BUCB, Desautels et al. 2014).
    """
    covariance = covariance.copy()
    free = np.arange(len(mean)) >= pending
    picks: list[int] = []
    for point in range(pending):
        condition(covariance, point, noise)
    while len(picks) < min(count, len(mean) - pending):
        std = np.sqrt(np.maximum(np.diag(covariance), 0.0))
        point = int(np.argmax(np.where(free, mean + beta * std, -np.inf)))
        picks.append(point)
        free[point] = False
        condition(covariance, point, noise)
    return picks


def condition(covariance: Array, point: int, noise: float) -> None:
    """Conditions a covariance (n, n), in place, on a measurement of a point with this variance."""
    column = covariance[:, point].copy()
    covariance -= np.outer(column, column) / max(column[point] + noise, 1e-9)


def value_of_information(
    mean: Array, std: Array, shift: Array, improvement: Callable[[Array, Array], Array], rival: float, seed: int
) -> float:
    """Growth of the expected improvement by the next full measurement if k candidates get a cheap one first.

    A cheap measurement moves the mean (k,) of its candidate by a normal amount with the standard deviation `shift` (k,)
    and takes shift ** 2 off its variance, std ** 2 (k,). improvement(means (..., k), stds (k,)) is the expected
    improvement (..., k) by each of them, `rival` the greatest by any other candidate.
    """
    now = max(rival, float(improvement(mean, std).max(initial=0.0)))
    std_after = np.sqrt(np.maximum(std**2 - shift**2, 1e-9))
    half = np.random.default_rng(seed).standard_normal((DRAWS // 2, len(mean)))
    mean_after = mean + shift * np.concatenate([half, -half])  # antithetic: the mean shift is exactly zero
    after = improvement(mean_after, std_after).max(axis=1, initial=0.0)
    return float(np.maximum(after, rival).mean()) - now
