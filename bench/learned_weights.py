"""The value of learned weights: rank quality from few full results, in NAS-Bench-201's windows of nearly equal MACs.

`python -m bench.learned_weights ../shared/data` writes docs/results/learned-weights.md and .csv

Tables: NAS-Bench-201 on CIFAR-100, joined by cell with recorded training-free scores. In each window N random cells
have a full result (validation, 200 epochs). The others are ranked, and compared with their test accuracy.
"""

from __future__ import annotations

import csv
import gzip
import math
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from engine.spaces.load import load_space
from surrogate import evidence, xgb
from surrogate.linear import Prior, fit_linear
from surrogate.quality import kendall_tau, normal_scores

Array = npt.NDArray[np.float64]
NAME = Path(__file__).resolve().parents[1] / "docs" / "results" / "learned-weights"
# In millions of MACs, as in docs/results/replay.md.
WINDOWS = ((41.04, 45.36), (44.745, 49.455), (52.25, 57.75), (78.375, 86.625), (82.08, 90.72))
COSTS, GOOD, LOW = ("macs", "activations"), ("jacov", "nwot"), ("val_e12",)
UNRELIABLE = ("zen", "synflow", "fisher", "snip", "plain", "l2_norm")
NOISE = tuple(f"noise {i}" for i in range(5))
TRENDS = {
    "MACs": ("macs",),
    "MACs, activations, jacov, nwot": COSTS + GOOD,
    "MACs, activations, 12 epochs": COSTS + LOW,
    "all five": COSTS + GOOD + LOW,
    "all five, 0.7 believed of the 12 epochs": COSTS + GOOD + LOW,
    "all five, one of noise": COSTS + GOOD + LOW + NOISE[:1],
    "all five, five of noise": COSTS + GOOD + LOW + NOISE,
    "all five, six unreliable proxies": COSTS + GOOD + LOW + UNRELIABLE,
}
COUNTS, SEEDS = (4, 10, 20, 30, 100), 10
# The search's prior slope of a low fidelity (engine/search/methods/estimate.py); for all other trends it is 0.
BELIEVED = {"val_e12": 0.7}
PICKED = 10  # a model's highest-ranked cells, whose best is compared with the best cell of all


@dataclass(frozen=True)
class Window:
    """Cells in a MACs window: standardised features (n, d), standardised columns (n,) by name, and results (n,)."""

    x: Array
    columns: dict[str, Array]
    valid: Array
    test: Array


