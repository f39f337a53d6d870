"""Runs a pool of Parsl's and ends it whole when a part of it is lost.

The workers of a pool share a queue: one that is killed while it waits there keeps the queue's lock for ever, and the
others starve. So a pool that has lost one of its processes ends; Parsl reports its tasks as lost and starts another.
A pool also ends with its driver's orders, whatever scheduler it runs under.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

from engine import stop_files
from engine.fleet.processes import die_with, leave_signals_to_the_driver

LOOK_S = 0.5


def main(arguments: list[str]) -> int:
    """`python -m engine.fleet.pool ORDERS COMMAND...`: the exit code of the pool, 1 if it was ended."""
    folder, command = Path(arguments[0]), arguments[1:]
    leave_signals_to_the_driver()
    me = os.getpid()
    pool = subprocess.Popen(command, preexec_fn=lambda: die_with(me))
    before: set[int] = set()
    while pool.poll() is None:
        now = members(pool.pid)
        if before - now or not stop_files.workers_wanted(folder):
            end([pool.pid, *now])
            pool.wait()
            return 1
        before = now
        time.sleep(LOOK_S)
    return pool.returncode


def members(pool: int) -> set[int]:
    """The processes that a pool has started to work for it."""
    found = set()
    for thread in Path(f"/proc/{pool}/task").glob("*/children"):
        with contextlib.suppress(OSError):
            found |= {int(word) for word in thread.read_text().split()}
    return {process for process in found if _is_member(process)}


def _is_member(process: int) -> bool:
    """Not one that has been started a moment ago and is still its parent's image, nor a command of a moment."""
    try:
        return b"multiprocessing" in Path(f"/proc/{process}/cmdline").read_bytes()
    except OSError:
        return False


def end(processes: list[int]) -> None:
    """Kills them, the pool first: it would start its workers again."""
    for process in processes:
        with contextlib.suppress(ProcessLookupError):
            os.kill(process, signal.SIGKILL)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
