from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from engine import fleet
from engine.config import Resources, Study, to_dict
from engine.fleet import Layout, ParslFleet, choose_devices, layout, visible_devices
from engine.trial import EnvironmentUnusable, UsageError


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
    assert layout(Resources()) == Layout(len(os.sched_getaffinity(0)), ())
    assert layout(Resources(workers=3)) == Layout(3, ())
    with pytest.raises(EnvironmentUnusable, match="no GPU is visible"):
        layout(Resources(device="cuda"))
    with pytest.raises(UsageError, match="contradict"):
        layout(Resources(device="cpu", gpus="2"))


def test_each_gpu_gets_its_share_of_workers(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a worker does with its rank: two workers on each of four devices, whatever their names are."""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,5,GPU-a,GPU-b")
    wanted = layout(Resources(gpus="4", students_per_gpu=2))
    assert wanted == Layout(8, ("4", "5", "GPU-a", "GPU-b"))
    seen = []
    for rank in range(8):
        monkeypatch.setenv("PARSL_WORKER_RANK", str(rank))
        fleet.pin(wanted.devices, 2)
        seen.append(os.environ["CUDA_VISIBLE_DEVICES"])
    assert seen == ["4", "4", "5", "5", "GPU-a", "GPU-a", "GPU-b", "GPU-b"]


def listening(processes: list[psutil.Process]) -> set[str]:
    connections = [c for process in processes for c in process.net_connections() if c.status == psutil.CONN_LISTEN]
    return {c.laddr.ip.removeprefix("::ffff:") for c in connections}


def test_workers_outlive_a_killed_one_and_end_with_the_fleet(
    tiny_npz: Path, tmp_path: Path, mark: Callable[[], list[psutil.Process]]
) -> None:
    crew = ParslFleet(Layout(2, ()), tmp_path)
    task = {"study": to_dict(Study(data=str(tiny_npz))), "run_dir": str(tmp_path), "device": "cpu"}
    try:
        first = crew.submit("run_probe", task).result(timeout=120)
        assert len(first["classes"]) == 3
        assert listening([psutil.Process(), *mark()]) == {"127.0.0.1"}
        # A task on a worker that dies is tried again on another.
        running = [crew.submit("run_probe", task) for _ in range(6)]
        # The largest of the spawned processes is the worker that has loaded torch and the data.
        spawned = [p for p in mark() if "spawn_main" in " ".join(p.cmdline())]
        max(spawned, key=lambda p: p.memory_info().rss).send_signal(signal.SIGKILL)
        assert all(future.result(timeout=120) == first for future in running)
    finally:
        crew.close()
    deadline = time.monotonic() + 30
    while mark() and time.monotonic() < deadline:
        time.sleep(0.2)
    assert mark() == []


def test_an_error_of_a_task_comes_back_as_itself(tmp_path: Path) -> None:
    crew = fleet.open_fleet(Layout(1, ()), tmp_path)
    task = {"study": to_dict(Study(data=str(tmp_path / "none.npz"))), "run_dir": str(tmp_path), "device": "cpu"}
    with pytest.raises((UsageError, EnvironmentUnusable), match="none.npz"):
        crew.submit("run_probe", task).result()
