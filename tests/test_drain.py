"""Stopping a search: running trials finish or keep their state, and the same command resumes it."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from engine import stop_files
from engine.config import SearchConfig
from engine.fleet.deadline import remaining
from engine.tasks import TrialsTask, WorkerSettings, task_to_json
from engine.training import run_tasks
from engine.trial import Architecture, Drained, Fidelity, Trial, UsageError, evaluation_from_json
from tests.searches import finish, measured, processes, read, search, start, until, winner

pytestmark = pytest.mark.usefixtures("heard")
SPACE = "nasbench201:channels=4,cells=1"
RUNS = int(os.environ.get("DRAIN_RUNS", "1"))  # make test-faults takes 20
LONG = ("--high.epochs=30",)  # so that there is something to be stopped


def test_a_full_training_stops_after_its_epoch_and_resumes_to_the_same_end(
    tiny_npz: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    low, high = Fidelity("low", epochs=1), Fidelity("high", epochs=3)
    config = SearchConfig(space=SPACE, data=str(tiny_npz), batch_size=16, low=low, high=high)
    trial = Trial(0, Architecture((3, 1, 2, 0, 3, 1)), high)

    def accuracy(name: str) -> float:
        task = TrialsTask(WorkerSettings(config, tmp_path / name, "cpu"), (trial,), tmp_path / "no-teacher")
        (answer,) = run_tasks.run_trials(json.loads(json.dumps(task_to_json(task))))
        return evaluation_from_json(answer).accuracy

    whole = accuracy("whole")
    folder = stop_files.create(tmp_path)
    monkeypatch.setenv("MFKD_STOP_FILES", str(folder))
    stop_files.drain(folder)
    for done in (1, 2):
        with pytest.raises(Drained, match=f"epoch {done} of 3"):
            accuracy("drained")
    assert accuracy("drained") == whole  # a training that has reached its last epoch is scored


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run folder of an uninterrupted search."""
    folder = tmp_path_factory.mktemp("whole")
    search(folder, *LONG)
    return folder


@pytest.mark.parametrize("seed", range(RUNS))
def test_a_signal_drains_and_the_same_command_comes_to_the_same_end(seed: int, whole: Path, tmp_path: Path) -> None:
    """Any of the five signals, at a random moment, sent to the driver alone or to all of its processes."""
    chance, grace = random.Random(seed), 60
    process = start(tmp_path, *LONG, f"--grace-s={grace}", TRIAL_S="0.2")
    until(lambda: bool(read(tmp_path).answers) or process.poll() is not None)
    time.sleep(chance.uniform(0, 3))
    number = chance.choice([signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2])
    told = time.monotonic()
    for target in processes(tmp_path) if chance.random() < 0.5 else [process]:
        target.send_signal(number)
    result, err = finish(process, 75)
    assert time.monotonic() - told < grace
    assert result == {"run_dir": str(tmp_path), "status": "drained"}
    assert f"{number.name}: starting nothing new; running trials have {grace} s to finish" in err
    assert f"interrupted by {number.name}; run the same command again to resume" in err
    assert processes(tmp_path) == []
    before = read(tmp_path).answers
    search(tmp_path, *LONG)
    assert {number: read(tmp_path).answers[number] for number in before} == before
    assert measured(tmp_path) == measured(whole)
    assert winner(tmp_path) == winner(whole)


def test_after_the_grace_period_running_trials_are_dropped(tmp_path: Path) -> None:
    process = start(tmp_path, "--grace-s=1", "--workers=2", FAULTS="hang=*")
    until(lambda: (tmp_path / "hangs").exists())
    process.send_signal(signal.SIGUSR1)
    assert finish(process, 75)[0]["status"] == "drained"
    until(lambda: processes(tmp_path) == [], 30)
    assert read(tmp_path).answers == {}


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_second_signal_stops_at_once(number: int, code: int, tmp_path: Path) -> None:
    process = start(tmp_path, "--grace-s=1000", FAULTS="hang=*")
    until(lambda: (tmp_path / "hangs").exists())
    process.send_signal(number)
    time.sleep(1)
    assert process.poll() is None
    process.send_signal(number)
    finish(process, code)
    assert processes(tmp_path) == []


