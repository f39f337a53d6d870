"""The search against baselines on real trainings: every score was trained in a fidelity study, every cost measured.

`python -m bench.evidence.baselines build/evidence/baselines-NAME` searches the trainings of that study and keeps the
results in docs/results. With or without a folder it writes docs/results/baselines.md from all results kept there.

A fidelity study has trained a pool of architectures in full and at low fidelities. An evaluation depends on the
architecture, the fidelity and the seed alone, so all methods may share it: each searches the pool with the search's own
loop and pays, on the loop's clock, the seconds that the training took. Methods that use the teacher pay for it too.
"""

from __future__ import annotations

import csv
import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from bench.evidence import low_fidelities
from bench.evidence.keep import keep_study, teacher_card
from bench.evidence.low_fidelities import RESULTS, row
from engine.config import SearchConfig, config_from_dict
from engine.run_folder import RunFolder
from engine.search.journal import read_journal
from engine.search.replay import tables
from engine.search.replay.replay import replay
from engine.search.replay.simulate import Replay
from engine.space import SearchSpace
from engine.spaces.load import load_space
from engine.tasks import TestTask, WorkerSettings, task_to_json
from engine.training.run_tasks import run_test
from engine.trial import Evaluation

Json = dict[str, Any]
BUDGETS = (4, 6, 8, 12, 20)  # in mean full trainings
SEARCHES, POOL, WORKERS = 20, 0.75, 2
# Two sets of trainings of each data set that share nothing: other cells, weights, order, teacher.
SETS = {
    "glyphs": ("baselines-glyphs-weak", "baselines-glyphs-again"),
    "CIFAR-100": ("baselines-cifar100-weak", "baselines-cifar100-again"),
}
# What else was searched: the first trainings, with a teacher that costs more.
STUDIES = (*SETS["glyphs"], *SETS["CIFAR-100"], "baselines-glyphs", "baselines-cifar100")
PAGE = RESULTS / "baselines.md"
OURS = "mfkd, KD (ours)"
# Label, method, low fidelity (the part of its name before the @).
METHODS = (
    ("random, full trainings", "random", "none"),
    ("most MACs first", "macs", "none"),
    ("successive halving, no teacher", "halving", "none"),
    ("mfkd, no teacher", "mfkd", "none"),
    ("mfkd, NST", "mfkd", "nst"),
    ("mfkd, attention of weight 10", "mfkd", "at"),
    (OURS, "mfkd", "kd"),
)


def main(run_dir: Path) -> None:
    """Searches the trainings of a study, and keeps them and what was found in docs/results."""
    folder, name = RunFolder(run_dir.absolute()), run_dir.name
    config = config_from_dict(folder.read_config()["config"])
    answers = [e for e in read_journal(folder.journal).answers.values() if e.ok]
    table = RESULTS / f"{name}-table.csv"
    tests = measure_tests(folder, config, answers)
    tables.dump(list(tabulate(answers, tests, load_space(config.space))), table)
    found = search_pools(table, float(teacher_card(run_dir)["seconds"]), run_dir / "pools")
    results_file(name).write_text(json.dumps(found) + "\n")
    keep_study(run_dir)
    low_fidelities.main()


def results_file(name: str) -> Path:
    """The results of the searches of a study, beside its other files."""
    return RESULTS / f"{name}-searches.json"


def search_pools(table: Path, teacher_seconds: float, folder: Path) -> Json:
    """The searches of a kept table: in "picks", test accuracies in percent by method, budget and pool.

    A budget that the teacher's training exceeds gives an empty list. `folder` holds the pools.
    """
    with open(table, newline="") as file:
        rows = list(csv.DictReader(file))
    full = [float(seconds) for line in rows if (seconds := line[f"seconds:{tables.FULL}"])]
    mean_seconds = sum(full) / len(full)
    lows: dict[str, str] = {}  # the first fidelity of each loss: a second one is a control
    for low in tables.load(table).lows:
        lows.setdefault(low.partition("@")[0], low)
    pools = draw_pools(rows, folder)
    picks = {}
    for label, method, loss in METHODS:
        if loss in lows:
            paid = 0.0 if loss == "none" else teacher_seconds
            picks[label] = [pick(pools, method, lows[loss], budget * mean_seconds - paid) for budget in BUDGETS]
    return {
        "architectures": len(full),
        "full_seconds": mean_seconds,
        "teacher_seconds": teacher_seconds,
        "pool": round(len(rows) * POOL),
        "workers": WORKERS,
        "budgets": BUDGETS,
        "picks": picks,
        "best": [100 * float(np.nanmax(tables.load(pool).test)) for pool in pools],
    }


