"""What a replay found, as JSON, as curves in a CSV file and as a picture."""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from engine.search.replay.hypervolume import best_hypervolume
from engine.search.replay.simulate import Replay, SimulatedRun
from engine.search.replay.tables import Table

Array = npt.NDArray[np.float64]
GRID = 121  # points of a curve


def summarise(settings: Replay, table: Table, runs: Sequence[SimulatedRun]) -> dict[str, Any]:
    """The JSON object of the command: per method and checkpoint, statistics of test accuracy or hypervolume in percent.

    The statistics are mean, standard error, median and quartiles over the seeds. Those of `seconds_to_best` are in
    worker-seconds; a run that did not find the best counts with its budget. `found` is the fraction of runs that found
    it, `wall_mean` the mean in seconds of the simulated clock.
    """
    methods: dict[str, Any] = {}
    for method in settings.methods:
        own = [run for run in runs if run.method == method]
        entry: dict[str, Any] = {f"{hours:g}": _statistics([run.at(hours) for run in own]) for hours in settings.at}
        entry["recommended"] = _statistics([run.recommended for run in own])
        entry["seconds_to_best"] = _until_best(settings, own)
        entry["evaluations"] = {k: float(np.mean([getattr(run, k) for run in own])) for k in ("low", "full")}
        methods[method] = entry
    if settings.cost:
        _add_differences(settings, methods, runs)
    return {"table": table.name, "optimum": round(optimum(table, settings.cost), 4), "methods": methods}


def optimum(table: Table, cost: str) -> float:
    """The best test accuracy of a table, or with a cost the best hypervolume, in percent."""
    return best_hypervolume(table, table.candidates.cost(cost)) if cost else 100 * float(np.nanmax(table.test))


def _add_differences(settings: Replay, methods: dict[str, Any], runs: Sequence[SimulatedRun]) -> None:
    """Adds to each method by how much it is ahead of each other one at the checkpoints, seed by seed."""
    values = {m: np.array([[r.at(h) for h in settings.at] for r in runs if r.method == m]) for m in methods}
    for method, entry in methods.items():
        entry["ahead_of"] = {
            other: {
                f"{hours:g}": mean_and_error(ahead)
                for hours, ahead in zip(settings.at, (values[method] - values[other]).T, strict=True)
            }
            for other in methods
            if other != method
        }


def _until_best(settings: Replay, runs: list[SimulatedRun]) -> dict[str, float]:
    budget = settings.gpu_hours * 3600
    entry = _statistics([min(run.best_at, budget) for run in runs], digits=0)
    entry["wall_mean"] = round(entry["mean"] / settings.workers, 1)
    entry["found"] = sum(run.best_at <= budget for run in runs) / len(runs)
    return entry


def _statistics(values: list[float], digits: int = 3) -> dict[str, float]:
    low, middle, high = np.quantile(values, (0.25, 0.5, 0.75))
    quartiles = {"lower_quartile": low, "median": middle, "upper_quartile": high}
    return mean_and_error(values, digits) | {name: round(float(value), digits) for name, value in quartiles.items()}


def mean_and_error(values: npt.ArrayLike, digits: int = 3) -> dict[str, float]:
    """Mean of the values (n,), and its standard error."""
    array = np.asarray(values, dtype=np.float64)
    error = float(array.std(ddof=1)) / math.sqrt(len(array)) if len(array) > 1 else 0.0
    return {"mean": round(float(array.mean()), digits), "stderr": round(error, digits)}


def write_summary(out: Path, settings: Replay, runs: list[SimulatedRun], summary: dict[str, Any]) -> None:
    """Writes `summary.json`, `curves.csv` (quartiles, mean and standard error over worker-hours) and `curves.png`."""
    (out / "summary.json").write_text(json.dumps(summary, indent=1) + "\n")
    grid = np.linspace(0, settings.gpu_hours, GRID)
    curves = {}
    with open(out / "curves.csv", "w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["method", "gpu_hours", "lower_quartile", "median", "upper_quartile", "mean", "stderr"])
        for method in settings.methods:
            values = np.array([[run.at(hours) for hours in grid] for run in runs if run.method == method])
            quartiles = np.quantile(values, (0.25, 0.5, 0.75), axis=0)
            curves[method] = quartiles
            error = values.std(axis=0, ddof=1) / math.sqrt(len(values)) if len(values) > 1 else values.std(axis=0)
            for hours, column, mean, stderr in zip(grid, quartiles.T, values.mean(axis=0), error, strict=True):
                writer.writerow([method, f"{hours:g}", *(f"{v:.3f}" for v in (*column, mean, stderr))])
    merit = f"hypervolume of accuracy against {settings.cost}" if settings.cost else "test accuracy of the incumbent"
    _draw(out / "curves.png", (grid, curves), summary, merit)


def _draw(path: Path, drawn: tuple[Array, dict[str, Array]], summary: dict[str, Any], merit: str) -> None:
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return  # matplotlib is an extra; the CSV file has the same figures
    grid, curves = drawn
    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.subplots()
    for method, (low, middle, high) in curves.items():
        (line,) = axes.plot(grid, middle, label=method)
        axes.fill_between(grid, low, high, color=line.get_color(), alpha=0.15, linewidth=0)
    axes.axhline(summary["optimum"], color="black", linestyle=":", linewidth=1)
    lowest = min(float(np.quantile(low, 0.1)) for low, _, _ in curves.values())
    axes.set(xlabel="GPU-hours", ylabel=f"{merit}, %")
    axes.set(title=summary["table"], ylim=(lowest, None))
    axes.legend(loc="lower right", fontsize="small")
    figure.savefig(path, dpi=120)
