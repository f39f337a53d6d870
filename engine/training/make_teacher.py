"""Makes a teacher's weights file: by training, by fine-tuning pretrained weights, or from a user's weights."""

from __future__ import annotations

import json
import time
from dataclasses import replace
from pathlib import Path

import torch
from torch import nn

from engine.data.dataset import fingerprint
from engine.networks import library
from engine.networks.library import Statistics
from engine.recipes import teacher_config
from engine.run_folder import training_state_of
from engine.tasks import TeacherTask
from engine.training import checkpoint
from engine.training import teacher as teachers
from engine.training.checkpoint import Progress
from engine.training.context import WorkerContext
from engine.training.curves import Curves
from engine.training.observe import observed
from engine.training.student import prepare
from engine.training.train import Stopwatch, train
from engine.trial import Fidelity, NoWinner

# The settings that the training of a teacher depends on, apart from network and data. The others may change on resume.
DEPENDS_ON = (
    *("teacher_epochs", "batch_size", "optimizer", "lr", "backbone_lr_factor", "warmup_fraction", "momentum"),
    *("weight_decay", "label_smoothing", "augment", "min_crop_area", "amp_dtype", "data_backend", "seed"),
)


def make_teacher(context: WorkerContext, task: TeacherTask) -> None:
    """Makes the weights file that a task asks for.

    A library's network that knows the classes of the data, as ImageNet's are known, is not fine-tuned.
    """
    fine_tuned = task.origin == "finetune"
    known = fine_tuned and task.weights is None and library.knows(task.network, context.data.classes)
    if task.origin in ("import", "untrained") or known:
        start = time.perf_counter()
        built, statistics = _start(context, task)
        card = _card(context, task, statistics, time.perf_counter() - start)
        if task.origin == "untrained":  # to be timed: a score would take longer than the timing
            teachers.save(task.path, built, card)
        else:
            _save(context, built, task.path, card)
    else:
        train_teacher(context, task)


def train_teacher(context: WorkerContext, task: TeacherTask) -> None:
    """Trains or fine-tunes a network on the whole training split and saves it at `task.path`.

    Its state is saved next to that file after every epoch; an interrupted training with the same settings resumes from
    it. Raises NoWinner if the training fails.
    """
    start, path, fine_tuned = time.perf_counter(), task.path, task.origin == "finetune"
    context = replace(context, config=teacher_config(context.config, fine_tuned))
    config, data = context.config, context.data
    torch.manual_seed(config.seed)
    built, statistics = _start(context, task)
    network = teachers.renormalised(built, (data.mean, data.std), statistics)
    example = torch.zeros(2, 3, data.resolution, data.resolution, device=context.device)
    backbone = config.backbone_lr_factor if fine_tuned else 1.0
    student = prepare(network, None, config, "none", example, backbone=backbone)
    settings = [getattr(config, name) for name in DEPENDS_ON]
    what = [task.network, task.origin, str(task.weights), fingerprint(data), data.resolution]
    state, key = training_state_of(path), json.dumps([*what, *settings])
    before = checkpoint.restore(state, student, key)
    batches = context.train_batches(Fidelity("teacher", epochs=config.teacher_epochs), config.seed, before.epochs)
    with observed(context.folder, "teacher") as observer:
        curves = Curves(context, [student], Fidelity("teacher"), observer)

        def after_epoch(epochs: int) -> None:
            curves.after_epoch()
            progress = Progress(epochs, before.seconds + time.perf_counter() - start)
            context.save_progress(state, student, progress, config.teacher_epochs, key)

        train([student], None, batches, config, Stopwatch(), after_epoch, task.worker.resources.execution, observer)
    if student.status != "ok":
        state.unlink(missing_ok=True)
        raise NoWinner(f"the teacher's training failed: {student.error}; try a lower --lr")
    card = _card(context, task, statistics, before.seconds + time.perf_counter() - start)
    losses, accuracies = (tuple(part) for part in zip(*student.curve, strict=True))
    _save(context, built, path, replace(card, epochs=config.teacher_epochs, losses=losses, accuracies=accuracies))
    state.unlink(missing_ok=True)


def _start(context: WorkerContext, task: TeacherTask) -> tuple[nn.Module, Statistics]:
    """The network before its training, and the mean and std of the images that it takes.

    A library's network takes images as its weights know them. The largest member of a space takes those of the data,
    like the members that will inherit from it: BatchNorm adapts to the difference in the first steps.
    """
    data, fine_tuned = context.data, task.origin == "finetune"
    built = teachers.build(task.network, len(data.classes), data.resolution, fine_tuned, task.weights)
    known = library.normalisation(task.network) if fine_tuned else None
    mean, std = known or (data.mean, data.std)
    return built, (task.mean or mean, task.std or std)


def _card(context: WorkerContext, task: TeacherTask, statistics: Statistics, seconds: float) -> teachers.Card:
    """The card of a teacher that takes images normalised by `statistics`, before it is scored."""
    data, (mean, std) = context.data, statistics
    return teachers.Card(
        network=task.network,
        classes=data.classes,
        data=data.name,
        fingerprint=fingerprint(data),
        resolution=data.resolution,
        mean=mean,
        std=std,
        epochs=0,
        accuracy=0.0,
        seconds=seconds,
    )


def _save(context: WorkerContext, built: nn.Module, path: Path, card: teachers.Card) -> None:
    """Scores a teacher on the validation split and saves it with its card."""
    data, start = context.data, time.perf_counter()
    adapted = teachers.renormalised(built, (data.mean, data.std), (card.mean, card.std))
    accuracy = context.read_out(teachers.freeze(adapted, context.device), data.valid, Fidelity("teacher")).accuracy
    seconds = card.seconds + time.perf_counter() - start
    teachers.save(path, built, replace(card, accuracy=accuracy, seconds=seconds))
