"""Tasks for a worker process that need no torch: what tests of the fleet have their workers do."""

from __future__ import annotations

import ctypes
import os
import time
from pathlib import Path
from typing import Any

from engine.trial import UsageError

Task = dict[str, Any]


def report(task: Task) -> Task:
    """Who does this, after `seconds`."""
    time.sleep(task.get("seconds", 0))
    names = ("CUDA_VISIBLE_DEVICES", "OMP_NUM_THREADS", "MFKD_WORKER", "SLURMD_NODENAME",
             "CUDA_DEVICE_MAX_CONNECTIONS")  # fmt: skip
    return {"pid": os.getpid(), "supervisor": os.getppid(), **{name: os.environ.get(name) for name in names}}


def once(task: Task) -> Task:
    """Does `task["first"]` the first time, `report` afterwards; a file says which time it is."""
    mark = Path(task["mark"])
    if mark.exists():
        return report(task)
    mark.touch()
    return globals()[task["first"]](task)  # type: ignore[no-any-return]


def meet(task: Task) -> Task:
    """`report` when `task["count"]` workers are at it at the same time, or after two minutes."""
    here = Path(task["folder"])
    (here / f"{os.environ['MFKD_WORKER']}-{os.getpid()}".replace("/", "-")).touch()
    deadline = time.monotonic() + 120
    while len(list(here.iterdir())) < task["count"] and time.monotonic() < deadline:
        time.sleep(0.1)
    return report(task)


def leave(task: Task) -> None:
    print("these are my last words", flush=True)
    os._exit(70)


def crash(task: Task) -> None:
    ctypes.string_at(0)


def hang(task: Task) -> None:
    time.sleep(1000)


def refuse(task: Task) -> None:
    raise UsageError("this cannot be done")


def fail(task: Task) -> None:
    raise ZeroDivisionError("a mistake of ours")
