"""Makes a teacher's weights file: by training, from a library, or from a user's weights."""

from __future__ import annotations

import json
import time
from pathlib import Path

import torch
from torch import nn

from engine.config import Resources
from engine.data.dataset import fingerprint
from engine.networks import library
from engine.networks.library import Statistics
from engine.run_folder import training_state_of
from engine.tasks import TeacherTask
from engine.training import checkpoint
from engine.training import teacher as teachers
from engine.training.checkpoint import Progress
from engine.training.context import WorkerContext
from engine.training.student import prepare
from engine.training.train import Stopwatch, train
from engine.trial import Fidelity, NoWinner

# The settings that the training of a teacher depends on, apart from network and data. The others may change on resume.
DEPENDS_ON = ("teacher_epochs", "batch_size", "lr", "momentum", "weight_decay", "amp_dtype", "data_backend", "seed")


def train_teacher(context: WorkerContext, network: str, path: Path, resources: Resources) -> None:
    """Trains a network on the whole training split and saves it at `path`.

    Its state is saved next to that file after every epoch; an interrupted training with the same settings resumes from
    it. Raises NoWinner if the training fails.
    """
    start, config, data = time.perf_counter(), context.config, context.data
    torch.manual_seed(config.seed)
    built = teachers.build(network, len(data.classes), data.resolution)
    example = torch.zeros(2, 3, data.resolution, data.resolution, device=context.device)
    student = prepare(built, None, config, "none", example)
    settings = [getattr(config, name) for name in DEPENDS_ON]
    state, key = training_state_of(path), json.dumps([network, fingerprint(data), data.resolution, *settings])
    before = now = checkpoint.restore(state, student, key)
    batches = context.train_batches(Fidelity("teacher", epochs=config.teacher_epochs), config.seed, before.epochs)
    total = student.loss_sum.item()

    def save(epochs: int) -> None:
        nonlocal now, total
        last, total = total, student.loss_sum.item()
        losses = (*now.losses, (total - last) / batches.steps_per_epoch)
        now = Progress(epochs, losses, before.seconds + time.perf_counter() - start)
        context.save_progress(state, student, now, config.teacher_epochs, key)

    train([student], None, batches, config, Stopwatch(), save, resources.execution)
    if student.status != "ok":
        state.unlink(missing_ok=True)
        raise NoWinner(f"the teacher's training failed: {student.error}; try a lower --lr")
    seconds = before.seconds + time.perf_counter() - start
    _save(context, built, network, path, (data.mean, data.std), seconds, config.teacher_epochs, now.losses)
    state.unlink(missing_ok=True)


def fetch_teacher(context: WorkerContext, network: str, path: Path) -> None:
    """Saves a library's network with the library's pretrained weights at `path`."""
    start, data = time.perf_counter(), context.data
    built = teachers.build(network, len(data.classes), data.resolution, pretrained=True)
    statistics = library.normalisation(network) or (data.mean, data.std)
    _save(context, built, network, path, statistics, time.perf_counter() - start)


def import_teacher(context: WorkerContext, task: TeacherTask) -> None:
    """Saves a network with the weights from a user's file; see TeacherTask."""
    start, data = time.perf_counter(), context.data
    built = teachers.build(task.network, len(data.classes), data.resolution, weights=task.weights)
    statistics = task.mean or data.mean, task.std or data.std
    _save(context, built, task.network, task.path, statistics, time.perf_counter() - start)


def _save(
    context: WorkerContext,
    built: nn.Module,
    network: str,
    path: Path,
    statistics: Statistics,
    seconds: float,
    epochs: int = 0,
    losses: tuple[float, ...] = (),
) -> None:
    """Scores a teacher on the validation split and saves it with its card."""
    data, (mean, std), start = context.data, statistics, time.perf_counter()
    frozen = teachers.freeze(teachers.renormalised(built, (data.mean, data.std), statistics), context.device)
    card = teachers.Card(
        network=network,
        classes=data.classes,
        data=data.name,
        fingerprint=fingerprint(data),
        resolution=data.resolution,
        mean=mean,
        std=std,
        epochs=epochs,
        accuracy=context.accuracy(frozen, data.valid, Fidelity("teacher")),
        seconds=seconds + time.perf_counter() - start,
        losses=losses,
    )
    teachers.save(path, built, card)
