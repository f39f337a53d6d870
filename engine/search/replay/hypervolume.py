"""The hypervolume of what a replay has found: how accurate a network it has for each budget, averaged over budgets."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import numpy as np
import numpy.typing as npt

from engine.search.replay.tables import FULL, Table
from engine.trial import Evaluation

Array = npt.NDArray[np.float64]


def hypervolume(cost: Array, test: Array, known: Mapping[int, float]) -> float:
    """The test accuracy (percent) of the best known network within a budget, averaged over all budgets.

    `cost`, `test` (n,) are those of all rows of a table, and budgets lie between the least and the greatest cost, all
    equally likely. The best is chosen by the accuracy that is `known` of the rows, and while there is none within a
    budget, the worst row of the table counts. In the terms of Zitzler and Thiele (1999) this is the area that the front
    dominates, with a linear cost axis from 0 to 1 and an accuracy of 0 at the greatest cost as the reference point.
    """
    least, most = float(cost.min()), float(cost.max())
    level, best, area, start = float(np.nanmin(test)), -1.0, 0.0, least
    for row in sorted(known, key=lambda row: (cost[row], -known[row])):
        if known[row] > best:
            area += level * (float(cost[row]) - start)
            level, best, start = float(test[row]), known[row], float(cost[row])
    return 100 * (area + level * (most - start)) / (most - least) if most > least else 100 * level


def best_hypervolume(table: Table, cost: Array) -> float:
    """The hypervolume of one who knows the test accuracy of every row."""
    return hypervolume(cost, table.test, {int(row): float(table.test[row]) for row in np.flatnonzero(table.test >= 0)})


def hypervolumes(
    table: Table, cost: Array, low: str, answers: Iterable[tuple[float, int, Evaluation]]
) -> list[tuple[float, float]]:
    """(hours, hypervolume) at each change, from the evaluations of rows in order: (hours, row, evaluation).

    What is known of a row is its best full validation accuracy. Until there is one it is its score at the main low
    fidelity, a shorter training, unless its full training has failed.
    """
    known: dict[int, tuple[bool, float]] = {}  # whether in full, and the accuracy
    curve = [(0.0, hypervolume(cost, table.test, {}))]
    for when, row, e in answers:
        full = e.trial.fidelity.name == FULL
        if not e.ok or not (full or e.trial.fidelity.name == low) or not table.test[row] >= 0:  # nan: it failed in full
            continue
        if (full, e.accuracy) > known.get(row, (False, -1.0)):
            known[row] = (full, e.accuracy)
            accuracies = {one: accuracy for one, (_, accuracy) in known.items()}
            curve.append((when, hypervolume(cost, table.test, accuracies)))
    return curve
