"""Batches of a Part as torch tensors, from DALI, from memory on the device, or synthetic. Only here is DALI imported."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Literal, get_args

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from engine import augment
from engine.data import Data, Part, steps_per_epoch
from engine.trial import EngineError, EnvironmentUnusable, UsageError

Backend = Literal["dali", "resident", "synthetic"]

_PREFETCH = 2  # batches that DALI prepares ahead, its default
_LISTED = 200_000  # paths handed to DALI's reader at a time: longer runs get a new list every few epochs


@dataclass(frozen=True)
class Batch:
    """`images` (N, 3, R, R), normalised, in channels_last memory: float32 on the CPU, float16 on CUDA.

    `labels` (N,) int64; `indices` (N,) int64, places in the Part. Read only: the synthetic backend hands out one
    buffer again and again.
    """

    images: Tensor
    labels: Tensor
    indices: Tensor


@dataclass(frozen=True)
class Batches:
    """The batches of `train_batches` or `eval_batches`: `len()` in steps, iterated as often as wanted.

    Step s of an iteration is step s % steps_per_epoch of epoch first_epoch + s // steps_per_epoch.
    """

    part: Part
    data: Data
    batch_size: int
    resolution: int
    device: torch.device
    backend: Backend
    threads: int
    indices: NDArray[np.int64] | None = None  # None: every image in order, as it is
    seed: int = 0
    first_epoch: int = 0
    epochs: int = 1

    @property
    def steps_per_epoch(self) -> int:
        if self.indices is None:
            return -(-len(self.part) // self.batch_size)
        return len(self.indices) // self.batch_size

    def __len__(self) -> int:
        return self.steps_per_epoch * (self.epochs - self.first_epoch)

    def __iter__(self) -> Iterator[Batch]:
        return _BACKENDS[self.backend](self)

    def at(self, step: int) -> tuple[int, NDArray[np.int64]]:
        """The epoch of a step, counted from `first_epoch`, and the places in the Part of its images (N,)."""
        epoch, place = divmod(step, self.steps_per_epoch)
        which = slice(place * self.batch_size, (place + 1) * self.batch_size)
        if self.indices is None:
            return 0, np.arange(len(self.part))[which]
        epoch += self.first_epoch
        return epoch, self.indices[augment.permutation(self.seed, epoch, len(self.indices))[which]]


def train_batches(
    part: Part,
    indices: NDArray[np.int64],
    *,
    data: Data,
    batch_size: int,
    epochs: int,
    resolution: int,
    seed: int,
    device: str = "cpu",
    backend: Backend = "dali",
    first_epoch: int = 0,
    threads: int = 1,
) -> Batches:
    """Augmented batches of the images `indices` of `part`, for the epochs `first_epoch` to `epochs` - 1.

    Every epoch has its own order; what does not fill a batch is left out of it. Arrays get a crop from a black
    border of an eighth of the side, files a random resized crop (engine/augment.py); both a mirror where
    `data.flip` says so. Order and augmentation depend on `seed`, the epoch and the index alone, so a run that is
    resumed, and every backend, sees the same images. `resolution` is in pixels; 0 means data.resolution.
    Raises UsageError (fewer images than a batch; a backend that cannot), EnvironmentUnusable (no DALI, no such
    device, a file that cannot be read).
    """
    steps_per_epoch(len(indices), batch_size)
    return _checked(
        Batches(
            part, data, batch_size, resolution or data.resolution, torch.device(device), backend, threads,
            indices=np.asarray(indices), seed=seed, first_epoch=first_epoch, epochs=epochs,
        )
    )  # fmt: skip


def eval_batches(
    part: Part,
    *,
    data: Data,
    batch_size: int,
    resolution: int,
    device: str = "cpu",
    backend: Backend = "dali",
    threads: int = 1,
) -> Batches:
    """Each image of `part` once, in order, the last batch short; arrays whole, files by their centre.

    The shorter side of a file's image becomes 8/7 of `resolution` (256 for 224), of which the centre is taken.
    """
    return _checked(
        Batches(part, data, batch_size, resolution or data.resolution, torch.device(device), backend, threads)
    )


def _checked(batches: Batches) -> Batches:
    if batches.backend not in get_args(Backend):
        raise UsageError(f"data backend '{batches.backend}': choose one of {', '.join(get_args(Backend))}")
    if batches.backend == "resident" and batches.part.images is None:
        raise UsageError("the resident data backend keeps arrays on the device; image files need the backend dali")
    if batches.device.type == "cuda" and not torch.cuda.is_available():
        raise EnvironmentUnusable(f"device {batches.device}: no CUDA device is visible; use --device cpu")
    return batches


def _batch(images: Tensor, part: Part, rows: NDArray[np.int64]) -> Batch:
    """HWC images to a Batch, without a copy: a permuted view of HWC memory is channels_last."""
    device = images.device
    labels = torch.from_numpy(part.labels[rows]).to(device, non_blocking=True)
    return Batch(images.permute(0, 3, 1, 2), labels, torch.from_numpy(rows).to(device, non_blocking=True))


def _synthetic(batches: Batches) -> Iterator[Batch]:
    """Noise in place of images, made once: what is left of a step's time is the network's."""
    shape = (batches.batch_size, batches.resolution, batches.resolution, 3)
    noise = torch.randn(shape, generator=torch.Generator().manual_seed(batches.seed))
    noise = noise.to(batches.device, _dtype(batches.device))
    for step in range(len(batches)):
        _, rows = batches.at(step)
        yield _batch(noise[: len(rows)], batches.part, rows)


def _resident(batches: Batches) -> Iterator[Batch]:
    """The images as bytes on the device, cropped and mirrored by one gather per batch."""
    part, device = batches.part, batches.device
    assert part.images is not None
    kept = np.arange(len(part)) if batches.indices is None else batches.indices
    slot = np.zeros(len(part), np.int64)
    slot[kept] = np.arange(len(kept))
    images = torch.from_numpy(part.images[kept]).to(device)
    side = images.shape[1]
    pad = 0 if batches.indices is None else side // 8
    images = F.pad(images, (0, 0, pad, pad, pad, pad))
    mean, std = (torch.tensor(s, device=device) * 255 for s in (batches.data.mean, batches.data.std))
    across = np.arange(side)
    for step in range(len(batches)):
        epoch, rows = batches.at(step)
        start, mirror = augment.crop_and_flip(batches.seed, epoch, rows, pad, pad > 0 and batches.data.flip)
        y = start[:, :1] + across
        x = start[:, 1:] + np.where(mirror[:, None], across[::-1], across)
        at = (slot[rows][:, None, None], y[:, :, None], x[:, None, :])
        pixels = images[tuple(torch.from_numpy(i).to(device, non_blocking=True) for i in at)].float()
        pixels = _resized(pixels, batches.resolution).sub_(mean).div_(std)
        yield _batch(pixels.to(_dtype(device)), part, rows)


def _resized(pixels: Tensor, side: int) -> Tensor:
    """(N, H, H, 3) to (N, side, side, 3), as DALI does it: linear, with antialiasing."""
    if pixels.shape[1] == side:
        return pixels
    planes = pixels.permute(0, 3, 1, 2)
    planes = F.interpolate(planes, (side, side), mode="bilinear", antialias=True, align_corners=False)
    return planes.permute(0, 2, 3, 1).contiguous()


def _dtype(device: torch.device) -> torch.dtype:
    return torch.float16 if device.type == "cuda" else torch.float32


def _dali(batches: Batches) -> Iterator[Batch]:
    if batches.part.images is not None:
        return _run(batches, _array_pipeline(batches), range(len(batches)))
    return _file_batches(batches)


def _file_batches(batches: Batches) -> Iterator[Batch]:
    """A pipeline every few epochs: its reader takes the paths of all of its steps as one list."""
    per_epoch = batches.steps_per_epoch
    steps = per_epoch * max(1, _LISTED // (per_epoch * batches.batch_size))
    for first in range(0, len(batches), steps):
        part = range(first, min(first + steps, len(batches)))
        yield from _run(batches, _file_pipeline(batches, part), part)


def _run(batches: Batches, pipeline: Any, steps: range) -> Iterator[Batch]:
    """The outputs (images, rows) of `pipeline`, one per step, as Batches that share DALI's memory."""
    stream = torch.cuda.current_stream(batches.device) if batches.device.type == "cuda" else None
    for step in steps:
        _, expected = batches.at(step)
        try:
            images, rows = pipeline.run(stream)
        except RuntimeError as error:  # after one, a pipeline is dead
            raise _explained(batches, step, error) from error
        # A copy of the numbers alone: the pixels stay where DALI put them, and DALI does not write there again.
        places = np.array(rows.as_array()).reshape(-1)[: len(expected)].astype(np.int64)
        yield _batch(torch.from_dlpack(images.as_tensor())[: len(expected)], batches.part, places)


