"""The state of a student in training on disk, so that a killed training goes on at its last epoch."""

from __future__ import annotations

import io
import pickle
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from engine.training.student import Student, status_of
from engine.training.weights import aside
from engine.trial import EnvironmentUnusable

SCHEMA = 2


@dataclass(frozen=True)
class Progress:
    """How far a training is: epochs behind it; where they are kept, the mean loss of each, and the seconds spent."""

    epochs: int = 0
    losses: tuple[float, ...] = ()
    seconds: float = 0.0


def save(path: Path, member: Student, progress: Progress, of: str = "") -> None:
    """Writes what `member` is by now, aside first, so that a crash leaves the last state or this one. `of` names the
    training, where the path alone does not."""
    state = {
        "schema": SCHEMA,
        "of": of,
        "epochs": progress.epochs,
        "losses": list(progress.losses),
        "seconds": progress.seconds,
        "network": member.network.state_dict(),
        "objective": member.objective.state_dict(),
        "optimiser": member.optimiser.state_dict(),
        "loss_sum": member.loss_sum,
        "average": member.average,
    }
    with aside(path) as partial:
        torch.save(state, partial)


def restore(path: Path, member: Student, of: str = "") -> Progress:
    """Puts a student into the state of a file; returns how far that is, nothing where there is no file.

    A file that does not fit (of another training, or another version's) counts as none and is removed: training from
    the start gives the same end. Raises EnvironmentUnusable where a file cannot be read now, and what says that memory
    ran out: it may be whole, and worth hours.
    """
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        return Progress()
    except OSError as error:
        raise EnvironmentUnusable(f"{path} cannot be read now ({error}); repeat the command") from error
    try:
        state = torch.load(io.BytesIO(content), "cpu", weights_only=True)
    except (RuntimeError, EOFError, pickle.UnpicklingError) as error:
        if status_of(error) == "oom":
            raise
        state = {}
    # All is compared before anything is loaded: a student that is half of another would be worse than a fresh one.
    fits = _fits(member.network, state.get("network")) and _fits(member.objective, state.get("objective"))
    same = (state.get("schema"), state.get("of"), state.get("average") is None) == (SCHEMA, of, member.average is None)
    if not fits or not same:
        path.unlink()
        return Progress()
    member.network.load_state_dict(state["network"])
    member.objective.load_state_dict(state["objective"])
    member.optimiser.load_state_dict(state["optimiser"])
    member.loss_sum.copy_(state["loss_sum"])
    for mine, stored in zip(member.average or [], state.get("average") or [], strict=True):
        mine.copy_(stored)
    return Progress(int(state["epochs"]), tuple(state["losses"]), float(state["seconds"]))


def _fits(module: nn.Module, stored: dict[str, Tensor] | None) -> bool:
    shapes = {name: value.shape for name, value in module.state_dict().items()}
    return stored is not None and {name: value.shape for name, value in stored.items()} == shapes
