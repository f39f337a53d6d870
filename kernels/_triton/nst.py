"""Neuron selectivity transfer through the smaller Gram: one launch forward, one backward.

spatial (P = H W <= 64): a tile holds all positions of some channels, so a channel's norm comes from its own
tile, and D = A^T A / S - B^T B / T accumulates in one read of both features; dA = 4 / (N S) A D.
channel (C_s <= 64, C_t <= 128, float32 64): three Grams of the raw features accumulate in one read. The norms
are their diagonals, and the projection of the normalisation folds into dF = W_ss F_s + W_st F_t.
If there are few samples, SPLITS programs share each of them, and the last one adds up their Grams in a fixed order.
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
    """Channels normalised to length 1 over all positions, and the reciprocal lengths."""
    mask = (i_channel < C)[:, None] & (i_position < P)[None, :]
    pointer = f_ptr + i_channel[:, None] * C_STRIDE + i_position[None, :] * P_STRIDE
    f = tl.load(pointer, mask=mask, other=0.0).to(tl.float32)
    r = tl.rsqrt(tl.maximum(tl.sum(f * f, 1), tl.maximum(eps * eps, 1e-37)))
    return f * r[:, None], r


@triton.jit
def _matrix(rows, columns, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Offsets and mask of a [ROWS, COLUMNS] matrix without padding."""
    return rows[:, None] * COLUMNS + columns[None, :], (rows < ROWS)[:, None] & (columns < COLUMNS)[None, :]


@triton.jit
def _sum_of_splits(scratch_ptr, offset, mask, STEP: tl.constexpr, SPLITS: tl.constexpr):
    """The splits' matrices, STEP elements apart, added in order; bypasses the L1 cache, which may be stale."""
    total = tl.load(scratch_ptr + offset, mask=mask, other=0.0, cache_modifier=".cg")
    for split in tl.static_range(1, SPLITS):
        total += tl.load(scratch_ptr + (split * STEP + offset), mask=mask, other=0.0, cache_modifier=".cg")
    return total


