"""What a search would cost here: its evaluations, and their hours from a few timed steps. Starts no run."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from dataclasses import dataclass, replace
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np

from engine import config
from engine.config import Budget, Resources, Study
from engine.fleet import providers
from engine.fleet.devices import describe, layout
from engine.fleet.drain import answer_of
from engine.fleet.fleet import Fleet, open_fleet
from engine.search import journal
from engine.search.adopt import settings
from engine.search.ground import checked, fast, fitting, largest, probe, task_for, teacher_path
from engine.search.progress import Display
from engine.space import Candidates
from engine.trial import (
    Architecture,
    Evaluation,
    Fidelity,
    NoWinner,
    Trial,
    UsageError,
    evaluation_from_json,
    trial_to_json,
)

Json = dict[str, Any]
Run = Callable[[list[Trial]], list[Evaluation]]
# What is timed of a training: so many batches, in one epoch to warm up and two that count.
TIMED_BATCHES, TIMED_EPOCHS = 4, (1, 2)
STEP_PHASES = ("data", "teacher", "train")  # paid at every step; the rest once an evaluation


@dataclass(frozen=True)
class Work:
    """Evaluations of one kind: how many, on how many images each, and the seconds of one."""

    count: int
    images: int
    epochs: int
    seconds: float

    @property
    def hours(self) -> float:
        return self.count * self.seconds / 3600


def plan_search(study: Study, budget: Budget, resources: Resources, run_dir: Path, show: Display) -> Json:
    """What the search with this configuration has left to do, and its expected cost on this machine.

    A worker times a few steps of real trainings: a cohort of low-fidelity students from all over the space, one
    full-fidelity student of median size, the teacher. Numbers of evaluations are what the budget allows at most.
    Raises EngineError as a search does, and NoWinner where a timed training fails.
    """
    space, wanted = checked(study, budget, resources), layout(resources)
    config.check_files(study)
    if study.pilot == "auto":
        show.say("the study of low fidelities that comes first is not in these figures")
    elif study.pilot:
        settings(Path(study.pilot), study)
        show.say(f"what has been measured in {study.pilot} is in these figures as if it were still to be done")
    if not providers.local(resources):
        raise UsageError("--dry-run times steps on this machine; leave --executor out, or call it inside a job")
    with tempfile.TemporaryDirectory(prefix="mfkd-plan-") as scratch:
        folder = Path(scratch)
        fleet = open_fleet(resources, replace(wanted, workers=1, nodes=1), folder / "logs")
        try:
            # Without the cache of the teacher: what it saves depends on how much of it later cohorts find.
            task = task_for(study, replace(resources, teacher_cache="0"), folder, fleet)
            facts = probe(study, task, fleet, show)
            everything, fit = fitting(space, study, facts, show)
            if study.max_latency_ms < float("inf"):  # as the run has measured it, if it has
                # What was measured before a search has begun is measured again, and here without its file.
                known = bool(journal.read(run_dir / "journal.jsonl").asked)
                fit = fast(fit, study, task, fleet, run_dir.absolute() if known else folder, show)
            teacher = teacher_path(study, run_dir.absolute())
            to_train = study.teacher == "auto" and study.low.kd_loss != "none" and not teacher.exists()
            if study.low.kd_loss != "none" and not teacher.exists():
                teacher = folder / "teacher.safetensors"
                _stand_in(study, largest(everything), teacher, task, fleet)

            def run(trials: list[Trial]) -> list[Evaluation]:
                show.say(f"timing: {len(trials)} at a time, {trials[0].fidelity.epochs * TIMED_BATCHES} steps")
                asked = {**task, "teacher": str(teacher), "trials": [trial_to_json(trial) for trial in trials]}
                return [evaluation_from_json(answer) for answer in answer_of(fleet.submit("run_trials", asked))]

            side = min(config.side_by_side(resources, gpu=wanted.device == "cuda"), len(fit))
            done = answered(run_dir / "journal.jsonl")
            # What is promoted without a low-fidelity score gets one in the end (engine/search/search.py, `unpaired`).
            lows = budget.max_low + budget.max_high if budget.max_low else 0
            kinds = [(study.low, spread(fit, side), lows), (study.high, spread(fit, 1), budget.max_high)]
            if to_train:
                kinds.insert(0, (Fidelity("teacher", epochs=study.teacher_epochs), [largest(everything)], 1))
            works = {
                fidelity.name: timed(study, facts, fidelity, members, max(0, most - done.get(fidelity, 0)), run)
                for fidelity, members, most in kinds
            }
        finally:
            fleet.close()
    show.say(summary(works, run_dir, wanted.workers, describe(wanted)))
    return as_json(works, run_dir, wanted.workers, len(fit))


def _stand_in(study: Study, architecture: Architecture, path: Path, task: Json, fleet: Fleet) -> None:
    """A teacher to be asked, as the search will have it but for its weights: "pretrained" is left as it was built."""
    network = study.teacher if config.ready_made(study.teacher) else f"{study.space}#{architecture}"
    answer_of(fleet.submit("run_teacher", {**task, "path": str(path), "network": network, "pretrained": True}))


def spread(fit: Candidates, count: int) -> list[Architecture]:
    """Candidates at `count` equally spaced places of the order by MACs; of one, the median."""
    order = np.argsort(fit.macs, kind="stable")
    return [fit.architecture(int(order[int((place + 0.5) / count * len(fit))])) for place in range(count)]


def answered(path: Path) -> dict[Fidelity, int]:
    """How many answers of each fidelity a journal holds."""
    counts: dict[Fidelity, int] = {}
    for evaluation in journal.read(path).answers.values():
        counts[evaluation.trial.fidelity] = counts.get(evaluation.trial.fidelity, 0) + 1
    return counts


def timed(
    study: Study,
    facts: Json,
    fidelity: Fidelity,
    members: list[Architecture],
    count: int,
    run: Run,
) -> Work:
    """The seconds of one evaluation: the phases of its steps as those of a short training, the others as they are."""
    train, classes = facts["images"]["train"], len(facts["classes"])
    images = max(round(fidelity.fraction * train), classes)
    batch = min(study.batch_size, images)
    short = replace(fidelity, fraction=min(fidelity.fraction, Fraction(max(TIMED_BATCHES * batch, classes), train)))
    steps = TIMED_EPOCHS[-1] * (max(round(short.fraction * train), classes) // batch)
    for epochs in TIMED_EPOCHS:
        question = replace(short, name="timing", epochs=epochs)
        answers = run([Trial(number, member, question, study.seed) for number, member in enumerate(members)])
        failed = next((answer for answer in answers if not answer.ok), None)
        if failed is not None:
            why = f"{failed.status}: {failed.error}"
            raise NoWinner(f"a timed training of {failed.trial.architecture} at {fidelity.name} fidelity failed: {why}")
    stepping = sum(answer.costs.get(phase, 0.0) for answer in answers for phase in STEP_PHASES)
    once = sum(answer.seconds for answer in answers) - stepping
    whole = once + stepping / steps * fidelity.epochs * (images // batch)
    return Work(count, images, fidelity.epochs, whole / len(members))


def hours(works: dict[str, Work], workers: int) -> float:
    """Wall time: the teacher comes first and alone, then every worker is busy."""
    alone = works["teacher"].hours if "teacher" in works else 0.0
    return alone + (works["low"].hours + works["high"].hours) / workers


def summary(works: dict[str, Work], run_dir: Path, workers: int, machines: str) -> str:
    """The plan for people."""
    lines = [f"plan for {run_dir} on {machines}; nothing has been started"]
    for name, work in works.items():
        lines.append(
            f"  {name:<8}{work.count:>5} x {work.images:,} images x {work.epochs} epochs: "
            f"{work.seconds:,.1f} s each, {work.hours:,.2f} worker-hours"
        )
    lines.append(
        f"  at most {sum(work.hours for work in works.values()):,.2f} worker-hours; "
        f"about {hours(works, workers):,.2f} hours if all workers are as fast together as one is alone"
    )
    return "\n".join(lines)


def as_json(works: dict[str, Work], run_dir: Path, workers: int, candidates: int) -> Json:
    described = {
        name: {"evaluations": w.count, "images": w.images, "epochs": w.epochs, "seconds": round(w.seconds, 3)}
        for name, w in works.items()
    }
    return {
        "run_dir": str(run_dir.absolute()),
        "status": "planned",
        "candidates": candidates,
        "workers": workers,
        **described,
        "worker_hours": round(sum(work.hours for work in works.values()), 4),
        "hours": round(hours(works, workers), 4),
    }
