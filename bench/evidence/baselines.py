"""The search against its rivals on real training: every answer is a training of a study, every cost its measured one.

`python -m bench.evidence.baselines build/evidence/baselines-NAME`; without a folder: the means over the two sets of trainings

A study of the fidelity command has trained a pool of architectures in full and at low fidelities. An answer depends on
the architecture, the fidelity and the seed alone, so the methods may share it: each searches the pool by the search's
own loop and pays, on the loop's clock, the seconds that the training took. The teacher is paid by those that use it.
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
import yaml

from bench.evidence.keep import KEPT, PAGE, kept, row, teacher_card, write
from engine.search.journal import read_journal
from engine.search.replay import tables
from engine.search.replay.simulate import Replay, replay
from engine.space import SearchSpace
from engine.spaces.load import load_space
from engine.training.evaluate import run_test
from engine.trial import Evaluation, trial_to_json

BUDGETS = (4, 6, 8, 12, 20)  # in mean full trainings
SEARCHES, POOL, WORKERS = 20, 0.75, 2
# Two sets of trainings of each data set that share nothing: other cells, weights, order, teacher.
SETS = {
    "glyphs": ("baselines-glyphs-weak", "baselines-glyphs-again"),
    "CIFAR-100": ("baselines-cifar100-weak", "baselines-cifar100-again"),
}
OURS = "mfkd, KD (ours)"
# Called, method, low fidelity (the part of its name before the @).
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
    config = yaml.safe_load((run_dir / "config.yaml").read_text())["study"]
    answers = [e for e in read_journal(run_dir / "journal.jsonl").answers.values() if e.ok]
    KEPT.mkdir(exist_ok=True)
    path = KEPT / f"{run_dir.name}-table.csv"
    rows = tabulate(answers, tested(run_dir, config, answers), load_space(config["space"]))
    tables.dump(list(rows), path)
    lines = searched(path, float(teacher_card(run_dir)["seconds"]), run_dir / "pools")
    write(run_dir.name, "\n".join([*lines, "", "The same trainings as a fidelity study:", "", *kept(run_dir)]))


def searched(path: Path, taught: float, folder: Path) -> list[str]:
    """What the page says of the searches of a kept table, whose teacher took `taught` seconds."""
    with open(path, newline="") as file:
        rows = list(csv.DictReader(file))
    full = [float(seconds) for line in rows if (seconds := line[f"seconds:{tables.FULL}"])]
    unit = sum(full) / len(full)
    names: dict[str, str] = {}  # of the lows with a loss, the first: another is a control
    for low in tables.load(path).lows:
        names.setdefault(low.partition("@")[0], low)
    parts = pools(rows, folder)
    picks = {
        called: [
            picked(parts, method, names[loss], budget * unit - (0.0 if loss == "none" else taught))
            for budget in BUDGETS
        ]
        for called, method, loss in METHODS
        if loss in names
    }
    return [
        f"{len(full)} architectures, {unit:.1f} s a full training on the average; the teacher took {taught:.0f} s. "
        f"{SEARCHES} pools of {len(rows) * POOL:.0f}, {WORKERS} workers. The trainings: [csv](evidence/{path.name}).",
        "",
        row(["test accuracy of the pick, %, by budget in full trainings", *map(str, BUDGETS)]),
        row(["---"] * (1 + len(BUDGETS))),
        *(row([called, *map(mean, columns)]) for called, columns in picks.items()),
        row(["the best of the pool", *[mean([best(part) for part in parts])] * len(BUDGETS)]),
        "",
        row([f"{OURS} less", *map(str, BUDGETS)]),
        row(["---"] * (1 + len(BUDGETS))),
        *(row([called, *map(gap, picks[OURS], picks[called])]) for called in picks if called != OURS),
    ]


def together() -> list[str]:
    """Ours less each rival, the mean over the two sets of trainings of a data set, from what the page says of each."""
    lines = [row([f"{OURS} less", "on", *map(str, BUDGETS)]), row(["---"] * (2 + len(BUDGETS)))]
    for data, (first, second) in SETS.items():
        one, other = gaps_of(first), gaps_of(second)
        for rival in one:
            pairs = zip(one[rival], other[rival], strict=True)
            means = [f"{(a + b) / 2:+.2f} ± {(u**2 + v**2) ** 0.5 / 2:.2f}" for (a, u), (b, v) in pairs]
            lines.append(row([rival, data, *means]))
    return lines


def gaps_of(name: str) -> dict[str, list[tuple[float, float]]]:
    """The differences, with half their interval, that the page has for a study, by rival."""
    text = PAGE.read_text().partition(f"<!-- begin {name} -->")[2].partition(f"<!-- end {name} -->")[0]
    under = text.partition(f"{OURS} less")[2].partition("\n\n")[0]
    cells = [[cell.strip() for cell in line.strip("| ").split("|")] for line in under.splitlines()[2:]]
    return {rival: [(float(v), float(w)) for v, w in (gap.split(" ± ") for gap in found)] for rival, *found in cells}


def pools(rows: list[dict[str, str]], folder: Path) -> list[Path]:
    """Tables of a random part of the rows each: what one pool happens to hold is no method's merit."""
    folder.mkdir(parents=True, exist_ok=True)
    parts = []
    for seed in range(SEARCHES):
        drawn = np.random.default_rng(seed).permutation(len(rows))[: round(len(rows) * POOL)]
        parts.append(folder / f"{seed}.csv")
        tables.dump([rows[i] for i in sorted(drawn)], parts[-1])
    return parts


