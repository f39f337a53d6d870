"""Order and augmentation as pure functions of (seed, epoch, index), independent of batch, subset and backend."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from engine.config import Augment

MIN_AREA = 0.08  # smallest share of an image file that a random resized crop covers; torchvision's default
RATIO = (3 / 4, 4 / 3)  # its width / height
# TrivialAugment's wide ranges at the highest of its 31 levels (Mueller and Hutter, ICCV 2021, table 6).
LEVELS, SHEAR, SHIFT, ANGLE, CHANGE, BITS = 31, 0.99, 32 / 224, np.deg2rad(135), 0.99, 6
OPERATIONS = (
    *("identity", "shear_x", "shear_y", "shift_x", "shift_y", "rotate"),
    *("brightness", "contrast", "saturation", "posterize", "solarize"),
)


@dataclass(frozen=True)
class Augmentation:
    """How training images are augmented: by crops and mirror images, and with `trivial` by an operation each.

    `min_area` is the smallest share of an image file that its crop covers.
    """

    kind: Augment = "crop"
    min_area: float = MIN_AREA


class Operations(NamedTuple):
    """An operation of TrivialAugment for each of N images, as the arguments of four operations that all images get.

    `matrix` (N, 2, 3) maps the coordinates of output pixels (x, y; the side of the image is 1) to those of the input.
    `colour` (N, 3) holds factors of brightness, contrast and saturation. `bits` (N, 1) masks the bits of each value,
    and values over `threshold` (N, 1) are inverted.
    """

    matrix: NDArray[np.float32]
    colour: NDArray[np.float32]
    bits: NDArray[np.uint8]
    threshold: NDArray[np.uint8]


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
    seed: int, epoch: int, indices: NDArray[np.int64], flip: bool, min_area: float = MIN_AREA
) -> tuple[NDArray[np.float32], NDArray[np.int32]]:
    """Random resized crops (N, 4): share of the area, width / height, and position y, x in 0..1; and mirror (N,).

    The distribution is that of torchvision's RandomResizedCrop, with one difference: a crop too wide or too tall for
    its image is cut to it, while torchvision draws again. Here the size of the image is not known before it is read.
    """
    u = uniform(seed, epoch, indices, 5)
    area = min_area + u[:, 0] * (1 - min_area)
    ratio = np.exp(np.log(RATIO[0]) + u[:, 1] * np.log(RATIO[1] / RATIO[0]))
    box = np.stack([area, ratio, u[:, 2], u[:, 3]], -1).astype(np.float32)
    return box, ((u[:, 4] < 0.5) & flip).astype(np.int32)


def trivial(seed: int, epoch: int, indices: NDArray[np.int64]) -> Operations:
    """One operation per image, at a random level: TrivialAugment (wide) without sharpness, autocontrast and equalise.

    These three read the whole image, and would cost more than all the others.
    """
    u = uniform(seed, epoch, indices, 8)[:, 5:]  # the first five words are those of the crop
    chosen = (u[:, 0] * len(OPERATIONS)).astype(np.int64)
    level = (u[:, 1] * LEVELS).astype(np.int64) / (LEVELS - 1)
    signed = np.where(u[:, 2] < 0.5, -level, level)

    def at(name: str, values: NDArray[np.float64], neutral: float) -> NDArray[np.float64]:
        """`values` for the images that get an operation, `neutral` for the others."""
        return np.where(chosen == OPERATIONS.index(name), values, neutral)

    angle = at("rotate", ANGLE * signed, 0)
    cos, sin = np.cos(angle), np.sin(angle)
    linear = np.stack([cos, at("shear_x", SHEAR * signed, 0) - sin, at("shear_y", SHEAR * signed, 0) + sin, cos], -1)
    linear = linear.reshape(-1, 2, 2)
    shift = np.stack([at("shift_x", SHIFT * signed, 0), at("shift_y", SHIFT * signed, 0)], -1)
    centred = shift + 0.5 - linear.sum(-1) / 2  # rotation and shear leave the centre in its place
    colour = np.stack([at(name, 1 + CHANGE * signed, 1) for name in ("brightness", "contrast", "saturation")], -1)
    dropped = at("posterize", np.round(BITS * level), 0).astype(np.uint8)
    return Operations(
        np.concatenate([linear, centred[:, :, None]], -1).astype(np.float32),
        colour.astype(np.float32),
        (np.uint8(255) << dropped).astype(np.uint8)[:, None],
        at("solarize", np.floor(255 * (1 - level)), 255).astype(np.uint8)[:, None],
    )


def _mix(words: NDArray[np.uint64] | np.uint64) -> NDArray[np.uint64]:
    with np.errstate(over="ignore"):  # arithmetic modulo 2^64 is intended
        z = np.asarray(words, np.uint64) + np.uint64(0x9E3779B97F4A7C15)
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return z ^ (z >> np.uint64(31))
