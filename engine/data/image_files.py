"""Image files: which can be read, which DALI needs as PNG, which are equal; checked once, and recorded."""

from __future__ import annotations

import hashlib
import io
import json
import os
from collections import defaultdict
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from engine.trial import EnvironmentUnusable

ENDINGS = (".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".webp", ".bmp", ".tif", ".tiff", ".gif", ".avif")
KINDS = "JPEG, PNG, WebP, BMP, TIFF, GIF or AVIF"
_FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "TIFF", "GIF", "AVIF")  # Pillow's names; it tells them by content
_DEEP = {"I", "F"}  # modes whose pixels only their owner can scale to 8 bits
# Pillow reports broken files by any of these, SyntaxError among them (a PNG's bad chunk).
_BROKEN = (OSError, SyntaxError, ValueError, Image.DecompressionBombError)
_VERSION = b"1"  # of what is recorded and converted


@dataclass
class Checked:
    """What a check found, by position in the list of files.

    `broken` gives the reason for each file that cannot be read, `converted` the PNG file that is to be decoded in place
    of a file, `copies` the groups of files with the same content.
    """

    broken: dict[int, str] = field(default_factory=dict)
    converted: dict[int, str] = field(default_factory=dict)
    copies: list[list[int]] = field(default_factory=list)


def check(files: Sequence[str], cache: Path) -> Checked:
    """Decodes each of `files`, and writes those that DALI cannot read to `cache` as PNG, upright and in RGB.

    The result is recorded under a digest of path, size and modification time of every file. A later call with the same
    files looks again only at those that could not be read, in case that was a matter of the disk or of permissions.
    Raises EnvironmentUnusable if the cache cannot be written.
    """
    marks = [_mark(file) for file in files]
    record = cache / "checked" / f"{hashlib.sha256(b''.join([_VERSION, *marks])).hexdigest()}.json"
    try:
        known = _read(record)
        if known is None:
            checked, again = Checked(copies=_copies(files)), list(range(len(files)))
        else:
            gone = [i for i, png in known.converted.items() if not os.path.exists(png)]
            checked, again = known, sorted({*known.broken, *gone})
        before = asdict(checked)
        _look(checked, files, again, [cache / "converted" / f"{marks[i].hex()}.png" for i in again])
        if known is None or asdict(checked) != before:
            _write(record, json.dumps(asdict(checked)).encode())
    except OSError as error:
        raise EnvironmentUnusable(f"cannot write the cache {cache} ({error}); set XDG_CACHE_HOME") from error
    return checked


def read_rgb(file: str) -> Image.Image | str:
    """The first image of a file in 8-bit RGB, upright, or the reason why it cannot be read."""
    found = _decoded(file)
    try:
        return found if isinstance(found, str) else _rgb(found)
    except _BROKEN as error:
        return str(error)


def unreadable(files: Iterable[str]) -> list[str]:
    """'path: reason' for each of `files` that does not decode, in order."""
    with _pool() as pool:
        found = pool.map(_decoded, files := list(files))
        return [f"{shown(file)}: {found}" for file, found in zip(files, found, strict=True) if isinstance(found, str)]


