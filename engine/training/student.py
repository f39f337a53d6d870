"""A student: a network in training, one step of it, and how its errors are classified."""

from __future__ import annotations

import contextlib
import os
import sys
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from engine.config import SearchConfig
from engine.training.distill import Objective, Output, TeacherOutput
from engine.training.lean import LeanForward
from engine.trial import KDLoss, Status


@dataclass
class Student:
    """A network in training. It is in its cohort while `status` is "ok"; after that, `error` says why it was dropped.

    `forward` is the network, its compiled form or its lean one (engine/training/lean.py). Random numbers that its
    layers draw depend on `seed` and the step. `average` is the running average of the tensors in `live`, if one is
    kept. `execution` says how its steps ran. `latency_ms` is the time of its forward pass, measured if latency is
    limited. `curve` has the mean loss of each epoch (engine.trial.Curve), and `loss_before` is
    `loss_sum` at the end of the last one.
    """

    network: nn.Module
    forward: Callable[[Tensor], Output]
    objective: Objective
    optimiser: torch.optim.Optimizer
    loss_sum: Tensor
    seed: int = 0
    average: list[Tensor] | None = None
    live: list[Tensor] = field(default_factory=list)
    execution: str = "eager"
    latency_ms: float = 0.0
    curve: list[tuple[float, float | None]] = field(default_factory=list)
    loss_before: float = 0.0
    status: Status = "ok"
    error: str = ""

    def drop(self, status: Status, error: str) -> None:
        """Takes the student out of its cohort."""
        self.status, self.error = status, error
        self.optimiser.zero_grad(set_to_none=True)

    def state(self) -> list[Tensor]:
        """All tensors that a step changes in place."""
        modules = [*self.network.state_dict().values(), *self.objective.state_dict().values()]
        moments = [value for entry in self.optimiser.state.values() for value in entry.values()]
        return [*modules, self.loss_sum, *moments]


@dataclass
class Inputs:
    """What all students of a cohort read in a step: images (N, 3, R, R), labels (N,), the teacher's output, and the
    learning rate. The rate is a number, or on a CUDA device a tensor, which a graph reads again in every replay."""

    images: Tensor
    labels: Tensor
    teacher_output: TeacherOutput | None
    rate: float | Tensor

    def static_copy(self) -> Inputs:
        """A copy whose memory a CUDA graph can be recorded on; `copy_from` fills it for later steps."""
        rate = torch.as_tensor(self.rate, dtype=torch.float32).to(self.images.device, copy=True)
        output = None if self.teacher_output is None else self.teacher_output.map(Tensor.clone)
        return Inputs(self.images.clone(), self.labels.clone(), output, rate)

    def copy_from(self, other: Inputs) -> None:
        """Copies the values of another step into this one's memory."""
        self.images.copy_(other.images)
        self.labels.copy_(other.labels)
        if self.teacher_output is not None and other.teacher_output is not None:
            self.teacher_output.logits.copy_(other.teacher_output.logits)
            for key, value in self.teacher_output.features.items():
                value.copy_(other.teacher_output.features[key])
        if isinstance(self.rate, Tensor):
            self.rate.fill_(other.rate)


def precision(config: SearchConfig, device: torch.device) -> torch.dtype:
    """The dtype of the forward pass: by default bfloat16 on CUDA and float32 on the CPU."""
    if config.amp_dtype == "auto":
        return torch.bfloat16 if device.type == "cuda" else torch.float32
    return torch.bfloat16 if config.amp_dtype == "bfloat16" else torch.float32


def autocast(images: Tensor) -> torch.autocast:
    """Mixed precision in the dtype of the images; disabled if that is float32.

    The cache of converted weights is off: a network reads each weight once in a step, and a graph recorded with the
    cache would read stale ones.
    """
    enabled = images.dtype != torch.float32
    return torch.autocast(images.device.type, dtype=images.dtype, enabled=enabled, cache_enabled=False)


def place(network: nn.Module, device: torch.device) -> nn.Module:
    """The network on the device, its weights in channels_last."""
    return network.to(device).to(memory_format=torch.channels_last)


