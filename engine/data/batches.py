"""What a loader yields, and the schedule that every backend follows: which images make up which step."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from engine.data import augment
from engine.data.augment import Augmentation
from engine.data.dataset import Dataset, Split


@dataclass(frozen=True)
class Batch:
    """`images` (N, 3, R, R), normalised, in channels_last memory: float32 on the CPU, float16 on CUDA.

    `labels` (N,) int64; `indices` (N,) int64, positions in the split. Treat them as read-only: the synthetic backend
    yields the same buffer in every step.
    """

    images: Tensor
    labels: Tensor
    indices: Tensor


@dataclass(frozen=True)
class Batches:
    """The batches of `train_batches` or `eval_batches`. `len()` is in steps; they can be iterated more than once.

    Step s of an iteration is step s % steps_per_epoch of epoch first_epoch + s // steps_per_epoch.
    """

    split: Split
    data: Dataset
    batch_size: int
    resolution: int
    device: torch.device
    source: Callable[[Batches], Iterator[Batch]]
    threads: int = 1
    indices: NDArray[np.int64] | None = None  # None: every image in order, without augmentation
    seed: int = 0
    first_epoch: int = 0
    epochs: int = 1
    augmentation: Augmentation = Augmentation()

    @property
    def steps_per_epoch(self) -> int:
        if self.indices is None:
            return -(-len(self.split) // self.batch_size)
        return len(self.indices) // self.batch_size

    def __len__(self) -> int:
        return self.steps_per_epoch * (self.epochs - self.first_epoch)

    def __iter__(self) -> Iterator[Batch]:
        return self.source(self)

    def at(self, step: int) -> tuple[int, NDArray[np.int64]]:
        """The epoch of a step (step 0 is in `first_epoch`), and the positions of its images in the split (N,)."""
        epoch, index = divmod(step, self.steps_per_epoch)
        which = slice(index * self.batch_size, (index + 1) * self.batch_size)
        if self.indices is None:
            return 0, np.arange(len(self.split))[which]
        epoch += self.first_epoch
        return epoch, self.indices[augment.permutation(self.seed, epoch, len(self.indices))[which]]


def to_batch(images: Tensor, split: Split, rows: NDArray[np.int64]) -> Batch:
    """HWC images as a Batch, without a copy: a permuted view of HWC memory is channels_last."""
    device = images.device
    labels = torch.from_numpy(split.labels[rows])
    if device.type == "cuda":
        labels = labels.pin_memory().to(device, non_blocking=True)
    return Batch(images.permute(0, 3, 1, 2), labels, torch.from_numpy(rows))


def shorter_side(resolution: int) -> int:
    """Pixels of the shorter side of an image file before its centre crop to `resolution` pixels: 256 for 224.

    An even number more, so that the crop is exact.
    """
    return resolution + 2 * round(resolution / 14)


def image_dtype(device: torch.device) -> torch.dtype:
    """The dtype of `Batch.images` on `device`."""
    return torch.float16 if device.type == "cuda" else torch.float32
