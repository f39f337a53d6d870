"""What a search would cost here: the number of evaluations, and hours extrapolated from a few timed steps."""

from __future__ import annotations

import tempfile
from dataclasses import dataclass, replace
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np

from engine.config import (
    RunSettings,
    check_paths,
    cohort_size,
    final_fidelity,
    is_library_model,
    needs_latency,
    search_plan,
)
from engine.fleet import providers
from engine.fleet.devices import describe, layout
from engine.recipes import resolve
from engine.run_folder import RunFolder
from engine.search.baseline_networks import baseline_networks
from engine.search.journal import read_journal
from engine.search.progress import Display
from engine.search.proxies import IMAGES_PER_SCORE, to_score
from engine.search.run_context import RunContext, one_worker, open_context
from engine.search.setup import (
    find_candidates,
    largest_member,
    limit_latency,
    needs_teacher,
    probe,
    teacher_task,
    validated_space,
)
from engine.search.warm_start import study_config
from engine.space import Candidates
from engine.tasks import DataFacts, TrialsTask
from engine.trial import Architecture, Evaluation, Fidelity, NoWinner, Trial, UsageError, evaluation_from_json

Json = dict[str, Any]
# A timed training has this many batches; one epoch warms up, two are counted.
TIMED_BATCHES, TIMED_EPOCHS = 4, (1, 2)
STEP_PHASES = ("data", "teacher", "train")  # take time at every step; the other phases only once per evaluation


@dataclass(frozen=True)
class WorkEstimate:
    """Evaluations of one kind: how many, how many images and epochs each takes, and the seconds of one."""

    count: int
    images: int
    epochs: int
    seconds: float

    @property
    def hours(self) -> float:
        return self.count * self.seconds / 3600


@dataclass(frozen=True)
class Sample:
    """What is timed for one kind of evaluation: `members` trained side by side. `count` of the kind are left to do."""

    fidelity: Fidelity
    members: list[Architecture]
    count: int


def dry_run(settings: RunSettings, run_dir: Path, display: Display) -> Json:
    """What a search with these settings has left to do, and its expected cost on this machine.

    A worker times a few steps of real trainings: a cohort of low-fidelity students over the whole range of MACs, a full
    training of a student of median size, a final one of the largest candidate, and the teacher. The numbers of
    evaluations are the most that the budget allows. Raises EngineError as a search does, and NoWinner if a timed
    training fails.
    """
    validated_space(settings)
    config, resources = settings.config, settings.resources
    wanted, folder = layout(resources), RunFolder(run_dir.absolute())
    check_paths(config)
    if config.fidelity_study == "auto":
        display.say("this estimate does not include the fidelity study that comes first")
    elif config.fidelity_study:
        study_config(RunFolder(Path(config.fidelity_study)), config)
        display.say(f"this estimate includes the evaluations of {config.fidelity_study}, though they are already done")
    if not providers.local(resources):
        raise UsageError("--dry-run times steps on this machine; leave --executor out, or run it inside a job")
    with tempfile.TemporaryDirectory(prefix="mfkd-dry-run-") as scratch:
        # Without the teacher cache, since what it saves depends on how much later cohorts can reuse.
        timed = replace(settings, resources=replace(resources, teacher_cache="0"))
        with open_context(timed, RunFolder(Path(scratch)), one_worker(wanted), display) as context:
            facts = probe(context)
            context = replace(context, config=resolve(config, facts.images["train"], folder.recorded()))
            samples, teacher, candidates = _samples(context, facts, folder, wanted.device == "cuda")
            estimates = {s.fidelity.name: time_sample(context, facts, s, teacher) for s in samples}
    display.say(summary(estimates, run_dir, wanted.workers, describe(wanted)))
    return as_json(estimates, run_dir, wanted.workers, candidates)


def _samples(
    context: RunContext, facts: DataFacts, folder: RunFolder, gpu: bool
) -> tuple[list[Sample], Path, int]:
    """What to time for the run in `folder`, the teacher's weights to time it with, and the number of candidates."""
    config, budget = context.config, context.budget
    everything, fit = find_candidates(context.space, config, facts, context.display)
    if needs_latency(config):
        # A search that has begun keeps its latencies. Until then each call measures again, here in a scratch folder.
        begun = bool(read_journal(folder.journal).asked)
        fit = limit_latency(context, fit, facts, folder if begun else context.folder)
    scores = len(to_score(context, search_plan(config, budget), facts.images["train"], fit))
    if scores:
        share = scores * IMAGES_PER_SCORE / (facts.images["train"] * config.high.cost())
        context.display.say(
            f"this estimate does not include {scores:,} training-free scores, which take about as long as {share:.1f} "
            "full trainings"
        )
    teacher = folder.teacher_weights(config)
    to_train = needs_teacher(context) and not teacher.exists()
    if to_train:
        teacher = context.folder.teacher
        if is_library_model(config.teacher):
            context.display.say(f"this estimate does not include the fine-tuning of the teacher {config.teacher}")
        context.answer(teacher_task(context, everything, untrained=True))
    done = answered(folder)
    # Architectures promoted without a low-fidelity score get one in the end (engine/search/search.py, `unpaired`).
    lows = budget.max_low + budget.max_high if budget.max_low else 0
    side = min(cohort_size(context.resources, gpu=gpu), len(fit))
    samples = [
        Sample(config.low, evenly_spaced(fit, side), max(0, lows - done.get(config.low, 0))),
        Sample(config.high, evenly_spaced(fit, 1), max(0, budget.max_high - done.get(config.high, 0))),
    ]
    if budget.final_training != "never":
        compared = baseline_networks(context.space, fit, largest_member(everything))
        ends = 1 + (len(compared) if budget.baselines != "never" else 0)
        final = final_fidelity(config)
        ended = sum(count for fidelity, count in done.items() if fidelity.with_valid)
        samples.append(Sample(final, [fit.architecture(int(fit.macs.argmax()))], max(0, ends - ended)))
    if to_train and config.teacher == "auto":
        fidelity = Fidelity("teacher", epochs=config.teacher_epochs)
        samples.insert(0, Sample(fidelity, [largest_member(everything)], 1))
    return samples, teacher, len(fit)


