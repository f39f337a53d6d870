"""An image folder: what is a class and what a split is decided by its structure; what is passed over is named."""

from __future__ import annotations

import hashlib
import os
import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

import numpy as np
from numpy.typing import NDArray

from engine.data.image_files import KINDS, check, is_utf8, shown
from engine.data.image_tree import PassedOver, Tree, scan, within
from engine.trial import EnvironmentUnusable

# The folders of a split, in any case.
_NAMES = {"train": ("train", "training"), "valid": ("val", "valid", "validation"), "test": ("test", "testing")}
_SPLITS = {name: split for split, names in _NAMES.items() for name in names}
_FEW = 10  # unreadable files are passed over up to one in this many
_SHOWN, _NAMED = 40, 200  # names in the line of what was passed over, and in an error
_LAYOUT = (
    "arrange the images as train/<class>/*.jpg and test/<class>/*.jpg (val/ serves as test/, or beside it as the "
    f"validation part), or as <class>/*.jpg alone; an image is a {KINDS} file"
)


@dataclass(frozen=True)
class LabelledFiles:
    """Image files, and the number of the class of each (N,)."""

    files: tuple[str, ...]
    labels: NDArray[np.int64]


@dataclass(frozen=True)
class Folder:
    """Classes in sorted order, and the files of each split; `valid` is None if the folder has no validation part.

    `converted` names the PNG file to decode in place of a file. `copies` are groups of files with the same content.
    `notes` tell how the folder was read and what was passed over.
    """

    classes: tuple[str, ...]
    train: LabelledFiles
    valid: LabelledFiles | None
    test: LabelledFiles
    converted: Mapping[str, str]
    copies: tuple[tuple[str, ...], ...]
    notes: tuple[str, ...]


# The image files of each class.
_Classes = dict[str, list[str]]


def read_folder(root: Path, cache: Path) -> Folder:
    """Lists the images of `root`, and decodes each file once; see docs/data.md for what makes a class and a split.

    What is no image is passed over and named in the notes; so are files that cannot be read, up to one in ten images.
    The check of the files is recorded in `cache`. Raises EnvironmentUnusable, which says what to do, if it is unclear
    what the classes are, if a class has no image or is not in every split, or if too many files cannot be read.
    """
    passed: PassedOver = []
    notes: list[str] = []
    folders = _splits(_nested(scan(root, passed), root, notes), root, passed)
    notes += filter(None, [_roles(folders)])
    parts = {split: _classes(folder, root, passed) for split, folder in folders.items()}
    _check_alike(parts, root)
    files = [file for part in parts.values() for images in part.values() for file in images]
    checked = check(files, cache)
    unread = {files[i]: reason for i, reason in checked.broken.items()}
    _pass_over(unread, len(files), root, passed)
    parts = {split: _readable(part, unread, root) for split, part in parts.items()}
    if "test" not in parts:
        parts["train"], parts["test"] = _divided(parts["train"], folders["train"].path)
    classes = tuple(sorted(parts["train"]))
    splits = {split: _flat(part, classes) for split, part in parts.items()}
    return Folder(
        classes,
        splits["train"],
        splits.get("valid"),
        splits["test"],
        converted={files[i]: png for i, png in checked.converted.items()},
        copies=tuple(tuple(files[i] for i in group if files[i] not in unread) for group in checked.copies),
        notes=(*notes, *_passed_note(passed, root)),
    )


def _nested(tree: Tree, root: Path, notes: list[str]) -> Tree:
    """The folder with the classes or splits: `tree`, or the only folder in it (photos/photos/<class>)."""
    filled = {name: folder for name, folder in tree.folders.items() if folder.has_images()}
    splits = {_SPLITS.get(name.lower()) for name in tree.folders}
    if len(filled) != 1 or tree.files or splits & {"valid", "test"}:
        return tree
    ((_, inner),) = filled.items()
    if not inner.has_classes():
        return tree
    notes[:] = [f"read from {within(root, inner.path + '/')}"]
    return _nested(inner, root, notes)


def _splits(tree: Tree, root: Path, passed: PassedOver) -> dict[str, Tree]:
    """The folder of each split; that of train alone if its classes are to be divided.

    A split has folders of classes inside, a class has images: a folder called train that has images is a class.
    """
    named = {name: folder for name, folder in tree.folders.items() if name.lower() in _SPLITS}
    splits = [name for name, folder in named.items() if folder.has_classes()]
    others = {name: f for name, f in tree.folders.items() if name not in named and f.has_images()}
    if not splits:
        if others or not any(folder.has_images() for folder in named.values()):
            return {"train": tree}
        _refuse(root, f"{_listed(named)} hold images and no class folders; {_LAYOUT}")
    if empty := [name for name in named if name not in splits]:
        _refuse(root, f"{_listed(splits)} has class folders, but no class folder with images is in {_listed(empty)}; "
                f"{_LAYOUT}")
    found: dict[str, Tree] = {}
    for name in splits:
        first = found.setdefault(_SPLITS[name.lower()], named[name])
        if first is not named[name]:
            _refuse(root, f"{os.path.basename(first.path)}/ and {name}/ are the same split; merge them or remove one")
    if "train" not in found:
        _refuse(root, f"it has no folder train/; {_LAYOUT}")
    if len(found) == 1 and others:
        _refuse(
            root,
            f"{_listed(splits)} has folders inside, as the training split has, but {_listed(others)} is beside it and "
            f"no folder test/ or val/. If {_listed(splits)} is a class, move its images out of the folders inside; if "
            "not, move the others away",
        )
    for folder in others.values():
        passed.append((f"{folder.path}/", f"{sum(1 for _ in folder.images())} images, in no split"))
    passed += [(file, "not in a class folder") for file in tree.files]
    return found


