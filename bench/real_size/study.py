"""Short trainings of NAS-Bench-201 cells at the benchmark's own size, to be compared with its 200-epoch accuracies.

`python -m bench.real_size.study FOLDER --shared ../shared/data [--part 0/2] [--cells 64]`

Each cell is trained with every loss of LOSSES before the next one starts, and each training is appended to
FOLDER/trainings.jsonl at once. Stop it at any time, and run the same command again to resume. `--part i/n` takes every
n-th cell from the i-th on, so that n processes share the work. `python -m bench.real_size.conclude` reads the results.
"""

from __future__ import annotations

import argparse
import csv
import gzip
import importlib.util
import json
import os
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.numpy import save_file
from torch import Tensor, nn

from engine.config import SearchConfig, config_at
from engine.data.dataset import IMAGENET_MEAN, IMAGENET_STD, Dataset, Split
from engine.data.loader import eval_batches
from engine.tasks import WorkerSettings
from engine.training import teacher as teachers
from engine.training.context import WorkerContext, open_context
from engine.training.evaluate import build_student
from engine.training.student import prepare
from engine.training.teacher_cache import CachedTeacher
from engine.training.train import Stopwatch, train
from engine.trial import Architecture, Fidelity, Trial

ROOT = Path(__file__).resolve().parents[2]
WINDOW = "nasbench201_cifar10_window.csv.gz"
TRAININGS = "trainings.jsonl"
SEED = 0
# 1,850 of 2,500 training images, which is about 1/27 of CIFAR-10, the paper's lowest fraction.
LOSSES = {
    "no teacher": "none@37/50x10",
    "KD": "kd@37/50x10",
    "KD + attention, weight 10": "kd+at@37/50x10:at_weight=10",
    "KD + attention, weight 1000": "kd+at@37/50x10",
}
SCORED = 1000  # images of each split on which students are scored
# The teacher was trained on the "seen" images, which are from CIFAR-10's training split, and not on the "unseen" ones.
SPLITS = {"seen": "valid", "unseen": "test"}


@dataclass(frozen=True)
class Lab:
    """Shared by all trainings: the data, the teacher, and its logits (SCORED, classes) on the images of each split."""

    context: WorkerContext
    teacher: CachedTeacher
    teacher_logits: dict[str, Tensor]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--shared", type=Path, default=ROOT.parent / "shared" / "data", help="folder of the data")
    parser.add_argument("--cells", type=int, default=64, help="how many cells, in the order drawn with seed 0")
    parser.add_argument("--part", default="0/1", help="i/n: every n-th cell from the i-th on")
    given = parser.parse_args()
    first, step = map(int, given.part.split("/"))
    lab = setup(given.folder, given.shared)
    done = {(line["cell"], line["loss"]) for line in read(given.folder)}
    for cell in drawn(read_window(given.shared), given.cells)[first::step]:
        for loss, spec in LOSSES.items():
            if (cell, loss) not in done:
                found = trained(lab, cell, Fidelity.parse(spec))
                append(given.folder, {"cell": cell, "loss": loss, **found})


def read_window(shared: Path) -> dict[str, dict[str, float]]:
    """The rows of the benchmark's table by cell (six digits, as the space writes its choices)."""
    with gzip.open(shared / WINDOW, "rt") as file:
        rows = list(csv.DictReader(file))
    return {row["ops"]: {key: float(row[key]) for key in ("macs", "params", "val_e12", "test_e200")} for row in rows}


def drawn(window: dict[str, dict[str, float]], count: int) -> list[str]:
    """The first `count` cells of a random order that depends only on SEED."""
    cells = sorted(window)
    return [cells[i] for i in np.random.default_rng(SEED).permutation(len(cells))[:count]]


def read(folder: Path, name: str = TRAININGS) -> list[dict[str, Any]]:
    """The lines of a file of results, without an incomplete last line."""
    path = folder / name
    lines = path.read_text().splitlines(keepends=True) if path.exists() else []
    return [json.loads(line) for line in lines if line.endswith("\n")]


