"""What a search with latencies is worth, under a cap and for a whole front: NAS-Bench-201 and HW-NAS-Bench.

`python -m bench.front ../shared/data [--seeds 10]` writes docs/results/front.md and .csv; finished runs are kept in
build/front, and the same command goes on from there.
"""

from __future__ import annotations

import argparse
import csv
import gzip
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from engine.config import FRONT_METHODS
from engine.search.replay.published import convert
from engine.search.replay.replay import run_all
from engine.search.replay.simulate import Replay, SimulatedRun, load_table, validated_replay
from engine.search.replay.summary import mean_and_error, optimum
from engine.search.replay.tables import FULL, dump

Array = npt.NDArray[np.float64]
Row = dict[str, Any]
ROOT = Path(__file__).resolve().parents[1]
NAME, BUILD = ROOT / "docs" / "results" / "front", ROOT / "build" / "front"
DEVICES = {"edgegpu": "edge GPU", "raspi4": "Raspberry Pi 4", "pixel3": "Pixel 3"}
SHARES, GPU_HOURS = (0.1, 0.25, 0.5), 60.0
HOURS = (10.0, 15.0, 20.0, 30.0, 40.0, 60.0)  # of the table of hypervolumes
EVERY = np.arange(1.0, GPU_HOURS + 1)  # hours at which the search is compared with random search


@dataclass(frozen=True)
class Bench:
    """Where the recorded tables are, and how many seeds to replay."""

    shared: Path
    seeds: int

    def replay(self, name: str, device: str = "", methods: Sequence[str] = ("mfkd",)) -> Replay:
        """The settings of a replay that is kept under a name; the latency of a `device` is a column of the table."""
        join = (self.latencies(device),) if device else ()
        table = self.shared / "nasbench201_cifar100.csv.gz"
        return Replay(
            table, tuple(methods), join=join, seeds=self.seeds, gpu_hours=GPU_HOURS, processes=1, out=BUILD / name
        )

    def latencies(self, device: str) -> Path:
        """A table with the latency on one device, for --join."""
        path = BUILD / f"{device}.csv.gz"
        if not path.exists():
            with gzip.open(self.shared / "nasbench201_hardware_cifar100.csv.gz", "rt", newline="") as file:
                rows = convert(list(csv.DictReader(file)))
            column = f"latency:{device}"
            path.parent.mkdir(parents=True, exist_ok=True)
            dump([{k: v for k, v in row.items() if k.startswith("choice:") or k == column} for row in rows], path)
        return path


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("shared", type=Path)
    parser.add_argument("--seeds", type=int, default=10)
    values = parser.parse_args()
    bench = Bench(values.shared, values.seeds)
    fronts = [row for cost in ("macs", "edgegpu", "raspi4") for row in front(bench, cost)]
    caps = [under_cap(bench, device, share) for device in DEVICES for share in SHARES]
    NAME.with_suffix(".md").write_text("\n".join(page(bench, caps, fronts)) + "\n")
    with open(NAME.with_suffix(".csv"), "w", newline="") as file:
        columns = dict.fromkeys(key for row in (*caps, *fronts) for key in row)
        writer = csv.DictWriter(file, list(columns), lineterminator="\n")
        writer.writeheader()
        writer.writerows((*caps, *fronts))
    print(NAME.with_suffix(".md").read_text())


def found(settings: Replay) -> dict[str, list[SimulatedRun]]:
    """The runs of a replay, by method."""
    runs = run_all(validated_replay(settings, load_table(settings)))
    return {method: [run for run in runs if run.method == method] for method in settings.methods}


def under_cap(bench: Bench, device: str, share: float) -> Row:
    """A search under a cap on a latency, beside one under the cap on MACs that leaves the same share of cells."""
    ours = capped(bench.replay(f"{device}-{share:g}", device), f"{device}_latency", share)
    other = capped(bench.replay(f"macs-{share:g}"), "macs", share)
    accuracy = np.array([run.recommended for run in found(ours)["mfkd"]])
    by_macs = np.array([run.recommended for run in found(other)["mfkd"]])
    table = load_table(ours)
    best, chosen = optimum(table, ""), 100 * float(table.test[np.nanargmax(table.valid[FULL])])
    return {
        "part": "cap",
        "cost": f"{device}_latency",
        "share": share,
        "cap": ours.maxima[0][1],
        "best": best,
        "best_by_validation": chosen,
        **named("accuracy", accuracy),
        "below_best": best - float(accuracy.mean()),
        "best_by_macs": optimum(load_table(other), ""),
        **named("accuracy_by_macs", by_macs),
        **named("ahead", accuracy - by_macs),
    }


def capped(settings: Replay, cost: str, share: float) -> Replay:
    """The settings under a cap that leaves a share of the cells."""
    limit = float(np.quantile(load_table(settings).candidates.cost(cost), share))
    return replace(settings, maxima=((cost, limit),))


