"""From what `--data` names to labelled parts (train, valid, test): arrays or checked file lists, and their subsets."""

from __future__ import annotations

import hashlib
import json
import os
from dataclasses import dataclass, replace
from fractions import Fraction
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from engine.data import arrays as sources
from engine.data.arrays import Arrays
from engine.trial import EnvironmentUnusable, UsageError

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)

Statistic = tuple[float, float, float]


@dataclass(frozen=True)
class Split:
    """A labelled part: `images`, or `files` instead of them, of the same length as `labels`."""

    labels: NDArray[np.int64]  # (N,)
    images: NDArray[np.uint8] | None  # (N, H, H, 3) RGB, C-contiguous
    files: tuple[str, ...] | None  # N paths of JPEG or PNG files

    def __len__(self) -> int:
        return len(self.labels)


@dataclass(frozen=True)
class Dataset:
    """A data set, split. `mean` and `std` are per channel, of pixels in 0..1; `flip`: mirroring keeps the label."""

    name: str
    train: Split
    valid: Split
    test: Split
    classes: tuple[str, ...]
    mean: Statistic
    std: Statistic
    resolution: int  # side in pixels of what a network sees, unless a fidelity asks for another
    flip: bool


def load(
    spec: str,
    *,
    seed: int = 0,
    valid_fraction: float = 0.2,
    resolution: int = 0,
    flip: Literal["auto", "always", "never"] = "auto",
    cache: Path | None = None,
) -> Dataset:
    """The data set that `spec` names (arrays.FORMS), its training part split by `seed` into train and valid.

    `resolution` in pixels replaces the native side of arrays, or the 224 of files, and `flip` what the data say of
    mirroring. `cache` (default
    $XDG_CACHE_HOME/mfkd or ~/.cache/mfkd) keeps what is made, downloaded or checked: the second call is cheap.
    Raises UsageError for a spec or setting that cannot be, EnvironmentUnusable for data that is missing or bad.
    """
    if not 0 < valid_fraction <= 0.5:
        raise UsageError(f"valid_fraction is {valid_fraction}; it must be over 0 and at most 0.5")
    if resolution < 0:
        raise UsageError(f"resolution is {resolution}; it is in pixels, 0 for the data's own")
    cache = cache or _default_cache()
    data = _named(spec, seed, valid_fraction, resolution, cache)
    return data if flip == "auto" else replace(data, flip=flip == "always")


def _named(spec: str, seed: int, valid_fraction: float, resolution: int, cache: Path) -> Dataset:
    path = Path(spec).expanduser()
    if spec == "glyphs" or spec.startswith("glyphs:"):
        arrays = sources.glyphs(spec, cache)
    elif spec in sources.CIFAR:
        arrays = sources.cifar(spec, cache)
    elif path.is_dir():
        return _from_folder(path, seed, valid_fraction, resolution or 224, cache)
    elif spec.endswith(".npz"):
        arrays = sources.read_npz(path)
    else:
        raise UsageError(f"--data {spec}: no such folder, and no data set of that name; it takes {sources.FORMS}")
    return _from_arrays(spec, arrays, seed, valid_fraction, resolution)


def subset(labels: NDArray[np.int64], fraction: Fraction, seed: int) -> NDArray[np.int64]:
    """Sorted indices of max(round(fraction * N), number of classes) of the N `labels`, stratified and nested.

    With one `seed`, the indices of a fraction hold those of every smaller one. One image of each class comes first,
    then the others in the order of (place in the class + 1/2) / (size of the class): each class keeps its share to
    within one image or two. Within a class, and among equals, the order is drawn from `seed`.
    """
    if not 0 < fraction <= 1:
        raise UsageError(f"a fraction of the data is {fraction}; it must be over 0 and at most 1")
    rng = np.random.Generator(np.random.Philox(key=[seed, 0x5B5E7]))
    shuffled = rng.permutation(len(labels))
    by_class = shuffled[np.argsort(labels[shuffled], kind="stable")]
    _, starts, sizes = np.unique(labels[by_class], return_index=True, return_counts=True)
    place = np.arange(len(labels)) - np.repeat(starts, sizes)
    rank = np.where(place == 0, 0, (place + 0.5) / np.repeat(sizes, sizes))
    order = by_class[np.lexsort((rng.permutation(len(labels)), rank))]
    return np.sort(order[: max(round(fraction * len(labels)), len(sizes))])


