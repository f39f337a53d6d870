"""How well low fidelities rank architectures, beyond MACs, and by how much one is better than another."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

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

DRAWS = 1000  # bootstrap samples
FEW_DRAWS = 200  # bootstrap samples of a decision that is made again after every evaluation
LEVEL = 0.95  # of bootstrap intervals
# A fidelity is dropped only with this many architectures in common with a better one, and this many standard errors
# between the two.
ENOUGH, CLEARLY = 8, 2.5
# Full trainings' worth of low-fidelity trials in a search, for which a fidelity's cost is weighed against its tau.
LOW_BUDGET = 2.0


@dataclass(frozen=True)
class StudyScores:
    """What a study has measured: n architectures with `macs` (n,), all of them trained at the full fidelity `high`.

    `accuracies[fidelity][i]` holds one accuracy per seed, possibly none; `seconds[fidelity][i]` is their mean cost.
    `other_readouts` holds the same for what else the trainings were read by (READOUTS), greater is better.
    """

    architectures: list[Architecture]
    macs: Array
    high: Fidelity
    accuracies: dict[Fidelity, list[list[float]]]
    seconds: dict[Fidelity, list[float]]
    other_readouts: dict[str, dict[Fidelity, list[list[float]]]] = field(default_factory=dict)

    def read_by(self, readout: str) -> StudyScores:
        """The same study with another readout of the low fidelities in the place of their accuracy."""
        return replace(self, accuracies={**self.other_readouts[readout], self.high: self.accuracies[self.high]})

    @property
    def lows(self) -> list[Fidelity]:
        return [fidelity for fidelity in self.accuracies if fidelity != self.high]

    def scored(self, fidelity: Fidelity) -> Rows:
        """Indices of the architectures with a score at a fidelity."""
        return np.array([i for i, seeds in enumerate(self.accuracies[fidelity]) if seeds], dtype=np.int64)

    def means(self, fidelity: Fidelity, kept: Rows) -> Array:
        """Mean accuracies (k,), over the seeds, of the architectures at the indices `kept` (k,)."""
        return np.array([float(np.mean(self.accuracies[fidelity][i])) for i in kept])

    def relative_cost(self, fidelity: Fidelity) -> float:
        """Cost of an evaluation relative to a full training of the same architectures; 0 if there is none."""
        kept = self.scored(fidelity)
        low, high = (sum(self.seconds[f][i] for i in kept) for f in (fidelity, self.high))
        return low / high if high > 0 else 0.0


@dataclass(frozen=True)
class Statistic:
    """A statistic with the standard deviation and the central interval of its bootstrap distribution."""

    value: float
    stderr: float
    low: float
    high: float


@dataclass(frozen=True)
class Ranking:
    """How well a low fidelity ranks the `n` architectures with a score.

    `accuracy` is the mean score. `given_macs` is partial tau with MACs held fixed. `top` is tau among the best fifth by
    full accuracy, `top_n` architectures (None for fewer than three). `seconds` is the cost of an evaluation,
    `relative_cost` the same relative to a full training.
    """

    fidelity: Fidelity
    n: int
    accuracy: float
    tau: Statistic
    spearman: Statistic
    given_macs: Statistic
    top: float | None
    top_n: int
    seconds: float
    relative_cost: float

    @property
    def cost_per_tau(self) -> float | None:
        """Relative cost per unit of tau; None if tau is not positive."""
        return self.relative_cost / self.tau.value if self.tau.value > 0 else None

    @property
    def expected_gain(self) -> float:
        """Expected full accuracy of the best of the low-fidelity trials that LOW_BUDGET buys.

        It is in standard deviations of what MACs do not explain: the correlation beyond MACs times the expected maximum
        of as many normals.
        """
        correlation = np.sin(np.pi / 2 * max(0.0, self.given_macs.value))  # of bivariate normals with that tau
        return float(correlation * expected_maximum(LOW_BUDGET / max(self.relative_cost, 1e-6)))


@dataclass(frozen=True)
class Difference:
    """By how much tau given MACs of one fidelity exceeds that of another, over the architectures with both scores."""

    better: Fidelity
    than: Fidelity
    n: int
    value: float
    stderr: float


def rank(scores: StudyScores, fidelity: Fidelity) -> Ranking | None:
    """The ranking of a low fidelity; None if fewer than three architectures have its score."""
    kept = scores.scored(fidelity)
    if len(kept) < 3:
        return None
    full, low, macs = scores.means(scores.high, kept), scores.means(fidelity, kept), scores.macs[kept]
    drawn_full, drawn_low, drawn_macs = _redraw(scores, kept, [fidelity])
    best = np.argsort(-full, kind="stable")[: -(-len(kept) // 5)]
    return Ranking(
        fidelity,
        n=len(kept),
        accuracy=float(low.mean()),
        tau=_statistic(kendall_tau(low, full), kendall_taus(drawn_low, drawn_full)),
        spearman=_statistic(spearman(low, full), spearmans(drawn_low, drawn_full)),
        given_macs=_statistic(partial_tau(low, full, macs), partial_taus(drawn_low, drawn_full, drawn_macs)),
        top=kendall_tau(low[best], full[best]) if len(best) >= 3 else None,
        top_n=len(best),
        seconds=float(np.mean([scores.seconds[fidelity][i] for i in kept])),
        relative_cost=scores.relative_cost(fidelity),
    )


def difference(scores: StudyScores, one: Fidelity, other: Fidelity, draws: int = DRAWS) -> Difference | None:
    """Tau given MACs of `one` minus that of `other`, with a paired bootstrap over architectures and their seeds.

    None if fewer than three architectures have both scores.
    """
    kept = np.intersect1d(scores.scored(one), scores.scored(other))
    if len(kept) < 3:
        return None
    full, macs = scores.means(scores.high, kept), scores.macs[kept]
    value = partial_tau(scores.means(one, kept), full, macs) - partial_tau(scores.means(other, kept), full, macs)
    drawn_full, drawn_one, drawn_other, drawn_macs = _redraw(scores, kept, [one, other], draws)
    gaps = partial_taus(drawn_one, drawn_full, drawn_macs) - partial_taus(drawn_other, drawn_full, drawn_macs)
    return Difference(one, other, len(kept), value, float(gaps.std()))


def macs_alone(scores: StudyScores) -> Statistic:
    """Tau of MACs with full accuracy: what is known without any training."""
    kept = scores.scored(scores.high)
    drawn_full, drawn_macs = _redraw(scores, kept, [])
    full = scores.means(scores.high, kept)
    return _statistic(kendall_tau(scores.macs, full), kendall_taus(drawn_macs, drawn_full))


def repeatability(scores: StudyScores) -> float | None:
    """Mean tau between two full trainings of the same architectures with different seeds; None without repeats.

    A low fidelity can exceed it, since a study ranks against the mean over the seeds.
    """
    full = [seeds for seeds in scores.accuracies[scores.high] if len(seeds) > 1]  # some trainings may have failed
    if len(full) < 3:
        return None
    times = min(map(len, full))
    by_seed = np.array([seeds[:times] for seeds in full]).T
    return float(np.mean([kendall_tau(a, b) for a, b in itertools.combinations(by_seed, 2)]))


def clearly_worse(scores: StudyScores) -> set[Fidelity]:
    """The low fidelities that another one, which costs no more, outranks by more than CLEARLY standard errors."""
    worse: set[Fidelity] = set()
    for one, other in itertools.permutations(scores.lows, 2):
        if min(len(scores.scored(one)), len(scores.scored(other))) < ENOUGH:
            continue
        if scores.relative_cost(other) <= scores.relative_cost(one) * (1 + 1e-9):
            found = difference(scores, other, one, FEW_DRAWS)
            if found is not None and found.n >= ENOUGH and found.value > CLEARLY * found.stderr > 0:
                worse.add(one)
    return worse


def _redraw(scores: StudyScores, kept: Rows, lows: Sequence[Fidelity], draws: int = DRAWS) -> list[Array]:
    """Bootstrap samples (draws, k) of full scores, of each low fidelity's scores, and of MACs.

    Architectures are drawn with replacement, and then the seeds of each.
    """
    rng = np.random.default_rng(len(kept))  # the same for the same architectures, so comparisons are paired
    picks = kept[rng.integers(len(kept), size=(draws, len(kept)))]
    drawn = [_redraw_seeds(scores.accuracies[fidelity], picks, rng) for fidelity in (scores.high, *lows)]
    return [*drawn, scores.macs[picks]]


def _redraw_seeds(accuracies: Sequence[Sequence[float]], picks: Rows, rng: np.random.Generator) -> Array:
    """Means (draws, k) over redrawn seeds, of the architectures at the indices `picks` (draws, k)."""
    counts = np.array([len(values) for values in accuracies])
    padded = np.zeros((len(accuracies), counts.max()))
    for row, values in zip(padded, accuracies, strict=True):
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
