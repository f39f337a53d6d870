"""BatchNorm and the activation after it on channels_last maps, viewed as a matrix (rows N * H * W, channels).

There are two launches forward (sums per channel, then the result) and two backward. The first of each pair writes the
partial sums of SPLITS ranges of rows. Every program of the second adds them in the same fixed order, so no program
waits for another and results are deterministic. Autograd saves only the input: the backward pass recomputes the
activation's slope.
"""
# mypy: allow-untyped-defs
from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels import _tiles

# The range that an activation clamps to. It is a run-time argument, so that all activations share one compiled kernel.
RANGES = {"none": (-math.inf, math.inf), "relu": (0.0, math.inf), "relu6": (0.0, 6.0)}
PROGRAMS = 264  # two per multiprocessor of an H100 or H200
ROWS = 32  # per tile


@triton.jit
def _activate(u, low, high):
    """u clamped to [low, high]; NaN stays NaN."""
    return tl.where(u < low, low, tl.where(u > high, high, u))


@triton.jit
def _sloped(grad, u, low, high):
    """The gradient with respect to u, the activation's input."""
    return tl.where((u <= low) | (u >= high), 0.0, grad)


@triton.jit
def _rows(program, programs, rows, BLOCK_R: tl.constexpr):
    """First row and number of tiles of a program; whole tiles are divided evenly."""
    tiles = tl.cdiv(rows, BLOCK_R)
    each = tl.cdiv(tiles, programs)
    return program * each * BLOCK_R, tl.minimum(each, tl.maximum(tiles - program * each, 0))


@triton.jit
def _place(row, i_channel, rows, channels, BLOCK_R: tl.constexpr):
    """Offsets of the tile that starts at `row` into a matrix [rows, channels], and the mask of those inside it."""
    i_row = (row + tl.arange(0, BLOCK_R)).to(tl.int64)
    mask = (i_row < rows)[:, None] & (i_channel < channels)[None, :]
    return i_row[:, None] * channels + i_channel[None, :], mask


@triton.jit
def _affine(saved_ptr, weight_ptr, bias_ptr, i_channel, channels):
    """Mean, 1 / standard deviation, weight / standard deviation, and bias of each channel."""
    mask = i_channel < channels
    mean = tl.load(saved_ptr + i_channel, mask=mask, other=0.0)
    inverse = tl.load(saved_ptr + channels + i_channel, mask=mask, other=0.0)
    weight = tl.load(weight_ptr + i_channel, mask=mask, other=0.0)
    bias = tl.load(bias_ptr + i_channel, mask=mask, other=0.0)
    return mean, inverse, weight * inverse, bias


@triton.jit
def _sums(partial_ptr, i_channel, channels, SPLITS: tl.constexpr):
    """Both sums per channel over all splits: partial_ptr [2, SPLITS, channels]."""
    i_split = tl.arange(0, SPLITS)
    offset = i_split[:, None] * channels + i_channel[None, :]
    mask = (i_channel < channels)[None, :]
    first = tl.load(partial_ptr + offset, mask=mask, other=0.0)
    second = tl.load(partial_ptr + SPLITS * channels + offset, mask=mask, other=0.0)
    return tl.sum(first, 0), tl.sum(second, 0)


