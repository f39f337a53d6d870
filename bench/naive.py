"""The loop that a training script has, and what it has in common with ours; for bench_students.py and gpu_parts.py."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms import v2

from bench.bench_kernels import repdistiller_nst
from engine.config import Study
from engine.data.parts import Data, Part, fingerprint, subset
from engine.space import load_space
from engine.training import teacher as teachers
from engine.training.distill import Output, pair
from engine.training.evaluate import build_student
from engine.training.train import learning_rate
from engine.training.workbench import Bench, keep_freed_memory
from engine.trial import Architecture, Fidelity, KDLoss, Trial
from kernels.functional import pooled

CUDA = torch.cuda.is_available()
DEVICE = torch.device("cuda" if CUDA else "cpu")
ROOT = Path(__file__).resolve().parent.parent
TEACHER = f"{ROOT / 'bench' / 'cifar_resnet.py'}:space#3"  # ResNet-56


@dataclass(frozen=True)
class Ground:
    """What both sides stand on: the same data, the same teacher, the same space and settings."""

    bench: Bench
    teacher_file: Path

    @property
    def low(self) -> Fidelity:
        return self.bench.study.low

    def trials(self, count: int) -> list[Trial]:
        """Architectures drawn from the space, the same in every run."""
        choices, rng = load_space(self.bench.study.space).choices, np.random.default_rng(0)
        drawn = [tuple(int(rng.integers(len(choice.options))) for choice in choices) for _ in range(count)]
        return [Trial(number, Architecture(one), self.low, self.bench.study.seed) for number, one in enumerate(drawn)]


def noise(train: int, valid: int) -> Data:
    """Images of CIFAR-100's size and number of classes: what they show makes no difference to how long it takes."""
    rng = np.random.default_rng(0)
    parts = [
        Part(np.arange(n) % 100, rng.integers(0, 256, (n, 32, 32, 3), dtype=np.uint8), None)
        for n in (train, valid)
    ]
    return Data("noise", *parts, parts[1], tuple(map(str, range(100))), (0.5,) * 3, (0.25,) * 3, 32, flip=True)


def ground(folder: Path, data: Data, low: Fidelity, space: str = "mobilenetv2", lr: float = 0.05) -> Ground:
    study = Study(space=space, low=low, batch_size=64, lr=lr, data_backend="resident" if CUDA else "dali")
    torch.manual_seed(0)
    card = teachers.Card(
        TEACHER, data.classes, data.name, fingerprint(data), data.resolution, data.mean, data.std, 0, 0.0, 0.0
    )
    path = folder / "teacher.safetensors"
    teachers.save(path, teachers.build(TEACHER, len(data.classes), data.resolution), card)
    torch.set_num_threads(1)
    if not CUDA:
        keep_freed_memory()  # as a worker does
    return Ground(Bench(study, data, DEVICE, folder), path)


# ---- the naive loop ------------------------------------------------------------------------------------


class Images(Dataset[tuple[Tensor, int]]):
    """One image at a time, as every tutorial has it."""

    def __init__(self, part: Part, rows: Any, data: Data, training: bool) -> None:
        assert part.images is not None
        self.images, self.labels = torch.from_numpy(part.images[rows]).permute(0, 3, 1, 2), part.labels[rows].tolist()
        crop = [v2.RandomCrop(32, padding=4), v2.RandomHorizontalFlip()] if training else []
        self.transform = v2.Compose([*crop, v2.ToDtype(torch.float32, scale=True), v2.Normalize(data.mean, data.std)])

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, i: int) -> tuple[Tensor, int]:
        return self.transform(self.images[i]), self.labels[i]


def naive_loss(study: Study, kd_loss: KDLoss, student: Output, teacher: Output, labels: Tensor) -> Tensor:
    """RepDistiller's sums: gamma CE + alpha KL T^2 (+ beta NST over the stages)."""
    (s, mine), (t, theirs), temperature = student, teacher, study.kd_temperature
    loss = study.ce_weight * F.cross_entropy(s, labels)
    if "kd" in kd_loss:
        soft = F.kl_div(F.log_softmax(s / temperature, 1), F.softmax(t / temperature, 1), reduction="sum")
        loss = loss + study.kd_weight * soft * temperature**2 / len(s)
    if "nst" in kd_loss:
        for i, j in pair([f.shape for f in mine], [f.shape for f in theirs]):
            loss = loss + study.nst_weight * repdistiller_nst(*pooled(mine[i], theirs[j]))
    return loss


def naive(at: Ground, trial: Trial, epochs: int | None = None) -> float:
    """Validation accuracy after one student's training, alone."""
    study, data, fidelity = at.bench.study, at.bench.data, trial.fidelity
    rows = subset(data.train.labels, fidelity.fraction, study.seed)
    workers = 4 if CUDA else 0
    train = DataLoader(
        Images(data.train, rows, data, True), study.batch_size, shuffle=True, drop_last=True, num_workers=workers,
        pin_memory=CUDA, persistent_workers=workers > 0,
    )  # fmt: skip
    valid = DataLoader(Images(data.valid, slice(None), data, False), 256, num_workers=workers, pin_memory=CUDA)
    teacher = teachers.load(at.teacher_file).to(DEVICE).eval()
    network = build_student(study, trial, len(data.classes)).to(DEVICE)
    optimiser = torch.optim.SGD(
        network.parameters(), study.lr, momentum=study.momentum, weight_decay=study.weight_decay, nesterov=True
    )
    steps, step, total = fidelity.epochs * len(train), 0, 0.0
    for _ in range(epochs or fidelity.epochs):
        for images, labels in train:
            images, labels = images.to(DEVICE, non_blocking=True), labels.to(DEVICE, non_blocking=True)
            optimiser.param_groups[0]["lr"] = learning_rate(study.lr, step, steps)
            with torch.no_grad():
                taught = teacher(images)
            loss = naive_loss(study, fidelity.kd_loss, network(images), taught, labels)
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            total, step = total + loss.item(), step + 1
    network.eval()
    right = 0
    with torch.no_grad():
        for images, labels in valid:
            right += int((network(images.to(DEVICE))[0].argmax(1).cpu() == labels).sum())
    return right / len(data.valid)


# ---- ours ----------------------------------------------------------------------------------------------
