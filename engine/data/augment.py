"""Order and augmentation as pure functions of (seed, epoch, index), independent of batch, subset and backend."""

from __future__ import annotations

import functools

import numpy as np
from numpy.typing import NDArray

AREA = (0.08, 1.0)  # share of an image file that a random resized crop covers; torchvision's default
RATIO = (3 / 4, 4 / 3)  # its width / height


@functools.lru_cache(maxsize=2)
def permutation(seed: int, epoch: int, count: int) -> NDArray[np.int64]:
    """0..count-1 (count,) in the order of that epoch. The last two are cached, so a call at every step is cheap."""
    order = np.random.Generator(np.random.Philox(key=[seed, epoch])).permutation(count)
    order.flags.writeable = False
    return order


def uniform(seed: int, epoch: int, indices: NDArray[np.int64], draws: int) -> NDArray[np.float64]:
    """Numbers in [0, 1) (N, draws). Row i depends on (seed, epoch, indices[i]) only.

    A counter-based generator: the finaliser of SplitMix64 (Steele, Lea and Flood, OOPSLA 2014) over each word in
    turn. A NumPy generator per image would cost more than the rest of the batch.
    """
    state = _mix(_mix(np.uint64(seed % 2**64)) ^ np.uint64(epoch))
    each = _mix(state ^ indices.astype(np.uint64))
    words = _mix(each[:, None] ^ np.arange(1, draws + 1, dtype=np.uint64) * np.uint64(0xD1342543DE82EF95))
    return (words >> np.uint64(11)).astype(np.float64) * 2.0**-53


def crop_and_flip(
    seed: int, epoch: int, indices: NDArray[np.int64], pad: int, flip: bool
) -> tuple[NDArray[np.int32], NDArray[np.int32]]:
    """The start (N, 2; y then x, 0..2 pad) of a random crop of an image with a border of `pad` pixels, and mirror (N,).

    Each of the (2 pad + 1)^2 positions is equally likely; mirror is 0 or 1, always 0 without `flip`.
    """
    u = uniform(seed, epoch, indices, 3)
    start = (u[:, :2] * (2 * pad + 1)).astype(np.int32)
    return start, ((u[:, 2] < 0.5) & flip).astype(np.int32)


def resized_crop(
    seed: int, epoch: int, indices: NDArray[np.int64], flip: bool
) -> tuple[NDArray[np.float32], NDArray[np.int32]]:
    """Random resized crops (N, 4): share of the area, width / height, and position y, x in 0..1; and mirror (N,).

    The distribution is that of torchvision's RandomResizedCrop, with one difference: a crop too wide or too tall for
    its image is cut to it, while torchvision draws again. Here the size of the image is not known before it is read.
    """
    u = uniform(seed, epoch, indices, 5)
    area = AREA[0] + u[:, 0] * (AREA[1] - AREA[0])
    ratio = np.exp(np.log(RATIO[0]) + u[:, 1] * np.log(RATIO[1] / RATIO[0]))
    box = np.stack([area, ratio, u[:, 2], u[:, 3]], -1).astype(np.float32)
    return box, ((u[:, 4] < 0.5) & flip).astype(np.int32)


def _mix(words: NDArray[np.uint64] | np.uint64) -> NDArray[np.uint64]:
    with np.errstate(over="ignore"):  # arithmetic modulo 2^64 is intended
        z = np.asarray(words, np.uint64) + np.uint64(0x9E3779B97F4A7C15)
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return z ^ (z >> np.uint64(31))
