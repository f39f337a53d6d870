"""Where trials run: the one seam to the distributed engine (Parsl), or this process where one worker is enough.

Parsl's HighThroughputExecutor keeps workers alive between tasks: process start, CUDA context, DALI and the data are
paid once. Each worker is pinned to one of the devices that this process may see. Ports are on loopback, encrypted.
"""

from __future__ import annotations

import ctypes
import os
import shlex
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from engine.config import Resources
from engine.trial import EnvironmentUnusable, UsageError

if TYPE_CHECKING:
    from parsl.executors import HighThroughputExecutor

Task = dict[str, Any]
PR_SET_PDEATHSIG = 1  # linux/prctl.h
MAX_RETRIES = 2  # a trial that kills its worker three times has done so by itself


class WorkerDied(Exception):
    """A task's worker process died, `MAX_RETRIES` retries included."""


class Fleet(Protocol):
    """What a search sees: how many tasks run at once, on what, and futures of their results."""

    capacity: int
    device: str

    def submit(self, name: str, task: Task) -> Future[Any]:
        """Runs `engine.evaluate.<name>(task)` on a worker."""
        ...

    def close(self) -> None:
        """Ends the workers at once, whatever they are at."""
        ...


@dataclass(frozen=True, slots=True)
class Layout:
    """Which workers to have: `workers` processes on `devices` (tokens of CUDA_VISIBLE_DEVICES; none for CPU)."""

    workers: int
    devices: tuple[str, ...]


def visible_devices() -> tuple[str, ...]:
    """The GPUs that this process may use, as opaque tokens: numbers, UUIDs or MIG names.

    CUDA_VISIBLE_DEVICES where it is set (a scheduler sets it), else all that nvidia-smi lists.
    """
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        tokens = [token.strip() for token in visible.split(",")]
        # CUDA itself stops at the first entry that it does not know; -1 is the usual way to say "none".
        stop = next((i for i, token in enumerate(tokens) if token in ("", "-1")), len(tokens))
        return tuple(tokens[:stop])
    if shutil.which("nvidia-smi") is None:
        return ()
    listed = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, check=False)
    return tuple(str(i) for i, line in enumerate(li for li in listed.stdout.splitlines() if li.startswith("GPU ")))


def choose_devices(asked: str, visible: tuple[str, ...]) -> tuple[str, ...]:
    """The devices that --gpus means: auto (all), a count, or positions among the visible ones joined by commas."""
    if asked == "auto":
        return visible
    try:
        numbers = [int(part) for part in asked.split(",")]
    except ValueError:
        raise UsageError(f"--gpus {asked}: write auto, a count (8), or positions among the visible (0,2)") from None
    if "," not in asked:
        count = numbers[0]
        if count < 0:
            raise UsageError(f"--gpus {asked}: a count cannot be negative")
        if count > len(visible):
            raise UsageError(
                f"--gpus {asked}: {count} asked for, {len(visible)} visible; ask for at most {len(visible)}"
                + ("" if visible else ", or take --device cpu")
            )
        return visible[:count]
    if len(set(numbers)) != len(numbers) or any(not 0 <= number < len(visible) for number in numbers):
        raise UsageError(
            f"--gpus {asked}: choose different positions from 0 to {len(visible) - 1} ({len(visible)} visible)"
        )
    return tuple(visible[number] for number in numbers)


def layout(resources: Resources) -> Layout:
    """Workers and devices for the resources asked for; UsageError where they are not there."""
    devices = () if resources.device == "cpu" else choose_devices(resources.gpus, visible_devices())
    if resources.device == "cpu" and resources.gpus not in ("auto", "0"):
        raise UsageError(f"--device cpu and --gpus {resources.gpus} contradict each other; give one of them")
    if devices:
        return Layout(len(devices) * resources.students_per_gpu, devices)
    if resources.device == "cuda":
        raise EnvironmentUnusable("--device cuda: no GPU is visible; check nvidia-smi and CUDA_VISIBLE_DEVICES")
    return Layout(resources.workers or len(os.sched_getaffinity(0)), ())


def open_fleet(wanted: Layout, logs: Path) -> Fleet:
    """The fleet for a layout: this process for a single CPU worker, else Parsl's workers."""
    if not wanted.devices and wanted.workers == 1:
        return InlineFleet()
    return ParslFleet(wanted, logs)


class InlineFleet:
    """One CPU worker: this process itself. `submit` returns when the task is done."""

    capacity = 1
    device = "cpu"

    def submit(self, name: str, task: Task) -> Future[Any]:
        future: Future[Any] = Future()
        try:
            future.set_result(call(name, task, (), 1))
        except Exception as error:
            future.set_exception(error)
        return future

    def close(self) -> None:
        return None


