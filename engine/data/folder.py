"""An image folder, listed and checked: each file is decoded once, and one error names all bad ones."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError

from engine.trial import EnvironmentUnusable

ENDINGS = (".jpg", ".jpeg", ".png")
_NAMED = 200  # bad files that an error lists

# The files of each class.
Listed = dict[str, list[os.DirEntry[str]]]
_LAYOUT = (
    "arrange the images as train/<class>/*.jpg and test/<class>/*.jpg (JPEG or PNG; val/ serves as test/), or as "
    "<class>/*.jpg alone"
)


@dataclass(frozen=True)
class Folder:
    """Classes in sorted order, and the files of train and test with their labels (N,)."""

    classes: tuple[str, ...]
    train_files: tuple[str, ...]
    train_labels: NDArray[np.int64]
    test_files: tuple[str, ...]
    test_labels: NDArray[np.int64]


def checked_folder(root: Path, cache: Path) -> Folder:
    """Lists `root` (train/<class>/* and test|val/<class>/*, or <class>/* alone) and decodes each file once.

    For <class>/* alone, a fifth becomes the test split, see `_divided`. A passed check is recorded in `cache`, with
    path, size and modification time of every file, so that the next call only lists the files. Hidden files and
    endings not in ENDINGS are ignored. Raises EnvironmentUnusable if a split is missing, if class folders are empty or
    differ between the splits, and if files do not decode.
    """
    if any((root / name).is_dir() for name in ("train", "test", "val")):
        train, test = _listed(_split_folder(root, "train")), _listed(_split_folder(root, "test", "val"))
    else:
        train, test = _divided(_listed(root))
    if train.keys() != test.keys():
        only = [f"{name} only in train" for name in sorted(train.keys() - test.keys())]
        only += [f"{name} only in test" for name in sorted(test.keys() - train.keys())]
        raise EnvironmentUnusable(f"--data {root}: the class folders of train and test differ: {', '.join(only)}")
    classes = tuple(sorted(train))
    train_files, train_labels = _flat(train, classes)
    test_files, test_labels = _flat(test, classes)
    _check(root, train_files + test_files, cache / "checked")
    return Folder(classes, train_files, train_labels, test_files, test_labels)


def unreadable(files: Sequence[str]) -> list[str]:
    """'path: reason' for each of `files` that does not decode as JPEG or PNG, in order."""
    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:  # Pillow releases the GIL while decoding
        reasons = pool.map(_why_unreadable, files)
        return [f"{file}: {reason}" for file, reason in zip(files, reasons, strict=True) if reason]


def _why_unreadable(file: str) -> str:
    try:
        file.encode()  # the loader reads names as UTF-8, which names from old archives may not be
        if os.path.getsize(file) == 0:
            return "is empty"
        with Image.open(file, formats=("JPEG", "PNG")) as image:
            image.load()
    # Pillow reports broken files by any of these, SyntaxError among them (a PNG's bad chunk).
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        if isinstance(error, UnicodeEncodeError):
            return "its name is not UTF-8"
        return "is not a JPEG or PNG" if isinstance(error, UnidentifiedImageError) else str(error)
    return ""


def _split_folder(root: Path, *names: str) -> Path:
    for name in names:
        if (root / name).is_dir():
            return root / name
    raise EnvironmentUnusable(f"--data {root}: it has no folder {' or '.join(names)}/; {_LAYOUT}")


def _listed(split: Path) -> Listed:
    """The image files of each class folder, sorted by name; an empty class is an error."""
    classes: Listed = {}
    for folder in sorted(os.scandir(split), key=lambda entry: entry.name):
        if folder.is_dir() and not folder.name.startswith("."):
            classes[folder.name] = sorted(filter(_is_image, os.scandir(folder)), key=lambda entry: entry.name)
    empty = [name for name, files in classes.items() if not files]
    if empty or not classes:
        found = f"no JPEG or PNG file in {', '.join(empty)}" if empty else "no class folder"
        remedy = f"{_LAYOUT}, or remove the empty folders" if empty else _LAYOUT
        raise EnvironmentUnusable(f"--data: {split} has {found}; {remedy}")
    return classes


def _divided(classes: Listed) -> tuple[Listed, Listed]:
    """Training and test files. A fifth of each class, at least one file, is for testing, chosen by a digest of the file
    names: the same in every run, wherever the folder is stored, and nearly the same after images were added."""
    few = [f"{name} ({len(files)})" for name, files in classes.items() if len(files) < 3]
    if few:
        raise EnvironmentUnusable(
            f"every class needs at least 3 images, one each to train, to validate and to test; too few in: "
            f"{', '.join(few)}. Add images to these classes or leave them out"
        )
    train, test = {}, {}
    for name, files in classes.items():
        order = sorted(files, key=lambda entry: hashlib.sha256(os.fsencode(entry.name)).digest())
        drawn = set(order[: max(1, len(files) // 5)])
        train[name] = [entry for entry in files if entry not in drawn]
        test[name] = [entry for entry in files if entry in drawn]
    return train, test


def _is_image(entry: os.DirEntry[str]) -> bool:
    return not entry.name.startswith(".") and entry.name.lower().endswith(ENDINGS) and entry.is_file()


def _flat(listed: Listed, classes: Sequence[str]) -> tuple[tuple[str, ...], NDArray[np.int64]]:
    files = tuple(entry.path for name in classes for entry in listed[name])
    return files, np.repeat(np.arange(len(classes)), [len(listed[name]) for name in classes])


def _check(root: Path, files: tuple[str, ...], checked: Path) -> None:
    """Decodes every file, unless the folder `checked` records that this list has passed."""
    digest = hashlib.sha256()
    for file in files:
        status = os.stat(file)
        digest.update(os.fsencode(f"{os.path.abspath(file)}\0{status.st_size}\0{status.st_mtime_ns}\n"))
    passed = checked / digest.hexdigest()
    if passed.exists():
        return
    bad = unreadable(files)
    if bad:
        more = [f"... and {len(bad) - _NAMED} more"] if len(bad) > _NAMED else []
        raise EnvironmentUnusable(
            f"--data {root}: {len(bad)} of {len(files)} images cannot be read; replace or remove them:\n  "
            + "\n  ".join(bad[:_NAMED] + more)
        )
    try:
        checked.mkdir(parents=True, exist_ok=True)
        passed.touch()
    except OSError as error:
        raise EnvironmentUnusable(f"cannot write the cache {checked} ({error}); set XDG_CACHE_HOME") from error
