"""How the file of a teacher comes to be: trained here, taken from a library, or adopted from a user's weights."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import torch
from torch import nn

from engine.config import Resources
from engine.data.parts import fingerprint
from engine.training import checkpoint
from engine.training import teacher as teachers
from engine.training.checkpoint import Progress
from engine.training.student import prepare
from engine.training.teacher import Statistics
from engine.training.train import Stopwatch, train
from engine.training.workbench import Bench
from engine.trial import Fidelity, NoWinner

# Of a study, what the training of a teacher depends on beside network and data. Others may change on the way.
DEPENDS_ON = ("teacher_epochs", "batch_size", "lr", "momentum", "weight_decay", "amp_dtype", "data_backend", "seed")


def train_teacher(bench: Bench, network: str, path: Path, resources: Resources) -> None:
    """Trains a network on the whole training part and saves it at `path`.

    Its state is kept beside that file after every epoch: a training that was stopped goes on there, if what it depends
    on is the same. Raises NoWinner where it fails.
    """
    start, study, data = time.perf_counter(), bench.study, bench.data
    torch.manual_seed(study.seed)
    built = teachers.build(network, len(data.classes), data.resolution, False)
    example = torch.zeros(2, 3, data.resolution, data.resolution, device=bench.device)
    pupil = prepare(built, None, study, "none", example)
    settings = [getattr(study, name) for name in DEPENDS_ON]
    state, of = path.with_suffix(".state.pt"), json.dumps([network, fingerprint(data), data.resolution, *settings])
    before = now = checkpoint.restore(state, pupil, of)
    batches = bench.lessons(Fidelity("teacher", epochs=study.teacher_epochs), study.seed, before.epochs)
    total = pupil.loss_sum.item()

    def keep(epochs: int) -> None:
        nonlocal now, total
        last, total = total, pupil.loss_sum.item()
        losses = (*now.losses, (total - last) / batches.steps_per_epoch)
        now = Progress(epochs, losses, before.seconds + time.perf_counter() - start)
        bench.keep(state, pupil, now, study.teacher_epochs, of)

    train([pupil], None, batches, study, Stopwatch(), keep, resources.execution)
    if pupil.status != "ok":
        state.unlink(missing_ok=True)
        raise NoWinner(f"the teacher's training failed: {pupil.error}; try a lower --lr")
    seconds = before.seconds + time.perf_counter() - start
    _save(bench, built, network, path, (data.mean, data.std), seconds, study.teacher_epochs, now.losses)
    state.unlink(missing_ok=True)


def fetch_teacher(bench: Bench, network: str, path: Path) -> None:
    """Saves a library's network with the weights that the library has for it at `path`."""
    start, data = time.perf_counter(), bench.data
    built = teachers.build(network, len(data.classes), data.resolution, True)
    statistics = teachers.normalisation(network) or (data.mean, data.std)
    _save(bench, built, network, path, statistics, time.perf_counter() - start)


def adopt_teacher(bench: Bench, task: dict[str, Any], path: Path) -> None:
    """Saves the weights in the file task["weights"] of task["network"] at `path`; task["mean"] and task["std"], where
    given, are those of the images that it knows."""
    start, data = time.perf_counter(), bench.data
    built = teachers.build(task["network"], len(data.classes), data.resolution, weights=Path(task["weights"]))
    statistics = tuple(task.get("mean") or data.mean), tuple(task.get("std") or data.std)
    _save(bench, built, task["network"], path, statistics, time.perf_counter() - start)


def _save(
    bench: Bench,
    built: nn.Module,
    network: str,
    path: Path,
    statistics: Statistics,
    seconds: float,
    epochs: int = 0,
    losses: tuple[float, ...] = (),
) -> None:
    """Scores a teacher on the validation part and saves it with its card."""
    data, (mean, std), start = bench.data, statistics, time.perf_counter()
    asked = teachers.freeze(teachers.renormalised(built, (data.mean, data.std), statistics), bench.device)
    card = teachers.Card(
        network=network,
        classes=data.classes,
        data=data.name,
        fingerprint=fingerprint(data),
        resolution=data.resolution,
        mean=mean,
        std=std,
        epochs=epochs,
        accuracy=bench.accuracy(asked, data.valid, Fidelity("teacher")),
        seconds=seconds + time.perf_counter() - start,
        losses=losses,
    )
    teachers.save(path, built, card)