def evenly_spaced(fit: Candidates, count: int) -> list[Architecture]:
    """Candidates at `count` evenly spaced ranks by MACs; a single one is the median."""
    order = np.argsort(fit.macs, kind="stable")
    return [fit.architecture(int(order[int((place + 0.5) / count * len(fit))])) for place in range(count)]


def answered(folder: RunFolder) -> dict[Fidelity, int]:
    """The number of evaluations of each fidelity in a journal."""
    counts: dict[Fidelity, int] = {}
    for evaluation in read_journal(folder.journal).answers.values():
        counts[evaluation.trial.fidelity] = counts.get(evaluation.trial.fidelity, 0) + 1
    return counts


def time_sample(context: RunContext, facts: DataFacts, sample: Sample, teacher: Path) -> WorkEstimate:
    """Estimates an evaluation: its steps are extrapolated from a short training, its other phases are as measured."""
    fidelity, members = sample.fidelity, sample.members
    train, classes = facts.images["train"], len(facts.classes)
    train += facts.images["valid"] if fidelity.with_valid else 0
    images = max(round(fidelity.fraction * train), classes)
    batch = min(context.config.batch_size, images)
    short = replace(fidelity, fraction=min(fidelity.fraction, Fraction(max(TIMED_BATCHES * batch, classes), train)))
    steps = TIMED_EPOCHS[-1] * (max(round(short.fraction * train), classes) // batch)
    for epochs in TIMED_EPOCHS:
        answers = _train(context, replace(short, name="timing", epochs=epochs), members, teacher)
        failed = next((answer for answer in answers if not answer.ok), None)
        if failed is not None:
            why = f"{failed.status}: {failed.error}"
            raise NoWinner(f"a timed training of {failed.trial.architecture} at {fidelity.name} fidelity failed: {why}")
    stepping = sum(answer.costs.get(phase, 0.0) for answer in answers for phase in STEP_PHASES)
    once = sum(answer.seconds for answer in answers) - stepping
    whole = once + stepping / steps * fidelity.epochs * (images // batch)
    return WorkEstimate(sample.count, images, fidelity.epochs, whole / len(members))


def _train(
    context: RunContext, fidelity: Fidelity, members: list[Architecture], teacher: Path
) -> list[Evaluation]:
    trials = tuple(Trial(number, one, fidelity, context.config.seed) for number, one in enumerate(members))
    context.display.say(f"timing: {len(trials)} at a time, {fidelity.epochs * TIMED_BATCHES} steps")
    return [evaluation_from_json(e) for e in context.answer(TrialsTask(context.worker, trials, teacher))]


def hours(estimates: dict[str, WorkEstimate], workers: int) -> float:
    """Wall time: the teacher is trained first and alone, then all workers are busy."""
    alone = estimates["teacher"].hours if "teacher" in estimates else 0.0
    return alone + sum(work.hours for name, work in estimates.items() if name != "teacher") / workers


def summary(estimates: dict[str, WorkEstimate], run_dir: Path, workers: int, machines: str) -> str:
    """The estimate as text."""
    lines = [f"estimate for {run_dir} on {machines}; nothing has been started"]
    for name, work in estimates.items():
        lines.append(
            f"  {name:<8}{work.count:>5} x {work.images:,} images x {work.epochs} epochs: "
            f"{work.seconds:,.1f} s each, {work.hours:,.2f} worker-hours"
        )
    lines.append(
        f"  at most {sum(work.hours for work in estimates.values()):,.2f} worker-hours; "
        f"about {hours(estimates, workers):,.2f} hours if workers do not slow each other down"
    )
    return "\n".join(lines)


def as_json(estimates: dict[str, WorkEstimate], run_dir: Path, workers: int, candidates: int) -> Json:
    described = {
        name: {"evaluations": w.count, "images": w.images, "epochs": w.epochs, "seconds": round(w.seconds, 3)}
        for name, w in estimates.items()
    }
    return {
        "run_dir": str(run_dir.absolute()),
        "status": "planned",
        "candidates": candidates,
        "workers": workers,
        **described,
        "worker_hours": round(sum(work.hours for work in estimates.values()), 4),
        "hours": round(hours(estimates, workers), 4),
    }
