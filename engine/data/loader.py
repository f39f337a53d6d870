"""Batches of a split as torch tensors: by DALI (imported only here), from memory on the device, or synthetic."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray

from engine.data import augment
from engine.data.augment import Augmentation
from engine.data.batches import Batch, Batches, shorter_side, to_batch
from engine.data.dataset import Dataset, Split, steps_per_epoch
from engine.data.resident import resident, synthetic
from engine.trial import EnvironmentUnusable, UsageError

Backend = Literal["dali", "resident", "synthetic"]

_PREFETCH = 2  # batches that DALI prepares ahead, its default
_LISTED = 200_000  # paths given to DALI's reader at a time: longer runs get a new list every few epochs


def train_batches(
    split: Split,
    indices: NDArray[np.int64],
    *,
    data: Dataset,
    batch_size: int,
    epochs: int,
    resolution: int,
    seed: int,
    device: str = "cpu",
    backend: Backend = "dali",
    first_epoch: int = 0,
    threads: int = 1,
    augmentation: Augmentation = Augmentation(),
) -> Batches:
    """Augmented batches of the images `indices` of `split`, for the epochs `first_epoch` to `epochs` - 1.

    Every epoch has its own order and leaves out the images that do not fill a batch. Arrays are padded by a black
    border of an eighth of their side and cropped; files get a random resized crop (engine/data/augment.py). Both are
    mirrored at random if `data.flip`, and changed by an operation of TrivialAugment if `augmentation` says so. Order
    and augmentation depend only on `seed`, the epoch and the index, so that a resumed run, and every backend, sees the
    same images. `resolution` is in pixels; 0 means data.resolution.
    Raises UsageError (fewer images than a batch, unsuitable backend) and EnvironmentUnusable (no such device; during
    iteration, no DALI, or a file that has become unreadable).
    """
    steps_per_epoch(len(indices), batch_size)
    if augmentation.kind == "trivial" and backend == "resident":
        raise UsageError("--augment trivial is computed by DALI; use --data-backend dali, or --augment crop")
    return Batches(
        split=split,
        data=data,
        batch_size=batch_size,
        resolution=resolution or data.resolution,
        device=_usable(device),
        source=_source(backend, split),
        threads=threads,
        indices=np.asarray(indices, np.int64),
        seed=seed,
        first_epoch=first_epoch,
        epochs=epochs,
        augmentation=augmentation,
    )


def eval_batches(
    split: Split,
    *,
    data: Dataset,
    batch_size: int,
    resolution: int,
    device: str = "cpu",
    backend: Backend = "dali",
    threads: int = 1,
) -> Batches:
    """Each image of `split` once, in order; the last batch may be short. Arrays are used whole.

    Files are resized so that their shorter side is about 8/7 of `resolution` (256 for 224), then cropped to the centre.
    Raises the errors of `train_batches`.
    """
    return Batches(
        split=split,
        data=data,
        batch_size=batch_size,
        resolution=resolution or data.resolution,
        device=_usable(device),
        source=_source(backend, split),
        threads=threads,
    )


def _source(backend: str, split: Split) -> Callable[[Batches], Iterator[Batch]]:
    sources = {"dali": _dali, "resident": resident, "synthetic": synthetic}
    if backend not in sources:
        raise UsageError(f"no data backend '{backend}': choose one of {', '.join(sources)}")
    if backend == "resident" and split.images is None:
        raise UsageError("the data backend resident keeps arrays on the device; image files need the backend dali")
    return sources[backend]


def _usable(device: str) -> torch.device:
    if device.startswith("cuda") and not torch.cuda.is_available():
        raise EnvironmentUnusable(f"device {device}: no CUDA device is visible; use --device cpu")
    return torch.device(device)


def _dali(batches: Batches) -> Iterator[Batch]:
    if batches.split.images is not None:
        return _run(batches, _array_pipeline(batches), range(len(batches)))
    return _file_batches(batches)


def _file_batches(batches: Batches) -> Iterator[Batch]:
    """Builds a pipeline every few epochs, because its reader takes the paths of all its steps as one list."""
    per_epoch = batches.steps_per_epoch
    steps = per_epoch * max(1, _LISTED // (per_epoch * batches.batch_size))
    for first in range(0, len(batches), steps):
        these = range(first, min(first + steps, len(batches)))
        yield from _run(batches, _file_pipeline(batches, these), these)


def _run(batches: Batches, pipeline: Any, steps: range) -> Iterator[Batch]:
    """The outputs (images, rows) of `pipeline`, one per step, as Batches that share DALI's memory."""
    stream = torch.cuda.current_stream(batches.device) if batches.device.type == "cuda" else None
    for step in steps:
        _, expected = batches.at(step)
        try:
            images, numbers = pipeline.run(stream)
        except RuntimeError as error:  # the pipeline cannot be used again
            raise _explained(batches, step, error) from error
        # Only the row numbers are copied: the pixels stay in DALI's memory, which it does not overwrite.
        rows = np.array(numbers.as_array()).reshape(-1)[: len(expected)].astype(np.int64)
        yield to_batch(torch.from_dlpack(images.as_tensor())[: len(expected)], batches.split, rows)


