"""The backends without DALI: images kept on the device as bytes, and noise instead of images."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from engine.data import augment
from engine.data.batches import Batch, Batches, image_dtype, to_batch


def synthetic(batches: Batches) -> Iterator[Batch]:
    """Noise instead of images, made once, so that the time of a step is that of the network."""
    shape = (batches.batch_size, batches.resolution, batches.resolution, 3)
    noise = torch.randn(shape, generator=torch.Generator().manual_seed(batches.seed))
    noise = noise.to(batches.device, image_dtype(batches.device))
    for step in range(len(batches)):
        _, rows = batches.at(step)
        yield to_batch(noise[: len(rows)], batches.split, rows)


def resident(batches: Batches) -> Iterator[Batch]:
    """Images as bytes on the device; one gather per batch crops and mirrors them."""
    split, device = batches.split, batches.device
    assert split.images is not None
    used = np.arange(len(split)) if batches.indices is None else batches.indices
    position = np.zeros(len(split), np.int64)  # on the device, by row of the split
    position[used] = np.arange(len(used))
    images = torch.from_numpy(split.images[used]).to(device)
    side = images.shape[1]
    training = batches.indices is not None
    pad = side // 8 if training else 0
    images = F.pad(images, (0, 0, pad, pad, pad, pad))
    mean, std = (torch.tensor(s, device=device) * 255 for s in (batches.data.mean, batches.data.std))
    across = np.arange(side)
    for step in range(len(batches)):
        epoch, rows = batches.at(step)
        start, mirror = augment.crop_and_flip(batches.seed, epoch, rows, pad, training and batches.data.flip)
        y = start[:, :1] + across
        x = start[:, 1:] + np.where(mirror[:, None], across[::-1], across)
        at = (position[rows][:, None, None], y[:, :, None], x[:, None, :])
        pixels = images[tuple(torch.from_numpy(i).to(device, non_blocking=True) for i in at)].float()
        pixels = _resized(pixels, batches.resolution).sub_(mean).div_(std)
        yield to_batch(pixels.to(image_dtype(device)), split, rows)


def _resized(pixels: Tensor, side: int) -> Tensor:
    """(N, H, H, 3) to (N, side, side, 3), as DALI resizes: linear, with antialiasing."""
    if pixels.shape[1] == side:
        return pixels
    planes = pixels.permute(0, 3, 1, 2)
    planes = F.interpolate(planes, (side, side), mode="bilinear", antialias=True, align_corners=False)
    return planes.permute(0, 2, 3, 1).contiguous()
