"""The overhead of a search: its loop, journal, Parsl and supervisors, measured with trials that only sleep.

    python -m bench.bench_fleet overhead --workers 64 --trials 10000
    python -m bench.bench_fleet occupancy --workers 8 --trials 320 --seconds 2
    python -m bench.bench_fleet replay --trials 1000000

Everything is what a search uses (engine/search/loop.py, the dispatcher, the journal with a sync per line, Parsl,
supervisors, worker processes and their pipes), except that a worker imports this file instead of
engine/training/run_tasks.py: no torch, and a trial that sleeps. The method proposes random members of a space. Prints
one JSON line.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from engine.config import Resources, SearchConfig, slots_for
from engine.tasks import TrialsTask, WorkerSettings, task_from_json
from engine.trial import Architecture, Evaluation, Fidelity, History, Trial, evaluation_to_json, trial_to_json

if TYPE_CHECKING:
    from engine.fleet.fleet import Fleet

HIGH = Fidelity("high", epochs=1)
COSTS = {"setup": 0.1, "data": 1.0, "teacher": 1.0, "train": 9.0, "evaluate": 0.2, "images_per_s": 1e4}
SLEEP_S = "BENCH_SLEEP_S"  # environment variable: how long a trial sleeps
Figures = dict[str, float]


def run_trials(payload: dict[str, Any]) -> list[dict[str, Any]]:
    """The task of this bench, on a worker: sleeps, then returns an evaluation for each trial."""
    task = task_from_json(TrialsTask, payload)
    started = time.time()
    time.sleep(float(os.environ[SLEEP_S]))
    worker, seconds = os.environ["MFKD_WORKER"], time.time() - started
    return [evaluation_to_json(answer(trial, worker=worker, started=started, seconds=seconds)) for trial in task.trials]


def answer(trial: Trial, **more: Any) -> Evaluation:
    """An evaluation with as many fields as a real one."""
    return replace(Evaluation(trial, "ok", 0.5, costs=COSTS, macs=10**7, params=10**5, device="none"), **more)


def trial(number: int) -> Trial:
    return Trial(number, Architecture(tuple((number * 7919 >> shift) % 8 for shift in range(0, 30, 2))), HIGH)


def search(workers: int, trials: int, seconds: float, run_dir: Path) -> Figures:
    """A search of `trials` trials on simulated GPUs: its times and occupancy."""
    from engine.fleet.devices import Layout
    from engine.fleet.fleet import open_fleet

    devices = tuple(str(device) for device in range(workers))
    os.environ[SLEEP_S] = str(seconds)
    begun = time.time()
    fleet = open_fleet(Resources(), Layout(workers, devices, "cuda"), run_dir / "logs", module="bench.bench_fleet")
    try:
        with timed() as driver:
            done = drive(fleet, workers, trials, run_dir)
    finally:
        fleet.close()
    assert len(done) == trials, "trials were lost: nothing is timed"
    assert all(evaluation.ok for evaluation in done), "trials failed: nothing is timed"
    parsl = resource.getrusage(resource.RUSAGE_CHILDREN)
    wall_s, cpu_s = driver()
    first, last = min(e.started for e in done), max(e.started + e.seconds for e in done)
    return {
        "workers": len({e.worker for e in done}),
        "trials": len(done),
        "wall_s": round(wall_s, 2),
        "to_first_trial_s": round(first - begun, 2),
        "ms_per_trial": round(1000 * (last - first) / trials, 3),
        "driver_cpu_ms_per_trial": round(1000 * cpu_s / trials, 3),
        "driver_cpu_share_of_a_core": round(cpu_s / wall_s, 4),
        "parsl_cpu_ms_per_trial": round(1000 * (parsl.ru_utime + parsl.ru_stime) / trials, 3),
        "occupancy": round(occupancy(done, workers, seconds), 4),
    }


def drive(fleet: Fleet, workers: int, trials: int, run_dir: Path) -> list[Evaluation]:
    """Runs the search's own loop over a fleet until all trials are answered."""
    from engine.search.dispatch import Cohorts, Dispatcher
    from engine.search.journal import Journal
    from engine.search.loop import VirtualWorkers
    from engine.search.loop import drive as loop

    def propose(history: History, free: int) -> list[Trial]:
        return [trial(history.asked + place) for place in range(min(free, trials - history.asked))]

    cohorts = Cohorts(WorkerSettings(SearchConfig(), run_dir, "cuda"), run_dir / "teacher", 1)
    virtual = VirtualWorkers(slots_for(workers, 1).total, cost=lambda trial: 1.0)
    with Journal(run_dir / "journal.jsonl") as journal:
        dispatcher = Dispatcher(fleet, cohorts, journal, {}, received=lambda evaluation: None)
        return loop(propose, dispatcher, virtual, asked=journal.ask).answered


@contextmanager
def timed() -> Iterator[Callable[[], tuple[float, float]]]:
    """Times a block: the function it yields returns seconds of wall time and of CPU time, once the block has ended."""
    start, cpu = time.perf_counter(), time.process_time()
    spent: list[float] = []
    yield lambda: (spent[0], spent[1])
    spent += [time.perf_counter() - start, time.process_time() - cpu]


def occupancy(done: list[Evaluation], workers: int, seconds: float) -> float:
    """The fraction of the workers' time spent in trials.

    With trials that take time, it leaves out the first 10 s, in which workers start, and the last two trials' length,
    in which the first workers run out of trials.
    """
    start, end = min(e.started for e in done), max(e.started + e.seconds for e in done)
    if seconds:
        start, end = start + 10, end - 2 * seconds
    busy = sum(max(0.0, min(e.started + e.seconds, end) - max(e.started, start)) for e in done)
    return busy / (end - start) / workers


def replay(trials: int, run_dir: Path) -> Figures:
    """Reads a journal of `trials` evaluations, written as a search writes it but without the syncs."""
    from engine.search.journal import SCHEMA, read_journal

    path = run_dir / "journal.jsonl"
    with open(path, "w") as lines:
        lines.write(json.dumps({"journal": SCHEMA}) + "\n")
        for number in range(trials):
            asked = trial(number)
            lines.write(json.dumps({"asked": trial_to_json(asked), "seen": number}, separators=(",", ":")) + "\n")
            answered = evaluation_to_json(answer(asked, worker="host/0/0", started=1.7e9, seconds=12.3))
            lines.write(json.dumps({"answered": answered}, separators=(",", ":")) + "\n")
    with timed() as reading:
        record = read_journal(path)
    assert len(record.answers) == trials
    wall_s, cpu_s = reading()
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
    return {
        "evaluations": trials,
        "megabytes": round(path.stat().st_size / 1e6),
        "seconds": round(wall_s, 2),
        "cpu_seconds": round(cpu_s, 2),
        "peak_memory_gb": round(memory, 2),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["overhead", "occupancy", "replay"])
    parser.add_argument("--workers", type=int, default=8)
    parser.add_argument("--trials", type=int, default=1000)
    parser.add_argument("--seconds", type=float, default=0.0)
    options = parser.parse_args()
    before = os.getloadavg()[0]
    with tempfile.TemporaryDirectory() as folder:
        if options.what == "replay":
            figures = replay(options.trials, Path(folder))
        else:
            figures = search(options.workers, options.trials, options.seconds, Path(folder))
    machine = {"cores": len(os.sched_getaffinity(0)), "load_before": before, "load_after": os.getloadavg()[0]}
    print(json.dumps({"what": options.what, **figures, **machine}))


if __name__ == "__main__":
    main()
