"""From what `--data` names to labelled parts (train, valid, test): arrays or checked file lists, and their subsets."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tarfile
import tempfile
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from engine.trial import EnvironmentUnusable, UsageError

FORMS = "glyphs, glyphs:N, cifar10, cifar100, a .npz file, or a folder with train/<class>/ and test/<class>/"
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)

# The *binary* archives of CIFAR: records of plain bytes, so no pickle is ever loaded. Digests from the data's page.
_CIFAR_URL = "https://www.cs.toronto.edu/~kriz/"
_CIFAR_MD5 = {
    "cifar10": ("cifar-10-binary.tar.gz", "c32a1d4ab5d03f1284b67883e8d87530"),
    "cifar100": ("cifar-100-binary.tar.gz", "03b5dce01913d631647c71ecec9e9cb8"),
}

Arrays = dict[str, NDArray[Any]]
Statistic = tuple[float, float, float]


@dataclass(frozen=True)
class Part:
    """A labelled part: `images`, or `files` instead of them, of the same length as `labels`."""

    labels: NDArray[np.int64]  # (N,)
    images: NDArray[np.uint8] | None  # (N, H, H, 3) RGB, C-contiguous
    files: tuple[str, ...] | None  # N paths of JPEG or PNG files

    def __len__(self) -> int:
        return len(self.labels)


@dataclass(frozen=True)
class Data:
    """A data set, split. `mean` and `std` are per channel, of pixels in 0..1; `flip`: mirroring keeps the label."""

    name: str
    train: Part
    valid: Part
    test: Part
    classes: tuple[str, ...]
    mean: Statistic
    std: Statistic
    resolution: int  # side in pixels of what a network sees, unless a fidelity asks for another
    flip: bool


def load(
    spec: str, *, seed: int = 0, valid_fraction: float = 0.2, resolution: int = 0, cache: Path | None = None
) -> Data:
    """The data set that `spec` names (FORMS), its training part split by `seed` into train and valid.

    `resolution` in pixels replaces the native side of arrays, or the 224 of files. `cache` (default
    $XDG_CACHE_HOME/mfkd or ~/.cache/mfkd) keeps what is made, downloaded or checked: the second call is cheap.
    Raises UsageError for a spec or setting that cannot be, EnvironmentUnusable for data that is missing or bad.
    """
    if not 0 < valid_fraction <= 0.5:
        raise UsageError(f"valid_fraction is {valid_fraction}; it must be over 0 and at most 0.5")
    if resolution < 0:
        raise UsageError(f"resolution is {resolution}; it is in pixels, 0 for the data's own")
    cache = cache or _default_cache()
    path = Path(spec).expanduser()
    if spec == "glyphs" or spec.startswith("glyphs:"):
        arrays = _glyphs(spec, cache)
    elif spec in _CIFAR_MD5:
        arrays = _cifar(spec, cache)
    elif path.is_dir():
        return _from_folder(path, seed, valid_fraction, resolution or 224, cache)
    elif spec.endswith(".npz"):
        arrays = _read_npz(path)
    else:
        raise UsageError(f"--data {spec}: no such folder, and no data set of that name; it takes {FORMS}")
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


def fingerprint(data: Data) -> str:
    """16 hex digits that stand for the content: classes, every label, the split, and a sample of the images.

    Equal wherever the data lies. It changes with the split, so that a teacher which was trained on what is now a
    validation image can be refused.
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


def _from_arrays(name: str, arrays: Arrays, seed: int, valid_fraction: float, resolution: int) -> Data:
    images, labels = arrays["x_train"], arrays["y_train"]
    classes = tuple(str(c) for c in arrays["class_names"])
    train, valid = (
        Part(labels[i], np.ascontiguousarray(images[i]), None) for i in _split(labels, valid_fraction, seed, classes)
    )
    mean, std = _statistics(images)
    flip = bool(arrays.get("flip", True))
    test = Part(arrays["y_test"], arrays["x_test"], None)
    return Data(name, train, valid, test, classes, mean, std, resolution or images.shape[1], flip)