def _explained(batches: Batches, step: int, error: RuntimeError) -> Exception:
    """DALI's error, with the names of unreadable files, which its own message often lacks."""
    if any(words in str(error) for words in ("out of memory", "MemoryAllocation", "Can't allocate")):
        return torch.OutOfMemoryError(f"DALI: {error}")  # a smaller cohort leaves it more memory
    from engine.data.image_files import unreadable

    if batches.split.files is not None:
        ahead = range(step, min(step + _PREFETCH + 1, len(batches)))
        paths = batches.split.paths(np.unique(np.concatenate([batches.at(s)[1] for s in ahead])))
        bad = unreadable(paths)
        if bad:
            return EnvironmentUnusable(
                "images became unreadable after they were checked; replace or remove them:\n  " + "\n  ".join(bad)
            )
        bad = [path for path in paths if not _decodes(path)]
        if bad:
            return EnvironmentUnusable(
                "DALI cannot decode these images, though Pillow can; re-save or remove them:\n  "
                + "\n  ".join(bad)
            )
    return EnvironmentUnusable(f"DALI stopped: {error}")


def _decodes(path: str) -> bool:
    """Whether DALI can decode a file on the CPU."""
    from nvidia.dali import fn, pipeline_def

    def graph() -> Any:
        encoded, _ = fn.readers.file(files=[path], labels=[0])
        return fn.decoders.image(encoded, device="cpu")

    pipeline = pipeline_def(graph)(batch_size=1, num_threads=1, device_id=None)
    try:
        pipeline.build()
        pipeline.run()
    except RuntimeError:
        return False
    return True


def _array_pipeline(batches: Batches) -> Any:
    """Arrays through external_source, together with the crop position and the mirror flag of each image."""
    fn, _ = _import_dali()
    images_NHWC, training, seed = batches.split.images, batches.indices is not None, batches.seed
    assert images_NHWC is not None
    side = images_NHWC.shape[1]
    pad = side // 8

    def source(info: Any) -> tuple[NDArray[Any], ...]:
        if info.iteration >= len(batches):
            raise StopIteration
        epoch, rows = batches.at(info.iteration)
        if not training:
            return images_NHWC[rows], rows
        start, mirror = augment.crop_and_flip(seed, epoch, rows, pad, batches.data.flip)
        return images_NHWC[rows], rows, start - pad, mirror, *_operations(batches, epoch, rows, side)

    def graph() -> tuple[Any, Any]:
        outputs = 4 + _extra(batches) if training else 2
        layouts = ["HWC", *[""] * (outputs - 1)]
        inputs = fn.external_source(source=source, num_outputs=outputs, batch_info=True, layout=layouts)
        images, mirror = inputs[0], 0
        if batches.device.type == "cuda":
            images = images.gpu()
        if training:
            start, mirror, *operations = inputs[2:]
            # The border is black and added before normalisation, as in torchvision's RandomCrop.
            images = fn.slice(
                images, start=start, shape=[side, side], axes=(0, 1), out_of_bounds_policy="pad", fill_values=0
            )
            images = _trivial(images, operations)
        if side != batches.resolution:
            images = fn.resize(images, size=[batches.resolution] * 2, antialias=True)
        return _normalised(batches, images, mirror), inputs[1]

    return _built(batches, graph)


