"""How well low fidelities rank what the full one ranks, beyond MACs, and by how much one is better than another."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from engine.trial import Architecture, Fidelity
from surrogate.quality import (
    expected_maximum,
    kendall_tau,
    kendall_taus,
    partial_tau,
    partial_taus,
    spearman,
    spearmans,
)

Array = npt.NDArray[np.float64]
Rows = npt.NDArray[np.int64]

DRAWS = 1000  # of the bootstrap
ROUGHLY = 200  # draws where a decision is made again and again
LEVEL = 0.95  # of its intervals
# Before a fidelity is dropped: architectures in common with a better one, and standard errors between the two.
ENOUGH, CLEARLY = 8, 2.5
# What a search may spend on looks, in full trainings: with it a fidelity's price is weighed against its tau.
LOOKS_COST = 2.0


@dataclass(frozen=True)
class StudyScores:
    """What was measured of `architectures` with `macs` (n,): `scores[fidelity][i]` holds an accuracy per seed, perhaps
    none; `seconds[fidelity][i]` is the mean cost of one. All of them have been trained at `high`, the full fidelity."""

    architectures: list[Architecture]
    macs: Array
    high: Fidelity
    scores: dict[Fidelity, list[list[float]]]
    seconds: dict[Fidelity, list[float]]

    @property
    def lows(self) -> list[Fidelity]:
        return [fidelity for fidelity in self.scores if fidelity != self.high]

    def having(self, fidelity: Fidelity) -> Rows:
        """Places of the architectures that have a score at a fidelity."""
        return np.array([i for i, scores in enumerate(self.scores[fidelity]) if scores], dtype=np.int64)

    def means(self, fidelity: Fidelity, kept: Rows) -> Array:
        """Mean scores (k,) over the seeds, of the architectures at the places `kept` (k,)."""
        return np.array([float(np.mean(self.scores[fidelity][i])) for i in kept])

    def price(self, fidelity: Fidelity) -> float:
        """Cost of an evaluation in full trainings of the same architectures; 0 where there is none."""
        kept = self.having(fidelity)
        low, high = (sum(self.seconds[f][i] for i in kept) for f in (fidelity, self.high))
        return low / high if high > 0 else 0.0


@dataclass(frozen=True)
class Statistic:
    """A number with the standard deviation and the central interval of its bootstrap."""

    value: float
    stderr: float
    low: float
    high: float


@dataclass(frozen=True)
class Ranking:
    """What a low fidelity is worth over its `n` architectures. `top` is tau among the best fifth by full accuracy,
    `top_n` of them (None under three); `accuracy` is the mean score, `price` its cost in full trainings."""

    fidelity: Fidelity
    n: int
    accuracy: float
    tau: Statistic
    spearman: Statistic
    given_macs: Statistic
    top: float | None
    top_n: int
    seconds: float
    price: float

    @property
    def per_tau(self) -> float | None:
        """Full trainings paid per unit of tau; None where there is no tau to pay for."""
        return self.price / self.tau.value if self.tau.value > 0 else None

    @property
    def worth(self) -> float:
        """Expected full accuracy of the best of the looks that LOOKS_COST buys, in standard deviations of what MACs
        leave unknown: the correlation beyond MACs times the expected greatest of so many normals."""
        correlation = np.sin(np.pi / 2 * max(0.0, self.given_macs.value))  # of normals with that tau
        return float(correlation * expected_maximum(LOOKS_COST / max(self.price, 1e-6)))


@dataclass(frozen=True)
class Difference:
    """By how much tau given MACs of one fidelity exceeds that of another, over the architectures that both have."""

    better: Fidelity
    than: Fidelity
    n: int
    value: float
    stderr: float


def rank(measured: StudyScores, fidelity: Fidelity) -> Ranking | None:
    """The ranking of a low fidelity, None where fewer than three architectures have its score."""
    kept = measured.having(fidelity)
    if len(kept) < 3:
        return None
    full, low, macs = measured.means(measured.high, kept), measured.means(fidelity, kept), measured.macs[kept]
    drawn_full, drawn_low, drawn_macs = _redraw(measured, kept, [fidelity])
    best = np.argsort(-full, kind="stable")[: -(-len(kept) // 5)]
    return Ranking(
        fidelity,
        len(kept),
        float(low.mean()),
        _statistic(kendall_tau(low, full), kendall_taus(drawn_low, drawn_full)),
        _statistic(spearman(low, full), spearmans(drawn_low, drawn_full)),
        _statistic(partial_tau(low, full, macs), partial_taus(drawn_low, drawn_full, drawn_macs)),
        kendall_tau(low[best], full[best]) if len(best) >= 3 else None,
        len(best),
        float(np.mean([measured.seconds[fidelity][i] for i in kept])),
        measured.price(fidelity),
    )


def difference(measured: StudyScores, one: Fidelity, other: Fidelity, draws: int = DRAWS) -> Difference | None:
    """Tau given MACs of `one` less that of `other`; both are redrawn together, seeds too where there are several.

    None where fewer than three architectures have both scores.
    """
    kept = np.intersect1d(measured.having(one), measured.having(other))
    if len(kept) < 3:
        return None
    full, macs = measured.means(measured.high, kept), measured.macs[kept]
    value = partial_tau(measured.means(one, kept), full, macs) - partial_tau(measured.means(other, kept), full, macs)
    drawn_full, drawn_one, drawn_other, drawn_macs = _redraw(measured, kept, [one, other], draws)
    gaps = partial_taus(drawn_one, drawn_full, drawn_macs) - partial_taus(drawn_other, drawn_full, drawn_macs)
    return Difference(one, other, len(kept), value, float(gaps.std()))


def macs_alone(measured: StudyScores) -> Statistic:
    """Tau of MACs, without any training, with full accuracy."""
    kept = measured.having(measured.high)
    drawn_full, drawn_macs = _redraw(measured, kept, [])
    full = measured.means(measured.high, kept)
    return _statistic(kendall_tau(measured.macs, full), kendall_taus(drawn_macs, drawn_full))


def repeatability(measured: StudyScores) -> float | None:
    """Mean tau between two full trainings of the same architectures with different seeds; None without repeats. The
    mean over several seeds, which is the truth of a study, can be ranked better than that."""
    full = [scores for scores in measured.scores[measured.high] if len(scores) > 1]  # some may have failed
    if len(full) < 3:
        return None
    times = min(map(len, full))
    seeds = np.array([scores[:times] for scores in full]).T
    return float(np.mean([kendall_tau(a, b) for a, b in itertools.combinations(seeds, 2)]))


def clearly_worse(measured: StudyScores) -> set[Fidelity]:
    """The low fidelities that another one, no dearer, outranks by more than CLEARLY standard errors."""
    worse: set[Fidelity] = set()
    for one, other in itertools.permutations(measured.lows, 2):
        if min(len(measured.having(one)), len(measured.having(other))) < ENOUGH:
            continue
        if measured.price(other) <= measured.price(one) * (1 + 1e-9):
            found = difference(measured, other, one, ROUGHLY)
            if found is not None and found.n >= ENOUGH and found.value > CLEARLY * found.stderr > 0:
                worse.add(one)
    return worse


def _redraw(measured: StudyScores, kept: Rows, lows: Sequence[Fidelity], draws: int = DRAWS) -> list[Array]:
    """Bootstrap samples (draws, k) of full scores, of each low fidelity's, and of MACs: architectures with
    replacement, and for each its seeds with replacement."""
    rng = np.random.default_rng(len(kept))  # the same for the same architectures: comparisons are paired
    picks = kept[rng.integers(len(kept), size=(draws, len(kept)))]
    drawn = [_redraw_seeds(measured.scores[fidelity], picks, rng) for fidelity in (measured.high, *lows)]
    return [*drawn, measured.macs[picks]]


def _redraw_seeds(scores: Sequence[Sequence[float]], picks: Rows, rng: np.random.Generator) -> Array:
    """Means (draws, k) of redrawn seeds, of the architectures at the places `picks` (draws, k)."""
    counts = np.array([len(values) for values in scores])
    padded = np.zeros((len(scores), counts.max()))
    for row, values in zip(padded, scores, strict=True):
        row[: len(values)] = values
    times = counts[picks]
    total = np.zeros(picks.shape)
    for turn in range(counts.max()):
        which = (rng.random(picks.shape) * times).astype(np.int64)
        total += np.where(turn < times, padded[picks, which], 0.0)
    return np.asarray(total / times)


def _statistic(value: float, draws: Array) -> Statistic:
    low, high = np.quantile(draws, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return Statistic(value, float(np.std(draws)), float(low), float(high))
