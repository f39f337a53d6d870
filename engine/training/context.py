"""What a worker keeps between tasks (configuration, data, device), and the operations that need only these."""

from __future__ import annotations

import ctypes
import os
import resource
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from pathlib import Path
from typing import get_args

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from engine import stop_files
from engine.config import Runtime, SearchConfig, measures_latency
from engine.data.augment import Augmentation
from engine.data.dataset import Dataset, Split, joined, load, subset
from engine.data.loader import Batches, eval_batches, train_batches
from engine.latency.runtimes import Conditions
from engine.latency.time_probes import quietest, time_in_rounds
from engine.recipes import resolve
from engine.run_folder import RunFolder
from engine.tasks import WorkerSettings
from engine.training import checkpoint
from engine.training.checkpoint import Progress
from engine.training.student import Student
from engine.training.teacher_cache import CachedTeacher
from engine.training.train import Readout, classify, read_out
from engine.trial import Architecture, Drained, Fidelity


@dataclass(frozen=True, eq=False)
class WorkerContext:
    """The configuration (without settings left to auto), its data and its device.

    `max_cohort` records how many students of a fidelity fit into memory at once, for fidelities at which a full cohort
    did not fit; `costs` holds (MACs, parameters) by (architecture, width, resolution). `curves`: trainings also measure
    their validation accuracy after epochs.
    """

    config: SearchConfig
    data: Dataset
    device: torch.device
    folder: RunFolder
    max_cohort: dict[Fidelity, int] = field(default_factory=dict)
    costs: dict[tuple[Architecture, float, int], tuple[int, int]] = field(default_factory=dict)
    curves: bool = False

    @property
    def threads(self) -> int:
        """Threads of the loader: one on a CPU, on a GPU the worker's share of the cores (set by its supervisor)."""
        return 1 if self.device.type == "cpu" else int(os.environ.get("MFKD_CORES", "1"))

    @cached_property
    def train_and_valid(self) -> Split:
        """The training and validation images, kept: a copy of all arrays takes time."""
        return joined(self.data.train, self.data.valid)

    def train_split(self, fidelity: Fidelity) -> Split:
        """The images that trainings of a fidelity draw from."""
        return self.train_and_valid if fidelity.with_valid else self.data.train

    def score_split(self, fidelity: Fidelity) -> Split:
        """The images that trainings of a fidelity are scored on, which they have not seen."""
        return self.data.test if fidelity.with_valid else self.data.valid

    def subset(self, fidelity: Fidelity) -> tuple[npt.NDArray[np.int64], int]:
        """Indices of the training images of a fidelity, and the batch size: as configured, or all images if fewer."""
        indices = subset(self.train_split(fidelity).labels, fidelity.fraction, self.config.seed)
        return indices, min(self.config.batch_size, len(indices))

    def images(self, fidelity: Fidelity) -> int:
        """How many images a training at a fidelity processes, counting repeats."""
        indices, batch_size = self.subset(fidelity)
        return fidelity.epochs * (len(indices) // batch_size) * batch_size

    def resolution(self, fidelity: Fidelity) -> int:
        return fidelity.resolution or self.data.resolution

    def train_batches(self, fidelity: Fidelity, seed: int, first_epoch: int = 0) -> Batches:
        """The batches of a training at a fidelity, starting at an epoch."""
        indices, batch_size = self.subset(fidelity)
        return train_batches(
            self.train_split(fidelity),
            indices,
            data=self.data,
            batch_size=batch_size,
            epochs=fidelity.epochs,
            resolution=self.resolution(fidelity),
            seed=seed,
            device=str(self.device),
            backend=self.config.data_backend,
            threads=self.threads,
            first_epoch=first_epoch,
            augmentation=Augmentation(self.config.augment, self.config.min_crop_area),
        )

    def eval_batches(self, split: Split, fidelity: Fidelity) -> Batches:
        """Each image of a split once, in order, at the resolution of a fidelity."""
        return eval_batches(
            split,
            data=self.data,
            batch_size=256,
            resolution=self.resolution(fidelity),
            device=str(self.device),
            backend=self.config.data_backend,
            threads=self.threads,
        )

    def score(
        self, networks: list[nn.Module], fidelity: Fidelity, teacher: CachedTeacher | None = None
    ) -> list[Readout | Exception]:
        """Readouts of networks in one pass over the split that a fidelity is scored on; the exception instead if a
        network raises.

        Agreement with the teacher is read on the validation split alone, for decisions, and final trainings serve none.
        The teacher sees that split once per worker and resolution.
        """
        if not networks:
            return []
        batches, side = self.eval_batches(self.score_split(fidelity), fidelity), self.resolution(fidelity)
        if teacher is None or fidelity.with_valid:
            return read_out(networks, batches)
        if side not in teacher.classes:
            teacher.classes[side] = classify(teacher.network, batches)
        return read_out(networks, batches, teacher.classes[side])

    def read_out(self, network: nn.Module, split: Split, fidelity: Fidelity) -> Readout:
        """The readout of one network on a split; raises what the network raises."""
        (found,) = read_out([network], self.eval_batches(split, fidelity))
        if isinstance(found, Exception):
            raise found
        return found

    @property
    def latency_conditions(self) -> Conditions:
        """How this run times its networks: at full fidelity's resolution, in the configured batch size and runtime."""
        config, (runtime,) = self.config, [one for one in get_args(Runtime) if one == self.config.latency]
        return Conditions(runtime, self.resolution(config.high), config.latency_batch, self.device)

    def latency_ms(self, network: nn.Module) -> float:
        """Milliseconds of a forward pass; 0 if this run does not time its networks. The network changes its device."""
        if not measures_latency(self.config):
            return 0.0
        (rounds,) = time_in_rounds([self.latency_conditions.ready(lambda: network)])
        return quietest(rounds)

    def save_progress(self, path: Path, student: Student, progress: Progress, epochs: int, key: str = "") -> None:
        """Saves the state of a training of `epochs` epochs; raises Drained if the driver has asked workers to stop."""
        checkpoint.save(path, student, progress, key)
        done = progress.epochs
        if done < epochs and not _work_wanted():
            raise Drained(f"interrupted after epoch {done} of {epochs}; run the same command again to resume")


def _work_wanted() -> bool:
    """Whether this worker's driver still wants it to work; always true outside a worker."""
    folder = os.environ.get("MFKD_STOP_FILES")
    return folder is None or stop_files.work_wanted(Path(folder))


# A probe of the data comes before the configuration has numbers for what is left to auto, so the data have a cache of
# their own.
_cached_data = lru_cache(maxsize=1)(load)


@lru_cache(maxsize=1)
def _open_context(config: SearchConfig, run_dir: Path, device: str, curves: bool) -> WorkerContext:
    data = _cached_data(
        config.data,
        seed=config.seed,
        valid_fraction=config.valid_fraction,
        resolution=config.resolution,
        flip=config.flip,
    )
    if device == "cpu":
        torch.set_num_threads(1)  # a worker per core beats threads in a worker (docs/design.md)
        keep_freed_memory()
    resolved = resolve(config, len(data.train))
    return WorkerContext(resolved, data, torch.device(device), RunFolder(run_dir), curves=curves)


def open_context(settings: WorkerSettings) -> WorkerContext:
    """The context of a task. The last one is cached, so that the data are read only once."""
    return _open_context(settings.config, settings.run_dir, settings.device, settings.curves)


def keep_freed_memory() -> None:
    """Makes the C library keep freed tensor memory for the next step, as torch itself does on a GPU.

    By default glibc returns blocks of a few MB to the kernel at once. A MobileNetV2 step then spends up to 90,000 page
    faults and a third of its time on getting them back (docs/training.md). Other C libraries are left alone.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    # M_MMAP_THRESHOLD: block size from which glibc uses mmap; older versions accept at most 32 MiB. If both values are
    # refused, the trim threshold must stay unset too: setting it would turn off glibc's own adaptation.
    if mallopt is not None and (mallopt(-3, 2**30) or mallopt(-3, 2**25)):
        mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD: free bytes kept at the end of the heap


def device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"


def peak_memory(device: torch.device) -> float:
    """Peak bytes: of the device's allocator on CUDA, of the whole process so far on CPU."""
    if device.type == "cuda":
        return float(torch.cuda.max_memory_allocated(device))
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024.0
