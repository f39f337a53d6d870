"""How a driver tells its workers to stop: two files in the run folder that exist for as long as work is wanted.

Files on the shared file system reach workers behind any scheduler and need no open port. Stopping means removing a
file, which succeeds on a full disk too.
"""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path

WORK, LIVE = "work", "live"  # workers may start trials; workers may exist


def create(logs: Path) -> Path:
    """Creates the stop files of a new driver in a folder of their own under `logs`; returns that folder."""
    folder = Path(tempfile.mkdtemp(prefix="stop-files-", dir=logs))
    for name in (WORK, LIVE):
        (folder / name).touch()
    return folder


def remove_stale(logs: Path) -> None:
    """Removes the stop files of earlier drivers of a run, so that any of their workers still alive will exit."""
    for old in logs.glob("stop-files-*"):
        close(old)


def drain(folder: Path) -> None:
    """Workers start nothing more; a training that saves its state stops at its next checkpoint."""
    (folder / WORK).unlink(missing_ok=True)


def close(folder: Path) -> None:
    """Workers exit at once."""
    shutil.rmtree(folder, ignore_errors=True)


def work_wanted(folder: Path) -> bool:
    """Whether workers may start a trial or continue one past its next checkpoint."""
    return _exists(folder / WORK)


def workers_wanted(folder: Path) -> bool:
    """Whether workers should exist at all."""
    return _exists(folder / LIVE)


def _exists(path: Path) -> bool:
    """On I/O errors, keep working: a file system that fails to answer has not asked anybody to stop."""
    try:
        return path.exists()
    except OSError:
        return True