def _file_pipeline(batches: Batches, steps: range) -> Any:
    """Files through readers.file, which gets the paths of all `steps`; its labels carry positions in the split."""
    fn, types = _import_dali()
    training, side = batches.indices is not None, batches.resolution
    rows = np.concatenate([batches.at(step)[1] for step in steps])
    paths = batches.split.paths(rows)

    def source(info: Any) -> tuple[NDArray[Any], ...]:
        if info.iteration >= len(steps):
            raise StopIteration
        epoch, these = batches.at(steps[info.iteration])
        crop = augment.resized_crop(batches.seed, epoch, these, batches.data.flip, batches.augmentation.min_area)
        return *crop, *_operations(batches, epoch, these, side)

    def graph() -> tuple[Any, Any]:
        encoded, positions = fn.readers.file(files=paths, labels=rows.tolist(), pad_last_batch=True)
        images = fn.decoders.image(
            encoded, device="mixed" if batches.device.type == "cuda" else "cpu", output_type=types.RGB
        )
        if not training:
            images = fn.resize(images, resize_shorter=shorter_side(side), antialias=True)
            return _normalised(batches, images, 0), positions
        box, mirror, *operations = fn.external_source(source=source, num_outputs=2 + _extra(batches), batch_info=True)
        start, end = _roi(fn.peek_image_shape(encoded), box)
        images = fn.resize(images, size=[side, side], roi_start=start, roi_end=end, antialias=True)
        images = _trivial(images, operations)
        return _normalised(batches, images, mirror), positions

    return _built(batches, graph)


def _roi(shape: Any, box: Any) -> tuple[Any, Any]:
    """Corners (y, x) in pixels of the crop `box` (augment.resized_crop) in an image of `shape` (H, W, C)."""
    from nvidia.dali import fn, math

    height, width = shape[0], shape[1]
    tall = math.min(math.sqrt(box[0] * height * width / box[1]), height)
    wide = math.min(math.sqrt(box[0] * height * width * box[1]), width)
    start = fn.stack(box[2] * (height - tall), box[3] * (width - wide))
    return start, start + fn.stack(tall, wide)


def _extra(batches: Batches) -> int:
    """How many arrays `_operations` gives."""
    return len(augment.Operations._fields) if batches.augmentation.kind == "trivial" else 0


def _operations(batches: Batches, epoch: int, rows: NDArray[np.int64], side: int) -> tuple[NDArray[Any], ...]:
    """The arguments of `_trivial` for images of `side` pixels; () without TrivialAugment."""
    if batches.augmentation.kind != "trivial":
        return ()
    found = augment.trivial(batches.seed, epoch, rows)
    return found._replace(matrix=found.matrix * np.array([1, 1, side], np.float32))


def _trivial(images: Any, operations: list[Any]) -> Any:
    """Images of bytes with the operations of `augment.Operations` applied; what they uncover is black."""
    if not operations:
        return images
    fn, types = _import_dali()
    matrix, colour, bits, threshold = operations
    images = fn.warp_affine(images, matrix=matrix, inverse_map=True, fill_value=0)
    images = fn.color_twist(images, brightness=colour[0], contrast=colour[1], saturation=colour[2]) & bits
    return images ^ ((images > threshold) * types.Constant(255).uint8())


def _normalised(batches: Batches, images: Any, mirror: Any) -> Any:
    """The centre crop of `images`, mirrored by `mirror`, normalised, in layout HWC."""
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
        exec_dynamic=True,  # this executor does not reuse outputs, so batches need no copy
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