def picked(parts: list[Path], method: str, low: str, seconds: float) -> list[float]:
    """Test accuracy in percent of what a search of each pool names in the end, when it has spent the worker-seconds."""
    if seconds <= 0:
        return []
    hours = seconds / 3600
    settings = [
        Replay(part, (method,), (low,), workers=WORKERS, gpu_hours=hours, at=(hours,), seeds=1, processes=1)
        for part in parts
    ]
    return [replay(one)["methods"][method]["recommended"]["mean"] for one in settings]


def best(part: Path) -> float:
    return 100 * float(np.nanmax(tables.load(part).test))


def mean(values: Sequence[float]) -> str:
    if not values:
        return "the teacher alone costs more"
    return f"{np.mean(values):.2f} ± {interval(values):.2f}"


def gap(ours: Sequence[float], theirs: Sequence[float]) -> str:
    """Mean difference over the same pools."""
    apart = np.subtract(ours, theirs) if ours and theirs else np.array([])
    return f"{apart.mean():+.2f} ± {interval(apart):.2f}" if len(apart) else ""


def interval(values: Sequence[float] | npt.NDArray[np.float64]) -> float:
    """Half the width of the 95 % interval of the mean."""
    return float(1.96 * np.std(values, ddof=1) / len(values) ** 0.5)


def tested(run_dir: Path, config: dict[str, Any], answers: list[Evaluation]) -> dict[str, float]:
    """Test accuracy of every full training's stored weights, by architecture; kept as they are measured."""
    path = run_dir / "tests.jsonl"
    known: dict[str, float] = {}
    if path.exists():
        known = dict(json.loads(line) for line in path.read_text().splitlines())
    task = {"study": config, "run_dir": str(run_dir.absolute()), "device": "cpu"}
    with open(path, "a") as file:
        for evaluation in answers:
            name = str(evaluation.trial.architecture)
            if evaluation.trial.fidelity.name == "high" and name not in known:
                known[name] = run_test({**task, "trial": trial_to_json(evaluation.trial)})["test_accuracy"]
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
        whole = by.get((architecture, "high"))
        line |= {"macs": str(whole.macs if whole else ""), "params": str(whole.params if whole else "")}
        for fidelity, name in names.items():
            e = by.get((architecture, fidelity))
            line[f"valid:{name}"] = f"{e.accuracy:.6f}" if e else ""
            line[f"seconds:{name}"] = f"{e.seconds:.3f}" if e else ""
        yield line | {f"test:{tables.FULL}": f"{tests[str(architecture)]:.6f}" if whole else ""}


if __name__ == "__main__":
    if len(sys.argv) > 1:
        main(Path(sys.argv[1]))
    else:
        write("rivals-together", "\n".join(together()))
