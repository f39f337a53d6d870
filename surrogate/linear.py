"""The linear part of the surrogate: Bayesian regression with a prior on trends; evidence chooses the variances."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float64]
Matrix = npt.NDArray[np.float32] | Array

# For a target of variance 1: the grids of the variance that all features explain together and of the noise variance,
# and the medians of their own priors (log-normal, a standard deviation of one e-fold).
SIGNALS = (0.03, 0.1, 0.3, 1.0, 3.0)
NOISES = (0.02, 0.05, 0.15, 0.3, 0.6, 1.0)
SIGNAL, NOISE = 0.3, 0.2
INTERCEPT_VARIANCE = 0.1


@dataclass(frozen=True)
class Prior:
    """What the coefficients of k trends are thought to be: normal, with means (k,) and variances (k,)."""

    mean: Array
    variance: Array

    def fit(self, trend: Matrix, x: Matrix, y: Array, noise: Array | None = None) -> Linear:
        """The posterior, as `fit_linear` gives it."""
        return fit_linear(trend, x, y, self, noise)


@dataclass(frozen=True)
class Linear:
    """The posterior of y = intercept + trend @ coefficients + x @ weights + noise.

    `weights` (1 + k + d,) and `covariance` (1 + k + d, 1 + k + d) are those of intercept, coefficients and weights
    together; `noise` is a variance. `left_out` (n,) are the predictions of the fitted points, each from all others, and
    `left_out_variance` (n,) their variances, noise included. `included` (k,) are the probabilities that the trends'
    coefficients are not 0.
    """

    weights: Array
    covariance: Array
    noise: float
    left_out: Array
    left_out_variance: Array
    included: Array

    @property
    def coefficients(self) -> tuple[Array, Array]:
        """Mean and standard deviation (k,) of the trends' coefficients."""
        trends = slice(1, 1 + len(self.included))
        return self.weights[trends], np.sqrt(np.diag(self.covariance)[trends])

    def predict(self, trend: Matrix, x: Matrix) -> tuple[Array, Array]:
        """Mean and variance (n,) of the noiseless target at trend (n, k) and x (n, d)."""
        design = _design(trend, x)
        return design @ self.weights, np.einsum("ij,ij->i", design @ self.covariance, design)

    def joint(self, trend: Matrix, x: Matrix) -> Array:
        """Covariance (n, n) of the noiseless target at the points of trend (n, k) and x (n, d)."""
        design = _design(trend, x)
        return np.asarray(design @ self.covariance @ design.T)

    def without_data(self, prior: Prior) -> Linear:
        """The prior mean in place of the fitted weights: the trends alone, without features."""
        weights = np.zeros_like(self.weights)
        weights[1 : 1 + len(prior.mean)] = prior.mean
        return replace(self, weights=weights)


def fit_linear(trend: Matrix, x: Matrix, y: Array, prior: Prior, noise: Array | None = None) -> Linear:
    """Fits y (n,), of about unit variance, on trend (n, k) and standardised features x (n, d); n may be 0.

    The variances of weights and noise maximise the evidence times their own prior over a grid (MacKay 1992).
    `noise` (n,) multiplies the noise variance of each point: 1 / r for the mean of r repeats. Left-out predictions have
    a closed form (Rasmussen and Williams 2006, section 5.4.2).
    """
    n, k, d = len(y), trend.shape[1], max(x.shape[1], 1)
    design = _design(trend, x)
    centre = np.concatenate([[0.0], prior.mean, np.zeros(x.shape[1])])
    target = y - design @ centre
    factors = np.ones(n) if noise is None else noise
    fixed = np.concatenate([[INTERCEPT_VARIANCE], prior.variance])
    trends = (design[:, : 1 + k] * fixed) @ design[:, : 1 + k].T
    features = design[:, 1 + k :] @ design[:, 1 + k :].T / d

    def cholesky(signal: float, level: float) -> Array:
        return np.linalg.cholesky(trends + signal * features + np.diag(level * factors))

    def log_evidence(signal: float, level: float) -> float:
        lower = cholesky(signal, level)
        white = np.linalg.solve(lower, target)
        hyperprior = np.log(signal / SIGNAL) ** 2 + np.log(level / NOISE) ** 2
        return -0.5 * float(white @ white + hyperprior) - float(np.log(np.diag(lower)).sum())

    signal, level = max(((s, v) for s in SIGNALS for v in NOISES), key=lambda pair: log_evidence(*pair))
    variance = np.concatenate([fixed, np.full(x.shape[1], signal / d)])
    inverse = np.linalg.inv(cholesky(signal, level))
    root = inverse @ (design * variance)
    precision = inverse.T @ inverse
    alpha = precision @ target
    left_out_variance = 1.0 / np.diag(precision)
    return Linear(
        weights=centre + variance * (design.T @ alpha),
        covariance=np.diag(variance) - root.T @ root,
        noise=level,
        left_out=y - alpha * left_out_variance,
        left_out_variance=left_out_variance,
        included=np.ones(k),
    )


def _design(trend: Matrix, x: Matrix) -> Array:
    """Columns of ones, trends and features: (n, 1 + k + d)."""
    return np.concatenate([np.ones((len(x), 1)), trend, x], axis=1, dtype=np.float64)
