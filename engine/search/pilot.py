"""A fidelity study on the user's data and space: what each cheap judgement is worth beyond MACs, and which to take."""

from __future__ import annotations

import json
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import yaml

from engine import config
from engine.config import Budget, Plan, Resources, Study
from engine.fleet.fleet import Fleet
from engine.search import findings, search
from engine.search.ground import Ground, teacher_path
from engine.search.journal import History
from engine.search.policies.pilot import Pilot, measured, pilot
from engine.search.policies.ranking import Measured, clearly_worse, repeatability
from engine.search.progress import Display
from engine.trial import Fidelity, NoWinner, UsageError

Json = dict[str, Any]

# Below it a study warns that it ranks by luck: the tau of one full training with another of the same architectures;
# where none was trained twice, the part of the way from guessing to all right that full training comes.
REPEATABLE, LEARNED = 0.3, 0.1


def usual_lows(high: Fidelity) -> tuple[Fidelity, ...]:
    """What is compared unless it is said: without a teacher, with KD and with NST on a ninth of the data, and attention
    transfer on less: what ranked best for its price in the paper authors' measurements (docs/evidence.md)."""
    ninth, less = f"1/9x{max(1, high.epochs // 3)}", f"1/27x{max(1, high.epochs // 2)}"
    return tuple(map(Fidelity.parse, (f"none@{ninth}", f"kd@{ninth}", f"nst@{ninth}", f"at@{less}")))


def study_first(study: Study, budget: Budget, resources: Resources, run_dir: Path, show: Display) -> Study:
    """The configuration of a search that begins with a fidelity study of its own, made in RUN/pilot if it is not there.

    Raises UsageError where the budget leaves nothing to search with.
    """
    folder = run_dir.absolute() / "pilot"
    count = max(8, min(16, budget.max_high // 2))
    if budget.max_high <= count:
        raise UsageError(f"--low auto trains {count} architectures in full first: --max-high must be over {count}")
    done = folder / "fidelity.json"
    found: Json = json.loads(done.read_text()) if done.exists() else {}
    if not found.get("complete"):
        plan = Pilot(usual_lows(study.high), count)
        found = study_fidelities(replace(study, pilot=""), plan, budget, resources, folder, show)
    if not found["complete"]:
        raise NoWinner(
            f"the study of low fidelities in {folder} is not finished, so there is nothing to search with yet: "
            "repeat the command to go on (--wall-time), or raise --gpu-hours"
        )
    return recommended(study, Fidelity.parse(found["recommended"]), folder)


def study_fidelities(
    study: Study, plan: Pilot, budget: Budget, resources: Resources, run_dir: Path, show: Display
) -> Json:
    """Runs or continues a fidelity study in a run folder; returns what the command prints.

    Writes evaluations.csv, fidelity.json, fidelity.png (where matplotlib is installed) and recommended.yaml.
    """
    _check(plan, study)
    taught = [low for low in plan.lows if low.kd_loss != "none"]
    study = replace(study, low=replace((taught or plan.lows)[0], name="low"))  # the one that calls for a teacher
    counts = {"max_low": plan.architectures * plan.low_repeats, "max_high": plan.architectures * plan.repeats}
    budget = replace(budget, target_accuracy=float("inf"), **counts)
    asks = Plan(plan.lows, study.high, study.method, budget.max_low, budget.max_high, study.seed)

    def end(ground: Ground, history: History, fleet: Fleet) -> Json:
        return conclude(ground, plan, history, show)

    purpose = search.Purpose("fidelity", asks, partial(pilot, study=plan), end)
    return search.run(purpose, study, budget, resources, run_dir, show)


def _check(plan: Pilot, study: Study) -> None:
    for name, value, least in (
        ("architectures", plan.architectures, 4),
        ("repeats", plan.repeats, 1),
        ("low-repeats", plan.low_repeats, 1),
        ("lows", len(plan.lows), 1),
    ):
        if value < least:
            raise UsageError(f"--{name} is {value}; it must be at least {least}")
    if len(set(plan.lows)) < len(plan.lows):
        raise UsageError("--lows names a fidelity twice")
    if study.high.kd_loss != "none" and any(low.weights for low in plan.lows):
        raise UsageError(
            "--lows with weights of their own need --high.kd-loss none: a search has one set of weights for both; "
            "compare them in a study each (--kd-temperature, --at-weight and so on)"
        )


def conclude(ground: Ground, plan: Pilot, history: History, show: Display) -> Json:
    """What the answers say, written to the run folder; raises NoWinner where they are too few to say anything."""
    found = measured(ground.candidates, history, ground.plan, plan)
    seen = search.visible(history, ground.cost)
    worse = clearly_worse(measured(ground.candidates, seen, ground.plan, plan)) if plan.drop else set()
    said = findings.summarise(found, {low for low in worse if len(found.having(low)) < len(found.architectures)})
    if said is None:
        raise NoWinner("fewer than three architectures have been judged both ways: raise the budget, or see the log")
    run_dir = ground.run_dir
    result = {"run_dir": str(run_dir), **said, "config": str(run_dir / "recommended.yaml")}
    result["evaluations"] = len(history.answered)
    result["complete"] = not pilot(ground.candidates, seen, ground.plan, 1, plan)
    result["warning"] = by_luck(found, len(ground.facts["classes"]))
    more = "" if result["complete"] else "not all has been measured yet: the same command goes on"
    for line in [*findings.table(result), *filter(None, [result["warning"], more])]:
        show.say(line)
    config.write_whole(run_dir / "evaluations.csv", findings.evaluations_csv(history.answered))
    best = next(low for low in plan.lows if low.name == result["recommended"])
    config.write_whole(run_dir / "recommended.yaml", recommended_yaml(ground.study, best, run_dir, result["reason"]))
    findings.draw(run_dir / "fidelity.png", result)
    config.write_whole(run_dir / "fidelity.json", json.dumps(result, indent=2) + "\n")
    return result


def by_luck(found: Measured, classes: int) -> str:
    """What to say where full training ranks mostly by luck, so that there is little to predict; else ""."""
    full = float(found.means(found.high, found.having(found.high)).mean())
    again = repeatability(found)
    if again is not None:
        sure, why = again >= REPEATABLE, f"agrees with another of the same architectures by a tau of only {again:.2f}"
    else:
        sure = full - 1 / classes >= LEARNED * (1 - 1 / classes)
        why = f"comes to {100 * full:.1f} % of {classes} classes on the average, hardly more than guessing"
    if sure:
        return ""
    return (
        f"warning: a full training {why}, and what is ranked here is mostly luck; "
        "give it more images, more --high.epochs, or another --lr"
    )


def recommended(study: Study, low: Fidelity, run_dir: Path) -> Study:
    """The study of a search with that low fidelity, which begins with the results of this run folder."""
    weights: dict[str, Any] = dict(low.weights)
    # The study's own file, also of a library's network: every file has the seconds that it took in it.
    teacher = study.teacher if low.kd_loss == "none" else str(teacher_path(study, run_dir))
    renamed = replace(low, name="low", weights=())
    return replace(study, low=renamed, teacher=teacher, pilot=str(run_dir), **weights)


def recommended_yaml(study: Study, low: Fidelity, run_dir: Path, reason: str) -> str:
    """The flags of `search -c`: whatever differs from the defaults, and both fidelities."""
    plain, wanted = config.to_dict(Study()), config.to_dict(recommended(study, low, run_dir))
    kept = {key: value for key, value in wanted.items() if value != plain[key] or key in ("low", "high")}
    return f"# {low.name}: {reason}.\n" + yaml.safe_dump(kept, sort_keys=False)
