"""The paper's own setting on a GPU: CIFAR images, MobileNetV2, low fidelities at 1/27 and 1/9 with its losses.

`python -m bench.evidence.gpu FOLDER [--minutes 8] [--data build/cifar10_small.npz]`

It needs only torch and triton, since the images stay on the device. Architectures come in blocks of 8, each trained in
full and at every low fidelity before the next block, so that a deadline leaves a smaller study, not an incomplete one.
Every evaluation is appended to FOLDER/evaluations.jsonl; the same call resumes the study. The results are printed as a
table and written to FOLDER/fidelity-study.json.
"""

from __future__ import annotations

import argparse
import json
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

from engine.config import Plan, Resources, SearchConfig
from engine.run_folder import RunFolder
from engine.search.fidelity_study import summary
from engine.search.fidelity_study.design import FidelityStudy, study_architectures, study_scores
from engine.search.fidelity_study.ranking import StudyScores
from engine.space import candidates
from engine.spaces.load import load_space
from engine.tasks import (
    DataFacts,
    ProbeTask,
    TeacherFacts,
    TeacherTask,
    TrialsTask,
    WorkerSettings,
    task_from_json,
    task_to_json,
)
from engine.training.run_tasks import run_probe, run_teacher, run_trials
from engine.trial import Evaluation, Fidelity, History, Trial, evaluation_from_json

TEACHER, JOURNAL = "nasbench201#3-3-3-3-3-3", "evaluations.jsonl"
LOSSES = ("none", "kd", "at", "nst", "kd+at")
LOWS = [f"{loss}@{part}" for part in ("1/27x60", "1/9x20") for loss in LOSSES] + ["none@1/27x75", "none@1/9x25"]
BLOCK = 8
CONFIG = SearchConfig(
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
    parser.add_argument("--minutes", type=float, default=8.0, help="start no block that would end after this time")
    parser.add_argument("--data", default="build/cifar10_small.npz")
    parser.add_argument("--architectures", type=int, default=64)
    given = parser.parse_args()
    given.folder.mkdir(parents=True, exist_ok=True)
    worker = WorkerSettings(replace(CONFIG, data=given.data), given.folder.absolute(), "cuda", RESOURCES)
    run_study(worker, given.architectures, given.minutes * 60)


def run_study(worker: WorkerSettings, count: int, seconds: float) -> None:
    """Runs or resumes the study in the worker's folder until `count` architectures are done or the time is over."""
    start = time.monotonic()
    config, folder = worker.config, RunFolder(worker.run_dir)
    facts = task_from_json(DataFacts, run_probe(task_to_json(ProbeTask(worker))))
    teacher = folder.path / "teacher.safetensors"
    card = task_from_json(TeacherFacts, run_teacher(task_to_json(TeacherTask(worker, TEACHER, teacher))))
    print(f"{facts.device}; the teacher reaches {card.accuracy:.4f} after {card.seconds:.0f} s", flush=True)
    members = candidates(load_space(config.space), len(facts.classes), 1.0, facts.resolution)
    study = FidelityStudy(tuple(map(Fidelity.parse, LOWS)), count, drop=False)
    wanted, answers = study_architectures(members, count, config.seed), read(folder.path / JOURNAL)
    slowest = 0.0
    for first in range(0, count, BLOCK):
        begun = time.monotonic()
        if begun - start + slowest > seconds:
            print(f"the time is over after {first} architectures; run the same command again to resume", flush=True)
            break
        for fidelity in (config.high, *study.lows):
            known = {e.trial.architecture for e in answers if e.trial.fidelity == fidelity}
            block = [a for a in wanted[first : first + BLOCK] if a not in known]
            trials = tuple(Trial(len(answers) + i, a, fidelity, config.seed) for i, a in enumerate(block))
            if trials:
                measured = run_trials(task_to_json(TrialsTask(worker, trials, teacher)))
                answers += keep(folder.path / JOURNAL, measured)
        slowest = max(slowest, time.monotonic() - begun)
        print(f"{len(answers)} evaluations after {time.monotonic() - start:.0f} s", flush=True)
    plan = Plan(study.lows, config.high, seed=config.seed)
    conclude(folder, study_scores(members, History(answers), plan, study), answers)


def read(path: Path) -> list[Evaluation]:
    """The evaluations of earlier calls; a truncated last line is skipped."""
    lines = path.read_text().splitlines(keepends=True) if path.exists() else []
    return [evaluation_from_json(json.loads(line)) for line in lines if line.endswith("\n")]


def keep(path: Path, answers: list[dict[str, Any]]) -> list[Evaluation]:
    with open(path, "a") as file:
        file.writelines(json.dumps(answer) + "\n" for answer in answers)
    return [evaluation_from_json(answer) for answer in answers]


def conclude(folder: RunFolder, scores: StudyScores, answers: list[Evaluation]) -> None:
    folder.study_evaluations.write_text(summary.evaluations_csv(answers))
    result = summary.summarise(scores)
    if result is None:
        print("too few evaluations for a result")
        return
    folder.study_result.write_text(json.dumps(result, indent=2) + "\n")
    summary.draw(folder.study_picture, result)
    print("\n".join(summary.table(result)))


if __name__ == "__main__":
    main()
