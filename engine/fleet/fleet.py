"""Where trials run: on a single worker of this process, or on many through Parsl, which only this module talks to.

Parsl's HighThroughputExecutor carries tasks to supervisors (engine/fleet/supervisor.py). Each keeps one worker process
alive, so starting a process, creating a CUDA context, importing DALI and loading the data are paid for once. Every
channel is encrypted and authenticated. engine/fleet/providers.py decides where workers run.
"""

from __future__ import annotations

import os
import shlex
import shutil
import sys
import threading
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from engine import stop_files
from engine.config import Resources
from engine.fleet import processes, providers
from engine.fleet.devices import Layout
from engine.fleet.drain import answer_of
from engine.fleet.supervisor import ROOT, Payload, Supervisor, WorkerDied, WorkerSpec, call, result_of
from engine.tasks import Task, task_to_json
from engine.trial import EnvironmentUnusable

if TYPE_CHECKING:
    from parsl.executors import HighThroughputExecutor
    from parsl.executors.status_handling import BlockProviderExecutor
    from parsl.jobs.states import JobStatus

MAX_LOSSES = 5  # times that a task may lose its machine or supervisor before it is given up
COMMAND_S = 5.0  # time limit for a reply of the interchange, the process between this one and the workers
MAX_MISSING = 3  # consecutive pools that end without ever connecting


class FleetLost(EnvironmentUnusable):
    """The workers, or the connection to them, are gone."""


class TaskLost(EnvironmentUnusable):
    """A task lost its machine or its supervisor more than `MAX_LOSSES` times."""


class Fleet(Protocol):
    """A search's view of its workers: how many tasks run at once, on what device, and futures of their results."""

    capacity: int
    device: str

    def submit(self, name: str, payload: Payload) -> Future[Any]:
        """Runs the function `name` of the workers' module on a JSON payload; see `submit` for typed tasks.

        The future raises what the function raised if that is an EngineError, else TaskFailed; WorkerDied, TimedOut or
        Drained if the task did not finish; TaskLost or FleetLost if the workers are gone.
        """
        ...

    def drain(self) -> None:
        """Starts nothing more: tasks that have not begun, and those that save their state, end with Drained."""
        ...

    def close(self) -> None:
        """Kills the workers at once, whatever they are doing."""
        ...


def submit(fleet: Fleet, task: Task) -> Future[Any]:
    """Sends a task to a worker; the future holds its answer as plain JSON values."""
    return fleet.submit(task.function, task_to_json(task))


def result(fleet: Fleet, task: Task) -> Any:
    """The answer to a single task, which is retried once if its worker dies."""
    try:
        return answer_of(submit(fleet, task))
    except WorkerDied:
        return answer_of(submit(fleet, task))


def open_fleet(resources: Resources, layout: Layout, logs: Path, module: str = "engine.training.run_tasks") -> Fleet:
    """Starts the fleet of a layout; tasks are functions of `module`. Raises EnvironmentUnusable if it cannot start."""
    try:
        logs.mkdir(parents=True, exist_ok=True)
        folder = stop_files.create(logs)
    except OSError as error:
        raise EnvironmentUnusable(
            f"cannot write {logs}: {error}; free space, or choose another folder (--run-dir or --out)"
        ) from error
    spec = WorkerSpec(
        logs=str(logs),
        stop_files=str(folder),
        device=layout.device,
        devices=layout.devices,
        workers_per_device=layout.workers_per_device,
        workers_per_machine=layout.workers_per_machine,
        module=module,
    )
    if layout.workers == 1 and layout.nodes == 1 and providers.local(resources):
        return SingleWorkerFleet(spec)
    return ParslFleet(resources, layout, spec)


