"""Attention transfer: maps, norms, loss and the gradient's coefficient in one launch, or two for large samples.

With q = mean_c |f|^p, a = q / ||q||, u = a_s - a_t the gradient is coef * (p / C) |f|^(p-1) sign f, where
coef = k / ||q_s|| (u - a_s <a_s, u>) is a map. The forward stores it, and the backward is one elementwise pass.
If one feature map is R times as large as the other, it is average-pooled on load.
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
def _offsets(i_position, P_STRIDE: tl.constexpr, W: tl.constexpr, R: tl.constexpr):
    """Memory offset of a position of the map of width W, or of the first of its R x R positions."""
    if R > 1:
        i_position = i_position // W * (R * R * W) + i_position % W * R
    return i_position * P_STRIDE


@triton.jit
def _pooled(f_ptr, o_position, i_channel, mask, C_STRIDE: tl.constexpr, P_STRIDE: tl.constexpr,
            W: tl.constexpr, R: tl.constexpr):  # fmt: skip
    """[positions, channels] of the map of width W; each value is the mean of R x R positions in memory."""
    pointer = f_ptr + o_position[:, None] + i_channel[None, :] * C_STRIDE
    f = tl.load(pointer, mask=mask, other=0.0).to(tl.float32)
    for k in tl.static_range(1, R * R):
        f += tl.load(pointer + (k // R * R * W + k % R) * P_STRIDE, mask=mask, other=0.0).to(tl.float32)
    return f * (1.0 / (R * R))


@triton.jit
def _power(f, POWER: tl.constexpr):
    """|f|^POWER; 0 for 0."""
    size = tl.abs(f)
    if POWER == 0.0:
        out = tl.where(size > 0.0, 1.0, size)  # NaN stays NaN
    elif POWER == 1.0:
        out = size
    elif POWER == 2.0:
        out = f * f
    else:
        out = tl.where(size == 0.0, 0.0, tl.exp2(POWER * tl.log2(size)))
    return out


@triton.jit
def _map(f_ptr, o_position, m_position, C: tl.constexpr, C_STRIDE: tl.constexpr, P_STRIDE: tl.constexpr,
         W: tl.constexpr, R: tl.constexpr, POWER: tl.constexpr, BLOCK_C: tl.constexpr):  # fmt: skip
    """mean_c |f|^POWER at these positions, 0 where masked; the channels of a block are summed once, at the end."""
    total = tl.zeros((o_position.shape[0], BLOCK_C), tl.float32)
    for start in range(0, C, BLOCK_C):
        i_channel = start + tl.arange(0, BLOCK_C)
        mask = m_position[:, None] & (i_channel < C)[None, :]
        total += _power(_pooled(f_ptr, o_position, i_channel, mask, C_STRIDE, P_STRIDE, W, R), POWER)
    return tl.sum(total, 1) * (1.0 / C)


@triton.jit
def _finish(
    q_s, q_t, i_position, sample, samples, eps,
    coef_ptr, partial_ptr, loss_ptr, ticket_ptr, P: tl.constexpr, MODE: tl.constexpr, PARTIALS: tl.constexpr,
):  # fmt: skip
    """Loss and coefficient of one sample; the last program adds up the losses."""
    norm = tl.sqrt(tl.sum(q_s * q_s, 0))
    norm_s = tl.maximum(norm, eps)
    norm_t = tl.maximum(tl.sqrt(tl.sum(q_t * q_t, 0)), eps)
    norm_s = tl.where(norm == norm, norm_s, norm)  # maximum may drop NaN; a NaN sample stays NaN
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
    eps,
    P: tl.constexpr, W: tl.constexpr,
    S_STRIDE: tl.constexpr, S_C: tl.constexpr, S_C_STRIDE: tl.constexpr, S_P_STRIDE: tl.constexpr, S_R: tl.constexpr,
    T_STRIDE: tl.constexpr, T_C: tl.constexpr, T_C_STRIDE: tl.constexpr, T_P_STRIDE: tl.constexpr, T_R: tl.constexpr,
    POWER: tl.constexpr, MODE: tl.constexpr, PARTIALS: tl.constexpr,
    BLOCK_P: tl.constexpr, S_BLOCK_C: tl.constexpr, T_BLOCK_C: tl.constexpr,
):  # fmt: skip
    """One sample per program; both maps stay in registers."""
    sample, samples = tl.program_id(0).to(tl.int64), tl.num_programs(0)
    i_position = tl.arange(0, BLOCK_P)
    m_position = i_position < P
    o_s, o_t = _offsets(i_position, S_P_STRIDE, W, S_R), _offsets(i_position, T_P_STRIDE, W, T_R)
    q_s = _map(s_ptr + sample * S_STRIDE, o_s, m_position, S_C, S_C_STRIDE, S_P_STRIDE, W, S_R, POWER, S_BLOCK_C)
    q_t = _map(t_ptr + sample * T_STRIDE, o_t, m_position, T_C, T_C_STRIDE, T_P_STRIDE, W, T_R, POWER, T_BLOCK_C)
    _finish(q_s, q_t, i_position, sample, samples, eps, coef_ptr, partial_ptr, loss_ptr, ticket_ptr,
            P, MODE, PARTIALS)  # fmt: skip


@triton.jit
def _map_of_rows(
    f_ptr, q_ptr, block, rows, P: tl.constexpr, W: tl.constexpr, STRIDE: tl.constexpr, C: tl.constexpr,
    C_STRIDE: tl.constexpr, P_STRIDE: tl.constexpr, R: tl.constexpr, POWER: tl.constexpr,
    BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    i_row = block * BLOCK_P + tl.arange(0, BLOCK_P)
    o_row = (i_row // P).to(tl.int64) * STRIDE + _offsets(i_row % P, P_STRIDE, W, R)
    q = _map(f_ptr, o_row, i_row < rows, C, C_STRIDE, P_STRIDE, W, R, POWER, BLOCK_C)
    tl.store(q_ptr + i_row, q, mask=i_row < rows)


@triton.jit
def map_kernel(
    s_ptr,  # [samples, S_C, P * S_R^2] student
    t_ptr,  # [samples, T_C, P * T_R^2] teacher
    q_s_ptr,  # [samples, P] out
    q_t_ptr,  # [samples, P] out
    rows,  # samples * P
    P: tl.constexpr, W: tl.constexpr,
    S_STRIDE: tl.constexpr, S_C: tl.constexpr, S_C_STRIDE: tl.constexpr, S_P_STRIDE: tl.constexpr, S_R: tl.constexpr,
    T_STRIDE: tl.constexpr, T_C: tl.constexpr, T_C_STRIDE: tl.constexpr, T_P_STRIDE: tl.constexpr, T_R: tl.constexpr,
    POWER: tl.constexpr,
    S_BLOCK_P: tl.constexpr, S_BLOCK_C: tl.constexpr, T_BLOCK_P: tl.constexpr, T_BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Both maps: the first programs process the student's rows (positions of all samples), the others the teacher's."""
    block, s_blocks = tl.program_id(0), tl.cdiv(rows, S_BLOCK_P)
    if block < s_blocks:
        _map_of_rows(s_ptr, q_s_ptr, block, rows, P, W, S_STRIDE, S_C, S_C_STRIDE, S_P_STRIDE, S_R, POWER,
                     S_BLOCK_P, S_BLOCK_C)  # fmt: skip
    else:
        _map_of_rows(t_ptr, q_t_ptr, block - s_blocks, rows, P, W, T_STRIDE, T_C, T_C_STRIDE, T_P_STRIDE, T_R, POWER,
                     T_BLOCK_P, T_BLOCK_C)  # fmt: skip


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
    """`_finish` for the maps that `map_kernel` wrote to memory; one sample per program."""
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
    rows,  # samples * P
    P: tl.constexpr, W: tl.constexpr, C: tl.constexpr, R: tl.constexpr, POWER: tl.constexpr,
    STRIDE: tl.constexpr, C_STRIDE: tl.constexpr, P_STRIDE: tl.constexpr,
    G_STRIDE: tl.constexpr, G_C_STRIDE: tl.constexpr, G_P_STRIDE: tl.constexpr,
    BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """coef * POWER / C |f|^(POWER - 1) sign f; grid (blocks of positions of all samples, channel blocks)."""
    i_row = tl.program_id(0) * BLOCK_P + tl.arange(0, BLOCK_P)
    i_channel = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    mask = (i_row < rows)[:, None] & (i_channel < C)[None, :]
    sample, i_position = (i_row // P).to(tl.int64), i_row % P
    f = _pooled(s_ptr, sample * STRIDE + _offsets(i_position, P_STRIDE, W, R), i_channel, mask,
                C_STRIDE, P_STRIDE, W, R)  # fmt: skip
    coef = tl.load(coef_ptr + i_row, mask=i_row < rows, other=0.0)
    coef = coef * (tl.load(upstream_ptr).to(tl.float32) * (POWER / (C * R * R)))
    slope = f if POWER == 2.0 else tl.where(f < 0.0, -1.0, 1.0) * _power(f, POWER - 1.0)
    out = (slope * coef[:, None]).to(grad_ptr.dtype.element_ty)
    o_row = sample * G_STRIDE + _offsets(i_position, G_P_STRIDE, W, R)
    pointer = grad_ptr + o_row[:, None] + i_channel[None, :] * G_C_STRIDE
    for k in tl.static_range(R * R):
        tl.store(pointer + (k // R * R * W + k % R) * G_P_STRIDE, out, mask=mask)


def attention_forward(
    student: Tensor, teacher: Tensor, p: float, mode: str, eps: float
) -> tuple[Tensor, Tensor]:
    """`reference.attention_forward`; one map may be R times the other's height and width."""
    samples = student.shape[0]
    height, width = min(student.shape[2], teacher.shape[2]), min(student.shape[3], teacher.shape[3])
    positions = height * width
    coef = student.new_empty((samples, height, width), dtype=torch.float32)
    loss = coef.new_empty(())
    if samples == 0:
        return loss.fill_(torch.nan), coef
    s, t = student.flatten(2), teacher.flatten(2)  # copies only if a map's rows are not adjacent in memory
    tail = (coef, coef.new_empty(samples), loss, ticket(student.device))
    features = {
        "P": positions, "W": width, "POWER": p,
        "S_STRIDE": s.stride(0), "S_C": s.shape[1], "S_C_STRIDE": s.stride(1), "S_P_STRIDE": s.stride(2),
        "S_R": student.shape[3] // width,
        "T_STRIDE": t.stride(0), "T_C": t.shape[1], "T_C_STRIDE": t.stride(1), "T_P_STRIDE": t.stride(2),
        "T_R": teacher.shape[3] // width,
    }  # fmt: skip
    finish = {"MODE": MODES[mode], "PARTIALS": _tiles.power_of_two(samples)}
    with torch.cuda.device_of(student):
        if _tiles.one_launch(s, t, positions):
            fused_kernel[(samples,)](s, t, *tail, eps, **features, **finish, **_tiles.fused_tile(positions, s, t))
            return loss, coef
        rows, maps = samples * positions, (torch.empty_like(coef), torch.empty_like(coef))
        tile_s, tile_t = (_tiles.attention_tile(rows, f) for f in (s, t))
        map_kernel[(sum(triton.cdiv(rows, tile["BLOCK_P"]) for tile in (tile_s, tile_t)),)](
            s, t, *maps, rows, **features, S_BLOCK_P=tile_s["BLOCK_P"], S_BLOCK_C=tile_s["BLOCK_C"],
            T_BLOCK_P=tile_t["BLOCK_P"], T_BLOCK_C=tile_t["BLOCK_C"], num_warps=4, **_tiles.FUSION,
        )  # fmt: skip
        block = _tiles.power_of_two(positions)
        finish_kernel[(samples,)](*maps, *tail, eps, P=positions, **finish, BLOCK_P=block,
                                  num_warps=_tiles.finish_warps(block), **_tiles.NO_FUSION)  # fmt: skip
    return loss, coef


def attention_backward(student: Tensor, coef: Tensor, upstream: Tensor, p: float) -> Tensor:
    """`reference.attention_backward` in one launch."""
    out = torch.empty_like(student)
    if student.numel() == 0:
        return out
    s, grad = student.flatten(2), out.flatten(2)
    channels, rows = s.shape[1], coef.numel()
    tile = _tiles.attention_tile(rows, s)
    grid = (triton.cdiv(rows, tile["BLOCK_P"]), triton.cdiv(channels, tile["BLOCK_C"]))
    with torch.cuda.device_of(student):
        backward_kernel[grid](
            s, coef, upstream, grad, rows, P=coef.shape[1] * coef.shape[2], W=coef.shape[2], C=channels,
            R=student.shape[3] // coef.shape[2], POWER=p,
            STRIDE=s.stride(0), C_STRIDE=s.stride(1), P_STRIDE=s.stride(2),
            G_STRIDE=grad.stride(0), G_C_STRIDE=grad.stride(1), G_P_STRIDE=grad.stride(2),
            num_warps=4, **tile, **_tiles.FUSION,
        )  # fmt: skip
    # If a map's rows are not adjacent (x.transpose(2, 3)), flatten made a copy and the kernel filled the copy.
    return out if grad.data_ptr() == out.data_ptr() else out.copy_(grad.view(out.shape))
