"""What a teacher says of each batch: asked once for a cohort, and kept for the next cohort that sees the same batch."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Collection, Hashable
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from engine.data.batches import Batches
from engine.training.distill import Lesson, Tap, lesson
from engine.training.student import autocast

# On a device the lessons stay where they are needed, unless they may take more than this part of its memory.
DEVICE_SHARE = 1 / 8


@dataclass
class Teacher:
    """A frozen network and what it said, up to `budget` bytes (0: nothing is kept).

    What a batch holds depends on (seed, epoch, place in the epoch) and the subset alone, and a search asks for the same
    steps with every cohort. So what is kept is what came first: of steps 0..n-1 asked again and again, a cache that
    drops the oldest would hold none by the time it is asked for. A study has several losses in turn, and the lessons of
    one may be hundreds of times another's: in want of room a lesson replaces a larger one, and never the other way.
    """

    network: nn.Module
    budget: int = 0
    kept: dict[Hashable, Lesson] = field(default_factory=dict)
    bytes: int = 0
    sizes: dict[int, list[Hashable]] = field(default_factory=dict)  # in bytes -> what is kept of that size

    def course(self, batches: Batches, taps: Collection[Tap]) -> Callable[[int, Tensor], Lesson]:
        """The function (step, its images (N, 3, R, R)) -> lesson, for the training on `batches`."""
        place = (*_identity(batches), tuple(sorted(taps)))
        onto_host = batches.device.type == "cuda" and self.budget > DEVICE_SHARE * _memory(batches.device)

        def at(step: int, images: Tensor) -> Lesson:
            key = (*place, step, images.dtype)
            known = self.kept.get(key)
            if known is not None:
                return _map(lambda tensor: tensor.to(images.device, non_blocking=True), known)
            answer = self.say(images, taps)
            size = sum(tensor.nbytes for tensor in (answer[0], *answer[1].values()))
            if self._make_room(size):
                self.kept[key] = _map(_pinned, answer) if onto_host else answer
                self.sizes.setdefault(size, []).append(key)
                self.bytes += size
            return answer

        return at

    def say(self, images: Tensor, taps: Collection[Tap]) -> Lesson:
        """What it says of images (N, 3, R, R), without keeping that."""
        with torch.no_grad(), autocast(images):
            return lesson(self.network(images), taps)

    def _make_room(self, size: int) -> bool:
        """Whether so many bytes can be kept, at need in place of one of the largest lessons, if that is larger."""
        largest = max(self.sizes, default=0)
        if self.bytes + size > self.budget and size < largest:
            keys = self.sizes[largest]
            del self.kept[keys.pop()]
            self.bytes -= largest
            if not keys:
                del self.sizes[largest]
        return self.bytes + size <= self.budget


def _identity(batches: Batches) -> tuple[Hashable, ...]:
    """What the images of a step depend on, within one data set: not where an iteration begins or ends."""
    indices = b"" if batches.indices is None else batches.indices.tobytes()
    return hashlib.sha256(indices).digest(), batches.seed, batches.batch_size, batches.resolution, batches.source


def _map(change: Callable[[Tensor], Tensor], answer: Lesson) -> Lesson:
    return change(answer[0]), {tap: change(tensor) for tap, tensor in answer[1].items()}


def _pinned(tensor: Tensor) -> Tensor:
    """A copy in memory of the host that the device reads by itself; in order with the work of the current stream."""
    return torch.empty_like(tensor, device="cpu", pin_memory=True).copy_(tensor, non_blocking=True)


def _memory(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).total_memory
