"""A linear model whose trends earn their weights: averaged over which trends matter, by marginal likelihood.

Low fidelities, training-free scores, costs: a run has many trends, and which of them rank its space, with which sign,
is not known before. Here each has a spike at 0 and a slab around it (George and McCulloch 1993), symmetric, so that a
column and its negative are the same; the average over the models of all subsets (Hoeting et al. 1999, Bayesian model
averaging) is exact up to a grid of scales.
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
# (docs/evidence/learned-weights.md).
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
        features share one variance, as in `fit_linear`, whose grid and prior of scales are used. `noise` (m,)
        multiplies the noise variance point by point: 1 / r for a mean of r repeats.
        """
        t = np.asarray(trend, dtype=np.float64)
        rest = np.concatenate([np.ones((len(y), 1)), x], axis=1, dtype=np.float64)
        loud = np.ones(len(y)) if noise is None else noise
        given = [_given_scales(t, rest, y, loud, self, scales) for scales in product(SIGNALS, NOISES)]
        return _averaged(given, t.shape[1])

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
class _Given:
    """All subsets together, given the two scales. k trends, p = 1 + d weights of the rest, m points."""

    log_evidence: float  # times the prior of the scales
    mean: Array  # (k + p,)
    covariance: Array  # (k + p, k + p)
    included: Array  # (k,)
    noise: float
    left_out: Array  # (3, m) sums of weight, weight * prediction, weight * its second moment; see `_left_out`


@dataclass(frozen=True)
class _Subsets:
    """The models of the S subsets of one size: places of their trends, log of evidence and prior, and the posterior of
    their coefficients."""

    index: npt.NDArray[np.intp]  # (S, size)
    log_weight: Array  # (S,)
    mean: Array  # (S, size)
    covariance: Array  # (S, size, size)


def _given_scales(
    t: Array, rest: Array, y: Array, loud: Array, prior: SpikeAndSlab, scales: tuple[float, float]
) -> _Given:
    """With the weights of the rest integrated out, y = t @ coefficients + e, e ~ N(0, A)."""
    k, p, (signal, level) = t.shape[1], rest.shape[1], scales
    variance = np.concatenate([[INTERCEPT_VARIANCE], np.full(p - 1, signal / max(p - 1, 1))])
    factor = np.linalg.inv(np.linalg.cholesky((rest * variance) @ rest.T + np.diag(level * loud)))
    inverse = factor.T @ factor
    whitened, alpha, root = inverse @ t, inverse @ y, variance[:, None] * rest.T
    groups = _all_subsets(t.T @ whitened, whitened.T @ y, prior)
    top = max(group.log_weight.max() for group in groups)
    weights = [np.exp(group.log_weight - top) for group in groups]
    total = float(sum(weight.sum() for weight in weights))
    weights = [weight / total for weight in weights]
    mean, spread, included = _coefficients(groups, weights, k)
    # The rest is linear in the coefficients: less `moved` for each unit of one.
    moved = root @ whitened
    cross = -spread @ moved.T
    own = np.diag(variance) - root @ inverse @ root.T + moved @ spread @ moved.T
    believed = np.log(signal / SIGNAL) ** 2 + np.log(level / NOISE) ** 2
    return _Given(
        log_evidence=top + math.log(total) - 0.5 * float(y @ alpha + believed) + float(np.log(np.diag(factor)).sum()),
        mean=np.concatenate([mean, root @ alpha - moved @ mean]),
        covariance=np.block([[spread, cross], [cross.T, own]]),
        included=included,
        noise=level,
        left_out=_left_out(groups, weights, np.diag(inverse), whitened, alpha, y),
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


def _averaged(given: list[_Given], k: int) -> Linear:
    """Mean and covariance over the scales (law of total covariance), in the order of `Linear`."""
    evidence = np.array([one.log_evidence for one in given])
    share = np.exp(evidence - evidence.max())
    share /= share.sum()
    means = np.stack([one.mean for one in given])
    mean = share @ means
    apart = means - mean
    covariance = np.einsum("s,sij->ij", share, np.stack([one.covariance for one in given]))
    covariance += (share[:, None] * apart).T @ apart
    total, first, second = np.einsum("s,sij->ij", share, np.stack([one.left_out for one in given]))
    left_out = first / total
    # Intercept, coefficients, feature weights: the intercept is the first of the rest.
    order = np.concatenate([[k], np.arange(k), np.arange(k + 1, len(mean))])
    noise = float(share @ [one.noise for one in given])
    included = share @ np.stack([one.included for one in given])
    variance = second / total - left_out**2
    return Linear(mean[order], covariance[np.ix_(order, order)], noise, left_out, variance, included)