def _explained(batches: Batches, step: int, error: RuntimeError) -> EngineError:
    """DALI's error, with the names of the files that it could not read: its own text often has none."""
    from engine.folder import unreadable

    if batches.part.files is not None:
        ahead = range(step, min(step + _PREFETCH + 1, len(batches)))
        rows = np.unique(np.concatenate([batches.at(s)[1] for s in ahead]))
        bad = unreadable([batches.part.files[row] for row in rows])
        if bad:
            return EnvironmentUnusable("images became unreadable since they were checked:\n  " + "\n  ".join(bad))
    return EnvironmentUnusable(f"DALI stopped: {error}")


def _array_pipeline(batches: Batches) -> Any:
    """Arrays through external_source, with the place of each one's crop and its mirror beside it."""
    fn, _ = _import_dali()
    part, training, seed = batches.part, batches.indices is not None, batches.seed
    assert part.images is not None
    stored, side = part.images, part.images.shape[1]
    pad = side // 8

    def source(info: Any) -> tuple[NDArray[Any], ...]:
        if info.iteration >= len(batches):
            raise StopIteration
        epoch, rows = batches.at(info.iteration)
        if not training:
            return stored[rows], rows
        start, mirror = augment.crop_and_flip(seed, epoch, rows, pad, batches.data.flip)
        return stored[rows], rows, start - pad, mirror

    def graph() -> tuple[Any, Any]:
        inputs = fn.external_source(
            source=source, num_outputs=4 if training else 2, batch_info=True, layout=["HWC", "", "", ""][: 4 if training else 2]
        )
        images, mirror = inputs[0], 0
        if batches.device.type == "cuda":
            images = images.gpu()
        if training:
            start, mirror = inputs[2:]
            # The border is black, and is there before the mean is taken off: torchvision's RandomCrop.
            images = fn.slice(
                images, start=start, shape=[side, side], axes=(0, 1), out_of_bounds_policy="pad", fill_values=0
            )
        if side != batches.resolution:
            images = fn.resize(images, size=[batches.resolution] * 2, antialias=True)
        return _normalised(batches, images, mirror), inputs[1]

    return _built(batches, graph)


