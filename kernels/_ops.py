"""The losses as differentiable operations (forward, what is saved, backward) for eager and compiled code.

Each loss has one plain forward, one plain backward and one `setup_context`, used twice: by an
`autograd.Function` (eager calls, at a third of a custom operator's overhead) and by a registered operator with
a fake kernel, which `torch.compile(fullgraph=True)` can trace. `backend` is already "triton" or "reference".
"""
from __future__ import annotations

import functools
import importlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.library import custom_op

from kernels import _dispatch, _tiles, reference
from kernels.reference import CEKDSpec

Parts = tuple[float, float, float]


def _implementation(loss: str, backend: str) -> Any:
    if backend == "reference":
        return reference
    return importlib.import_module(f"kernels._triton.{loss}")  # imports Triton only if it is used


def _eager_or_compiled(function: Callable[..., Any], operator: Any) -> Any:
    return operator if torch.compiler.is_compiling() else function


def _function(forward: Callable[..., Any], save: Callable[..., None], differentiate: Callable[..., Any]) -> Any:
    """The `autograd.Function` of a loss, without `setup_context`, whose binding of defaults costs 80 us per call."""

    def run(ctx: Any, *inputs: Any) -> Any:
        output = forward(*inputs)
        save(ctx, inputs, output)
        return output

    members = {"forward": staticmethod(run), "backward": staticmethod(once_differentiable(differentiate))}
    return type(forward.__name__, (torch.autograd.Function,), members)


def _operator(name: str, function: Callable[..., Any]) -> Any:
    """The function as the operator that compiled code calls."""

    @functools.wraps(function)
    def run(*inputs: Any) -> Any:
        token = _dispatch.COMPILED.set(True)
        try:
            return function(*inputs)
        finally:
            _dispatch.COMPILED.reset(token)

    return custom_op(f"mfkd_kernels::{name}", run, mutates_args=())


def _register(
    name: str,
    forward: Callable[..., Any],
    backward: Callable[..., Any],
    fake: Callable[..., Any],
    save: Callable[..., None],
    differentiate: Callable[..., Any],
) -> tuple[Any, Any]:
    """The operators that `torch.compile` traces: a loss, and its gradient, which has the student's shape and layout."""
    operator = _operator(name, forward)
    operator.register_fake(fake)
    operator.register_autograd(differentiate, setup_context=save)
    gradient = _operator(f"{name}_backward", backward)
    gradient.register_fake(lambda student, *_: torch.empty_like(student))
    return operator, gradient


# ---- cross entropy + knowledge distillation ------------------------------------------------------------


