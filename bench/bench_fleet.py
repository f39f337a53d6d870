"""What the search's own machinery costs: the loop, the journal, Parsl and supervisors, with trials that do nothing.

    python -m bench.bench_fleet overhead --workers 64 --trials 10000
    python -m bench.bench_fleet occupancy --workers 8 --trials 320 --seconds 2
    python -m bench.bench_fleet replay --trials 1000000

Everything is what a search uses (engine/search/loop.py, dispatch, journal with a sync per line, Parsl, supervisors,
worker processes and their pipes), except that a worker imports this file in the place of engine/training/evaluate.py:
no torch, and a trial that sleeps. The policy asks for random members of a space. Prints one JSON line.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

from engine.trial import Architecture, Evaluation, Fidelity, Trial, evaluation_to_json, trial_from_json

HIGH = Fidelity("high", epochs=1)
COSTS = {"setup": 0.1, "data": 1.0, "teacher": 1.0, "train": 9.0, "evaluate": 0.2, "images_per_s": 1e4}


def run_trials(task: dict[str, Any]) -> list[dict[str, Any]]:
    """The trial of this bench, on a worker."""
    started = time.time()
    time.sleep(task["seconds"])
    worker, seconds = os.environ["MFKD_WORKER"], time.time() - started
    trials = [trial_from_json(trial) for trial in task["trials"]]
    return [evaluation_to_json(answer(trial, worker=worker, started=started, seconds=seconds)) for trial in trials]


def answer(trial: Trial, **more: Any) -> Evaluation:
    """An evaluation as long as a real one."""
    return replace(Evaluation(trial, "ok", 0.5, costs=COSTS, macs=10**7, params=10**5, device="none"), **more)


def trial(number: int) -> Trial:
    return Trial(number, Architecture(tuple((number * 7919 >> shift) % 8 for shift in range(0, 30, 2))), HIGH)


def drive(workers: int, trials: int, seconds: float, run_dir: Path) -> dict[str, float]:
    """A search of `trials` trials on pretended GPUs: seconds of its parts, and what they make."""
    from engine import config
    from engine.config import Resources
    from engine.fleet.devices import Layout
    from engine.fleet.fleet import open_fleet
    from engine.search.dispatch import Dispatch
    from engine.search.journal import Journal
    from engine.search.loop import drive as loop
    from engine.trial import History

    def propose(history: History, free: int) -> list[Trial]:
        return [trial(history.asked + place) for place in range(min(free, trials - history.asked))]

    devices = tuple(str(device) for device in range(workers))
    begun = time.time()
    fleet = open_fleet(Resources(), Layout(workers, devices, "cuda"), run_dir / "logs", module="bench.bench_fleet")
    try:
        with Journal(run_dir / "journal.jsonl") as book:
            desk = Dispatch(fleet, {"seconds": seconds}, book, {}, 1, HIGH, lambda evaluation: None)
            start, cpu = time.time(), time.process_time()
            slots = config.slots(workers, 1).total
            history = loop(propose, slots, desk.submit, lambda one: 1.0, asked=book.ask, flush=desk.flush)
            wall, cpu = time.time() - start, time.process_time() - cpu
    finally:
        fleet.close()
    helpers = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = history.answered
    assert len(done) == trials, "trials were lost: nothing is timed"
    assert all(e.ok for e in done), "trials failed: nothing is timed"
    first, last = min(e.started for e in done), max(e.started + e.seconds for e in done)
    # Once every worker has begun, and before the first has nothing left to do.
    begun_all, ended_one = (first + 10, last - 2 * seconds) if seconds else (first, last)
    busy = sum(max(0.0, min(e.started + e.seconds, ended_one) - max(e.started, begun_all)) for e in done)
    return {
        "workers": len({e.worker for e in done}),
        "trials": len(done),
        "wall_s": round(wall, 2),
        "to_first_trial_s": round(first - begun, 2),
        "ms_per_trial": round(1000 * (last - first) / trials, 3),
        "driver_cpu_ms_per_trial": round(1000 * cpu / trials, 3),
        "driver_cpu_share_of_a_core": round(cpu / wall, 4),
        "parsl_cpu_ms_per_trial": round(1000 * (helpers.ru_utime + helpers.ru_stime) / trials, 3),
        "occupancy": round(busy / (ended_one - begun_all) / workers, 4),
    }


def replay(trials: int, run_dir: Path) -> dict[str, float]:
    """Reading a journal of so many evaluations, written as a search writes it but for the syncs."""
    from engine.trial import trial_to_json

    path = run_dir / "journal.jsonl"
    with open(path, "w") as lines:
        lines.write(json.dumps({"journal": SCHEMA}) + "\n")
        for number in range(trials):
            asked = trial(number)
            lines.write(json.dumps({"asked": trial_to_json(asked), "seen": number}, separators=(",", ":")) + "\n")
            answered = evaluation_to_json(answer(asked, worker="host/0/0", started=1.7e9, seconds=12.3))
            lines.write(json.dumps({"answered": answered}, separators=(",", ":")) + "\n")
    start, cpu = time.perf_counter(), time.process_time()
    record = read_journal(path)
    seconds, cpu = time.perf_counter() - start, time.process_time() - cpu
    assert len(record.answers) == trials
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
    return {
        "evaluations": trials,
        "megabytes": round(path.stat().st_size / 1e6),
        "seconds": round(seconds, 2),
        "cpu_seconds": round(cpu, 2),
        "peak_memory_gb": round(memory, 2),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["overhead", "occupancy", "replay"])
    parser.add_argument("--workers", type=int, default=8)
    parser.add_argument("--trials", type=int, default=1000)
    parser.add_argument("--seconds", type=float, default=0.0)
    given = parser.parse_args()
    before = os.getloadavg()[0]
    with tempfile.TemporaryDirectory() as folder:
        if given.what == "replay":
            figures = replay(given.trials, Path(folder))
        else:
            figures = drive(given.workers, given.trials, given.seconds, Path(folder))
    machine = {"cores": len(os.sched_getaffinity(0)), "load_before": before, "load_after": os.getloadavg()[0]}
    print(json.dumps({"what": given.what, **figures, **machine}))


if __name__ == "__main__":
    main()
