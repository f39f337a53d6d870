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

from engine.config import Resources
from engine.fleet.devices import Layout, choose_devices, layout, visible_devices
from engine.fleet.fleet import Fleet, FleetLost, open_fleet
from engine.fleet.supervisor import Post, TaskFailed, TimedOut, WorkerDied
from engine.search.dispatch import Dispatch
from engine.search.journal import Journal
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
def test_devices_are_what_the_scheduler_gave(
    visible: str, tokens: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert visible_devices() == tokens


@pytest.mark.parametrize(
    ("asked", "chosen"),
    [("auto", ("a", "b", "c")), ("2", ("a", "b")), ("0", ()), ("0,2", ("a", "c")), ("2,0", ("c", "a"))],
)
def test_gpus_are_a_count_or_a_choice(asked: str, chosen: tuple[str, ...]) -> None:
    assert choose_devices(asked, ("a", "b", "c")) == chosen


@pytest.mark.parametrize(
    ("asked", "message"),
    [("8", "8 asked for, 3 visible"), ("0,3", "from 0 to 2"), ("1,1", "different"), ("two", "write auto")],
)
def test_gpus_that_are_not_there_are_refused(asked: str, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        choose_devices(asked, ("a", "b", "c"))


def test_without_gpus_there_is_a_worker_a_core(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert layout(Resources()) == Layout(len(os.sched_getaffinity(0)))
    assert layout(Resources(workers=3)) == Layout(3)
    with pytest.raises(EnvironmentUnusable, match="no GPU is visible"):
        layout(Resources(device="cuda"))
    with pytest.raises(UsageError, match="contradict"):
        layout(Resources(device="cpu", gpus="2"))


def test_each_gpu_gets_its_share_of_workers(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a worker does with its rank: two workers on each of four devices, whatever their names are."""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,5,GPU-a,GPU-b")
    assert layout(Resources(gpus="4")) == Layout(4, ("4", "5", "GPU-a", "GPU-b"), "cuda")
    wanted = Layout(8, ("4", "5", "GPU-a", "GPU-b"), "cuda", share=2)
    for devices in (wanted.devices, ()):  # without names from the driver, what the worker's machine shows
        post = Post("", "", wanted.device, devices, wanted.share)
        assert [post.token(rank) for rank in range(8)] == ["4", "4", "5", "5", "GPU-a", "GPU-a", "GPU-b", "GPU-b"]
    assert Post("", "").token(0) is None


def listening(processes: list[psutil.Process]) -> set[str]:
    found = set()
    for process in processes:
        with contextlib.suppress(psutil.NoSuchProcess):  # a helper of a moment
            open_ones = [c for c in process.net_connections() if c.status == psutil.CONN_LISTEN]
            found |= {c.laddr.ip.removeprefix("::ffff:") for c in open_ones}
    return found


def called(process: psutil.Process, word: str) -> bool:
    """Whether a process has a word in its command line; one that is gone has none."""
    try:
        return word in " ".join(process.cmdline())
    except psutil.NoSuchProcess:
        return False


@pytest.fixture(params=[1, 3], ids=["one", "parsl"])
def crew(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Fleet]:
    """Workers that need no torch: alone, and three of Parsl's."""
    made = open_fleet(Resources(device="cpu"), Layout(request.param), tmp_path / "logs", module="tests.light")
    yield made
    made.close()


def test_results_and_errors_of_tasks_come_back_as_they_are(crew: Fleet) -> None:
    seen = crew.submit("report", {}).result(60)
    assert seen["OMP_NUM_THREADS"] == "1"
    assert seen["CUDA_DEVICE_MAX_CONNECTIONS"] == "32", "a hardware queue for every stream of a cohort"
    assert seen["MFKD_WORKER"].startswith(f"{socket.gethostname()}/0/")
    with pytest.raises(UsageError, match="^this cannot be done$"):
        crew.submit("refuse", {}).result(60)
    with pytest.raises(TaskFailed, match="ZeroDivisionError: a mistake of ours"):
        crew.submit("fail", {}).result(60)
    assert crew.submit("report", {}).result(60)


def test_a_worker_that_dies_or_hangs_is_said_with_its_last_words(crew: Fleet) -> None:
    with pytest.raises(WorkerDied, match=r"exit code 70.*\n.*my last words"):
        crew.submit("leave", {}).result(60)
    with pytest.raises(WorkerDied, match=r"SIGSEGV.*\n(.*\n)*.*string_at"):
        crew.submit("crash", {}).result(60)
    with pytest.raises(TimedOut, match=r"within 1 s.*\n(.*\n)*.*in hang"):
        crew.submit("hang", {"timeout_s": 1}).result(60)
    assert crew.submit("report", {}).result(60)


def test_after_a_drain_what_runs_ends_and_nothing_begins(crew: Fleet) -> None:
    crew.submit("report", {}).result(60)
    tasks = [crew.submit("report", {"seconds": 1.0}) for _ in range(3 * crew.capacity)]
    time.sleep(0.5)  # the first has begun; others may be about to
    crew.drain()
    ended = [type(task.exception(60)) for task in tasks]
    assert set(ended) == {type(None), Drained}
    with pytest.raises(Drained):
        crew.submit("report", {}).result(60)


def test_each_worker_sees_its_device(tmp_path: Path) -> None:
    wanted = Layout(4, ("GPU-a", "7"), "cuda", share=2)
    crew = open_fleet(Resources(), wanted, tmp_path, module="tests.light")
    try:
        seen = {}
        running = [crew.submit("report", {"seconds": 0.5}) for _ in range(8)]
        for answer in [future.result(60) for future in running]:
            seen[answer["pid"]] = answer["CUDA_VISIBLE_DEVICES"]
        assert sorted(seen.values()) == ["7", "7", "GPU-a", "GPU-a"]
    finally:
        crew.close()


def interchange() -> psutil.Process:
    """Parsl's process between this one and the workers; its title hides the mark."""
    (found,) = [p for p in psutil.Process().children(recursive=True) if called(p, "interchange")]
    return found


def workers(mark: Callable[[], list[psutil.Process]]) -> list[psutil.Process]:
    return [process for process in mark() if called(process, "engine.fleet.worker")]


def test_killed_workers_cost_their_task_only(tmp_path: Path, mark: Callable[[], list[psutil.Process]]) -> None:
    """Busy and idle ones, by SIGKILL."""
    crew = open_fleet(Resources(device="cpu"), Layout(3), tmp_path, module="tests.light")
    three, four = ({"folder": str(tmp_path / f"meet{count}"), "count": count} for count in (3, 4))
    for place in (three, four):
        Path(place["folder"]).mkdir()
    try:
        first = [crew.submit("meet", three) for _ in range(3)]
        assert len({future.result(60)["pid"] for future in first}) == 3
        assert listening([psutil.Process(), interchange(), *mark()]) == {"127.0.0.1"}
        assert listening([interchange()]) == {"127.0.0.1"}
        (keys,) = tmp_path.glob("*/workers/certificates")
        assert keys.stat().st_mode & 0o077 == 0  # what opens the channels is for this account alone
        for process in workers(mark):  # idle
            process.kill()
        running = {crew.submit("meet", four) for _ in range(3)}
        until(lambda: len(list(Path(four["folder"]).iterdir())) == 3)
        workers(mark)[0].kill()  # busy
        assert crew.submit("meet", four).result(60)  # whom the others wait for
        died = [future for future in running if isinstance(future.exception(60), WorkerDied)]
        assert len(died) == 1
    finally:
        crew.close()
    until(lambda: mark() == [])


def test_a_pool_that_has_lost_a_process_is_replaced(tmp_path: Path, mark: Callable[[], list[psutil.Process]]) -> None:
    """A supervisor that is killed while it waits for a task takes the lock of its pool's queue with it."""
    crew = open_fleet(Resources(device="cpu"), Layout(3), tmp_path, module="tests.light")
    try:
        first = [crew.submit("report", {"seconds": 0.5}) for _ in range(6)]
        supervisors = {future.result(60)["supervisor"] for future in first}
        for process in supervisors:
            os.kill(process, signal.SIGKILL)
        again = [crew.submit("report", {"seconds": 0.5}) for _ in range(6)]
        assert supervisors.isdisjoint({future.result(120)["supervisor"] for future in again})
    finally:
        crew.close()
    until(lambda: mark() == [])


def test_without_the_process_between_tasks_fail(tmp_path: Path, mark: Callable[[], list[psutil.Process]]) -> None:
    crew = open_fleet(Resources(device="cpu"), Layout(2), tmp_path, module="tests.light")
    try:
        crew.submit("report", {}).result(60)
        waiting = crew.submit("hang", {})
        interchange().kill()
        with pytest.raises(FleetLost, match="run the command again"):
            waiting.result(60)
    finally:
        crew.close()
    until(lambda: mark() == [])
    with pytest.raises(NoDataFlowKernelError):  # so that this process can open another fleet
        parsl.dfk()


def until(condition: Callable[[], bool], seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.1)


def test_a_folder_that_cannot_be_written_is_said(tmp_path: Path) -> None:
    (tmp_path / "logs").write_text("a file in its place")
    with pytest.raises(EnvironmentUnusable, match="cannot be written.*choose another folder"):
        open_fleet(Resources(device="cpu"), Layout(1), tmp_path / "logs")


class InAThread(AtOnce):
    """Answers every trial in a thread, as fleets do."""

    def submit(self, name: str, task: Task) -> Future[Any]:
        return ThreadPoolExecutor(1).submit(self.answer, name, task)

    def run_trials(self, task: Task) -> list[Any]:
        return [evaluation_to_json(Evaluation(TRIAL, "ok", 0.5))]


TRIAL = Trial(0, Architecture((1, 2)), Fidelity("low"))


@pytest.mark.parametrize("raised", [ValueError, SystemExit])
def test_a_search_does_not_wait_for_an_answer_that_could_not_be_taken(
    raised: type[BaseException], tmp_path: Path
) -> None:
    def received(evaluation: Evaluation) -> None:
        raise raised("while it was shown")

    with Journal(tmp_path / "journal.jsonl") as book:
        desk = Dispatch(InAThread(), {}, book, {}, 1, Fidelity("high"), received)
        answer = desk.submit(TRIAL)
        desk.flush()
        with pytest.raises(raised, match="while it was shown"):
            answer.result(60)
