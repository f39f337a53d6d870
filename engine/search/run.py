"""Runs or resumes a run folder: replays its journal, then proposes, submits and journals until nothing is left."""

from __future__ import annotations

import errno
import json
import platform
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from engine.config import Plan, RunKind, RunSettings, SearchConfig, Slots, check_paths, cohort_size, slots_for
from engine.fleet.deadline import remaining
from engine.fleet.devices import describe, layout
from engine.fleet.drain import Drain, answer_of
from engine.fleet.fleet import FleetLost
from engine.recipes import resolve
from engine.run_folder import RunFolder, write_atomically
from engine.search.dispatch import Cohorts, Dispatcher
from engine.search.journal import Journal, Record, read_journal
from engine.search.log import LogKind, open_log
from engine.search.loop import Recorded, VirtualWorkers, drive
from engine.search.methods.opening import opening_size
from engine.search.methods.propose import Method
from engine.search.progress import Display
from engine.search.proxies import read_scores
from engine.search.run_context import RunContext, open_context
from engine.search.setup import SearchSetup, probe, set_up, validated_space
from engine.search.warm_start import check_same_data, study_config, warm_start
from engine.stop_files import remove_stale
from engine.tasks import DataFacts
from engine.trial import Drained, EnvironmentUnusable, Evaluation, History, NoWinner, Trial, UsageError, failed

Json = dict[str, Any]
FILE_SCHEMA = 2
UNWRITABLE = {errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM}
VERSIONED = ("torch", "torchvision", "triton", "nvidia-dali-cuda130", "xgboost", "parsl", "numpy")


@dataclass(frozen=True)
class RunDefinition:
    """What a run does: the kind of its folder, what it may ask for with a configuration, the method that asks, and the
    function that turns the evaluations into a result."""

    kind: RunKind
    plan: Callable[[SearchConfig], Plan]
    method: Method
    finish: Callable[[SearchSetup, History, Journal], Json]


def run(
    definition: RunDefinition, settings: RunSettings, run_dir: Path, display: Display, log: LogKind = "none"
) -> Json:
    """Starts or resumes a run: evaluates what the method proposes, and returns the result.

    Raises EngineError if it cannot start or go on; everything measured until then is in the journal.
    """
    validated_space(settings)
    config, resources = settings.config, settings.resources
    check_paths(config)
    study = RunFolder(Path(config.fidelity_study).absolute()) if config.fidelity_study else None
    if study:
        study_config(study, config)
    wanted, folder = layout(resources), make_folder(run_dir)
    with stoppable(settings, folder) as drain, Journal(folder.journal) as journal:
        if not folder.has_begun():  # an earlier call that did no work fixes neither settings nor data
            folder.forget_settings()
        folder.check_config(definition.kind, config)
        display.say(f"run folder {folder}; {describe(wanted)}")
        remove_stale(folder.logs)
        with open_context(settings, folder, wanted, display, drain) as context:
            facts = probe(context)
            config = resolve(config, facts.images["train"], folder.recorded())
            slots = slots_for(wanted.workers, cohort_size(resources, gpu=wanted.device == "cuda"))
            slots = folder.fix_config(definition.kind, config, settings.budget, slots)
            if study:
                check_same_data(study, facts.fingerprint)
            with open_log(log, config, folder) as display.log:
                context = replace(context, config=config, curves=log == "tensorboard")
                setup = set_up(context, definition.plan(config), facts)
                write_run_file(folder, facts)
                if study:
                    warm_start(study, setup, journal)
                history = evaluate_all(setup, journal, slots, definition.method)
                return definition.finish(setup, history, journal)


def make_folder(run_dir: Path) -> RunFolder:
    """Creates a run folder if it does not exist; EnvironmentUnusable if that fails."""
    folder = RunFolder(run_dir.absolute())
    try:
        folder.path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise unwritable(folder, error) from error
    return folder


@contextmanager
def stoppable(settings: RunSettings, folder: RunFolder) -> Iterator[Drain]:
    """Turns a request to stop into Drained, and a disk that cannot be written into EnvironmentUnusable."""
    resources = settings.resources
    with Drain(resources.grace_s, remaining(resources.time_limit, settings.started)) as drain:
        try:
            yield drain
        except Drained as stopped:
            reason = str(drain.drained() if drain.asked else stopped)
            raise Drained(reason, {"run_dir": str(folder), "status": "drained"}) from None
        except OSError as error:
            if error.errno not in UNWRITABLE:
                raise
            raise unwritable(folder, error) from error


def unwritable(folder: RunFolder, error: OSError) -> EnvironmentUnusable:
    return EnvironmentUnusable(
        f"cannot write {folder}: {error}; free space or change its permissions, then run the command again, "
        "or choose another folder (--run-dir or --out)"
    )


def evaluate_all(setup: SearchSetup, journal: Journal, slots: Slots, method: Method) -> History:
    """Evaluates everything that the method asks for; returns all evaluations of the run, in virtual-clock order."""
    context = setup.context
    plan = replace(setup.plan, cohort=slots.cohort)
    whole = read_journal(journal.path)
    record = whole.searched
    _announce(context.display, plan, record, opening_size(setup.candidates, plan))
    dispatcher = _dispatcher(context, plan, journal, whole)

    def propose(history: History, free: int) -> list[Trial]:
        trials = method(setup.candidates, visible(history, setup), plan, free)
        return [replace(trial, number=_number(trial.number, record, whole)) for trial in trials]

    def stop(history: History) -> bool:
        return should_stop(context, plan, record, history)

    recorded = Recorded(record.asked, record.seen)
    with _settled(context.drain, dispatcher):
        return drive(propose, dispatcher, _virtual_workers(setup, plan, slots), recorded, journal.ask, stop)


