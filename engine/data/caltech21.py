"""`--data caltech21`: small photos of 21 classes of Caltech-101 that come with the project, unpacked into the cache."""

from __future__ import annotations

import os
import shutil
import tempfile
import zipfile
from pathlib import Path

from engine.trial import EnvironmentUnusable

# ATTRIBUTION.txt (CC BY 4.0), and in photos/ 28 photos a class in train/ and 20 in test/.
ARCHIVE = Path(__file__).with_name("caltech21.zip")
RESOLUTION = 96  # of the shorter side of a photo, in pixels


def unpacked(cache: Path) -> Path:
    """The image folder, unpacked on the first call."""
    folder = cache / f"caltech21-{ARCHIVE.stat().st_size}"  # another archive gets another folder
    if folder.is_dir():
        return folder / "photos"
    try:
        cache.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(dir=cache))
        try:
            with zipfile.ZipFile(ARCHIVE) as archive:
                archive.extractall(temporary / "unpacked")
            os.rename(temporary / "unpacked", folder)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
    except OSError as error:
        if not folder.is_dir():  # another process may have been faster
            raise EnvironmentUnusable(f"cannot write the cache {cache} ({error}); set XDG_CACHE_HOME") from error
    return folder / "photos"
