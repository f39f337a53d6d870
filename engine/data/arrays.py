"""Data sets that fit in memory (glyphs, CIFAR, a user's .npz) as arrays, and a cache of those made or downloaded."""

from __future__ import annotations

import os
import tarfile
import tempfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from engine.data.cache import make_folder, make_once
from engine.trial import EnvironmentUnusable, UsageError

ACCEPTED = (
    "glyphs, glyphs:N, caltech21, cifar10, cifar100, a .npz file, or a folder with <class>/ in it or in its train/ and "
    "test/"
)

# The *binary* archives of CIFAR: records of plain bytes, so no pickle is loaded. Digests are from the web page.
_CIFAR_URL = "https://www.cs.toronto.edu/~kriz/"
CIFAR = {
    "cifar10": ("cifar-10-binary.tar.gz", "c32a1d4ab5d03f1284b67883e8d87530"),
    "cifar100": ("cifar-100-binary.tar.gz", "03b5dce01913d631647c71ecec9e9cb8"),
}

# x_train, x_test (N, H, H, 3) uint8; y_train, y_test (N,) int64; class_names (C,); flip: mirroring keeps the label
Arrays = dict[str, NDArray[Any]]


def glyphs(spec: str, cache: Path) -> Arrays:
    """`glyphs:N`: N training and N/4 test images, the same for every seed, so that test accuracies are comparable."""
    from engine.data.glyphs import CHARACTERS, VERSION, render

    size = "12000" if spec == "glyphs" else spec.partition(":")[2]
    if not size.isdecimal() or int(size) < 4 * len(CHARACTERS):
        raise UsageError(f"--data {spec}: give glyphs:N with N training images, at least {4 * len(CHARACTERS)}")
    count = int(size)

    def make() -> Arrays:
        x_train, y_train = render(count, seed=0)
        x_test, y_test = render(count // 4, seed=1)
        return {"x_train": x_train, "y_train": y_train, "x_test": x_test, "y_test": y_test}

    arrays = _cached(cache / f"glyphs-v{VERSION}-{count}", make)
    return {**arrays, "class_names": np.array(list(CHARACTERS)), "flip": np.array(False)}


def cifar(name: str, cache: Path) -> Arrays:
    return _cached(cache / name, lambda: _read_cifar(name, _cifar_archive(name, cache)))


def _cifar_archive(name: str, cache: Path) -> Path:
    """The archive in the cache, with a verified digest; torchvision downloads it if necessary."""
    from torchvision.datasets.utils import check_integrity, download_url

    file, md5 = CIFAR[name]
    archive = cache / file
    if archive.exists() and check_integrity(str(archive), md5):
        return archive
    make_folder(cache)
    try:
        with tempfile.TemporaryDirectory(dir=cache) as temporary:
            download_url(_CIFAR_URL + file, temporary, file, md5)
            os.replace(Path(temporary) / file, archive)
    except (OSError, RuntimeError) as error:  # URLError is an OSError; RuntimeError: the digest differs
        raise EnvironmentUnusable(
            f"--data {name}: {_CIFAR_URL}{file} could not be downloaded ({error}). Without a network, copy "
            f"that file (MD5 {md5}) to {archive}, or give your own data: {ACCEPTED}"
        ) from error
    return archive


def _read_cifar(name: str, archive: Path) -> Arrays:
    """Decodes CIFAR's binary records: label bytes (one; for CIFAR-100 coarse, then fine), then 3x32x32 pixels."""
    label_bytes, names_file = (1, "batches.meta.txt") if name == "cifar10" else (2, "fine_label_names.txt")
    chunks: dict[str, list[bytes]] = {"train": [], "test": []}
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
                chunks["test" if base.startswith("test") else "train"].append(file.read())
    arrays: Arrays = {"class_names": np.array(classes)}
    for split, content in chunks.items():
        records = np.frombuffer(b"".join(content), np.uint8).reshape(-1, label_bytes + 3072)
        arrays[f"y_{split}"] = records[:, label_bytes - 1].astype(np.int64)
        planes = records[:, label_bytes:].reshape(-1, 3, 32, 32)
        arrays[f"x_{split}"] = np.ascontiguousarray(planes.transpose(0, 2, 3, 1))
    return arrays


def read_npz(path: Path) -> Arrays:
    """The arrays of a user's .npz, checked; docs/data.md says what it must hold."""

    def refuse(reason: str) -> EnvironmentUnusable:
        return EnvironmentUnusable(f"--data {path}: {reason}")

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
    for split in ("train", "test"):
        x, y = arrays[f"x_{split}"], arrays[f"y_{split}"]
        if x.dtype != np.uint8 or x.ndim != 4 or x.shape[3] != 3 or x.shape[1] != x.shape[2] or not x.size:
            raise refuse(f"x_{split} is {x.dtype} {x.shape}; it must be uint8 (N, H, H, 3), RGB, at least one image")
        if y.dtype.kind not in "iu" or y.shape != x.shape[:1]:
            raise refuse(f"y_{split} is {y.dtype} {y.shape}; it must be integers, one for each of {len(x)} images")
    return {**arrays, **_checked_labels(arrays, refuse)}


def _checked_labels(arrays: Arrays, refuse: Callable[[str], EnvironmentUnusable]) -> Arrays:
    """Labels as int64 and class names. Training labels must be 0..C-1, and test labels among them."""
    if arrays["x_train"].shape[1:] != arrays["x_test"].shape[1:]:
        raise refuse(f"x_train is {arrays['x_train'].shape}, x_test {arrays['x_test'].shape}: the image sizes differ")
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


def _cached(folder: Path, make: Callable[[], Arrays]) -> Arrays:
    """The arrays in `folder`, memory-mapped, so that processes share them; makes the folder if it is missing."""

    def save(into: Path) -> None:
        for key, array in make().items():
            np.save(into / f"{key}.npy", array)

    make_once(folder, save)
    try:
        found = {file.stem: np.load(file, mmap_mode="r", allow_pickle=False) for file in folder.glob("*.npy")}
        if not {"x_train", "y_train", "x_test", "y_test"} <= found.keys():
            raise ValueError(f"it has only {', '.join(sorted(found)) or 'no readable file'}")
        return found
    except (OSError, ValueError, EOFError) as error:
        raise EnvironmentUnusable(f"the cache {folder} is damaged ({error}); delete it and run again") from error
