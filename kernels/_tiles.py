"""What the Triton kernels cover, and their tile sizes, in tables: a search never waits for autotuning.

Sizes are powers of two. `aot.py` compiles the shapes it lists offline, and none may spill registers.
"""
from __future__ import annotations

import torch
from torch import Tensor

# Contraction into fused multiply-adds is the default only until Triton 3.10, so ask for it.
FUSION = {"enable_fp_fusion": True}
# For x / y - z / w, which must be exactly 0 for equal operands: a fused multiply-add rounds only one of the two.
NO_FUSION = {"enable_fp_fusion": False}
SCALE_BLOCK = 1024  # elements per program of an elementwise launch
LOOP_CLASSES = 4096  # CE + plain KD: rows up to this stay in registers, longer ones are read twice
TILE_CLASSES = 8192  # DKD and standardised logits: the longest rows in registers; half for both at once
FUSED_POSITIONS, FUSED_BYTES = 256, 65536  # attention: one program handles a sample up to this size
MAP_POSITIONS = 16384  # up to this many, one program finishes a sample's attention map
SPATIAL_POSITIONS = 64  # NST: H * W of one tile of the Gram difference
NST_PROGRAMS = 512  # NST: programs that fill a device; fewer samples are split
# NST: (student's, teacher's) channels of one tile of the channel Grams, by bytes per element.
CHANNEL_CHANNELS = {2: (64, 128), 4: (64, 64)}


def power_of_two(n: int) -> int:
    """The least power of two >= n."""
    return 1 << (n - 1).bit_length() if n > 1 else 1


def plain_kd(variant: str, standardize: bool) -> bool:
    """Whether KD is the plain KL divergence, which needs only a row's maxima and sums."""
    return variant == "kd" and not standardize


