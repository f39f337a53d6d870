"""The data set that `--data` names, as labelled splits (train, valid, test) of arrays or checked files; its subsets."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from fractions import Fraction
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from engine.data import arrays as sources
from engine.data import caltech21
from engine.data.arrays import Arrays
from engine.trial import EnvironmentUnusable, UsageError

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)

Statistic = tuple[float, float, float]


@dataclass(frozen=True)
class Split:
    """A labelled split: either `images` or `files`, of the same length as `labels`.

    `converted` names the PNG file to decode in place of a file that the loader cannot read as it is.
    """

    labels: NDArray[np.int64]  # (N,)
    images: NDArray[np.uint8] | None  # (N, H, H, 3) RGB, C-contiguous
    files: tuple[str, ...] | None  # N paths of image files
    converted: Mapping[str, str] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.labels)

    def select(self, rows: NDArray[np.int64]) -> Split:
        """The split with some of its rows only."""
        images = self.images[rows] if self.images is not None else None
        files = tuple(self.files[row] for row in rows) if self.files is not None else None
        return replace(self, labels=self.labels[rows], images=images, files=files)

    def paths(self, rows: Iterable[int]) -> list[str]:
        """The files to decode for some rows of a split of files."""
        assert self.files is not None
        return [self.converted.get(self.files[row], self.files[row]) for row in rows]


def joined(one: Split, other: Split) -> Split:
    """Both splits as one. Images keep their positions in `one`, so that their augmentation stays the same."""
    images = None if one.images is None or other.images is None else np.concatenate([one.images, other.images])
    files = None if one.files is None or other.files is None else one.files + other.files
    return replace(one, labels=np.concatenate([one.labels, other.labels]), images=images, files=files)


@dataclass(frozen=True)
class Dataset:
    """A data set and its splits. `mean` and `std` are per channel, of pixels in 0..1; `flip`: mirroring keeps the
    label. `notes` tell how a folder was read and what was passed over, `warnings` what is probably a mistake."""

    name: str
    train: Split
    valid: Split
    test: Split
    classes: tuple[str, ...]
    mean: Statistic
    std: Statistic
    resolution: int  # side in pixels of the network input, unless a fidelity asks for another
    flip: bool
    notes: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()


def load(
    spec: str,
    *,
    seed: int = 0,
    valid_fraction: float = 0.2,
    resolution: int = 0,
    flip: Literal["auto", "always", "never"] = "auto",
    cache: Path | None = None,
) -> Dataset:
    """The data set that `spec` names (arrays.ACCEPTED); `seed` splits its training images into train and valid.

    `resolution` in pixels replaces the native side of arrays, or the 224 of files; `flip` replaces the data's own
    answer. `cache` (default $XDG_CACHE_HOME/mfkd or ~/.cache/mfkd) stores what is made, downloaded or checked, so that
    the second call is cheap. Raises UsageError for an invalid spec or setting, EnvironmentUnusable for data that are
    missing or bad.
    """
    if not 0 < valid_fraction <= 0.5:
        raise UsageError(f"valid_fraction is {valid_fraction}; it must be over 0 and at most 0.5")
    if resolution < 0:
        raise UsageError(f"resolution is {resolution}; give pixels, or 0 for the data's own")
    cache = cache or _default_cache()
    data = _named(spec, seed, valid_fraction, resolution, cache)
    return data if flip == "auto" else replace(data, flip=flip == "always")


def _named(spec: str, seed: int, valid_fraction: float, resolution: int, cache: Path) -> Dataset:
    path = Path(spec).expanduser()
    if spec == "glyphs" or spec.startswith("glyphs:"):
        arrays = sources.glyphs(spec, cache)
    elif spec in sources.CIFAR:
        arrays = sources.cifar(spec, cache)
    elif spec == "caltech21":
        data = _from_folder(caltech21.unpacked(cache), seed, valid_fraction, resolution or caltech21.RESOLUTION, cache)
        return replace(data, name=spec)
    elif path.is_dir():
        return _from_folder(path, seed, valid_fraction, resolution or 224, cache)
    elif spec.endswith(".npz"):
        arrays = sources.read_npz(path)
    else:
        raise UsageError(f"--data {spec}: no folder and no data set of this name; give {sources.ACCEPTED}")
    return _from_arrays(spec, arrays, seed, valid_fraction, resolution)


def subset(labels: NDArray[np.int64], fraction: Fraction, seed: int) -> NDArray[np.int64]:
    """Sorted indices of max(round(fraction * N), number of classes) of the N `labels`, stratified and nested.

    For one `seed`, the subset of a fraction contains those of all smaller fractions. One image of each class comes
    first, then the others by (rank in the class + 1/2) / (size of the class), so that each class keeps its share to
    within one or two images. Order within a class, and between ties, is random and depends on `seed`.
    """
    if not 0 < fraction <= 1:
        raise UsageError(f"a fraction of the data is {fraction}; it must be over 0 and at most 1")
    rng = np.random.Generator(np.random.Philox(key=[seed, 0x5B5E7]))
    shuffled = rng.permutation(len(labels))
    by_class = shuffled[np.argsort(labels[shuffled], kind="stable")]
    _, starts, sizes = np.unique(labels[by_class], return_index=True, return_counts=True)
    rank = np.arange(len(labels)) - np.repeat(starts, sizes)
    key = np.where(rank == 0, 0, (rank + 0.5) / np.repeat(sizes, sizes))
    order = by_class[np.lexsort((rng.permutation(len(labels)), key))]
    return np.sort(order[: max(round(fraction * len(labels)), len(sizes))])


def steps_per_epoch(images: int, batch_size: int) -> int:
    """Full batches in a pass over `images`; raises UsageError if there are none."""
    if batch_size < 1:
        raise UsageError(f"the batch size is {batch_size}; it must be at least 1")
    if images < batch_size:
        raise UsageError(
            f"{images} training images are fewer than a batch of {batch_size}; "
            f"lower the batch size to {images} or less, or raise the fraction of the data"
        )
    return images // batch_size


def fingerprint(data: Dataset) -> str:
    """16 hex digits that identify the content: classes, all labels, the splits, and a sample of the images.

    It does not depend on where the data are stored. It changes with the splits, which reveals a teacher that may have
    been trained on a present validation image.
    """
    digest = hashlib.sha256(json.dumps([data.classes, data.flip]).encode())
    for split in (data.train, data.valid, data.test):
        digest.update(split.labels.tobytes())
        for i in np.linspace(0, len(split) - 1, 64).astype(int):
            if split.images is not None:
                digest.update(split.images[i].tobytes())
            elif split.files is not None:
                file = Path(split.files[i])
                digest.update(os.fsencode(f"{file.parent.name}/{file.name} {file.stat().st_size}"))
    return digest.hexdigest()[:16]


def train_valid_rows(
    labels: NDArray[np.int64], fraction: float, seed: int, classes: tuple[str, ...]
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Rows of train and of valid. Both contain every class, since a class has two images and `fraction` <= 1/2."""
    counts = np.bincount(labels, minlength=len(classes))
    few = [f"{classes[c]} ({counts[c]})" for c in np.flatnonzero(counts < 2)]
    if few:
        raise EnvironmentUnusable(
            f"every class needs at least 2 training images, one to train and one to validate; too few in: "
            f"{', '.join(few)}. Add images to these classes or leave them out"
        )
    valid = subset(labels, Fraction(fraction).limit_denominator(10**6), seed)
    return np.setdiff1d(np.arange(len(labels)), valid, assume_unique=True), valid