def _file_pipeline(batches: Batches, steps: range) -> Any:
    """Files through readers.file on the list of the `steps`; its labels carry places in the Part."""
    fn, types = _import_dali()
    part, training, side = batches.part, batches.indices is not None, batches.resolution
    assert part.files is not None
    rows = np.concatenate([batches.at(step)[1] for step in steps])
    paths = [part.files[row] for row in rows]

    def source(info: Any) -> tuple[NDArray[Any], ...]:
        if info.iteration >= len(steps):
            raise StopIteration
        return augment.resized_crop(batches.seed, *batches.at(steps[info.iteration]), batches.data.flip)

    def graph() -> tuple[Any, Any]:
        encoded, places = fn.readers.file(files=paths, labels=rows.tolist(), pad_last_batch=True)
        images = fn.decoders.image(
            encoded, device="mixed" if batches.device.type == "cuda" else "cpu", output_type=types.RGB
        )
        if not training:
            images = fn.resize(images, resize_shorter=round(side * 8 / 7), antialias=True)
            return _normalised(batches, images, 0), places
        box, mirror = fn.external_source(source=source, num_outputs=2, batch_info=True)
        start, end = _roi(fn.peek_image_shape(encoded), box)
        images = fn.resize(images, size=[side, side], roi_start=start, roi_end=end, antialias=True)
        return _normalised(batches, images, mirror), places

    return _built(batches, graph)


def _roi(shape: Any, box: Any) -> tuple[Any, Any]:
    """Corners (y, x) in pixels of the crop `box` (engine.augment.resized_crop) in an image of `shape` (H, W, C)."""
    from nvidia.dali import fn, math

    height, width = shape[0], shape[1]
    tall = math.min(math.sqrt(box[0] * height * width / box[1]), height)
    wide = math.min(math.sqrt(box[0] * height * width * box[1]), width)
    start = fn.stack(box[2] * (height - tall), box[3] * (width - wide))
    return start, start + fn.stack(tall, wide)


def _normalised(batches: Batches, images: Any, mirror: Any) -> Any:
    """The centre of `images`, mirrored where asked, normalised, height-width-channel."""
    fn, types = _import_dali()
    return fn.crop_mirror_normalize(
        images,
        crop=(batches.resolution, batches.resolution),
        mirror=mirror,
        mean=[255 * m for m in batches.data.mean],
        std=[255 * s for s in batches.data.std],
        dtype=types.FLOAT16 if batches.device.type == "cuda" else types.FLOAT,
        output_layout="HWC",
    )


def _built(batches: Batches, graph: Callable[[], tuple[Any, Any]]) -> Any:
    from nvidia.dali import pipeline_def

    pipeline = pipeline_def(graph)(
        batch_size=batches.batch_size,
        num_threads=batches.threads,
        device_id=(batches.device.index or 0) if batches.device.type == "cuda" else None,
        prefetch_queue_depth=_PREFETCH,
        exec_dynamic=True,  # the executor that never writes to an output again: batches need no copy
    )
    pipeline.build()
    return pipeline


def _import_dali() -> tuple[Any, Any]:
    """(nvidia.dali.fn, nvidia.dali.types)."""
    try:
        from nvidia.dali import fn, types
    except ImportError as error:
        raise EnvironmentUnusable(
            f"DALI cannot be imported ({error}); install it with 'pip install nvidia-dali-cuda130', "
            "or choose the data backend resident"
        ) from error
    return fn, types


_BACKENDS: dict[str, Callable[[Batches], Iterator[Batch]]] = {
    "dali": _dali,
    "resident": _resident,
    "synthetic": _synthetic,
}
