"""The functions that a worker runs, one per task of engine/tasks.py. They take and return plain JSON values."""

from __future__ import annotations

from dataclasses import replace
from functools import lru_cache, partial
from importlib.metadata import version
from itertools import zip_longest
from pathlib import Path
from typing import Any

import numpy as np
import torch

from engine.data.dataset import Split, fingerprint
from engine.latency.time_probes import noise, noise_warning, quietest, time_in_rounds
from engine.spaces.load import load_space
from engine.tasks import (
    DataFacts,
    LatencyTask,
    ProbeTask,
    ProxyTask,
    ScoreTask,
    TeacherFacts,
    TeacherTask,
    TestTask,
    Timings,
    TimingTask,
    TrialsTask,
    task_from_json,
    task_to_json,
)
from engine.training import teacher as teachers
from engine.training.context import WorkerContext, device_name, open_context
from engine.training.evaluate import evaluate, load_teacher, ready_teacher
from engine.training.make_teacher import make_teacher
from engine.training.proxies import ProxyBatch, make_batch, score_architectures
from engine.training.spacecheck import glance
from engine.training.student import end_if_fatal, place, status_of
from engine.training.timing import time_training
from engine.training.train import confusion
from engine.training.weights import load_network
from engine.trial import EnvironmentUnusable, Fidelity, UsageError, evaluation_to_json, hits_to_text

Json = dict[str, Any]


def run_probe(payload: Json) -> Json:
    """ProbeTask -> DataFacts. Raises EngineError if data or device cannot be used."""
    task = task_from_json(ProbeTask, payload)
    if task.worker.device == "cuda" and not torch.cuda.is_available():
        raise EnvironmentUnusable(
            "this worker was given a GPU but torch cannot use it; check the driver with nvidia-smi, or use --device cpu"
        )
    context = open_context(task.worker)
    config, data = context.config, context.data
    if ".py:" in config.space:
        for fidelity in (config.low, config.high):
            glance(config.space, len(data.classes), fidelity.width, context.resolution(fidelity))
    facts = DataFacts(
        classes=data.classes,
        resolution=data.resolution,
        mean=data.mean,
        std=data.std,
        images={"train": len(data.train), "valid": len(data.valid), "test": len(data.test)},
        files=data.train.files is not None,
        fingerprint=fingerprint(data),
        device=device_name(context.device),
        notes=data.notes,
        warnings=data.warnings,
    )
    return task_to_json(facts)


def run_trials(payload: Json) -> list[Json]:
    """TrialsTask -> an evaluation for each trial."""
    task = task_from_json(TrialsTask, payload)
    evaluations = evaluate(open_context(task.worker), task.teacher, list(task.trials), task.worker.resources)
    return [evaluation_to_json(evaluation) for evaluation in evaluations]


def run_timing(payload: Json) -> Json:
    """TimingTask -> TimingFacts. Raises NoWinner if the network cannot be trained."""
    task = task_from_json(TimingTask, payload)
    return task_to_json(time_training(open_context(task.worker), task))


def run_teacher(payload: Json) -> Json:
    """TeacherTask -> TeacherFacts. Raises UsageError if the teacher's classes are not those of the data."""
    task = task_from_json(TeacherTask, payload)
    context, path = open_context(task.worker), task.path
    if not path.exists():
        try:
            make_teacher(context, task)
        except Exception as error:
            if status_of(error) != "oom":
                raise
            raise EnvironmentUnusable(
                f"the teacher {task.network} does not fit into memory; use a smaller --space, --resolution or "
                "--batch-size, or another --teacher"
            ) from error
    card = teachers.read_card(path)
    teachers.check_fits(card, context.data.classes)
    elsewhere = card.epochs > 0 and card.fingerprint != fingerprint(context.data)
    curve = tuple(zip_longest(card.losses, card.accuracies))
    return task_to_json(TeacherFacts(card.network, card.accuracy, card.epochs, card.seconds, elsewhere, path, curve))


