"""What a driver tells its workers, wherever they run: two files in the run folder, there as long as it wants.

Files on the shared file system reach a worker behind any scheduler and ask for no port. An order is given by removing
a file, which succeeds on a full disk too.
"""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path

WORK, LIVE = "work", "live"  # start and go on; exist at all


def give(logs: Path) -> Path:
    """The folder of a new driver's orders."""
    folder = Path(tempfile.mkdtemp(prefix="orders-", dir=logs))
    for name in (WORK, LIVE):
        (folder / name).touch()
    return folder


def withdraw(logs: Path) -> None:
    """Closes what earlier drivers of a run folder, which are gone, have left; workers of theirs may still be there."""
    for old in logs.glob("orders-*"):
        close(old)


def drain(folder: Path) -> None:
    """Nothing more is started; what keeps its state stops where that is whole."""
    (folder / WORK).unlink(missing_ok=True)


def close(folder: Path) -> None:
    """Everything ends at once."""
    shutil.rmtree(folder, ignore_errors=True)


def working(folder: Path) -> bool:
    return _stands(folder / WORK)


def living(folder: Path) -> bool:
    return _stands(folder / LIVE)


def _stands(order: Path) -> bool:
    """A file system that does not answer properly is no order to stop."""
    try:
        return order.exists()
    except OSError:
        return True
