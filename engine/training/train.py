"""The one training loop: a cohort of students on the same batches, with one teacher forward per batch."""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from engine.config import Execution, SearchConfig
from engine.data.batches import Batch, Batches
from engine.training.distill import FeatureKey
from engine.training.graphs import SequentialRunner, StreamRunner
from engine.training.student import Inputs, Student, apply_ema, precision
from engine.training.teacher_cache import CachedTeacher

Runner = SequentialRunner | StreamRunner


@dataclass
class Stopwatch:
    """Seconds by phase. On CUDA these are host seconds: the device runs behind, so only their sum is exact."""

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
    teacher: CachedTeacher | None,
    batches: Batches,
    config: SearchConfig,
    watch: Stopwatch,
    after_epoch: Callable[[int], None] | None = None,
    execution: Execution = "auto",
) -> None:
    """Trains every student of the cohort on the same batches, in place, from `batches.first_epoch` to the last epoch.

    `after_epoch` is called with the number of finished epochs. A student that raises, or whose loss is no longer
    finite, is dropped with a status; the others continue.
    """
    iterator, dtype = iter(batches), precision(config, batches.device)
    feature_keys = {key for student in cohort for key in student.objective.feature_keys}
    outputs = teacher.outputs_for(batches, feature_keys) if teacher is not None else None
    first, steps = batches.first_epoch * batches.steps_per_epoch, batches.epochs * batches.steps_per_epoch
    runner: Runner | None = None
    try:
        with watch.phase("capture"):
            example = _example(batches, dtype, teacher, feature_keys, config.lr)
            runner = _make_runner(cohort, example, execution, steps - first, config.ema_decay)
        for step in range(first, steps):
            with watch.phase("data"):
                batch = next(iterator)
                images = batch.images.to(dtype)
            with watch.phase("teacher"):
                output = outputs(step, images) if outputs is not None else None
            inputs = Inputs(images, batch.labels, output, learning_rate(config.lr, step, steps))
            with watch.phase("train"):
                runner.advance(inputs, step)
            if (step + 1) % batches.steps_per_epoch == 0:
                with watch.phase("train"):
                    runner.join()
                    _drop_diverged(cohort, step + 1)
                if not any(student.status == "ok" for student in cohort):
                    return
                if after_epoch is not None:
                    after_epoch((step + 1) // batches.steps_per_epoch)
    finally:
        if runner is not None:
            runner.close()
    for student in cohort:
        apply_ema(student)


def _make_runner(
    cohort: Sequence[Student], example: Inputs | None, execution: Execution, steps: int, decay: float
) -> Runner:
    if example is not None:
        return StreamRunner(cohort, example, execution, steps, decay)
    return SequentialRunner(cohort, decay)


def _example(
    batches: Batches, dtype: torch.dtype, teacher: CachedTeacher | None, keys: Collection[FeatureKey], rate: float
) -> Inputs | None:
    """All-zero inputs for capturing a step; None without a CUDA device.

    They allow the capture before the loader starts: a call into CUDA from one of its threads can break a capture and,
    with torch 2.11, the process.
    """
    if batches.device.type != "cuda":
        return None
    size = batches.resolution
    images = torch.zeros(batches.batch_size, 3, size, size, dtype=dtype, device=batches.device)
    images = images.contiguous(memory_format=torch.channels_last)
    labels = torch.zeros(batches.batch_size, dtype=torch.int64, device=batches.device)
    return Inputs(images, labels, teacher.ask(images, keys) if teacher is not None else None, rate)


def _drop_diverged(cohort: Sequence[Student], step: int) -> None:
    """Drops students whose loss is not finite. Runs once per epoch, because reading the losses waits for the device."""
    students = [student for student in cohort if student.status == "ok"]
    finite = torch.stack([student.loss_sum for student in students]).isfinite().tolist() if students else []
    for student, is_finite in zip(students, finite, strict=True):
        if not is_finite:
            student.drop("diverged", f"the loss was no longer finite within the first {step} steps")


@dataclass(frozen=True, slots=True)
class Readout:
    """What one pass over a split says of a network: accuracy (0..1), mean cross entropy with the labels in nats, and
    agreement, the share (0..1) of the images to which it gives the teacher's class (None without a teacher)."""

    accuracy: float
    cross_entropy: float
    agreement: float | None = None


@torch.no_grad()
def read_out(
    networks: Sequence[nn.Module], batches: Iterable[Batch], teacher_classes: Tensor | None = None
) -> list[Readout | Exception]:
    """The readout of each network, in one pass over the batches; the exception instead if a network raises.

    `teacher_classes` (n,) is the teacher's class of each image, in the order of the batches. Leaves the networks in
    evaluation mode. Computed in float32 even if they were trained in bfloat16, whose 8 bits may make the two largest
    logits equal.
    """
    sums: list[Tensor | Exception] = [torch.zeros(3, dtype=torch.float64)] * len(networks)
    total = 0
    for batch in batches:
        images = batch.images.float()
        theirs = None if teacher_classes is None else teacher_classes[total : total + len(batch.labels)]
        for index, network in enumerate(networks):
            before = sums[index]
            if isinstance(before, Exception):
                continue
            try:
                network.eval()
                sums[index] = _sums(network(images)[0], batch.labels, theirs) + before.to(images.device)
            except Exception as error:
                sums[index] = error
        total += len(batch.labels)
    return [_readout(each, max(1, total), teacher_classes is not None) for each in sums]


def _sums(logits: Tensor, labels: Tensor, theirs: Tensor | None) -> Tensor:
    """Correct classes, cross entropy, and classes equal to the teacher's, each summed over a batch: (3,)."""
    classes = logits.argmax(1)
    agreeing = torch.zeros_like(classes) if theirs is None else classes == theirs
    entropy = nn.functional.cross_entropy(logits.double(), labels, reduction="sum")
    return torch.stack([(classes == labels).sum().double(), entropy, agreeing.sum().double()])


def _readout(sums: Tensor | Exception, total: int, has_teacher: bool) -> Readout | Exception:
    if isinstance(sums, Exception):
        return sums
    correct, entropy, agreeing = (sums / total).tolist()
    return Readout(correct, entropy, agreeing if has_teacher else None)


@torch.no_grad()
def classify(network: nn.Module, batches: Iterable[Batch]) -> Tensor:
    """The class (n,) that a network in evaluation mode gives to each image."""
    return torch.cat([network(batch.images.float())[0].argmax(1) for batch in batches])
