"""What a measurement is expected to bring: improvement, upper bounds, the value of looking cheaply first."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from surrogate.quality import normal_cdf

Array = npt.NDArray[np.float64]


def expected_improvement(mean: npt.ArrayLike, std: npt.ArrayLike, best: npt.ArrayLike) -> Array:
    """E[max(Z - best, 0)] of normal Z, element by element (Jones et al. 1998, eq. 15)."""
    spread = np.maximum(np.asarray(std, dtype=np.float64), 1e-12)
    u = (np.asarray(mean, dtype=np.float64) - np.asarray(best, dtype=np.float64)) / spread
    density = np.exp(-0.5 * u**2) / np.sqrt(2 * np.pi)
    return np.asarray(spread * (u * normal_cdf(u) + density))


def expected_hypervolume(mean: Array, std: Array, cost: Array, known: Array, known_cost: Array) -> Array:
    """Expected growth (n,) of the area under the front of accuracy against cost, for candidates of known cost (n,).

    `known`, `known_cost` (m,) are the measured ones. The front at a cost is the best accuracy at most that dear, so
    the growth is the expected improvement over it, integrated over all costs from the candidate's own up.
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


def spread_out(mean: Array, covariance: Array, beta: float, noise: float, known: int, count: int) -> list[int]:
    """Picks `count` of n points by mean + beta * std, the variance reduced after each as if it had been measured.

    mean (n,), covariance (n, n); the first `known` points are being measured already: they are counted before the
    first pick and never picked (Desautels et al. 2014, GP-BUCB).
    """
    covariance = covariance.copy()
    free = np.arange(len(mean)) >= known
    picks: list[int] = []
    for point in range(known):
        _measure(covariance, point, noise)
    while len(picks) < min(count, len(mean) - known):
        std = np.sqrt(np.maximum(np.diag(covariance), 0.0))
        point = int(np.argmax(np.where(free, mean + beta * std, -np.inf)))
        picks.append(point)
        free[point] = False
        _measure(covariance, point, noise)
    return picks


def _measure(covariance: Array, point: int, noise: float) -> None:
    column = covariance[:, point].copy()
    covariance -= np.outer(column, column) / max(column[point] + noise, 1e-9)


def value_of_looking(
    mean: Array, std: Array, shift: Array, others: tuple[Array, Array], best: float, seed: int, draws: int = 256
) -> float:
    """How much the expected improvement of the next full measurement grows by looking cheaply at k candidates first.

    A look moves the mean (k,) of each by a normal amount of standard deviation `shift` (k,) and takes that much off
    its variance; `others` are (mean, std) of candidates that are not looked at. The improvement is over `best`.
    """
    rival = float(expected_improvement(*others, best).max(initial=0.0))
    now = max(rival, float(expected_improvement(mean, std, best).max(initial=0.0)))
    left = np.sqrt(np.maximum(std**2 - shift**2, 1e-9))
    half = np.random.default_rng(seed).standard_normal((draws // 2, len(mean)))
    moved = mean + shift * np.concatenate([half, -half])  # antithetic: the mean shift is exactly zero
    after = expected_improvement(moved, left, best).max(axis=1, initial=0.0)
    return float(np.maximum(after, rival).mean()) - now