def _number(place: int, record: Record, whole: Record) -> int:
    """The number in the journal of the trial that a method numbers by its place among those that it knows of."""
    known = len(record.asked)
    return record.asked[place].number if place < known else len(whole.asked) + place - known


def evaluate_at_once(setup: SearchSetup, journal: Journal, trials: Sequence[Trial]) -> list[Evaluation]:
    """Evaluates trials on which no decision depends, in any order; those that the journal knows are not repeated."""
    record = read_journal(journal.path)
    dispatcher = _dispatcher(setup.context, setup.plan, journal, record)
    with _settled(setup.context.drain, dispatcher):
        answers = [dispatcher.submit(trial) for trial in trials]
        dispatcher.flush()
        return [answer_of(answer) for answer in answers]


@contextmanager
def _settled(drain: Drain, dispatcher: Dispatcher) -> Iterator[None]:
    """Once the run is asked to stop, waits for what can still be saved, and raises Drained."""
    try:
        yield
    except (Drained, FleetLost):
        if not drain.asked:
            raise
    if drain.asked:
        drain.settle(dispatcher.open())
        raise drain.drained()


def _announce(display: Display, plan: Plan, record: Record, opening: int) -> None:
    if record.answers:
        display.say(f"resuming: {len(record.answers)} evaluations in the journal")
    if plan.opening is not None:
        display.expect(plan.opening.name, opening)
    for low in plan.lows:
        display.expect(low.name, plan.max_low)
    display.expect(plan.high.name, plan.max_high)


def _dispatcher(context: RunContext, plan: Plan, journal: Journal, record: Record) -> Dispatcher:
    def received(evaluation: Evaluation) -> None:
        context.display.show(evaluation, evaluation.trial.fidelity == plan.high)

    teacher = context.folder.teacher_weights(context.config)
    cohorts = Cohorts(context.worker, teacher, plan.cohort, context.resources.trial_timeout)
    return Dispatcher(context.fleet, cohorts, journal, record.answers, received)


def _virtual_workers(setup: SearchSetup, plan: Plan, slots: Slots) -> VirtualWorkers:
    def share(trial: Trial) -> int:
        return slots.cohort if trial.fidelity == plan.high else 1

    def cost(trial: Trial) -> float:
        return setup.cost(trial) * slots.cohort / share(trial)  # the members of a cohort share a worker

    return VirtualWorkers(slots.total, cost, share, at_least=slots.cohort)


def should_stop(context: RunContext, plan: Plan, record: Record, history: History) -> bool:
    """Whether a limit of the budget has been reached, or the user asked the run to stop.

    Raises NoWinner after too many failures in a row.
    """
    budget = context.budget
    if history.asked < len(record.asked) and not context.drain.asked:
        return False  # lowering a budget does not undo what has been measured
    full = [e.accuracy for e in history.answered if e.ok and e.trial.fidelity == plan.high]
    # Only failures of this call count: the user may have fixed the cause of earlier ones.
    last = [e for e in history.answered if e.trial.number not in record.answers][-budget.max_failures :]
    if len(last) == budget.max_failures and all(failed(e.status) for e in last):
        raise NoWinner(f"{budget.max_failures} evaluations in a row failed; {why_no_winner(history)}")
    spent = bool(used_up(context, history.seconds() + record.final_seconds))
    return context.drain.asked or spent or max(full, default=0.0) >= budget.target_accuracy


def used_up(context: RunContext, seconds: float) -> str:
    """The flag of the time limit that is used up, given the worker `seconds` so far; "" if none is."""
    if seconds >= context.budget.gpu_hours * 3600:
        return "--gpu-hours"
    return "--wall-time" if time.monotonic() - context.started >= context.budget.wall_time * 3600 else ""


def visible(history: History, setup: SearchSetup) -> History:
    """The history as a method sees it: with expected costs instead of measured seconds, see `SearchSetup.cost`."""
    answered = [replace(e, seconds=setup.cost(e.trial), test_accuracy=None) for e in history.answered]
    return History(answered, list(history.pending))


def why_no_winner(history: History) -> str:
    """Why there is no winner, for the user."""
    failures = [e for e in history.answered if not e.ok]
    if not failures:
        return "no full-fidelity evaluation was made: raise the budget (--max-high, --gpu-hours, --wall-time)"
    return f"the last failure: {failures[-1].trial.architecture}: {failures[-1].status}: {failures[-1].error}"


def write_run_file(folder: RunFolder, facts: DataFacts) -> None:
    """Records data, versions, machine and command line in run.json; UsageError if the data have changed."""
    path = folder.run_file
    try:
        stored: Json = json.loads(path.read_text()) if path.exists() else {"schema": FILE_SCHEMA, "calls": []}
    except ValueError as error:
        raise EnvironmentUnusable(f"cannot read {path} ({error}); delete it and run the command again") from error
    if stored["schema"] != FILE_SCHEMA:
        raise UsageError(
            f"{path} has format {stored['schema']}, this version reads {FILE_SCHEMA}; "
            "use the version that wrote it, or another folder (--run-dir or --out)"
        )
    data = asdict(facts)
    fingerprint, device = data["fingerprint"], data.pop("device")
    if stored.get("data", data)["fingerprint"] != fingerprint:
        raise UsageError(
            f"the data have changed since {folder} was started; restore them, "
            "or choose another folder (--run-dir or --out)"
        )
    stored["data"] = data
    stored["proxies"] = len(read_scores(folder.proxies))
    versions = {name: _version(name) for name in VERSIONED}
    call = {"command": sys.argv, "device": device, "python": platform.python_version(), "versions": versions}
    stored["calls"].append(call)
    write_atomically(path, json.dumps(stored, indent=2) + "\n")


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None
