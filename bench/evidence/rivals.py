"""The search against its rivals on real training: every answer is a training of a study, every cost its measured one.

`python -m bench.evidence.rivals build/evidence/rivals-NAME`

A study of the fidelity command has trained a pool of architectures in full and at low fidelities. An answer depends on
the architecture, the fidelity and the seed alone, so the methods may share it: each searches the pool by the search's
own loop and pays, on the loop's clock, the seconds that the training took. The teacher is paid by those that use it.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from bench.evidence.keep import KEPT, kept, row, teacher_card, write
from engine.search import journal, tables
from engine.search.replay import Replay, replay
from engine.space import SearchSpace, load_space
from engine.training.evaluate import run_test
from engine.trial import Evaluation, trial_to_json

BUDGETS = (8, 12, 20)  # in mean full trainings
SEEDS, WORKERS = 20, 2
# Called, method, low fidelity (the part of its name before the @).
METHODS = (
    ("random, full trainings", "random", "none"),
    ("most MACs first", "macs", "none"),
    ("successive halving, no teacher", "halving", "none"),
    ("mfkd, no teacher", "mfkd", "none"),
    ("mfkd, KD (ours)", "mfkd", "kd"),
    ("mfkd, NST (ours)", "mfkd", "nst"),
)


def main(run_dir: Path) -> None:
    study = yaml.safe_load((run_dir / "config.yaml").read_text())["study"]
    answers = [e for e in journal.read(run_dir / "journal.jsonl").answers.values() if e.ok]
    KEPT.mkdir(exist_ok=True)
    path = KEPT / f"{run_dir.name}-table.csv"
    tables.dump(list(tabulate(answers, tested(run_dir, study, answers), load_space(study["space"]))), path)
    full = [e.seconds for e in answers if e.trial.fidelity.name == "high"]
    unit, taught = sum(full) / len(full), float(teacher_card(run_dir)["seconds"])
    lines = [
        f"{len(full)} architectures, {unit:.1f} s a full training on the average; the teacher took {taught:.0f} s. "
        f"{SEEDS} searches a method, {WORKERS} workers. The trainings: [csv](evidence/{path.name}).",
        "",
        row(["test accuracy, %, by budget in full trainings", *map(str, BUDGETS)]),
        row(["---"] * (1 + len(BUDGETS))),
    ]
    names = {e.trial.fidelity.name.partition("@")[0]: e.trial.fidelity.name for e in answers}
    for called, method, loss in METHODS:
        paid = 0.0 if loss == "none" else taught
        cells = [score(path, method, names[loss], budget * unit - paid) for budget in BUDGETS]
        lines.append(row([called, *cells]))
    best = replay(Replay(path, ("random",), seeds=1, workers=1, gpu_hours=1e-3, at=(0.0,), processes=1))["optimum"]
    lines.append(row(["the best of the pool", *[f"{best:.2f}"] * len(BUDGETS)]))
    write(run_dir.name, "\n".join([*lines, "", "The same trainings as a fidelity study:", "", *kept(run_dir)]))


def score(path: Path, method: str, low: str, seconds: float) -> str:
    """Mean test accuracy of the incumbent after that many worker-seconds, with its 95 % interval."""
    if seconds <= 0:
        return "the teacher alone costs more"
    hours = seconds / 3600
    result = replay(
        Replay(path, (method,), (low,), workers=WORKERS, gpu_hours=hours, at=(hours,), seeds=SEEDS, processes=1)
    )
    found: dict[str, float] = result["methods"][method][f"{hours:g}"]
    return f"{found['mean']:.2f} ± {1.96 * found['stderr']:.2f}"


def tested(run_dir: Path, study: dict[str, Any], answers: list[Evaluation]) -> dict[str, float]:
    """Test accuracy of every full training's stored weights, by architecture; kept as they are measured."""
    path = run_dir / "tests.jsonl"
    known: dict[str, float] = {}
    if path.exists():
        known = dict(json.loads(line) for line in path.read_text().splitlines())
    task = {"study": study, "run_dir": str(run_dir.absolute()), "device": "cpu"}
    with open(path, "a") as file:
        for evaluation in answers:
            name = str(evaluation.trial.architecture)
            if evaluation.trial.fidelity.name == "high" and name not in known:
                known[name] = run_test({**task, "trial": trial_to_json(evaluation.trial)})["test_accuracy"]
                file.write(json.dumps([name, known[name]]) + "\n")
                file.flush()
    return known


def tabulate(answers: list[Evaluation], tests: dict[str, float], space: SearchSpace) -> Iterator[dict[str, str]]:
    """A row per architecture in the format of engine.search.tables."""
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
    main(Path(sys.argv[1]))
