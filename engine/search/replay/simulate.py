"""Search methods against a table of recorded results: a simulated clock, the search's own loop, nothing trained."""

from __future__ import annotations

import csv
import hashlib
import json
import math
import multiprocessing
import os
from collections.abc import Generator, Iterable
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from contextlib import closing
from dataclasses import asdict, dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from engine.config import Plan
from engine.fleet.processes import die_with, leave_signals_to_the_driver
from engine.search.loop import TimedHistory, VirtualWorkers, drive
from engine.search.methods.propose import propose, winner
from engine.search.replay import tables
from engine.search.replay.tables import FULL, Table
from engine.trial import EnvironmentUnusable, Evaluation, Fidelity, History, Trial, UsageError

Array = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Replay:
    """What to replay.

    `lows`: names of the table's low fidelities to offer, the main one first; () is all of them. `gpu_hours` and the
    checkpoints `at` are worker-hours: workers times simulated wall time, idle workers included, as a rented machine
    is paid. `max_low` bounds the low-fidelity runs of a search. `noise` is the standard deviation of one full run's
    accuracy around the recorded one, in points, drawn anew for each seed of a trial. `min_macs`, `max_macs` and
    `max_params` bound the architectures. With `until_best` a run ends when the architecture of best validation
    accuracy has been trained. `out` keeps each finished run, so that a replay that was stopped goes on.
    """

    table: Path
    methods: tuple[str, ...] = ("mfkd", "random")
    lows: tuple[str, ...] = ()
    workers: int = 8
    gpu_hours: float = 60.0
    at: tuple[float, ...] = (15.0, 20.0, 60.0)
    seeds: int = 20
    max_low: int = 100
    min_macs: float = 0.0
    max_macs: float = math.inf
    max_params: float = math.inf
    noise: float = 0.0
    until_best: bool = False
    processes: int = 0
    out: Path | None = None


@dataclass(frozen=True)
class SimulatedRun:
    """One simulated search. `curve`: (worker-hours, test accuracy in percent of the incumbent by validation) at each
    change. `recommended`: test accuracy of the final recommendation. `best_at`: worker-seconds until the best of the
    table had been trained in full, inf if it was not. `low`, `full`: evaluations begun."""

    method: str
    seed: int
    curve: tuple[tuple[float, float], ...]
    recommended: float
    best_at: float
    low: int
    full: int

    def at(self, hours: float) -> float:
        """Test accuracy, in percent, of the incumbent at that many worker-hours."""
        return [accuracy for when, accuracy in self.curve if when <= hours][-1]


def replay(settings: Replay) -> dict[str, Any]:
    """Replays every method with every seed; returns the JSON object of the command (docs/surrogate.md), and writes
    `curves.csv`, `summary.json` and `curves.png` (where matplotlib is installed) to settings.out.

    Raises UsageError for an unknown method or fidelity, or constraints that nothing meets.
    """
    table = _table(settings.table, settings.min_macs, settings.max_macs, settings.max_params)
    settings = _checked(settings, table)
    runs = _run_all(settings)
    summary = summarise(settings, table, runs)
    if settings.out is not None:
        write(settings, runs, summary)
    return summary


@dataclass(frozen=True)
class TableEvaluator:
    """Looks every trial up in a table; `noise` as in `Replay`."""

    table: Table
    noise: float

    def submit(self, trial: Trial) -> Future[Evaluation]:
        future: Future[Evaluation] = Future()
        future.set_result(recorded(self.table, trial, self.noise))
        return future

    def flush(self) -> None:
        """Nothing is held back."""


def simulate(settings: Replay, method: str, seed: int) -> SimulatedRun:
    """One search by `method` on the simulated clock."""
    table = _table(settings.table, settings.min_macs, settings.max_macs, settings.max_params)
    full = Fidelity(FULL, epochs=EPOCHS)
    lows = tuple(Fidelity(name, epochs=_epochs(table, name)) for name in settings.lows)
    n = len(table.candidates)
    plan = Plan(lows, full, method, min(settings.max_low, n), n, seed)
    best = int(np.nanargmax(table.valid[FULL]))
    wall = settings.gpu_hours * 3600 / settings.workers

    def stop(history: History) -> bool:
        assert isinstance(history, TimedHistory)
        found = settings.until_best and any(_is(table, e.trial, best) for e in history.answered[-settings.workers :])
        return found or history.now >= wall

    history = drive(
        lambda seen, free: propose(table.candidates, seen, plan, free),
        TableEvaluator(table, settings.noise),
        VirtualWorkers(settings.workers, lambda trial: recorded(table, trial, settings.noise).seconds),
        stop=stop,
    )
    return _summary_of_run(settings, table, plan, history, best)


