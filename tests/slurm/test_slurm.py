"""Searches on a two-node Slurm cluster with simulated GPUs (make test-slurm)."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from engine.search.journal import read_journal
from engine.trial import Evaluation

ROOT = Path(__file__).resolve().parents[2]
CROWD = [sys.executable, str(Path(__file__).with_name("crowd.py"))]
CLI = [sys.executable, str(ROOT / "cli.py")]
JOBS = ["--executor=slurm", "--time=00:30:00", "--cpus=1", "--max-nodes=2"]
SMALL = [
    "--space=nasbench201:channels=4,cells=1",
    "--batch-size=16",
    "--teacher-epochs=1",
    "--low.fraction=1/2",
    "--low.epochs=6",
    "--high.epochs=16",
    "--max-low=8",
    "--max-high=3",
    "--students-per-gpu=2",
    "--device=cpu",
    "--progress=lines",
]


@pytest.mark.parametrize(("flags", "each"), [(["--gpus=8"], 1), (["--gpus=2", "--workers=4"], 2)])
def test_each_worker_of_an_allocation_has_a_gpu(flags: list[str], each: int, slurm: Any, tmp_path: Path) -> None:
    """A driver in a two-node job uses both nodes, through srun; every GPU has exactly its own workers."""
    job = slurm.batch([*CROWD, str(tmp_path), *flags], tmp_path / "out", "--nodes=2", "--gpus-per-node=8")
    slurm.until(lambda: slurm.state(job) in ("COMPLETED", "FAILED"), "the workers have met", 300)
    assert slurm.state(job) == "COMPLETED", (tmp_path / "out").read_text()
    met = json.loads((tmp_path / "out").read_text().splitlines()[-1])
    places = Counter((worker["SLURMD_NODENAME"], worker["CUDA_VISIBLE_DEVICES"]) for worker in met)
    gpus = 8 if each == 1 else 2
    assert places == {(node, str(gpu)): each for node in ("n1", "n2") for gpu in range(gpus)}


def test_several_jobs_can_share_a_node(slurm: Any, tmp_path: Path) -> None:
    """Each job runs two workers on the GPU that Slurm assigned to it, which is its first."""
    flags = [*JOBS, "--gpus=1", "--workers=2", "--max-nodes=3", "--job-options=--nodelist=n1"]
    with open(tmp_path / "out", "w") as out:
        driver = subprocess.Popen([*CROWD, str(tmp_path), *flags], stdout=out)
    try:
        slurm.until(lambda: len(slurm.jobs()) == 3, "there are three jobs")
        slurm.until(lambda: (tmp_path / "out").read_text() or driver.poll(), "the workers have met", 300)
    finally:
        driver.kill()
    met = json.loads((tmp_path / "out").read_text())
    assert Counter(worker["CUDA_VISIBLE_DEVICES"] for worker in met) == {"0": 2, "1": 2, "2": 2}


def test_a_killed_driver_leaves_no_job_behind(slurm: Any, tmp_path: Path) -> None:
    """Neither a running nor a queued one. Here one is queued, since another job has all GPUs of the second node."""
    holder = slurm.batch(["sleep", "600"], tmp_path / "held", "--nodelist=n2", "--gres=gpu:8")
    slurm.until(lambda: slurm.state(holder) == "RUNNING", "the GPUs are taken")
    flags = [*JOBS, "--gpus=8", "--workers=8"]
    driver = subprocess.Popen([*CROWD, str(tmp_path), *flags])
    try:
        slurm.until(lambda: len(slurm.jobs()) == 3, "two jobs are submitted")
        of_driver = [job for job in slurm.jobs() if job != holder]
        slurm.until(
            lambda: {slurm.state(job) for job in of_driver} == {"PENDING", "RUNNING"}, "one runs, one is queued"
        )
        slurm.until(lambda: len(list((tmp_path / "meeting").glob("*"))) == 8, "the workers of one run")
    finally:
        driver.send_signal(signal.SIGKILL)
    slurm.until(lambda: slurm.jobs() == [holder], "the jobs are gone", 30)
    slurm.until(lambda: not slurm.tasks(besides=holder), "the workers are gone", 30)


def measured(run_dir: Path) -> list[Evaluation]:
    record = run_dir / "journal.jsonl"
    return list(read_journal(record).answers.values()) if record.exists() else []


def answers(run_dir: Path) -> dict[tuple[str, str, int], Any]:
    """The status and accuracy of each architecture at each fidelity and seed of a run."""
    found = measured(run_dir)
    assert len({evaluation.trial for evaluation in found}) == len(found), "a trial was evaluated twice"
    return {(str(e.trial.architecture), e.trial.fidelity.name, e.trial.seed): (e.status, e.accuracy) for e in found}


def winner(run_dir: Path) -> Any:
    result = json.loads((run_dir / "result.json").read_text())
    return result["status"], result["winner"]["architecture"], result["winner"]["test_accuracy"]


@pytest.fixture(scope="module")
def unbroken(tiny_npz: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run folder of the same search on this machine only, with the same number of workers."""
    run_dir = tmp_path_factory.mktemp("unbroken") / "run"
    command = [*CLI, "search", *SMALL, f"--data={tiny_npz}", f"--run-dir={run_dir}", "--workers=2"]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, timeout=600)
    return run_dir


