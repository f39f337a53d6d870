from __future__ import annotations

import contextlib
import os
import signal
import socket
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import parsl
import psutil
import pytest
from parsl.errors import NoDataFlowKernelError

from engine.config import Resources, SearchConfig
from engine.fleet.devices import Layout, choose_devices, layout, visible_devices
from engine.fleet.fleet import Fleet, FleetLost, open_fleet
from engine.fleet.supervisor import TaskFailed, TimedOut, WorkerDied, WorkerSpec
from engine.search.dispatch import Cohorts, Dispatcher
from engine.search.journal import Journal
from engine.tasks import WorkerSettings
from engine.trial import (
    Architecture,
    Drained,
    EnvironmentUnusable,
    Evaluation,
    Fidelity,
    Trial,
    UsageError,
    evaluation_to_json,
)
from tests.at_once import AtOnce, Task


@pytest.mark.parametrize(
    ("visible", "tokens"),
    [
        ("0,1,2", ("0", "1", "2")),
        ("GPU-8a1b, MIG-77/1/0", ("GPU-8a1b", "MIG-77/1/0")),
        ("", ()),
        ("-1", ()),
        ("3,-1,4", ("3",)),
    ],
)
def test_devices_are_those_that_the_scheduler_assigned(
    visible: str, tokens: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert visible_devices() == tokens


@pytest.mark.parametrize(
    ("asked", "chosen"),
    [("auto", ("a", "b", "c")), ("2", ("a", "b")), ("0", ()), ("0,2", ("a", "c")), ("2,0", ("c", "a"))],
)
def test_gpus_may_be_a_count_or_positions(asked: str, chosen: tuple[str, ...]) -> None:
    assert choose_devices(asked, ("a", "b", "c")) == chosen


@pytest.mark.parametrize(
    ("asked", "message"),
    [("8", "only 3 visible; ask for at most 3"), ("0,3", "from 0 to 2"), ("1,1", "different"), ("two", "write auto")],
)
def test_gpus_that_do_not_exist_are_refused(asked: str, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        choose_devices(asked, ("a", "b", "c"))


def test_without_gpus_each_core_has_a_worker(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert layout(Resources()) == Layout(len(os.sched_getaffinity(0)))
    assert layout(Resources(workers=3)) == Layout(3)
    with pytest.raises(EnvironmentUnusable, match="no GPU is visible"):
        layout(Resources(device="cuda"))
    with pytest.raises(UsageError, match="contradict"):
        layout(Resources(device="cpu", gpus="2"))


def test_workers_are_spread_evenly_over_the_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    """A worker finds its device by its rank: two workers on each of four devices, whatever their names are."""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,5,GPU-a,GPU-b")
    assert layout(Resources(gpus="4")) == Layout(4, ("4", "5", "GPU-a", "GPU-b"), "cuda")
    wanted = Layout(8, ("4", "5", "GPU-a", "GPU-b"), "cuda", workers_per_device=2)
    for devices in (wanted.devices, ()):  # without names from the driver, the GPUs that the worker sees
        spec = WorkerSpec("", "", wanted.device, devices, wanted.workers_per_device)
        assert [spec.token(rank) for rank in range(8)] == ["4", "4", "5", "5", "GPU-a", "GPU-a", "GPU-b", "GPU-b"]
    assert WorkerSpec("", "").token(0) is None


def listening(processes: list[psutil.Process]) -> set[str]:
    found = set()
    for process in processes:
        with contextlib.suppress(psutil.NoSuchProcess):  # a short-lived helper
            open_ones = [c for c in process.net_connections() if c.status == psutil.CONN_LISTEN]
            found |= {c.laddr.ip.removeprefix("::ffff:") for c in open_ones}
    return found


def has_word(process: psutil.Process, word: str) -> bool:
    """Whether a process has a word in its command line; False if the process is gone."""
    try:
        return word in " ".join(process.cmdline())
    except psutil.NoSuchProcess:
        return False


@pytest.fixture(params=[1, 3], ids=["one", "parsl"])
def fleet(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Fleet]:
    """Workers that need no torch: a single one, and three of Parsl's."""
    made = open_fleet(Resources(device="cpu"), Layout(request.param), tmp_path / "logs", module="tests.light")
    yield made
    made.close()


def test_results_and_errors_of_tasks_come_back_unchanged(fleet: Fleet) -> None:
    seen = fleet.submit("report", {}).result(60)
    assert seen["OMP_NUM_THREADS"] == "1"
    assert seen["CUDA_DEVICE_MAX_CONNECTIONS"] == "32", "a hardware queue for every stream of a cohort"
    assert seen["MFKD_WORKER"].startswith(f"{socket.gethostname()}/0/")
    with pytest.raises(UsageError, match="^this cannot be done$"):
        fleet.submit("refuse", {}).result(60)
    with pytest.raises(TaskFailed, match="ZeroDivisionError: a mistake of ours"):
        fleet.submit("fail", {}).result(60)
    assert fleet.submit("report", {}).result(60)


def test_the_error_of_a_dead_or_hanging_worker_ends_with_its_log(fleet: Fleet) -> None:
    with pytest.raises(WorkerDied, match=r"exit code 70.*\n.*my last words"):
        fleet.submit("leave", {}).result(60)
    with pytest.raises(WorkerDied, match=r"SIGSEGV.*\n(.*\n)*.*string_at"):
        fleet.submit("crash", {}).result(60)
    with pytest.raises(TimedOut, match=r"within 1 s.*\n(.*\n)*.*in hang"):
        fleet.submit("hang", {"timeout_s": 1}).result(60)
    assert fleet.submit("report", {}).result(60)


def test_after_a_drain_running_tasks_finish_and_none_starts(fleet: Fleet) -> None:
    fleet.submit("report", {}).result(60)
    tasks = [fleet.submit("report", {"seconds": 1.0}) for _ in range(3 * fleet.capacity)]
    time.sleep(0.5)  # the first has begun; others may be about to begin
    fleet.drain()
    ended = [type(task.exception(60)) for task in tasks]
    assert set(ended) == {type(None), Drained}
    with pytest.raises(Drained):
        fleet.submit("report", {}).result(60)


def test_each_worker_sees_its_device(tmp_path: Path) -> None:
    wanted = Layout(4, ("GPU-a", "7"), "cuda", workers_per_device=2)
    fleet = open_fleet(Resources(), wanted, tmp_path, module="tests.light")
    try:
        meeting = tmp_path / "meeting"
        meeting.mkdir()
        running = [fleet.submit("meet", {"folder": str(meeting), "count": 4}) for _ in range(4)]
        seen = [future.result(120)["CUDA_VISIBLE_DEVICES"] for future in running]
        assert sorted(seen) == ["7", "7", "GPU-a", "GPU-a"]
    finally:
        fleet.close()


def interchange() -> psutil.Process:
    """Parsl's process between this one and the workers; it changes its title, which hides the mark."""
    (found,) = [p for p in psutil.Process().children(recursive=True) if has_word(p, "interchange")]
    return found


def workers(mark: Callable[[], list[psutil.Process]]) -> list[psutil.Process]:
    return [process for process in mark() if has_word(process, "engine.fleet.worker")]


def test_a_killed_worker_loses_only_its_own_task(tmp_path: Path, mark: Callable[[], list[psutil.Process]]) -> None:
    """Idle and busy workers, killed by SIGKILL."""
    fleet = open_fleet(Resources(device="cpu"), Layout(3), tmp_path, module="tests.light")
    three, four = ({"folder": str(tmp_path / f"meet{count}"), "count": count} for count in (3, 4))
    for place in (three, four):
        Path(place["folder"]).mkdir()
    try:
        first = [fleet.submit("meet", three) for _ in range(3)]
        assert len({future.result(60)["pid"] for future in first}) == 3
        assert listening([psutil.Process(), interchange(), *mark()]) == {"127.0.0.1"}
        assert listening([interchange()]) == {"127.0.0.1"}
        (keys,) = tmp_path.glob("*/workers/certificates")
        assert keys.stat().st_mode & 0o077 == 0  # the keys of the channels are readable by this account only
        for process in workers(mark):  # idle
            process.kill()
        until(lambda: not workers(mark))  # a task sent to a worker that is still dying would die with it
        running = {fleet.submit("meet", four) for _ in range(3)}
        until(lambda: len(list(Path(four["folder"]).iterdir())) == 3)
        workers(mark)[0].kill()  # busy
        assert fleet.submit("meet", four).result(60)  # the fourth, for which the others wait
        died = [future for future in running if isinstance(future.exception(60), WorkerDied)]
        assert len(died) == 1
    finally:
        fleet.close()
    until(lambda: mark() == [])


def test_a_pool_that_has_lost_a_process_is_replaced(tmp_path: Path, mark: Callable[[], list[psutil.Process]]) -> None:
    """A supervisor that is killed while waiting for a task never releases the lock of its pool's queue."""
    fleet = open_fleet(Resources(device="cpu"), Layout(3), tmp_path, module="tests.light")
    try:
        first = [fleet.submit("report", {"seconds": 0.5}) for _ in range(6)]
        supervisors = {future.result(60)["supervisor"] for future in first}
        for process in supervisors:
            os.kill(process, signal.SIGKILL)
        again = [fleet.submit("report", {"seconds": 0.5}) for _ in range(6)]
        assert supervisors.isdisjoint({future.result(120)["supervisor"] for future in again})
    finally:
        fleet.close()
    until(lambda: mark() == [])


def test_tasks_fail_when_the_interchange_dies(tmp_path: Path, mark: Callable[[], list[psutil.Process]]) -> None:
    fleet = open_fleet(Resources(device="cpu"), Layout(2), tmp_path, module="tests.light")
    try:
        fleet.submit("report", {}).result(60)
        waiting = fleet.submit("hang", {})
        interchange().kill()
        with pytest.raises(FleetLost, match="run the command again"):
            waiting.result(60)
    finally:
        fleet.close()
    until(lambda: mark() == [])
    with pytest.raises(NoDataFlowKernelError):  # so that this process can open another fleet
        parsl.dfk()


def until(condition: Callable[[], bool], seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.1)


def test_a_folder_that_cannot_be_written_is_refused(tmp_path: Path) -> None:
    (tmp_path / "logs").write_text("a file, not a folder")
    with pytest.raises(EnvironmentUnusable, match="cannot write .*choose another folder"):
        open_fleet(Resources(device="cpu"), Layout(1), tmp_path / "logs")


class InAThread(AtOnce):
    """Answers every trial in another thread, as fleets do."""

    def submit(self, name: str, task: Task) -> Future[Any]:
        return ThreadPoolExecutor(1).submit(self.answer, name, task)

    def run_trials(self, task: Task) -> list[Any]:
        return [evaluation_to_json(Evaluation(TRIAL, "ok", 0.5))]


TRIAL = Trial(0, Architecture((1, 2)), Fidelity("low"))


@pytest.mark.parametrize("raised", [ValueError, SystemExit])
def test_an_error_while_an_evaluation_is_shown_reaches_the_search(raised: type[BaseException], tmp_path: Path) -> None:
    def received(evaluation: Evaluation) -> None:
        raise raised("while showing it")

    with Journal(tmp_path / "journal.jsonl") as journal:
        worker = WorkerSettings(SearchConfig(), tmp_path, "cpu")
        cohorts = Cohorts(worker, tmp_path / "no-teacher", 1)
        dispatcher = Dispatcher(InAThread(), cohorts, journal, {}, received)
        answer = dispatcher.submit(TRIAL)
        dispatcher.flush()
        with pytest.raises(raised, match="while showing it"):
            answer.result(60)
