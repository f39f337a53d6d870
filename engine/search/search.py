"""A search: replay the journal, propose, submit, collect, append, until nothing is left to ask; then the winner."""

from __future__ import annotations

import errno
import json
import platform
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np

from engine import config
from engine.config import Budget, Plan, Resources, Slots, Study
from engine.fleet.deadline import START, remaining
from engine.fleet.devices import describe, layout
from engine.fleet.drain import Drain
from engine.fleet.fleet import Fleet, FleetLost, completed, open_fleet
from engine.orders import withdraw
from engine.search import journal, policy
from engine.search.adopt import adopt, same_data, settings
from engine.search.clock import drive
from engine.search.dispatch import Dispatch
from engine.search.ground import Ground, checked, prepare, probe, task_for, teacher_path
from engine.search.journal import History, Journal
from engine.search.log import Kind, open_log
from engine.search.progress import Display
from engine.space import Candidates
from engine.trial import (
    Drained,
    EnvironmentUnusable,
    Evaluation,
    NoWinner,
    Trial,
    UsageError,
    failed,
    mean_accuracies,
    trial_to_json,
)
from surrogate.quality import kendall_tau

Json = dict[str, Any]
FILE_SCHEMA = 1
UNWRITABLE = {errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM}
VERSIONED = ("torch", "torchvision", "triton", "nvidia-dali-cuda130", "xgboost", "parsl", "numpy")


@dataclass(frozen=True)
class Purpose:
    """What a run folder is filled for: how it is called there, what it asks for, and what is made of the answers."""

    kind: config.Kind
    plan: Plan
    method: policy.Method
    end: Callable[[Ground, History, Fleet], Json]


def search(
    study: Study,
    budget: Budget,
    resources: Resources,
    run_dir: Path,
    show: Display,
    log: Kind = "none",
    method: policy.Method | None = None,
) -> Json:
    """Runs or continues the search of a run folder; returns what the command prints. `method` stands for the study's.

    Raises EngineError where it cannot start or go on; what has been measured is in the journal by then.
    """
    start = time.monotonic()

    def end(ground: Ground, history: History, fleet: Fleet) -> Json:
        best = policy.winner(ground.candidates, visible(history, ground.cost), ground.plan)
        if best is None:
            raise NoWinner(_why_none(history))
        best = next(e for e in history.answered if e.trial == best.trial)
        return conclude(ground, history, best, fleet, time.monotonic() - start)

    purpose = Purpose("search", config.plan(study, budget), method or propose, end)
    return run(purpose, study, budget, resources, run_dir, show, log)


def propose(candidates: Candidates, history: History, plan: Plan, slots: int) -> list[Trial]:
    """What the plan's method asks next; in the end, what the report lacks."""
    trials = policy.propose(candidates, history, plan, slots)
    return trials if trials or not plan.max_low else unpaired(history, plan)[:slots]


def run(
    purpose: Purpose,
    study: Study,
    budget: Budget,
    resources: Resources,
    run_dir: Path,
    show: Display,
    log: Kind = "none",
) -> Json:
    """Opens or continues a run folder, has what the method proposes evaluated, and returns what is made of it."""
    space = checked(study, budget, resources)
    config.check_files(study)
    if study.pilot:
        settings(Path(study.pilot), study)
    wanted = layout(resources)
    run_dir = run_dir.absolute()
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise unwritable(run_dir, error) from error
    with (
        stoppable(resources, run_dir) as drain,
        Journal(run_dir / "journal.jsonl") as book,
        open_log(log, study, run_dir) as show.log,
    ):
        if not config.begun(run_dir):  # a call that failed before it had begun binds nobody to its settings and data
            for name in ("config.yaml", "run.json"):
                (run_dir / name).unlink(missing_ok=True)
        side = config.side_by_side(resources, gpu=wanted.device == "cuda")
        slots = config.fix(purpose.kind, run_dir, study, budget, config.slots(wanted.workers, side))
        show.say(f"run folder {run_dir}; {describe(wanted)}")
        withdraw(run_dir / "logs")
        fleet = open_fleet(resources, wanted, run_dir / "logs")
        try:
            drain.tell(fleet.drain)
            task = task_for(study, resources, run_dir, fleet)
            facts = probe(study, task, fleet, show)
            if study.pilot:
                same_data(Path(study.pilot), facts["fingerprint"])
            ground = prepare(study, purpose.plan, space, facts, task, fleet, run_dir, show)
            write_run_file(run_dir, ground.facts)
            if study.pilot:
                adopt(Path(study.pilot), study, purpose.plan, ground.candidates, run_dir, book, show)
            history = evaluate_all(ground, budget, resources, book, fleet, slots, show, purpose.method, drain)
            return purpose.end(ground, history, fleet)
        finally:
            drain.rest()
            fleet.close()


