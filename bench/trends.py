"""What training-free scores of learned weight are worth in a search, and what useless ones cost, on recorded tables.

`python -m bench.trends ../shared/data [--seeds 20]` writes docs/results/trends.md and .csv; finished runs are kept in
build/trends, and the same command goes on from there. The scores are the engine's own; the first call makes them, in
a quarter of an hour (`bench.proxy_tables`).
"""

from __future__ import annotations

import argparse
import csv
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from bench import proxy_tables
from bench.learned_weights import WINDOWS
from bench.proxy_tables import FILES, ROOT, read
from engine.search.replay.compare import TRAININGS, measured_after, regrets, under_cap
from engine.search.replay.published import Row
from engine.search.replay.replay import run_all
from engine.search.replay.simulate import Replay, load_table
from engine.search.replay.summary import mean_and_error
from engine.search.replay.tables import FULL, Table, dump
from engine.tasks import PROXIES

Array = npt.NDArray[np.float64]
Columns = Callable[[Row, np.random.Generator], dict[str, str]]
Replays = Callable[[Replay], Iterator[Replay]]

NAME, BUILD = ROOT / "docs" / "results" / "trends", ROOT / "build" / "trends"
TURNED = "jacobian_covariance"  # the score that ranks NAS-Bench-201 best, beside expressivity
# The authors' table has 100 networks: thirds by MACs, one worker, and a grid that ends before all are trained.
LOWER, UPPER = 39178112.0, 52578336.0
THIRDS = {"lower third": (0.0, LOWER), "middle third": (LOWER, UPPER), "lower two thirds": (0.0, UPPER)}
LOWS = tuple(f"{loss}/{divisor}" for loss in ("attention", "nokd", "kd", "nst") for divisor in (27, 9, 3))
FEW, FEW_SEEDS = (2, 3, 4, 6, 8, 12, 16, 24), 3


def scores(row: Row, _: np.random.Generator) -> dict[str, str]:
    return {f"proxy:{name}": row[f"proxy:{name}"] for name in PROXIES}


def noise(_: Row, rng: np.random.Generator) -> dict[str, str]:
    return {"proxy:noise": f"{rng.standard_normal():.6f}"}


def scores_and_noise(row: Row, rng: np.random.Generator) -> dict[str, str]:
    return scores(row, rng) | noise(row, rng)


def one_turned(row: Row, rng: np.random.Generator) -> dict[str, str]:
    found = scores(row, rng)
    value = found.pop(f"proxy:{TURNED}")
    return {"proxy:turned": str(-float(value)) if value else "", **found}


# What the candidates bring, by the columns of the table that is joined.
COLUMNS: dict[str, Columns | None] = {
    "none": None,
    "scores": scores,
    "noise": noise,
    "scores, noise": scores_and_noise,
    "scores, one turned": one_turned,
}
WITH_SCORES = ("proxies", "naswot")


@dataclass(frozen=True)
class Scope:
    """Replays of a table (of FILES) whose regrets are averaged, seed by seed.

    `baselines` are replayed without columns, and `mfkd` with each of the `columns`. `grid` are the costs, in full
    trainings; `seeds`, if not 0, takes the place of the seeds asked for.
    """

    title: str
    about: str
    table: str
    replays: Replays
    baselines: tuple[str, ...]
    columns: tuple[str, ...] = ("none", "scores")
    grid: tuple[int, ...] = TRAININGS
    seeds: int = 0


def capped(cap: float) -> Replays:
    def replays(settings: Replay) -> Iterator[Replay]:
        yield under_cap(replace(settings, workers=8), cap)

    return replays


def windows(settings: Replay) -> Iterator[Replay]:
    for low, high in WINDOWS:
        yield measured_after(replace(settings, min_macs=low * 1e6, max_macs=high * 1e6, workers=4), IN_WINDOWS)


def third(low: float, high: float) -> Replays:
    def replays(settings: Replay) -> Iterator[Replay]:
        for fidelity in LOWS:
            yield measured_after(replace(settings, min_macs=low, max_macs=high, lows=(fidelity,), workers=1), FEW)

    return replays


IN_WINDOWS = (8, 12, 16, 24, 40)
WITH_LOWS = ("mfkd2", "mfkd1", "cokriging")
WITHOUT_LOWS = ("gp", "bore", "optuna-tpe", "optuna-gp", "macs")  # baselines that need no low fidelity
PERCENTILES = {"60th": 0.6, "33rd": 0.33}


def nasbench201(title: str, replays: Replays) -> Scope:
    baselines = (*WITH_LOWS, *WITHOUT_LOWS)
    return Scope(f"NAS-Bench-201, {title}", "8 workers.", "nasbench201", replays, baselines, tuple(COLUMNS))


def nasbench201_windows() -> Scope:
    millions = ", ".join(f"{low:g} to {high:g}" for low, high in WINDOWS)
    about = f"4 workers; means over the windows, {millions} million MACs; 10 seeds."
    title = "NAS-Bench-201, five windows of nearly equal MACs"
    return Scope(title, about, "nasbench201", windows, (*WITH_LOWS, "gp", "macs"), grid=IN_WINDOWS, seeds=10)


def macro(title: str, replays: Replays) -> Scope:
    about = "8 workers; the table has no low fidelity."
    return Scope(f"NAS-Bench-Macro, {title}", about, "macro", replays, WITHOUT_LOWS)


def authors(title: str, replays: Replays) -> Scope:
    about = f"1 worker; means over the 12 low fidelities, each offered alone; {FEW_SEEDS} seeds."
    baselines = (*WITH_LOWS, "gp", "macs")
    title = f"The authors' MobileNetV2, {title} by MACs"
    return Scope(title, about, "mobilenetv2", replays, baselines, grid=FEW, seeds=FEW_SEEDS)