def has_ce_kd(logits: Tensor, variant: str, standardize: bool) -> bool:
    """Whether a kernel handles the logits; the reference handles float64 and rows too long for a variant."""
    if logits.element_size() == 8:
        return False
    both = variant == "dkd" and standardize
    return plain_kd(variant, standardize) or logits.shape[1] <= (TILE_CLASSES // 2 if both else TILE_CLASSES)


def has_attention(student: Tensor, teacher: Tensor) -> bool:
    """Whether a kernel handles the pair; the reference handles float64 and maps over MAP_POSITIONS."""
    positions = min(student.shape[2] * student.shape[3], teacher.shape[2] * teacher.shape[3])
    return student.element_size() < 8 and positions <= MAP_POSITIONS and student.shape[0] * positions < 2**31


def pooling_ratio(student: Tensor, teacher: Tensor) -> int:
    """The integer r by which both sides of one map exceed those of the other, or 0."""
    (h_s, w_s), (h_t, w_t) = student.shape[2:], teacher.shape[2:]
    for big, small in (((h_s, w_s), (h_t, w_t)), ((h_t, w_t), (h_s, w_s))):
        ratio = big[0] // small[0]
        if ratio >= 1 and (small[0] * ratio, small[1] * ratio) == big:
            return ratio
    return 0


def has_nst(student: Tensor, teacher: Tensor, method: str) -> bool:
    """Whether one tile holds the Gram; the reference's batched products handle the rest, and float64."""
    if student.element_size() == 8:
        return False
    if method == "spatial":
        return student.shape[2] * student.shape[3] <= SPATIAL_POSITIONS
    most_s, most_t = CHANNEL_CHANNELS[student.element_size()]
    return student.shape[1] <= most_s and teacher.shape[1] <= most_t


def ce_kd_tile(rows: int, classes: int, item_size: int, plain: bool) -> dict[str, int]:
    """Constants of the CE+KD kernel for rows of `classes`: with VECTORS for `loop_kernel`, else for `tile_kernel`.

    A loop has two 16-byte vectors of each matrix in flight per thread. PARTIALS bounds the last program's sum.
    """
    if plain and classes > LOOP_CLASSES:
        tile = {"VECTORS": 512, "VEC": 16 // item_size, "PARTIALS": power_of_two(rows), "num_warps": 8, **FUSION}
        return {**tile, "maxnreg": 128}  # two blocks per SM; left alone, ptxas may aim for 64 registers and spill
    block = power_of_two(classes)
    per_program = max(1, min(1024 // block, power_of_two(rows)))
    warps = 4 if block <= 1024 else 8 if block <= 4096 else 16
    programs = -(-rows // per_program)
    return {"BLOCK": block, "ROWS": per_program, "PARTIALS": power_of_two(programs), "num_warps": warps, **FUSION}


def gradient_buffer(logits: Tensor) -> Tensor:
    """Memory for the gradient, with rows padded like those of the logits, so that both move as vectors."""
    rows, classes = logits.shape
    stride = logits.stride(0)
    if rows > 1 and logits.stride(1) == 1 and stride > classes and stride * logits.element_size() % 16 == 0:
        return torch.empty_strided((rows, classes), (stride, 1), dtype=logits.dtype, device=logits.device)
    return torch.empty((rows, classes), dtype=logits.dtype, device=logits.device)


def one_launch(student: Tensor, teacher: Tensor, positions: int) -> bool:
    """Whether one program handles an attention sample: larger ones would keep too few programs busy for too long."""
    size = sum(f[0].numel() * f.element_size() for f in (student, teacher))
    return positions <= FUSED_POSITIONS and size <= FUSED_BYTES


def fused_tile(positions: int, student: Tensor, teacher: Tensor) -> dict[str, int]:
    """All positions, and 32 elements per thread, so that four 16-byte loads of 2-byte elements are in flight."""
    block = power_of_two(positions)
    s_block, t_block = (min(8192 // block, power_of_two(f.shape[1])) for f in (student, teacher))
    return {"BLOCK_P": block, "S_BLOCK_C": s_block, "T_BLOCK_C": t_block, "num_warps": 8, **NO_FUSION}


def attention_tile(rows: int, feature: Tensor) -> dict[str, int]:
    """Positions x channels per program, 4096 elements: 512 along the axis that is contiguous in memory.

    rows: positions of all samples. feature: (N, C, P), in any memory layout.
    """
    channels = power_of_two(feature.shape[1])
    if feature.stride(2) == 1 and feature.stride(1) != 1:
        block_p = min(512, power_of_two(rows))
        return {"BLOCK_P": block_p, "BLOCK_C": min(4096 // block_p, channels)}
    block_c = min(512, channels)
    return {"BLOCK_P": min(4096 // block_c, power_of_two(rows)), "BLOCK_C": block_c}


def finish_warps(block: int) -> int:
    """Warps of the program that finishes a map of `block` positions in registers."""
    return 1 if block <= 256 else 4 if block <= 1024 else 8 if block <= 4096 else 16


def nst_tile(method: str, student: Tensor, teacher: Tensor, backward: bool) -> dict[str, int]:
    """Tiles of the NST kernels for features (N, C, P); a tensor core multiplies at least 16 x 16.

    float32 operands are split into two halves, which takes registers, so their tiles are smaller.
    """
    samples, positions, wide = student.shape[0], student.shape[2], student.element_size() == 4
    if method == "spatial":
        channels = student.shape[1] if backward else max(student.shape[1], teacher.shape[1])
        block_p = max(16, power_of_two(positions))
        block_c = min((2048 if wide else 4096) // block_p, max(16, power_of_two(channels)))
        if backward:
            return {"BLOCK_P": block_p, "BLOCK_C": block_c, "num_warps": 4 if wide else 8, **FUSION}
        splits = _splits(samples, channels, block_c)
        return {"BLOCK_P": block_p, "BLOCK_C": block_c, "SPLITS": splits, "num_warps": 8, **NO_FUSION}
    block_s, block_t = (max(16, power_of_two(f.shape[1])) for f in (student, teacher))
    large = block_s * block_t > 64 * 64 or (block_s * block_t == 64 * 64 and not backward)
    warps = 8 if wide or large else 4
    most = (32 if wide else 64) if backward else 16 if wide else 32 if block_t > 64 else 64
    block_p = min(max(16, power_of_two(positions)), most)
    tile = {"BLOCK_S": block_s, "BLOCK_T": block_t, "BLOCK_P": block_p, "num_warps": warps, **FUSION}
    if backward:
        return tile
    twice = block_t > 64 or (wide and block_s * block_t >= 64 * 64)
    return {**tile, "TWICE": twice, "SPLITS": _splits(samples, positions, block_p)}


def _splits(samples: int, length: int, block: int) -> int:
    """How many programs share a sample: at most 8, each with about one block of the axis that is split."""
    return max(1, min(power_of_two(NST_PROGRAMS // samples), power_of_two(-(-length // block)), 8))