def prepare(
    network: nn.Module,
    teacher: nn.Module | None,
    config: SearchConfig,
    kd_loss: KDLoss,
    example: Tensor,
    seed: int = 0,
    average: bool = False,
    compiled: bool = False,
    backbone: float = 1.0,
) -> Student:
    """A student ready to train on the device of `example`, a batch of images (N, 3, R, R) of the training's size.

    Layers before the classifier learn at `backbone` times the learning rate.
    """
    network = place(network, example.device).eval()
    with torch.no_grad():
        teacher_example = teacher(example) if teacher is not None else None
        objective = Objective(config, kd_loss, network(example), teacher_example).to(example.device)
    network.train()
    # Weights and running statistics; counters are not averaged.
    live = [value.detach() for value in network.state_dict().values() if value.is_floating_point()] if average else []
    return Student(
        network,
        _forward(network, example.device, compiled),
        objective,
        make_optimiser(network, objective, config, backbone),
        torch.zeros((), dtype=torch.float64, device=example.device),  # float32 loses digits over a million steps
        seed,
        [value.clone() for value in live] if average else None,
        live,
    )


def _forward(network: nn.Module, device: torch.device, compiled: bool) -> Callable[[Tensor], Output]:
    if compiled:
        return compile_network(network)
    return LeanForward(network) if device.type == "cuda" else network


def make_optimiser(
    network: nn.Module, objective: nn.Module, config: SearchConfig, backbone: float = 1.0
) -> torch.optim.Optimizer:
    """The optimiser of the configuration. Only matrices decay: biases and normalisation, all 1-d, gain nothing from it.

    Each group has the factor of its learning rate as "lr_scale": `backbone` for all layers of the network but the last.
    """
    last = set(_last_layer(network).parameters()) if backbone != 1 else set()
    groups: dict[tuple[float, float], list[nn.Parameter]] = {}
    for parameter in [*network.parameters(), *objective.parameters()]:
        scale = backbone if last and parameter not in last else 1.0
        groups.setdefault((scale, config.weight_decay if parameter.ndim > 1 else 0.0), []).append(parameter)
    described = [
        {"params": parameters, "lr_scale": scale, "weight_decay": decay}
        for (scale, decay), parameters in groups.items()
    ]
    return _adamw(described, config) if config.optimizer == "adamw" else _sgd(described, config)


def _last_layer(network: nn.Module) -> nn.Module:
    """The last layer that has parameters of its own: the classifier."""
    *_, last = (layer for layer in network.modules() if next(layer.parameters(recurse=False), None) is not None)
    return last


# State that an optimiser would create in a parameter's first step is created here: it is restored after the trial steps
# of a graph (`Student.state`), and the fused SGD fails if only some parameters have theirs, as after LayerDrop or
# stochastic depth skipped a layer. A first step from zeros gives the same result.
def _sgd(groups: list[dict[str, Any]], config: SearchConfig) -> torch.optim.Optimizer:
    """SGD with Nesterov momentum."""
    momentum = config.momentum
    optimiser = torch.optim.SGD(groups, lr=config.lr, momentum=momentum, nesterov=momentum > 0, fused=True)
    for parameter in _parameters(groups) if momentum > 0 else []:
        optimiser.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
    return optimiser


def _adamw(groups: list[dict[str, Any]], config: SearchConfig) -> torch.optim.Optimizer:
    """AdamW; on a GPU in the form that a graph can capture."""
    on_gpu = any(parameter.is_cuda for parameter in _parameters(groups))
    optimiser = torch.optim.AdamW(groups, lr=config.lr, fused=True, capturable=on_gpu)
    for parameter in _parameters(groups):
        optimiser.state[parameter] = {
            "step": torch.zeros((), device=parameter.device),
            "exp_avg": torch.zeros_like(parameter),
            "exp_avg_sq": torch.zeros_like(parameter),
        }
    return optimiser


def _parameters(groups: list[dict[str, Any]]) -> list[nn.Parameter]:
    return [parameter for group in groups for parameter in group["params"]]


