"""Neuron selectivity transfer through the smaller Gram: one launch forward, one backward.

spatial (P = H W <= 64): a tile holds all positions of some channels, so a channel's norm comes from its
tile and D = A^T A / S - B^T B / T accumulates in one read of both features; dA = 4 / (N S) A D.
channel (C_s <= 64, C_t <= 128, float32 64): Grams of the raw features accumulate in one read, the norms
are their diagonals, and the projection of the normalisation folds into dF = W_ss F_s + W_st F_t.
"""
# mypy: allow-untyped-defs
from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels import _tiles
from kernels._triton.common import dot_operands, is_last, ordered_sum, ticket

SAME = 1.0 - 1e-6  # norm <= eps means r * eps == 1 up to rounding


@triton.jit
def _unit_rows(f_ptr, i_channel, i_position, eps, C: tl.constexpr, P: tl.constexpr,
               C_STRIDE: tl.constexpr, P_STRIDE: tl.constexpr):  # fmt: skip
    """Channels of length 1 over all positions, and the reciprocal lengths."""
    mask = (i_channel < C)[:, None] & (i_position < P)[None, :]
    pointer = f_ptr + i_channel[:, None] * C_STRIDE + i_position[None, :] * P_STRIDE
    f = tl.load(pointer, mask=mask, other=0.0).to(tl.float32)
    r = 1.0 / tl.maximum(tl.sqrt(tl.sum(f * f, 1)), eps)
    return f * r[:, None], r


