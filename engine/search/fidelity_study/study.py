"""Runs a fidelity study: trains architectures in full and at several low fidelities, and recommends one of these."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import yaml

from engine.config import FINAL_SETTINGS, Plan, RunSettings, SearchConfig, config_to_dict
from engine.recipes import default_config, recipe_of
from engine.run_folder import RunFolder, write_atomically
from engine.search.fidelity_study import summary
from engine.search.fidelity_study.design import FidelityStudy, propose_study, study_scores
from engine.search.fidelity_study.ranking import StudyScores, clearly_worse, repeatability
from engine.search.journal import Journal
from engine.search.progress import Display
from engine.search.run import RunDefinition, run, visible
from engine.search.setup import SearchSetup
from engine.space import Candidates
from engine.spaces.load import load_space
from engine.trial import Fidelity, History, NoWinner, Trial, UsageError

Json = dict[str, Any]

# A study warns that full training ranks mostly by luck if two full trainings of the same architectures agree with a tau
# below REPEATABLE. If none was trained twice, it warns if full training gets less than LEARNED of the way from guessing
# to perfect accuracy.
REPEATABLE, LEARNED = 0.3, 0.1


def default_lows(config: SearchConfig) -> tuple[Fidelity, ...]:
    """The low fidelities compared by default, given the epochs of full fidelity.

    From scratch: no teacher, KD and NST on a ninth of the data, and AT on a 27th, which ranked best for their cost in
    the measurements of the paper's authors (docs/results/authors.md). In fine-tuning: a quarter of the epochs on a
    third of the data, with and without KD, and KD for longer on less.
    """
    high = config.high
    if recipe_of(config) == "finetune":
        third, less = f"1/3x{max(1, high.epochs // 4)}", f"1/9x{max(1, high.epochs // 2)}"
        return tuple(map(Fidelity.parse, (f"kd@{third}", f"none@{third}", f"kd@{less}")))
    ninth, less = f"1/9x{max(1, high.epochs // 3)}", f"1/27x{max(1, high.epochs // 2)}"
    return tuple(map(Fidelity.parse, (f"none@{ninth}", f"kd@{ninth}", f"nst@{ninth}", f"at@{less}")))


def study_before_search(settings: RunSettings, run_dir: Path, display: Display) -> RunSettings:
    """Runs or resumes a fidelity study inside the folder of a search; returns settings with the recommended fidelity.

    Raises UsageError if the budget leaves no full training to search with, NoWinner if the study is not finished.
    """
    config, budget = settings.config, settings.budget
    folder = RunFolder(run_dir.absolute()).first_study
    count = max(8, min(16, budget.max_high // 2))
    if budget.max_high <= count:
        raise UsageError(f"--low auto trains {count} architectures in full first: --max-high must be more than {count}")
    found: Json = json.loads(folder.study_result.read_text()) if folder.study_result.exists() else {}
    if not found.get("complete"):
        study = FidelityStudy((), count)
        own = replace(settings, config=replace(config, fidelity_study=""))
        found = run_fidelity_study(own, study, folder.path, display)
    if not found["complete"]:
        raise NoWinner(
            f"the fidelity study in {folder} is not finished, so the low fidelity to search with is not known yet; "
            "run the same command again to resume, or raise --gpu-hours"
        )
    return replace(settings, config=recommended(config, Fidelity.parse(found["recommended"]), folder))


def run_fidelity_study(settings: RunSettings, study: FidelityStudy, run_dir: Path, display: Display) -> Json:
    """Runs or resumes a fidelity study in a run folder; returns what it found.

    Writes evaluations.csv, fidelity-study.json, fidelity-study.png (if matplotlib is installed) and recommended.yaml.
    """
    config, budget = settings.config, settings.budget
    _check(study, config)
    distilled = [low for low in study.lows if low.kd_loss != "none"]
    # The low fidelity of the settings tells the set-up whether the study needs a teacher, as by default it does.
    first = (*distilled, *study.lows, Fidelity("low", kd_loss="kd"))[0]
    config = replace(config, low=replace(first, name="low"))
    lows, highs = study.architectures * study.low_repeats, study.architectures * study.repeats
    budget = replace(budget, target_accuracy=float("inf"), max_low=lows, max_high=highs)

    def plan(config: SearchConfig) -> Plan:
        lows = study.lows or default_lows(config)
        return Plan(lows, config.high, "fidelity-study", budget.max_low, budget.max_high, config.seed)

    def propose(candidates: Candidates, history: History, plan: Plan, slots: int) -> list[Trial]:
        return propose_study(candidates, history, plan, slots, replace(study, lows=plan.lows))

    def finish(setup: SearchSetup, history: History, journal: Journal) -> Json:
        return conclude(setup, replace(study, lows=setup.plan.lows), history)

    definition = RunDefinition("fidelity-study", plan, propose, finish)
    return run(definition, replace(settings, config=config, budget=budget), run_dir, display)


def _check(study: FidelityStudy, config: SearchConfig) -> None:
    """Raises UsageError for a study that could show nothing."""
    for name, value, least in (
        ("architectures", study.architectures, 4),
        ("repeats", study.repeats, 1),
        ("low-repeats", study.low_repeats, 1),
    ):
        if value < least:
            raise UsageError(f"--{name} is {value}; it must be at least {least}")
    if len(set(study.lows)) < len(study.lows):
        raise UsageError("--lows names a fidelity twice")
    untrained = [low.name for low in study.lows if not low.epochs]
    if untrained and load_space(config.space).inherit is None:
        raise UsageError(f"--lows {untrained[0]} trains for no epoch; that says something of pretrained spaces only")
    if config.high.kd_loss != "none" and any(low.weights for low in study.lows):
        raise UsageError(
            "--lows with their own weights need --high.kd-loss none, because a search uses one set of weights for both "
            "fidelities; compare weights in separate studies (--kd-temperature, --at-weight and so on)"
        )


def conclude(setup: SearchSetup, study: FidelityStudy, history: History) -> Json:
    """What the evaluations show, also written to the run folder. Raises NoWinner if there are too few."""
    folder, display = setup.context.folder, setup.context.display
    scores = study_scores(setup.candidates, history, setup.plan, study)
    seen = visible(history, setup)
    worse = clearly_worse(study_scores(setup.candidates, seen, setup.plan, study)) if study.drop else set()
    dropped = {low for low in worse if len(scores.scored(low)) < len(scores.architectures)}
    found = summary.summarise(scores, dropped)
    if found is None:
        raise NoWinner("fewer than three architectures have both scores; raise the budget, or see the log")
    result = {"run_dir": str(folder), **found, "config": str(folder.recommended)}
    result["evaluations"] = len(history.answered)
    result["complete"] = not propose_study(setup.candidates, seen, setup.plan, 1, study)
    result["warning"] = luck_warning(scores, len(setup.facts.classes))
    more = "" if result["complete"] else "the study is not finished; run the same command again to resume"
    for line in [*summary.table(result), *filter(None, [result["warning"], more])]:
        display.say(line)
    best = next(low for low in study.lows if low.name == result["recommended"])
    write_atomically(folder.study_evaluations, summary.evaluations_csv(history.answered))
    write_atomically(folder.recommended, recommended_yaml(setup.context.config, best, folder, result["reason"]))
    summary.draw(folder.study_picture, result)
    write_atomically(folder.study_result, json.dumps(result, indent=2) + "\n")
    return result


def luck_warning(scores: StudyScores, classes: int) -> str:
    """A warning if full training ranks mostly by luck, so that there is little to predict; otherwise ""."""
    full = float(scores.means(scores.high, scores.scored(scores.high)).mean())
    tau = repeatability(scores)
    if tau is not None:
        sure, why = tau >= REPEATABLE, f"agrees with a second one of the same architectures by a tau of only {tau:.2f}"
    else:
        sure = full - 1 / classes >= LEARNED * (1 - 1 / classes)
        why = f"reaches {100 * full:.1f} % on {classes} classes on average, hardly more than guessing"
    if sure:
        return ""
    return (
        f"warning: full training {why}, so this study mostly ranks luck; "
        "use more images, more --high.epochs, or another --lr"
    )


def recommended(config: SearchConfig, low: Fidelity, study: RunFolder) -> SearchConfig:
    """The settings of a search at that low fidelity, which starts with the evaluations of the study."""
    weights: dict[str, Any] = dict(low.weights)
    # Always the study's own file, even for a library network: training time differs from file to file.
    teacher = config.teacher if low.kd_loss == "none" else str(study.teacher_weights(config))
    renamed = replace(low, name="low", weights=())
    return replace(config, low=renamed, teacher=teacher, fidelity_study=str(study), **weights)


def recommended_yaml(config: SearchConfig, low: Fidelity, study: RunFolder, reason: str) -> str:
    """A file for `search -c`: every setting that differs from its default, and both fidelities."""
    defaults, wanted = config_to_dict(default_config(config)), config_to_dict(recommended(config, low, study))
    always = ("low", "high", "space", "recipe")
    kept = {key: value for key, value in wanted.items() if value != defaults[key] or key in always}
    if "final" in kept:
        kept["final"] = {key: kept["final"][key] for key in FINAL_SETTINGS}
    return f"# {low.name}: {reason}.\n" + yaml.safe_dump(kept, sort_keys=False)
