"""Where trials run: the one seam to the distributed engine (Parsl), or one worker beside this process.

Parsl's HighThroughputExecutor carries tasks to supervisors (engine/fleet/supervisor.py), each of which keeps one worker
process: process start, CUDA context, DALI and the data are paid once. Channels are on loopback, or encrypted and
authenticated; engine/fleet/providers.py says where workers run.
"""

from __future__ import annotations

import os
import shlex
import shutil
import sys
import threading
from concurrent.futures import Future, ThreadPoolExecutor, wait
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from engine import orders
from engine.config import Resources
from engine.fleet import processes, providers
from engine.fleet.devices import Layout
from engine.fleet.drain import answer_of
from engine.fleet.supervisor import Post, Supervisor, Task, WorkerDied, call, result_of
from engine.trial import EnvironmentUnusable

if TYPE_CHECKING:
    from parsl.executors import HighThroughputExecutor
    from parsl.executors.status_handling import BlockProviderExecutor
    from parsl.jobs.states import JobStatus

ROOT = Path(__file__).resolve().parent.parent
MAX_LOSSES = 5  # of the machine or supervisor under a task, before the task is given up
COMMAND_S = 5.0  # for an answer of the process between this one and the workers
MAX_MISSING = 3  # pools in a row that never reported


class FleetLost(EnvironmentUnusable):
    """The workers, or the way to them, are gone."""


class TaskLost(EnvironmentUnusable):
    """The machine under a task, or its supervisor, was lost, `MAX_LOSSES` more times too."""


class Fleet(Protocol):
    """What a search sees: how many tasks run at once, on what, and futures of their results."""

    capacity: int
    device: str

    def submit(self, name: str, task: Task) -> Future[Any]:
        """Runs `engine.training.evaluate.<name>(task)` on a worker.

        The future raises what the task raised, where that is an EngineError, else TaskFailed; WorkerDied, TimedOut or
        Drained where the task has not come to its end; TaskLost or FleetLost where the workers are gone.
        """
        ...

    def drain(self) -> None:
        """Starts nothing more: tasks that have not begun, and those that keep their state, end with Drained."""
        ...

    def close(self) -> None:
        """Ends the workers at once, whatever they are at."""
        ...


def completed(fleet: Fleet, name: str, task: Task) -> Any:
    """The result of a task that stands alone; it is tried once more where its worker died."""
    try:
        return answer_of(fleet.submit(name, task))
    except WorkerDied:
        return answer_of(fleet.submit(name, task))


def open_fleet(resources: Resources, wanted: Layout, logs: Path, module: str = "engine.training.evaluate") -> Fleet:
    """The fleet for a layout; tasks are the functions of `module`. Raises EnvironmentUnusable where it cannot be."""
    try:
        logs.mkdir(parents=True, exist_ok=True)
        folder = orders.give(logs)
    except OSError as error:
        raise EnvironmentUnusable(
            f"{logs} cannot be written: {error}; free space, "
            "or choose another folder (--run-dir or --out)"
        ) from error
    beside = wanted.workers // wanted.nodes
    post = Post(str(logs), str(folder), wanted.device, wanted.devices, wanted.share, beside, module)
    if wanted.workers == 1 and wanted.nodes == 1 and providers.local(resources):
        return Single(post)
    return ParslFleet(resources, wanted, post)


class Single:
    """One worker on this machine, without an engine between."""

    capacity = 1

    def __init__(self, post: Post) -> None:
        self.device = post.device
        self._orders = Path(post.orders)
        self._supervisor = Supervisor(post)
        # The worker is bound to the thread that starts it: this one, which lives as long as the fleet.
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="fleet")

    def submit(self, name: str, task: Task) -> Future[Any]:
        return self._thread.submit(lambda: result_of(self._supervisor.run(name, task)))

    def drain(self) -> None:
        orders.drain(self._orders)

    def close(self) -> None:
        orders.close(self._orders)  # what has not begun ends with Drained
        last = self._thread.submit(self._supervisor.close)
        while not last.done():
            self._supervisor.kill()
            wait([last], timeout=0.2)
        self._thread.shutdown()


