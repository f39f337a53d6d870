"""A network in training: what it needs, one step of it, and what may go wrong."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from engine.config import Study
from engine.training.distill import Lesson, Objective, Output
from engine.training.lean import LeanForward
from engine.trial import KDLoss, Status


@dataclass
class Student:
    """A network in training. It leaves the cohort when `status` is no longer "ok"; `error` then says why.

    `forward` is the network, its compiled form or its lean one. Random numbers that its layers draw depend on `seed`
    and the step.
    `average` holds the running average of its state where one is kept, and `live` what that is an average of.
    `execution` says how its steps ran,
    `latency_ms` how long its forward pass takes where there is a limit on that.
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
    status: Status = "ok"
    error: str = ""

    def leave(self, status: Status, error: str) -> None:
        self.status, self.error = status, error
        self.optimiser.zero_grad(set_to_none=True)

    def state(self) -> list[Tensor]:
        """All tensors that a step changes in place."""
        modules = [*self.network.state_dict().values(), *self.objective.state_dict().values()]
        return [*modules, self.loss_sum, *(kept["momentum_buffer"] for kept in self.optimiser.state.values())]


@dataclass
class Inputs:
    """What every student of a cohort reads in a step: images (N, 3, R, R), labels (N,), the teacher's lesson, and the
    learning rate: a number, or on a CUDA device a tensor there, which a graph reads anew in every replay."""

    images: Tensor
    labels: Tensor
    taught: Lesson | None
    rate: float | Tensor

    def held(self) -> Inputs:
        """A copy whose memory stays where it is, for steps that are recorded."""
        rate = torch.as_tensor(self.rate, dtype=torch.float32).to(self.images.device, copy=True)
        taught = self.taught and (self.taught[0].clone(), {tap: value.clone() for tap, value in self.taught[1].items()})
        return Inputs(self.images.clone(), self.labels.clone(), taught, rate)

    def take(self, other: Inputs) -> None:
        """Puts the values of another step into this one's memory."""
        self.images.copy_(other.images)
        self.labels.copy_(other.labels)
        if self.taught is not None and other.taught is not None:
            self.taught[0].copy_(other.taught[0])
            for tap, value in self.taught[1].items():
                value.copy_(other.taught[1][tap])
        if isinstance(self.rate, Tensor):
            self.rate.fill_(other.rate)


def precision(study: Study, device: torch.device) -> torch.dtype:
    """The type of the forward pass: bfloat16 on CUDA and float32 on CPU unless the study says otherwise."""
    if study.amp_dtype == "auto":
        return torch.bfloat16 if device.type == "cuda" else torch.float32
    return torch.bfloat16 if study.amp_dtype == "bfloat16" else torch.float32


def autocast(images: Tensor) -> torch.autocast:
    """Mixed precision in the type of the images; none where that is float32.

    Without the cache of converted weights: a network reads each weight once in a step, and a graph that is recorded
    with the cache would read stale ones.
    """
    enabled = images.dtype != torch.float32
    return torch.autocast(images.device.type, dtype=images.dtype, enabled=enabled, cache_enabled=False)


def place(network: nn.Module, device: torch.device) -> nn.Module:
    """The network on the device, its weights in channels_last."""
    return network.to(device).to(memory_format=torch.channels_last)


def prepare(
    network: nn.Module,
    teacher: nn.Module | None,
    study: Study,
    kd_loss: KDLoss,
    example: Tensor,
    seed: int = 0,
    average: bool = False,
    compiled: bool = False,
) -> Student:
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
    # SGD makes them in a parameter's first step, but not where others have theirs by then: a step that is the first to
    # take a layer (LayerDrop, stochastic depth) would fail. From 0 a first step is the same.
    for parameter in parameters if study.momentum > 0 else []:
        optimiser.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
    # Weights and running statistics; counters are not averaged.
    live = [value.detach() for value in network.state_dict().values() if value.is_floating_point()] if average else []
    return Student(
        network,
        _forward(network, example.device, compiled),
        objective,
        optimiser,
        torch.zeros((), dtype=torch.float64, device=example.device),  # in float32 a million steps would drown
        seed,
        [value.clone() for value in live] if average else None,
        live,
    )


def _forward(network: nn.Module, device: torch.device, compiled: bool) -> Callable[[Tensor], Output]:
    if compiled:
        return compile_anew(network)
    return LeanForward(network) if device.type == "cuda" else network


def compile_anew(network: nn.Module) -> Callable[[Tensor], Output]:
    """The network, to be compiled in its first step.

    Networks of a space share the code of one forward, and torch.compile counts by code: past its 8 it would run the
    next one eagerly, with a warning. So what was compiled for earlier cohorts is let go, and one cohort may have 64.
    """
    torch._dynamo.reset()
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, 64)
    compiled: Callable[[Tensor], Output] = torch.compile(network)
    return compiled


def take_step(member: Student, inputs: Inputs) -> None:
    """Forward, loss, backward, update. Asks the device nothing, and leaves no gradient behind."""
    for group in member.optimiser.param_groups:
        group["lr"] = inputs.rate
    with autocast(inputs.images):
        output = member.forward(inputs.images)
    loss = member.objective(output, inputs.taught, inputs.labels)
    loss.backward()
    member.optimiser.step()
    member.optimiser.zero_grad(set_to_none=True)
    member.loss_sum += loss.detach()


def reseed(member: Student, step: int) -> None:
    """Keys the random numbers that layers like dropout draw: not who was trained before, nor where it was resumed.

    Those of the CPU in any case: beside a GPU too a network may decide on the host, as stochastic depth does.
    """
    device, key = member.loss_sum.device, (member.seed + step * 0x9E3779B97F4A7C15) % 2**63
    torch.default_generator.manual_seed(key)
    if device.type == "cuda":
        torch.cuda.default_generators[device.index or 0].manual_seed(key)


@torch.no_grad()
def update_average(member: Student, step: int, decay: float) -> None:
    """Moves the running average towards the present state; faster in the first steps, to forget the initial weights
    (decay at step t at most (1 + t) / (10 + t), as TensorFlow's ExponentialMovingAverage)."""
    if member.average is not None:
        weight = 1 - min(decay, (1 + step) / (10 + step))
        torch._foreach_lerp_(member.average, member.live, weight)


@torch.no_grad()
def adopt_average(member: Student) -> None:
    """The averaged state becomes the network's, for evaluation and for keeping."""
    if member.average is not None:
        torch._foreach_copy_(member.live, member.average)


class ProcessLost(RuntimeError):
    """This process can no longer use its device."""


# As said by PyTorch's allocators, by the CUDA runtime and Triton's launcher ("CUDA error: out of memory", "Triton Error
# [CUDA]: out of memory"), and by cuBLAS and its kin (CUBLAS_STATUS_ALLOC_FAILED).
NO_MEMORY = ("not enough memory", "out of memory", "ALLOC_FAILED")


def status_of(error: BaseException) -> Status:
    """"oom" for either device's ways of saying that memory ran out, else "error"."""
    said = any(words in str(error) for words in NO_MEMORY)
    return "oom" if said or isinstance(error, MemoryError | torch.OutOfMemoryError) else "error"


def fatal(error: BaseException) -> bool:
    """Whether the CUDA context is lost with this error, and the process with it; want of memory leaves it whole."""
    return isinstance(error, ProcessLost) or (isinstance(error, torch.AcceleratorError) and status_of(error) != "oom")
