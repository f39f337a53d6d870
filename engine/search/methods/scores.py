"""A history as arrays: which candidates have been asked at which fidelity, and their scores."""

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

# Only this many candidates of highest upper bound are compared: conditioning on trials shrinks variances, so that the
# others cannot overtake them.
SHORTLIST = 512


@dataclass(frozen=True)
class Scores:
    """The evaluations of one fidelity.

    `rows` (k,) are the candidates with a score, in the order of their first one; `values` (k,) are their mean
    accuracies, each over `counts` (k,) evaluations. `asked` are all rows for which there is a trial, failed and pending
    ones included; `times_asked` is the number of trials of each. `pending` are the rows of pending trials. `seconds` is
    the mean cost of an evaluation (0: none yet), `trials` the number of trials.
    """

    rows: Rows
    values: Array
    counts: Array
    asked: Rows
    pending: Rows
    times_asked: dict[int, int]
    seconds: float
    trials: int

    def __len__(self) -> int:
        return len(self.rows)


class IdentityKey:
    """Candidates as the key of a cache: equal only to the same object, which the cache keeps alive."""

    def __init__(self, value: Candidates) -> None:
        self.value = value

    def __hash__(self) -> int:
        return id(self.value)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, IdentityKey) and other.value is self.value


def scores(candidates: Candidates, history: History, fidelity: Fidelity) -> Scores:
    """The evaluations of one fidelity. A failed one counts as asked and gives no score."""
    answered = [e for e in history.answered if e.trial.fidelity == fidelity]
    waiting = [t for t in history.pending if t.fidelity == fidelity]
    rows = find_rows(candidates, [e.trial.architecture for e in answered] + [t.architecture for t in waiting])
    accuracies: dict[int, list[float]] = {}
    for row, evaluation in zip(rows, answered, strict=False):
        if evaluation.ok and row >= 0:
            accuracies.setdefault(int(row), []).append(evaluation.accuracy)
    return Scores(
        rows=np.fromiter(accuracies, dtype=np.int64, count=len(accuracies)),
        values=np.array([float(np.mean(v)) for v in accuracies.values()]),
        counts=np.array([float(len(v)) for v in accuracies.values()]),
        asked=np.unique(rows[rows >= 0]),
        pending=rows[len(answered) :],
        times_asked=dict(Counter(rows.tolist())),
        seconds=float(np.mean([e.seconds for e in answered])) if answered else 0.0,
        trials=len(answered) + len(waiting),
    )


def find_rows(candidates: Candidates, architectures: Sequence[Architecture]) -> Rows:
    """The row of each architecture, -1 if it is not a candidate.

    Millions of candidates are compared by a hash of their choices, so that no dictionary of all of them is needed.
    """
    if not architectures:
        return np.zeros(0, dtype=np.int64)
    wanted = np.array([a.choices for a in architectures], dtype=np.int64)
    rng = np.random.default_rng(0)
    factors = np.array([rng.integers(1, 2**62) for _ in range(wanted.shape[1])], dtype=np.int64)
    keys = np.zeros(len(candidates), dtype=np.int64)
    for column in range(wanted.shape[1]):
        keys += candidates.choices[:, column].astype(np.int64) * factors[column]  # overflow wraps, as a hash may
    hashed = (wanted * factors).sum(axis=1)
    hits = np.flatnonzero(np.isin(keys, np.unique(hashed)))
    by_choices = {tuple(candidates.choices[row].tolist()): int(row) for row in hits}
    return np.array([by_choices.get(tuple(line.tolist()), -1) for line in wanted], dtype=np.int64)


def ask(
    candidates: Candidates, history: History, plan: Plan, rows: Iterable[int], fidelity: Fidelity, repeat: int = 0
) -> list[Trial]:
    """Trials of candidate rows, numbered from history.asked; `repeat` is added to the seed."""
    return [
        Trial(history.asked + i, candidates.architecture(int(row)), fidelity, plan.seed + repeat)
        for i, row in enumerate(rows)
    ]


def generator(history: History, plan: Plan) -> np.random.Generator:
    """The random numbers of one decision: the same for the same history."""
    return np.random.default_rng([plan.seed, history.asked, len(history.answered)])


def unasked(candidates: Candidates, asked: Rows) -> npt.NDArray[np.bool_]:
    """True (n,) for candidates that are not in `asked`."""
    free = np.ones(len(candidates), dtype=bool)
    free[asked] = False
    return free


def top(value: Array) -> Rows:
    """Rows of the SHORTLIST greatest finite values (n,), in descending order."""
    count = min(SHORTLIST, len(value))
    rows = np.argpartition(-value, count - 1)[:count]
    rows = rows[np.isfinite(value[rows])]
    return np.asarray(rows[np.lexsort((rows, -value[rows]))], dtype=np.int64)


def worker_count(plan: Plan, history: History, free: int) -> float:
    """The number of workers of the run, from its free slots and the pending trials; at least 1."""
    taken = sum(plan.cohort if trial.fidelity == plan.high else 1 for trial in history.pending)
    return max(1.0, (free + taken) / plan.cohort)
