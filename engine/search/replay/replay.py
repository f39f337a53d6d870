"""Replays search methods with many seeds: in parallel processes, resumable, with a summary."""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import os
import sys
from collections.abc import Generator
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import closing
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from rich.progress import track

from engine.fleet.processes import die_with, leave_signals_to_the_driver
from engine.search.progress import TolerantConsole
from engine.search.replay.simulate import Replay, SimulatedRun, load_table, simulate, validated_replay
from engine.search.replay.summary import summarise, write_summary


def replay(settings: Replay) -> dict[str, Any]:
    """Replays every method with every seed; returns the JSON object of the command (docs/search.md).

    Writes `curves.csv`, `summary.json` and `curves.png` (if matplotlib is installed) to settings.out. Raises UsageError
    for an unknown method or fidelity, a number out of range, or limits that no architecture meets.
    """
    table = load_table(settings)
    settings = validated_replay(settings, table)
    runs = run_all(settings)
    summary = summarise(settings, table, runs)
    if settings.out is not None:
        write_summary(settings.out, settings, runs, summary)
    return summary


def run_all(settings: Replay) -> list[SimulatedRun]:
    """Every method with every seed, in parallel processes; those that settings.out holds are not repeated.

    `settings` come from `validated_replay`. On a terminal a bar on stderr shows the progress.
    """
    digests = _digests(settings)
    done = _load_runs(settings, digests)
    todo = [(m, s) for s in range(settings.seeds) for m in settings.methods if (m, s) not in done]
    with open(_runs_file(settings) or os.devnull, "a") as file, closing(_simulate_all(settings, todo)) as runs:
        bar: dict[str, Any] = {"console": TolerantConsole(stderr=True), "disable": not sys.stderr.isatty()}
        for run in track(runs, "replay", len(todo), **bar):
            done[run.method, run.seed] = run
            file.write(json.dumps({"settings": digests[run.method], **asdict(run)}) + "\n")
            file.flush()
    return [done[m, s] for m in settings.methods for s in range(settings.seeds)]


def _simulate_all(settings: Replay, todo: list[tuple[str, int]]) -> Generator[SimulatedRun, None, None]:
    processes = settings.processes or os.cpu_count() or 1
    if processes == 1 or len(todo) < 2:
        for method, seed in todo:
            yield simulate(settings, method, seed)
        return
    # There is a process per core: more threads would wait for each other. The libraries of numpy and xgboost read this.
    os.environ |= {"OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"}
    context = multiprocessing.get_context("spawn")  # a fork would copy the threads of libraries in mid-work
    before = set(multiprocessing.active_children())
    pool = ProcessPoolExecutor(min(processes, len(todo)), context, _depend_on, (os.getpid(),))
    try:
        for future in as_completed([pool.submit(simulate, settings, m, s) for m, s in todo]):
            yield future.result()
    except BaseException:  # stopped: by itself, the pool would first finish all that it has started
        pool.shutdown(wait=False, cancel_futures=True)
        for process in set(multiprocessing.active_children()) - before:
            process.kill()
        raise
    pool.shutdown()


def _depend_on(parent: int) -> None:
    """Initialises a process of the pool: it ends with its parent, which alone handles Ctrl-C."""
    leave_signals_to_the_driver()
    die_with(parent)


def _digests(settings: Replay) -> dict[str, str]:
    """By method, a hash of what a run depends on besides its code and its seed: settings and content of the tables."""
    relevant = replace(settings, table=Path(), join=(), seeds=0, at=(), processes=0, out=None)
    contents = [hashlib.sha256(path.read_bytes()).hexdigest() for path in (settings.table, *settings.join)]
    return {
        method: hashlib.sha256(f"{replace(relevant, methods=(method,))}{contents}".encode()).hexdigest()[:16]
        for method in settings.methods
    }


def _runs_file(settings: Replay) -> Path | None:
    return settings.out / "runs.jsonl" if settings.out is not None else None


def _load_runs(settings: Replay, digests: dict[str, str]) -> dict[tuple[str, int], SimulatedRun]:
    """The finished runs with these settings that an earlier replay left in `out`; a truncated line is skipped."""
    path = _runs_file(settings)
    if path is None or not path.exists():
        return {}
    found: dict[tuple[str, int], SimulatedRun] = {}
    for line in path.read_text().splitlines():
        try:
            entry = json.loads(line)
            digest = entry.pop("settings")
            run = SimulatedRun(**{**entry, "curve": tuple((a, b) for a, b in entry["curve"])})
        except (ValueError, KeyError, TypeError):
            continue
        if digests.get(run.method) == digest:
            found[run.method, run.seed] = run
    return found
