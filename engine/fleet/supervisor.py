"""Supervises one worker process: starts it, sends it tasks, and reports what happened when it dies or hangs.

This module never imports torch. A worker may be killed, crash in C, run out of memory or lose its CUDA context; none
of that affects the process that has to report it, whether that is one of Parsl's or the driver.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import socket
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from engine import stop_files
from engine.fleet.devices import visible_devices
from engine.fleet.processes import die_with
from engine.trial import Drained, EngineError, EnvironmentUnusable, NoWinner, UsageError

Payload = dict[str, Any]  # a task as JSON, see engine/tasks.py
Outcome = dict[str, Any]
ROOT = Path(__file__).resolve().parents[2]  # what must be importable: the folder that holds `engine`
START_LIMIT_S = 600.0  # imports from a slow file system take minutes; anything longer is a hang
DUMP_S = 5.0  # time for a hanging worker to write its stacks to its log
TAIL_BYTES = 2000


class WorkerDied(EnvironmentUnusable):
    """The worker process of a task died."""


class TimedOut(EnvironmentUnusable):
    """A task exceeded its time limit and was killed."""


class TaskFailed(Exception):
    """A task raised an error that a user cannot act on; the text is its traceback."""


ERRORS: dict[str, type[Exception]] = {
    kind.__name__: kind
    for kind in (EngineError, UsageError, EnvironmentUnusable, NoWinner, Drained, WorkerDied, TimedOut, TaskFailed)
}


def result_of(outcome: Outcome) -> Any:
    """The result of a task; raises its error if it failed."""
    if "error" in outcome:
        raise ERRORS[outcome["error"]](outcome["text"])
    return outcome["result"]


@dataclass(frozen=True)
class WorkerSpec:
    """What every worker of a fleet needs to know: its log and stop-file folders, and how workers share devices.

    Workers are assigned `devices` in order, `workers_per_device` consecutive workers to each; by default, all devices
    of the machine. The `workers_per_machine` workers divide the cores of a machine. `module` has the task functions.
    """

    logs: str
    stop_files: str
    device: str = "cpu"
    devices: tuple[str, ...] = ()
    workers_per_device: int = 1
    workers_per_machine: int = 1
    module: str = "engine.training.run_tasks"

    def token(self, rank: int) -> str | None:
        """The one device that is visible to the worker of a rank; None for a CPU worker."""
        if self.device == "cpu":
            return None
        devices = self.devices or visible_devices()
        return devices[(rank // self.workers_per_device) % len(devices)] if devices else ""


class Supervisor:
    """Keeps one worker process, and starts another for the next task after it has died."""

    def __init__(self, spec: WorkerSpec, block: str = "0", rank: int = 0) -> None:
        self._spec, self._rank = spec, rank
        machine = os.environ.get("SLURMD_NODENAME") or socket.gethostname()
        self._name = f"{machine}/{block}/{rank}"
        self._log = Path(spec.logs) / f"worker-{machine}-{block}-{rank}.log"
        self._child: subprocess.Popen[bytes] | None = None
        self._tasks = self._answers = -1
        self._buffer = b""

    def run(self, name: str, payload: Payload) -> Outcome:
        """{"result": what the function `name` of the module returned} or {"error": kind, "text"}, see `result_of`.

        `payload["timeout_s"]`, if given, limits its time in seconds, not counting the start of the process.
        """
        if not stop_files.work_wanted(Path(self._spec.stop_files)):
            return _failure(Drained("the search is being stopped"))
        try:
            return self._send(name, payload, payload.get("timeout_s") or float("inf"))
        except EngineError as error:
            return _failure(error)

    def kill(self) -> None:
        """Kills the process. May be called from any thread; `run` then reports that it died."""
        child = self._child
        if child is not None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(child.pid, signal.SIGKILL)

    def close(self) -> None:
        """Kills the process and releases its pipes."""
        if self._child is not None:
            self.kill()
            self._child.wait()
            self._child = None
            os.close(self._tasks)
            os.close(self._answers)

    def _send(self, name: str, payload: Payload, limit: float) -> Outcome:
        if self._child is None or self._child.poll() is not None:
            self.close()
            self._start()
        before = self._log.stat().st_size
        with contextlib.suppress(BrokenPipeError):  # the read below reports why
            os.write(self._tasks, json.dumps({"name": name, "task": payload}).encode() + b"\n")
        self._read(START_LIMIT_S, before)
        outcome: Outcome = json.loads(self._read(limit, before))
        return outcome

    def _start(self) -> None:
        theirs, self._tasks = os.pipe()
        self._answers, mine = os.pipe()
        self._buffer = b""
        arguments = [str(theirs), str(mine), str(os.getpid()), self._spec.module]
        try:
            with open(self._log, "ab") as log:
                self._child = subprocess.Popen(
                    [sys.executable, "-m", "engine.fleet.worker", *arguments],
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=log,
                    pass_fds=(theirs, mine),
                    env=worker_environment(self._spec, self._rank, self._name),
                    start_new_session=True,
                )
        except OSError as error:
            raise EnvironmentUnusable(f"cannot start a worker: {error}") from error
        finally:
            os.close(theirs)
            os.close(mine)

    def _read(self, limit: float, before: int) -> bytes:
        """The next line from the worker; raises WorkerDied or TimedOut if there is none."""
        end = time.monotonic() + limit
        poll = select.poll()
        poll.register(self._answers, select.POLLIN)
        while b"\n" not in self._buffer:
            if poll.poll(1000 * max(0.0, min(1.0, end - time.monotonic()))):
                got = os.read(self._answers, 1 << 20)
                self._buffer += got
                if not got:
                    raise WorkerDied(self._ended(before))
            elif time.monotonic() >= end:
                raise TimedOut(self._give_up(limit, before))
        line, _, self._buffer = self._buffer.partition(b"\n")
        return line

    def _ended(self, before: int) -> str:
        assert self._child is not None
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._child.wait(DUMP_S)
        code = self._child.poll()
        self.close()
        if code is None:
            return f"the worker process {self._name} closed its pipe{self._tail(before)}"
        how = f"signal {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
        hint = " (killed, possibly by the OOM killer)" if code == -signal.SIGKILL else ""
        return f"the worker process {self._name} ended with {how}{hint}{self._tail(before)}"

    def _give_up(self, limit: float, before: int) -> str:
        """Makes the worker dump its stacks, then kills it."""
        assert self._child is not None
        self._child.send_signal(signal.SIGABRT)
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._child.wait(DUMP_S)
        self.close()
        return f"no answer within {limit:g} s on {self._name}{self._tail(before)}"

    def _tail(self, before: int) -> str:
        """The last lines of the worker's log since the task began."""
        try:
            with open(self._log, "rb") as log:
                log.seek(max(before, log.seek(0, os.SEEK_END) - TAIL_BYTES))
                text = log.read().decode(errors="replace").strip()
        except OSError:
            return ""
        return f"; the end of its log {self._log}:\n{text}" if text else ""


