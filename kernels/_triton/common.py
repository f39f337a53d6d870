"""Shared by the kernels: precision, reductions within a launch, and the accurate terms of a divergence."""
# mypy: allow-untyped-defs
# (a kernel's pointers have no Python type)
from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels import _dispatch

INTERPRETING = tl.constexpr(_dispatch.interpreting())
LARGE = tl.constexpr(1e30)  # finite, so that 0 times it is 0
_TICKETS: dict[tuple[int, int], Tensor] = {}


def ticket(device: torch.device, count: int = 1) -> Tensor:
    """`count` or more zeroed int32 counters for `is_last`, which every launch leaves at zero.

    There is one set per stream, because a stream runs its kernels in order. A CUDA graph gets its own set, zeroed by
    a node of the graph, since its replays may run beside the stream that captured it. So does each call from compiled
    code.
    """
    if device.type != "cuda" or _dispatch.COMPILED.get() or torch.cuda.is_current_stream_capturing():
        return torch.zeros(count, dtype=torch.int32, device=device)
    index = torch.cuda.current_device() if device.index is None else device.index
    key = index, torch.cuda.current_stream(device).cuda_stream
    if key not in _TICKETS or len(_TICKETS[key]) < count:
        _TICKETS[key] = torch.zeros(max(count, 1024), dtype=torch.int32, device=device)
    return _TICKETS[key]


def dot_operands(dtype: torch.dtype, wide: bool = False) -> tuple[tl.dtype, str]:
    """(operand type, input_precision) of a matrix product; accumulation is always in float32.

    float32 features multiply as three tf32 products, which keeps float32's accuracy. `wide` is for operands
    beyond float16's range: float16 then multiplies as tf32, which has the same 11 bits. The interpreter
    computes with the raw bits of bfloat16 (triton-lang/triton#11584), so it gets float32.
    """
    if INTERPRETING or dtype == torch.float32:
        return tl.float32, "tf32x3"
    if dtype == torch.bfloat16:
        return tl.bfloat16, "tf32"
    return (tl.float32, "tf32") if wide else (tl.float16, "tf32")


@triton.jit
def is_last(ticket_ptr, programs):
    """Whether this is the last of `programs` to call; the last one sees all stores, and resets the ticket."""
    tl.debug_barrier()  # all threads have stored their partials before the ticket is drawn
    drawn = tl.atomic_add(ticket_ptr, 1, sem="acq_rel", scope="gpu")
    last = drawn == programs - 1
    if last:
        tl.store(ticket_ptr, 0)
    return last


@triton.jit
def ordered_sum(partial_ptr, count, PARTIALS: tl.constexpr):
    """Sum of `count` <= PARTIALS numbers in a fixed order; bypasses the L1 cache, which may be stale."""
    BLOCK: tl.constexpr = PARTIALS if PARTIALS < 1024 else 1024
    total = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, PARTIALS, BLOCK):
        i_partial = start + tl.arange(0, BLOCK)
        total += tl.load(partial_ptr + i_partial, mask=i_partial < count, other=0.0, cache_modifier=".cg")
    return tl.sum(total, 0)


@triton.jit
def exp2(x):
    """2^x, with results below 2^-126 flushed to 0. Keeping them would take three more instructions."""
    if INTERPRETING:
        return tl.exp2(x)
    return tl.inline_asm_elementwise("ex2.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1)


@triton.jit
def quotient(a, b):
    """a / b, correctly rounded except for rare ties; Triton's `/` may be 2 ulp off, even if a = b.

    `tl.div_rn` is as accurate, but calls a subroutine for denormals, around which ptxas spills registers.
    """
    inverse = 1.0 / b
    q = a * inverse
    return tl.fma(tl.fma(-q, b, a), inverse, q)


@triton.jit
def divergence(v, p_s, p_t):
    """p_t (exp(v) - 1 - v) and p_t (exp(v) - 1) for v = log p_s - log p_t, both without cancellation.

    For |v| < 1/4 this is a series whose first omitted term is below 2e-8 of it; otherwise p_s - p_t - p_t v and
    p_s - p_t. In a masked class p_t = 0, and v is clamped so that their product is 0.
    """
    f = 1.0 / 5040.0 + v * (1.0 / 40320.0)
    f = 1.0 / 120.0 + v * (1.0 / 720.0 + v * f)
    f = v * v * (0.5 + v * (1.0 / 6.0 + v * (1.0 / 24.0 + v * f)))
    small = tl.abs(v) < 0.25
    difference, first, rest = p_s - p_t, p_t * tl.minimum(v, LARGE), p_t * f
    return tl.where(small, rest, difference - first), tl.where(small, first + rest, difference)
