"""A linear model whose trends earn their weights: averaged over which trends matter, by marginal likelihood.

Low fidelities, training-free scores, costs: a run has many trends, and which of them rank its space, with which sign,
is not known before. Here each has a spike at 0 and a slab around what is expected of it (George and McCulloch 1993);
where that is 0, a column and its negative are the same. The model is the average over all subsets (Hoeting et al. 1999,
Bayesian model averaging), exact given the variances of signal and noise, which evidence chooses as for `fit_linear`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache
from itertools import combinations, product

import numpy as np
import numpy.typing as npt

from surrogate.linear import INTERCEPT_VARIANCE, NOISE, NOISES, SIGNAL, SIGNALS, Linear, Prior

Array = npt.NDArray[np.float64]
Matrix = npt.NDArray[np.float32] | Array

# Prior of the coefficient of a trend of which nothing is known, for trends and target of unit variance: the probability
# that it is not 0, and its variance then. In NAS-Bench-201's windows other values rank no better
# (docs/results/learned-weights.md).
INCLUDED, SLAB = 0.5, 0.1
MODELS = 1024  # subsets at most: of more than 10 trends in doubt only the smaller subsets are looked at


@dataclass(frozen=True)
class SpikeAndSlab(Prior):
    """Some of the k coefficients may be 0: `included` (k,) are the probabilities that they are not, 1 for a trend that
    is in no doubt. If they are not 0, they have the means and variances of the prior."""

    included: Array

    def fit(self, trend: Matrix, x: Matrix, y: Array, noise: Array | None = None) -> Linear:
        """The posterior for y (m,), of about unit variance, at trend (m, k) and features x (m, d), all columns of unit
        variance over the candidates; m may be 0.

        It holds mean and covariance over all models, and predictions of the points fitted, each without itself. The
        features share one variance; it and that of the noise have the grid and the prior of `fit_linear`, which gives
        the same posterior where no trend is in doubt. `noise` (m,) multiplies the noise variance point by point: 1 / r
        for a mean of r repeats.
        """
        points = _Points(
            t=np.asarray(trend, dtype=np.float64),
            rest=np.concatenate([np.ones((len(y), 1)), x], axis=1, dtype=np.float64),
            y=y,
            loud=np.ones(len(y)) if noise is None else noise,
        )
        models = (_all_models(points, self, signal, level) for signal, level in product(SIGNALS, NOISES))
        return _posterior(points, max(models, key=lambda one: one.log_evidence))

    def log_odds(self, index: npt.NDArray[np.intp]) -> Array:
        """Log probabilities (S,), up to a constant, that of the trends in doubt only those of each subset, index
        (S, size), matter."""
        doubt = self.included < 1
        odds = np.zeros(len(doubt))
        odds[doubt] = np.log(self.included[doubt]) - np.log1p(-self.included[doubt])
        return np.asarray(odds[index].sum(axis=1), dtype=np.float64)


def unknown(trends: int) -> SpikeAndSlab:
    """The prior of trends of which nothing is known, not even the sign."""
    return SpikeAndSlab(np.zeros(trends), np.full(trends, SLAB), np.full(trends, INCLUDED))


@dataclass(frozen=True)
class _Points:
    """m points to fit: k trends, the p = 1 + d columns of intercept and features, targets, factors of their noise."""

    t: Array  # (m, k)
    rest: Array  # (m, p)
    y: Array  # (m,)
    loud: Array  # (m,)


@dataclass(frozen=True)
class _Subsets:
    """The models of the S subsets of one size: places of their trends, log of evidence and prior, and the posterior of
    their coefficients."""

    index: npt.NDArray[np.intp]  # (S, size)
    log_weight: Array  # (S,)
    mean: Array  # (S, size)
    covariance: Array  # (S, size, size)


@dataclass(frozen=True)
class _Models:
    """All subsets, given the variances of features and noise. With the weights of the rest integrated out,
    y = t @ coefficients + e, e ~ N(0, A)."""

    groups: list[_Subsets]
    log_evidence: float  # of the variances, times their prior
    variance: Array  # (p,) of the weights of the rest
    noise: float
    inverse: Array  # (m, m) A^-1


def _all_models(points: _Points, prior: SpikeAndSlab, signal: float, level: float) -> _Models:
    p = points.rest.shape[1]
    variance = np.concatenate([[INTERCEPT_VARIANCE], np.full(p - 1, signal / max(p - 1, 1))])
    factor = np.linalg.inv(np.linalg.cholesky((points.rest * variance) @ points.rest.T + np.diag(level * points.loud)))
    inverse = factor.T @ factor
    whitened, white = inverse @ points.t, factor @ points.y
    groups = _all_subsets(points.t.T @ whitened, whitened.T @ points.y, prior)
    log_weights = np.concatenate([group.log_weight for group in groups])
    top = float(log_weights.max())
    of_subsets = top + math.log(float(np.exp(log_weights - top).sum()))
    hyperprior = np.log(signal / SIGNAL) ** 2 + np.log(level / NOISE) ** 2
    log_evidence = of_subsets - 0.5 * float(white @ white + hyperprior) + float(np.log(np.diag(factor)).sum())
    return _Models(groups, log_evidence, variance, level, inverse)


def _posterior(points: _Points, models: _Models) -> Linear:
    """The average over the models, in the order of `Linear`: intercept, coefficients, weights of the features."""
    k = points.t.shape[1]
    top = max(group.log_weight.max() for group in models.groups)
    weights = [np.exp(group.log_weight - top) for group in models.groups]
    total = float(sum(weight.sum() for weight in weights))
    weights = [weight / total for weight in weights]
    mean, spread, included = _coefficients(models.groups, weights, k)
    # The rest is linear in the coefficients: less `moved` for each unit of one.
    whitened, alpha = models.inverse @ points.t, models.inverse @ points.y
    root = models.variance[:, None] * points.rest.T
    moved = root @ whitened
    cross = -spread @ moved.T
    own = np.diag(models.variance) - root @ models.inverse @ root.T + moved @ spread @ moved.T
    both = np.concatenate([mean, root @ alpha - moved @ mean])
    covariance = np.block([[spread, cross], [cross.T, own]])
    order = np.concatenate([[k], np.arange(k), np.arange(k + 1, len(both))])
    share, first, second = _left_out(models.groups, weights, np.diag(models.inverse), whitened, alpha, points.y)
    left_out = first / share
    return Linear(
        weights=both[order],
        covariance=covariance[np.ix_(order, order)],
        noise=models.noise,
        left_out=left_out,
        left_out_variance=second / share - left_out**2,
        included=included,
    )


def _all_subsets(gram: Array, projected: Array, prior: SpikeAndSlab) -> list[_Subsets]:
    """Every subset of k trends, by size. gram (k, k) is t' A^-1 t, projected (k,) t' A^-1 y."""
    groups = []
    for index in _indices(tuple(bool(doubt) for doubt in prior.included < 1)):
        size = index.shape[1]
        within = gram[index[:, :, None], index[:, None, :]]
        precision = within + np.eye(size) / prior.variance[index][:, None, :]
        covariance = np.asarray(np.linalg.inv(precision), dtype=np.float64)
        start = prior.mean[index]
        explained = np.einsum("sij,sj->si", within, start)
        left = projected[index] - explained
        change = np.einsum("sij,sj->si", covariance, left)
        evidence = (change * left + start * (2 * projected[index] - explained)).sum(axis=1)
        evidence -= np.linalg.slogdet(precision).logabsdet
        evidence -= np.log(prior.variance[index]).sum(axis=1)
        groups.append(_Subsets(index, 0.5 * evidence + prior.log_odds(index), start + change, covariance))
    return groups


@lru_cache(maxsize=8)
def _indices(in_doubt: tuple[bool, ...]) -> list[npt.NDArray[np.intp]]:
    """The subsets of k trends that hold all of those that are in no doubt, an array (S, size) for each size, as far as
    MODELS allows."""
    certain = [place for place, doubt in enumerate(in_doubt) if not doubt]
    doubtful = [place for place, doubt in enumerate(in_doubt) if doubt]
    found: list[npt.NDArray[np.intp]] = []
    for size in range(len(doubtful) + 1):
        if size > 1 and sum(map(len, found)) + math.comb(len(doubtful), size) > MODELS:
            break
        chosen = [certain + list(some) for some in combinations(doubtful, size)]
        found.append(np.array(chosen, dtype=np.intp).reshape(len(chosen), -1))
    return found


def _coefficients(groups: list[_Subsets], weights: list[Array], k: int) -> tuple[Array, Array, Array]:
    """Mean (k,) and covariance (k, k) of the trends' coefficients over all subsets, and probabilities (k,) that each
    is in; `weights` sum to 1."""
    mean, second, included = np.zeros(k), np.zeros((k, k)), np.zeros(k)
    for group, weight in zip(groups, weights, strict=True):
        squares = group.covariance + group.mean[:, :, None] * group.mean[:, None, :]
        np.add.at(mean, group.index, weight[:, None] * group.mean)
        np.add.at(second, (group.index[:, :, None], group.index[:, None, :]), weight[:, None, None] * squares)
        np.add.at(included, group.index, weight[:, None])
    return mean, second - np.outer(mean, mean), included


def _left_out(
    groups: list[_Subsets], weights: list[Array], precision: Array, whitened: Array, alpha: Array, y: Array
) -> Array:
    """Sums (3, m) over models for the prediction of each point from the others, noise included.

    In each model in closed form (Rasmussen and Williams 2006, section 5.4.2): `precision` (m,) is the diagonal of A^-1,
    `whitened` (m, k) A^-1 t, `alpha` (m,) A^-1 y. What a point has done for a model's weight is taken out too: without
    it the weight is in proportion to weight / p(point | others).
    """
    sums = np.zeros((3, len(y)))
    for group, weight in zip(groups, weights, strict=True):
        columns = whitened[:, group.index]
        explained = (np.einsum("msi,sij->msj", columns, group.covariance) * columns).sum(axis=2).T
        variance = 1.0 / (precision - explained)
        error = (alpha - np.einsum("msi,si->sm", columns, group.mean)) * variance
        without = weight[:, None] * np.sqrt(variance) * np.exp(0.5 * np.minimum(error**2 / variance, 1000.0))
        predicted = y - error
        sums += np.stack([without, without * predicted, without * (variance + predicted**2)]).sum(axis=1)
    return sums