# Length of the full fidelity; the low ones are as much shorter as the table says they are cheaper.
EPOCHS = 1000


def _epochs(table: Table, low: str) -> int:
    return max(1, round(EPOCHS * float(np.nanmean(table.seconds[low]) / np.nanmean(table.seconds[FULL]))))


def recorded(table: Table, trial: Trial, noise: float) -> Evaluation:
    """The answer that a table gives to a trial; an empty cell is a failed evaluation, at the mean cost if none is
    given. `noise` (points) is added to full accuracies, the same for the same question."""
    row = _row(table, trial)
    name = trial.fidelity.name
    accuracy, seconds = float(table.valid[name][row]), float(table.seconds[name][row])
    seconds = float(np.nanmean(table.seconds[name])) if math.isnan(seconds) else seconds
    if math.isnan(accuracy):
        return Evaluation(trial, "error", seconds=seconds, error="not in the table")
    if noise and name == FULL:
        draw = np.random.default_rng(int(trial.key, 16)).standard_normal()
        accuracy = min(1.0, max(0.0, accuracy + noise / 100 * float(draw)))
    return Evaluation(trial, "ok", accuracy, seconds=seconds, macs=int(table.candidates.macs[row]))


def summarise(settings: Replay, table: Table, runs: Iterable[SimulatedRun]) -> dict[str, Any]:
    """The JSON object: by method and checkpoint the mean, standard error, median and quartiles of test accuracy in
    percent; `seconds_to_best` likewise, in worker-seconds (of runs that did not find it: the budget; `found` is the
    part that did, `wall_mean` the mean in seconds of the simulated clock)."""
    methods: dict[str, Any] = {}
    for method in settings.methods:
        own = [run for run in runs if run.method == method]
        entry: dict[str, Any] = {f"{hours:g}": _spread([run.at(hours) for run in own]) for hours in settings.at}
        entry["recommended"] = _spread([run.recommended for run in own])
        entry["seconds_to_best"] = _until_best(settings, own)
        entry["evaluations"] = {k: float(np.mean([getattr(run, k) for run in own])) for k in ("low", "full")}
        methods[method] = entry
    return {"table": table.name, "optimum": round(100 * float(np.nanmax(table.test)), 4), "methods": methods}


def _until_best(settings: Replay, runs: list[SimulatedRun]) -> dict[str, float]:
    budget = settings.gpu_hours * 3600
    entry = _spread([min(run.best_at, budget) for run in runs], digits=0)
    entry["wall_mean"] = round(entry["mean"] / settings.workers, 1)
    entry["found"] = sum(run.best_at <= budget for run in runs) / len(runs)
    return entry