def shown(path: str) -> str:
    """A path as text for people: what cannot be printed (a line break, a byte that is not UTF-8) is escaped."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in path)


def _pool() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(len(os.sched_getaffinity(0)))  # Pillow and hashlib release the GIL at their work


def _mark(file: str) -> bytes:
    """16 bytes that change with path, size and modification time of a file; a missing one has a mark too."""
    try:
        status = os.stat(file)
        seen = f"{status.st_size}\0{status.st_mtime_ns}"
    except OSError:
        seen = ""
    return hashlib.sha256(os.fsencode(f"{os.path.abspath(file)}\0{seen}")).digest()[:16]


def _look(checked: Checked, files: Sequence[str], which: Sequence[int], pngs: Sequence[Path]) -> None:
    """Decodes the files at the positions `which`, and corrects `checked` by what is found."""
    with _pool() as pool:
        found = pool.map(_prepare, [files[i] for i in which], pngs)
        for i, png, (reason, written) in zip(which, pngs, found, strict=True):
            checked.broken.pop(i, None)
            checked.converted.pop(i, None)
            if reason:
                checked.broken[i] = reason
            elif written:
                checked.converted[i] = str(png)


def _prepare(file: str, png: Path) -> tuple[str, bool]:
    """Why a file cannot be read ("" if it can), and whether `png` was written to be read in its place."""
    found = _decoded(file)
    if isinstance(found, str):
        return found, False
    if is_utf8(file) and _dali_reads_alike(found, file):
        return "", False
    try:
        content = _png(_rgb(found))
    except _BROKEN as error:
        return str(error), False
    _write(png, content)
    return "", True


def _decoded(file: str) -> Image.Image | str:
    """The first image of a file, or the reason why it cannot be read."""
    try:
        if os.path.getsize(file) == 0:
            return "empty"
        with Image.open(file, formats=_FORMATS) as image:
            image.load()
            if image.mode in _DEEP:
                return "32-bit pixels; convert it to 8 bits"
            return image
    except FileNotFoundError:
        return "dangling link" if os.path.islink(file) else "does not exist"
    except UnidentifiedImageError:
        return "not an image, despite its name"
    except _BROKEN as error:
        return str(error)


def _dali_reads_alike(image: Image.Image, file: str) -> bool:
    """Whether DALI decodes a file to Pillow's pixels, whatever the device (tests/test_image_files.py).

    It has no decoder for GIF and AVIF, reads some TIFF files otherwise or not at all, and converts CMYK by other rules
    on a GPU.
    """
    if image.format == "WEBP":
        with open(file, "rb") as opened:  # DALI fails on some files with metadata or animation, as its manual says
            return opened.read(16)[12:] != b"VP8X"
    if image.format == "PNG":
        return _is_sound_png(file)
    return image.format in ("JPEG", "MPO", "BMP") and image.mode != "CMYK"  # an MPO is a JPEG with more after it


def _is_sound_png(file: str) -> bool:
    """Whether a PNG has its end and the right checksums. If not, Pillow may still have all pixels, but DALI fails."""
    try:
        with open(file, "rb") as opened:
            opened.seek(-8, os.SEEK_END)
            ended = opened.read() == b"IEND\xaeB`\x82"
        with Image.open(file) as image:
            image.verify()
    except _BROKEN:
        return False
    return ended


def is_utf8(path: str) -> bool:
    """Whether DALI's reader can be given a path: names from old archives may be in another encoding."""
    try:
        path.encode()
    except UnicodeEncodeError:
        return False
    return True


def _rgb(image: Image.Image) -> Image.Image:
    """8-bit RGB, turned upright as its camera says. Pillow itself would cut 16-bit pixels off at 255."""
    turned = ImageOps.exif_transpose(image)
    if turned.mode.startswith("I;16"):
        turned = Image.fromarray((np.asarray(turned) >> 8).astype(np.uint8))
    return turned.convert("RGB")


def _copies(files: Sequence[str]) -> list[list[int]]:
    """Positions of files with the same content. Only files of the same size are read."""
    sizes, contents = defaultdict(list), defaultdict(list)
    for i, file in enumerate(files):
        if size := os.path.getsize(file) if os.path.exists(file) else 0:
            sizes[size].append(i)
    alike = [i for group in sizes.values() if len(group) > 1 for i in group]
    with _pool() as pool:
        for i, digest in zip(alike, pool.map(_content, [files[i] for i in alike]), strict=True):
            contents[digest].append(i)
    return sorted(group for digest, group in contents.items() if digest and len(group) > 1)


def _content(file: str) -> bytes:
    """A digest of a file's bytes; none for a file that cannot be read."""
    try:
        with open(file, "rb") as opened:
            return hashlib.file_digest(opened, "sha256").digest()
    except OSError:
        return b""


def _read(record: Path) -> Checked | None:
    if not record.exists():
        return None
    stored = json.loads(record.read_bytes())
    broken, converted = ({int(i): text for i, text in stored[name].items()} for name in ("broken", "converted"))
    return Checked(broken, converted, stored["copies"])


def _png(image: Image.Image) -> bytes:
    image.save(content := io.BytesIO(), "PNG", compress_level=1)
    return content.getvalue()


def _write(path: Path, content: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")  # not of tempfile, whose files other users cannot read
    temporary.write_bytes(content)
    temporary.replace(path)