def named(name: str, values: Array) -> Row:
    """Mean and standard error of values (n,), in columns of that name."""
    return {name: float(values.mean()), f"{name}_stderr": mean_and_error(values, 6)["stderr"]}


def front(bench: Bench, cost: str) -> list[Row]:
    """A row for each method that searches for the front of accuracy against a cost."""
    column = cost if cost == "macs" else f"{cost}_latency"
    settings = bench.replay(f"front-{cost}", "" if cost == "macs" else cost, FRONT_METHODS)
    settings = replace(settings, objectives=("accuracy", column))
    curves = {
        method: np.array([[run.at(hours) for hours in EVERY] for run in runs])
        for method, runs in found(settings).items()
    }
    best, rows = optimum(load_table(settings), column), []
    for method, curve in curves.items():
        row = {"part": "front", "cost": column, "method": method, "best": best}
        for hours in HOURS:
            row |= named(f"at_{hours:g}", curve[:, hours == EVERY][:, 0])
        if method == "mfkd":
            reached = EVERY[curve.mean(axis=0) >= curves["nsga2"][:, -1].mean()]
            ahead = curve - curves["random"]
            least = int(np.argmin(ahead.mean(axis=0)))
            row |= {"reaches_nsga2_after": reached.min(initial=np.inf), "least_ahead_at": EVERY[least]}
            row |= named("least_ahead_of_random", ahead[:, least])
        rows.append(row)
    return rows


def page(bench: Bench, caps: list[Row], fronts: list[Row]) -> list[str]:
    return [
        "# Latencies in a search",
        "",
        "Made by `make front`: replays of NAS-Bench-201 on CIFAR-100 with the latencies of HW-NAS-Bench, 8 workers,",
        f"{GPU_HOURS:g} GPU-hours, 12-epoch trainings as the low fidelity, {bench.seeds} seeds.",
        "± is a standard error over the seeds.",
        "",
        *caps_table(caps),
        "",
        *fronts_table(fronts),
    ]


def caps_table(caps: list[Row]) -> list[str]:
    heads = ["device", "cells under the cap", "cap, ms", "best cell", "best by validation", "found"]
    heads += ["below the best"]
    heads += ["best under the MACs cap", "found", "ahead of the MACs cap"]
    lines = [
        "## The best network under a cap",
        "",
        "`replay --max DEVICE_latency=CAP` with the latency as a column of the table, beside `replay --max macs=CAP`",
        "with the cap on MACs that leaves as many cells. Test accuracies (%) of the best cell under the cap, of the",
        "cell of best validation accuracy, which is all that a search can go by, and of the winner that the search",
        "names; differences are paired by seed.",
        "",
        *table_head(heads),
    ]
    for row in caps:
        cells = [DEVICES[row["cost"].removesuffix("_latency")], f"{row['share']:.0%}", f"{row['cap']:.2f}"]
        cells += [f"{row['best']:.2f}", f"{row['best_by_validation']:.2f}", shown(row, "accuracy")]
        cells += [f"{row['below_best']:.2f}"]
        cells += [f"{row['best_by_macs']:.2f}", shown(row, "accuracy_by_macs"), shown(row, "ahead", "+")]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def fronts_table(fronts: list[Row]) -> list[str]:
    heads = ["cost", "method", *(f"{hours:g} h" for hours in HOURS), "reaches NSGA-II's last", "least ahead of random"]
    lines = [
        "## The front",
        "",
        "`replay --objectives accuracy,COST`. The hypervolume is the test accuracy (%) of the best network known",
        "within a budget, chosen by validation accuracy, averaged over all budgets from the least cost to the greatest",
        "(linear); the worst cell of the table counts where none is known. *Reaches* is the GPU-hour at which the mean",
        "reaches that of NSGA-II after the last one, *least ahead* the smallest mean difference to random search at",
        "any full hour.",
        "",
        *table_head(heads),
    ]
    for row in fronts:
        cells = [row["cost"], f"`{row['method']}`", *(shown(row, f"at_{hours:g}") for hours in HOURS)]
        if "reaches_nsga2_after" in row:
            least = f"{shown(row, 'least_ahead_of_random', '+')} at {row['least_ahead_at']:g} h"
            cells += [f"{row['reaches_nsga2_after']:g} h", least]
        else:
            cells += ["", ""]
        lines.append(f"| {' | '.join(cells)} |")
    best = {row["cost"]: row["best"] for row in fronts}
    most = ", ".join(f"{of:.2f} ({cost})" for cost, of in best.items())
    return [*lines, "", f"The most that can be had: {most}."]


def table_head(heads: list[str]) -> list[str]:
    return [f"| {' | '.join(heads)} |", f"| {' | '.join(['---'] * len(heads))} |"]


def shown(row: Row, name: str, sign: str = "") -> str:
    return f"{row[name]:{sign}.2f} ± {row[f'{name}_stderr']:.2f}"


if __name__ == "__main__":
    main()
