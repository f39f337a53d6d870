"""The state of a training on disk, so that a killed training resumes after its last epoch."""

from __future__ import annotations

import io
import pickle
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from engine.training.student import Student, status_of
from engine.training.weights import atomic_file
from engine.trial import EnvironmentUnusable

SCHEMA = 4


@dataclass(frozen=True)
class Progress:
    """How far a training is: epochs done and, if recorded, the seconds spent."""

    epochs: int = 0
    seconds: float = 0.0


def save(path: Path, student: Student, progress: Progress, key: str = "") -> None:
    """Writes the state of `student` atomically: a crash leaves either the last state or this one. `key` identifies the
    training if the path alone does not."""
    state = {
        "schema": SCHEMA,
        "of": key,
        "epochs": progress.epochs,
        "curve": [list(epoch) for epoch in student.curve],
        "seconds": progress.seconds,
        "network": student.network.state_dict(),
        "objective": student.objective.state_dict(),
        "optimiser": student.optimiser.state_dict(),
        "loss_sum": student.loss_sum,
        "average": student.average,
    }
    with atomic_file(path) as temporary:
        torch.save(state, temporary)


def restore(path: Path, student: Student, key: str = "") -> Progress:
    """Loads the state in a file into a student; returns its progress, which is 0 epochs if there is no file.

    A file that does not fit (another training, another version) is ignored and removed: training from the start gives
    the same result. After an I/O error or out of memory the file may be intact, and worth hours, so these are raised,
    the first as EnvironmentUnusable.
    """
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        return Progress()
    except OSError as error:
        raise EnvironmentUnusable(f"cannot read {path} ({error}); run the command again") from error
    try:
        state = torch.load(io.BytesIO(content), "cpu", weights_only=True)
    except (RuntimeError, EOFError, pickle.UnpicklingError) as error:
        if status_of(error) == "oom":
            raise
        state = {}
    # Everything is compared before anything is loaded: a half-loaded student would be worse than a fresh one.
    fits = _fits(student.network, state.get("network")) and _fits(student.objective, state.get("objective"))
    same = (state.get("schema"), state.get("of")) == (SCHEMA, key)
    if not fits or not same or (state.get("average") is None) != (student.average is None):
        path.unlink()
        return Progress()
    student.network.load_state_dict(state["network"])
    student.objective.load_state_dict(state["objective"])
    student.optimiser.load_state_dict(state["optimiser"])
    student.loss_sum.copy_(state["loss_sum"])
    student.loss_before = float(state["loss_sum"])
    student.curve = [(loss, accuracy) for loss, accuracy in state["curve"]]
    for mine, stored in zip(student.average or [], state.get("average") or [], strict=True):
        mine.copy_(stored)
    return Progress(int(state["epochs"]), float(state["seconds"]))


def _fits(module: nn.Module, stored: dict[str, Tensor] | None) -> bool:
    shapes = {name: value.shape for name, value in module.state_dict().items()}
    return stored is not None and {name: value.shape for name, value in stored.items()} == shapes