def run_test(payload: Json) -> Json:
    """TestTask -> {"test_accuracy", "weights" (their file), "hits", "confusion"}."""
    task = task_from_json(TestTask, payload)
    context, trial = open_context(task.worker), task.trial
    if trial is None:
        weights, fidelity = task.teacher, Fidelity("teacher")
        network = ready_teacher(weights, context)
    else:
        weights, fidelity = context.folder.weights(trial), trial.fidelity
        network = load_network(weights, context.config.space, trial, len(context.data.classes))
        network = place(network, context.device)
    test = context.data.test
    found = context.read_out(network, test, fidelity)
    return {
        "test_accuracy": found.accuracy,
        "weights": str(weights),
        "hits": hits_to_text(found.hits),
        "confusion": confusion(test.labels, found.predicted, len(context.data.classes)),
    }


def run_latency(payload: Json) -> Json:
    """LatencyTask -> Timings of the architectures, at full fidelity's width and resolution."""
    task = task_from_json(LatencyTask, payload)
    context = open_context(task.worker)
    space, width, classes = load_space(context.config.space), context.config.high.width, len(context.data.classes)
    conditions = context.latency_conditions
    rounds = time_in_rounds(
        [conditions.ready(partial(space.build, one.choices, classes, width)) for one in task.architectures]
    )
    share = noise(rounds)
    found = Timings(
        milliseconds=tuple(map(quietest, rounds)),
        device=conditions.device_name,
        runtime=f"{conditions.runtime} {version(conditions.runtime.partition('.')[0])}",
        noise=share,
        warning=noise_warning(share),
    )
    return task_to_json(found)


def run_proxies(payload: Json) -> list[Json]:
    """ProxyTask -> a ProxyScores for each architecture, at full fidelity's width and resolution."""
    task = task_from_json(ProxyTask, payload)
    context = open_context(task.worker)
    config, space = context.config, load_space(context.config.space)
    try:
        batch = _proxy_batch(context, task.teacher)
        classes, width = len(context.data.classes), config.high.width
        found = score_architectures(space, task.architectures, batch, classes, width, config.seed)
    except Exception as error:
        end_if_fatal(error)
        raise
    return [task_to_json(scores) for scores in found]


@lru_cache(maxsize=1)
def _proxy_batch(context: WorkerContext, teacher: Path | None) -> ProxyBatch:
    """The inputs that all architectures of a run are scored on; the teacher sees them once per worker."""
    config = context.config
    network = load_teacher(teacher, context).network if teacher is not None else None
    side = context.resolution(config.high)
    return make_batch(context.data, config.seed, context.device, network, side, config.data_backend)


def run_score(payload: Json) -> Json:
    """ScoreTask -> {"classes", "confusion" (engine.training.train.confusion), "device", "notes" (on the data)}.

    Raises UsageError if the classes, or their order, differ.
    """
    task = task_from_json(ScoreTask, payload)
    context, trial, known = open_context(task.worker), task.trial, task.trained_on
    if known is not None:
        if known.classes != context.data.classes:
            raise UsageError(
                f"{context.config.data} has the classes {', '.join(context.data.classes)}, but the network was trained "
                f"on {', '.join(known.classes)}; they must be the same, in the same order"
            )
        context = replace(context, data=replace(context.data, mean=known.mean, std=known.std))
    data = context.data
    network = place(load_network(task.weights, context.config.space, trial, len(data.classes)), context.device)
    splits: list[Split] = [data.train, data.valid, data.test] if task.split == "all" else [getattr(data, task.split)]
    predicted = np.concatenate([context.read_out(network, split, trial.fidelity).predicted for split in splits])
    labels = np.concatenate([split.labels for split in splits])
    return {
        "classes": data.classes,
        "confusion": confusion(labels, predicted, len(data.classes)),
        "device": device_name(context.device),
        "notes": [*data.notes, *data.warnings],
    }
