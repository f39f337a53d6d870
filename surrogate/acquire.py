"""Acquisition functions: expected improvement, expected hypervolume, batches of upper bounds, value of information."""

from __future__ import annotations

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


def expected_hypervolume(mean: Array, std: Array, cost: Array, known: Array, known_cost: Array) -> Array:
    """Expected growth (n,) of the area under the front of accuracy against cost, for candidates of known cost (n,).

    `known`, `known_cost` (m,) are the measured points. The front at a cost is the best accuracy among points that cost
    no more, so the growth is the expected improvement over it, integrated over all costs from the candidate's own up.
    """
    order = np.argsort(known_cost, kind="stable")
    front = np.maximum.accumulate(known[order])
    edges = np.append(known_cost[order], max(float(cost.max()), float(known_cost.max())))
    floor = float(known.min())
    total = np.maximum(edges[0] - cost, 0.0) * expected_improvement(mean, std, floor)
    for i, level in enumerate(front):
        width = np.maximum(edges[i + 1] - np.maximum(cost, edges[i]), 0.0)
        if width.any():
            total += width * expected_improvement(mean, std, level)
    return total


def pick_batch(mean: Array, covariance: Array, beta: float, noise: float, pending: int, count: int) -> list[int]:
    """Picks `count` of n points by mean + beta * std, reducing the variances after each pick as if it were measured.

    mean (n,), covariance (n, n). The first `pending` points are already being measured: they reduce the variances
    before the first pick, and are never picked (GP-BUCB, Desautels et al. 2014).
    """
    covariance = covariance.copy()
    free = np.arange(len(mean)) >= pending
    picks: list[int] = []
    for point in range(pending):
        _measure(covariance, point, noise)
    while len(picks) < min(count, len(mean) - pending):
        std = np.sqrt(np.maximum(np.diag(covariance), 0.0))
        point = int(np.argmax(np.where(free, mean + beta * std, -np.inf)))
        picks.append(point)
        free[point] = False
        _measure(covariance, point, noise)
    return picks


def _measure(covariance: Array, point: int, noise: float) -> None:
    """Conditions a covariance, in place, on a noisy measurement of a point."""
    column = covariance[:, point].copy()
    covariance -= np.outer(column, column) / max(column[point] + noise, 1e-9)


def value_of_information(
    mean: Array, std: Array, shift: Array, rivals: tuple[Array, Array], best: float, seed: int
) -> float:
    """Growth of the expected improvement by the next full measurement if k candidates get a cheap one first.

    A cheap measurement moves the mean (k,) of its candidate by a normal amount with the standard deviation `shift` (k,)
    and takes shift ** 2 off its variance, std ** 2 (k,). `rivals` are mean and std of the other candidates, `best` is
    the score to improve on.
    """
    rival = float(expected_improvement(*rivals, best).max(initial=0.0))
    now = max(rival, float(expected_improvement(mean, std, best).max(initial=0.0)))
    std_after = np.sqrt(np.maximum(std**2 - shift**2, 1e-9))
    half = np.random.default_rng(seed).standard_normal((DRAWS // 2, len(mean)))
    mean_after = mean + shift * np.concatenate([half, -half])  # antithetic: the mean shift is exactly zero
    after = expected_improvement(mean_after, std_after, best).max(axis=1, initial=0.0)
    return float(np.maximum(after, rival).mean()) - now
