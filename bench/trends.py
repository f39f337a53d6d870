"""What training-free scores of learned weight are worth in a search, and what useless ones cost: NAS-Bench-201.

`python -m bench.trends ../shared/data [--seeds 8]` writes docs/results/trends.md and .csv; finished runs are kept in
build/trends, and the same command goes on from there.
"""

from __future__ import annotations

import argparse
import csv
import gzip
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from engine.search.replay.compare import TRAININGS, regrets, under_cap
from engine.search.replay.published import Row, convert
from engine.search.replay.replay import run_all
from engine.search.replay.simulate import Replay
from engine.search.replay.summary import mean_and_error
from engine.search.replay.tables import dump

Array = npt.NDArray[np.float64]
ROOT = Path(__file__).resolve().parents[1]
NAME, BUILD = ROOT / "docs" / "results" / "trends", ROOT / "build" / "trends"
CAPS = {1.0: "Uncapped", 0.6: "MACs of at most the 60th percentile", 0.33: "MACs of at most the 33rd percentile"}
BASELINES = ("mfkd2", "mfkd1", "cokriging", "gp", "bore", "optuna-tpe", "optuna-gp", "macs")

Columns = Callable[[Row, np.random.Generator], dict[str, str]]


def jacov(row: Row, _: np.random.Generator) -> dict[str, str]:
    return {"proxy:jacov": row["proxy:jacov"]}


def nwot(row: Row, _: np.random.Generator) -> dict[str, str]:
    return {"proxy:nwot": row["proxy:nwot"]}


def turned(row: Row, _: np.random.Generator) -> dict[str, str]:
    value = row["proxy:jacov"]
    return {"proxy:turned": str(-float(value)) if value else ""}


def noise(_: Row, rng: np.random.Generator) -> dict[str, str]:
    return {"proxy:noise": f"{rng.standard_normal():.6f}"}


# What the candidates bring, by the columns of the table that is joined, and the methods that are replayed with it.
CASES: dict[str, tuple[tuple[Columns, ...], tuple[str, ...]]] = {
    "none": ((), ("mfkd", *BASELINES)),
    "jacov, nwot": ((jacov, nwot), ("mfkd", "proxies", "naswot")),
    "noise": ((noise,), ("mfkd",)),
    "jacov turned, nwot": ((turned, nwot), ("mfkd",)),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("shared", type=Path)
    parser.add_argument("--seeds", type=int, default=8)
    values = parser.parse_args()
    rows = [row for cap in CAPS for row in under(cap, values.shared, values.seeds)]
    with open(NAME.with_suffix(".csv"), "w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    NAME.with_suffix(".md").write_text("\n".join(page(rows, values.seeds)) + "\n")
    print(NAME.with_suffix(".md").read_text())


def under(cap: float, shared: Path, seeds: int) -> list[dict[str, Any]]:
    """A row for each method and case under a cap. Differences are paired by seed, with those of `mfkd` without further
    columns."""
    found = {}
    for case, (columns, methods) in CASES.items():
        settings = Replay(shared / "nasbench201_cifar100.csv.gz", methods, seeds=seeds, processes=1)
        settings = replace(settings, join=joined(case, columns, shared), out=BUILD / case.replace(", ", "-"))
        settings = under_cap(settings, cap)
        found |= {(method, case): of for method, of in regrets(settings, run_all(settings)).items()}
    today = found["mfkd", "none"]
    return [row(cap, method, case, regret, today) for (method, case), regret in found.items()]


def joined(case: str, columns: tuple[Columns, ...], shared: Path) -> tuple[Path, ...]:
    """The table that brings the columns of a case."""
    if not columns:
        return ()
    with gzip.open(shared / "nasbench201_proxies.csv.gz", "rt", newline="") as file:
        rows = convert(list(csv.DictReader(file)))
    rng, made = np.random.default_rng(0), []
    for one in rows:
        made.append({name: value for name, value in one.items() if name.startswith("choice:")})
        for values in columns:
            made[-1] |= values(one, rng)
    path = BUILD / f"{case.replace(', ', '-')}.csv.gz"
    path.parent.mkdir(parents=True, exist_ok=True)
    dump(made, path)
    return (path,)


def row(cap: float, method: str, case: str, regret: Array, today: Array) -> dict[str, Any]:
    mean, less = mean_and_error(regret.mean(axis=1)), mean_and_error((regret - today).mean(axis=1))
    by_cost = {f"at_{n}": round(float(v), 3) for n, v in zip(TRAININGS, regret.mean(axis=0), strict=True)}
    return {
        "cap": cap,
        "method": method,
        "columns": case,
        "regret": mean["mean"],
        "stderr": mean["stderr"],
        "less_today": less["mean"],
        "stderr_of_difference": less["stderr"],
        **by_cost,
    }


def page(rows: list[dict[str, Any]], seeds: int) -> list[str]:
    lines = [
        "# Training-free scores in a search",
        "",
        "Made by `make trends`: replays of NAS-Bench-201 on CIFAR-100, 8 workers, 12-epoch trainings as the low",
        f"fidelity, {seeds} seeds. *Columns* are the scores of untrained networks that the candidates bring",
        "(NAS-Bench-Suite-Zero): Jacobian covariance and NASWOT; a column of noise alone; and the two with the sign",
        "of the first turned. Without columns, `mfkd` decides as it did before weights were learned. Regret is by how",
        "many points of test accuracy the incumbent is below the best cell under the cap, by worker-hours in full",
        "trainings, and their mean; differences are paired by seed. ± is a standard error over the seeds. Until a full",
        "training has ended, at about 9 of them with 8 workers, the incumbent is the best by low-fidelity score.",
    ]
    for cap, title in CAPS.items():
        heads = ["method", "columns", "mean regret", "less mfkd without", *map(str, TRAININGS)]
        lines += ["", f"## {title}", "", f"| {' | '.join(heads)} |", f"| {' | '.join(['---'] * len(heads))} |"]
        lines += [f"| {' | '.join(cells(one))} |" for one in rows if one["cap"] == cap]
    return lines


def cells(one: dict[str, Any]) -> list[str]:
    less = f"{one['less_today']:+.3f} ± {one['stderr_of_difference']:.3f}"
    today = (one["method"], one["columns"]) == ("mfkd", "none")
    means = [f"{one['regret']:.3f} ± {one['stderr']:.3f}", "" if today else less]
    return [f"`{one['method']}`", one["columns"], *means, *(f"{one[f'at_{n}']:.2f}" for n in TRAININGS)]


if __name__ == "__main__":
    main()