@triton.jit
def _spatial_gram(
    f_ptr, r_ptr, split, i_position, eps, P: tl.constexpr, C: tl.constexpr, C_STRIDE: tl.constexpr,
    P_STRIDE: tl.constexpr, PART: tl.constexpr, KEEP: tl.constexpr, BLOCK_C: tl.constexpr,
    DOT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """A^T A over a split's PART channels, each of length 1. The norms weight the products, so they come first."""
    gram = tl.zeros((i_position.shape[0], i_position.shape[0]), tl.float32)
    for start in range(0, PART, BLOCK_C):
        i_channel = split * PART + start + tl.arange(0, BLOCK_C)
        a, r = _unit_rows(f_ptr, i_channel, i_position, eps, C, P, C_STRIDE, P_STRIDE)
        if KEEP:
            tl.store(r_ptr + i_channel, r, mask=i_channel < C)
        a = a.to(DOT)
        gram = tl.dot(tl.trans(a), a, gram, input_precision=PRECISION)
    return gram * (1.0 / C)


@triton.jit
def spatial_kernel(
    s_ptr,  # [samples, S, P] student
    t_ptr,  # [samples, T, P] teacher
    d_ptr,  # [samples, P, P] out
    r_ptr,  # [samples, S] out
    scratch_ptr,  # [samples, SPLITS, 2, P, P] if SPLITS > 1
    partial_ptr,  # [samples] scratch
    loss_ptr,  # [] out
    ticket_ptr,  # [1 + samples] zero before and after
    samples, eps,
    P: tl.constexpr,
    S: tl.constexpr, S_STRIDE: tl.constexpr, S_C_STRIDE: tl.constexpr, S_P_STRIDE: tl.constexpr,
    T: tl.constexpr, T_STRIDE: tl.constexpr, T_C_STRIDE: tl.constexpr, T_P_STRIDE: tl.constexpr,
    TERM: tl.constexpr, PARTIALS: tl.constexpr, SPLITS: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr,
    DOT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Grid (samples, SPLITS): each program takes part of a sample's channels."""
    sample, split = tl.program_id(0).to(tl.int64), tl.program_id(1)
    S_PART: tl.constexpr = (S + SPLITS * BLOCK_C - 1) // (SPLITS * BLOCK_C) * BLOCK_C
    T_PART: tl.constexpr = (T + SPLITS * BLOCK_C - 1) // (SPLITS * BLOCK_C) * BLOCK_C
    i_position = tl.arange(0, BLOCK_P)
    gram_s = _spatial_gram(s_ptr + sample * S_STRIDE, r_ptr + sample * S, split, i_position, eps,
                           P, S, S_C_STRIDE, S_P_STRIDE, S_PART, True, BLOCK_C, DOT, PRECISION)  # fmt: skip
    gram_t = _spatial_gram(t_ptr + sample * T_STRIDE, r_ptr, split, i_position, eps,
                           P, T, T_C_STRIDE, T_P_STRIDE, T_PART, False, BLOCK_C, DOT, PRECISION)  # fmt: skip
    d = gram_s - gram_t
    offset, mask = _matrix(i_position, i_position, P, P)
    last = True
    if SPLITS > 1:
        scratch_ptr += sample * (SPLITS * 2 * P * P)
        own = scratch_ptr + split * (2 * P * P)
        tl.store(own + offset, d, mask=mask)
        if not TERM:
            tl.store(own + P * P + offset, gram_t, mask=mask)
        last = is_last(ticket_ptr + 1 + sample, SPLITS)
    if last:
        if SPLITS > 1:
            d = _sum_of_splits(scratch_ptr, offset, mask, 2 * P * P, SPLITS)
            if not TERM:
                gram_t = _sum_of_splits(scratch_ptr + P * P, offset, mask, 2 * P * P, SPLITS)
        loss = tl.sum(tl.sum(d * d, 1), 0)
        if not TERM:
            loss -= tl.sum(tl.sum(gram_t * gram_t, 1), 0)
        tl.store(d_ptr + sample * (P * P) + offset, d, mask=mask)
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
    samples, eps,
    P: tl.constexpr, S: tl.constexpr, S_STRIDE: tl.constexpr, C_STRIDE: tl.constexpr, P_STRIDE: tl.constexpr,
    G_STRIDE: tl.constexpr, G_C_STRIDE: tl.constexpr, G_P_STRIDE: tl.constexpr, SAME: tl.constexpr,
    BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """BLOCK_C channels of a sample per program: dF = r (dA - a <a, dA>)."""
    sample = tl.program_id(1).to(tl.int64)
    i_position = tl.arange(0, BLOCK_P)
    i_channel = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    mask = (i_channel < S)[:, None] & (i_position < P)[None, :]
    o_feature = i_channel[:, None] * C_STRIDE + i_position[None, :] * P_STRIDE
    f = tl.load(s_ptr + sample * S_STRIDE + o_feature, mask=mask, other=0.0).to(tl.float32)
    r = tl.load(r_ptr + sample * S + i_channel, mask=i_channel < S, other=0.0)
    inside = (i_position < P)[:, None] & (i_position < P)[None, :]
    d = tl.load(d_ptr + sample * P * P + i_position[:, None] * P + i_position[None, :], mask=inside, other=0.0)
    a = f * r[:, None]
    grad = tl.dot(a.to(DOT), d.to(DOT), input_precision=PRECISION)
    along = tl.where(r * eps < SAME, tl.sum(a * grad, 1), 0.0)
    scale = r * (tl.load(upstream_ptr).to(tl.float32) * (4.0 / S) / samples)
    grad = (grad - a * along[:, None]) * scale[:, None]
    o_grad = i_channel[:, None] * G_C_STRIDE + i_position[None, :] * G_P_STRIDE
    tl.store(grad_ptr + sample * G_STRIDE + o_grad, grad.to(grad_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _tile(f_ptr, i_channel, i_position, C: tl.constexpr, P: tl.constexpr,
          C_STRIDE: tl.constexpr, P_STRIDE: tl.constexpr, DOT: tl.constexpr):  # fmt: skip
    """[channels, positions] as an operand of a product."""
    mask = (i_channel < C)[:, None] & (i_position < P)[None, :]
    pointer = f_ptr + i_channel[:, None] * C_STRIDE + i_position[None, :] * P_STRIDE
    return tl.load(pointer, mask=mask, other=0.0).to(tl.float32).to(DOT)


@triton.jit
def _diagonal(gram, i_channel):
    return tl.sum(tl.where(i_channel[:, None] == i_channel[None, :], gram, 0.0), 1)


@triton.jit
def channel_kernel(
    s_ptr,  # [samples, S, P] student
    t_ptr,  # [samples, T, P] teacher
    w_ss_ptr,  # [samples, S, S] out
    w_st_ptr,  # [samples, S, T] out
    scratch_ptr,  # [samples, SPLITS, S * S + S * T + T * T] if SPLITS > 1
    partial_ptr,  # [samples] scratch
    loss_ptr,  # [] out
    ticket_ptr,  # [1 + samples] zero before and after
    samples, eps,
    P: tl.constexpr,
    S: tl.constexpr, S_STRIDE: tl.constexpr, S_C_STRIDE: tl.constexpr, S_P_STRIDE: tl.constexpr,
    T: tl.constexpr, T_STRIDE: tl.constexpr, T_C_STRIDE: tl.constexpr, T_P_STRIDE: tl.constexpr,
    TERM: tl.constexpr, PARTIALS: tl.constexpr, SPLITS: tl.constexpr,
    TWICE: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_P: tl.constexpr,
    DOT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Grid (samples, SPLITS): each program takes part of a sample's positions."""
    sample, split = tl.program_id(0).to(tl.int64), tl.program_id(1)
    PART: tl.constexpr = (P + SPLITS * BLOCK_P - 1) // (SPLITS * BLOCK_P) * BLOCK_P
    i_s, i_t = tl.arange(0, BLOCK_S), tl.arange(0, BLOCK_T)
    s_ptr += sample * S_STRIDE
    t_ptr += sample * T_STRIDE
    ss = tl.zeros((BLOCK_S, BLOCK_S), tl.float32)
    st = tl.zeros((BLOCK_S, BLOCK_T), tl.float32)
    tt = tl.zeros((BLOCK_T, BLOCK_T), tl.float32)
    for start in range(0, PART, BLOCK_P):
        i_position = split * PART + start + tl.arange(0, BLOCK_P)
        f_s = _tile(s_ptr, i_s, i_position, S, P, S_C_STRIDE, S_P_STRIDE, DOT)
        f_t = _tile(t_ptr, i_t, i_position, T, P, T_C_STRIDE, T_P_STRIDE, DOT)
        ss = tl.dot(f_s, tl.trans(f_s), ss, input_precision=PRECISION)
        st = tl.dot(f_s, tl.trans(f_t), st, input_precision=PRECISION)
        if not TWICE:
            tt = tl.dot(f_t, tl.trans(f_t), tt, input_precision=PRECISION)
    if TWICE:  # three Grams at once take too many registers: reads the teacher again, from L2
        for start in range(0, PART, BLOCK_P):
            i_position = split * PART + start + tl.arange(0, BLOCK_P)
            f_t = _tile(t_ptr, i_t, i_position, T, P, T_C_STRIDE, T_P_STRIDE, DOT)
            tt = tl.dot(f_t, tl.trans(f_t), tt, input_precision=PRECISION)
    o_ss, m_ss = _matrix(i_s, i_s, S, S)
    o_st, m_st = _matrix(i_s, i_t, S, T)
    o_tt, m_tt = _matrix(i_t, i_t, T, T)
    last = True
    if SPLITS > 1:
        SIZE: tl.constexpr = S * S + S * T + T * T
        scratch_ptr += sample * (SPLITS * SIZE)
        own = scratch_ptr + split * SIZE
        tl.store(own + o_ss, ss, mask=m_ss)
        tl.store(own + (S * S + o_st), st, mask=m_st)
        tl.store(own + (S * S + S * T + o_tt), tt, mask=m_tt)
        last = is_last(ticket_ptr + 1 + sample, SPLITS)
    if last:
        if SPLITS > 1:  # each sum next to its use: all three at once take too many registers
            tt = _sum_of_splits(scratch_ptr + (S * S + S * T), o_tt, m_tt, SIZE, SPLITS)
        r_t = 1.0 / tl.maximum(tl.sqrt(_diagonal(tt, i_t)), eps)
        loss = 0.0
        if TERM:
            tt = tt * r_t[:, None] * r_t[None, :]
            loss += tl.sum(tl.sum(tt * tt, 1), 0) * (1.0 / (T * T))
        if SPLITS > 1:
            ss = _sum_of_splits(scratch_ptr, o_ss, m_ss, SIZE, SPLITS)
        norm_s = tl.sqrt(_diagonal(ss, i_s))
        r_s = 1.0 / tl.maximum(norm_s, eps)
        ss = ss * r_s[:, None] * r_s[None, :]
        if SPLITS > 1:
            st = _sum_of_splits(scratch_ptr + S * S, o_st, m_st, SIZE, SPLITS)
        st = st * r_s[:, None] * r_t[None, :]
        own_square, cross = tl.sum(ss * ss, 1) * (1.0 / (S * S)), tl.sum(st * st, 1) * (1.0 / (S * T))
        loss += tl.sum(own_square - 2.0 * cross, 0)
        along = tl.where(norm_s > eps, (own_square - cross) * r_s * r_s, 0.0)
        four = 4.0 / samples
        w_ss = ss * r_s[:, None] * r_s[None, :] * (1.0 / (S * S))
        w_ss = (w_ss - tl.where(i_s[:, None] == i_s[None, :], along[:, None], 0.0)) * four
        w_st = st * r_s[:, None] * r_t[None, :] * (-four * (1.0 / (S * T)))
        tl.store(w_ss_ptr + sample * (S * S) + o_ss, w_ss, mask=m_ss)
        tl.store(w_st_ptr + sample * (S * T) + o_st, w_st, mask=m_st)
        tl.store(partial_ptr + sample, loss)
        if is_last(ticket_ptr, samples):
            tl.store(loss_ptr, ordered_sum(partial_ptr, samples, PARTIALS) / samples)


@triton.jit
def channel_backward_kernel(
    s_ptr,  # [samples, S, P] student
    t_ptr,  # [samples, T, P] teacher
    w_ss_ptr,  # [samples, S, S]
    w_st_ptr,  # [samples, S, T]
    upstream_ptr,  # []
    grad_ptr,  # [samples, S, P] out
    P: tl.constexpr,
    S: tl.constexpr, S_STRIDE: tl.constexpr, S_C_STRIDE: tl.constexpr, S_P_STRIDE: tl.constexpr,
    T: tl.constexpr, T_STRIDE: tl.constexpr, T_C_STRIDE: tl.constexpr, T_P_STRIDE: tl.constexpr,
    G_STRIDE: tl.constexpr, G_C_STRIDE: tl.constexpr, G_P_STRIDE: tl.constexpr,
    BLOCK_S: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_P: tl.constexpr,
    DOT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """BLOCK_P positions of a sample per program: dF = W_ss F_s + W_st F_t."""
    sample = tl.program_id(1).to(tl.int64)
    i_s, i_t = tl.arange(0, BLOCK_S), tl.arange(0, BLOCK_T)
    i_position = tl.program_id(0) * BLOCK_P + tl.arange(0, BLOCK_P)
    f_s = _tile(s_ptr + sample * S_STRIDE, i_s, i_position, S, P, S_C_STRIDE, S_P_STRIDE, DOT)
    w_ss = _tile(w_ss_ptr + sample * (S * S), i_s, i_s, S, S, S, 1, DOT)
    grad = tl.dot(w_ss, f_s, input_precision=PRECISION)
    f_t = _tile(t_ptr + sample * T_STRIDE, i_t, i_position, T, P, T_C_STRIDE, T_P_STRIDE, DOT)
    w_st = _tile(w_st_ptr + sample * (S * T), i_s, i_t, S, T, T, 1, DOT)
    grad = tl.dot(w_st, f_t, grad, input_precision=PRECISION)
    grad = grad * tl.load(upstream_ptr).to(tl.float32)
    mask = (i_s < S)[:, None] & (i_position < P)[None, :]
    o_grad = i_s[:, None] * G_C_STRIDE + i_position[None, :] * G_P_STRIDE
    tl.store(grad_ptr + sample * G_STRIDE + o_grad, grad.to(grad_ptr.dtype.element_ty), mask=mask)


def nst_forward(
    student: Tensor, teacher: Tensor, method: str, teacher_term: bool, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """`reference.nst_forward` in one launch."""
    samples, s_channels, t_channels = student.shape[0], student.shape[1], teacher.shape[1]
    s, t = student.flatten(2), teacher.flatten(2)  # copies only if a map's rows are not adjacent in memory
    positions = s.shape[2]
    loss = student.new_empty((), dtype=torch.float32)
    shapes = ((positions, positions), (s_channels, 1))
    if method == "channel":
        shapes = (s_channels, s_channels), (s_channels, t_channels)
    first, second = (loss.new_empty((samples, *shape)) for shape in shapes)
    if samples == 0:
        return loss.fill_(torch.nan), first, second
    tile = _tiles.nst_tile(method, s, t, backward=False)
    splits = tile["SPLITS"]
    matrices = 2 * positions**2 if method == "spatial" else s_channels**2 + s_channels * t_channels + t_channels**2
    dot, precision = dot_operands(student.dtype)
    common = dict(
        P=positions, S=s_channels, S_STRIDE=s.stride(0), S_C_STRIDE=s.stride(1), S_P_STRIDE=s.stride(2),
        T=t_channels, T_STRIDE=t.stride(0), T_C_STRIDE=t.stride(1), T_P_STRIDE=t.stride(2),
        TERM=teacher_term, PARTIALS=_tiles.power_of_two(samples), DOT=dot, PRECISION=precision, **tile,
    )  # fmt: skip
    scratch = loss.new_empty(samples * splits * matrices if splits > 1 else 0)
    tickets = ticket(student.device, 1 + samples)
    kernel = spatial_kernel if method == "spatial" else channel_kernel
    with torch.cuda.device_of(student):
        kernel[(samples, splits)](
            s, t, first, second, scratch, loss.new_empty(samples), loss, tickets, samples, eps, **common
        )
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
    common = dict(
        P=positions, S=channels, S_STRIDE=s.stride(0), DOT=dot, PRECISION=precision, **tile,
        G_STRIDE=grad.stride(0), G_C_STRIDE=grad.stride(1), G_P_STRIDE=grad.stride(2),
    )  # fmt: skip
    with torch.cuda.device_of(student):
        if method == "spatial":
            spatial_backward_kernel[(triton.cdiv(channels, tile["BLOCK_C"]), samples)](
                s, first, second, upstream, grad, samples, eps,
                C_STRIDE=s.stride(1), P_STRIDE=s.stride(2), SAME=SAME, **common,
            )  # fmt: skip
        else:
            channel_backward_kernel[(triton.cdiv(positions, tile["BLOCK_P"]), samples)](
                s, t, first, second, upstream, grad, S_C_STRIDE=s.stride(1), S_P_STRIDE=s.stride(2),
                T=t.shape[1], T_STRIDE=t.stride(0), T_C_STRIDE=t.stride(1), T_P_STRIDE=t.stride(2), **common,
            )  # fmt: skip
    # If a map's rows are not adjacent (x.transpose(2, 3)), flatten made a copy and the kernel filled the copy.
    return out if grad.data_ptr() == out.data_ptr() else out.copy_(grad.view(out.shape))
