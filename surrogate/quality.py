"""The quality of rankings and intervals: rank correlations, partial correlation, bootstrap, coverage."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float64]

_Z = np.linspace(-6.0, 6.0, 4801)
_CDF = np.array([0.5 * (1.0 + math.erf(z / math.sqrt(2.0))) for z in _Z])


def normal_cdf(z: npt.ArrayLike) -> Array:
    """P(Z < z) of a standard normal Z, accurate to 1e-6."""
    return np.interp(np.asarray(z, dtype=np.float64), _Z, _CDF)


def normal_quantile(p: npt.ArrayLike) -> Array:
    """The inverse of `normal_cdf`, clipped to -6..6."""
    return np.interp(np.asarray(p, dtype=np.float64), _CDF, _Z)


def ranks(values: npt.ArrayLike) -> Array:
    """Ranks 1..n (n,); ties share their mean rank."""
    values = np.asarray(values, dtype=np.float64)
    _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
    last = np.cumsum(counts)
    return np.asarray((last - (counts - 1) / 2.0)[inverse], dtype=np.float64)


def normal_scores(values: npt.ArrayLike) -> Array:
    """Ranks mapped to normal quantiles (n,), with a mean of about 0: scale and outliers of `values` do not matter."""
    rank = ranks(values)
    return normal_quantile((rank - 0.5) / len(rank)) if len(rank) else rank


def spearman(a: npt.ArrayLike, b: npt.ArrayLike) -> float:
    """Spearman's rank correlation, -1..1; 0 if one of the two is constant."""
    return pearson(ranks(a), ranks(b))


def pearson(a: npt.ArrayLike, b: npt.ArrayLike) -> float:
    """Pearson's correlation, -1..1; 0 if one of the two is constant."""
    x, y = np.asarray(a, dtype=np.float64), np.asarray(b, dtype=np.float64)
    x, y = x - x.mean(), y - y.mean()
    scale = math.sqrt(float(x @ x) * float(y @ y))
    return float(x @ y) / scale if scale > 0 else 0.0


def kendall_tau(a: npt.ArrayLike, b: npt.ArrayLike) -> float:
    """Kendall's tau-b of two sequences (n,), -1..1, in O(n log n) (Knight 1966); 0 if one is constant.

    Raises ValueError if the sequences differ in length.
    """
    x, y = np.asarray(a, dtype=np.float64), np.asarray(b, dtype=np.float64)
    if x.shape != y.shape or x.ndim != 1:
        raise ValueError(f"kendall_tau needs two sequences of one length, got {x.shape} and {y.shape}")
    n = len(x)
    order = np.lexsort((y, x))
    x, place = x[order], np.unique(y[order], return_inverse=True)[1]
    pairs = n * (n - 1) / 2
    tied_x, tied_y = _tied_pairs(x), _tied_pairs(np.sort(place))
    same_x = np.flatnonzero(np.concatenate(([True], x[1:] != x[:-1]))) if n else np.zeros(0, dtype=np.intp)
    tied_both = sum(_tied_pairs(group) for group in np.split(place, same_x[1:])) if tied_x and tied_y else 0.0
    discordant = _inversions(place)
    concordant = pairs - tied_x - tied_y + tied_both - discordant
    scale = math.sqrt((pairs - tied_x) * (pairs - tied_y))
    return (concordant - discordant) / scale if scale > 0 else 0.0


def _tied_pairs(values: npt.NDArray[np.generic]) -> float:
    """Number of pairs of equal values in a sorted sequence."""
    edges = np.flatnonzero(np.concatenate(([True], values[1:] != values[:-1], [True])))
    runs = np.diff(edges).astype(np.float64)
    return float((runs * (runs - 1) / 2).sum())


