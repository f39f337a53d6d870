"""A whole comparison: methods on a table under several caps on a cost, and their regrets."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from engine.config import FRONT_METHODS
from engine.search.methods.propose import BASELINES, METHODS, is_installed, lacks
from engine.search.replay.replay import run_all
from engine.search.replay.simulate import Replay, SimulatedRun, load_table, validated_replay
from engine.search.replay.summary import mean_and_error, optimum, summarise, write_summary
from engine.search.replay.tables import FULL, Table
from engine.trial import UsageError

Array = npt.NDArray[np.float64]
# The costs at which regret is measured: worker-hours, in full trainings of mean cost.
TRAININGS = (9, 12, 16, 24, 32, 48)
WITHOUT_CAP = 1.0
ONLY_FOR_FRONTS = ("nsga2",)


def compare(settings: Replay, caps: Sequence[float], cost: str = "macs") -> dict[str, Any]:
    """Replays every method under every cap; returns the JSON object of `replay --caps` (docs/search.md).

    A cap is the share of the table's architectures that it leaves, those of the least `cost`. Regret is by how many
    points of test accuracy the incumbent is below the best architecture under the cap, or in a search for a front the
    hypervolume below the greatest one; hours and checkpoints of the settings give way to TRAININGS. Writes `regret.csv`
    to settings.out, and a folder for each cap with the files of its replay. Raises UsageError for a cap outside 0..1
    and for what `replay` refuses.
    """
    if not all(0 < cap <= WITHOUT_CAP for cap in caps):
        raise UsageError("--caps takes shares of the architectures, more than 0 and at most 1, like 0.33,0.6,1")
    table = load_table(settings)
    found = {f"{cap:g}": _under_cap(under_cap(settings, cap, cost), cost) for cap in caps}
    if settings.out is not None:
        _write(settings.out / "regret.csv", found)
    return {"table": table.name, "trainings": TRAININGS, "caps": found}


def all_methods(table: Table, front: bool = False) -> tuple[str, ...]:
    """The methods that search for accuracy alone, or for a front, can do so on this table, and are installed."""
    names = FRONT_METHODS if front else [name for name in METHODS if name not in ONLY_FOR_FRONTS]
    return tuple(
        name for name in names if is_installed(name) and not lacks(name, table.lows, table.candidates.trends)
    )


def under_cap(settings: Replay, cap: float, cost: str = "macs") -> Replay:
    """The settings of a replay under a cap: its limit, the hours at which regret is measured, its own folder."""
    limit = float(np.nanquantile(load_table(settings).candidates.cost(cost), cap))
    out = None if settings.out is None else settings.out / f"cap-{cap:g}"
    return measured_after(replace(settings, maxima=(*settings.maxima, (cost, limit)), out=out), TRAININGS)


def measured_after(settings: Replay, trainings: Sequence[int]) -> Replay:
    """The settings of a replay with the hours of so many full trainings of mean cost as those at which regret is
    measured; it ends with the last."""
    table = load_table(settings)
    hour = float(np.nanmean(table.seconds[FULL])) / 3600
    at = tuple(count * hour for count in trainings)
    return validated_replay(replace(settings, at=at, gpu_hours=at[-1]), table)


def regrets(settings: Replay, runs: list[SimulatedRun]) -> dict[str, Array]:
    """By method, the regret (seeds, hours) of its runs, in points of test accuracy or of hypervolume."""
    best = optimum(load_table(settings), settings.cost)
    return {
        method: np.array([[best - run.at(hours) for hours in settings.at] for run in runs if run.method == method])
        for method in settings.methods
    }


def _under_cap(settings: Replay, cost: str) -> dict[str, Any]:
    table, runs = load_table(settings), run_all(settings)
    if settings.out is not None:
        write_summary(settings.out, settings, runs, summarise(settings, table, runs))
    return {
        f"max_{cost}": settings.maxima[-1][1],
        "architectures": len(table.candidates),
        "optimum": round(optimum(table, settings.cost), 4),
        **_compared(regrets(settings, runs)),
    }


def _compared(regret: dict[str, Array]) -> dict[str, Any]:
    """For each method its regret by cost, the mean over costs, and how it differs, seed by seed, from that of the best
    baseline."""
    means = {method: float(values.mean()) for method, values in regret.items()}
    baseline = min((m for m in means if m in BASELINES), key=lambda m: means[m], default=None)
    methods = {}
    for method, values in regret.items():
        own = values.mean(axis=1)
        entry = {"regret": mean_and_error(own), "by_cost": [round(float(v), 3) for v in values.mean(axis=0)]}
        if baseline is not None:
            entry["less_best_baseline"] = mean_and_error(own - regret[baseline].mean(axis=1))
        methods[method] = entry
    return {"best_baseline": baseline, "methods": methods}


def _write(path: Path, found: dict[str, Any]) -> None:
    with open(path, "w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        names = ["cap", "method", "regret", "stderr", "best_baseline", "less_best_baseline", "stderr_of_difference"]
        writer.writerow([*names, *(f"after_{trainings}" for trainings in TRAININGS)])
        for cap, result in found.items():
            for method, entry in result["methods"].items():
                less = entry.get("less_best_baseline", {"mean": "", "stderr": ""})
                compared = [result["best_baseline"] or "", less["mean"], less["stderr"]]
                writer.writerow([cap, method, *entry["regret"].values(), *compared, *entry["by_cost"]])
