"""One search on a table of recorded results: the search's own loop on a simulated clock, without any training."""

from __future__ import annotations

import math
from concurrent.futures import Future
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path

import numpy as np

from engine.config import FRONT_METHODS, Plan
from engine.search.loop import TimedHistory, VirtualWorkers, drive
from engine.search.methods.propose import find_method, lacks, propose, winner
from engine.search.replay import tables
from engine.search.replay.hypervolume import hypervolumes
from engine.search.replay.tables import FULL, Table
from engine.trial import EnvironmentUnusable, Evaluation, Fidelity, History, Trial, UsageError

# Epochs of the full fidelity. The low ones have fewer, in proportion to their recorded cost.
EPOCHS = 1000


@dataclass(frozen=True)
class Replay:
    """What to replay.

    `join`: tables of scores or latencies to add to it. `lows`: names of the table's low fidelities to offer, the main
    one first; () means all of them. `gpu_hours` and the checkpoints `at` are worker-hours: workers times simulated wall
    time, idle workers included, as a rented machine is paid. `max_low` limits the low-fidelity trials of a search.
    `min_macs`, `max_macs` and `max_params` limit the architectures, and so do `maxima`, pairs of a cost by name
    (`Candidates.cost`) and its limit. `objectives` are accuracy and, in a search for a front, such a cost. `noise` is
    the standard deviation, in percentage points, of one full training's accuracy around the recorded one; it is drawn
    for each seed of a trial. With `until_best` a search ends when the architecture of best validation accuracy has been
    trained in full. `out` keeps each finished search, so that a replay can be resumed.
    """

    table: Path
    methods: tuple[str, ...] = ("mfkd", "random")
    lows: tuple[str, ...] = ()
    join: tuple[Path, ...] = ()
    workers: int = 8
    gpu_hours: float = 60.0
    at: tuple[float, ...] = (15.0, 20.0, 60.0)
    seeds: int = 20
    max_low: int = 100
    min_macs: float = 0.0
    max_macs: float = math.inf
    max_params: float = math.inf
    maxima: tuple[tuple[str, float], ...] = ()
    objectives: tuple[str, ...] = ("accuracy",)
    noise: float = 0.0
    until_best: bool = False
    processes: int = 0
    out: Path | None = None

    @property
    def cost(self) -> str:
        """The second objective; empty if the search is for accuracy alone."""
        return self.objectives[1] if len(self.objectives) > 1 else ""


@dataclass(frozen=True)
class SimulatedRun:
    """One simulated search.

    `curve`: (worker-hours, test accuracy in percent of the incumbent by validation) at each change. `recommended`: test
    accuracy of the final recommendation. In a search for a front, both are hypervolumes (`hypervolume.py`). `best_at`:
    worker-seconds until the best architecture of the table had been trained in full, inf if it was not. `low`, `full`:
    evaluations started.
    """

    method: str
    seed: int
    curve: tuple[tuple[float, float], ...]
    recommended: float
    best_at: float
    low: int
    full: int

    def at(self, hours: float) -> float:
        """Test accuracy of the incumbent, or hypervolume, after this many worker-hours, in percent."""
        return [value for when, value in self.curve if when <= hours][-1]


def validated_replay(settings: Replay, table: Table) -> Replay:
    """The settings with the low fidelities spelled out.

    Raises UsageError for an unknown method or fidelity, a method that finds no front, or a number out of range, and
    EnvironmentUnusable if `out` cannot be written.
    """
    for method in settings.methods:
        find_method(method)
        missing = lacks(method, table.lows, table.candidates.trends)
        if missing:
            raise UsageError(f"{settings.table} has no {missing}, which {method} needs")
        if settings.cost and method not in FRONT_METHODS:
            raise UsageError(f"{method} finds no front; methods for --objectives: {', '.join(FRONT_METHODS)}")
    for low in settings.lows:
        if low not in table.lows:
            raise UsageError(f"{settings.table} has no low fidelity '{low}'; choose from {', '.join(table.lows)}")
    if settings.workers < 1 or settings.seeds < 1 or settings.gpu_hours <= 0:
        raise UsageError("--workers and --seeds must be at least 1, --gpu-hours must be more than 0")
    if min(settings.processes, settings.max_low, settings.noise, *settings.at) < 0:
        raise UsageError("--processes, --max-low, --noise and the hours of --at must be at least 0")
    if settings.out is not None:
        try:
            settings.out.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise EnvironmentUnusable(f"cannot write --out {settings.out}: {error}; choose another folder") from error
    return replace(settings, lows=settings.lows or table.lows)


@lru_cache(maxsize=2)
def load_within_limits(
    path: Path, join: tuple[Path, ...], min_macs: float, maxima: tuple[tuple[str, float], ...]
) -> Table:
    """The rows of a table that meet the limits; UsageError if none with a full result does.

    A row whose cost is unknown meets no limit on it, not even an infinite one.
    """
    table = tables.load(path, join)
    candidates = table.candidates
    keep = candidates.macs >= min_macs
    for name, most in maxima:
        keep &= candidates.cost(name) <= most
    if not (keep & ~np.isnan(table.valid[FULL])).any():
        ranges = {name: candidates.cost(name) for name in dict.fromkeys(["macs", *(name for name, _ in maxima)])}
        told = ", ".join(f"{name} from {np.nanmin(of):.4g} to {np.nanmax(of):.4g}" for name, of in ranges.items())
        raise UsageError(f"no architecture of {path} meets the limits; the table has {told}")
    return table.where(keep)