def steps_per_epoch(images: int, batch_size: int) -> int:
    """Full batches in a pass over `images`; raises UsageError where there is not one."""
    if batch_size < 1:
        raise UsageError(f"the batch size is {batch_size}; it must be at least 1")
    if images < batch_size:
        raise UsageError(
            f"{images} training images are fewer than a batch of {batch_size}; "
            f"lower the batch size to {images} or less, or raise the fraction of the data"
        )
    return images // batch_size


def fingerprint(data: Dataset) -> str:
    """16 hex digits that stand for the content: classes, every label, the split, and a sample of the images.

    Equal wherever the data lies. It changes with the split, so that a teacher which may have been trained on what is
    now a validation image is known.
    """
    digest = hashlib.sha256(json.dumps([data.classes, data.flip]).encode())
    for part in (data.train, data.valid, data.test):
        digest.update(part.labels.tobytes())
        for i in np.linspace(0, len(part) - 1, 64).astype(int):
            if part.images is not None:
                digest.update(part.images[i].tobytes())
            elif part.files is not None:
                file = Path(part.files[i])
                digest.update(f"{file.parent.name}/{file.name} {file.stat().st_size}".encode())
    return digest.hexdigest()[:16]


def _split(labels: NDArray[np.int64], fraction: float, seed: int, classes: tuple[str, ...]) -> list[NDArray[np.int64]]:
    """Indices of train and of valid: both hold every class, since a class has two images and `fraction` <= 1/2."""
    counts = np.bincount(labels, minlength=len(classes))
    few = [f"{classes[c]} ({counts[c]})" for c in np.flatnonzero(counts < 2)]
    if few:
        raise EnvironmentUnusable(
            f"every class needs at least 2 training images, one to train on and one to validate; too few in: "
            f"{', '.join(few)}. Add images to these classes or leave them out"
        )
    valid = subset(labels, Fraction(fraction).limit_denominator(10**6), seed)
    return [np.setdiff1d(np.arange(len(labels)), valid, assume_unique=True), valid]


def _check_classes(classes: tuple[str, ...]) -> None:
    if len(classes) < 2:
        raise EnvironmentUnusable(f"the data have one class only ({classes[0]}); there must be two to tell apart")


def _from_arrays(name: str, arrays: Arrays, seed: int, valid_fraction: float, resolution: int) -> Dataset:
    images, labels = arrays["x_train"], arrays["y_train"]
    classes = tuple(str(c) for c in arrays["class_names"])
    _check_classes(classes)
    train, valid = (
        Split(labels[i], np.ascontiguousarray(images[i]), None) for i in _split(labels, valid_fraction, seed, classes)
    )
    mean, std = _statistics(images)
    flip = bool(arrays.get("flip", True))
    test = Split(arrays["y_test"], arrays["x_test"], None)
    return Dataset(name, train, valid, test, classes, mean, std, resolution or images.shape[1], flip)


def _from_folder(root: Path, seed: int, valid_fraction: float, resolution: int, cache: Path) -> Dataset:
    from engine.data.folder import checked_folder  # Pillow: only where there are files to check

    listed = checked_folder(root, cache)
    _check_classes(listed.classes)
    paths = np.array(listed.train_files, dtype=object)
    train, valid = (
        Split(listed.train_labels[i], None, tuple(paths[i]))
        for i in _split(listed.train_labels, valid_fraction, seed, listed.classes)
    )
    test = Split(listed.test_labels, None, listed.test_files)
    return Dataset(str(root), train, valid, test, listed.classes, IMAGENET_MEAN, IMAGENET_STD, resolution, flip=True)


def _statistics(images: NDArray[np.uint8]) -> tuple[Statistic, Statistic]:
    """Mean and standard deviation per channel of pixels in 0..1, whatever the split."""
    pixels, step = images.reshape(-1, 3), 1 << 19
    total, squares = np.zeros(3), np.zeros(3)
    for start in range(0, len(pixels), step):
        channels = np.ascontiguousarray(pixels[start : start + step].T, np.float32)  # fast: unit stride in memory
        total += channels.sum(1, dtype=np.float64)
        squares += [float(channel @ channel) for channel in channels]
    mean = total / len(pixels)
    # A channel that never changes would divide by zero: a step of 1 in 255 is the smallest that a pixel can take.
    std = np.sqrt(np.maximum(squares / len(pixels) - mean**2, 1))
    return _three(mean / 255), _three(std / 255)


def _three(values: NDArray[np.float64]) -> Statistic:
    red, green, blue = values.tolist()
    return red, green, blue


def _default_cache() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "mfkd"
