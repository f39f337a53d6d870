"""What the Triton kernels cover, and their tile sizes: tables, not autotuning, so a search never stalls.

Sizes are powers of two. Each shape listed by `aot.py` is compiled offline and must not spill registers.
"""
from __future__ import annotations

from torch import Tensor

TILE_CLASSES = 8192  # rows up to this stay in registers; longer ones are walked twice
FUSED_POSITIONS = 256  # one program does a sample's attention map up to this many positions
MAP_POSITIONS = 16384  # a sample's attention map is finished by one program up to this many
SPATIAL_POSITIONS = 64  # NST: H * W of one tile of the Gram difference
CHANNEL_CHANNELS = 128  # NST: C of one tile of the channel Grams


def power_of_two(n: int) -> int:
    """The least power of two >= n."""
    return 1 << (n - 1).bit_length() if n > 1 else 1


def has_ce_kd(logits: Tensor, variant: str, standardize: bool) -> bool:
    """float64 and the variants with rows over TILE_CLASSES are left to the reference."""
    return logits.element_size() < 8 and (
        logits.shape[1] <= TILE_CLASSES or (variant == "kd" and not standardize)
    )


def has_attention(student: Tensor, teacher: Tensor) -> bool:
    """float64 and maps over MAP_POSITIONS are left to the reference."""
    positions = min(student.shape[2] * student.shape[3], teacher.shape[2] * teacher.shape[3])
    return student.element_size() < 8 and positions <= MAP_POSITIONS


def pooling_ratio(student: Tensor, teacher: Tensor) -> int:
    """The integer r by which both sides of one map exceed the other's, else 0."""
    (h_s, w_s), (h_t, w_t) = student.shape[2:], teacher.shape[2:]
    for big, small in (((h_s, w_s), (h_t, w_t)), ((h_t, w_t), (h_s, w_s))):
        ratio = big[0] // small[0]
        if ratio >= 1 and (small[0] * ratio, small[1] * ratio) == big:
            return ratio
    return 0


def has_nst(student: Tensor, teacher: Tensor, method: str) -> bool:
    """Whether one tile holds the Gram; float64 and the rest run the reference's batched products."""
    if student.element_size() == 8:
        return False
    if method == "spatial":
        return student.shape[2] * student.shape[3] <= SPATIAL_POSITIONS
    return max(student.shape[1], teacher.shape[1]) <= CHANNEL_CHANNELS
