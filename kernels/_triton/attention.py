"""Attention transfer: maps, norms, loss and the gradient's coefficient in one launch (three for large maps).

With q = mean_c |f|^p, a = q / ||q||, u = a_s - a_t the gradient is coef * (p / C) |f|^(p-1) sign f, where
coef = k / ||q_s|| (u - a_s <a_s, u>) is a map: the forward stores it, the backward is one elementwise pass.
A feature R times as large as the other is average-pooled while it is loaded.
"""
# mypy: allow-untyped-defs
from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels import _tiles
from kernels._triton.common import is_last, ordered_sum, ticket

MEAN, PAPER, BATCHMEAN = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)
MODES = {"mean": 0, "paper": 1, "batchmean": 2}


@triton.jit
def _pooled(f_ptr, i_position, i_channel, mask, C_STRIDE: tl.constexpr, P_STRIDE: tl.constexpr,
            W: tl.constexpr, R: tl.constexpr):  # fmt: skip
    """[positions, channels] of the map of width W, each the mean of R x R positions in memory."""
    if R == 1:
        o_position = i_position * P_STRIDE
        f = tl.load(f_ptr + o_position[:, None] + i_channel[None, :] * C_STRIDE, mask=mask, other=0.0).to(tl.float32)
    else:
        corner = i_position // W * (R * R * W) + i_position % W * R
        f = tl.zeros((i_position.shape[0], i_channel.shape[0]), tl.float32)
        for k in tl.static_range(R * R):
            o_position = (corner + (k // R) * (R * W) + k % R) * P_STRIDE
            pointer = f_ptr + o_position[:, None] + i_channel[None, :] * C_STRIDE
            f += tl.load(pointer, mask=mask, other=0.0).to(tl.float32)
        f = f / (R * R)
    return f


@triton.jit
def _power(f, POWER: tl.constexpr):
    """|f|^POWER; 0 for 0."""
    size = tl.abs(f)
    if POWER == 0.0:
        out = tl.where(size > 0.0, 1.0, size)  # keeps nan
    elif POWER == 1.0:
        out = size
    elif POWER == 2.0:
        out = f * f
    else:
        out = tl.where(size == 0.0, 0.0, tl.exp2(POWER * tl.log2(size)))
    return out


@triton.jit
def _map(f_ptr, i_position, P: tl.constexpr, C: tl.constexpr, C_STRIDE: tl.constexpr, P_STRIDE: tl.constexpr,
         W: tl.constexpr, R: tl.constexpr, POWER: tl.constexpr, BLOCK_C: tl.constexpr):  # fmt: skip
    """mean_c |f|^POWER at these positions, 0 past the last."""
    q = tl.zeros((i_position.shape[0],), tl.float32)
    for start in range(0, C, BLOCK_C):
        i_channel = start + tl.arange(0, BLOCK_C)
        mask = (i_position < P)[:, None] & (i_channel < C)[None, :]
        q += tl.sum(_power(_pooled(f_ptr, i_position, i_channel, mask, C_STRIDE, P_STRIDE, W, R), POWER), 1)
    return q / C


@triton.jit
def _finish(
    q_s, q_t, i_position, sample, samples, eps,
    coef_ptr, partial_ptr, loss_ptr, ticket_ptr, P: tl.constexpr, MODE: tl.constexpr, PARTIALS: tl.constexpr,
):  # fmt: skip
    """Loss and coefficient of one sample; the last program adds up the losses."""
    norm = tl.sqrt(tl.sum(q_s * q_s, 0))
    norm_s = tl.maximum(norm, eps)
    norm_t = tl.maximum(tl.sqrt(tl.sum(q_t * q_t, 0)), eps)
    norm_s = tl.where(norm == norm, norm_s, norm)  # a maximum may lose nan; a nan sample stays nan
    a = q_s / norm_s
    u = a - q_t / norm_t
    square = tl.sum(u * u, 0)
    if MODE == PAPER:
        loss = tl.sqrt(square) / samples
        scale = tl.where(square > 0.0, 1.0 / (samples * tl.sqrt(square)), 0.0)
    elif MODE == MEAN:
        loss = square / P / samples
        scale = 2.0 / P / samples
    else:
        loss = square / samples
        scale = 2.0 / samples
    along = tl.where(norm > eps, tl.sum(a * u, 0), 0.0)
    tl.store(coef_ptr + sample * P + i_position, (u - a * along) * (scale / norm_s), mask=i_position < P)
    tl.store(partial_ptr + sample, loss)
    if is_last(ticket_ptr, samples):
        tl.store(loss_ptr, ordered_sum(partial_ptr, samples, PARTIALS))


@triton.jit
def fused_kernel(
    s_ptr,  # [samples, S_C, P * S_R^2] student
    t_ptr,  # [samples, T_C, P * T_R^2] teacher
    coef_ptr,  # [samples, P] out
    partial_ptr,  # [samples] scratch
    loss_ptr,  # [] out
    ticket_ptr,  # [1] zero before and after
    s_sample_stride, t_sample_stride, eps,
    P: tl.constexpr, W: tl.constexpr,
    S_C: tl.constexpr, S_C_STRIDE: tl.constexpr, S_P_STRIDE: tl.constexpr, S_R: tl.constexpr,
    T_C: tl.constexpr, T_C_STRIDE: tl.constexpr, T_P_STRIDE: tl.constexpr, T_R: tl.constexpr,
    POWER: tl.constexpr, MODE: tl.constexpr, PARTIALS: tl.constexpr,
    BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """A sample a program: both maps stay in registers."""
    sample, samples = tl.program_id(0).to(tl.int64), tl.num_programs(0)
    i_position = tl.arange(0, BLOCK_P)
    q_s = _map(s_ptr + sample * s_sample_stride, i_position, P, S_C, S_C_STRIDE, S_P_STRIDE, W, S_R, POWER, BLOCK_C)
    q_t = _map(t_ptr + sample * t_sample_stride, i_position, P, T_C, T_C_STRIDE, T_P_STRIDE, W, T_R, POWER, BLOCK_C)
    _finish(q_s, q_t, i_position, sample, samples, eps, coef_ptr, partial_ptr, loss_ptr, ticket_ptr,
            P, MODE, PARTIALS)  # fmt: skip


@triton.jit
def map_kernel(
    f_ptr,  # [samples, C, P * R^2]
    q_ptr,  # [samples, P] out
    sample_stride,
    P: tl.constexpr, W: tl.constexpr, C: tl.constexpr, C_STRIDE: tl.constexpr, P_STRIDE: tl.constexpr,
    R: tl.constexpr, POWER: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """One feature's map; grid (position blocks, samples)."""
    sample = tl.program_id(1).to(tl.int64)
    i_position = tl.program_id(0) * BLOCK_P + tl.arange(0, BLOCK_P)
    q = _map(f_ptr + sample * sample_stride, i_position, P, C, C_STRIDE, P_STRIDE, W, R, POWER, BLOCK_C)
    tl.store(q_ptr + sample * P + i_position, q, mask=i_position < P)


@triton.jit
def finish_kernel(
    q_s_ptr,  # [samples, P]
    q_t_ptr,  # [samples, P]
    coef_ptr,  # [samples, P] out
    partial_ptr,  # [samples] scratch
    loss_ptr,  # [] out
    ticket_ptr,  # [1] zero before and after
    eps,
    P: tl.constexpr, MODE: tl.constexpr, PARTIALS: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    """`_finish` for maps that `map_kernel` left in memory; a sample a program."""
    sample, samples = tl.program_id(0).to(tl.int64), tl.num_programs(0)
    i_position = tl.arange(0, BLOCK_P)
    q_s = tl.load(q_s_ptr + sample * P + i_position, mask=i_position < P, other=0.0)
    q_t = tl.load(q_t_ptr + sample * P + i_position, mask=i_position < P, other=0.0)
    _finish(q_s, q_t, i_position, sample, samples, eps, coef_ptr, partial_ptr, loss_ptr, ticket_ptr,
            P, MODE, PARTIALS)  # fmt: skip


@triton.jit
def backward_kernel(
    s_ptr,  # [samples, C, P * R^2] student
    coef_ptr,  # [samples, P]
    upstream_ptr,  # []
    grad_ptr,  # [samples, C, P * R^2] out
    sample_stride, grad_sample_stride,
    P: tl.constexpr, W: tl.constexpr, C: tl.constexpr, C_STRIDE: tl.constexpr, P_STRIDE: tl.constexpr,
    G_C_STRIDE: tl.constexpr, G_P_STRIDE: tl.constexpr, R: tl.constexpr, POWER: tl.constexpr,
    BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """coef * POWER / C |f|^(POWER - 1) sign f; grid (position blocks, channel blocks, samples)."""
    sample = tl.program_id(2).to(tl.int64)
    i_position = tl.program_id(0) * BLOCK_P + tl.arange(0, BLOCK_P)
    i_channel = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    mask = (i_position < P)[:, None] & (i_channel < C)[None, :]
    f = _pooled(s_ptr + sample * sample_stride, i_position, i_channel, mask, C_STRIDE, P_STRIDE, W, R)
    coef = tl.load(coef_ptr + sample * P + i_position, mask=i_position < P, other=0.0)
    coef = coef * (tl.load(upstream_ptr).to(tl.float32) * (POWER / (C * R * R)))
    slope = f if POWER == 2.0 else tl.where(f < 0.0, -1.0, 1.0) * _power(f, POWER - 1.0)
    out = (slope * coef[:, None]).to(grad_ptr.dtype.element_ty)
    grad_ptr += sample * grad_sample_stride
    corner = i_position // W * (R * R * W) + i_position % W * R
    for k in tl.static_range(R * R):
        o_position = (corner + (k // R) * (R * W) + k % R) * G_P_STRIDE
        tl.store(grad_ptr + o_position[:, None] + i_channel[None, :] * G_C_STRIDE, out, mask=mask)


def attention_forward(
    student: Tensor, teacher: Tensor, p: float, mode: str, eps: float
) -> tuple[Tensor, Tensor]:
    """`reference.attention_forward`; one side may be R times the other's height and width."""
    samples = student.shape[0]
    height, width = min(student.shape[2], teacher.shape[2]), min(student.shape[3], teacher.shape[3])
    positions = height * width
    coef = student.new_empty((samples, height, width), dtype=torch.float32)
    loss = coef.new_empty(())
    if samples == 0:
        return loss.fill_(torch.nan), coef
    s, t = student.flatten(2), teacher.flatten(2)  # views where rows of a map follow each other, else copies
    ratios = student.shape[3] // width, teacher.shape[3] // width
    tail = (coef, coef.new_empty(samples), loss, ticket(student.device))
    common = {"P": positions, "MODE": MODES[mode], "PARTIALS": _tiles.power_of_two(samples)}
    with torch.cuda.device_of(student):
        if positions <= _tiles.FUSED_POSITIONS:
            fused_kernel[(samples,)](
                s, t, *tail, s.stride(0), t.stride(0), eps, W=width, POWER=p,
                S_C=s.shape[1], S_C_STRIDE=s.stride(1), S_P_STRIDE=s.stride(2), S_R=ratios[0],
                T_C=t.shape[1], T_C_STRIDE=t.stride(1), T_P_STRIDE=t.stride(2), T_R=ratios[1],
                **common, **_tiles.attention_tile(positions, s.shape[1], fused=True),
            )  # fmt: skip
            return loss, coef
        maps = []
        for f, ratio in zip((s, t), ratios, strict=True):
            maps.append(torch.empty_like(coef))
            tile = _tiles.attention_tile(positions, f.shape[1], fused=False)
            map_kernel[(triton.cdiv(positions, tile["BLOCK_P"]), samples)](
                f, maps[-1], f.stride(0), P=positions, W=width, C=f.shape[1], C_STRIDE=f.stride(1),
                P_STRIDE=f.stride(2), R=ratio, POWER=p, **tile,
            )  # fmt: skip
        block = _tiles.power_of_two(positions)
        finish_kernel[(samples,)](*maps, *tail, eps, **common, BLOCK_P=block,
                                  num_warps=_tiles.finish_warps(block), **_tiles.FUSION)  # fmt: skip
    return loss, coef


def attention_backward(student: Tensor, coef: Tensor, upstream: Tensor, p: float) -> Tensor:
    """`reference.attention_backward` in one launch."""
    out = torch.empty_like(student)
    if student.numel() == 0:
        return out
    s, grad = student.flatten(2), out.flatten(2)
    samples, channels, positions = s.shape[0], s.shape[1], coef.shape[1] * coef.shape[2]
    tile = _tiles.attention_tile(positions, channels, fused=False)
    grid = (triton.cdiv(positions, tile["BLOCK_P"]), triton.cdiv(channels, tile["BLOCK_C"]), samples)
    with torch.cuda.device_of(student):
        backward_kernel[grid](
            s, coef, upstream, grad, s.stride(0), grad.stride(0), P=positions, W=coef.shape[2], C=channels,
            C_STRIDE=s.stride(1), P_STRIDE=s.stride(2), G_C_STRIDE=grad.stride(1), G_P_STRIDE=grad.stride(2),
            R=student.shape[3] // coef.shape[2], POWER=p, **tile,
        )  # fmt: skip
    # Where rows of a map do not follow each other (x.transpose(2, 3)), flatten made a copy, which is what was filled.
    return out if grad.data_ptr() == out.data_ptr() else out.copy_(grad.view(out.shape))
