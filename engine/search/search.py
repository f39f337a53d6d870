"""A search: asks for low- and full-fidelity trainings until the budget is spent, and names the winner."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from engine.config import Plan, RunSettings, SearchConfig, search_plan
from engine.run_folder import write_atomically
from engine.search import class_scores
from engine.search.comparison import images_in, standard_error
from engine.search.final import FinalTrainings, final_rows, train_finals
from engine.search.front import cost_axis, front, member_row, trained_in_full
from engine.search.journal import Journal
from engine.search.latency.limit import described
from engine.search.log import LogKind
from engine.search.methods import propose as methods
from engine.search.progress import Display
from engine.search.run import RunDefinition, run, visible, why_no_winner
from engine.search.setup import SearchSetup
from engine.space import Candidates
from engine.tasks import TestTask
from engine.trial import Architecture, Evaluation, History, NoWinner, Trial, failed, mean_accuracies
from surrogate.quality import kendall_tau

Json = dict[str, Any]


def search(
    settings: RunSettings,
    run_dir: Path,
    display: Display,
    log: LogKind = "none",
    method: methods.Method | None = None,
) -> Json:
    """Runs or resumes the search of a run folder; returns its result. `method` overrides the one in the settings.

    Raises EngineError if it cannot start or go on; everything measured until then is in the journal.
    """
    start = time.monotonic()

    def finish(setup: SearchSetup, history: History, journal: Journal) -> Json:
        best = methods.winner(setup.candidates, visible(history, setup), setup.plan)
        if best is None:
            raise NoWinner(why_no_winner(history))
        best = next(e for e in history.answered if e.trial == best.trial)
        finals = train_finals(setup, history, best, journal)
        result = conclude(setup, history, best, finals) | {"seconds": round(time.monotonic() - start, 1)}
        write_atomically(setup.context.folder.result, json.dumps(result, indent=2) + "\n")
        return result

    def plan(config: SearchConfig) -> Plan:
        return search_plan(config, settings.budget)

    return run(RunDefinition("search", plan, method or propose, finish), settings, run_dir, display, log)


def propose(candidates: Candidates, history: History, plan: Plan, slots: int) -> list[Trial]:
    """What the plan's method asks for next, and in the end what only the report needs."""
    trials = methods.propose(candidates, history, plan, slots)
    return trials if trials or not plan.max_low else unpaired(history, plan)[:slots]


def unpaired(history: History, plan: Plan) -> list[Trial]:
    """Low-fidelity trials of the architectures that were trained in full without one, once all else is done.

    They affect no decision; they show how well the low fidelity ranks the architectures that matter.
    """
    low = {e.trial.architecture for e in history.answered if e.trial.fidelity == plan.lows[0]}
    full = dict.fromkeys(e.trial.architecture for e in history.answered if e.ok and e.trial.fidelity == plan.high)
    missing = [architecture for architecture in full if architecture not in low]
    if any(t.fidelity != plan.lows[0] or t.architecture not in missing for t in history.pending):
        return []  # the method has not finished, it is waiting for these
    asked = {trial.architecture for trial in history.pending}
    return [
        Trial(history.asked + place, architecture, plan.lows[0], plan.seed)
        for place, architecture in enumerate(one for one in missing if one not in asked)
    ]


def conclude(setup: SearchSetup, history: History, best: Evaluation, finals: FinalTrainings) -> Json:
    """What the search has found. Its winner is scored on the test split here, and final trainings were before."""
    context = setup.context
    tested = context.answer(TestTask(context.worker, best.trial))
    winner = _described(best) | {"test_accuracy": tested["test_accuracy"], "weights": tested["weights"]}
    valid_images, everything = setup.facts.images["valid"], [*history.answered, *finals.everything]
    winner["valid_standard_error"] = standard_error(best.accuracy, valid_images)
    winner["test_standard_error"] = standard_error(tested["test_accuracy"], images_in(tested["hits"]))
    _save_class_scores(setup, best, finals, tested)
    ends = [e for e in everything if e.ok and (e.trial.fidelity == setup.plan.high or e.trial.fidelity.with_valid)]
    known = described(context, setup.facts, [best, *ends])
    latencies = {Architecture.parse(name): row["latency_ms"] for name, row in known.items()}
    trained = trained_in_full(everything, setup.plan.high, valid_images, context.folder, latencies)
    cost = cost_axis(context.config.objectives)
    result: Json = {
        "run_dir": str(context.folder),
        "status": "finished",
        "winner": winner,
        **final_rows(setup, finals),
        "evaluations": _counts(everything, setup.plan),
        "tau": taus([e for e in history.answered if e.ok], setup.plan),
        "front_cost": cost,
        "front": [member_row(member) for member in front(trained, cost)],
    }
    _add_latencies(result, known)
    return result


def _save_class_scores(setup: SearchSetup, best: Evaluation, finals: FinalTrainings, tested: Json) -> None:
    """Records how good the network that `export` and `eval` take is at each class of the test split: the finished
    winner, or if there is none, the winner `best` of the search, whose test is `tested`."""
    context, chosen = setup.context, finals.found.get(best.trial.architecture)
    if chosen is None or not chosen.ok:
        chosen = best
    elif class_scores.load(context.folder, chosen, "test") is not None:
        return  # an earlier call has recorded them
    else:
        tested = context.answer(TestTask(context.worker, chosen.trial))
    scores = class_scores.class_scores(setup.facts.classes, tested["confusion"])
    class_scores.save(context.folder, chosen, "test", scores)


def _add_latencies(result: Json, known: dict[str, Json]) -> None:
    """Adds what is known of latency to each network of a result."""
    for row in (result["winner"], result["final"], *result["baselines"], *result.get("front", [])):
        if row is not None:
            row |= known.get(row.get("architecture", ""), {})


def _described(evaluation: Evaluation) -> Json:
    return {
        "architecture": str(evaluation.trial.architecture),
        "valid_accuracy": evaluation.accuracy,
        "macs": evaluation.macs,
        "params": evaluation.params,
    }


def _counts(answers: Sequence[Evaluation], plan: Plan) -> Json:
    """How many evaluations succeeded at each fidelity, failed, or were too slow."""
    too_slow = sum(e.status == "too_slow" for e in answers)
    return {
        **({"inherited": sum(e.ok and e.trial.fidelity == plan.opening for e in answers)} if plan.opening else {}),
        "low": sum(e.ok and e.trial.fidelity in plan.lows for e in answers),
        "high": sum(e.ok and e.trial.fidelity == plan.high for e in answers),
        "final": sum(e.ok and e.trial.fidelity.with_valid for e in answers),
        "failed": sum(failed(e.status) for e in answers),
        **({"too_slow": too_slow} if too_slow else {}),
    }


def taus(ok: Sequence[Evaluation], plan: Plan) -> Json:
    """Kendall's tau of low-fidelity scores, and of MACs, with full scores, both averaged over repeated trainings."""
    full = [e for e in ok if e.trial.fidelity == plan.high]
    low, high = mean_accuracies(e for e in ok if e.trial.fidelity in plan.lows), mean_accuracies(full)
    macs = {e.trial.architecture: float(e.macs) for e in full}
    return {"low_vs_high": _tau(low, high), "macs_vs_high": _tau(macs, high)}


def _tau(one: dict[Any, float], other: dict[Any, float]) -> float | None:
    """Kendall's tau over the architectures in both; None for fewer than three."""
    both = [key for key in other if key in one]
    if len(both) < 3:
        return None
    return round(kendall_tau(np.array([one[key] for key in both]), np.array([other[key] for key in both])), 3)
