"""Looks after one worker process: starts it, hands it tasks, says what became of them when it dies or hangs.

It never imports torch. A worker may be killed, crash in C, run out of memory or lose its CUDA context; none of that
reaches the process that has to report it, be it one of Parsl's or the driver.
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

from engine import orders
from engine.fleet.devices import visible_devices
from engine.fleet.processes import die_with
from engine.trial import Drained, EngineError, EnvironmentUnusable, NoWinner, UsageError

Task = dict[str, Any]
Outcome = dict[str, Any]
ROOT = Path(__file__).resolve().parents[2]
START_LIMIT_S = 600.0  # imports from a slow file system take minutes; more is a hang
DUMP_S = 5.0  # for the stacks of a worker that hangs to reach its log
TAIL_BYTES = 2000


class WorkerDied(EnvironmentUnusable):
    """The worker process of a task died."""


class TimedOut(EnvironmentUnusable):
    """A task took longer than its limit and was ended."""


class TaskFailed(Exception):
    """A task raised something that no user can act on; the text is its traceback."""


ERRORS: dict[str, type[Exception]] = {
    kind.__name__: kind
    for kind in (EngineError, UsageError, EnvironmentUnusable, NoWinner, Drained, WorkerDied, TimedOut, TaskFailed)
}


def result_of(outcome: Outcome) -> Any:
    """The result of a task, or its error raised."""
    if "error" in outcome:
        raise ERRORS[outcome["error"]](outcome["text"])
    return outcome["result"]


@dataclass(frozen=True)
class Post:
    """What every worker of a fleet is told: folders of its logs and orders, and how workers share devices.

    Workers take `devices` in turn, `share` in a row the same one; those of the machine where none are named. `beside`
    is how many of them a machine has: they divide its cores. `module` holds the functions that are the tasks.
    """

    logs: str
    orders: str
    device: str = "cpu"
    devices: tuple[str, ...] = ()
    share: int = 1
    beside: int = 1
    module: str = "engine.training.evaluate"

    def token(self, rank: int) -> str | None:
        """The one device that the worker of a rank may see; None for a CPU worker."""
        if self.device == "cpu":
            return None
        devices = self.devices or visible_devices()
        return devices[(rank // self.share) % len(devices)] if devices else ""


class Supervisor:
    """One worker process at a time; the next task after its end has a new one."""

    def __init__(self, post: Post, block: str = "0", rank: int = 0) -> None:
        self._post, self._rank = post, rank
        machine = os.environ.get("SLURMD_NODENAME") or socket.gethostname()
        self._name = f"{machine}/{block}/{rank}"
        self._log = Path(post.logs) / f"worker-{machine}-{block}-{rank}.log"
        self._child: subprocess.Popen[bytes] | None = None
        self._tasks = self._answers = -1
        self._buffer = b""

    def run(self, name: str, task: Task) -> Outcome:
        """{"result": what the function `name` of the module returned} or {"error": kind, "text"}, see `result_of`.

        `task["timeout_s"]`, if given, is how many seconds it may take, not counting the start of the process.
        """
        if not orders.working(Path(self._post.orders)):
            return _failure(Drained("the search is being stopped"))
        try:
            return self._put(name, {**task, "orders": self._post.orders}, task.get("timeout_s") or float("inf"))
        except EngineError as error:
            return _failure(error)

    def kill(self) -> None:
        """Ends the process at once; from any thread, `run` says that it died."""
        child = self._child
        if child is not None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(child.pid, signal.SIGKILL)

    def close(self) -> None:
        """Ends the process, and clears up after it."""
        if self._child is not None:
            self.kill()
            self._child.wait()
            self._child = None
            os.close(self._tasks)
            os.close(self._answers)

    def _put(self, name: str, task: Task, limit: float) -> Outcome:
        if self._child is None or self._child.poll() is not None:
            self.close()
            self._start()
        before = self._log.stat().st_size
        with contextlib.suppress(BrokenPipeError):  # reading tells why
            os.write(self._tasks, json.dumps({"name": name, "task": task}).encode() + b"\n")
        self._read(START_LIMIT_S, before)
        outcome: Outcome = json.loads(self._read(limit, before))
        return outcome

    def _start(self) -> None:
        theirs, self._tasks = os.pipe()
        self._answers, mine = os.pipe()
        self._buffer = b""
        arguments = [str(theirs), str(mine), str(os.getpid()), self._post.module]
        try:
            with open(self._log, "ab") as log:
                self._child = subprocess.Popen(
                    # -P: a file in the user's folder shall not take the place of a module.
                    [sys.executable, "-P", "-m", "engine.fleet.worker", *arguments],
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=log,
                    pass_fds=(theirs, mine),
                    env=self._environment(),
                    start_new_session=True,
                )
        except OSError as error:
            raise EnvironmentUnusable(f"no worker can be started: {error}") from error
        finally:
            os.close(theirs)
            os.close(mine)

    def _environment(self) -> dict[str, str]:
        """Of the worker: its device is set before torch can be imported, and a thread is enough for one of many."""
        given = dict(os.environ)
        paths = [str(ROOT), *filter(None, [given.get("PYTHONPATH")])]
        cores = max(1, len(os.sched_getaffinity(0)) // self._post.beside)
        made = {"PYTHONPATH": os.pathsep.join(paths), "MFKD_WORKER": self._name, "MFKD_CORES": str(cores)}
        # Eight students, the loader and the default stream each need a hardware queue; CUDA makes 8 unless told.
        made["CUDA_DEVICE_MAX_CONNECTIONS"] = given.get("CUDA_DEVICE_MAX_CONNECTIONS", "32")
        token = self._post.token(self._rank)
        if token is not None:
            made["CUDA_VISIBLE_DEVICES"] = token
        return {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", **given, **made}

    def _read(self, limit: float, before: int) -> bytes:
        """The next line of the worker; WorkerDied or TimedOut in its place."""
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
        hint = " (somebody's kill, or memory ran out)" if code == -signal.SIGKILL else ""
        return f"the worker process {self._name} ended with {how}{hint}{self._tail(before)}"

    def _give_up(self, limit: float, before: int) -> str:
        """Has the worker write its stacks, then ends it."""
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
        return f"; its last words in {self._log}:\n{text}" if text else ""


def _failure(error: EngineError) -> Outcome:
    return {"error": type(error).__name__, "text": str(error)}


_here: Supervisor | None = None  # of this process, where it is one of Parsl's workers


def call(name: str, task: Task, post: Post) -> Outcome:
    """What a worker of Parsl's does with a task; its own worker process stays for the next one."""
    global _here
    if _here is None:
        # Parsl's workers look whether their pool still exists, and take one that is not yet reaped for alive.
        die_with(os.getppid())
        _here = Supervisor(post, os.environ["PARSL_WORKER_BLOCK_ID"], int(os.environ["PARSL_WORKER_RANK"]))
    return _here.run(name, task)