class SingleWorkerFleet:
    """One worker on this machine, without Parsl."""

    capacity = 1

    def __init__(self, spec: WorkerSpec) -> None:
        self.device = spec.device
        self._stop_files = Path(spec.stop_files)
        self._supervisor = Supervisor(spec)
        # The worker dies with the thread that starts it: this one, which lives as long as the fleet.
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="fleet")

    def submit(self, name: str, payload: Payload) -> Future[Any]:
        return self._thread.submit(lambda: result_of(self._supervisor.run(name, payload)))

    def drain(self) -> None:
        stop_files.drain(self._stop_files)

    def close(self) -> None:
        stop_files.close(self._stop_files)  # tasks that have not begun end with Drained
        last = self._thread.submit(self._supervisor.close)
        while not last.done():
            self._supervisor.kill()
            wait([last], timeout=0.2)
        self._thread.shutdown()


@dataclass(frozen=True)
class Attempt:
    """A task on its way: the future that its caller holds, and how often it has lost its machine or supervisor."""

    future: Future[Any]
    name: str
    payload: Payload
    losses: int = 0


class ParslFleet:
    """Long-lived workers, in a pool on each machine."""

    def __init__(self, resources: Resources, layout: Layout, spec: WorkerSpec) -> None:
        from parsl.concurrent import ParslPoolExecutor
        from parsl.config import Config

        self.capacity, self.device = layout.workers, spec.device
        self._spec, self._stop_files = spec, Path(spec.stop_files)
        # Parsl starts its helper programs by name. They are in this interpreter's folder, which may not be on the PATH.
        os.environ["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
        self._executor = _executor(resources, layout, self._stop_files)
        config = Config(
            executors=[self._executor],
            run_dir=str(Path(spec.logs).absolute()),
            strategy="simple",
            strategy_period=0.5,  # by default the first worker would wait 5 s
            initialize_logging=False,
            usage_tracking=0,
        )
        self._pool = ParslPoolExecutor(config=config)
        interchange = self._executor.interchange_proc
        interchange.terminate = interchange.kill  # Parsl calls terminate, but the process ignores TERM, see _executor
        commands = self._executor.command_client
        commands.run = partial(commands.run, timeout_s=COMMAND_S)  # otherwise it waits forever for a dead interchange
        self._open: set[Future[Any]] = set()
        self._closed = threading.Event()
        threading.Thread(target=self._watch, name="fleet-watch", daemon=True).start()

    def submit(self, name: str, payload: Payload) -> Future[Any]:
        future: Future[Any] = Future()
        self._open.add(future)
        self._try(Attempt(future, name, payload))
        return future

    def _try(self, attempt: Attempt) -> None:
        sent = self._pool.submit(call, attempt.name, attempt.payload, self._spec)
        sent.add_done_callback(partial(self._settle, attempt))

    def _settle(self, attempt: Attempt, done: Future[Any]) -> None:
        from parsl.executors.errors import BadStateException
        from parsl.executors.high_throughput.errors import ManagerLost, WorkerLost

        future, losses = attempt.future, attempt.losses
        if future.done():
            return  # the watch thread has already failed it
        result, error = None, None  # type: Any, Exception | None
        try:
            result = result_of(done.result())
        except (ManagerLost, WorkerLost) as lost:
            if losses < MAX_LOSSES and not self._closed.is_set():
                self._try(replace(attempt, losses=losses + 1))
                return
            error = TaskLost(f"this task lost its workers {losses + 1} times: {lost}")
        except BadStateException as bad:
            error = FleetLost(bad.reason)
        except Exception as raised:
            error = raised
        self._open.discard(future)
        if error is not None:
            future.set_exception(error)
        else:
            future.set_result(result)

    def _watch(self) -> None:
        """Fails open tasks when the interchange dies, which Parsl does not notice by itself."""
        process = self._executor.interchange_proc
        while not self._closed.wait(1.0):
            if process.poll() is not None:
                reason = f"the process that feeds the workers ended ({process.returncode}); run the command again"
                for future in list(self._open):
                    if not future.done():
                        future.set_exception(FleetLost(reason))
                return

    def drain(self) -> None:
        stop_files.drain(self._stop_files)

    def close(self) -> None:
        import parsl
        from parsl.executors.high_throughput.errors import CommandClientBadError, CommandClientTimeoutError

        self._closed.set()
        stop_files.close(self._stop_files)
        try:
            self._pool.shutdown(wait=False)
        except (CommandClientTimeoutError, CommandClientBadError):  # the interchange, which lists the workers, is gone
            self._executor.provider.cancel(list(self._executor.blocks_to_job_id.values()))
            parsl.clear()  # finishes the clean-up: this process may open another fleet


# Shell: only the driver handles the signals that a scheduler or a terminal sends to every process of a job.
IGNORE_SIGNALS = f"trap '' {' '.join(number.name.removeprefix('SIG') for number in processes.DRAINING)}"


def _pool_setup() -> str:
    """Lines of shell that run before a pool: they make this checkout importable, wherever the pool runs.

    Files in the current folder must not shadow modules, as an `engine.py` there would. So Python does not search that
    folder (PYTHONSAFEPATH), and PYTHONPATH has no empty entry, which would stand for it.
    """
    return "\n".join(
        [
            f"export PATH={shlex.quote(os.environ['PATH'])} PYTHONSAFEPATH=1",
            f'export PYTHONPATH={shlex.quote(str(ROOT))}"${{PYTHONPATH:+:$PYTHONPATH}}"',
            f"cd {shlex.quote(str(Path.cwd()))}",
            IGNORE_SIGNALS,
        ]
    )


def _executor(resources: Resources, layout: Layout, folder: Path) -> HighThroughputExecutor:
    from parsl.executors import HighThroughputExecutor
    from parsl.executors.high_throughput.executor import DEFAULT_LAUNCH_CMD

    site = providers.site(resources, layout, _pool_setup())
    pool = shlex.join([sys.executable, "-m", "engine.fleet.pool", str(folder)])
    # However this process dies, the interchange dies with it, and the workers some seconds later.
    dies_with_us = ["setpriv", "--pdeathsig", "KILL"] if shutil.which("setpriv") else []
    return HighThroughputExecutor(
        label="workers",
        address=site.address,
        encrypted=True,
        interchange_launch_cmd=["sh", "-c", f'{IGNORE_SIGNALS}; exec "$@"', "sh", *dies_with_us, "interchange.py"],
        launch_cmd=f"{pool} {DEFAULT_LAUNCH_CMD}",
        # The number of cores must not cap the number of workers: a worker of a GPU needs hardly any.
        cores_per_worker=1e-6,
        max_workers_per_node=layout.workers_per_machine,
        heartbeat_period=2,
        heartbeat_threshold=10,
        block_error_handler=_give_up_if_none_connects,
        provider=site.provider,
        drain_period=site.drain_s,
    )


def _give_up_if_none_connects(executor: BlockProviderExecutor, status: dict[str, JobStatus]) -> None:
    """Fails all tasks once MAX_MISSING pools in a row have ended without connecting: the next would do no better.

    Pools that did connect and are gone (walltime, preemption) are restarted by Parsl any number of times.
    """
    from parsl.jobs.states import JobState

    ended = {block: job for block, job in status.items() if job.terminal and job.state != JobState.SCALED_IN}
    blocks = list(ended)[-MAX_MISSING:]
    last = [ended[block] for block in blocks]
    # A job that the scheduler rejected is FAILED, and becomes MISSING at the next status query.
    silent = all(job.state in (JobState.MISSING, JobState.FAILED) for job in last)
    if len(last) == MAX_MISSING and silent and not set(blocks) & set(executor.connected_blocks()):
        words = last[-1].stderr_summary or last[-1].message or "no message"
        text = f"{MAX_MISSING} worker pools in a row ended before they connected: {words}"
        executor.set_bad_state_and_fail_all(FleetLost(text))  # Parsl wraps it in a BadStateException
