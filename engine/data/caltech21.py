"""`--data caltech21`: small photos of 21 classes of Caltech-101 that come with the project, unpacked into the cache."""

from __future__ import annotations

import zipfile
from pathlib import Path

from engine.data.cache import make_once

# ATTRIBUTION.txt (CC BY 4.0), and in photos/ 28 photos a class in train/ and 20 in test/.
ARCHIVE = Path(__file__).with_name("caltech21.zip")
RESOLUTION = 96  # of the shorter side of a photo, in pixels


def unpacked(cache: Path) -> Path:
    """The image folder, unpacked on the first call."""

    def unpack(into: Path) -> None:
        with zipfile.ZipFile(ARCHIVE) as archive:
            archive.extractall(into)

    folder = cache / f"caltech21-{ARCHIVE.stat().st_size}"  # another archive gets another folder
    make_once(folder, unpack)
    return folder / "photos"