def _check_classes(classes: tuple[str, ...]) -> None:
    if len(classes) < 2:
        raise EnvironmentUnusable(f"the data have one class only ({classes[0]}); a classifier needs at least two")


def _from_arrays(name: str, arrays: Arrays, seed: int, valid_fraction: float, resolution: int) -> Dataset:
    images, labels = arrays["x_train"], arrays["y_train"]
    classes = tuple(str(c) for c in arrays["class_names"])
    _check_classes(classes)
    train, valid = (
        Split(labels[rows], np.ascontiguousarray(images[rows]), None)
        for rows in train_valid_rows(labels, valid_fraction, seed, classes)
    )
    mean, std = _statistics(images)
    flip = bool(arrays.get("flip", True))
    test = Split(arrays["y_test"], arrays["x_test"], None)
    return Dataset(name, train, valid, test, classes, mean, std, resolution or images.shape[1], flip)


def _from_folder(root: Path, seed: int, valid_fraction: float, resolution: int, cache: Path) -> Dataset:
    from engine.data.folder import LabelledFiles, read_folder  # imports Pillow, which arrays do not need

    folder = read_folder(root, cache)
    _check_classes(folder.classes)
    train, valid, test = folder.train, folder.valid, folder.test
    if valid is None:
        rows = train_valid_rows(train.labels, valid_fraction, seed, folder.classes)
        paths = np.array(train.files, dtype=object)
        train, valid = (LabelledFiles(tuple(paths[these]), train.labels[these]) for these in rows)
    splits = {
        name: Split(part.labels, None, part.files, folder.converted)
        for name, part in {"train": train, "valid": valid, "test": test}.items()
    }
    return Dataset(
        str(root),
        splits["train"],
        splits["valid"],
        splits["test"],
        folder.classes,
        IMAGENET_MEAN,
        IMAGENET_STD,
        resolution,
        flip=True,
        notes=folder.notes,
        warnings=_copied(splits, folder.copies),
    )


