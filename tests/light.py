"""Tasks that need no torch, for the workers of tests of the fleet."""

from __future__ import annotations

import ctypes
import importlib.util
import os
import time
from pathlib import Path
from typing import Any

from engine.trial import UsageError

Task = dict[str, Any]


def report(task: Task) -> Task:
    """Who runs this task, after `seconds`."""
    time.sleep(task.get("seconds", 0))
    names = ("CUDA_VISIBLE_DEVICES", "OMP_NUM_THREADS", "MFKD_WORKER", "SLURMD_NODENAME",
             "CUDA_DEVICE_MAX_CONNECTIONS")  # fmt: skip
    return {"pid": os.getpid(), "supervisor": os.getppid(), **{name: os.environ.get(name) for name in names}}


def importable(task: Task) -> dict[str, str | None]:
    """Where Python would import each of `task["names"]` from; None for a name that it cannot find."""
    found = {name: importlib.util.find_spec(name) for name in task["names"]}
    return {name: spec.origin if spec else None for name, spec in found.items()}


def once(task: Task) -> Task:
    """Runs `task["first"]` the first time and `report` afterwards; a file records that the first time is over."""
    mark = Path(task["mark"])
    if mark.exists():
        return report(task)
    mark.touch()
    return globals()[task["first"]](task)  # type: ignore[no-any-return]


def meet(task: Task) -> Task:
    """`report`, once `task["count"]` workers run this at the same time, or after two minutes."""
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