def append(folder: Path, found: dict[str, Any], name: str = TRAININGS) -> None:
    """Appends a line in one write, so that two processes cannot mix theirs; it is on disk when this returns."""
    descriptor = os.open(folder / name, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    try:
        os.write(descriptor, (json.dumps(found) + "\n").encode())
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def setup(folder: Path, shared: Path) -> Lab:
    context, teacher = open_study(folder, shared)
    return Lab(context, teacher, {split: answers(teacher.network, context, split)[0] for split in SPLITS})


def open_study(folder: Path, shared: Path) -> tuple[WorkerContext, CachedTeacher]:
    """The data and the ResNet-56 teacher; the first call unpacks them into `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    unpack_images(folder / "cifar10.npz", shared)
    data = str(folder / "cifar10.npz")
    resident = {"data": data, "data_backend": "resident"}
    config = SearchConfig(space="nasbench201", **resident, valid_fraction=0.5, batch_size=64, seed=SEED)  # type: ignore[arg-type]
    context = open_context(WorkerSettings(config, folder, "cpu"))
    return context, open_teacher(folder / "resnet56.weights.safetensors", context.data, shared)


def unpack_images(path: Path, shared: Path) -> None:
    """Unpacks the images into plain arrays, with the unpacker that comes with them."""
    if path.exists():
        return
    spec = importlib.util.spec_from_file_location("unpack", shared / "unpack.py")
    assert spec is not None
    assert spec.loader is not None
    unpack = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(unpack)
    temporary = path.with_suffix(f".{os.getpid()}.npz")
    np.savez(temporary, **unpack.load(shared / "cifar10_small.npz"))
    temporary.replace(path)


def open_teacher(path: Path, data: Dataset, shared: Path) -> CachedTeacher:
    """The published ResNet-56 (93.4 % on CIFAR-10), with a cache for its outputs on all of this study's batches."""
    if not path.exists():
        stored = np.load(shared / "teacher_c10_resnet56.npz", allow_pickle=False)
        temporary = path.with_suffix(f".{os.getpid()}.safetensors")
        save_file({name: stored[name] for name in stored.files}, temporary)
        temporary.replace(path)
    network = f"{ROOT / 'examples' / 'my_teacher.py'}:resnet56"
    built = teachers.build(network, len(data.classes), data.resolution, weights=path)
    adapted = teachers.renormalised(built, (data.mean, data.std), (IMAGENET_MEAN, IMAGENET_STD))
    return CachedTeacher(teachers.freeze(adapted, torch.device("cpu")), budget=2**31)


def trained(lab: Lab, cell: str, fidelity: Fidelity) -> dict[str, Any]:
    """Trains a cell at a fidelity with the engine's own loop; returns its status, wall seconds by phase, CPU seconds,
    and readouts by split."""
    context, start = lab.context, time.perf_counter()
    trial = Trial(0, Architecture(tuple(map(int, cell))), fidelity, SEED)
    teacher = lab.teacher if fidelity.kd_loss != "none" else None
    network = build_student(context.config, trial, len(context.data.classes))
    side = context.resolution(fidelity)
    example = torch.zeros(2, 3, side, side).contiguous(memory_format=torch.channels_last)
    settings = config_at(context.config, fidelity)
    student = prepare(network, teacher.network if teacher else None, settings, fidelity.kd_loss, example)
    watch, spent = Stopwatch(), time.process_time()
    train([student], teacher, context.train_batches(fidelity, SEED), settings, watch)
    found: dict[str, Any] = {"status": student.status, "error": student.error, "phases": watch.seconds}
    found["cpu_seconds"] = time.process_time() - spent
    if student.status == "ok":
        found |= {name: readout(lab, student.network, name) for name in SPLITS}
    return {**found, "seconds": time.perf_counter() - start, "finished": time.time()}


def readout(lab: Lab, network: nn.Module, split: str) -> dict[str, float]:
    """Means over SCORED images: accuracy, cross entropy, and agreement with the teacher's class."""
    logits, labels = answers(network.eval(), lab.context, split)
    return {
        "accuracy": (logits.argmax(1) == labels).float().mean().item(),
        "cross_entropy": nn.functional.cross_entropy(logits, labels).item(),
        "agreement": (logits.argmax(1) == lab.teacher_logits[split].argmax(1)).float().mean().item(),
    }


@torch.no_grad()
def answers(network: nn.Module, context: WorkerContext, split: str) -> tuple[Tensor, Tensor]:
    """Logits (SCORED, classes) of a network on the first SCORED images of a split, and their labels (SCORED,)."""
    pairs = [(network(pixels)[0], labels) for pixels, labels in views(context, getattr(context.data, SPLITS[split]))]
    return torch.cat([logits for logits, _ in pairs]), torch.cat([labels for _, labels in pairs])


def views(context: WorkerContext, split: Split) -> Iterator[tuple[Tensor, Tensor]]:
    """The first SCORED images of a split, not augmented, with their labels, in batches of 250."""
    assert split.images is not None
    first = Split(split.labels[:SCORED], split.images[:SCORED], None)
    side = context.data.resolution
    for batch in eval_batches(first, data=context.data, batch_size=250, resolution=side, backend="resident"):
        yield batch.images, batch.labels


if __name__ == "__main__":
    main()