def _from_folder(root: Path, seed: int, valid_fraction: float, resolution: int, cache: Path) -> Data:
    from engine.folder import checked_folder  # Pillow: only where there are files to check

    listed = checked_folder(root, cache)
    paths = np.array(listed.train_files, dtype=object)
    train, valid = (
        Part(listed.train_labels[i], None, tuple(paths[i]))
        for i in _split(listed.train_labels, valid_fraction, seed, listed.classes)
    )
    test = Part(listed.test_labels, None, listed.test_files)
    return Data(
        str(root), train, valid, test, listed.classes, IMAGENET_MEAN, IMAGENET_STD, resolution, flip=True
    )


def _statistics(images: NDArray[np.uint8]) -> tuple[Statistic, Statistic]:
    """Mean and standard deviation per channel of pixels in 0..1, exact, whatever the split."""
    total, squares = np.zeros(3), np.zeros(3)
    for start in range(0, len(images), 500):
        pixels = images[start : start + 500].reshape(-1, 3).astype(np.float64) / 255
        total += pixels.sum(0)
        squares += np.einsum("nc,nc->c", pixels, pixels)
    count = images.size / 3
    mean = total / count
    # A channel that never changes would divide by zero: 1/255 is the smallest step that a pixel can take.
    std = np.sqrt(np.maximum(squares / count - mean**2, 1 / 255**2))
    return tuple(mean.tolist()), tuple(std.tolist())


