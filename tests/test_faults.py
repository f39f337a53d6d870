"""How a search survives faults: killed workers and drivers, tasks that hang, full disks."""

from __future__ import annotations

import os
import random
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from tests.searches import finish, measured, processes, read, search, start, until, winner

RUNS = int(os.environ.get("FAULTS_RUNS", "2"))  # make test-faults takes 50: 100 kills
root = pytest.mark.skipif(os.geteuid() != 0, reason="mounting a small file system needs root")


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run folder of an undisturbed search."""
    folder = tmp_path_factory.mktemp("whole")
    search(folder)
    return folder


@pytest.mark.parametrize("seed", range(RUNS))
def test_a_search_killed_at_any_moment_comes_to_the_same_end(seed: int, whole: Path, tmp_path: Path) -> None:
    """The worker and the driver are killed once each. Two kills of the worker could hit the same trial, and end it."""
    chance = random.Random(seed)
    attempts = (tmp_path / str(number) for number in range(10))
    run_dir = next(folder for folder in attempts if killed_twice(folder, chance))
    assert measured(run_dir) == measured(whole)
    assert winner(run_dir) == winner(whole)


def killed_twice(run_dir: Path, chance: random.Random) -> bool:
    """Runs a search to its end, killing its worker and its driver on the way; False if a kill came too late."""
    process = start(run_dir, TRIAL_S="0.1")
    for victim in chance.sample(["driver", "worker"], 2):
        wait_a_while(run_dir, process, chance)
        if process.poll() is not None:
            return False
        if victim == "worker":
            processes(run_dir, "engine.fleet.worker")[0].kill()
            continue
        process.kill()
        process.communicate()
        until(lambda: not processes(run_dir), 30)
        process = start(run_dir, TRIAL_S="0.1")
    finish(process)
    return True


def wait_a_while(run_dir: Path, process: subprocess.Popen[str], chance: random.Random) -> None:
    """Waits until a random moment when there is a worker, mostly after the first trials were asked."""
    if chance.random() < 0.7:
        until(lambda: bool(read(run_dir).asked) or process.poll() is not None)
    time.sleep(chance.uniform(0, 2))
    until(lambda: bool(processes(run_dir, "engine.fleet.worker")) or process.poll() is not None)


def test_after_killing_a_worker_and_the_driver_nothing_is_left_running_lost_or_duplicated(tmp_path: Path) -> None:
    """With two workers, so through Parsl, whose processes end too."""
    process = start(tmp_path, "--workers=2", TRIAL_S="0.3")
    until(lambda: len(processes(tmp_path, "engine.fleet.worker")) == 2 and bool(read(tmp_path).asked))
    processes(tmp_path, "engine.fleet.worker")[0].kill()
    until(lambda: len(read(tmp_path).answers) > 2)
    between = psutil.Process(process.pid).children(recursive=True)  # the title of Parsl's interchange hides the run
    process.kill()
    process.communicate()
    until(lambda: not processes(tmp_path) and not any(child.is_running() for child in between), 30)
    before = read(tmp_path).answers
    search(tmp_path)
    after = read(tmp_path).answers
    assert measured(tmp_path)
    assert {number: after[number] for number in before} == before
    assert all(answer.ok for answer in after.values())


def test_failed_trials_are_recorded_and_the_others_go_on(tmp_path: Path) -> None:
    search(tmp_path, "--max-failures=50", "--max-low=6", "--max-high=1", FAULTS="kill=0,memory=2")
    statuses = {"0": "crashed", "1": "ok", "2": "oom", "3": "ok"}
    answers = [answer for answer in read(tmp_path).answers.values() if len(set(answer.trial.architecture.choices)) > 1]
    for answer in answers:
        assert answer.status == statuses[str(answer.trial.architecture)[0]], answer.error
        assert answer.ok or answer.error
    assert {answer.status for answer in answers} == set(statuses.values())


def test_when_all_trials_fail_the_search_ends_with_exit_code_4(tmp_path: Path) -> None:
    _, err = search(tmp_path, "--max-failures=3", code=4, FAULTS="mistake=*")
    assert "3 evaluations in a row failed" in err
    assert "this network cannot be built" in err


def test_one_run_folder_has_one_driver(tmp_path: Path) -> None:
    process = start(tmp_path, FAULTS="hang=*")
    until(lambda: bool(read(tmp_path).asked))
    _, err = search(tmp_path, code=2)
    assert "another search is running" in err
    assert process.poll() is None
    process.kill()
    process.communicate()
    until(lambda: not processes(tmp_path), 30)


def test_a_torn_last_line_is_dropped_and_a_broken_one_in_the_middle_is_named(whole: Path, tmp_path: Path) -> None:
    lines = (whole / "journal.jsonl").read_bytes().splitlines(keepends=True)
    for name in ("config.yaml", "run.json"):
        (tmp_path / name).write_bytes((whole / name).read_bytes())
    path = tmp_path / "journal.jsonl"
    path.write_bytes(b"".join([*lines[:4], b'{"asked": {"num\n', *lines[5:]]))
    _, err = search(tmp_path, code=3)
    assert "line 5: not a line that this program wrote" in err
    path.write_bytes(b"".join([*lines[:7], lines[7][:20]]))
    search(tmp_path)
    assert measured(tmp_path) == measured(whole)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of its own with hardly any space."""
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=60k", "tmpfs", str(tmp_path)], check=True)
    yield tmp_path
    subprocess.run(["umount", "--lazy", str(tmp_path)], check=True)


@root
def test_a_full_disk_ends_the_search_and_with_more_space_it_resumes(whole: Path, small_disk: Path) -> None:
    _, err = search(small_disk, code=3)
    assert "cannot write" in err
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    _, err = search(small_disk, code=3)
    assert "Read-only file system" in err
    subprocess.run(["mount", "-o", "remount,rw,size=50m", str(small_disk)], check=True)
    search(small_disk)
    assert measured(small_disk) == measured(whole)
    assert winner(small_disk) == winner(whole)


