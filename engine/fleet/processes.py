"""How the processes of a fleet depend on each other. Linux only, as this engine is."""

from __future__ import annotations

import ctypes
import os
import signal
import sys

PR_SET_PDEATHSIG = 1  # linux/prctl.h
DRAINING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)


def die_with(parent: int) -> None:
    """Has the kernel kill this process when the thread of `parent` that started it ends, however it ends."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        sys.exit(f"the process {parent}, which started this one, is gone")


def leave_signals_to_the_driver() -> None:
    """A scheduler or a terminal signals every process of a job; what to do about it is decided in one place."""
    for number in DRAINING:
        signal.signal(number, signal.SIG_IGN)