def _refuse(root: Path, why: str) -> NoReturn:
    raise EnvironmentUnusable(f"--data {root}: {why}")


def _listed(names: Iterable[str]) -> str:
    return " and ".join(f"{shown(name)}/" for name in names)


def _roles(folders: dict[str, Tree]) -> str:
    """What the folders serve as, in words; without test, valid becomes it."""
    if "valid" not in folders:
        return "" if "test" in folders else "a fifth of each class is the test part"
    name = os.path.basename(folders["valid"].path)
    if "test" in folders:
        return f"{name}/ is the validation part, so --valid-fraction has no effect"
    folders["test"] = folders.pop("valid")
    return f"{name}/ is the test part"


def _classes(split: Tree, root: Path, passed: PassedOver) -> _Classes:
    """The image files of each class folder, at any depth; an empty class is an error."""
    classes: _Classes = {}
    alike: dict[str, str] = {}
    for name, folder in split.folders.items():
        if not is_utf8(name):
            _refuse(root, f"the name of the class folder {shown(folder.path)} is not UTF-8; rename it")
        # macOS stores the same name in another form than other systems do.
        canonical = unicodedata.normalize("NFC", name)
        first = alike.setdefault(canonical.casefold(), name)
        if first != name:
            _refuse(root, f"the class folders {first} and {name} in {split.path} differ only in case or in the form of "
                    "Unicode; merge them or rename one")
        classes[canonical] = list(folder.images())
    passed += [(file, "not in a class folder") for file in split.files]
    if not classes:
        raise EnvironmentUnusable(f"--data: {split.path} has no class folder; {_LAYOUT}")
    if empty := [folder for folder in split.folders.values() if not folder.has_images()]:
        names = ", ".join(os.path.basename(folder.path) for folder in empty)
        inside = [entry for entry in passed if entry[0].startswith(tuple(f"{folder.path}/" for folder in empty))]
        there = f" ({_passed_note(inside, root)[0]})" if inside else ""
        raise EnvironmentUnusable(
            f"--data: {split.path} has no image in {names}{there}; remove the empty folders, or {_LAYOUT}"
        )
    return classes


def _check_alike(parts: Mapping[str, _Classes], root: Path) -> None:
    """Every split must have the same classes."""
    train = parts["train"].keys()
    for split, part in parts.items():
        if part.keys() != train:
            only = [f"{name} only in train" for name in sorted(train - part.keys())]
            only += [f"{name} only in {split}" for name in sorted(part.keys() - train)]
            _refuse(root, f"the class folders of train and {split} differ: {', '.join(only)}; add or rename them")


def _pass_over(unread: Mapping[str, str], total: int, root: Path, passed: PassedOver) -> None:
    """Puts files that cannot be read first among those passed over; EnvironmentUnusable if they are many."""
    if len(unread) * _FEW > total:
        bad = [f"{shown(file)}: {reason}" for file, reason in unread.items()]
        more = [f"... and {len(bad) - _NAMED} more"] if len(bad) > _NAMED else []
        raise EnvironmentUnusable(
            f"--data {root}: {len(bad)} of {total} images cannot be read, too many to pass over; replace or remove "
            "them:\n  " + "\n  ".join(bad[:_NAMED] + more)
        )
    passed[:0] = unread.items()


def _readable(part: _Classes, unread: Mapping[str, str], root: Path) -> _Classes:
    """A split without the files that cannot be read."""
    left = {name: [file for file in files if file not in unread] for name, files in part.items()}
    for name, files in left.items():
        if not files:
            bad = [f"{shown(file)}: {unread[file]}" for file in part[name]]
            _refuse(root, f"no image of the class {name} can be read; replace them:\n  " + "\n  ".join(bad[:_NAMED]))
    return left


def _divided(classes: _Classes, split: str) -> tuple[_Classes, _Classes]:
    """Training and test files. A fifth of each class, at least one file, is for testing, chosen by a digest of the
    path within the class folder: the same in every run, wherever `split` is stored, and nearly the same after images
    were added."""
    few = [f"{name} ({len(files)})" for name, files in classes.items() if len(files) < 3]
    if few:
        raise EnvironmentUnusable(
            f"every class needs at least 3 images, one each to train, to validate and to test; too few in: "
            f"{', '.join(few)}. Add images to these classes or leave them out"
        )

    def digest(file: str) -> bytes:
        return hashlib.sha256(os.fsencode(file[len(split) :].lstrip("/").partition("/")[2])).digest()

    train, test = {}, {}
    for name, files in classes.items():
        drawn = set(sorted(files, key=digest)[: max(1, len(files) // 5)])
        train[name] = [file for file in files if file not in drawn]
        test[name] = [file for file in files if file in drawn]
    return train, test


def _flat(part: _Classes, classes: Sequence[str]) -> LabelledFiles:
    files = tuple(file for name in classes for file in part[name])
    return LabelledFiles(files, np.repeat(np.arange(len(classes)), [len(part[name]) for name in classes]))


def _passed_note(passed: PassedOver, root: Path) -> list[str]:
    """The line that names what was passed over; what may have been meant as an image comes first."""
    ordered = sorted(passed, key=lambda entry: entry[1] in ("hidden", "not an image"))
    named = [f"{within(root, path)} ({reason})" for path, reason in ordered[:_SHOWN]]
    more = [f"and {len(passed) - _SHOWN:,} more"] if len(passed) > _SHOWN else []
    return [f"passed over {len(passed):,}: {', '.join(named + more)}"] if passed else []