SCOPES = [
    nasbench201("uncapped", capped(1.0)),
    *(nasbench201(f"MACs up to the {name} percentile", capped(cap)) for name, cap in PERCENTILES.items()),
    nasbench201_windows(),
    *(macro(f"MACs up to the {name} percentile", capped(cap)) for name, cap in PERCENTILES.items()),
    *(authors(name, third(*limits)) for name, limits in THIRDS.items()),
]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("shared", type=Path)
    parser.add_argument("--seeds", type=int, default=20)
    values = parser.parse_args()
    rows = [row for scope in SCOPES for row in compared(scope, values.shared, scope.seeds or values.seeds)]
    with open(NAME.with_suffix(".csv"), "w", newline="") as file:
        writer = csv.DictWriter(file, list(dict.fromkeys(key for row in rows for key in row)), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    NAME.with_suffix(".md").write_text("\n".join(page(rows, values.seeds)) + "\n")
    print(NAME.with_suffix(".md").read_text())


def compared(scope: Scope, shared: Path, seeds: int) -> list[dict[str, Any]]:
    """A row for each method and the columns that it sees; differences, by seed, to the best of the other methods."""
    cases = dict.fromkeys(scope.columns, ("mfkd",))
    cases["none"] += scope.baselines
    cases["scores"] += WITH_SCORES
    found: dict[tuple[str, str], Array] = {}
    floors: list[float] = []
    for columns, methods in cases.items():
        out = BUILD / f"{scope.table}-{columns.replace(', ', '-').replace(' ', '-')}"
        out.mkdir(parents=True, exist_ok=True)
        join = joined(scope.table, columns, out, shared)
        settings = Replay(shared / FILES[scope.table], methods, join=join, seeds=seeds)
        replays = list(scope.replays(settings))
        each = [regrets(one, run_all(replace(one, out=out))) for one in replays]
        found |= {(method, columns): np.mean([one[method] for one in each], axis=0) for method in methods}
        floors = [floor(load_table(one)) for one in replays]
    rival = min((key for key in found if key[0] != "mfkd"), key=lambda key: float(found[key].mean()))
    rows = [row(scope, key, regret, found[rival], key == rival) for key, regret in found.items()]
    return [one | {"floor": round(float(np.mean(floors)), 3)} for one in rows]


def floor(table: Table) -> float:
    """The regret of the network that is best by validation, in points of test accuracy."""
    best = int(np.nanargmax(table.valid[FULL]))
    return 100 * float(np.nanmax(table.test) - table.test[best])


def joined(name: str, columns: str, folder: Path, shared: Path) -> tuple[Path, ...]:
    """The table that brings the columns of a case."""
    make, rng = COLUMNS[columns], np.random.default_rng(0)
    if make is None:
        return ()
    rows = read(proxy_tables.make(name, shared))
    dump([proxy_tables.choices_of(one) | make(one, rng) for one in rows], folder / "columns.csv.gz")
    return (folder / "columns.csv.gz",)


def row(scope: Scope, key: tuple[str, str], regret: Array, rival: Array, is_rival: bool) -> dict[str, Any]:
    mean, less = mean_and_error(regret.mean(axis=1)), mean_and_error((regret - rival).mean(axis=1))
    by_cost = {f"at_{n}": round(float(v), 3) for n, v in zip(scope.grid, regret.mean(axis=0), strict=True)}
    return {
        "scope": scope.title,
        "method": key[0],
        "columns": key[1],
        "seeds": len(regret),
        "regret": mean["mean"],
        "stderr": mean["stderr"],
        "less_best_rival": "" if is_rival else less["mean"],
        "stderr_of_difference": "" if is_rival else less["stderr"],
        **by_cost,
    }


def page(rows: list[dict[str, Any]], seeds: int) -> list[str]:
    lines = [
        "# Training-free scores in a search",
        "",
        f"Made by `make trends`: replays of recorded tables, {seeds} seeds unless said otherwise. *Columns* are what",
        "`mfkd` knows of the candidates beside MACs and parameters: the engine's four scores of the untrained networks",
        "(NASWOT, Jacobian covariance, DisWOT, expressivity, from CIFAR-10 images, with a ResNet-56 as the teacher); a",
        f"column of noise; the four with the sign of one, {TURNED}, turned. `proxies` and `naswot` train by the scores",
        "alone. Regret is by how many points of test accuracy the incumbent is below the best network of the scope, by",
        "worker-hours in full trainings, and their mean. The incumbent is the best by validation, and before the first",
        "full result the best by low-fidelity score. The network of best validation accuracy has a regret of its own,",
        "which no search on validation accuracy can be expected to get below: *floor*. Differences are paired by seed;",
        "± is a standard error over the seeds.",
    ]
    for scope in SCOPES:
        own = [one for one in rows if one["scope"] == scope.title]
        heads = ["method", "columns", "mean regret", "less best rival", *map(str, scope.grid)]
        lines += ["", f"## {scope.title}", "", f"{scope.about} Floor: {own[0]['floor']:.2f}.", ""]
        lines += [f"| {' | '.join(heads)} |", f"| {' | '.join(['---'] * len(heads))} |"]
        lines += [f"| {' | '.join(cells(one, scope.grid))} |" for one in own]
    return lines


def cells(one: dict[str, Any], grid: tuple[int, ...]) -> list[str]:
    less = f"{one['less_best_rival']:+.3f} ± {one['stderr_of_difference']:.3f}" if one["less_best_rival"] != "" else ""
    mean = f"{one['regret']:.3f} ± {one['stderr']:.3f}"
    return [f"`{one['method']}`", one["columns"], mean, less, *(f"{one[f'at_{n}']:.2f}" for n in grid)]


if __name__ == "__main__":
    main()
