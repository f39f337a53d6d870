"""Runs a Parsl worker pool, and kills all of it when it loses a process or when its driver no longer wants workers.

The workers of a pool share a queue. One that is killed while waiting on it keeps the queue's lock forever, and the
others starve. So a pool that has lost a process ends; Parsl reports its tasks as lost and starts another. The driver's
stop files (engine/stop_files.py) end a pool under any scheduler.
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

POLL_S = 0.5


def main(arguments: list[str]) -> int:
    """`python -m engine.fleet.pool STOP_FILES COMMAND...`: returns the exit code of COMMAND, or 1 if it was killed."""
    folder, command = Path(arguments[0]), arguments[1:]
    leave_signals_to_the_driver()
    me = os.getpid()
    pool = subprocess.Popen(command, preexec_fn=lambda: die_with(me))
    before: set[int] = set()
    while pool.poll() is None:
        now = members(pool.pid)
        if before - now or not stop_files.workers_wanted(folder):
            kill([pool.pid, *now])
            pool.wait()
            return 1
        before = now
        time.sleep(POLL_S)
    return pool.returncode


def members(pool: int) -> set[int]:
    """The processes that a pool has started and that must stay alive."""
    found = set()
    for thread in Path(f"/proc/{pool}/task").glob("*/children"):
        with contextlib.suppress(OSError):
            found |= {int(word) for word in thread.read_text().split()}
    return {process for process in found if _is_member(process)}


def _is_member(process: int) -> bool:
    """Whether a child is one of multiprocessing's: not a short-lived command, nor a fork that has yet to exec."""
    try:
        return b"multiprocessing" in Path(f"/proc/{process}/cmdline").read_bytes()
    except OSError:
        return False


def kill(processes: list[int]) -> None:
    """Kills processes in the given order. The pool comes first, since it would restart its workers."""
    for process in processes:
        with contextlib.suppress(ProcessLookupError):
            os.kill(process, signal.SIGKILL)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
