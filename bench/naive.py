"""A training script's usual loop, and its common set-up with ours, for bench_students.py and gpu_parts.py."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import DataLoader
from torch.utils.data import Dataset as TorchDataset
from torchvision.transforms import v2

from bench.bench_kernels import repdistiller_nst
from engine.config import SearchConfig
from engine.data.dataset import Dataset, Split, fingerprint, subset
from engine.run_folder import RunFolder
from engine.spaces.load import load_space
from engine.training import teacher as teachers
from engine.training.context import WorkerContext, keep_freed_memory
from engine.training.distill import Output, pair
from engine.training.evaluate import build_student
from engine.training.train import learning_rate
from engine.trial import Architecture, Fidelity, KDLoss, Trial
from kernels.functional import pooled

CUDA = torch.cuda.is_available()
DEVICE = torch.device("cuda" if CUDA else "cpu")
ROOT = Path(__file__).resolve().parent.parent
TEACHER = f"{ROOT / 'examples' / 'my_teacher.py'}:resnet56"


@dataclass(frozen=True)
class BenchCase:
    """What both sides share: data, teacher, space and settings."""

    context: WorkerContext
    teacher_file: Path

    @property
    def low(self) -> Fidelity:
        return self.context.config.low

    def trials(self, count: int) -> list[Trial]:
        """Architectures drawn from the space, the same in every run."""
        choices, rng = load_space(self.context.config.space).choices, np.random.default_rng(0)
        drawn = [tuple(int(rng.integers(len(choice.options))) for choice in choices) for _ in range(count)]
        seed = self.context.config.seed
        return [Trial(number, Architecture(one), self.low, seed) for number, one in enumerate(drawn)]


def noise(train: int, valid: int) -> Dataset:
    """Noise with CIFAR-100's image size and number of classes: the content of images does not affect speed."""
    rng = np.random.default_rng(0)
    splits = [
        Split(np.arange(n) % 100, rng.integers(0, 256, (n, 32, 32, 3), dtype=np.uint8), None)
        for n in (train, valid)
    ]
    return Dataset("noise", *splits, splits[1], tuple(map(str, range(100))), (0.5,) * 3, (0.25,) * 3, 32, flip=True)


def setup(folder: Path, data: Dataset, low: Fidelity, space: str = "mobilenetv2", lr: float = 0.05) -> BenchCase:
    config = SearchConfig(space=space, low=low, batch_size=64, lr=lr, data_backend="resident" if CUDA else "dali")
    torch.manual_seed(0)
    card = teachers.Card(
        TEACHER, data.classes, data.name, fingerprint(data), data.resolution, data.mean, data.std, 0, 0.0, 0.0
    )
    path = folder / "teacher.safetensors"
    teachers.save(path, teachers.build(TEACHER, len(data.classes), data.resolution), card)
    torch.set_num_threads(1)
    if not CUDA:
        keep_freed_memory()  # like a worker
    return BenchCase(WorkerContext(config, data, DEVICE, RunFolder(folder)), path)


# ---- the naive loop ------------------------------------------------------------------------------------


class Images(TorchDataset[tuple[Tensor, int]]):
    """One image at a time, as in every tutorial."""

    def __init__(self, split: Split, rows: Any, data: Dataset, training: bool) -> None:
        assert split.images is not None
        self.images = torch.from_numpy(split.images[rows]).permute(0, 3, 1, 2)
        self.labels = split.labels[rows].tolist()
        crop = [v2.RandomCrop(32, padding=4), v2.RandomHorizontalFlip()] if training else []
        self.transform = v2.Compose([*crop, v2.ToDtype(torch.float32, scale=True), v2.Normalize(data.mean, data.std)])

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, i: int) -> tuple[Tensor, int]:
        return self.transform(self.images[i]), self.labels[i]


def naive_loss(config: SearchConfig, kd_loss: KDLoss, student: Output, teacher: Output, labels: Tensor) -> Tensor:
    """RepDistiller's sums: gamma CE + alpha KL T^2 (+ beta NST over the stages)."""
    (s, mine), (t, theirs), temperature = student, teacher, config.kd_temperature
    loss = config.ce_weight * F.cross_entropy(s, labels)
    if "kd" in kd_loss:
        soft = F.kl_div(F.log_softmax(s / temperature, 1), F.softmax(t / temperature, 1), reduction="sum")
        loss = loss + config.kd_weight * soft * temperature**2 / len(s)
    if "nst" in kd_loss:
        for i, j in pair([f.shape for f in mine], [f.shape for f in theirs]):
            loss = loss + config.nst_weight * repdistiller_nst(*pooled(mine[i], theirs[j]))
    return loss


def naive(at: BenchCase, trial: Trial, epochs: int | None = None) -> float:
    """Trains one student alone and returns its validation accuracy."""
    config, data, fidelity = at.context.config, at.context.data, trial.fidelity
    rows = subset(data.train.labels, fidelity.fraction, config.seed)
    workers = 4 if CUDA else 0
    train = DataLoader(
        Images(data.train, rows, data, True), config.batch_size, shuffle=True, drop_last=True, num_workers=workers,
        pin_memory=CUDA, persistent_workers=workers > 0,
    )  # fmt: skip
    valid = DataLoader(Images(data.valid, slice(None), data, False), 256, num_workers=workers, pin_memory=CUDA)
    teacher = teachers.load(at.teacher_file).to(DEVICE).eval()
    network = build_student(config, trial, len(data.classes)).to(DEVICE)
    optimiser = torch.optim.SGD(
        network.parameters(), config.lr, momentum=config.momentum, weight_decay=config.weight_decay, nesterov=True
    )
    steps, step, total = fidelity.epochs * len(train), 0, 0.0
    for _ in range(epochs or fidelity.epochs):
        for images, labels in train:
            images, labels = images.to(DEVICE, non_blocking=True), labels.to(DEVICE, non_blocking=True)
            optimiser.param_groups[0]["lr"] = learning_rate(config.lr, step, steps)
            with torch.no_grad():
                teacher_output = teacher(images)
            loss = naive_loss(config, fidelity.kd_loss, network(images), teacher_output, labels)
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
