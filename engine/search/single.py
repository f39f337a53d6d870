"""One architecture: trained in full, scored, or exported, with the settings of a run or without one."""

from __future__ import annotations

import math
import os
import shlex
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from engine import config
from engine.config import Budget, Plan, Resources, Study
from engine.fleet.devices import layout
from engine.fleet.drain import answer_of
from engine.fleet.fleet import Fleet, open_fleet
from engine.search.ground import teacher_path
from engine.search.journal import History
from engine.search.progress import Display
from engine.search.runs import Run
from engine.search.search import search
from engine.space import Candidates, load_space
from engine.trial import Architecture, EnvironmentUnusable, Evaluation, Fidelity, Trial, UsageError, trial_to_json

Json = dict[str, Any]
# An architecture that is named is trained, whatever the search that found it was limited to.
NO_LIMITS: Json = {"min_macs": 0.0, "max_macs": math.inf, "max_params": math.inf, "max_latency_ms": math.inf}


def train(study: Study, architecture: str, resources: Resources, out: Path, show: Display) -> Json:
    """Trains an architecture at the study's full fidelity and scores it on the test part; the same call continues.

    It is a search among one: `out` is a run folder like any other, which `eval`, `export` and `report` read.
    """
    low = replace(study.high, name="low")  # not asked for; the teacher is made where it says that there is one
    alone = replace(study, low=low, only=architecture, method="random", objectives="accuracy", pilot="", **NO_LIMITS)
    budget = Budget(max_low=0, max_high=1, max_failures=1)
    result = search(alone, budget, resources, out, show, method=until_one_succeeds)
    return {"run_dir": result["run_dir"], **result["winner"], "seconds": result["seconds"]}


def until_one_succeeds(candidates: Candidates, history: History, plan: Plan, slots: int) -> list[Trial]:
    """The same question again after a failure, which ended a call: the next one goes on from the epochs it kept."""
    if history.pending or any(evaluation.ok for evaluation in history.answered):
        return []
    return [Trial(history.asked, candidates.architecture(0), plan.high, plan.seed)]


def score(
    study: Study, trial: Trial, weights: Path, part: str, trained_on: Json | None, resources: Resources, show: Display
) -> Json:
    """Accuracy of an architecture's weights on a part (valid, test, or all) of the study's data.

    `trained_on` holds classes, mean and std of the data that the weights were trained on; None: they are this data's.
    """
    load_space(study.space).check(trial.architecture)
    with worker(resources, None, "engine.training.evaluate") as (fleet, folder):
        task = {"study": config.to_dict(study), "run_dir": str(folder), "device": fleet.device, "part": part}
        given = {"trial": trial_to_json(trial), "weights": str(weights.absolute()), "trained_on": trained_on}
        found = answer_of(fleet.submit("run_score", {**task, **given}))
    where = f"{'all' if part == 'all' else f'the {part} part'} of {study.data}, {found['images']} images"
    show.say(f"{trial.architecture} on {where}: accuracy {found['accuracy']:.4f}")
    return {"architecture": str(trial.architecture), "data": study.data, "part": part, **found}


def export(run: Run, evaluation: Evaluation, out: Path, resources: Resources, show: Display) -> Json:
    """Writes the weights of a full-fidelity evaluation in every form, each checked, and a model card, into `out`."""
    study, data = run.study, data_of(run)
    trial = evaluation.trial
    task = {
        "run_dir": str(run.folder),
        "trial": trial_to_json(trial),
        "space": study.space,
        "teacher": str(teacher_path(study, run.folder)),
        "out": str(out.absolute()),
        **{name: data[name] for name in ("classes", "mean", "std")},
        "resolution": trial.fidelity.resolution or data["resolution"],
        "card": card_facts(run, evaluation),
    }
    show.say(f"exporting {trial.architecture} of {run.folder}")
    logs = run.folder / "logs" if os.access(run.folder, os.W_OK) else None  # others' runs may be exported too
    with worker(resources, logs, "engine.export.forms") as (fleet, _):
        report: Json = answer_of(fleet.submit("run_export", {**task, "device": fleet.device}))
    worst = max(report["differences"].values())
    show.say(f"{', '.join(report['differences'])}: logits within {worst:.1e} of the checkpoint's")
    if report["no_model_py"]:
        show.say(f"no model.py: {report['no_model_py']}")
    return report