def worker_environment(spec: WorkerSpec, rank: int, name: str) -> dict[str, str]:
    """The environment of a worker process: that of this process, with these variables.

    MFKD_WORKER           the worker's name, MACHINE/BLOCK/RANK, which evaluations and logs carry
    MFKD_CORES            CPU cores that the worker may use: an equal share of those of the machine
    MFKD_STOP_FILES       the folder of the stop files (engine/stop_files.py)
    CUDA_VISIBLE_DEVICES  the worker's only device, set before torch can be imported; unchanged for a CPU worker
    CUDA_DEVICE_MAX_CONNECTIONS  32 unless set: eight students, the loader and the default stream each need a hardware
                          queue, and CUDA makes 8 by default
    OMP_NUM_THREADS       1, since workers share the cores, unless the user has set it; so too MKL_NUM_THREADS
    PYTHONPATH            starts with the folder that holds `engine`, which need not be installed
    PYTHONSAFEPATH        1: a file in the current folder must not shadow a module
    """
    given = dict(os.environ)
    paths = [str(ROOT), *filter(None, given.get("PYTHONPATH", "").split(os.pathsep))]
    made = {
        "MFKD_WORKER": name,
        "MFKD_CORES": str(max(1, len(os.sched_getaffinity(0)) // spec.workers_per_machine)),
        "MFKD_STOP_FILES": spec.stop_files,
        "PYTHONPATH": os.pathsep.join(paths),
        "PYTHONSAFEPATH": "1",
    }
    made["CUDA_DEVICE_MAX_CONNECTIONS"] = given.get("CUDA_DEVICE_MAX_CONNECTIONS", "32")
    token = spec.token(rank)
    if token is not None:
        made["CUDA_VISIBLE_DEVICES"] = token
    return {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", **given, **made}


def _failure(error: EngineError) -> Outcome:
    return {"error": type(error).__name__, "text": str(error)}


_supervisor: Supervisor | None = None  # of this process, if it is one of Parsl's workers


def call(name: str, payload: Payload, spec: WorkerSpec) -> Outcome:
    """Runs a task in a Parsl worker. The worker process that it starts stays alive for the next task."""
    global _supervisor
    if _supervisor is None:
        # Parsl's workers poll whether their pool still exists, and mistake a zombie for a living one.
        die_with(os.getppid())
        _supervisor = Supervisor(spec, os.environ["PARSL_WORKER_BLOCK_ID"], int(os.environ["PARSL_WORKER_RANK"]))
    return _supervisor.run(name, payload)