def _copied(splits: Mapping[str, Split], copies: Sequence[Sequence[str]]) -> tuple[str, ...]:
    """Warnings of images that are in two splits or in two classes; `copies` are groups of equal files."""
    if not copies:
        return ()
    home = {
        file: (name, label)
        for name, split in splits.items()
        for file, label in zip(split.files or (), split.labels.tolist(), strict=True)
    }
    groups = [[home[file] for file in group] for group in copies]
    warnings = []
    for name, before in (("test", ("train", "valid")), ("valid", ("train",))):
        leaked = sum(split == name for group in groups if any(s in before for s, _ in group) for split, _ in group)
        if leaked:
            where = "training" if name == "valid" else "training or validation"
            warnings.append(
                f"{leaked} of {len(splits[name])} {name} images are also {where} images, byte for byte; accuracies on "
                f"the {name} split are too high"
            )
    if torn := sum(len(group) for group in groups if len({label for _, label in group}) > 1):
        warnings.append(f"{torn} images are in more than one class, byte for byte")
    return tuple(warnings)


def _statistics(images: NDArray[np.uint8]) -> tuple[Statistic, Statistic]:
    """Mean and standard deviation per channel of pixels in 0..1, of train and valid together."""
    pixels, step = images.reshape(-1, 3), 1 << 19
    total, squares = np.zeros(3), np.zeros(3)
    for start in range(0, len(pixels), step):
        channels = np.ascontiguousarray(pixels[start : start + step].T, np.float32)  # fast: unit stride in memory
        total += channels.sum(1, dtype=np.float64)
        squares += [float(channel @ channel) for channel in channels]
    mean = total / len(pixels)
    # A constant channel would mean a division by zero: 1 of 255 is the smallest change of a pixel.
    std = np.sqrt(np.maximum(squares / len(pixels) - mean**2, 1))
    return _three(mean / 255), _three(std / 255)


def _three(values: NDArray[np.float64]) -> Statistic:
    red, green, blue = values.tolist()
    return red, green, blue


def _default_cache() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "mfkd"
