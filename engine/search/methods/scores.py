"""What a history says, as arrays: which candidates were asked at which fidelity, and their scores."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from engine.config import Plan
from engine.space import Candidates
from engine.trial import Architecture, Fidelity, History, Trial

Array = npt.NDArray[np.float64]
Rows = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Scores:
    """Answers at one fidelity.

    `rows` (k,) are candidates in the order of their first score, `values` (k,) the means of their accuracies,
    `counts` (k,) of how many. `asked` are all rows put to a worker, failed and pending included, `times` how often
    each was, and `pending` those that wait for an answer. `seconds` is the mean cost of an answer (0: none yet),
    `trials` the number of questions.
    """

    rows: Rows
    values: Array
    counts: Array
    asked: Rows
    pending: Rows
    times: dict[int, int]
    seconds: float
    trials: int

    def __len__(self) -> int:
        return len(self.rows)


class IdentityKey:
    """An object as a key of a cache: equal to itself only, and kept alive by the cache."""

    def __init__(self, value: Candidates) -> None:
        self.value = value

    def __hash__(self) -> int:
        return id(self.value)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, IdentityKey) and other.value is self.value


def scores(candidates: Candidates, history: History, fidelity: Fidelity) -> Scores:
    """The answers of one fidelity. A failed evaluation counts as asked and gives no score."""
    answered = [e for e in history.answered if e.trial.fidelity == fidelity]
    waiting = [t for t in history.pending if t.fidelity == fidelity]
    places = find_rows(candidates, [e.trial.architecture for e in answered] + [t.architecture for t in waiting])
    sums: dict[int, list[float]] = {}
    for row, evaluation in zip(places, answered, strict=False):
        if evaluation.ok and row >= 0:
            sums.setdefault(int(row), []).append(evaluation.accuracy)
    return Scores(
        rows=np.fromiter(sums, dtype=np.int64, count=len(sums)),
        values=np.array([float(np.mean(v)) for v in sums.values()]),
        counts=np.array([float(len(v)) for v in sums.values()]),
        asked=np.unique(places[places >= 0]),
        pending=places[len(answered) :],
        times=dict(Counter(places.tolist())),
        seconds=float(np.mean([e.seconds for e in answered])) if answered else 0.0,
        trials=len(answered) + len(waiting),
    )


def find_rows(candidates: Candidates, architectures: Sequence[Architecture]) -> Rows:
    """Row of each architecture, -1 where it is not a candidate; no table of the whole space is kept."""
    if not architectures:
        return np.zeros(0, dtype=np.int64)
    wanted = np.array([a.choices for a in architectures], dtype=np.int64)
    generator = np.random.default_rng(0)
    factors = np.array([generator.integers(1, 2**62) for _ in range(wanted.shape[1])], dtype=np.int64)
    keys = np.zeros(len(candidates), dtype=np.int64)
    for column in range(wanted.shape[1]):
        keys += candidates.choices[:, column].astype(np.int64) * factors[column]  # wraps: a hash
    hashed = (wanted * factors).sum(axis=1)
    unique = np.unique(hashed)
    hits = np.flatnonzero(np.isin(keys, unique))
    by_choices = {tuple(candidates.choices[row].tolist()): int(row) for row in hits}
    return np.array([by_choices.get(tuple(line.tolist()), -1) for line in wanted], dtype=np.int64)


def ask(
    candidates: Candidates, history: History, plan: Plan, rows: Iterable[int], fidelity: Fidelity, repeat: int = 0
) -> list[Trial]:
    """Trials for rows, numbered on from what the history has asked."""
    return [
        Trial(history.asked + i, candidates.architecture(int(row)), fidelity, plan.seed + repeat)
        for i, row in enumerate(rows)
    ]


def generator(history: History, plan: Plan) -> np.random.Generator:
    """Random numbers of this decision: the same for the same history."""
    return np.random.default_rng([plan.seed, history.asked, len(history.answered)])


def unasked(candidates: Candidates, asked: Rows) -> npt.NDArray[np.bool_]:
    """True (n,) for candidates not in `asked`."""
    free = np.ones(len(candidates), dtype=bool)
    free[asked] = False
    return free


def worker_count(plan: Plan, history: History, free: int) -> float:
    """How many workers the run has, from its free slots and what is under way; at least 1."""
    taken = sum(plan.cohort if trial.fidelity == plan.high else 1 for trial in history.pending)
    return max(1.0, (free + taken) / plan.cohort)
