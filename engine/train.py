"""The one training loop: a cohort of students on the same batches, with one teacher forward per batch."""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from engine.config import Study
from engine.distill import Objective, Output
from engine.loader import Batch, Batches
from engine.trial import KDLoss, Status


@dataclass
class Student:
    """A network in training. It leaves the cohort when `status` is no longer "ok"; `error` then says why."""

    network: nn.Module
    objective: Objective
    optimiser: torch.optim.Optimizer
    loss_sum: Tensor
    status: Status = "ok"
    error: str = ""

    def leave(self, status: Status, error: str) -> None:
        self.status, self.error = status, error
        self.optimiser.zero_grad(set_to_none=True)


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


def precision(study: Study, device: torch.device) -> torch.dtype:
    """The type of the forward pass: bfloat16 on CUDA and float32 on CPU unless the study says otherwise."""
    if study.amp_dtype == "auto":
        return torch.bfloat16 if device.type == "cuda" else torch.float32
    return torch.bfloat16 if study.amp_dtype == "bfloat16" else torch.float32


def autocast(images: Tensor) -> torch.autocast:
    """Mixed precision in the type of the images; none where that is float32."""
    return torch.autocast(images.device.type, dtype=images.dtype, enabled=images.dtype != torch.float32)


def place(network: nn.Module, device: torch.device) -> nn.Module:
    """The network on the device, its weights in channels_last."""
    return network.to(device).to(memory_format=torch.channels_last)


def prepare(network: nn.Module, teacher: nn.Module | None, study: Study, kd_loss: KDLoss, example: Tensor) -> Student:
    """A network ready for training on the device of `example`, a batch of images (N, 3, R, R) like those to come."""
    network = place(network, example.device).eval()
    with torch.no_grad():
        taught = teacher(example) if teacher is not None else None
        objective = Objective(study, kd_loss, network(example), taught).to(example.device)
    network.train()
    # Biases and normalisation gain nothing from decay; 1-d parameters are exactly those.
    parameters = [*network.parameters(), *objective.parameters()]
    optimiser = torch.optim.SGD(
        [
            {"params": [p for p in parameters if p.ndim > 1], "weight_decay": study.weight_decay},
            {"params": [p for p in parameters if p.ndim <= 1], "weight_decay": 0.0},
        ],
        lr=study.lr,
        momentum=study.momentum,
        nesterov=study.momentum > 0,
        fused=True,
    )
    return Student(network, objective, optimiser, torch.zeros((), device=example.device))


def learning_rate(peak: float, step: int, steps: int) -> float:
    """Cosine decay to 0 after a linear warm-up over the first twentieth of the steps."""
    warm_up = max(1, steps // 20)
    if step < warm_up:
        return peak * (step + 1) / warm_up
    return peak * 0.5 * (1 + math.cos(math.pi * (step - warm_up) / max(1, steps - warm_up)))


def train(
    cohort: Sequence[Student],
    teacher: nn.Module | None,
    batches: Batches,
    study: Study,
    watch: Stopwatch,
    after_epoch: Callable[[int], None] | None = None,
) -> None:
    """Trains every student of the cohort on the same batches, in place, from the first epoch of the batches to the
    last; `after_epoch` is told how many epochs are done.

    A student whose loss is no longer finite, or that raises, leaves the cohort with its status; the others go on.
    """
    iterator, dtype = iter(batches), precision(study, batches.device)
    first, steps = batches.first_epoch * batches.steps_per_epoch, batches.epochs * batches.steps_per_epoch
    for step in range(first, steps):
        with watch.phase("data"):
            batch = next(iterator)
            images = batch.images.to(dtype)
        with watch.phase("teacher"):
            taught = _ask(teacher, images) if teacher is not None else None
        rate = learning_rate(study.lr, step, steps)
        with watch.phase("train"):
            for member in cohort:
                if member.status == "ok":
                    _guarded_step(member, images, batch.labels, taught, rate)
        if (step + 1) % batches.steps_per_epoch == 0:
            _drop_diverged(cohort, step + 1)
            if not any(member.status == "ok" for member in cohort):
                return
            if after_epoch is not None:
                after_epoch((step + 1) // batches.steps_per_epoch)


def _ask(teacher: nn.Module, images: Tensor) -> Output:
    with torch.no_grad(), autocast(images):
        output: Output = teacher(images)
    return output


def _guarded_step(member: Student, images: Tensor, labels: Tensor, taught: Output | None, rate: float) -> None:
    try:
        _step(member, images, labels, taught, rate)
    except (RuntimeError, ValueError, TypeError, MemoryError) as error:
        if fatal(error):
            raise
        member.leave(status_of(error), f"{type(error).__name__}: {error}")


def _step(member: Student, images: Tensor, labels: Tensor, taught: Output | None, rate: float) -> None:
    for group in member.optimiser.param_groups:
        group["lr"] = rate
    with autocast(images):
        output = member.network(images)
    loss = member.objective(output, taught, labels)
    loss.backward()
    member.optimiser.step()
    member.optimiser.zero_grad(set_to_none=True)
    member.loss_sum += loss.detach()


def _drop_diverged(cohort: Sequence[Student], step: int) -> None:
    """Once an epoch: reading a loss makes the host wait for the device."""
    for member in cohort:
        if member.status == "ok" and not math.isfinite(member.loss_sum.item()):
            member.leave("diverged", f"the loss was no longer finite within the first {step} steps")


def status_of(error: BaseException) -> Status:
    """"oom" for either device's way of saying that memory ran out, else "error"."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError) or "not enough memory" in str(error):
        return "oom"
    return "error"


def fatal(error: BaseException) -> bool:
    """Whether the CUDA context is lost with this error, and the process with it."""
    return isinstance(error, torch.AcceleratorError) and not isinstance(error, torch.OutOfMemoryError)


@torch.no_grad()
def accuracy(network: nn.Module, batches: Iterable[Batch], dtype: torch.dtype) -> float:
    """Share of images (0..1) whose largest logit is the label; leaves the network in evaluation mode."""
    network.eval()
    right, total = None, 0
    for batch in batches:
        images = batch.images.to(dtype)
        with autocast(images):
            logits, _ = network(images)
        hits = (logits.argmax(1) == batch.labels).sum()
        right = hits if right is None else right + hits
        total += len(batch.labels)
    return int(right) / total if right is not None else 0.0
