"""The paper's own setting on a GPU: CIFAR images, MobileNetV2, low fidelities at 1/27 and 1/9 with its losses.

`python -m bench.evidence.gpu FOLDER [--minutes 8] [--data build/cifar10_small.npz]`

Needs torch and triton only (the images stay on the device). Architectures come in blocks of 8, each judged in full and
at every low fidelity before the next block, so that what a deadline leaves is a smaller study, not half a one. Every
evaluation is appended to FOLDER/evaluations.jsonl; the same call goes on from there. `FOLDER/fidelity.json`
and the printed table say what was found.
"""

from __future__ import annotations

import argparse
import json
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

from engine.config import Plan, Resources, Study, to_dict
from engine.search import findings
from engine.search.journal import History
from engine.search.policies.pilot import Pilot, chosen, measured
from engine.search.policies.ranking import Measured
from engine.space import candidates, load_space
from engine.training.evaluate import run_probe, run_teacher, run_trials
from engine.trial import Evaluation, Fidelity, Trial, evaluation_from_json, trial_to_json

TEACHER, JOURNAL = "nasbench201#3-3-3-3-3-3", "evaluations.jsonl"
LOSSES = ("none", "kd", "at", "nst", "kd+at")
LOWS = [f"{loss}@{part}" for part in ("1/27x60", "1/9x20") for loss in LOSSES] + ["none@1/27x75", "none@1/9x25"]
BLOCK = 8
STUDY = Study(
    space="mobilenetv2",
    resolution=32,
    batch_size=64,
    teacher_epochs=30,
    high=Fidelity("high", epochs=12),
    data_backend="resident",
)
RESOURCES = Resources(device="cuda", students_per_gpu=str(BLOCK))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--minutes", type=float, default=8.0, help="no block is begun that would end after these")
    parser.add_argument("--data", default="build/cifar10_small.npz")
    parser.add_argument("--architectures", type=int, default=64)
    given = parser.parse_args()
    given.folder.mkdir(parents=True, exist_ok=True)
    study_on(given.folder.absolute(), replace(STUDY, data=given.data), given.architectures, given.minutes * 60, "cuda")


def study_on(folder: Path, study: Study, count: int, seconds: float, device: str) -> None:
    """Goes on with the study in `folder` until its `count` architectures are done or the seconds are over."""
    start = time.monotonic()
    task = {"study": to_dict(study), "run_dir": str(folder), "device": device, "resources": to_dict(RESOURCES)}
    facts = run_probe(task)
    teacher = str(folder / "teacher.safetensors")
    card = run_teacher({**task, "path": teacher, "network": TEACHER, "pretrained": False})
    print(f"{facts['device']}; the teacher has {card['accuracy']:.4f} after {card['seconds']:.0f} s", flush=True)
    members = candidates(load_space(study.space), len(facts["classes"]), 1.0, facts["resolution"])
    plan = Pilot(tuple(map(Fidelity.parse, LOWS)), count, drop=False)
    wanted, answers = chosen(members, count, study.seed), read(folder / JOURNAL)
    slowest = 0.0
    for first in range(0, count, BLOCK):
        begun = time.monotonic()
        if begun - start + slowest > seconds:
            print(f"the time is over after {first} architectures; the same call goes on", flush=True)
            break
        for fidelity in (study.high, *plan.lows):
            known = {e.trial.architecture for e in answers if e.trial.fidelity == fidelity}
            block = [a for a in wanted[first : first + BLOCK] if a not in known]
            trials = [Trial(len(answers) + i, a, fidelity, study.seed) for i, a in enumerate(block)]
            if trials:
                asked = {**task, "teacher": teacher, "trials": [trial_to_json(trial) for trial in trials]}
                answers += keep(folder / JOURNAL, run_trials(asked))
        slowest = max(slowest, time.monotonic() - begun)
        print(f"{len(answers)} evaluations after {time.monotonic() - start:.0f} s", flush=True)
    conclude(folder, measured(members, History(answers), Plan(plan.lows, study.high, seed=study.seed), plan), answers)


def read(path: Path) -> list[Evaluation]:
    """The evaluations of earlier calls; a last line that was cut short is left out."""
    lines = path.read_text().splitlines(keepends=True) if path.exists() else []
    return [evaluation_from_json(json.loads(line)) for line in lines if line.endswith("\n")]


def keep(path: Path, answers: list[dict[str, Any]]) -> list[Evaluation]:
    with open(path, "a") as file:
        file.writelines(json.dumps(answer) + "\n" for answer in answers)
    return [evaluation_from_json(answer) for answer in answers]


def conclude(folder: Path, found: Measured, answers: list[Evaluation]) -> None:
    (folder / "evaluations.csv").write_text(findings.evaluations_csv(answers))
    result = findings.summarise(found)
    if result is None:
        print("too few evaluations to say anything")
        return
    (folder / "fidelity.json").write_text(json.dumps(result, indent=2) + "\n")
    findings.draw(folder / "fidelity.png", result)
    print("\n".join(findings.table(result)))


if __name__ == "__main__":
    main()
