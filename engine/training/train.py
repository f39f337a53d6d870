"""The one training loop: a cohort of students on the same batches, with one teacher forward per batch."""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from engine.config import Execution, Study
from engine.data.batches import Batch, Batches
from engine.training.distill import Tap
from engine.training.graphs import Lanes, Line
from engine.training.student import Inputs, Student, adopt_average, precision
from engine.training.taught import Teacher


@dataclass
class Stopwatch:
    """Seconds by phase. On CUDA these are host seconds: the device runs behind, only the sum is exact."""

    seconds: dict[str, float] = field(default_factory=dict)

    @contextlib.contextmanager
    def phase(self, name: str) -> Iterator[None]:
        start = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - start


def learning_rate(peak: float, step: int, steps: int) -> float:
    """Cosine decay to 0 after a linear warm-up over the first twentieth of the steps."""
    warm_up = max(1, steps // 20)
    if step < warm_up:
        return peak * (step + 1) / warm_up
    return peak * 0.5 * (1 + math.cos(math.pi * (step - warm_up) / max(1, steps - warm_up)))


def train(
    cohort: Sequence[Student],
    teacher: Teacher | None,
    batches: Batches,
    study: Study,
    watch: Stopwatch,
    after_epoch: Callable[[int], None] | None = None,
    execution: Execution = "auto",
) -> None:
    """Trains every student of the cohort on the same batches, in place, from the first epoch of the batches to the
    last; `after_epoch` is told how many epochs are done.

    A student whose loss is no longer finite, or that raises, leaves the cohort with its status; the others go on.
    """
    iterator, dtype = iter(batches), precision(study, batches.device)
    taps = {tap for member in cohort for tap in member.objective.taps}
    lesson = teacher.course(batches, taps) if teacher is not None else None
    first, steps = batches.first_epoch * batches.steps_per_epoch, batches.epochs * batches.steps_per_epoch
    crew: Line | Lanes | None = None
    try:
        with watch.phase("capture"):
            crew = _crew(cohort, _example(batches, dtype, teacher, taps, study.lr), execution, steps - first, study)
        for step in range(first, steps):
            with watch.phase("data"):
                batch = next(iterator)
                images = batch.images.to(dtype)
            with watch.phase("teacher"):
                taught = lesson(step, images) if lesson is not None else None
            inputs = Inputs(images, batch.labels, taught, learning_rate(study.lr, step, steps))
            with watch.phase("train"):
                crew.advance(inputs, step)
            if (step + 1) % batches.steps_per_epoch == 0:
                with watch.phase("train"):
                    crew.join()
                    _drop_diverged(cohort, step + 1)
                if not any(member.status == "ok" for member in cohort):
                    return
                if after_epoch is not None:
                    after_epoch((step + 1) // batches.steps_per_epoch)
    finally:
        if crew is not None:
            crew.close()
    for member in cohort:
        adopt_average(member)


def _crew(
    cohort: Sequence[Student], example: Inputs | None, execution: Execution, steps: int, study: Study
) -> Line | Lanes:
    if example is not None:
        return Lanes(cohort, example, execution, steps, study.ema_decay)
    return Line(cohort, study.ema_decay)


def _example(
    batches: Batches, dtype: torch.dtype, teacher: Teacher | None, taps: Collection[Tap], rate: float
) -> Inputs | None:
    """Inputs of zeros to capture a step on; None without a CUDA device. They let the capture come before the loader
    starts: a call into CUDA from one of its threads can break a capture, and with torch 2.11 the process."""
    if batches.device.type != "cuda":
        return None
    size = batches.resolution
    images = torch.zeros(batches.batch_size, 3, size, size, dtype=dtype, device=batches.device)
    images = images.contiguous(memory_format=torch.channels_last)
    labels = torch.zeros(batches.batch_size, dtype=torch.int64, device=batches.device)
    return Inputs(images, labels, teacher.say(images, taps) if teacher is not None else None, rate)


def _drop_diverged(cohort: Sequence[Student], step: int) -> None:
    """Once an epoch, and for all at once: reading a loss makes the host wait for the device."""
    members = [member for member in cohort if member.status == "ok"]
    finite = torch.stack([member.loss_sum for member in members]).isfinite().tolist() if members else []
    for member, good in zip(members, finite, strict=True):
        if not good:
            member.leave("diverged", f"the loss was no longer finite within the first {step} steps")


@torch.no_grad()
def accuracies(networks: Sequence[nn.Module], batches: Iterable[Batch]) -> list[float | Exception]:
    """Share of images (0..1) whose largest logit is the label, for each network, on one pass over the batches; in its
    place the exception of one that raises. Leaves the networks in evaluation mode.

    In float32, whatever they were trained in: in bfloat16's 8 bits the two largest logits may be equal.
    """
    hits: list[Tensor | Exception] = [torch.zeros((), dtype=torch.int64)] * len(networks)
    total = 0
    for batch in batches:
        images = batch.images.float()
        for place, network in enumerate(networks):
            before = hits[place]
            if isinstance(before, Exception):
                continue
            try:
                network.eval()
                logits, _ = network(images)
                hits[place] = (logits.argmax(1) == batch.labels).sum() + before.to(images.device)
            except Exception as error:
                hits[place] = error
        total += len(batch.labels)
    return [hit if isinstance(hit, Exception) else int(hit) / max(1, total) for hit in hits]