def ce_kd_forward(
    student: Tensor,
    teacher: Tensor,
    target: Tensor | None,
    target_b: Tensor | None,
    lam: Tensor | None,
    temperature: float,
    ce_weight: float,
    kd_weight: float,
    label_smoothing: float,
    ignore_index: int,
    variant: str,
    dkd_alpha: float,
    dkd_beta: float,
    standardize: bool,
    reduction: str,
    with_grad: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """See `reference.ce_kd_forward`; the spec is spelled out, as an operator's schema requires."""
    spec = CEKDSpec(
        temperature, ce_weight, kd_weight, label_smoothing, ignore_index,
        variant, dkd_alpha, dkd_beta, standardize, reduction,
    )  # fmt: skip
    forward = _implementation("ce_kd", backend).ce_kd_forward
    return forward(student, teacher, target, target_b, lam, spec, with_grad)


def ce_kd_backward(grad: Tensor, upstream: Tensor, count: Tensor, reduction: str, backend: str) -> Tensor:
    """See `reference.ce_kd_backward`."""
    return _implementation("ce_kd", backend).ce_kd_backward(grad, upstream, count, reduction)


def _ce_kd_fake(student: Tensor, *arguments: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    reduction, with_grad, backend = arguments[-3:]
    dtype = reference.accumulation_dtype(student.dtype)
    loss = student.new_empty(student.shape[:1] if reduction == "none" else (), dtype=dtype)
    grad = student.new_empty(student.shape if with_grad else 0)
    if with_grad and backend == "triton":
        grad = _tiles.gradient_buffer(student)
    return loss, student.new_empty(3, dtype=dtype), grad, student.new_empty((), dtype=dtype)


def _ce_kd_save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.reduction, ctx.backend, ctx.inputs = inputs[-3], inputs[-1], len(inputs)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*output[2:])


def _ce_kd_differentiate(ctx: Any, *upstreams: Tensor | None) -> tuple[Tensor | None, ...]:
    upstream = upstreams[0]
    backward = _eager_or_compiled(ce_kd_backward, ce_kd_backward_op)
    grad = None if upstream is None else backward(ctx.saved_tensors[0], upstream, ctx.saved_tensors[1],
                                                  ctx.reduction, ctx.backend)  # fmt: skip
    return (grad, *(None,) * (ctx.inputs - 1))


ce_kd_op = _operator("ce_kd", ce_kd_forward)
ce_kd_op.register_fake(_ce_kd_fake)
ce_kd_op.register_autograd(_ce_kd_differentiate, setup_context=_ce_kd_save)
ce_kd_backward_op = _operator("ce_kd_backward", ce_kd_backward)
ce_kd_backward_op.register_fake(
    lambda grad, *_: torch.empty_strided(grad.shape, grad.stride(), dtype=grad.dtype, device=grad.device)
)


class _CEKD(torch.autograd.Function):
    """Not made by `_function`, because of its fast path, `reference.ce_kd_plain`, whose backward is one product."""

    @staticmethod
    def forward(ctx: Any, student: Tensor, *arguments: Any) -> tuple[Tensor, Tensor | Parts]:
        plain = None
        if arguments[-1] == "reference" and arguments[2] is None:
            plain = reference.ce_kd_plain(student, arguments[0], arguments[1], CEKDSpec._make(arguments[4:14]))
        if plain is None:
            loss, parts, grad, count = ce_kd_forward(student, *arguments)
            ctx.mark_non_differentiable(parts)
            ctx.set_materialize_grads(False)
            ctx.save_for_backward(grad, count)
            ctx.options = arguments[-3], arguments[-1]
            return loss, parts
        loss, numbers, grad, ctx.scale = plain
        ctx.save_for_backward(grad)
        return loss, numbers

    @staticmethod
    def backward(ctx: Any, upstream: Tensor | None, _: None) -> tuple[Tensor | None, ...]:
        # The guard against a second derivative costs 5 us and is needed only if the gradient itself has a graph.
        return (_ce_kd_once if torch.is_grad_enabled() else _ce_kd_first)(ctx, upstream)


def _ce_kd_first(ctx: Any, upstream: Tensor | None) -> tuple[Tensor | None, ...]:
    saved = ctx.saved_tensors
    if upstream is None:
        return (None,) * 17
    if len(saved) == 1:
        return (saved[0] * (upstream * ctx.scale), *(None,) * 16)
    return (ce_kd_backward(saved[0], upstream, saved[1], *ctx.options), *(None,) * 16)


_ce_kd_once = once_differentiable(_ce_kd_first)


def ce_kd(student: Tensor, *arguments: Any) -> tuple[Tensor, Tensor | Parts]:
    """(loss, parts), differentiable with respect to the student's logits; parts are numbers if they are on the host."""
    if torch.compiler.is_compiling():
        loss, parts, _, _ = ce_kd_op(student, *arguments)
        return loss, parts
    return _CEKD.apply(student, *arguments)


# ---- attention transfer --------------------------------------------------------------------------------


def attention_forward(
    student: Tensor, teacher: Tensor, p: float, mode: str, eps: float, backend: str
) -> tuple[Tensor, Tensor]:
    """See `reference.attention_forward`."""
    return _implementation("attention", backend).attention_forward(student, teacher, p, mode, eps)


def attention_backward(student: Tensor, coef: Tensor, upstream: Tensor, p: float, backend: str) -> Tensor:
    """See `reference.attention_backward`."""
    return _implementation("attention", backend).attention_backward(student, coef, upstream, p)


def _attention_fake(student: Tensor, teacher: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    dtype = reference.accumulation_dtype(student.dtype)
    height, width = min(student.shape[2], teacher.shape[2]), min(student.shape[3], teacher.shape[3])
    coef = student.new_empty((student.shape[0], height, width), dtype=dtype)
    return student.new_empty((), dtype=dtype), coef


def _attention_save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.p, ctx.backend = inputs[2], inputs[5]
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(inputs[0], output[1])


def _attention_differentiate(ctx: Any, *upstreams: Tensor | None) -> tuple[Tensor | None, ...]:
    upstream = upstreams[0]
    backward = _eager_or_compiled(attention_backward, attention_backward_op)
    grad = None if upstream is None else backward(*ctx.saved_tensors, upstream, ctx.p, ctx.backend)
    return (grad, None, None, None, None, None)


attention_op, attention_backward_op = _register(
    "attention", attention_forward, attention_backward, _attention_fake, _attention_save, _attention_differentiate
)
_Attention = _function(attention_forward, _attention_save, _attention_differentiate)


def attention(student: Tensor, *arguments: Any) -> Tensor:
    """The loss of one pair of features, differentiable with respect to the student's."""
    return _eager_or_compiled(_Attention.apply, attention_op)(student, *arguments)[0]


# ---- neuron selectivity transfer -----------------------------------------------------------------------


def nst_forward(
    student: Tensor, teacher: Tensor, method: str, teacher_term: bool, eps: float, backend: str
) -> tuple[Tensor, Tensor, Tensor]:
    """See `reference.nst_forward`."""
    return _implementation("nst", backend).nst_forward(student, teacher, method, teacher_term, eps)


def nst_backward(
    student: Tensor,
    teacher: Tensor,
    first: Tensor,
    second: Tensor,
    upstream: Tensor,
    method: str,
    eps: float,
    backend: str,
) -> Tensor:
    """See `reference.nst_backward`."""
    backward = _implementation("nst", backend).nst_backward
    return backward(student, teacher, first, second, upstream, method, eps)


def _nst_fake(student: Tensor, teacher: Tensor, method: str, *_: Any) -> tuple[Tensor, Tensor, Tensor]:
    dtype = reference.accumulation_dtype(student.dtype)
    samples, s, t = student.shape[0], student.shape[1], teacher.shape[1]
    positions = student.shape[2] * student.shape[3]
    shapes = ((positions, positions), (s, 1)) if method == "spatial" else ((s, s), (s, t))
    first, second = (student.new_empty((samples, *shape), dtype=dtype) for shape in shapes)
    return student.new_empty((), dtype=dtype), first, second


def _nst_save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.method, ctx.eps, ctx.backend = inputs[2], inputs[4], inputs[5]
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*inputs[:2], *output[1:])


def _nst_differentiate(ctx: Any, *upstreams: Tensor | None) -> tuple[Tensor | None, ...]:
    upstream = upstreams[0]
    backward = _eager_or_compiled(nst_backward, nst_backward_op)
    grad = None
    if upstream is not None:
        grad = backward(*ctx.saved_tensors, upstream, ctx.method, ctx.eps, ctx.backend)
    return (grad, None, None, None, None, None)


nst_op, nst_backward_op = _register(
    "nst", nst_forward, nst_backward, _nst_fake, _nst_save, _nst_differentiate
)
_NST = _function(nst_forward, _nst_save, _nst_differentiate)


def nst(student: Tensor, *arguments: Any) -> Tensor:
    """The loss of one pair of features, differentiable with respect to the student's."""
    return _eager_or_compiled(_NST.apply, nst_op)(student, *arguments)[0]
