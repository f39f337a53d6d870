"""The one training loop: a cohort of students on the same batches, with one teacher forward per batch."""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from engine.config import Execution, SearchConfig
from engine.data.batches import Batch, Batches
from engine.training.distill import FeatureKey
from engine.training.graphs import SequentialRunner, StreamRunner
from engine.training.observe import Observer
from engine.training.student import Inputs, Student, apply_ema, precision
from engine.training.teacher_cache import CachedTeacher

Runner = SequentialRunner | StreamRunner
Hits = npt.NDArray[np.bool_]  # (N,), one for each image of a split


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


def learning_rate(peak: float, step: int, steps: int, warmup: float = 0.05) -> float:
    """Cosine decay to 0 after a linear warm-up over that fraction of the steps, at least one."""
    warm_up = max(1, int(steps * warmup))
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
    observer: Observer | None = None,
) -> None:
    """Trains every student of the cohort on the same batches, in place, from `batches.first_epoch` to the last epoch.

    `after_epoch` is called with the number of finished epochs, and `observer` told of the progress. The curves of the
    students get the mean loss of each epoch. A student that raises, or whose loss is no longer finite, is dropped with
    a status; the others continue.
    """
    iterator, dtype = iter(batches), precision(config, batches.device)
    feature_keys = {key for student in cohort for key in student.objective.feature_keys}
    outputs = teacher.outputs_for(batches, feature_keys) if teacher is not None else None
    first, steps = batches.first_epoch * batches.steps_per_epoch, batches.epochs * batches.steps_per_epoch
    runner: Runner | None = None
    losses = MeanLoss(cohort, first)
    if observer is not None:
        observer.begin(batches, len(cohort))
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
            rate = learning_rate(config.lr, step, steps, config.warmup_fraction)
            inputs = Inputs(images, batch.labels, output, rate)
            with watch.phase("train"):
                runner.advance(inputs, step)
            if observer is not None and observer.due():
                with watch.phase("train"):
                    runner.join()
                    observer.tell(step + 1, losses.recent(step + 1))
            if (step + 1) % batches.steps_per_epoch == 0:
                with watch.phase("train"):
                    runner.join()
                    losses.end_epoch(step + 1)
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


class MeanLoss:
    """The mean losses of a cohort since its last finished epoch. Reading them waits for the device."""

    def __init__(self, cohort: Sequence[Student], done: int) -> None:
        self.cohort, self.done = cohort, done  # steps, up to the end of that epoch

    def recent(self, done: int) -> float:
        """The mean over the students after `done` steps, before the epoch ends with them."""
        students = self._training()
        means = [self._mean(one, total, done) for one, total in zip(students, self._read(students), strict=True)]
        return sum(means) / len(means) if means else math.nan

    def end_epoch(self, done: int) -> None:
        """Adds the mean loss of the epoch that ends after `done` steps to each student's curve; drops students whose
        loss is not finite. The losses are read once."""
        students = self._training()
        for student, total in zip(students, self._read(students), strict=True):
            if math.isfinite(total):
                student.curve.append((float(f"{self._mean(student, total, done):.6g}"), None))
                student.loss_before = total
            else:
                student.drop("diverged", f"the loss was no longer finite within the first {done} steps")
        self.done = done

    def _training(self) -> list[Student]:
        return [student for student in self.cohort if student.status == "ok"]

    def _read(self, students: Sequence[Student]) -> list[float]:
        return torch.stack([student.loss_sum for student in students]).tolist() if students else []

    def _mean(self, student: Student, total: float, done: int) -> float:
        return (total - student.loss_before) / (done - self.done)


@dataclass(frozen=True, slots=True, eq=False)
class Readout:
    """What one pass over a split of N images says of a network: which images it classifies right (N,), the class it
    gives to each (N,), its mean cross entropy with the labels in nats, and its agreement with the teacher, the share
    (0..1) of the images to which both give the same class (None without a teacher)."""

    hits: Hits
    predicted: npt.NDArray[np.int64]
    cross_entropy: float
    agreement: float | None = None

    @property
    def accuracy(self) -> float:
        """The share (0..1) of images that are classified right."""
        return float(self.hits.mean())


@torch.no_grad()
def read_out(
    networks: Sequence[nn.Module], batches: Iterable[Batch], teacher_classes: Tensor | None = None
) -> list[Readout | Exception]:
    """The readout of each network, in one pass over the batches; the exception instead if a network raises.

    `teacher_classes` (N,) is the teacher's class of each image, in the order of the batches. Leaves the networks in
    evaluation mode. Computed in float32 even if they were trained in bfloat16, whose 8 bits may make the two largest
    logits equal.
    """
    found: list[list[Tensor] | Exception] = [[] for _ in networks]
    total = 0
    for batch in batches:
        images = batch.images.float()
        theirs = None if teacher_classes is None else teacher_classes[total : total + len(batch.labels)]
        for index, network in enumerate(networks):
            before = found[index]
            if isinstance(before, Exception):
                continue
            try:
                network.eval()
                before.append(_by_image(network(images)[0], batch.labels, theirs))
            except Exception as error:
                found[index] = error
        total += len(batch.labels)
    return [each if isinstance(each, Exception) else _readout(each, teacher_classes is not None) for each in found]


def _by_image(logits: Tensor, labels: Tensor, theirs: Tensor | None) -> Tensor:
    """For each image of a batch: whether its class is right, that class, its cross entropy, whether the teacher agrees;
    (4, N)."""
    classes = logits.argmax(1)
    agrees = torch.zeros_like(classes) if theirs is None else classes == theirs
    entropy = nn.functional.cross_entropy(logits.double(), labels, reduction="none")
    return torch.stack([(classes == labels).double(), classes.double(), entropy, agrees.double()])


def _readout(batches: Sequence[Tensor], has_teacher: bool) -> Readout:
    right, classes, entropy, agrees = np.array(torch.cat(list(batches), 1).tolist())
    agreement = float(agrees.mean()) if has_teacher else None
    return Readout(right.astype(np.bool_), classes.astype(np.int64), float(entropy.mean()), agreement)


def confusion(labels: npt.NDArray[np.int64], predicted: npt.NDArray[np.int64], classes: int) -> list[list[int]]:
    """How many images of each class (rows) are given each class (columns): the confusion matrix (classes, classes)."""
    counts = np.bincount(labels * classes + predicted, minlength=classes**2)
    return [[int(count) for count in row] for row in counts.reshape(classes, classes)]


@torch.no_grad()
def classify(network: nn.Module, batches: Iterable[Batch]) -> Tensor:
    """The class (N,) that a network in evaluation mode gives to each image."""
    return torch.cat([network(batch.images.float())[0].argmax(1) for batch in batches])
