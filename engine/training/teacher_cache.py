"""A frozen teacher and a cache of its outputs, shared by all cohorts that train on the same batches."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Collection, Hashable
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from engine.data.batches import Batches
from engine.training.distill import FeatureKey, TeacherOutput, teacher_output
from engine.training.student import autocast

# Outputs are cached on the device, unless the budget is more than this share of its memory: then on the host.
DEVICE_SHARE = 1 / 8


@dataclass
class CachedTeacher:
    """A frozen network and its outputs, up to `budget` bytes (0: no cache).

    A batch depends only on the seed, the step and the subset of images, and every cohort of a search asks for the same
    steps. The cache therefore keeps what came first: under repeated passes over steps 0..n-1, a cache that evicts the
    oldest entry has always just evicted the next one wanted. A run may use several losses in turn, and the outputs for
    one may be hundreds of times larger than those for another. If the cache is full, an output therefore replaces a
    larger one, but never a smaller one.
    """

    network: nn.Module
    budget: int = 0
    cache: dict[Hashable, TeacherOutput] = field(default_factory=dict)
    bytes: int = 0
    keys_by_size: dict[int, list[Hashable]] = field(default_factory=dict)  # size in bytes -> keys in `cache`
    classes: dict[int, Tensor] = field(default_factory=dict)  # resolution -> its class (n,) of each validation image

    def outputs_for(
        self, batches: Batches, feature_keys: Collection[FeatureKey]
    ) -> Callable[[int, Tensor], TeacherOutput]:
        """The function (step, images of that step (N, 3, R, R)) -> teacher's output, for a training on `batches`."""
        training = (*_identity(batches), tuple(sorted(feature_keys)))
        on_host = batches.device.type == "cuda" and self.budget > DEVICE_SHARE * _memory(batches.device)

        def output_at(step: int, images: Tensor) -> TeacherOutput:
            key = (*training, step, images.dtype)
            cached = self.cache.get(key)
            if cached is not None:
                return cached.map(lambda tensor: tensor.to(images.device, non_blocking=True))
            output = self.ask(images, feature_keys)
            size = sum(tensor.nbytes for tensor in output.tensors)
            if self._make_room(size):
                self.cache[key] = output.map(_pinned) if on_host else output
                self.keys_by_size.setdefault(size, []).append(key)
                self.bytes += size
            return output

        return output_at

    def ask(self, images: Tensor, feature_keys: Collection[FeatureKey]) -> TeacherOutput:
        """The output for images (N, 3, R, R), which is not cached."""
        with torch.no_grad(), autocast(images):
            return teacher_output(self.network(images), feature_keys)

    def _make_room(self, size: int) -> bool:
        """Whether `size` bytes fit, if necessary after evicting one of the largest outputs (only if it is larger)."""
        largest = max(self.keys_by_size, default=0)
        if self.bytes + size > self.budget and size < largest:
            keys = self.keys_by_size[largest]
            del self.cache[keys.pop()]
            self.bytes -= largest
            if not keys:
                del self.keys_by_size[largest]
        return self.bytes + size <= self.budget


def _identity(batches: Batches) -> tuple[Hashable, ...]:
    """Everything that the images of a step depend on, within one data set. The first and last epoch do not matter."""
    indices = b"" if batches.indices is None else batches.indices.tobytes()
    images = len(batches.split), hashlib.sha256(indices).digest()  # the length tells train from train with valid
    return *images, batches.seed, batches.batch_size, batches.resolution, batches.source, batches.augmentation


def _pinned(tensor: Tensor) -> Tensor:
    """A copy in pinned host memory, queued on the current stream."""
    return torch.empty_like(tensor, device="cpu", pin_memory=True).copy_(tensor, non_blocking=True)


def _memory(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).total_memory