def _glyphs(spec: str, cache: Path) -> Arrays:
    """`glyphs:N`: N training and N/4 test images; the same for every seed, so that test accuracies compare."""
    from engine import glyphs

    size = spec.partition(":")[2] or "12000"
    if not size.isdecimal() or int(size) < 4 * len(glyphs.CHARACTERS):
        raise UsageError(f"--data {spec}: write glyphs:N with N training images, at least {4 * len(glyphs.CHARACTERS)}")
    count = int(size)

    def make() -> Arrays:
        x_train, y_train = glyphs.render(count, seed=0)
        x_test, y_test = glyphs.render(count // 4, seed=1)
        return {"x_train": x_train, "y_train": y_train, "x_test": x_test, "y_test": y_test}

    arrays = _cached(cache / f"glyphs-v{glyphs.VERSION}-{count}", make)
    return {**arrays, "class_names": np.array(list(glyphs.CHARACTERS)), "flip": np.array(False)}


def _cifar(name: str, cache: Path) -> Arrays:
    return _cached(cache / name, lambda: _read_cifar(name, _cifar_archive(name, cache)))


def _cifar_archive(name: str, cache: Path) -> Path:
    """The archive in the cache, its digest checked; downloaded by torchvision if it is not there."""
    from torchvision.datasets.utils import check_integrity, download_url

    file, md5 = _CIFAR_MD5[name]
    archive = cache / file
    if archive.exists() and check_integrity(str(archive), md5):
        return archive
    _make_folder(cache)
    try:
        with tempfile.TemporaryDirectory(dir=cache) as aside:
            download_url(_CIFAR_URL + file, aside, file, md5)
            os.replace(Path(aside) / file, archive)
    except (OSError, RuntimeError) as error:  # URLError is an OSError; RuntimeError: the digest differs
        raise EnvironmentUnusable(
            f"--data {name}: {_CIFAR_URL}{file} could not be downloaded ({error}). Where there is no network, copy "
            f"that file (MD5 {md5}) to {archive}, or give your own data: {FORMS}"
        ) from error
    return archive


def _read_cifar(name: str, archive: Path) -> Arrays:
    """Decode CIFAR's binary records: label bytes (one; for CIFAR-100 coarse, then fine), then 3x32x32 pixels."""
    label_bytes, names_file = (1, "batches.meta.txt") if name == "cifar10" else (2, "fine_label_names.txt")
    parts: dict[str, list[bytes]] = {"train": [], "test": []}
    classes: list[str] = []
    with tarfile.open(archive) as tar:
        for member in sorted(tar.getmembers(), key=lambda m: m.name):
            file = tar.extractfile(member)
            base = Path(member.name).name
            if file is None:
                continue
            if base == names_file:
                classes = file.read().decode().split()
            elif base.endswith(".bin"):
                parts["test" if base.startswith("test") else "train"].append(file.read())
    arrays: Arrays = {"class_names": np.array(classes)}
    for part, chunks in parts.items():
        records = np.frombuffer(b"".join(chunks), np.uint8).reshape(-1, label_bytes + 3072)
        arrays[f"y_{part}"] = records[:, label_bytes - 1].astype(np.int64)
        planes = records[:, label_bytes:].reshape(-1, 3, 32, 32)
        arrays[f"x_{part}"] = np.ascontiguousarray(planes.transpose(0, 2, 3, 1))
    return arrays


def _read_npz(path: Path) -> Arrays:
    """The arrays of a user's .npz, checked: see docs/data.md for what it must hold."""

    def refuse(what: str) -> EnvironmentUnusable:
        return EnvironmentUnusable(f"--data {path}: {what}")

    needed = ("x_train", "y_train", "x_test", "y_test")
    try:
        with np.load(path, allow_pickle=False) as file:
            missing = [key for key in needed if key not in file]
            if missing:
                raise refuse(f"lacks {', '.join(missing)}; it holds {', '.join(file.files) or 'nothing'}")
            arrays = {key: file[key] for key in (*needed, "class_names", "flip") if key in file}
    except FileNotFoundError:
        raise refuse("no such file") from None
    except (OSError, ValueError, EOFError, zipfile.BadZipFile) as error:
        raise refuse(f"cannot be read as an .npz of plain arrays ({error}); write it with numpy.savez") from error
    for part in ("train", "test"):
        x, y = arrays[f"x_{part}"], arrays[f"y_{part}"]
        if x.dtype != np.uint8 or x.ndim != 4 or x.shape[3] != 3 or x.shape[1] != x.shape[2] or not x.size:
            raise refuse(f"x_{part} is {x.dtype} {x.shape}; it must be uint8 (N, H, H, 3), RGB, at least one image")
        if y.dtype.kind not in "iu" or y.shape != x.shape[:1]:
            raise refuse(f"y_{part} is {y.dtype} {y.shape}; it must be integers, one for each of {len(x)} images")
    return {**arrays, **_checked_labels(arrays, refuse)}


def _checked_labels(arrays: Arrays, refuse: Callable[[str], EnvironmentUnusable]) -> Arrays:
    """Labels as int64 and class names, where the labels of train are 0..C-1 and those of test among them."""
    if arrays["x_train"].shape[1:] != arrays["x_test"].shape[1:]:
        raise refuse(f"x_train is {arrays['x_train'].shape}, x_test {arrays['x_test'].shape}: sizes of images differ")
    seen = np.unique(arrays["y_train"])
    names = arrays.get("class_names", seen)
    if seen[0] != 0 or seen[-1] != len(seen) - 1:
        raise refuse(f"y_train holds {len(seen)} labels from {seen[0]} to {seen[-1]}; number the classes 0, 1, 2 ...")
    if len(names) != len(seen):
        raise refuse(f"class_names holds {len(names)} names for {len(seen)} classes in y_train")
    unknown = np.setdiff1d(arrays["y_test"], seen)
    if unknown.size:
        raise refuse(f"y_test has labels that y_train lacks: {', '.join(map(str, unknown))}")
    return {
        "y_train": arrays["y_train"].astype(np.int64),
        "y_test": arrays["y_test"].astype(np.int64),
        "class_names": names.astype(str),
    }


def _default_cache() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "mfkd"


def _make_folder(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise EnvironmentUnusable(f"the cache {folder} cannot be made ({error}); set XDG_CACHE_HOME") from error


def _cached(folder: Path, make: Callable[[], Arrays]) -> Arrays:
    """The arrays in `folder`, made first where it is missing; memory-mapped, so that workers share one copy.

    Written aside, then moved: of two processes that make it at once, one wins and both read whole files.
    """
    if not folder.exists():
        _make_folder(folder.parent)
        aside = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".{folder.name}-"))
        try:
            for key, array in make().items():
                np.save(aside / f"{key}.npy", array)
            os.rename(aside, folder)
        except OSError as error:
            if not folder.exists():  # else another process was first
                raise EnvironmentUnusable(f"the cache {folder} cannot be written ({error})") from error
        finally:
            shutil.rmtree(aside, ignore_errors=True)
    try:
        return {file.stem: np.load(file, mmap_mode="r", allow_pickle=False) for file in folder.glob("*.npy")}
    except (OSError, ValueError, EOFError) as error:
        raise EnvironmentUnusable(f"the cache {folder} is damaged ({error}); delete it and run again") from error