def load_table(settings: Replay) -> Table:
    """The table of a replay, within its limits. Raises UsageError for limits or objectives that it has no cost for."""
    if settings.objectives[:1] != ("accuracy",) or len(settings.objectives) > 2:
        raise UsageError(f"--objectives {','.join(settings.objectives)}: write accuracy, or accuracy and one cost")
    maxima = (("macs", settings.max_macs), ("params", settings.max_params), *settings.maxima)
    objective = ((settings.cost, math.inf),) if settings.cost else ()
    return load_within_limits(settings.table, settings.join, settings.min_macs, (*maxima, *objective))


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
        """Does nothing: no trial is held back."""


def simulate(settings: Replay, method: str, seed: int) -> SimulatedRun:
    """One search by `method` on the simulated clock; `settings` come from `validated_replay`."""
    table = load_table(settings)
    lows = tuple(Fidelity(name, epochs=_epochs(table, name)) for name in settings.lows)
    n = len(table.candidates)
    plan = Plan(lows, Fidelity(FULL, epochs=EPOCHS), method, min(settings.max_low, n), n, seed, cost=settings.cost)
    best = int(np.nanargmax(table.valid[FULL]))
    wall = settings.gpu_hours * 3600 / settings.workers

    def stop(history: History) -> bool:
        assert isinstance(history, TimedHistory)
        latest = history.answered[-settings.workers :]
        return history.now >= wall or (settings.until_best and any(_trains(table, e.trial, best) for e in latest))

    history = drive(
        lambda seen, free: propose(table.candidates, seen, plan, free),
        TableEvaluator(table, settings.noise),
        VirtualWorkers(settings.workers, lambda trial: recorded(table, trial, settings.noise).seconds),
        stop=stop,
    )
    return _summary_of_run(settings, table, plan, history, best)


def _epochs(table: Table, low: str) -> int:
    return max(1, round(EPOCHS * float(np.nanmean(table.seconds[low]) / np.nanmean(table.seconds[FULL]))))


def recorded(table: Table, trial: Trial, noise: float) -> Evaluation:
    """The evaluation of a trial that a table holds.

    An empty cell is a failed evaluation, of mean cost if its own is not recorded. `noise` (percentage points) is added
    to full accuracies, the same for equal trials.
    """
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


def _row(table: Table, trial: Trial) -> int:
    row = table.candidates.row(trial.architecture)
    assert row is not None, "a method asked for an architecture that is not a candidate"
    return row


def _trains(table: Table, trial: Trial, row: int) -> bool:
    """Whether the trial is a full training of this row."""
    return trial.fidelity.name == FULL and _row(table, trial) == row


def _summary_of_run(settings: Replay, table: Table, plan: Plan, history: TimedHistory, best: int) -> SimulatedRun:
    hour = settings.workers / 3600
    inside = [(t, e) for t, e in zip(history.times, history.answered, strict=True) if t * hour <= settings.gpu_hours]
    if plan.cost:
        rows = [(t * hour, _row(table, e.trial), e) for t, e in inside]
        curve = hypervolumes(table, table.candidates.cost(plan.cost), "".join(settings.lows[:1]), rows)
    else:
        curve = _incumbents(table, settings.lows, [(t * hour, e) for t, e in inside])
    pick = winner(table.candidates, History([e for _, e in inside], []), plan)
    full = [e.trial.fidelity.name == FULL for e in history.answered]
    return SimulatedRun(
        plan.method,
        plan.seed,
        tuple(curve),
        recommended=100 * float(table.test[_row(table, pick.trial)]) if pick and not plan.cost else curve[-1][1],
        best_at=min((t * settings.workers for t, e in inside if _trains(table, e.trial, best)), default=math.inf),
        low=full.count(False),
        full=full.count(True),
    )


def _incumbents(
    table: Table, lows: tuple[str, ...], answers: list[tuple[float, Evaluation]]
) -> list[tuple[float, float]]:
    """The curve of a run: (hours, test accuracy in percent of the incumbent) at each change.

    The incumbent is the best by full validation accuracy; until there is one, the best by its score at the main low
    fidelity, if its full training did not fail; and until then, the mean of the table.
    """
    value, any_full = -math.inf, False
    curve = [(0.0, 100 * float(np.nanmean(table.test)))]
    for when, e in answers:
        row, full = _row(table, e.trial), e.trial.fidelity.name == FULL
        by_low = e.trial.fidelity.name in lows[:1] and not any_full and bool(table.test[row] >= 0)  # nan: it failed
        if not e.ok or not (full or by_low):
            continue
        if e.accuracy > value or (full and not any_full):
            value = e.accuracy
            curve.append((when, 100 * float(table.test[row])))
        any_full = any_full or full
    return curve
