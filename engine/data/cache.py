"""Folders in the cache that are made once: generated, downloaded or unpacked."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

from engine.trial import EnvironmentUnusable


def make_folder(folder: Path) -> None:
    """Makes the cache's folder if it is missing; EnvironmentUnusable if it cannot be made."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise EnvironmentUnusable(f"cannot create the cache {folder} ({error}); set XDG_CACHE_HOME") from error


def make_once(folder: Path, fill: Callable[[Path], None]) -> None:
    """Has `fill` write the content of a folder of the cache, if the folder is missing.

    A temporary folder is filled and then moved: if two processes make it at once, one wins and both read whole files.
    """
    if folder.exists():
        return
    make_folder(folder.parent)
    temporary = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".{folder.name}-"))
    try:
        fill(temporary)
        temporary.chmod(0o755)  # other users may share the cache
        os.rename(temporary, folder)
    except OSError as error:
        if not folder.exists():  # else another process was first
            raise EnvironmentUnusable(
                f"cannot write the cache {folder} ({error}); free space, or set XDG_CACHE_HOME"
            ) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