DEAF = """
import signal, threading, time
from concurrent.futures import Future
from engine.fleet.drain import answer_of

future = Future()
signal.signal(signal.SIGUSR1, lambda *call: future.set_result("heard"))

def beside():
    time.sleep(0.3)
    signal.pthread_kill(threading.get_ident(), signal.SIGUSR1)

threading.Thread(target=beside).start()
print(answer_of(future))
"""


def test_a_signal_that_does_not_wake_the_main_thread_is_still_handled() -> None:
    """Like one that comes just before the thread starts to wait; here another thread receives it."""
    done = subprocess.run([sys.executable, "-c", DEAF], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout == "heard\n"


def test_signals_ignored_from_the_start_stay_ignored(tmp_path: Path) -> None:
    """A search under nohup survives a logout; one started in the background by a script survives Ctrl-C."""
    before = {number: signal.signal(number, signal.SIG_IGN) for number in (signal.SIGHUP, signal.SIGINT)}
    process = start(tmp_path, "--grace-s=1", FAULTS="hang=*")
    for number, handler in before.items():
        signal.signal(number, handler)
    until(lambda: (tmp_path / "hangs").exists())
    for number in (signal.SIGHUP, signal.SIGINT, signal.SIGTERM):
        process.send_signal(number)
    err = finish(process, 75)[1]
    assert "interrupted by SIGTERM" in err
    assert "SIGHUP" not in err
    assert "SIGINT" not in err


def test_a_time_limit_drains(tmp_path: Path) -> None:
    result, err = search(tmp_path, "--time-limit=1.5", "--grace-s=1", code=75)
    assert result["status"] == "drained"
    assert "interrupted by the time limit" in err


def test_the_time_limit_is_seconds_or_what_slurm_says() -> None:
    assert remaining("90000", time.monotonic() - 100, {}) == pytest.approx(89900, abs=60)  # since the call began
    assert remaining("none", 0.0, {"SLURM_JOB_ID": "7", "SLURM_JOB_END_TIME": "1"}) is None
    assert remaining("auto", 0.0, {}) is None
    end = time.time() + 600
    told = remaining("auto", 0.0, {"SLURM_JOB_ID": "7", "SLURM_JOB_END_TIME": str(int(end))})
    assert told == pytest.approx(600, abs=5)
    for wrong in ("soon", "-1", "0", "nan"):
        with pytest.raises(UsageError, match="write auto, none, or seconds"):
            remaining(wrong, 0.0, {})


@pytest.mark.parametrize(
    ("variable", "command", "answer"),
    [
        ("SLURM_JOB_ID", "squeue -h -j 7 -o %e", "%Y-%m-%dT%H:%M:%S"),
        ("LSB_JOBID", "bjobs -noheader -o time_left 7", "0:10 L"),
        (
            "PBS_JOBID",
            "qstat -f -F json 7",
            '{"Jobs": {"7.a": {"stime": "%a %b %d %H:%M:%S %Y", "Resource_List": {"walltime": "00:00:00"}}}}',
        ),
    ],
)
def test_the_scheduler_is_asked_for_the_end(
    variable: str, command: str, answer: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stand-ins for the schedulers' programs check their arguments and answer in the documented format."""
    name, _, arguments = command.partition(" ")
    said = time.strftime(answer, time.localtime(time.time() + 600))
    (tmp_path / name).write_text(f"#!/bin/sh\n[ \"$*\" = '{arguments}' ] && echo '{said}'\n")
    (tmp_path / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    assert remaining("auto", 0.0, {variable: "7"}) == pytest.approx(600, abs=5)
    (tmp_path / name).write_text("#!/bin/sh\necho N/A\n")
    assert remaining("auto", 0.0, {variable: "7"}) is None