@contextmanager
def stoppable(resources: Resources, run_dir: Path) -> Iterator[Drain]:
    """What the work on a run folder happens in: told to stop it ends with Drained, on a full disk with exit code 3."""
    with Drain(resources.grace_s, remaining(resources.time_limit)) as drain:
        try:
            yield drain
        except Drained as stopped:
            told = str(drain.end() if drain.asked else stopped)
            raise Drained(told, {"run_dir": str(run_dir), "status": "drained"}) from None
        except OSError as error:
            if error.errno not in UNWRITABLE:
                raise
            raise unwritable(run_dir, error) from error


def unwritable(run_dir: Path, error: OSError) -> EnvironmentUnusable:
    return EnvironmentUnusable(
        f"{run_dir} cannot be written: {error}; free space or change its permissions, then repeat the command, "
        "or choose another folder (--run-dir or --out)"
    )


def evaluate_all(
    ground: Ground,
    budget: Budget,
    resources: Resources,
    book: Journal,
    fleet: Fleet,
    slots: Slots,
    show: Display,
    method: policy.Method,
    drain: Drain,
) -> History:
    """The loop: every answer of the run, the journal's first, in the order of the run's clock."""
    record = journal.read(book.path)
    plan = replace(ground.plan, cohort=slots.cohort)
    task = {**ground.task, "teacher": str(teacher_path(ground.study, ground.run_dir))}
    if record.answers:
        show.say(f"continuing: {len(record.answers)} evaluations in the journal")
    for low in plan.lows:
        show.expect(low.name, plan.max_low)
    show.expect(plan.high.name, plan.max_high)

    def stop(history: History) -> bool:
        if history.asked < len(record.asked) and not drain.asked:
            return False  # a budget that was lowered since then does not undo what has been measured
        full = [e.accuracy for e in history.answered if e.ok and e.trial.fidelity == plan.high]
        # Of this call: whoever calls again may have repaired what was broken.
        last = [e for e in history.answered if e.trial.number not in record.answers][-budget.max_failures :]
        if len(last) == budget.max_failures and all(failed(e.status) for e in last):
            raise NoWinner(f"{budget.max_failures} evaluations in a row failed; {_why_none(history)}")
        return (
            drain.asked
            or history.seconds() >= budget.gpu_hours * 3600
            or time.monotonic() - START >= budget.wall_time * 3600
            or max(full, default=0.0) >= budget.target_accuracy
        )

    def ask(history: History, free: int) -> list[Trial]:
        return method(ground.candidates, visible(history, ground.cost), plan, free)

    def shares(trial: Trial) -> int:
        return slots.cohort if trial.fidelity == plan.high else 1

    def cost(trial: Trial) -> float:
        return ground.cost(trial) * slots.cohort / shares(trial)  # a worker is shared by the cohort

    def received(evaluation: Evaluation) -> None:
        show.show(evaluation, evaluation.trial.fidelity == plan.high)

    limit = resources.trial_timeout
    desk = Dispatch(fleet, task, book, record.answers, slots.cohort, plan.high, received, limit)
    try:
        history = drive(
            ask,
            slots.total,
            desk.submit,
            cost,
            record.asked,
            book.ask,
            stop,
            shares,
            at_least=slots.cohort,
            flush=desk.flush,
            seen=record.seen,
        )
    except (Drained, FleetLost):
        if not drain.asked:
            raise
    if drain.asked:
        drain.settle(desk.open())
        raise drain.end()
    return history


def unpaired(history: History, plan: Plan) -> list[Trial]:
    """Low-fidelity trials of the architectures that were trained in full without one, asked when all else is done.

    They decide nothing: without them nobody could say how well the low fidelity ranks what matters.
    """
    low = {e.trial.architecture for e in history.answered if e.trial.fidelity == plan.lows[0]}
    full = dict.fromkeys(e.trial.architecture for e in history.answered if e.ok and e.trial.fidelity == plan.high)
    missing = [architecture for architecture in full if architecture not in low]
    if any(t.fidelity != plan.lows[0] or t.architecture not in missing for t in history.pending):
        return []  # the method only waits for these
    asked = {trial.architecture for trial in history.pending}
    return [
        Trial(history.asked + place, architecture, plan.lows[0], plan.seed)
        for place, architecture in enumerate(one for one in missing if one not in asked)
    ]