def _inversions(values: npt.NDArray[np.intp]) -> float:
    """Number of pairs i < j with values[i] > values[j]: merge sort, one numpy pass per level."""
    n = len(values)
    if n < 2:
        return 0.0
    count, width, span = 0, 1, int(values.max()) + 1
    while width < n:
        # Sorts all blocks of 2 * width at once: the number of the block is the leading digit of the key.
        position = np.arange(n)
        key = (position // (2 * width)) * span + values
        order = np.argsort(key, kind="stable")
        right = (order // width) % 2 == 1
        # An element of a right half passes the greater ones of its left half: those sorted after it.
        left_seen = np.cumsum(~right)
        before = (order // (2 * width)) * width  # of earlier blocks, whose left halves are full
        count += int((width - (left_seen - before))[right].sum())
        values = values[order]
        width *= 2
    return float(count)


def partial_tau(a: npt.ArrayLike, b: npt.ArrayLike, given: npt.ArrayLike) -> float:
    """Partial Kendall's tau of `a` and `b` with `given` held fixed (Kendall 1942), -1..1; 0 if it is undefined."""
    ab, ag, bg = kendall_tau(a, b), kendall_tau(a, given), kendall_tau(b, given)
    scale = math.sqrt(max(0.0, (1 - ag * ag) * (1 - bg * bg)))
    return (ab - ag * bg) / scale if scale > 1e-12 else 0.0


def kendall_taus(a: npt.ArrayLike, b: npt.ArrayLike) -> Array:
    """Kendall's tau-b of each row of `a` and `b`, (D, n) -> (D,). It compares all pairs: for many short sequences."""
    x, y = np.asarray(a, dtype=np.float64), np.asarray(b, dtype=np.float64)
    taus = [_taus_by_pairs(x[i : i + 256], y[i : i + 256]) for i in range(0, len(x), 256)]  # bounds the memory
    return np.concatenate(taus) if taus else np.zeros(0)


def _taus_by_pairs(x: Array, y: Array) -> Array:
    i, j = np.triu_indices(x.shape[1], 1)
    one, two = np.sign(x[:, i] - x[:, j]), np.sign(y[:, i] - y[:, j])
    scale = np.sqrt((one * one).sum(axis=1) * (two * two).sum(axis=1))
    return np.asarray((one * two).sum(axis=1) / np.where(scale > 0, scale, 1.0))


def partial_taus(a: npt.ArrayLike, b: npt.ArrayLike, given: npt.ArrayLike) -> Array:
    """`partial_tau` of each row of `a`, `b` and `given`, (D, n) -> (D,)."""
    ab, ag, bg = kendall_taus(a, b), kendall_taus(a, given), kendall_taus(b, given)
    scale = np.sqrt(np.maximum(0.0, (1 - ag * ag) * (1 - bg * bg)))
    return np.asarray(np.where(scale > 1e-6, (ab - ag * bg) / np.where(scale > 1e-6, scale, 1.0), 0.0))


def spearmans(a: npt.ArrayLike, b: npt.ArrayLike) -> Array:
    """`spearman` of each row of `a` and `b`, (D, n) -> (D,)."""
    one, two = _centred_ranks(a), _centred_ranks(b)
    scale = np.sqrt((one * one).sum(axis=1) * (two * two).sum(axis=1))
    return np.asarray((one * two).sum(axis=1) / np.where(scale > 0, scale, 1.0))


def _centred_ranks(rows: npt.ArrayLike) -> Array:
    """Ranks within each row (D, n) minus their mean: half of (number of smaller values - number of greater ones)."""
    x = np.asarray(rows, dtype=np.float64)
    parts = [x[i : i + 256] for i in range(0, len(x), 256)]
    return np.concatenate([np.sign(p[:, :, None] - p[:, None, :]).sum(axis=2) / 2 for p in parts])


def expected_maximum(n: npt.ArrayLike) -> Array:
    """Expected maximum of n standard normals, accurate to 0.03 (Blom 1958); 0 for one or fewer."""
    count = np.maximum(np.asarray(n, dtype=np.float64), 1.0)
    return normal_quantile((count - 0.375) / (count + 0.25))


def bootstrap_interval(
    statistic: Callable[..., float], *samples: npt.ArrayLike, level: float = 0.9, draws: int = 1000, seed: int = 0
) -> tuple[float, float]:
    """Percentile bootstrap interval of `statistic(*samples)`; samples (n,) are redrawn together, with replacement."""
    arrays = [np.asarray(sample, dtype=np.float64) for sample in samples]
    rng = np.random.default_rng(seed)
    n = len(arrays[0])
    values = [statistic(*(array[pick] for array in arrays)) for pick in rng.integers(n, size=(draws, n))]
    low, high = np.quantile(values, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def coverage(truth: npt.ArrayLike, mean: npt.ArrayLike, std: npt.ArrayLike, level: float = 0.9) -> float:
    """Fraction of `truth` (n,) within the central normal interval of that level: `level` itself if it is calibrated."""
    half = float(normal_quantile(0.5 + level / 2)) * np.asarray(std, dtype=np.float64)
    inside = np.abs(np.asarray(truth, dtype=np.float64) - np.asarray(mean, dtype=np.float64)) <= half
    return float(inside.mean())