class ParslFleet:
    """Long-lived workers, a pool of them on each machine."""

    def __init__(self, resources: Resources, wanted: Layout, post: Post) -> None:
        from parsl.concurrent import ParslPoolExecutor
        from parsl.config import Config

        self.capacity, self.device = wanted.workers, post.device
        self._post, self._orders = post, Path(post.orders)
        # Parsl starts its helpers by name: they lie beside this interpreter, whether its environment is active or not.
        os.environ["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
        self._executor = _executor(resources, wanted, self._orders)
        config = Config(
            executors=[self._executor],
            run_dir=str(Path(post.logs).absolute()),
            strategy="simple",
            strategy_period=0.5,  # the default of 5 s is what a first worker would wait for
            initialize_logging=False,
            usage_tracking=0,
        )
        self._pool = ParslPoolExecutor(config=config)
        interchange = self._executor.interchange_proc
        interchange.terminate = interchange.kill  # what Parsl ends it with; it is deaf to TERM, see _executor
        commands = self._executor.command_client
        commands.run = partial(commands.run, timeout_s=COMMAND_S)  # else it waits for ever where that is gone
        self._open: set[Future[Any]] = set()
        self._closed = threading.Event()
        threading.Thread(target=self._watch, name="fleet-watch", daemon=True).start()

    def submit(self, name: str, task: Task) -> Future[Any]:
        future: Future[Any] = Future()
        self._open.add(future)
        self._try(future, name, task, 0)
        return future

    def _try(self, future: Future[Any], name: str, task: Task, losses: int) -> None:
        attempt = self._pool.submit(call, name, task, self._post)
        attempt.add_done_callback(lambda done: self._settle(future, done, name, task, losses))

    def _settle(self, future: Future[Any], done: Future[Any], name: str, task: Task, losses: int) -> None:
        from parsl.executors.errors import BadStateException
        from parsl.executors.high_throughput.errors import ManagerLost, WorkerLost

        if future.done():
            return  # the watch has given it up already
        result, error = None, None  # type: Any, Exception | None
        try:
            result = result_of(done.result())
        except (ManagerLost, WorkerLost) as lost:
            if losses < MAX_LOSSES and not self._closed.is_set():
                self._try(future, name, task, losses + 1)
                return
            error = TaskLost(f"the workers of this task were lost {losses + 1} times: {lost}")
        except BadStateException as bad:
            error = FleetLost(str(bad))
        except Exception as raised:
            error = raised
        self._open.discard(future)
        if error is not None:
            future.set_exception(error)
        else:
            future.set_result(result)

    def _watch(self) -> None:
        """Parsl does not notice that its interchange process has died, and would wait for ever."""
        process = self._executor.interchange_proc
        while not self._closed.wait(1.0):
            if process.poll() is not None:
                reason = f"the process that feeds the workers ended ({process.returncode}); run the command again"
                for future in list(self._open):
                    if not future.done():
                        future.set_exception(FleetLost(reason))
                return

    def drain(self) -> None:
        orders.drain(self._orders)

    def close(self) -> None:
        import parsl
        from parsl.executors.high_throughput.errors import CommandClientBadError, CommandClientTimeoutError

        self._closed.set()
        orders.close(self._orders)
        try:
            self._pool.shutdown(wait=False)
        except (CommandClientTimeoutError, CommandClientBadError):  # gone: nobody to ask which workers there are
            self._executor.provider.cancel(list(self._executor.blocks_to_job_id.values()))
            parsl.clear()  # what it left undone: this process may open another fleet


def _executor(resources: Resources, wanted: Layout, folder: Path) -> HighThroughputExecutor:
    from parsl.executors import HighThroughputExecutor
    from parsl.executors.high_throughput.executor import DEFAULT_LAUNCH_CMD

    deaf = f"trap '' {' '.join(number.name.removeprefix('SIG') for number in processes.DRAINING)}"
    setup = (
        f"export PYTHONPATH={shlex.quote(str(ROOT))}:$PYTHONPATH PATH={shlex.quote(os.environ['PATH'])}\n"
        f"cd {shlex.quote(str(Path.cwd()))}\n{deaf}"
    )
    site = providers.provider(resources, wanted, setup)
    pool = shlex.join([sys.executable, "-m", "engine.fleet.pool", str(folder)])
    # When this process dies, however, the interchange dies with it, and the workers some seconds later. A signal to
    # the whole job is the driver's to answer.
    dies_with_us = ["setpriv", "--pdeathsig", "KILL"] if shutil.which("setpriv") else []
    return HighThroughputExecutor(
        label="workers",
        address=site.address,
        encrypted=True,
        interchange_launch_cmd=["sh", "-c", f'{deaf}; exec "$@"', "sh", *dies_with_us, "interchange.py"],
        launch_cmd=f"{pool} {DEFAULT_LAUNCH_CMD}",
        # CPU counts must not cap the workers: one of a GPU, or of a pretended one, needs next to no core.
        cores_per_worker=1e-6,
        max_workers_per_node=wanted.workers // wanted.nodes,
        heartbeat_period=2,
        heartbeat_threshold=10,
        block_error_handler=_give_up_where_none_comes,
        provider=site.provider,
        drain_period=site.drain_s,
    )


def _give_up_where_none_comes(executor: BlockProviderExecutor, status: dict[str, JobStatus]) -> None:
    """Fails all tasks when the last pools have ended without a word: the next would not do better.

    Pools that have worked and are gone (walltime, preemption) are started again by Parsl, any number of times.
    """
    from parsl.executors.errors import BadStateException
    from parsl.jobs.states import JobState

    ended = {block: job for block, job in status.items() if job.terminal and job.state != JobState.SCALED_IN}
    blocks = list(ended)[-MAX_MISSING:]
    last = [ended[block] for block in blocks]
    # A job that the scheduler has refused is FAILED, and becomes MISSING when the scheduler is next asked for news.
    silent = all(job.state in (JobState.MISSING, JobState.FAILED) for job in last)
    if len(last) == MAX_MISSING and silent and not set(blocks) & set(executor.connected_blocks()):
        words = last[-1].stderr_summary or last[-1].message or "they left no message"
        text = f"{MAX_MISSING} pools of workers in a row ended before they reported: {words}"
        executor.set_bad_state_and_fail_all(BadStateException(executor, Exception(text)))