def draw_pools(rows: list[dict[str, str]], folder: Path) -> list[Path]:
    """Tables of a random part of the rows each, so that what one pool happens to hold favours no method."""
    folder.mkdir(parents=True, exist_ok=True)
    pools = []
    for seed in range(SEARCHES):
        drawn = np.random.default_rng(seed).permutation(len(rows))[: round(len(rows) * POOL)]
        pools.append(folder / f"{seed}.csv")
        tables.dump([rows[i] for i in sorted(drawn)], pools[-1])
    return pools


def pick(pools: list[Path], method: str, low: str, seconds: float) -> list[float]:
    """Test accuracy in percent of what a search of each pool recommends after this many worker-seconds."""
    if seconds <= 0:
        return []
    hours = seconds / 3600
    settings = [
        Replay(pool, (method,), (low,), workers=WORKERS, gpu_hours=hours, at=(hours,), seeds=1, processes=1)
        for pool in pools
    ]
    return [replay(one)["methods"][method]["recommended"]["mean"] for one in settings]


def page() -> list[str]:
    """The page about all studies whose searches are kept."""
    return [
        "# The search against its baselines",
        "",
        "Made by `make baselines`; this page by `make results`, from the raw results. The trainings are real and",
        "shared: a pool of small NAS-Bench-201 cells of at most 1.1 million MACs (without a cap the largest cell",
        "would be the answer) is trained in full, with one seed, and at low fidelities, and every training keeps its",
        f"measured seconds ([their rankings](low-fidelities.md)). Each method searches {SEARCHES} random pools of",
        "three quarters of the cells, in the search's own loop, and pays for the trainings that it asks for; methods",
        "that use the teacher pay for its training too. When the budget is spent the search names its winner, as the",
        "command does, and the winner's stored weights are scored on the test split. ± is a 95 % interval over the",
        "pools. The pools share trainings, so luck in these is only partly in the intervals; hence a second set of",
        "each, `-again`: other cells, weights, order, teacher. `-weak` and `-again` have the cheaper teacher, the",
        "other two an expensive one. The `-again` sets were trained while other work used the machine, so their",
        "seconds are too high, for all fidelities alike; so are those of attention on CIFAR-100. The weight of a",
        "measured score when the winner is named was chosen on the first sets, so the second ones are the fairer",
        "test.",
        "",
        "## Over both sets of trainings",
        "",
        *together(),
        "",
        count_signs(),
        *(line for name in STUDIES for line in ["", f"## {name}", "", *describe(name, read_results(name))]),
    ]


def read_results(name: str) -> Json:
    return dict(json.loads(results_file(name).read_text()))


def describe(name: str, found: Json) -> list[str]:
    """What the page says about the searches of a study."""
    picks, budgets = found["picks"], found["budgets"]
    return [
        f"{found['architectures']} architectures; a full training took {found['full_seconds']:.1f} s on average, the "
        f"teacher {found['teacher_seconds']:.0f} s. {len(found['best'])} pools of {found['pool']}, {found['workers']} "
        f"workers. Raw results: [trainings]({name}-table.csv), [searches]({name}-searches.json).",
        "",
        row(["test accuracy of the pick, %, by budget in full trainings", *map(str, budgets)]),
        row(["---"] * (1 + len(budgets))),
        *(row([label, *map(mean, columns)]) for label, columns in picks.items()),
        row(["the best of the pool", *[mean(found["best"])] * len(budgets)]),
        "",
        row([f"{OURS} minus", *map(str, budgets)]),
        row(["---"] * (1 + len(budgets))),
        *(row([label, *map(gap, picks[OURS], picks[label])]) for label in picks if label != OURS),
    ]


def together() -> list[str]:
    """Ours minus each baseline: the mean over the two sets of trainings of a data set, from the kept results."""
    lines = [row([f"{OURS} minus", "on", *map(str, BUDGETS)]), row(["---"] * (2 + len(BUDGETS)))]
    for data, sets in SETS.items():
        for label in read_results(sets[0])["picks"]:
            if label != OURS:
                gaps = [mean_gap(data, label, budget) for budget in range(len(BUDGETS))]
                lines.append(row([label, data, *(f"{value:+.2f} ± {error:.2f}" for value, error in gaps)]))
    return lines


