"""A fidelity study on the user's data and space: what each cheap judgement is worth beyond MACs, and which to take."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from fractions import Fraction
from functools import partial
from pathlib import Path
from typing import Any, get_args

import yaml

from engine import config, findings, search
from engine.config import Budget, Plan, Resources, Study
from engine.fleet import Fleet
from engine.journal import History
from engine.policies.pilot import Pilot, measured, pilot
from engine.policies.ranking import (
    LOOKS_COST,
    Difference,
    Measured,
    Ranking,
    clearly_worse,
    difference,
    macs_alone,
    rank,
    repeatability,
)
from engine.progress import Display
from engine.trial import Fidelity, KDLoss, NoWinner, UsageError

Json = dict[str, Any]
FORM = re.compile(r"(?P<loss>[a-z+]+)@(?P<fraction>[\d./]+)x(?P<epochs>\d+)(?::(?P<rest>.+))?")


def parse_fidelity(text: str) -> Fidelity:
    """The low fidelity that `LOSS@FRACTIONxEPOCHS[:name=value,...]` describes, by that name: kd+at@1/27x30:width=0.5.

    The names are width, resolution and the loss weights of a study. Raises UsageError for anything else.
    """
    match = FORM.fullmatch(text)
    example = "write LOSS@FRACTIONxEPOCHS, like kd+at@1/27x30 or kd@1/9x20:width=0.5,kd_temperature=2"
    if match is None:
        raise UsageError(f"'{text}' is no fidelity; {example}")
    if match["loss"] not in get_args(KDLoss):
        raise UsageError(f"'{text}': no loss '{match['loss']}'; there are {', '.join(get_args(KDLoss))}")
    try:
        pairs = [word.split("=") for word in (match["rest"] or "").split(",") if word]
        own = {name: float(value) for name, value in pairs}
        fraction = Fraction(match["fraction"])
    except (ValueError, ZeroDivisionError):
        raise UsageError(f"'{text}' is no fidelity; {example}") from None
    width, resolution = own.pop("width", 1.0), int(own.pop("resolution", 0))
    weights = tuple(sorted(own.items()))
    return Fidelity(text, fraction, int(match["epochs"]), width, resolution, match["loss"], weights)  # type: ignore[arg-type]


def usual_lows(high: Fidelity) -> tuple[Fidelity, ...]:
    """What is compared unless it is said: with and without a teacher on a ninth of the data, and a cheaper one."""
    ninth, less = f"1/9x{max(1, high.epochs // 3)}", f"1/27x{max(1, high.epochs // 2)}"
    return tuple(map(parse_fidelity, (f"none@{ninth}", f"kd@{ninth}", f"kd+at@{ninth}", f"kd+at@{less}")))


def study_first(study: Study, budget: Budget, resources: Resources, run_dir: Path, show: Display) -> Study:
    """The configuration of a search that begins with a fidelity study of its own, made in RUN/pilot if it is not there.

    Raises UsageError where the budget leaves nothing to search with.
    """
    folder = run_dir.absolute() / "pilot"
    count = max(8, min(16, budget.max_high // 2))
    if budget.max_high <= count:
        raise UsageError(f"--low auto trains {count} architectures in full first: --max-high must be over {count}")
    done = folder / "fidelity.json"
    if not done.exists():
        plan = Pilot(usual_lows(study.high), count)
        study_fidelities(replace(study, pilot=""), plan, budget, resources, folder, show)
    return recommended(study, parse_fidelity(json.loads(done.read_text())["recommended"]), folder)


def study_fidelities(
    study: Study, plan: Pilot, budget: Budget, resources: Resources, run_dir: Path, show: Display
) -> Json:
    """Runs or continues a fidelity study in a run folder; returns what the command prints.

    Writes evaluations.csv, fidelity.json, fidelity.png (where matplotlib is installed) and recommended.yaml.
    """
    _check(plan)
    taught = [low for low in plan.lows if low.kd_loss != "none"]
    study = replace(study, low=replace((taught or plan.lows)[0], name="low"))  # the one that calls for a teacher
    counts = {"max_low": plan.architectures * plan.low_repeats, "max_high": plan.architectures * plan.repeats}
    budget = replace(budget, target_accuracy=float("inf"), **counts)
    asks = Plan(plan.lows, study.high, study.method, budget.max_low, budget.max_high, study.seed)

    def end(ground: search.Ground, history: History, fleet: Fleet) -> Json:
        return conclude(ground, plan, history, show)

    return search.run(study, budget, resources, run_dir, show, asks, partial(pilot, study=plan), end)


def _check(plan: Pilot) -> None:
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


def conclude(ground: search.Ground, plan: Pilot, history: History, show: Display) -> Json:
    """What the answers say, written to the run folder; raises NoWinner where they are too few to say anything."""
    found = measured(ground.candidates, history, ground.plan, plan)
    rankings = [ranking for low in plan.lows if (ranking := rank(found, low)) is not None]
    if not rankings:
        raise NoWinner("fewer than three architectures have been judged both ways: raise the budget, or see the log")
    best, reason = recommend(found, rankings)
    dropped = clearly_worse(found) if plan.drop else set()
    result: Json = {
        "run_dir": str(ground.run_dir),
        "full": len(found.architectures),
        "repeatability": repeatability(found),
        "macs": findings.statistic_to_json(macs_alone(found)),
        "fidelities": [findings.ranking_to_json(r) | {"dropped": r.fidelity in dropped} for r in rankings],
        "distilled_less_undistilled": [findings.difference_to_json(d) for d in against_undistilled(found)],
        "recommended": best.fidelity.name,
        "reason": reason,
        "config": str(ground.run_dir / "recommended.yaml"),
    }
    for line in findings.table(result):
        show.say(line)
    run_dir = ground.run_dir
    config.write_whole(run_dir / "evaluations.csv", findings.evaluations_csv(history.answered))
    config.write_whole(run_dir / "fidelity.json", json.dumps(result, indent=2) + "\n")
    config.write_whole(run_dir / "recommended.yaml", recommended_yaml(ground.study, best.fidelity, run_dir, reason))
    findings.draw(run_dir / "fidelity.png", result)
    return result


def recommend(found: Measured, rankings: list[Ranking]) -> tuple[Ranking, str]:
    """The fidelity whose looks are worth most for their price, and why."""
    ordered = sorted(rankings, key=lambda r: (r.worth, r.given_macs.value), reverse=True)
    best, says = ordered[0], ordered[0].given_macs
    reason = (
        f"tau given MACs is {says.value:.2f} ± {says.stderr:.2f} at {best.price:.3f} of a full training: the best of "
        f"the looks that {LOOKS_COST:g} full trainings buy is expected to gain most"
    )
    if says.value < 2 * says.stderr:
        reason += "; within two standard errors it may say no more than MACs do: take more architectures to be sure"
    if len(ordered) > 1:
        gap = difference(found, best.fidelity, ordered[1].fidelity)
        if gap is not None and gap.value < 2 * gap.stderr:
            reason += f"; not surely better than {ordered[1].fidelity.name} ({gap.value:+.2f} ± {gap.stderr:.2f})"
    return best, reason


def against_undistilled(found: Measured) -> list[Difference]:
    """Each distilled fidelity against every one without a teacher on the same part of the data."""
    plain = [low for low in found.lows if low.kd_loss == "none"]
    pairs = [
        (low, other)
        for low in found.lows
        for other in plain
        if low.kd_loss != "none"
        and (low.fraction, low.width, low.resolution) == (other.fraction, other.width, other.resolution)
    ]
    return [gap for low, other in pairs if (gap := difference(found, low, other)) is not None]


def recommended(study: Study, low: Fidelity, run_dir: Path) -> Study:
    """The study of a search with that low fidelity, which begins with the results of this run folder."""
    weights: dict[str, Any] = dict(low.weights)
    teacher = study.teacher
    if teacher == "auto" and low.kd_loss != "none":
        teacher = str(run_dir / "teacher" / "teacher.safetensors")
    renamed = replace(low, name="low", weights=())
    return replace(study, low=renamed, teacher=teacher, pilot=str(run_dir), **weights)


def recommended_yaml(study: Study, low: Fidelity, run_dir: Path, reason: str) -> str:
    """The flags of `search -c`: whatever differs from the defaults, and both fidelities."""
    plain, wanted = config.to_dict(Study()), config.to_dict(recommended(study, low, run_dir))
    kept = {key: value for key, value in wanted.items() if value != plain[key] or key in ("low", "high")}
    return f"# {low.name}: {reason}.\n" + yaml.safe_dump(kept, sort_keys=False)