def compile_network(network: nn.Module) -> Callable[[Tensor], Output]:
    """The network's compiled form; compilation happens in the first step.

    All networks of a space share the code of one forward, and torch.compile counts by code: past 8 compilations it
    would run the next network eagerly, with a warning. So the compilations of earlier cohorts are discarded, and one
    cohort may have 64.
    """
    torch._dynamo.reset()
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, 64)
    compiled: Callable[[Tensor], Output] = torch.compile(network)
    return compiled


def take_step(student: Student, inputs: Inputs) -> None:
    """Forward, loss, backward, update. Reads nothing back from the device, and leaves no gradient behind."""
    for group in student.optimiser.param_groups:
        group["lr"] = inputs.rate if group["lr_scale"] == 1 else inputs.rate * group["lr_scale"]
    with autocast(inputs.images):
        output = student.forward(inputs.images)
    loss = student.objective(output, inputs.teacher_output, inputs.labels)
    loss.backward()
    student.optimiser.step()
    student.optimiser.zero_grad(set_to_none=True)
    student.loss_sum += loss.detach()


def reseed(student: Student, step: int) -> None:
    """Seeds the random numbers that layers like dropout draw, so that they depend on the student and the step only, not
    on other students or on a resume.

    The CPU generator is always seeded: on a GPU too, a network may decide on the host, as stochastic depth does.
    """
    device, key = student.loss_sum.device, (student.seed + step * 0x9E3779B97F4A7C15) % 2**63
    torch.default_generator.manual_seed(key)
    if device.type == "cuda":
        torch.cuda.default_generators[device.index or 0].manual_seed(key)


@torch.no_grad()
def update_ema(student: Student, step: int, decay: float) -> None:
    """Moves the running average towards the current state, faster in the first steps, to forget the initial weights
    (decay at step t at most (1 + t) / (10 + t), as TensorFlow's ExponentialMovingAverage)."""
    if student.average is not None:
        weight = 1 - min(decay, (1 + step) / (10 + step))
        torch._foreach_lerp_(student.average, student.live, weight)


@torch.no_grad()
def apply_ema(student: Student) -> None:
    """Replaces the network's state by its running average, to be scored and saved."""
    if student.average is not None:
        torch._foreach_copy_(student.live, student.average)


@contextlib.contextmanager
def averaged(student: Student) -> Iterator[None]:
    """Within the block, the network has the state that it would be scored with at this point of its training."""
    own = [value.clone() for value in student.live]
    apply_ema(student)
    try:
        yield
    finally:
        student.network.train()
        with torch.no_grad():
            for live, value in zip(student.live, own, strict=True):
                live.copy_(value)


class ProcessLost(RuntimeError):
    """This process can no longer use its device."""


# Messages of PyTorch's allocators, of the CUDA runtime ("CUDA error: out of memory"), of Triton's launcher ("Triton
# Error [CUDA]: out of memory"), and of cuBLAS and similar libraries (CUBLAS_STATUS_ALLOC_FAILED).
NO_MEMORY = ("not enough memory", "out of memory", "can't allocate memory", "ALLOC_FAILED")


def status_of(error: BaseException) -> Status:
    """The status "oom" for every way in which either device reports that memory ran out, else "error"."""
    no_memory = any(words in str(error) for words in NO_MEMORY)
    return "oom" if no_memory or isinstance(error, MemoryError | torch.OutOfMemoryError) else "error"


def fatal(error: BaseException) -> bool:
    """Whether the error has destroyed the CUDA context, and with it the process. Running out of memory has not."""
    return isinstance(error, ProcessLost) or (isinstance(error, torch.AcceleratorError) and status_of(error) != "oom")


def end_if_fatal(error: BaseException) -> None:
    """Ends the process if the error is fatal. A lost CUDA context cannot be recovered in it; the fleet starts another
    process."""
    if fatal(error):
        traceback.print_exception(error)  # the supervisor reports the end of the log
        sys.stderr.flush()
        os._exit(70)
