"""Starts a search with the evaluations of a fidelity study: they become the first ones in its journal."""

from __future__ import annotations

import filecmp
import json
import math
import os
import shutil
from dataclasses import replace
from pathlib import Path

from engine.config import (
    Plan,
    SearchConfig,
    config_at,
    config_from_dict,
    config_to_dict,
    flatten,
    left_to_auto,
    measures_latency,
)
from engine.run_folder import RunFolder
from engine.search.journal import Journal, read_journal
from engine.search.setup import SearchSetup
from engine.space import Candidates
from engine.trial import LOSS_WEIGHTS, EnvironmentUnusable, Evaluation, Fidelity, Trial, UsageError

# Settings that affect which trials are proposed, but not the outcome of an evaluation.
MAY_DIFFER = {"low", "method", "fidelity_study", "min_macs", "max_macs", "max_params", "max_latency_ms", "objectives"}
# Of these, what matters is compared for each evaluation: some use no teacher.
MAY_DIFFER |= {"final", "only", "teacher", "teacher_epochs", "teacher_weights", "from_scratch", *LOSS_WEIGHTS}
MAY_DIFFER |= {"proxies"}


def warm_start(study: RunFolder, setup: SearchSetup, journal: Journal) -> None:
    """Fills the empty journal of a search with the successful evaluations of a study at the fidelities of its plan.

    They count towards the budget, which would otherwise have paid for them; weights of full trainings are linked.
    Evaluations distilled from another teacher are left out, and so are architectures that the search may not propose.
    Raises UsageError if weights of the study are missing, or its settings differ.
    """
    config, plan, folder = setup.context.config, setup.plan, setup.context.folder
    theirs = study_config(study, config)
    same_teacher = _same_file(study.teacher_weights(theirs), folder.teacher_weights(config))
    measured = [e for e in read_journal(study.journal).answers.values() if e.ok]
    allowed = [e for e in measured if _may_propose(e, config, setup.candidates)]
    comparable = [e for e in allowed if e.trial.fidelity.kd_loss == "none" or same_teacher]
    kept = [(e, own) for e in comparable if (own := _same_fidelity(e.trial.fidelity, theirs, config, plan)) is not None]
    mine = [replace(e, trial=replace(e.trial, number=place, fidelity=own)) for place, (e, own) in enumerate(kept)]
    record = read_journal(journal.path)
    if [e.trial for e in mine[: len(record.asked)]] != record.asked:
        return  # the search has progressed since, and its own journal decides
    _check_weights(study, [e.trial for e, own in kept if own == config.high])
    left_out = len(allowed) - len(comparable)
    note = f"; leaving out {left_out} that were distilled from another teacher" if left_out else ""
    setup.context.display.say(f"starting with {len(mine)} evaluations of {study}{note}")
    for (before, _), evaluation in zip(kept, mine, strict=True):
        trial = evaluation.trial
        if trial.fidelity == config.high:
            _link(study.weights(before.trial), folder.weights(trial))
        if trial.number >= len(record.asked):
            journal.ask([trial])
        if trial.number not in record.answers:
            journal.answer(evaluation)


def _check_weights(study: RunFolder, full: list[Trial]) -> None:
    missing = [trial for trial in full if not study.weights(trial).is_file()]
    if missing:
        raise UsageError(
            f"--fidelity-study {study} lacks the weights of {len(missing)} of its {len(full)} full trainings: restore "
            f"{study.weights(missing[0])}, or leave --fidelity-study out"
        )


def _may_propose(evaluation: Evaluation, config: SearchConfig, candidates: Candidates) -> bool:
    """Whether the search could have asked for this evaluation. Full trainings are timed too, if anything is."""
    full = evaluation.trial.fidelity == config.high
    timed = full and measures_latency(config)
    in_time = not timed or evaluation.costs.get("latency_ms", math.inf) <= config.max_latency_ms
    return in_time and candidates.row(evaluation.trial.architecture) is not None


def _same_fidelity(fidelity: Fidelity, theirs: SearchConfig, config: SearchConfig, plan: Plan) -> Fidelity | None:
    """The fidelity of the plan that trains exactly as `fidelity` does in the study, under any name.

    Only the full fidelity of the study can stand for the full one of the plan: no other keeps its weights.
    """
    wanted = replace(fidelity, name="", weights=_weights(theirs, fidelity))
    for own in (*([plan.high] if fidelity == theirs.high else []), *plan.lows):
        if replace(own, name="", weights=_weights(config, own)) == wanted:
            return own
    return None


def _weights(config: SearchConfig, fidelity: Fidelity) -> tuple[tuple[str, float], ...]:
    """The loss weights in effect at a fidelity: its own, else those of the configuration."""
    if fidelity.kd_loss == "none":
        return ()
    whole = config_at(config, fidelity)
    return tuple((name, float(getattr(whole, name))) for name in LOSS_WEIGHTS)


def _same_file(one: Path, other: Path) -> bool:
    if one.exists() and other.exists():
        return filecmp.cmp(one, other, shallow=False)
    return one.absolute() == other.absolute()


def check_same_data(study: RunFolder, fingerprint: str) -> None:
    """Raises UsageError if the study used other images."""
    if study.run_file.exists():
        data = json.loads(study.run_file.read_text()).get("data", {})
        if data.get("fingerprint", fingerprint) != fingerprint:
            raise UsageError(f"--fidelity-study {study} was run on other data; leave --fidelity-study out")


def study_config(study: RunFolder, config: SearchConfig) -> SearchConfig:
    """The configuration of a study; UsageError if it is missing, or its evaluations would differ from this search's.

    Settings that this search leaves to auto may have any value in the study.
    """
    if not study.config.is_file():
        raise UsageError(f"--fidelity-study {study}: no run folder; give that of a fidelity study, or auto")
    try:
        stored = study.read_config()["config"]
    except EnvironmentUnusable as error:
        raise UsageError(f"--fidelity-study {study} is not the run folder of a fidelity study ({error})") from error
    theirs, mine = {**config_to_dict(SearchConfig()), **stored}, config_to_dict(config)
    there, here, auto = dict(flatten(theirs)), dict(flatten(mine)), left_to_auto(config)
    changed = [
        f"{name}: {there.get(name)} there, {value} here"
        for name, value in here.items()
        if name.partition(".")[0] not in MAY_DIFFER and name not in auto and there.get(name) != value
    ]
    if changed:
        raise UsageError(f"--fidelity-study {study} has other settings ({'; '.join(changed)}); use the same ones")
    return config_from_dict(theirs)


def _link(old: Path, new: Path) -> None:
    """Makes `new` the same file as `old`, without a second copy on disk if the file system allows it."""
    new.parent.mkdir(parents=True, exist_ok=True)
    temporary = new.with_suffix(".tmp")
    temporary.unlink(missing_ok=True)
    try:
        os.link(old, temporary)
    except OSError:
        shutil.copyfile(old, temporary)
    temporary.replace(new)