def card_facts(run: Run, evaluation: Evaluation) -> Json:
    """What a run knows of an evaluation, for its model card."""
    study, trial, call = run.study, evaluation.trial, run.facts["calls"][0]
    winner = (run.result or {}).get("winner", {})
    tested = winner.get("architecture") == str(trial.architecture) and winner["valid_accuracy"] == evaluation.accuracy
    return {
        "title": f"{study.space} {trial.architecture}",
        "data": study.data,
        "images": data_of(run)["images"],
        "valid_accuracy": evaluation.accuracy,
        "test_accuracy": winner["test_accuracy"] if tested else None,
        "training": _training(study, trial),
        "taught": _taught(study, trial.fidelity),
        "files": data_of(run).get("files", Path(study.data).is_dir()),  # earlier versions did not keep it
        "run": run.folder.name,
        "command": shlex.join(call["command"]),
        "trained_with": call["versions"],
        "trained_on": evaluation.device,
    }


def _training(study: Study, trial: Trial) -> str:
    fidelity = trial.fidelity
    part = "all" if fidelity.fraction == 1 else str(fidelity.fraction)
    start = f", from the weights {study.initial_weights}" if study.initial_weights else ""
    return (
        f"{fidelity.epochs} epochs over {part} of the images, batches of {study.batch_size}, SGD with momentum "
        f"{study.momentum:g}, peak learning rate {study.lr:g} and weight decay {study.weight_decay:g}, "
        f"seed {trial.seed}{start}"
    )


def _taught(study: Study, fidelity: Fidelity) -> str:
    """Where the teacher's name goes is TEACHER."""
    if fidelity.kd_loss != "none":
        return f"TEACHER, by {fidelity.kd_loss}"
    if study.low.kd_loss != "none" and not study.only:
        return f"none here; candidates were first judged by short trainings with TEACHER ({study.low.kd_loss})"
    return "none"


def chosen(run: Run, architecture: str | None) -> Evaluation:
    """The full-fidelity evaluation that a command means: of an architecture, or of the winner where none is named."""
    if architecture is None:
        if run.kind == "fidelity":
            raise UsageError(f"{run.folder} is a study, which names no winner; name an architecture with --arch")
        if run.result is None or run.best is None:
            raise UsageError(
                f"{run.folder} has no winner yet; let its search come to its end, or name an architecture with --arch"
            )
        return run.best
    wanted = load_space(run.study.space).check(Architecture.parse(architecture))
    full = [evaluation for evaluation in run.at(run.plan.high) if evaluation.trial.architecture == wanted]
    if not full:
        known = dict.fromkeys(str(evaluation.trial.architecture) for evaluation in run.at(run.plan.high))
        raise UsageError(
            f"{wanted} was not trained in full in {run.folder}; those are {', '.join(known) or 'none yet'}; "
            f"train it: cli.py train {run.folder} --arch {wanted} --out FOLDER"
        )
    return max(full, key=lambda evaluation: evaluation.accuracy)


def data_of(run: Run) -> Json:
    """What run.json says of the data: classes, resolution, images, mean, std."""
    data: Json = run.facts.get("data", {})
    if "mean" not in data:
        path = run.folder / "run.json"
        raise EnvironmentUnusable(f"{path} does not describe the data; call its search again: it adds that")
    return data


@contextmanager
def worker(resources: Resources, logs: Path | None, module: str) -> Iterator[tuple[Fleet, Path]]:
    """One worker for the tasks of a module, and a folder that lasts as long. Without `logs` they go there too."""
    with tempfile.TemporaryDirectory(prefix="mfkd-") as scratch:
        wanted = replace(layout(resources), workers=1, nodes=1)
        fleet = open_fleet(resources, wanted, logs or Path(scratch) / "logs", module)
        try:
            yield fleet, Path(scratch)
        finally:
            fleet.close()