def test_a_search_on_jobs_survives_the_loss_of_a_node(
    slurm: Any, tiny_npz: Path, unbroken: Path, tmp_path: Path
) -> None:
    """The search grows to both nodes, one of them loses power, and the result is that of the unbroken search."""
    run_dir = tmp_path / "run"
    # A node has room for only one job with this many cores.
    flags = [*SMALL, *JOBS, f"--data={tiny_npz}", f"--run-dir={run_dir}", "--workers=1", "--cpus=20"]
    driver = subprocess.Popen([*CLI, "search", *flags], stdout=subprocess.DEVNULL)
    try:
        slurm.until(lambda: len({slurm.job(job)["NodeList"] for job in slurm.jobs()} & {"n1", "n2"}) == 2, "two nodes")
        slurm.until(lambda: len(places(run_dir)) == 2, "both have answered", 480)
        slurm.lose_node("n2")
        assert driver.poll() is None, "the search ended before the node was lost"
        assert driver.wait(600) == 0
    finally:
        driver.kill()
    assert answers(run_dir) == answers(unbroken)
    assert winner(run_dir) == winner(unbroken)
    slurm.until(lambda: slurm.jobs() == [], "no job is left", 60)


def places(run_dir: Path) -> set[str]:
    """The pools that have answered: an answer names its worker as machine, job and rank."""
    return {e.worker.rpartition("/")[0] for e in measured(run_dir)}


def submit(data: Path, run_dir: Path, *flags: str) -> str:
    """Submits a search as a job; returns its number."""
    command = [*CLI, "submit", "slurm", *SMALL, f"--data={data}", f"--run-dir={run_dir}", "--cpus=1", "--go", *flags]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    return str(json.loads(done.stdout)["job"])


def run_again(slurm: Any, job: str, times: int) -> None:
    """Waits until a job has been requeued `times` times, and starts it at once; Slurm itself waits two minutes."""
    slurm.until(lambda: slurm.job(job)["Restarts"] == str(times), f"requeued {times} times", 300)
    slurm.until(lambda: slurm.state(job) == "PENDING", "the job has left its nodes")
    time.sleep(3)  # slurmd refuses a job that restarts within a second of its end
    slurm.run("scontrol", "update", f"job={job}", "StartTime=now", "TimeLimit=60")
    slurm.until(lambda: slurm.state(job) == "RUNNING", "the job runs again")


def test_a_two_node_job_that_is_warned_and_preempted_comes_to_the_same_end(
    slurm: Any, tiny_npz: Path, unbroken: Path, tmp_path: Path
) -> None:
    """Before the time limit, Slurm warns the script, the search drains, and the script requeues the job. Preemption
    requeues it with no warning except TERM. Workers of both nodes take part, through srun."""
    run_dir = tmp_path / "run"
    job = submit(tiny_npz, run_dir, "--nodes=2", "--workers=1", "--time=01:00:00", "--grace-s=90")
    printed = run_dir / f"slurm-{job}.out"
    slurm.until(lambda: len(answers(run_dir)) >= 3, "three answers", 480)
    # Slurm checks time limits twice a minute; the search must not end before that.
    workers = [task for task in slurm.tasks() if "engine.fleet.worker" in task.cmdline()]
    for worker in workers:
        worker.suspend()
    hours, minutes, seconds = map(int, slurm.job(job)["RunTime"].split(":"))
    slurm.run("scontrol", "update", f"job={job}", f"TimeLimit={60 * hours + minutes + (2 if seconds > 10 else 1)}")
    slurm.until(lambda: "USR1: starting nothing new" in printed.read_text(), "the search was warned")
    for worker in workers:
        worker.resume()
    run_again(slurm, job, 1)
    before = len(answers(run_dir))
    slurm.until(lambda: len(answers(run_dir)) > before, "the search goes on", 480)
    slurm.run("scontrol", "requeue", job)
    run_again(slurm, job, 2)
    slurm.until(lambda: slurm.state(job) not in ("RUNNING", "COMPLETING"), "the search ends", 600)
    assert slurm.state(job) == "COMPLETED", printed.read_text()
    assert printed.read_text().count("resuming:") == 2
    assert answers(run_dir) == answers(unbroken)
    assert winner(run_dir) == winner(unbroken)


def test_a_cancelled_job_stays_cancelled(slurm: Any, tiny_npz: Path, tmp_path: Path) -> None:
    """TERM makes the search drain and exit with 75, as the warning does; the script tells them apart."""
    job = submit(tiny_npz, tmp_path / "run", "--workers=2", "--time=01:00:00")
    slurm.until(lambda: slurm.state(job) == "RUNNING", "the job runs")
    printed = tmp_path / "run" / f"slurm-{job}.out"
    slurm.until(lambda: printed.exists() and "run folder" in printed.read_text(), "the search has begun")
    slurm.run("scancel", job)
    slurm.until(lambda: not slurm.jobs(), "the job is gone")
    assert slurm.state(job) == "CANCELLED"
    assert slurm.job(job)["Restarts"] == "0"
