"""Work on one architecture: train it in full, score it, export it, with or without a run."""

from __future__ import annotations

import math
import os
import shlex
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from engine.config import Budget, Plan, Resources, RunSettings, SearchConfig
from engine.fleet.devices import layout
from engine.fleet.drain import answer_of
from engine.fleet.fleet import Fleet, open_fleet, submit
from engine.search.class_scores import class_scores
from engine.search.progress import Display
from engine.search.run_context import one_worker
from engine.search.runs import Run, open_run
from engine.search.search import search
from engine.space import Candidates
from engine.spaces.load import load_space
from engine.tasks import ExportTask, InputFormat, Normalisation, PredictTask, ScoreTask, SplitName, WorkerSettings
from engine.trial import Architecture, Evaluation, Fidelity, History, Trial, UsageError

Json = dict[str, Any]
ONNX = "model.onnx"  # of an export
# An architecture that the user names is trained regardless of the limits of a search.
NO_LIMITS: Json = {"min_macs": 0.0, "max_macs": math.inf, "max_params": math.inf, "max_latency_ms": math.inf}


def train(settings: RunSettings, architecture: str, out: Path, display: Display) -> Json:
    """Trains an architecture at full fidelity and scores it on the test split; call again to resume.

    This is a search with a single candidate: `out` is a run folder like any other, for `eval`, `export` and `report`.
    """
    config = settings.config
    load_space(config.space).check(Architecture.parse(architecture))  # before workers start and data are read
    low = replace(config.high, name="low")  # never asked for; a distilled low fidelity makes the run obtain a teacher
    config = replace(config, low=low, only=architecture, method="random", objectives="accuracy", fidelity_study="")
    budget = Budget(max_low=0, max_high=1, max_failures=1, final_training="never")
    alone = replace(settings, config=replace(config, **NO_LIMITS), budget=budget)
    result = search(alone, out, display, method=until_one_succeeds)
    return {"run_dir": result["run_dir"], **result["winner"], "seconds": result["seconds"]}


def until_one_succeeds(candidates: Candidates, history: History, plan: Plan, slots: int) -> list[Trial]:
    """Asks for the same training again after a failure, so that the next call resumes at the last saved epoch."""
    if history.pending or any(evaluation.ok for evaluation in history.answered):
        return []
    return [Trial(history.asked, candidates.architecture(0), plan.high, plan.seed)]


def score(
    config: SearchConfig,
    resources: Resources,
    trial: Trial,
    weights: Path,
    split: SplitName,
    trained_on: Normalisation | None,
) -> Json:
    """How good an architecture's weights are on a split of the data of `config` (valid, test, or all), in all and at
    each class (engine.search.class_scores).

    `trained_on` describes the data that the weights were trained on; None means these data.
    """
    load_space(config.space).check(trial.architecture)
    with worker(resources, None, "engine.training.run_tasks") as (fleet, folder):
        settings = WorkerSettings(config, folder, fleet.device, resources)
        found = answer_of(submit(fleet, ScoreTask(settings, trial, weights.absolute(), split, trained_on)))
    scores = class_scores(found["classes"], found["confusion"])
    known = {"device": found["device"], "notes": found["notes"]}
    return {"architecture": str(trial.architecture), "data": config.data, "split": split, **scores, **known}


def predict(source: str, architecture: str | None, images: Sequence[Path], top: int, resources: Resources) -> Json:
    """The `top` most probable classes of image files, and of those below folders, by the network of a run (its winner,
    unless an architecture is named) or of an export: {"network", "images", "unreadable"}, as `run_predict` answers.
    """
    exported = Path(source) / ONNX
    with worker(resources, None, "engine.training.predict") as (fleet, _):
        if exported.is_file():
            if architecture is not None:
                raise UsageError(f"{source} is an export, of one architecture; leave --arch out, or name the run")
            task = PredictTask(exported.absolute(), tuple(images), top, "cpu")
        else:
            task = _predict_task(open_run(source), architecture, tuple(images), top)
            task = replace(task, device=fleet.device)
        return {"network": str(task.network), **answer_of(submit(fleet, task))}


def _predict_task(run: Run, architecture: str | None, images: tuple[Path, ...], top: int) -> PredictTask:
    trial, data = select_evaluation(run, architecture).trial, run.data
    return PredictTask(
        network=run.folder.weights(trial),
        images=images,
        top=top,
        device="cpu",
        space=run.config.space,
        trial=trial,
        inputs=InputFormat(data.normalisation, trial.fidelity.resolution or data.resolution, data.files),
        data_backend=run.config.data_backend,
    )


@contextmanager
def exporter(run: Run, resources: Resources) -> Iterator[Fleet]:
    """A worker that exports networks of a run."""
    logs = run.folder.logs if os.access(run.folder.path, os.W_OK) else None  # runs of other people can be exported too
    with worker(resources, logs, "engine.export.formats") as (fleet, _):
        yield fleet