def count_signs() -> str:
    """How often ours is ahead of the methods that have no surrogate, over both sets."""
    simple = [label for label, method, _ in METHODS if method in ("random", "macs", "halving")]
    gaps = [mean_gap(name, label, budget) for name in SETS for label in simple for budget in range(len(BUDGETS))]
    ahead, clear = sum(value > 0 for value, _ in gaps), sum(value > error for value, error in gaps)
    behind = sum(value < -error for value, error in gaps)
    return (
        f"Of the {len(gaps)} differences to random search, the order by MACs and successive halving, {ahead} are "
        f"positive, {clear} beyond their interval, and {behind} negative beyond it."
    )


def mean_gap(data: str, label: str, budget: int) -> tuple[float, float]:
    """Mean of the differences in the two sets of a data set at a budget (its index), and half its interval."""
    gaps = []
    for name in SETS[data]:
        picks = read_results(name)["picks"]
        gaps.append(np.subtract(picks[OURS][budget], picks[label][budget]))
    error = sum(interval(one) ** 2 for one in gaps) ** 0.5 / 2
    return float(sum(one.mean() for one in gaps) / 2), float(error)


def mean(values: Sequence[float]) -> str:
    if not values:
        return "the teacher alone costs more"
    return f"{np.mean(values):.2f} ± {interval(values):.2f}"


def gap(ours: Sequence[float], theirs: Sequence[float]) -> str:
    """Mean difference over the same pools."""
    if not ours or not theirs:
        return ""
    apart = np.subtract(ours, theirs)
    return f"{apart.mean():+.2f} ± {interval(apart):.2f}"


def interval(values: Sequence[float] | npt.NDArray[np.float64]) -> float:
    """Half the width of the 95 % interval of the mean."""
    return float(1.96 * np.std(values, ddof=1) / len(values) ** 0.5)


def measure_tests(folder: RunFolder, config: SearchConfig, answers: list[Evaluation]) -> dict[str, float]:
    """Test accuracy of the stored weights of every full training, by architecture; kept as they are measured."""
    path = folder.path / "tests.jsonl"
    known: dict[str, float] = {}
    if path.exists():
        known = dict(json.loads(line) for line in path.read_text().splitlines())
    worker = WorkerSettings(config, folder.path, "cpu")
    with open(path, "a") as file:
        for evaluation in answers:
            name = str(evaluation.trial.architecture)
            if evaluation.trial.fidelity == config.high and name not in known:
                known[name] = run_test(task_to_json(TestTask(worker, evaluation.trial)))["test_accuracy"]
                file.write(json.dumps([name, known[name]]) + "\n")
                file.flush()
    return known


def tabulate(answers: list[Evaluation], tests: dict[str, float], space: SearchSpace) -> Iterator[dict[str, str]]:
    """A row per architecture in the format of engine.search.replay.tables."""
    lows = dict.fromkeys(e.trial.fidelity.name for e in answers if e.trial.fidelity.name != "high")
    names = {"high": tables.FULL, **{low: low for low in lows}}
    by: dict[tuple[Any, str], Evaluation] = {(e.trial.architecture, e.trial.fidelity.name): e for e in answers}
    for architecture in dict.fromkeys(e.trial.architecture for e in answers):
        pairs = zip(space.choices, architecture.choices, strict=True)
        line = {f"choice:{choice.name}": str(choice.options[value]) for choice, value in pairs}
        full = by.get((architecture, "high"))
        line |= {"macs": str(full.macs if full else ""), "params": str(full.params if full else "")}
        for fidelity, name in names.items():
            e = by.get((architecture, fidelity))
            line[f"valid:{name}"] = f"{e.accuracy:.6f}" if e else ""
            line[f"seconds:{name}"] = f"{e.seconds:.3f}" if e else ""
        yield line | {f"test:{tables.FULL}": f"{tests[str(architecture)]:.6f}" if full else ""}


if __name__ == "__main__":
    if len(sys.argv) > 1:
        main(Path(sys.argv[1]))
    PAGE.write_text("\n".join(page()) + "\n")
