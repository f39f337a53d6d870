"""A student's training forward pass on a GPU, with fewer kernels than PyTorch's modules launch.

At 64 images a step has some 700 kernels, most of which move less than a microsecond's worth of data. Three groups are
merged here: autocast's copies of the weights, BatchNorm's counters, and each BatchNorm with the activation that follows
it. The modules, their names and their state do not change: every replacement is undone after each pass.
"""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from engine.training.distill import Output
from kernels.norm_act import batch_norm_act, has_kernel

# Layers that use their parameters only in the operation that autocast converts them for. Exact types: a subclass may
# use them differently.
CAST = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose2d, nn.Linear)
NAMES: dict[type, str] = {nn.ReLU: "relu", nn.ReLU6: "relu6"}
ACTIVATIONS = {"none": lambda x: x, "relu": nn.functional.relu, "relu6": nn.functional.relu6}
Place = tuple[dict[str, Any], str]


class LeanForward:
    """Calls a network in training mode, with the same outputs and gradients as a plain call under the same autocast.

    Every pass increments the counters of all BatchNorm layers, even of layers that the pass skips. An activation is
    fused with the BatchNorm directly before it in the same nn.Sequential.
    """

    def __init__(self, network: nn.Module) -> None:
        self.network = network
        owners = [module for module in network.modules() if type(module) in CAST]
        named = [(module._parameters, name) for module in owners for name in ("weight", "bias")]
        self.weights: list[Place] = [place for place in named if place[0][place[1]] is not None]
        norms = [module for module in network.modules() if isinstance(module, nn.BatchNorm2d)]
        # Without a momentum, BatchNorm averages over all steps and reads its counter, so it keeps its own.
        self.counters: list[Place] = [
            (norm._buffers, "num_batches_tracked")
            for norm in norms
            if norm.num_batches_tracked is not None and norm.momentum is not None
        ]
        self.forwards = _fused_forwards(network)

    def __call__(self, images: Tensor) -> Output:
        """`images` (N, 3, R, R) have the dtype of the forward pass; unless it is float32, call this under autocast."""
        replaced: list[tuple[Place, Tensor | None]] = [(place, None) for place in self.counters]
        counters = [where[name] for where, name in self.counters]
        if images.dtype != torch.float32 and self.weights:
            masters = [where[name] for where, name in self.weights]
            replaced += zip(self.weights, cast(masters, images.dtype), strict=True)
        with _swapped(replaced), _overridden(self.forwards):
            output: Output = self.network(images)
        if counters:
            torch._foreach_add_(counters, 1)
        return output


@contextlib.contextmanager
def _swapped(replaced: Sequence[tuple[Place, Any]]) -> Iterator[None]:
    """Replaces entries of the modules' dictionaries within the block."""
    before = [(place, place[0][place[1]]) for place, _ in replaced]
    try:
        for (where, name), value in replaced:
            where[name] = value
        yield
    finally:
        for (where, name), value in before:
            where[name] = value


def _fused_forwards(network: nn.Module) -> list[tuple[nn.Module, Callable[[Tensor], Tensor]]]:
    """The forward functions that replace those of BatchNorms and of the activations directly after them."""
    after: dict[nn.BatchNorm2d, nn.Module] = {}
    sequences = [module for module in network.modules() if type(module) is nn.Sequential]
    for one, other in (two for sequence in sequences for two in pairwise(sequence)):
        if isinstance(one, nn.BatchNorm2d) and type(other) in NAMES:
            after[one] = other
    # A module that is used in two places may follow a BatchNorm in only one of them.
    calls = Counter(child for module in network.modules() for child in module._modules.values())
    found: list[tuple[nn.Module, Callable[[Tensor], Tensor]]] = []
    for norm in (module for module in network.modules() if type(module) is nn.BatchNorm2d and _plain(module)):
        follower = after.get(norm)
        if follower is None or calls[norm] > 1 or calls[follower] > 1 or _hooked(norm) or _hooked(follower):
            found.append((norm, partial(_norm, norm, "none")))
        else:
            found += [(norm, partial(_norm, norm, NAMES[type(follower)])), (follower, ACTIVATIONS["none"])]
    return found


def _plain(norm: nn.BatchNorm2d) -> bool:
    return norm.affine and norm.track_running_stats and norm.momentum is not None


def _hooked(module: nn.Module) -> bool:
    """Whether a hook sees the module's input or output."""
    return bool(module._forward_hooks or module._forward_pre_hooks)


def _norm(norm: nn.BatchNorm2d, activation: str, x: Tensor) -> Tensor:
    """The layer and its activation, in PyTorch's own kernels if ours do not support the input."""
    assert norm.running_mean is not None
    assert norm.running_var is not None
    assert norm.momentum is not None
    given = (x, norm.running_mean, norm.running_var, norm.weight, norm.bias)
    if has_kernel(x):
        return batch_norm_act(
            *given, training=norm.training, momentum=norm.momentum, eps=norm.eps, activation=activation
        )
    return ACTIVATIONS[activation](nn.functional.batch_norm(*given, norm.training, norm.momentum, norm.eps))


@contextlib.contextmanager
def _overridden(forwards: Sequence[tuple[nn.Module, Callable[[Tensor], Tensor]]]) -> Iterator[None]:
    """Replaces the modules' forward functions within the block."""
    try:
        for module, forward in forwards:
            module.__dict__["forward"] = forward
        yield
    finally:
        for module, _ in forwards:
            module.__dict__.pop("forward", None)


def cast(masters: Sequence[Tensor], dtype: torch.dtype) -> tuple[Tensor, ...]:
    """Differentiable copies of floating-point tensors in another dtype; one kernel each way per 64 tensors."""
    copies: tuple[Tensor, ...] = _Cast.apply(dtype, *masters)
    return copies


class _Cast(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, dtype: torch.dtype, *masters: Tensor) -> tuple[Tensor, ...]:
        ctx.set_materialize_grads(False)  # for a layer that the pass skipped
        ctx.dtypes = [master.dtype for master in masters]
        copies = [torch.empty_like(master, dtype=dtype) for master in masters]
        torch._foreach_copy_(copies, list(masters))
        return tuple(copies)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        found = [(g, dtype) for g, dtype in zip(gradients, ctx.dtypes, strict=True) if g is not None]
        wide = [torch.empty_like(g, dtype=dtype) for g, dtype in found]
        if wide:
            torch._foreach_copy_(wide, [g for g, _ in found])
        rest = iter(wide)
        return (None, *(None if g is None else next(rest) for g in gradients))