def export(run: Run, evaluation: Evaluation, out: Path, fleet: Fleet, display: Display) -> Json:
    """Exports the weights of a full training to `out` in every format, each verified, with a model card. `fleet` is an
    `exporter`."""
    data, trial = run.data, evaluation.trial
    display.say(f"exporting {trial.architecture} of {run.folder}")
    task = ExportTask(
        run_dir=run.folder.path,
        trial=trial,
        space=run.config.space,
        teacher=run.folder.teacher_weights(run.config),
        out=out.absolute(),
        normalisation=data.normalisation,
        resolution=trial.fidelity.resolution or data.resolution,
        device=fleet.device,
        card=card_facts(run, evaluation),
    )
    report: Json = answer_of(submit(fleet, task))
    worst = max(report["differences"].values())
    display.say(f"{', '.join(report['differences'])}: logits within {worst:.1e} of the checkpoint's")
    if report["no_model_py"]:
        display.say(f"no model.py: {report['no_model_py']}")
    return report


def card_facts(run: Run, evaluation: Evaluation) -> Json:
    """What a run knows about an evaluation, for its model card."""
    config, trial, call = run.config, evaluation.trial, run.facts["calls"][0]
    final, searched = trial.fidelity.with_valid, _searched(run, evaluation)
    return {
        "title": f"{config.space} {trial.architecture}",
        "data": config.data,
        "images": "; ".join((run.data.summary, *run.data.warnings)),
        "valid_accuracy": searched.accuracy if searched else None,
        "test_accuracy": evaluation.accuracy if final else _tested(run, evaluation),
        "search_test_accuracy": _tested(run, searched) if final and searched else None,
        "search_training": _training(config, searched.trial) if final and searched else "",
        "training": _training(config, trial),
        "distillation": _distillation(config, trial.fidelity),
        "files": run.data.files,
        "run": run.folder.path.name,
        "command": shlex.join(call["command"]),
        "trained_with": call["versions"],
        "trained_on": evaluation.device,
    }


def _searched(run: Run, evaluation: Evaluation) -> Evaluation | None:
    """The training in the search, with a validation accuracy, of the network in an evaluation."""
    if not evaluation.trial.fidelity.with_valid:
        return evaluation
    full = [e for e in run.at(run.plan.high) if e.trial.architecture == evaluation.trial.architecture]
    return max(full, key=lambda e: e.accuracy, default=None)


def _tested(run: Run, evaluation: Evaluation) -> float | None:
    """The test accuracy of a training in the search: only that of the winner is known."""
    winner: Json = (run.result or {}).get("winner", {})
    same = winner.get("architecture") == str(evaluation.trial.architecture)
    return winner["test_accuracy"] if same and winner["valid_accuracy"] == evaluation.accuracy else None


def _training(config: SearchConfig, trial: Trial) -> str:
    fidelity = trial.fidelity
    images = "all images" if fidelity.fraction == 1 else f"{fidelity.fraction} of the images"
    images += ", those of the validation split included" if fidelity.with_valid else ""
    start = f", starting from the weights {config.initial_weights}" if config.initial_weights else ""
    optimiser = "AdamW with" if config.optimizer == "adamw" else f"SGD with momentum {config.momentum:g},"
    return (
        f"{fidelity.epochs} epochs on {images}, batch size {config.batch_size}, {optimiser} "
        f"peak learning rate {config.lr:g} and weight decay {config.weight_decay:g}, "
        f"seed {trial.seed}{start}"
    )


def _distillation(config: SearchConfig, fidelity: Fidelity) -> str:
    """TEACHER is a placeholder for the teacher's name."""
    if fidelity.kd_loss != "none":
        return f"from TEACHER, by {fidelity.kd_loss}"
    if config.low.kd_loss != "none" and not config.only:
        return f"none here; candidates were ranked by short trainings distilled from TEACHER ({config.low.kd_loss})"
    return "none"


def select_evaluation(run: Run, architecture: str | None) -> Evaluation:
    """The training whose weights stand for the named architecture, or for the winner if none is named: the final one,
    else the best of the full ones. UsageError if there is none.
    """
    if architecture is None:
        if run.kind == "fidelity-study":
            raise UsageError(f"{run.folder} is a fidelity study, which has no winner; name an architecture instead")
        if run.result is None or run.best is None:
            raise UsageError(
                f"{run.folder} has no winner yet; let its search finish, or name an architecture instead"
            )
        return run.final or run.best
    wanted = load_space(run.config.space).check(Architecture.parse(architecture))
    finished = [evaluation for evaluation in run.finals if evaluation.trial.architecture == wanted]
    if finished:
        return finished[-1]
    trained = [evaluation for evaluation in run.at(run.plan.high) if evaluation.trial.architecture == wanted]
    if not trained:
        known = dict.fromkeys(str(evaluation.trial.architecture) for evaluation in run.at(run.plan.high))
        raise UsageError(
            f"{wanted} was not trained in full in {run.folder} (trained in full: {', '.join(known) or 'none yet'}); "
            f"train it: cli.py train {run.folder} --arch {wanted} --out FOLDER"
        )
    return max(trained, key=lambda evaluation: evaluation.accuracy)


@contextmanager
def worker(resources: Resources, logs: Path | None, module: str) -> Iterator[tuple[Fleet, Path]]:
    """A single worker for the tasks of a module, and a temporary folder, which holds the logs if `logs` is None."""
    with tempfile.TemporaryDirectory(prefix="mfkd-") as scratch:
        fleet = open_fleet(resources, one_worker(layout(resources)), logs or Path(scratch) / "logs", module)
        try:
            yield fleet, Path(scratch)
        finally:
            fleet.close()
