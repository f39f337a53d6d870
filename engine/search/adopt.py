"""A search that begins with what a fidelity study has measured: its answers become the first ones of the journal."""

from __future__ import annotations

import dataclasses
import filecmp
import json
import math
import os
import shutil
from dataclasses import replace
from pathlib import Path

from engine import config
from engine.config import Plan, Study
from engine.search import journal
from engine.search.ground import teacher_path
from engine.search.journal import Journal
from engine.search.progress import Display
from engine.space import Candidates
from engine.trial import LOSS_WEIGHTS, EnvironmentUnusable, Evaluation, Fidelity, Trial, UsageError, weights_path

# Settings of a study that decide what is proposed or how it is called, not what an evaluation comes to.
FREE = {"low", "method", "pilot", "min_macs", "max_macs", "max_params", "max_latency_ms", "objectives", "only"}
FREE |= {"teacher", "teacher_epochs", *LOSS_WEIGHTS}  # looked at by answer: some have no teacher


def adopt(
    source: Path, study: Study, plan: Plan, candidates: Candidates, run_dir: Path, book: Journal, show: Display
) -> None:
    """Begins an empty journal with the study's successful answers at the fidelities of the plan, and links the weights
    of the full ones. They count towards the budget, since they are what the budget would have bought. What another
    teacher has taught is left out, and so is what the search may not propose.

    Raises UsageError where the study or weights of it are missing, or it was made with other settings.
    """
    theirs = settings(source, study)
    same_teacher = _same_file(teacher_path(theirs, source), teacher_path(study, run_dir))
    measured = [e for e in journal.read(source / "journal.jsonl").answers.values() if e.ok]
    answers = [e for e in measured if _may(e, study, candidates)]
    comparable = [e for e in answers if e.trial.fidelity.kd_loss == "none" or same_teacher]
    kept = [(e, own) for e in comparable if (own := _same(e.trial.fidelity, theirs, study, plan)) is not None]
    mine = [
        replace(e, trial=replace(e.trial, number=place, fidelity=own)) for place, (e, own) in enumerate(kept)
    ]
    record = journal.read(book.path)
    if [e.trial for e in mine[: len(record.asked)]] != record.asked:
        return  # the search has gone on from there: its journal is the truth
    full = [before.trial for before, own in kept if own == study.high]
    gone = [trial for trial in full if not weights_path(source, trial).is_file()]
    if gone:
        raise UsageError(
            f"--pilot {source} has lost the weights of {len(gone)} of its {len(full)} full trainings: restore "
            f"{weights_path(source, gone[0])}, or leave --pilot out"
        )
    left = f"; its teacher is another one, so {len(answers) - len(comparable)} are left out"
    show.say(f"beginning with {len(mine)} evaluations of {source}{left if len(comparable) < len(answers) else ''}")
    for (before, _), evaluation in zip(kept, mine, strict=True):
        trial = evaluation.trial
        if trial.fidelity == study.high:
            _link_weights(source, run_dir, before.trial, trial)
        if trial.number >= len(record.asked):
            book.ask([trial])
        if trial.number not in record.answers:
            book.answer(evaluation)


def _may(evaluation: Evaluation, study: Study, candidates: Candidates) -> bool:
    """Whether the search could have asked for it: a full training under a limit on latency is timed as well."""
    full = evaluation.trial.fidelity == study.high
    in_time = not full or evaluation.costs.get("latency_ms", math.inf) <= study.max_latency_ms
    return in_time and candidates.row(evaluation.trial.architecture) is not None


def _same(fidelity: Fidelity, theirs: Study, study: Study, plan: Plan) -> Fidelity | None:
    """The fidelity of the plan that judges as that one of the other study does, whatever it is called."""
    judged = replace(fidelity, name="", weights=_weights(theirs, fidelity))
    for own in (plan.high, *plan.lows):
        if replace(own, name="", weights=_weights(study, own)) == judged:
            return own
    return None


def _weights(study: Study, fidelity: Fidelity) -> tuple[tuple[str, float], ...]:
    """All loss weights in force at a fidelity, its own or the study's."""
    if fidelity.kd_loss == "none":
        return ()
    whole = config.for_fidelity(study, fidelity)
    return tuple((name, float(getattr(whole, name))) for name in LOSS_WEIGHTS)


def _same_file(one: Path, other: Path) -> bool:
    if one.exists() and other.exists():
        return filecmp.cmp(one, other, shallow=False)
    return one.absolute() == other.absolute()


def same_data(source: Path, fingerprint: str) -> None:
    """UsageError where the study to begin with was made on other images, whatever they are called."""
    path = source / "run.json"
    if path.exists() and json.loads(path.read_text()).get("fingerprint", fingerprint) != fingerprint:
        raise UsageError(f"--pilot {source} was measured on other data than these; leave --pilot out")


def settings(source: Path, study: Study) -> Study:
    """The settings of the study to begin with; UsageError where they are missing or would come to other answers."""
    try:
        stored = config.read_stored(source / "config.yaml")["study"]
    except EnvironmentUnusable as error:
        raise UsageError(f"--pilot {source} is no run folder of the fidelity command ({error})") from error
    theirs, mine = {**config.to_dict(Study()), **stored}, config.to_dict(study)
    changed = [
        f"{item.name}: {theirs[item.name]} there, {mine[item.name]} here"
        for item in dataclasses.fields(Study)
        if item.name not in FREE and theirs[item.name] != mine[item.name]
    ]
    if changed:
        raise UsageError(f"--pilot {source} was measured with other settings ({'; '.join(changed)}); repeat them")
    return config.study_from_dict(theirs)


def _link_weights(source: Path, run_dir: Path, theirs: Trial, mine: Trial) -> None:
    """The weights of a full training, without a second copy on the disk where that can be."""
    old, new = weights_path(source, theirs), weights_path(run_dir, mine)
    new.parent.mkdir(parents=True, exist_ok=True)
    aside = new.with_suffix(".tmp")
    aside.unlink(missing_ok=True)
    try:
        os.link(old, aside)
    except OSError:
        shutil.copyfile(old, aside)
    aside.replace(new)