def visible(history: History, cost: Callable[[Trial], float]) -> History:
    """The history as a policy sees it: with the expected price of a trial for its seconds, see `Ground.cost`."""
    answered = [replace(e, seconds=cost(e.trial), test_accuracy=None) for e in history.answered]
    return History(answered, list(history.pending))


def conclude(ground: Ground, history: History, best: Evaluation, fleet: Fleet, seconds: float) -> Json:
    """Scores the winner on the test part, the only time it is read, and writes result.json."""
    tested = completed(fleet, "run_test", {**ground.task, "trial": trial_to_json(best.trial)})
    ok = [e for e in history.answered if e.ok]
    unfit = sum(e.status == "unfit" for e in history.answered)
    result: Json = {
        "run_dir": str(ground.run_dir),
        "status": "finished",
        "winner": {
            "architecture": str(best.trial.architecture),
            "valid_accuracy": best.accuracy,
            "test_accuracy": tested["test_accuracy"],
            "macs": best.macs,
            "params": best.params,
            "weights": tested["weights"],
        },
        "evaluations": {
            "low": len([e for e in ok if e.trial.fidelity in ground.plan.lows]),
            "high": len([e for e in ok if e.trial.fidelity == ground.plan.high]),
            "failed": sum(failed(e.status) for e in history.answered),
            **({"unfit": unfit} if unfit else {}),
        },
        "tau": taus(ok, ground.plan),
        "seconds": round(seconds, 1),
    }
    if "latency_ms" in best.costs:
        result["winner"]["latency_ms"] = round(best.costs["latency_ms"], 3)
    if ground.plan.method == "mfkd-front":
        result["front"] = [
            {
                "architecture": str(e.trial.architecture),
                "valid_accuracy": e.accuracy,
                "macs": e.macs,
                "params": e.params,
            }
            for e in policy.front(history, ground.plan)
        ]
    config.write_whole(ground.run_dir / "result.json", json.dumps(result, indent=2) + "\n")
    return result


def taus(ok: Sequence[Evaluation], plan: Plan) -> Json:
    """How well the low fidelity, and MACs alone, rank what was trained in full: each architecture by its mean."""
    full = [e for e in ok if e.trial.fidelity == plan.high]
    low, high = mean_accuracies(e for e in ok if e.trial.fidelity in plan.lows), mean_accuracies(full)
    macs = {e.trial.architecture: float(e.macs) for e in full}
    return {"low_vs_high": _tau(low, high), "macs_vs_high": _tau(macs, high)}


def _tau(one: dict[Any, float], other: dict[Any, float]) -> float | None:
    """Kendall's tau over the architectures that both have; None for fewer than three."""
    both = [key for key in other if key in one]
    if len(both) < 3:
        return None
    return round(kendall_tau(np.array([one[key] for key in both]), np.array([other[key] for key in both])), 3)


def _why_none(history: History) -> str:
    failed = [e for e in history.answered if not e.ok]
    if not failed:
        return "no full-fidelity evaluation was made: raise the budget (--max-high, --gpu-hours, --wall-time)"
    return f"the last failure: {failed[-1].trial.architecture}: {failed[-1].status}: {failed[-1].error}"


def write_run_file(run_dir: Path, facts: Json) -> None:
    """run.json: which versions, machines and commands this run has seen; refuses data that have changed."""
    path = run_dir / "run.json"
    try:
        stored: Json = json.loads(path.read_text()) if path.exists() else {"schema": FILE_SCHEMA, "calls": []}
    except ValueError as error:
        raise EnvironmentUnusable(f"{path} cannot be read ({error}); delete it and repeat the command") from error
    if stored["schema"] != FILE_SCHEMA:
        raise UsageError(
            f"{path} has format {stored['schema']}, this version reads {FILE_SCHEMA}; "
            "use the version that wrote it, or another folder (--run-dir or --out)"
        )
    before = stored.setdefault("fingerprint", facts["fingerprint"])
    if before != facts["fingerprint"]:
        raise UsageError(
            f"the data have changed since {run_dir} was begun; restore them, "
            "or choose another folder (--run-dir or --out)"
        )
    stored["data"] = {name: facts[name] for name in ("classes", "resolution", "mean", "std", "images", "files")}
    stored["calls"].append(
        {
            "command": sys.argv,
            "device": facts["device"],
            "python": platform.python_version(),
            "versions": {name: _version(name) for name in VERSIONED},
        }
    )
    config.write_whole(path, json.dumps(stored, indent=2) + "\n")


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None
