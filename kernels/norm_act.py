"""BatchNorm (Ioffe and Szegedy 2015, arXiv 1502.03167) with the activation that follows it, as one operation.

The reference is closed-form, plain PyTorch, and serves as the test oracle. On CUDA, Triton kernels compute the same in
two launches per pass instead of up to five, and save only the input for the backward pass.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.library import custom_op

from kernels import _dispatch

ACTIVATIONS = ("none", "relu", "relu6")


def batch_norm_act(
    x: Tensor,
    running_mean: Tensor,
    running_var: Tensor,
    weight: Tensor,
    bias: Tensor,
    *,
    training: bool,
    momentum: float = 0.1,
    eps: float = 1e-5,
    activation: str = "none",
    backend: str = "auto",
) -> Tensor:
    """activation(BatchNorm(x)) for x (N, C, H, W), in x's type; `activation` is "none", "relu" or "relu6".

    Statistics, weight and bias are (C,), in float32, or in float64 if x is. Training uses the batch's statistics and
    moves the running ones towards them by `momentum`, with the unbiased variance, like torch.nn.BatchNorm2d.
    Evaluation uses the running statistics. The Triton kernels need channels_last; other layouts and float64 run the
    reference. Once differentiable with respect to x, weight and bias. Raises ValueError for other activations or
    shapes, and in training if a channel has a single value.
    """
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation is {activation!r}; use one of {', '.join(ACTIVATIONS)}")
    if x.dim() != 4 or any(t.shape != x.shape[1:2] for t in (running_mean, running_var, weight, bias)):
        raise ValueError(f"x is {tuple(x.shape)}; it must be (N, C, H, W), statistics and parameters (C,)")
    if training and x.numel() <= x.shape[1]:
        raise ValueError(f"x is {tuple(x.shape)}: in training each channel needs more than one value")
    chosen = "triton" if has_kernel(x, backend) else "reference"
    options = (training, momentum, eps, activation, chosen)
    if not torch.compiler.is_compiling():
        y: Tensor = _NormAct.apply(x, weight, bias, running_mean, running_var, *options)[0]
        return y
    y, _, new_mean, new_var = norm_act_op(x, weight, bias, running_mean, running_var, *options)
    if training:
        running_mean.copy_(new_mean)
        running_var.copy_(new_var)
    return y


def has_kernel(x: Tensor, backend: str = "auto") -> bool:
    """Whether the Triton kernels handle this input."""
    chosen = _dispatch.resolve(backend, x.device) == "triton"
    return chosen and x.element_size() < 8 and x.numel() > 0 and x.is_contiguous(memory_format=torch.channels_last)


# ---- reference -----------------------------------------------------------------------------------------


def reference_forward(
    x: Tensor, weight: Tensor, bias: Tensor, running_mean: Tensor, running_var: Tensor,
    training: bool, momentum: float, eps: float, activation: str,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """(y, saved (2, C): mean and 1 / standard deviation). Updates the running statistics in training."""
    wide = x.to(weight.dtype)
    mean, var = running_mean, running_var
    if training:
        var, mean = torch.var_mean(wide, (0, 2, 3), correction=0)
        count = x.numel() // x.shape[1]
        running_mean.lerp_(mean, momentum)
        running_var.lerp_(var * (count / (count - 1)), momentum)
    saved = torch.stack([mean, (var + eps).rsqrt()])
    u = _normalised(wide, saved) * _by_channel(weight) + _by_channel(bias)
    if activation != "none":
        u = u.clamp(0, 6 if activation == "relu6" else None)
    return u.to(x.dtype), saved


def reference_backward(
    x: Tensor, grad: Tensor, weight: Tensor, bias: Tensor, saved: Tensor, training: bool, activation: str
) -> tuple[Tensor, Tensor]:
    """(gradient of x, gradients (2, C) of weight and bias)."""
    x_hat, grad = _normalised(x.to(weight.dtype), saved), grad.to(weight.dtype)
    u = x_hat * _by_channel(weight) + _by_channel(bias)
    if activation != "none":
        clamped = u <= 0 if activation == "relu" else (u <= 0) | (u >= 6)
        grad = grad.masked_fill(clamped, 0)
    grad_weight, grad_bias = (grad * x_hat).sum((0, 2, 3)), grad.sum((0, 2, 3))
    if training:
        count = x.numel() // x.shape[1]
        grad = grad - (_by_channel(grad_bias) + x_hat * _by_channel(grad_weight)) / count
    return (grad * _by_channel(weight * saved[1])).to(x.dtype), torch.stack([grad_weight, grad_bias])


def _normalised(x: Tensor, saved: Tensor) -> Tensor:
    return (x - _by_channel(saved[0])) * _by_channel(saved[1])


def _by_channel(values: Tensor) -> Tensor:
    return values[:, None, None]


# ---- the operation, for eager and for compiled code ----------------------------------------------------


def forward(
    x: Tensor, weight: Tensor, bias: Tensor, running_mean: Tensor, running_var: Tensor,
    training: bool, momentum: float, eps: float, activation: str, backend: str,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """See `reference_forward`."""
    statistics = (running_mean, running_var, training, momentum, eps, activation)
    if backend == "reference":
        return reference_forward(x, weight, bias, *statistics)
    from kernels._triton import norm_act  # imports Triton only when it is used

    return norm_act.norm_act_forward(x, weight, bias, *statistics)


def backward(
    x: Tensor, grad: Tensor, weight: Tensor, bias: Tensor, saved: Tensor, training: bool, activation: str, backend: str
) -> tuple[Tensor, Tensor]:
    """See `reference_backward`."""
    if backend == "reference":
        return reference_backward(x, grad, weight, bias, saved, training, activation)
    from kernels._triton import norm_act

    return norm_act.norm_act_backward(x, grad, weight, bias, saved, training, activation)


def _functional(
    x: Tensor, weight: Tensor, bias: Tensor, running_mean: Tensor, running_var: Tensor,
    training: bool, momentum: float, eps: float, activation: str, backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """`forward` that returns new running statistics: a differentiable operator must not mutate its inputs."""
    running_mean, running_var = running_mean.clone(), running_var.clone()
    y, saved = forward(x, weight, bias, running_mean, running_var, training, momentum, eps, activation, backend)
    return y, saved, running_mean, running_var


norm_act_op = custom_op("mfkd_kernels::norm_act", _functional, mutates_args=())
norm_act_backward_op = custom_op("mfkd_kernels::norm_act_backward", backward, mutates_args=())


@norm_act_op.register_fake
def _(x: Tensor, weight: Tensor, *_: Any) -> tuple[Tensor, ...]:
    return torch.empty_like(x), weight.new_empty((2, x.shape[1])), torch.empty_like(weight), torch.empty_like(weight)


@norm_act_backward_op.register_fake
def _(x: Tensor, grad: Tensor, weight: Tensor, bias: Tensor, saved: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    return torch.empty_like(x), torch.empty_like(saved)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, weight, bias, _, _, training, _, _, activation, backend = inputs
    ctx.options = training, activation, backend
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(x, weight, bias, output[1])


def _differentiate(ctx: Any, grad: Tensor | None, *_: Tensor | None) -> tuple[Tensor | None, ...]:
    if grad is None:
        return (None,) * 10
    x, weight, bias, saved = ctx.saved_tensors
    run = norm_act_backward_op if torch.compiler.is_compiling() else backward
    grad_x, grad_parameters = run(x, grad, weight, bias, saved, *ctx.options)
    return (grad_x, *grad_parameters.unbind(), *(None,) * 7)


norm_act_op.register_autograd(_differentiate, setup_context=_save)


class _NormAct(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> tuple[Tensor, Tensor]:
        output = forward(*inputs)
        ctx.mark_non_differentiable(output[1])
        _save(ctx, inputs, output)
        return output

    backward = staticmethod(once_differentiable(_differentiate))  # type: ignore[assignment]
