"""The hypervolume of what a replay has found: how accurate a network it has for each budget, averaged over budgets."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import numpy as np
import numpy.typing as npt

from engine.search.replay.tables import FULL, Table
from engine.trial import Evaluation

Array = npt.NDArray[np.float64]
# How far a network is known: whether by a full training, and its accuracy. A full training counts more than any other.
Known = tuple[bool, float]


def hypervolume(cost: Array, test: Array, known: Mapping[int, Known]) -> float:
    """The test accuracy (percent) of the best known network within a budget, averaged over all budgets.

    `cost`, `test` (n,) are those of all rows of a table, and budgets lie between the least and the greatest cost, all
    equally likely. The best is chosen by what is `known` of the rows, and while there is none within a budget, the
    worst row of the table counts. In terms of Zitzler and Thiele (1999): the area that the front dominates, with the
    cost axis linear from 0 to 1 and the worst test accuracy at the greatest cost as the reference, which is then added.
    """
    least, most = float(cost.min()), float(cost.max())
    level, best, area, start = float(np.nanmin(test)), (False, -1.0), 0.0, least
    for row in sorted(known, key=lambda row: (cost[row], [-value for value in known[row]])):
        if known[row] > best:
            area += level * (float(cost[row]) - start)
            level, best, start = float(test[row]), known[row], float(cost[row])
    return 100 * (area + level * (most - start)) / (most - least) if most > least else 100 * level


def best_hypervolume(table: Table, cost: Array) -> float:
    """The hypervolume of one who knows the test accuracy of every row."""
    known = {int(row): (True, float(table.test[row])) for row in np.flatnonzero(table.test >= 0)}
    return hypervolume(cost, table.test, known)


def hypervolumes(
    table: Table, cost: Array, low: str, answers: Iterable[tuple[float, int, Evaluation]]
) -> list[tuple[float, float]]:
    """(hours, hypervolume) at each change, from the evaluations of rows in order: (hours, row, evaluation).

    A row is known by its best full validation accuracy, or else by its score at the main low fidelity, unless its full
    training has failed.
    """
    known: dict[int, Known] = {}
    curve = [(0.0, hypervolume(cost, table.test, known))]
    for when, row, e in answers:
        full = e.trial.fidelity.name == FULL
        if not e.ok or not (full or e.trial.fidelity.name == low) or not table.test[row] >= 0:  # nan: it failed in full
            continue
        score = (full, e.accuracy)
        if score > known.get(row, (False, -1.0)):
            known[row] = score
            curve.append((when, hypervolume(cost, table.test, known)))
    return curve
