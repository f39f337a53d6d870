"""The built-in data set: characters 0-9 A-Z on cluttered, low-contrast 32x32 RGB images, drawn from a seed."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

CHARACTERS = "0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZ"
SIZE = 32  # height and width of an image, in pixels
VERSION = 2  # part of the cache key: increase it with every change of the drawing

_ATLAS = 40  # side of a character's mask, in pixels; near the drawn size, so bilinear sampling does not alias
_CHUNK = 500  # images drawn at once: bounds memory, and each chunk has its own random stream
_STROKES = 3  # distracting line segments per image
_FRAGMENTS = 2  # parts of other characters per image
_LUMA = np.array([0.299, 0.587, 0.114], np.float32)  # brightness of R, G, B (ITU-R BT.601)

Floats = NDArray[np.float32]
Images = NDArray[np.uint8]
Labels = NDArray[np.int64]


def render(count: int, seed: int) -> tuple[Images, Labels]:
    """`count` images (count, 32, 32, 3) uint8 RGB and labels (count,) int64 in 0..35, balanced to within one.

    The same `seed` and version of Pillow give the same images; another seed gives independent ones. Each image shows
    one whole character, rotated, sheared, scaled and shifted at random, over parts of other characters and strokes, in
    colours that may be similar, with noise. Mirroring an image does not preserve its label.
    """
    labels = np.arange(count) % len(CHARACTERS)
    np.random.Generator(np.random.Philox(key=[seed, 0])).shuffle(labels)
    images = np.empty((count, SIZE, SIZE, 3), np.uint8)
    atlas = _atlas()
    for chunk, start in enumerate(range(0, count, _CHUNK)):
        rng = np.random.Generator(np.random.Philox(key=[seed, 1 + chunk]))
        rows = slice(start, start + _CHUNK)
        images[rows] = _draw(labels[rows], atlas, rng)
    return images, labels.astype(np.int64)


def _atlas() -> Floats:
    """Coverage masks (36, 42, 42) in 0..1 of the characters, centred, with an empty border of one pixel."""
    font = ImageFont.load_default(size=34)
    masks = np.zeros((len(CHARACTERS), _ATLAS + 2, _ATLAS + 2), np.float32)
    for mask, character in zip(masks, CHARACTERS, strict=True):
        canvas = Image.new("L", (_ATLAS, _ATLAS))
        draw = ImageDraw.Draw(canvas)
        draw.text((_ATLAS / 2, _ATLAS / 2 + 12), character, fill=255, font=font, anchor="ms")
        mask[1:-1, 1:-1] = np.asarray(canvas, np.float32) / 255
    return masks


def _draw(labels: Labels, atlas: Floats, rng: np.random.Generator) -> Images:
    """One image per label: background, strokes, fragments of other characters, the character, noise.

    `hard` (n,) scales all disturbances of an image. Networks start learning on the clean images; the hard ones separate
    good networks from better ones.
    """
    n = len(labels)
    hard = np.sqrt(rng.random(n, np.float32))
    back, front = _two_colours(hard, rng)
    image = back[:, None, None, :] * _shading(n, rng)
    for _ in range(_STROKES):
        image = _blend(image, _stroke(n, rng), _near(back, hard, rng))
    for _ in range(_FRAGMENTS):
        others = (labels + rng.integers(1, len(CHARACTERS), n)) % len(CHARACTERS)
        # So far from the centre that the edge of the image cuts it: a fragment cannot be taken for the label.
        angle = rng.uniform(0, 2 * np.pi, n)
        far = rng.uniform(17, 21, n)
        shift = np.stack([far * np.cos(angle), far * np.sin(angle)], -1)
        image = _blend(image, _character(others, shift, np.ones(n), atlas, rng), _near(back, hard, rng))
    shift = (1 + 3 * hard[:, None]) * rng.uniform(-1, 1, (n, 2))
    image = _blend(image, _character(labels, shift, hard, atlas, rng), front)
    sigma = 0.02 + 0.08 * hard[:, None, None, None]
    image += sigma * rng.standard_normal(image.shape, np.float32)
    return (image.clip(0, 1) * 255 + 0.5).astype(np.uint8)


def _two_colours(hard: Floats, rng: np.random.Generator) -> tuple[Floats, Floats]:
    """Background and character colours (n, 3): from light on dark to any two colours 0.3 apart, the lighter in front.

    If the sign of the contrast varied, small networks would learn nothing from a thousand images.
    """
    n = len(hard)
    back = rng.random((n, 3), np.float32)
    towards = rng.random((n, 3), np.float32) - back
    towards /= np.linalg.norm(towards, axis=1, keepdims=True) + 1e-6
    front = back + 0.3 * towards
    # Outside the colour cube, go the other way on that axis: clipping would reduce the contrast.
    front = np.where((front < 0) | (front > 1), back - 0.3 * towards, front)
    swap = (back @ _LUMA > front @ _LUMA)[:, None]
    back, front = np.where(swap, front, back), np.where(swap, back, front)
    clean = (1 - hard)[:, None]
    return back * (1 - clean), front + clean * (1 - front)


def _near(back: Floats, hard: Floats, rng: np.random.Generator) -> Floats:
    """Colours (n, 3) of clutter: up to 0.7 of the way from `back` to a random colour."""
    return back + 0.7 * hard[:, None] * (rng.random(back.shape, np.float32) - back)


def _shading(n: int, rng: np.random.Generator) -> Floats:
    """A linear change of brightness (n, 32, 32, 1) across the image, 0.7 to 1.3."""
    x, y = _grid()
    slope = rng.uniform(-0.15, 0.15, (n, 2, 1, 1)).astype(np.float32) / np.float32(SIZE / 2)
    return (slope[:, 0] * x + slope[:, 1] * y + np.float32(1))[..., None]


def _stroke(n: int, rng: np.random.Generator) -> Floats:
    """Coverage (n, 32, 32) of one line segment per image, 1 to 2.5 pixels wide, 8 to 26 long."""
    x, y = _grid()
    middle = rng.uniform(-16, 16, (n, 2, 1, 1)).astype(np.float32)
    angle = rng.uniform(0, np.pi, (n, 1, 1)).astype(np.float32)
    half_length = rng.uniform(4, 13, (n, 1, 1)).astype(np.float32)
    half_width = rng.uniform(0.5, 1.25, (n, 1, 1)).astype(np.float32)
    dx, dy = x - middle[:, 0], y - middle[:, 1]
    along = np.abs(dx * np.cos(angle) + dy * np.sin(angle)) - half_length
    across = np.abs(dy * np.cos(angle) - dx * np.sin(angle)) - half_width
    return (0.5 - np.maximum(along, across)).clip(0, 1)


def _character(
    which: Labels, shift: NDArray[np.floating], hard: NDArray[np.floating], atlas: Floats, rng: np.random.Generator
) -> Floats:
    """Coverage (n, 32, 32) of one character per image: 16 to 26 pixels tall, rotated by up to 35 degrees, sheared."""
    n = len(which)
    turn = np.deg2rad(5 + 30 * hard) * rng.uniform(-1, 1, n)
    shear = 0.3 * hard * rng.uniform(-1, 1, n)
    scale = 1.1 - 0.4 * hard * rng.random(n)
    stretch = rng.uniform(0.85, 1.18, n)
    cos, sin = np.cos(turn), np.sin(turn)
    # From a pixel to the mask: the inverse of scale, then shear, then turn.
    to_mask = np.stack([cos + shear * sin, sin - shear * cos, -sin, cos], -1).reshape(n, 2, 2)
    to_mask /= np.stack([scale * stretch, scale], -1)[:, :, None]
    x, y = _grid()
    pixels = np.stack([x.ravel(), y.ravel()]).astype(np.float32)
    offset = np.einsum("nij,nj->ni", to_mask, shift)[..., None]
    at = to_mask.astype(np.float32) @ pixels - offset.astype(np.float32)
    return _bilinear(atlas, which, at + (_ATLAS + 1) / 2).reshape(n, SIZE, SIZE)


def _bilinear(atlas: Floats, which: Labels, at: Floats) -> Floats:
    """Masks `which` of `atlas`, sampled at the positions `at` (n, 2, positions; x then y); 0 outside the mask."""
    side = atlas.shape[-1]
    at = at.clip(0, side - 1.001)
    corner = at.astype(np.int32)
    fx, fy = (at - corner)[:, 0], (at - corner)[:, 1]
    flat = atlas.ravel()
    base = which[:, None].astype(np.int32) * (side * side) + corner[:, 1] * side + corner[:, 0]
    top = flat[base] * (1 - fx) + flat[base + 1] * fx
    bottom = flat[base + side] * (1 - fx) + flat[base + side + 1] * fx
    return top * (1 - fy) + bottom * fy


def _blend(image: Floats, coverage: Floats, colour: Floats) -> Floats:
    """`image` (n, 32, 32, 3) with `colour` (n, 3) painted over it by `coverage` (n, 32, 32)."""
    return image + coverage[..., None] * (colour[:, None, None, :] - image)


def _grid() -> tuple[Floats, Floats]:
    """x and y (32, 32) of the pixel centres, relative to the centre of the image."""
    y, x = np.mgrid[:SIZE, :SIZE].astype(np.float32) - (SIZE - 1) / 2
    return x, y