@triton.jit(do_not_specialize=["rows"])
def statistics_kernel(
    x_ptr,  # [rows, channels]
    partial_ptr,  # [2, SPLITS, channels] out: sums of x - x[0] and of its square
    rows, channels,
    SPLITS: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Grid (channel blocks, SPLITS). Subtracts the first row, so that a large mean does not swamp the variance."""
    i_channel = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    split = tl.program_id(1)
    m_channel = i_channel < channels
    shift = tl.load(x_ptr + i_channel, mask=m_channel, other=0.0).to(tl.float32)
    start, tiles = _rows(split, SPLITS, rows, BLOCK_R)
    first = tl.zeros((BLOCK_R, BLOCK_C), tl.float32)
    second = tl.zeros((BLOCK_R, BLOCK_C), tl.float32)
    for tile in range(0, tiles):
        offset, mask = _place(start + tile * BLOCK_R, i_channel, rows, channels, BLOCK_R)
        x = tl.load(x_ptr + offset, mask=mask, other=0.0).to(tl.float32)
        x = tl.where(mask, x - shift[None, :], 0.0)
        first += x
        second += x * x
    partial_ptr += split * channels + i_channel
    tl.store(partial_ptr, tl.sum(first, 0), mask=m_channel)
    tl.store(partial_ptr + SPLITS * channels, tl.sum(second, 0), mask=m_channel)


@triton.jit(do_not_specialize=["rows"])
def apply_kernel(
    x_ptr,  # [rows, channels]
    weight_ptr, bias_ptr,  # [channels]
    running_mean_ptr, running_var_ptr,  # [channels] updated in training, otherwise read
    partial_ptr,  # [2, SPLITS, channels] of statistics_kernel; unused in evaluation
    y_ptr,  # [rows, channels] out
    saved_ptr,  # [2, channels] out: mean and 1 / standard deviation
    rows, channels, momentum, eps, low, high,
    TRAINING: tl.constexpr,
    SPLITS: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Grid (channel blocks, ranges of rows)."""
    i_channel = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    i_range = tl.program_id(1)
    m_channel = i_channel < channels
    if TRAINING:
        first, second = _sums(partial_ptr, i_channel, channels, SPLITS)
        first = first / rows
        var = tl.maximum(second / rows - first * first, 0.0)
        var = tl.where(second == second, var, second)  # maximum may drop NaN
        mean = tl.load(x_ptr + i_channel, mask=m_channel, other=0.0).to(tl.float32) + first
    else:
        mean = tl.load(running_mean_ptr + i_channel, mask=m_channel, other=0.0)
        var = tl.load(running_var_ptr + i_channel, mask=m_channel, other=0.0)
    inverse = 1.0 / tl.sqrt(var + eps)
    if i_range == 0:
        tl.store(saved_ptr + i_channel, mean, mask=m_channel)
        tl.store(saved_ptr + channels + i_channel, inverse, mask=m_channel)
        if TRAINING:
            # As in PyTorch, the running variance is unbiased.
            old_mean = tl.load(running_mean_ptr + i_channel, mask=m_channel, other=0.0)
            old_var = tl.load(running_var_ptr + i_channel, mask=m_channel, other=0.0)
            unbiased = var * (rows / (rows - 1.0))
            tl.store(running_mean_ptr + i_channel, old_mean + momentum * (mean - old_mean), mask=m_channel)
            tl.store(running_var_ptr + i_channel, old_var + momentum * (unbiased - old_var), mask=m_channel)
    scale = tl.load(weight_ptr + i_channel, mask=m_channel, other=0.0) * inverse
    bias = tl.load(bias_ptr + i_channel, mask=m_channel, other=0.0)
    start, tiles = _rows(i_range, tl.num_programs(1), rows, BLOCK_R)
    for tile in range(0, tiles):
        offset, mask = _place(start + tile * BLOCK_R, i_channel, rows, channels, BLOCK_R)
        x = tl.load(x_ptr + offset, mask=mask, other=0.0).to(tl.float32)
        y = _activate((x - mean[None, :]) * scale[None, :] + bias[None, :], low, high)
        tl.store(y_ptr + offset, y.to(y_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["rows"])
def reduce_kernel(
    x_ptr, grad_ptr,  # [rows, channels]
    weight_ptr, bias_ptr,  # [channels]
    saved_ptr,  # [2, channels]
    partial_ptr,  # [2, SPLITS, channels] out: sums of g and of g * normalised x
    rows, channels, low, high,
    SPLITS: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Grid (channel blocks, SPLITS); g is the gradient with respect to the activation's input."""
    i_channel = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    split = tl.program_id(1)
    m_channel = i_channel < channels
    mean, inverse, scale, bias = _affine(saved_ptr, weight_ptr, bias_ptr, i_channel, channels)
    start, tiles = _rows(split, SPLITS, rows, BLOCK_R)
    first = tl.zeros((BLOCK_R, BLOCK_C), tl.float32)
    second = tl.zeros((BLOCK_R, BLOCK_C), tl.float32)
    for tile in range(0, tiles):
        offset, mask = _place(start + tile * BLOCK_R, i_channel, rows, channels, BLOCK_R)
        x = tl.load(x_ptr + offset, mask=mask, other=0.0).to(tl.float32)
        grad = tl.load(grad_ptr + offset, mask=mask, other=0.0).to(tl.float32)
        u = (x - mean[None, :]) * scale[None, :] + bias[None, :]
        grad = _sloped(grad, u, low, high)
        first += grad
        second += grad * (x - mean[None, :]) * inverse[None, :]
    partial_ptr += split * channels + i_channel
    tl.store(partial_ptr, tl.sum(first, 0), mask=m_channel)
    tl.store(partial_ptr + SPLITS * channels, tl.sum(second, 0), mask=m_channel)


@triton.jit(do_not_specialize=["rows"])
def gradient_kernel(
    x_ptr, grad_ptr,  # [rows, channels]
    weight_ptr, bias_ptr,  # [channels]
    saved_ptr,  # [2, channels]
    partial_ptr,  # [2, SPLITS, channels] of reduce_kernel
    out_ptr,  # [rows, channels] out: the gradient of x
    parameters_ptr,  # [2, channels] out: the gradients of weight and bias
    rows, channels, low, high,
    TRAINING: tl.constexpr,
    SPLITS: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """weight / deviation (g - mean g - x_hat mean(g x_hat)) with x_hat the normalised x.

    Grid (channel blocks, ranges of rows).
    """
    i_channel = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    i_range = tl.program_id(1)
    m_channel = i_channel < channels
    mean, inverse, scale, bias = _affine(saved_ptr, weight_ptr, bias_ptr, i_channel, channels)
    first, second = _sums(partial_ptr, i_channel, channels, SPLITS)
    if i_range == 0:
        tl.store(parameters_ptr + i_channel, second, mask=m_channel)
        tl.store(parameters_ptr + channels + i_channel, first, mask=m_channel)
    if not TRAINING:  # the statistics do not depend on x
        first, second = first * 0.0, second * 0.0
    start, tiles = _rows(i_range, tl.num_programs(1), rows, BLOCK_R)
    for tile in range(0, tiles):
        offset, mask = _place(start + tile * BLOCK_R, i_channel, rows, channels, BLOCK_R)
        x = tl.load(x_ptr + offset, mask=mask, other=0.0).to(tl.float32)
        grad = tl.load(grad_ptr + offset, mask=mask, other=0.0).to(tl.float32)
        normal = (x - mean[None, :]) * inverse[None, :]
        u = (x - mean[None, :]) * scale[None, :] + bias[None, :]
        grad = _sloped(grad, u, low, high) - (first[None, :] + normal * second[None, :]) / rows
        out = grad * scale[None, :]
        tl.store(out_ptr + offset, out.to(out_ptr.dtype.element_ty), mask=mask)


def tile(rows: int, channels: int) -> tuple[dict[str, int], int, int]:
    """(constants, channel blocks, row ranges): about PROGRAMS programs, and partial sums that stay in the cache.

    There are only two sets of constants, because each needs its own compilation.
    """
    block_c, splits = (32, 64) if channels <= 256 else (64, 16)
    blocks = triton.cdiv(channels, block_c)
    runs = max(1, min(PROGRAMS // blocks, triton.cdiv(rows, ROWS)))
    return {"SPLITS": splits, "BLOCK_R": ROWS, "BLOCK_C": block_c, "num_warps": 4, **_tiles.FUSION}, blocks, runs


def norm_act_forward(
    x: Tensor, weight: Tensor, bias: Tensor, running_mean: Tensor, running_var: Tensor,
    training: bool, momentum: float, eps: float, activation: str,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """`kernels.norm_act.forward`; x (N, C, H, W) in channels_last. Updates the running statistics in training."""
    channels, rows = x.shape[1], x.numel() // x.shape[1]
    constants, blocks, runs = tile(rows, channels)
    y, saved = torch.empty_like(x), weight.new_empty((2, channels))
    partial = weight.new_empty((2, constants["SPLITS"], channels)) if training else saved
    with torch.cuda.device_of(x):
        if training:
            statistics_kernel[(blocks, constants["SPLITS"])](x, partial, rows, channels, **constants)
        apply_kernel[(blocks, runs)](
            x, weight, bias, running_mean, running_var, partial, y, saved, rows, channels, momentum, eps,
            *RANGES[activation], TRAINING=training, **constants,
        )  # fmt: skip
    return y, saved


def norm_act_backward(
    x: Tensor, grad: Tensor, weight: Tensor, bias: Tensor, saved: Tensor, training: bool, activation: str
) -> tuple[Tensor, Tensor]:
    """`kernels.norm_act.backward`."""
    channels, rows = x.shape[1], x.numel() // x.shape[1]
    constants, blocks, runs = tile(rows, channels)
    grad = grad.contiguous(memory_format=torch.channels_last)
    out, parameters = torch.empty_like(x), torch.empty_like(saved)
    partial = saved.new_empty((2, constants["SPLITS"], channels))
    limits = RANGES[activation]
    with torch.cuda.device_of(x):
        reduce_kernel[(blocks, constants["SPLITS"])](
            x, grad, weight, bias, saved, partial, rows, channels, *limits, **constants
        )
        gradient_kernel[(blocks, runs)](
            x, grad, weight, bias, saved, partial, out, parameters, rows, channels, *limits,
            TRAINING=training, **constants,
        )  # fmt: skip
    return out, parameters
