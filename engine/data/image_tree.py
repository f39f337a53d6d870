"""The image files below a folder, and what else is there."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from engine.data.image_files import ENDINGS, is_utf8, shown
from engine.trial import EnvironmentUnusable

_SYSTEM_FOLDERS = {"__MACOSX", "@eaDir"}  # of archives made on macOS, and a NAS's thumbnails
_PHOTOS = {".heic", ".heif", ".jxl", ".jp2", ".psd", ".svg", ".dng", ".cr2", ".cr3", ".nef", ".arw"}

PassedOver = list[tuple[str, str]]  # path (with "/" at the end if it is a folder), reason


@dataclass
class Tree:
    """A folder with the image files directly inside, sorted, and its folders by name."""

    path: str
    files: list[str] = field(default_factory=list)
    folders: dict[str, Tree] = field(default_factory=dict)

    def images(self) -> Iterator[str]:
        """The image files at any depth."""
        yield from self.files
        for folder in self.folders.values():
            yield from folder.images()

    def has_images(self) -> bool:
        return next(self.images(), None) is not None

    def has_classes(self) -> bool:
        """Whether it has folders with images inside, as a split has and a class has not."""
        return any(folder.has_images() for folder in self.folders.values())


def scan(root: Path, passed: PassedOver) -> Tree:
    """The tree of image files below `root`, through links; whatever else is there goes to `passed`."""
    if not is_utf8(str(root)):
        raise EnvironmentUnusable(f"--data {shown(str(root))}: the name of the folder is not UTF-8; rename it")

    def below(tree: Tree, above: frozenset[tuple[int, int]]) -> Tree:
        status = os.stat(tree.path)
        above |= {(status.st_dev, status.st_ino)}
        for entry in sorted(os.scandir(tree.path), key=lambda entry: entry.name):
            reason = _why_passed(entry, above)
            if reason:
                passed.append((entry.path + "/" * entry.is_dir(), reason))
            elif entry.is_dir():
                tree.folders[entry.name] = below(Tree(entry.path), above)
            else:
                tree.files.append(entry.path)
        return tree

    try:
        return below(Tree(str(root)), frozenset())
    except OSError as error:
        raise EnvironmentUnusable(
            f"--data {root}: cannot list {shown(str(error.filename))}: {error.strerror}"
        ) from error


def _why_passed(entry: os.DirEntry[str], above: frozenset[tuple[int, int]]) -> str:
    """Why an entry of a folder is passed over; "" for an image file or a folder."""
    name, ending = entry.name, os.path.splitext(entry.name)[1].lower()
    if name.startswith("."):
        return "hidden"
    if entry.is_dir():
        if name in _SYSTEM_FOLDERS:
            return "not a class"
        status = entry.stat()
        return "a link to a folder above it" if (status.st_dev, status.st_ino) in above else ""
    if ending in ENDINGS:
        return "" if entry.is_file() or not os.path.exists(entry.path) else "not a regular file"
    if ending in _PHOTOS:
        return "not read; convert it to JPEG"
    if entry.is_symlink() and not os.path.exists(entry.path):
        return "dangling link"
    return "not an image"


def within(root: Path, path: str) -> str:
    """A path below `root`, relative to it, as text for people; one of a folder ends in "/" if `path` does."""
    return shown(os.path.relpath(path, root)) + "/" * path.endswith("/")