@triton.jit
def spatial_kernel(
    s_ptr,  # [samples, S, P] student
    t_ptr,  # [samples, T, P] teacher
    d_ptr,  # [samples, P, P] out
    r_ptr,  # [samples, S] out
    partial_ptr,  # [samples] scratch
    loss_ptr,  # [] out
    ticket_ptr,  # [1] zero before and after
    s_sample_stride, t_sample_stride, eps,
    P: tl.constexpr, S: tl.constexpr, S_C_STRIDE: tl.constexpr, S_P_STRIDE: tl.constexpr,
    T: tl.constexpr, T_C_STRIDE: tl.constexpr, T_P_STRIDE: tl.constexpr,
    TERM: tl.constexpr, PARTIALS: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr,
    DOT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """A sample a program."""
    sample, samples = tl.program_id(0).to(tl.int64), tl.num_programs(0)
    i_position = tl.arange(0, BLOCK_P)
    s_ptr += sample * s_sample_stride
    t_ptr += sample * t_sample_stride
    gram_s = tl.zeros((BLOCK_P, BLOCK_P), tl.float32)
    gram_t = tl.zeros((BLOCK_P, BLOCK_P), tl.float32)
    for start in range(0, S, BLOCK_C):
        i_channel = start + tl.arange(0, BLOCK_C)
        a, r = _unit_rows(s_ptr, i_channel, i_position, eps, S, P, S_C_STRIDE, S_P_STRIDE)
        tl.store(r_ptr + sample * S + i_channel, r, mask=i_channel < S)
        a = a.to(DOT)
        gram_s = tl.dot(tl.trans(a), a, gram_s, input_precision=PRECISION)
    for start in range(0, T, BLOCK_C):
        i_channel = start + tl.arange(0, BLOCK_C)
        b, _ = _unit_rows(t_ptr, i_channel, i_position, eps, T, P, T_C_STRIDE, T_P_STRIDE)
        b = b.to(DOT)
        gram_t = tl.dot(tl.trans(b), b, gram_t, input_precision=PRECISION)
    gram_t = gram_t / T
    d = gram_s / S - gram_t
    loss = tl.sum(tl.sum(d * d, 1), 0)
    if not TERM:
        loss -= tl.sum(tl.sum(gram_t * gram_t, 1), 0)
    inside = (i_position < P)[:, None] & (i_position < P)[None, :]
    tl.store(d_ptr + sample * P * P + i_position[:, None] * P + i_position[None, :], d, mask=inside)
    tl.store(partial_ptr + sample, loss)
    if is_last(ticket_ptr, samples):
        tl.store(loss_ptr, ordered_sum(partial_ptr, samples, PARTIALS) / samples)


@triton.jit
def spatial_backward_kernel(
    s_ptr,  # [samples, S, P] student
    d_ptr,  # [samples, P, P]
    r_ptr,  # [samples, S]
    upstream_ptr,  # []
    grad_ptr,  # [samples, S, P] out
    s_sample_stride, g_sample_stride, samples, eps,
    P: tl.constexpr, S: tl.constexpr, C_STRIDE: tl.constexpr, P_STRIDE: tl.constexpr,
    G_C_STRIDE: tl.constexpr, G_P_STRIDE: tl.constexpr, SAME: tl.constexpr,
    BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """BLOCK_C channels of a sample a program: dF = r (dA - a <a, dA>)."""
    sample = tl.program_id(1).to(tl.int64)
    i_position = tl.arange(0, BLOCK_P)
    i_channel = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    mask = (i_channel < S)[:, None] & (i_position < P)[None, :]
    o_feature = i_channel[:, None] * C_STRIDE + i_position[None, :] * P_STRIDE
    f = tl.load(s_ptr + sample * s_sample_stride + o_feature, mask=mask, other=0.0).to(tl.float32)
    r = tl.load(r_ptr + sample * S + i_channel, mask=i_channel < S, other=0.0)
    inside = (i_position < P)[:, None] & (i_position < P)[None, :]
    d = tl.load(d_ptr + sample * P * P + i_position[:, None] * P + i_position[None, :], mask=inside, other=0.0)
    a = f * r[:, None]
    grad = tl.dot(a.to(DOT), d.to(DOT), input_precision=PRECISION)
    along = tl.where(r * eps < SAME, tl.sum(a * grad, 1), 0.0)
    scale = r * (tl.load(upstream_ptr).to(tl.float32) * (4.0 / S) / samples)
    grad = (grad - a * along[:, None]) * scale[:, None]
    o_grad = i_channel[:, None] * G_C_STRIDE + i_position[None, :] * G_P_STRIDE
    tl.store(grad_ptr + sample * g_sample_stride + o_grad, grad.to(grad_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _tile(f_ptr, i_channel, i_position, C: tl.constexpr, P: tl.constexpr,
          C_STRIDE: tl.constexpr, P_STRIDE: tl.constexpr):  # fmt: skip
    mask = (i_channel < C)[:, None] & (i_position < P)[None, :]
    return tl.load(f_ptr + i_channel[:, None] * C_STRIDE + i_position[None, :] * P_STRIDE, mask=mask, other=0.0)


@triton.jit
def channel_kernel(
    s_ptr,  # [samples, S, P] student
    t_ptr,  # [samples, T, P] teacher
    w_ss_ptr,  # [samples, S, S] out
    w_st_ptr,  # [samples, S, T] out
    partial_ptr,  # [2 * samples] scratch
    loss_ptr,  # [] out
    ticket_ptr,  # [1] zero before and after
    s_sample_stride, t_sample_stride, samples, eps,
    P: tl.constexpr, S: tl.constexpr, S_C_STRIDE: tl.constexpr, S_P_STRIDE: tl.constexpr,
    T: tl.constexpr, T_C_STRIDE: tl.constexpr, T_P_STRIDE: tl.constexpr, PARTIALS: tl.constexpr,
    BLOCK_S: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_P: tl.constexpr,
    DOT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Programs (sample, 0): the student's Grams and matrices; (sample, 1), if launched: the constant."""
    sample = tl.program_id(0).to(tl.int64)
    i_s, i_t = tl.arange(0, BLOCK_S), tl.arange(0, BLOCK_T)
    s_ptr += sample * s_sample_stride
    t_ptr += sample * t_sample_stride
    square_t = tl.zeros((BLOCK_T,), tl.float32)
    if tl.program_id(1) == 1:
        tt = tl.zeros((BLOCK_T, BLOCK_T), tl.float32)
        for start in range(0, P, BLOCK_P):
            f_t = _tile(t_ptr, i_t, start + tl.arange(0, BLOCK_P), T, P, T_C_STRIDE, T_P_STRIDE)
            wide = f_t.to(tl.float32)
            square_t += tl.sum(wide * wide, 1)
            f_t = wide.to(DOT)
            tt = tl.dot(f_t, tl.trans(f_t), tt, input_precision=PRECISION)
        r_t = 1.0 / tl.maximum(tl.sqrt(square_t), eps)
        tt = tt * r_t[:, None] * r_t[None, :]
        loss = tl.sum(tl.sum(tt * tt, 1), 0) / (T * T)
    else:
        square_s = tl.zeros((BLOCK_S,), tl.float32)
        ss = tl.zeros((BLOCK_S, BLOCK_S), tl.float32)
        st = tl.zeros((BLOCK_S, BLOCK_T), tl.float32)
        for start in range(0, P, BLOCK_P):
            i_position = start + tl.arange(0, BLOCK_P)
            wide_s = _tile(s_ptr, i_s, i_position, S, P, S_C_STRIDE, S_P_STRIDE).to(tl.float32)
            wide_t = _tile(t_ptr, i_t, i_position, T, P, T_C_STRIDE, T_P_STRIDE).to(tl.float32)
            square_s += tl.sum(wide_s * wide_s, 1)
            square_t += tl.sum(wide_t * wide_t, 1)
            f_s, f_t = wide_s.to(DOT), wide_t.to(DOT)
            ss = tl.dot(f_s, tl.trans(f_s), ss, input_precision=PRECISION)
            st = tl.dot(f_s, tl.trans(f_t), st, input_precision=PRECISION)
        norm_s = tl.sqrt(square_s)
        r_s = 1.0 / tl.maximum(norm_s, eps)
        r_t = 1.0 / tl.maximum(tl.sqrt(square_t), eps)
        ss = ss * r_s[:, None] * r_s[None, :]
        st = st * r_s[:, None] * r_t[None, :]
        own, cross = tl.sum(ss * ss, 1) / (S * S), tl.sum(st * st, 1) / (S * T)
        loss = tl.sum(own - 2.0 * cross, 0)
        along = tl.where(norm_s > eps, (own - cross) * r_s * r_s, 0.0)
        four = 4.0 / samples
        w_ss = ss * r_s[:, None] * r_s[None, :] / (S * S)
        w_ss = (w_ss - tl.where(i_s[:, None] == i_s[None, :], along[:, None], 0.0)) * four
        w_st = st * r_s[:, None] * r_t[None, :] * (-four / (S * T))
        m_s = (i_s < S)[:, None]
        o_ss, o_st = i_s[:, None] * S + i_s[None, :], i_s[:, None] * T + i_t[None, :]
        tl.store(w_ss_ptr + sample * S * S + o_ss, w_ss, mask=m_s & (i_s < S)[None, :])
        tl.store(w_st_ptr + sample * S * T + o_st, w_st, mask=m_s & (i_t < T)[None, :])
    tl.store(partial_ptr + tl.program_id(1) * samples + sample, loss)
    programs = tl.num_programs(0) * tl.num_programs(1)
    if is_last(ticket_ptr, programs):
        tl.store(loss_ptr, ordered_sum(partial_ptr, programs, PARTIALS) / samples)


@triton.jit
def channel_backward_kernel(
    s_ptr,  # [samples, S, P] student
    t_ptr,  # [samples, T, P] teacher
    w_ss_ptr,  # [samples, S, S]
    w_st_ptr,  # [samples, S, T]
    upstream_ptr,  # []
    grad_ptr,  # [samples, S, P] out
    s_sample_stride, t_sample_stride, g_sample_stride,
    P: tl.constexpr, S: tl.constexpr, S_C_STRIDE: tl.constexpr, S_P_STRIDE: tl.constexpr,
    T: tl.constexpr, T_C_STRIDE: tl.constexpr, T_P_STRIDE: tl.constexpr,
    G_C_STRIDE: tl.constexpr, G_P_STRIDE: tl.constexpr,
    BLOCK_S: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_P: tl.constexpr,
    DOT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """BLOCK_P positions of a sample a program: dF = W_ss F_s + W_st F_t."""
    sample = tl.program_id(1).to(tl.int64)
    i_s, i_t = tl.arange(0, BLOCK_S), tl.arange(0, BLOCK_T)
    i_position = tl.program_id(0) * BLOCK_P + tl.arange(0, BLOCK_P)
    f_s = _tile(s_ptr + sample * s_sample_stride, i_s, i_position, S, P, S_C_STRIDE, S_P_STRIDE)
    w_ss = _tile(w_ss_ptr + sample * S * S, i_s, i_s, S, S, S, 1)
    grad = tl.dot(w_ss.to(DOT), f_s.to(tl.float32).to(DOT), input_precision=PRECISION)
    f_t = _tile(t_ptr + sample * t_sample_stride, i_t, i_position, T, P, T_C_STRIDE, T_P_STRIDE)
    w_st = _tile(w_st_ptr + sample * S * T, i_s, i_t, S, T, T, 1)
    grad = tl.dot(w_st.to(DOT), f_t.to(tl.float32).to(DOT), grad, input_precision=PRECISION)
    grad = grad * tl.load(upstream_ptr).to(tl.float32)
    mask = (i_s < S)[:, None] & (i_position < P)[None, :]
    o_grad = i_s[:, None] * G_C_STRIDE + i_position[None, :] * G_P_STRIDE
    tl.store(grad_ptr + sample * g_sample_stride + o_grad, grad.to(grad_ptr.dtype.element_ty), mask=mask)


def nst_forward(
    student: Tensor, teacher: Tensor, method: str, teacher_term: bool, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """`reference.nst_forward` in one launch."""
    samples, s_channels, t_channels = student.shape[0], student.shape[1], teacher.shape[1]
    s, t = student.flatten(2), teacher.flatten(2)  # views where rows of a map follow each other, else copies
    positions = s.shape[2]
    loss = student.new_empty((), dtype=torch.float32)
    shapes = ((positions, positions), (s_channels, 1))
    if method == "channel":
        shapes = (s_channels, s_channels), (s_channels, t_channels)
    first, second = (loss.new_empty((samples, *shape)) for shape in shapes)
    if samples == 0:
        return loss.fill_(torch.nan), first, second
    tile = _tiles.nst_tile(method, s, t, backward=False)
    dot, precision = dot_operands(student.dtype)
    common = dict(
        P=positions, S=s_channels, S_C_STRIDE=s.stride(1), S_P_STRIDE=s.stride(2),
        T=t_channels, T_C_STRIDE=t.stride(1), T_P_STRIDE=t.stride(2), DOT=dot, PRECISION=precision, **tile,
    )  # fmt: skip
    programs = samples if method == "spatial" else samples * (1 + teacher_term)
    common["PARTIALS"] = _tiles.power_of_two(programs)
    pointers = (s, t, first, second, loss.new_empty(programs), loss, ticket(student.device))
    with torch.cuda.device_of(student):
        if method == "spatial":
            spatial_kernel[(samples,)](*pointers, s.stride(0), t.stride(0), eps, TERM=teacher_term, **common)
        else:
            grid = (samples, 1 + teacher_term)
            channel_kernel[grid](*pointers, s.stride(0), t.stride(0), samples, eps, **common)
    return loss, first, second


def nst_backward(
    student: Tensor, teacher: Tensor, first: Tensor, second: Tensor, upstream: Tensor, method: str, eps: float
) -> Tensor:
    """`reference.nst_backward` in one launch."""
    out = torch.empty_like(student)
    if student.numel() == 0:
        return out
    s, t, grad = student.flatten(2), teacher.flatten(2), out.flatten(2)
    samples, channels, positions = s.shape
    tile = _tiles.nst_tile(method, s, t, backward=True)
    dot, precision = dot_operands(student.dtype, wide=True)
    common = dict(P=positions, S=channels, G_C_STRIDE=grad.stride(1), G_P_STRIDE=grad.stride(2),
                  DOT=dot, PRECISION=precision, **tile)  # fmt: skip
    with torch.cuda.device_of(student):
        if method == "spatial":
            spatial_backward_kernel[(triton.cdiv(channels, tile["BLOCK_C"]), samples)](
                s, first, second, upstream, grad, s.stride(0), grad.stride(0), samples, eps,
                C_STRIDE=s.stride(1), P_STRIDE=s.stride(2), SAME=SAME, **common,
            )  # fmt: skip
        else:
            channel_backward_kernel[(triton.cdiv(positions, tile["BLOCK_P"]), samples)](
                s, t, first, second, upstream, grad, s.stride(0), t.stride(0), grad.stride(0),
                S_C_STRIDE=s.stride(1), S_P_STRIDE=s.stride(2),
                T=t.shape[1], T_C_STRIDE=t.stride(1), T_P_STRIDE=t.stride(2), **common,
            )  # fmt: skip
    # Where rows of a map do not follow each other (x.transpose(2, 3)), flatten made a copy, which is what was filled.
    return out if grad.data_ptr() == out.data_ptr() else out.copy_(grad.view(out.shape))