def main(shared: Path) -> None:
    windows, whole = [read(shared, *window) for window in WINDOWS], [read(shared, 0.0, math.inf)]
    rows: list[dict[str, Any]] = [
        {
            "cells": cells,
            "results": count,
            "trends": name,
            **score(of, names, count, BELIEVED if "believed" in name else {}),
        }
        for cells, of in (("windows", windows), ("whole space", whole))
        for count in COUNTS
        for name, names in TRENDS.items()
    ]
    with open(NAME.with_suffix(".csv"), "w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows({key: round(v, 4) if isinstance(v, float) else v for key, v in row.items()} for row in rows)
    NAME.with_suffix(".md").write_text("\n".join(page(rows, windows)) + "\n")
    print(NAME.with_suffix(".md").read_text())


def read(shared: Path, low: float, high: float) -> Window:
    """The cells of both tables between `low` and `high` million MACs, one per class of isomorphic cells."""
    results, proxies = (recorded(shared / f"nasbench201_{name}.csv.gz") for name in ("cifar100", "proxies"))
    cells = {results[cell]["iso"]: cell for cell in sorted(set(results) & set(proxies), reverse=True)}
    inside = sorted(c for c in cells.values() if low <= float(results[c]["macs"]) / 1e6 <= high)
    table = [{**proxies[cell], **results[cell]} for cell in inside]
    choices = np.array([[int(digit) for digit in cell] for cell in inside], dtype=np.int8)
    space, rng = load_space("nasbench201"), np.random.default_rng(0)
    assert space.activations is not None
    columns = {
        **{name: column(table, name) for name in ("macs", *GOOD, *LOW, *UNRELIABLE)},
        "activations": space.activations(choices, 100, 1.0, 32),
        **{name: rng.standard_normal(len(inside)) for name in NOISE},
    }
    return Window(
        x=standard(space.encode(choices)),
        columns={name: standard(normal_scores(values)[:, None])[:, 0] for name, values in columns.items()},
        valid=column(table, "val_e200"),
        test=column(table, "test_e200"),
    )


def recorded(path: Path) -> dict[str, dict[str, str]]:
    with gzip.open(path, "rt") as file:
        return {row["ops"]: row for row in csv.DictReader(file)}


def column(table: list[dict[str, str]], name: str) -> Array:
    return np.array([float(row[name]) for row in table])


def standard(x: npt.ArrayLike) -> Array:
    """Columns with mean 0 and variance 1; a constant column becomes 0."""
    values = np.asarray(x, dtype=np.float64)
    values = values - values.mean(axis=0)
    spread = values.std(axis=0)
    return np.asarray(values / np.where(spread > 1e-9, spread, 1.0))


def score(windows: list[Window], names: tuple[str, ...], count: int, believed: dict[str, float]) -> dict[str, float]:
    """Means over windows and seeds: tau of learned weights, of a ridge instead, and of boosted trees on top; their
    differences with standard errors; the regret of the best of the PICKED cells, in points of accuracy; and the mean
    squared left-out error in units of its predicted variance."""
    centre = np.array([believed.get(name, 0.0) for name in names])
    found = np.array([_score(window, names, count, centre, seed) for window in windows for seed in range(SEEDS)])
    learned, ridge, trees, regret, calibration = found.T
    return {
        "learned": float(learned.mean()),
        "ridge": float(ridge.mean()),
        "learned_less_ridge": float((learned - ridge).mean()),
        "learned_less_ridge_error": error(learned - ridge),
        "trees_on_top": float((trees - learned).mean()),
        "trees_on_top_error": error(trees - learned),
        "regret": float(regret.mean()),
        "regret_error": error(regret),
        "calibration": float(calibration.mean()),
    }


def error(values: Array) -> float:
    return float(values.std(ddof=1) / len(values) ** 0.5)


def _score(window: Window, names: tuple[str, ...], count: int, centre: Array, seed: int) -> tuple[float, ...]:
    order = np.random.default_rng(seed).permutation(len(window.test))
    known, rest = order[:count], order[count:]
    trend = np.stack([window.columns[name] for name in names], axis=1)
    x, y = window.x, normal_scores(window.valid[known])
    model = replace(evidence.unknown(len(names)), mean=centre).fit(trend[known], x[known], y)
    mean = model.predict(trend[rest], x[rest])[0]
    prior = Prior(centre, np.full(len(names), evidence.SLAB))
    ridge = fit_linear(trend[known], x[known], y, prior).predict(trend[rest], x[rest])[0]
    left, both = y - model.predict(trend[known], x[known])[0], np.concatenate([trend, x], axis=1).astype(np.float32)
    boosters, _ = xgb._bag(both[known], left, seed)
    correction = np.mean([booster.inplace_predict(both[rest]) for booster in boosters], axis=0)
    squares = (y - model.left_out) ** 2 / model.left_out_variance
    taus = [kendall_tau(prediction, window.test[rest]) for prediction in (mean, ridge, mean + correction)]
    picked = window.test[rest][np.argsort(-mean)[:PICKED]]
    return *taus, float(window.test.max() - picked.max()), float(squares.mean())


def page(rows: list[dict[str, Any]], windows: list[Window]) -> list[str]:
    sizes = ", ".join(str(len(window.test)) for window in windows)
    return [
        "# Learned weights of the trends",
        "",
        "Made by `make learned-weights`: NAS-Bench-201 on CIFAR-100. N random cells have a full result, and the others",
        f"are ranked. Figures are means over {SEEDS} samples; tau is Kendall's with the 200-epoch test accuracy.",
        "Besides the trends named, every model has the encoding of the cell. *Ridge* gives every trend the same",
        "variance; *trees on top* adds the boosted trees of `surrogate/xgb.py`, fitted to the residuals of learned",
        "weights. *Regret* is the gap, in points of accuracy, between the best cell and the best of the",
        f"{PICKED} that learned weights rank highest. *Calibration* is the mean squared error of left-out predictions",
        "in units of the predicted variance: 1 is right, less is cautious. ± is a standard error over windows and",
        "samples.",
        "",
        f"## Inside five windows of nearly equal MACs ({sizes} cells)",
        "",
        *lines([row for row in rows if row["cells"] == "windows"]),
        "",
        "## In the whole space",
        "",
        *lines([row for row in rows if row["cells"] == "whole space"]),
    ]


def lines(rows: list[dict[str, Any]]) -> list[str]:
    head = ("N", "trends", "learned", "ridge", "learned - ridge", "trees on top", "regret", "calibration")
    made = [f"| {' | '.join(head)} |", f"| {' | '.join(['---'] * len(head))} |"]
    for row in rows:
        less = f"{row['learned_less_ridge']:+.3f} ± {row['learned_less_ridge_error']:.3f}"
        trees = f"{row['trees_on_top']:+.3f} ± {row['trees_on_top_error']:.3f}"
        calibration = f"{row['calibration']:.2f}"
        regret = f"{row['regret']:.2f} ± {row['regret_error']:.2f}"
        cells = [str(row["results"]), row["trends"], f"{row['learned']:.3f}", f"{row['ridge']:.3f}", less, trees]
        made.append(f"| {' | '.join([*cells, regret, calibration])} |")
    return made


if __name__ == "__main__":
    main(Path(sys.argv[1]))