class ParslFleet:
    """Long-lived worker processes on this machine."""

    def __init__(self, wanted: Layout, logs: Path) -> None:
        from parsl.concurrent import ParslPoolExecutor
        from parsl.config import Config

        self.capacity = wanted.workers
        self.device = "cuda" if wanted.devices else "cpu"
        self._devices, self._share = wanted.devices, max(1, wanted.workers // max(1, len(wanted.devices)))
        # Parsl starts its helpers by name: they lie beside this interpreter, whether its environment is active or not.
        os.environ["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
        self._executor = _executor(wanted.workers)
        config = Config(
            executors=[self._executor],
            run_dir=str(logs.absolute()),
            strategy="simple",
            strategy_period=0.5,  # the default of 5 s is what a first worker would wait for
            initialize_logging=False,
            usage_tracking=0,
        )
        self._pool = ParslPoolExecutor(config=config)
        self._open: set[Future[Any]] = set()
        self._closed = threading.Event()
        threading.Thread(target=self._watch, name="fleet-watch", daemon=True).start()

    def submit(self, name: str, task: Task) -> Future[Any]:
        future: Future[Any] = Future()
        self._open.add(future)
        self._try(future, name, task, MAX_RETRIES)
        return future

    def _try(self, future: Future[Any], name: str, task: Task, retries: int) -> None:
        attempt = self._pool.submit(call, name, task, self._devices, self._share)
        attempt.add_done_callback(lambda done: self._settle(future, done, name, task, retries))

    def _settle(self, future: Future[Any], done: Future[Any], name: str, task: Task, retries: int) -> None:
        from parsl.executors.high_throughput.errors import ManagerLost, WorkerLost

        error = done.exception()
        if isinstance(error, WorkerLost | ManagerLost) and not self._closed.is_set():
            if retries:
                self._try(future, name, task, retries - 1)
                return
            error = WorkerDied(f"the worker process died {MAX_RETRIES + 1} times on this task: {error}")
        self._open.discard(future)
        if future.done():
            return  # the watch has given it up already
        if error is not None:
            future.set_exception(error)
        else:
            future.set_result(done.result())

    def _watch(self) -> None:
        """Parsl does not notice that its interchange process has died, and would wait for ever."""
        process = self._executor.interchange_proc
        while not self._closed.wait(1.0):
            if process is not None and process.poll() is not None:
                reason = f"the process that feeds the workers ended ({process.returncode}); run the command again"
                for future in list(self._open):
                    if not future.done():
                        future.set_exception(EnvironmentUnusable(reason))
                return

    def close(self) -> None:
        self._closed.set()
        self._pool.shutdown(wait=False)


def _executor(workers: int) -> HighThroughputExecutor:
    from parsl.executors import HighThroughputExecutor
    from parsl.providers import LocalProvider

    root = Path(__file__).resolve().parent.parent
    # When this process dies, however, the interchange dies with it, and the workers some seconds later.
    dies_with_us = ["setpriv", "--pdeathsig", "KILL"] if shutil.which("setpriv") else []
    return HighThroughputExecutor(
        label="workers",
        address="127.0.0.1",
        encrypted=True,
        interchange_launch_cmd=[*dies_with_us, "interchange.py"],
        # CPU counts must not cap the workers: one of a GPU, or of a pretended one, needs next to no core.
        cores_per_worker=1e-6,
        max_workers_per_node=workers,
        heartbeat_period=2,
        heartbeat_threshold=10,
        block_error_handler=False,
        provider=LocalProvider(
            init_blocks=1,
            min_blocks=1,
            max_blocks=1,
            worker_init=(
                f"export PYTHONPATH={shlex.quote(str(root))}:$PYTHONPATH OMP_NUM_THREADS=1 MKL_NUM_THREADS=1\n"
                f"cd {shlex.quote(str(Path.cwd()))}"
            ),
        ),
    )


def call(name: str, task: Task, devices: tuple[str, ...], share: int) -> Any:
    """What a worker does with a task: takes its device, then runs `engine.evaluate.<name>`."""
    die_with_parent()
    pin(devices, share)
    from engine import evaluate

    function: Callable[[Task], Any] = getattr(evaluate, name)
    return function(task)


def pin(devices: tuple[str, ...], share: int) -> None:
    """Makes this worker see one device only: `share` workers in a row take the same one.

    It must come before the process imports torch for the first time. A worker that Parsl starts anew keeps its rank.
    """
    if devices:
        rank = int(os.environ.get("PARSL_WORKER_RANK", "0"))
        os.environ["CUDA_VISIBLE_DEVICES"] = devices[(rank // share) % len(devices)]


def die_with_parent() -> None:
    """Has the kernel kill this worker when the process that started it dies. Parsl's workers look whether that still
    exists, and take one that was killed but not yet reaped for alive. Linux only, as this engine is."""
    if "PARSL_WORKER_RANK" in os.environ:
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
