"""How the processes of a fleet live and die together, on Linux, the only system that the engine supports."""

from __future__ import annotations

import ctypes
import os
import signal
import sys

PR_SET_PDEATHSIG = 1  # linux/prctl.h
DRAINING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)


def die_with(parent: int) -> None:
    """Makes the kernel kill this process when the thread of `parent` that started it ends, for any reason."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        sys.exit(f"the process {parent}, which started this one, is gone")


def leave_signals_to_the_driver() -> None:
    """Ignores the signals that schedulers and terminals send to every process of a job: the driver acts on them."""
    for number in DRAINING:
        signal.signal(number, signal.SIG_IGN)