def write(settings: Replay, runs: list[SimulatedRun], summary: dict[str, Any]) -> None:
    """`summary.json`, `curves.csv` (median and quartiles on a grid of worker-hours) and `curves.png`."""
    assert settings.out is not None
    settings.out.mkdir(parents=True, exist_ok=True)
    (settings.out / "summary.json").write_text(json.dumps(summary, indent=1) + "\n")
    grid = np.linspace(0, settings.gpu_hours, 121)
    curves = {}
    with open(settings.out / "curves.csv", "w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["method", "gpu_hours", "lower_quartile", "median", "upper_quartile", "mean", "stderr"])
        for method in settings.methods:
            values = np.array([[run.at(hours) for hours in grid] for run in runs if run.method == method])
            quartiles = np.quantile(values, (0.25, 0.5, 0.75), axis=0)
            curves[method] = quartiles
            error = values.std(axis=0, ddof=1) / math.sqrt(len(values)) if len(values) > 1 else values.std(axis=0)
            for hours, column, mean, stderr in zip(grid, quartiles.T, values.mean(axis=0), error, strict=True):
                writer.writerow([method, f"{hours:g}", *(f"{v:.3f}" for v in (*column, mean, stderr))])
    _draw(settings.out / "curves.png", grid, curves, summary)


def _draw(path: Path, grid: Array, curves: dict[str, Array], summary: dict[str, Any]) -> None:
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return  # an extra; the CSV has the same figures
    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.subplots()
    for method, (low, middle, high) in curves.items():
        (line,) = axes.plot(grid, middle, label=method)
        axes.fill_between(grid, low, high, color=line.get_color(), alpha=0.15, linewidth=0)
    axes.axhline(summary["optimum"], color="black", linestyle=":", linewidth=1)
    lowest = min(float(np.quantile(low, 0.1)) for low, _, _ in curves.values())
    axes.set(xlabel="GPU-hours", ylabel="test accuracy of the incumbent, %")
    axes.set(title=summary["table"], ylim=(lowest, None))
    axes.legend(loc="lower right", fontsize="small")
    figure.savefig(path, dpi=120)


def _checked(settings: Replay, table: Table) -> Replay:
    from engine.search.methods.propose import ABLATIONS, METHODS

    for method in settings.methods:
        if method not in METHODS and method not in ABLATIONS:
            raise UsageError(f"no method '{method}'; there are {', '.join(METHODS)}")
    for low in settings.lows:
        if low not in table.lows:
            raise UsageError(f"{settings.table} has no low fidelity '{low}'; it has {', '.join(table.lows)}")
    if not table.lows:
        raise UsageError(f"{settings.table} has no low fidelity; a table needs one besides '{FULL}'")
    if settings.workers < 1 or settings.seeds < 1 or settings.gpu_hours <= 0:
        raise UsageError("workers and seeds must be at least 1, gpu-hours over 0")
    if min(settings.processes, settings.max_low, settings.noise, *settings.at) < 0:
        raise UsageError("processes, max-low, noise and the hours of --at must be at least 0")
    if settings.out is not None:
        try:
            settings.out.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise EnvironmentUnusable(f"--out {settings.out} cannot be written: {error}; choose another") from error
    return replace(settings, lows=settings.lows or table.lows)


@lru_cache(maxsize=2)
def _table(path: Path, min_macs: float, max_macs: float, max_params: float) -> Table:
    table = tables.load(path)
    c = table.candidates
    keep = (c.macs >= min_macs) & (c.macs <= max_macs) & (c.params <= max_params)
    if not (keep & ~np.isnan(table.valid[FULL])).any():
        raise UsageError(
            f"no architecture of {path} meets the constraints; its MACs go from {c.macs.min():.4g} to "
            f"{c.macs.max():.4g}, its parameters from {c.params.min():.4g} to {c.params.max():.4g}"
        )
    return table.where(keep)


def _row(table: Table, trial: Trial) -> int:
    row = table.candidates.row(trial.architecture)
    assert row is not None, "a policy asked for what is not a candidate"
    return row


def _is(table: Table, trial: Trial, row: int) -> bool:
    return trial.fidelity.name == FULL and _row(table, trial) == row


def _summary_of_run(settings: Replay, table: Table, plan: Plan, history: TimedHistory, best: int) -> SimulatedRun:
    main = settings.lows[0]
    hour = settings.workers / 3600
    incumbent, value, full_yet = -1, -math.inf, False
    curve = [(0.0, 100 * float(np.nanmean(table.test)))]  # before any answer: any architecture
    best_at = math.inf
    inside = [
        (t, e) for t, e in zip(history.times, history.answered, strict=True) if t * hour <= settings.gpu_hours
    ]
    for time, e in inside:
        row, name = _row(table, e.trial), e.trial.fidelity.name
        if name == FULL and row == best:
            best_at = min(best_at, time * settings.workers)
        # Until there is a full result, the best low-fidelity score is the incumbent.
        if not e.ok or not (name == FULL or (name == main and not full_yet and table.test[row] >= 0)):
            continue  # nor is one the incumbent whose full training is recorded as failed: it has no test accuracy
        if e.accuracy > value or (name == FULL and not full_yet):
            incumbent, value = row, e.accuracy
            curve.append((time * hour, 100 * float(table.test[incumbent])))
        full_yet = full_yet or name == FULL
    chosen = winner(table.candidates, History([e for _, e in inside], []), plan)
    recommended = 100 * float(table.test[_row(table, chosen.trial)]) if chosen else curve[-1][1]
    asked = [e.trial.fidelity.name == FULL for e in history.answered]
    return SimulatedRun(plan.method, plan.seed, tuple(curve), recommended, best_at, asked.count(False), asked.count(True))


def _run_all(settings: Replay) -> list[SimulatedRun]:
    done = _load_runs(settings)
    todo = [(m, s) for s in range(settings.seeds) for m in settings.methods if (m, s) not in done]
    with open(_runs_file(settings) or os.devnull, "a") as keep, closing(_simulate_all(settings, todo)) as runs:
        for run in runs:
            done[run.method, run.seed] = run
            keep.write(json.dumps({"settings": _digest(settings, run.method), **asdict(run)}) + "\n")
            keep.flush()
    return [done[m, s] for m in settings.methods for s in range(settings.seeds)]


def _simulate_all(settings: Replay, todo: list[tuple[str, int]]) -> Generator[SimulatedRun, None, None]:
    processes = settings.processes or os.cpu_count() or 1
    if processes == 1 or len(todo) < 2:
        for method, seed in todo:
            yield simulate(settings, method, seed)
        return
    # A process a core: more threads in each would only wait for each other. Read by numpy's and xgboost's libraries.
    os.environ |= {"OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"}
    context = multiprocessing.get_context("spawn")  # a fork would copy the threads of libraries half way
    before = set(multiprocessing.active_children())
    pool = ProcessPoolExecutor(min(processes, len(todo)), context, _depend_on, (os.getpid(),))
    try:
        for future in as_completed([pool.submit(simulate, settings, m, s) for m, s in todo]):
            yield future.result()
    except BaseException:  # told to stop: a pool would end all that it was given before it lets go
        pool.shutdown(wait=False, cancel_futures=True)
        for process in set(multiprocessing.active_children()) - before:
            process.kill()
        raise
    pool.shutdown()


def _depend_on(parent: int) -> None:
    """What a process of the pool does first: it ends with its parent, which alone answers a Ctrl-C."""
    leave_signals_to_the_driver()
    die_with(parent)


def _digest(settings: Replay, method: str) -> str:
    """What a run depends on besides its method's code and its seed: the table's content and the settings."""
    words = replace(settings, methods=(method,), seeds=0, at=(), processes=0, out=None)
    content = hashlib.sha256(settings.table.read_bytes()).hexdigest()
    return hashlib.sha256(f"{replace(words, table=Path())}{content}".encode()).hexdigest()[:16]


def _runs_file(settings: Replay) -> Path | None:
    if settings.out is None:
        return None
    settings.out.mkdir(parents=True, exist_ok=True)
    return settings.out / "runs.jsonl"


def _load_runs(settings: Replay) -> dict[tuple[str, int], SimulatedRun]:
    """Finished runs of these settings that an earlier replay left in `out`; a line cut short is passed over."""
    path = _runs_file(settings)
    digests = {method: _digest(settings, method) for method in settings.methods} if path else {}
    found: dict[tuple[str, int], SimulatedRun] = {}
    for line in path.read_text().splitlines() if path is not None and path.exists() else ():
        try:
            entry = json.loads(line)
            digest = entry.pop("settings")
            run = SimulatedRun(**{**entry, "curve": tuple((a, b) for a, b in entry["curve"])})
        except (ValueError, KeyError, TypeError):
            continue
        if digests.get(run.method) == digest:
            found[run.method, run.seed] = run
    return found


def _spread(values: list[float], digits: int = 3) -> dict[str, float]:
    array = np.array(values)
    low, middle, high = np.quantile(array, (0.25, 0.5, 0.75))
    error = float(array.std(ddof=1)) / math.sqrt(len(array)) if len(array) > 1 else 0.0
    names = {"mean": array.mean(), "stderr": error, "lower_quartile": low, "median": middle, "upper_quartile": high}
    return {name: round(float(value), digits) for name, value in names.items()}
