"""What stays on a worker between tasks: the study, its data and its device, and what is done with these alone."""

from __future__ import annotations

import ctypes
import json
import os
import resource
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from engine import orders
from engine.config import Study, study_from_dict
from engine.data.loader import Batches, eval_batches, train_batches
from engine.data.parts import Data, Part, load, subset
from engine.training import checkpoint
from engine.training.checkpoint import Progress
from engine.training.latency import measure
from engine.training.student import Student
from engine.training.train import accuracies
from engine.trial import Architecture, Drained, Fidelity


@dataclass(frozen=True, eq=False)
class Bench:
    """The study, its data, its device, and what has been learnt of its memory: how many students of a fidelity it
    holds at once, where a cohort was too large. `orders` are its driver's, `costs` are MACs and parameters by
    (architecture, width, resolution)."""

    study: Study
    data: Data
    device: torch.device
    run_dir: Path
    room: dict[Fidelity, int] = field(default_factory=dict)
    orders: Path | None = None
    costs: dict[tuple[Architecture, float, int], tuple[int, int]] = field(default_factory=dict)

    @property
    def threads(self) -> int:
        """Of the loader: beside a GPU the cores that are this worker's, by its supervisor; on a CPU one, as for all."""
        return 1 if self.device.type == "cpu" else int(os.environ.get("MFKD_CORES", "1"))

    def subset(self, fidelity: Fidelity) -> tuple[npt.NDArray[np.int64], int]:
        """Indices of the training images that a fidelity sees, and the batch size: the study's, or all if fewer."""
        indices = subset(self.data.train.labels, fidelity.fraction, self.study.seed)
        return indices, min(self.study.batch_size, len(indices))

    def images(self, fidelity: Fidelity) -> int:
        """How many images a student of a fidelity is trained on, each as often as it is shown."""
        indices, batch_size = self.subset(fidelity)
        return fidelity.epochs * (len(indices) // batch_size) * batch_size

    def resolution(self, fidelity: Fidelity) -> int:
        return fidelity.resolution or self.data.resolution

    def lessons(self, fidelity: Fidelity, seed: int, first_epoch: int = 0) -> Batches:
        """The batches of a training at a fidelity, from an epoch on."""
        indices, batch_size = self.subset(fidelity)
        return train_batches(
            self.data.train,
            indices,
            data=self.data,
            batch_size=batch_size,
            epochs=fidelity.epochs,
            resolution=self.resolution(fidelity),
            seed=seed,
            device=str(self.device),
            backend=self.study.data_backend,
            threads=self.threads,
            first_epoch=first_epoch,
        )

    def scores(self, networks: list[nn.Module], part: Part, fidelity: Fidelity) -> list[float | Exception]:
        """Accuracies (0..1) of networks on one pass over a part of the data, or what one of them raised."""
        if not networks:
            return []
        views = eval_batches(
            part,
            data=self.data,
            batch_size=256,
            resolution=self.resolution(fidelity),
            device=str(self.device),
            backend=self.study.data_backend,
            threads=self.threads,
        )
        return accuracies(networks, views)

    def accuracy(self, network: nn.Module, part: Part, fidelity: Fidelity) -> float:
        """Accuracy (0..1) of one network; raises what it raises."""
        (score,) = self.scores([network], part, fidelity)
        if isinstance(score, Exception):
            raise score
        return score

    def latency_ms(self, network: nn.Module) -> float:
        return measure(network, self.resolution(self.study.high), self.study.latency_batch, self.device)

    def keep(self, path: Path, member: Student, progress: Progress, epochs: int, of: str = "") -> None:
        """Keeps the state of a training of `epochs` epochs; raises Drained where the driver wants no more of it now."""
        checkpoint.save(path, member, progress, of)
        done = progress.epochs
        if done < epochs and self.orders is not None and not orders.working(self.orders):
            raise Drained(f"stopped after epoch {done} of {epochs}; the same command continues")


def open_bench(task: dict[str, Any]) -> Bench:
    """The bench of a task; the last one is kept, so that data are read once."""
    study = json.dumps(task["study"], sort_keys=True)
    return _open_bench(study, task["run_dir"], task["device"], task.get("orders"))


@lru_cache(maxsize=1)
def _open_bench(study_json: str, run_dir: str, device: str, folder: str | None) -> Bench:
    study = study_from_dict(json.loads(study_json))
    data = load(
        study.data,
        seed=study.seed,
        valid_fraction=study.valid_fraction,
        resolution=study.resolution,
        flip=study.flip,
    )
    if device == "cpu":
        torch.set_num_threads(1)  # a worker per core beats threads in a worker (docs/design.md)
        keep_freed_memory()
    return Bench(study, data, torch.device(device), Path(run_dir), orders=Path(folder) if folder else None)


def keep_freed_memory() -> None:
    """Has the C library keep what tensors give back, for the next step's, as torch does by itself on a GPU.

    By default glibc returns blocks of some MB to the kernel at once; a step of MobileNetV2 then takes up to 90,000 page
    faults and a third of its time to get them anew (docs/training.md). Other C libraries are left as they are.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    # M_MMAP_THRESHOLD: bytes from which a block is mapped by itself, 32 MiB at most for older versions. Where that is
    # refused the next must not be set: it would end what glibc adapts by itself.
    if mallopt is not None and (mallopt(-3, 2**30) or mallopt(-3, 2**25)):
        mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD: free bytes at the heap's end that are kept


def device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"


def peak_memory(device: torch.device) -> float:
    """Bytes: of the device's allocator on CUDA, of the whole process (its peak so far) on CPU."""
    if device.type == "cuda":
        return float(torch.cuda.max_memory_allocated(device))
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024.0
