"""What a search would cost here: the number of evaluations, and hours extrapolated from a few timed steps."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from engine.config import RunSettings, check_paths, cohort_size, final_fidelity, needs_latency, search_plan
from engine.fleet import providers
from engine.fleet.devices import describe, layout
from engine.recipes import resolve, teacher_config
from engine.run_folder import RunFolder
from engine.search.activity import duration
from engine.search.baseline_networks import baseline_networks
from engine.search.journal import read_journal
from engine.search.methods.opening import opening_size
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
from engine.tasks import DataFacts, StepTimes, TeacherTask, TimingFacts, TimingTask, task_from_json
from engine.trial import Architecture, Fidelity, Trial, UsageError

Json = dict[str, Any]
# Seconds after the start at which the timing of steps ends, more or less, so that the whole takes less than a minute;
# and seconds that each kind of evaluation gets in any case.
END_S, LEAST_S = 45.0, 2.0
# How far an estimate may be off that is scaled up: factors from it to the least and the most. From fewer images in a
# step, EfficientNet-Lite0 and MobileNetV3 at 224 pixels came out 20 to 30 % too slow on a CPU core, and not too fast.
# From fewer networks, the one of median size stands for all, which is only roughly true.
FEWER_IMAGES, FEWER_NETWORKS = (0.7, 1.1), (0.8, 1.25)


@dataclass(frozen=True)
class WorkEstimate:
    """Evaluations of one kind: how many, how many images and epochs each takes, and the seconds of one.

    Those lie `between` two bounds: each step takes as long as the fastest, or the slowest, that was timed, and an
    estimate that is scaled up may be off. `basis` says what was timed.
    """

    count: int
    images: int
    epochs: int
    seconds: float
    between: tuple[float, float]
    basis: str

    def hours(self, seconds: float | None = None) -> float:
        """The worker-hours of all evaluations if one takes `seconds`; by default, the expected ones."""
        return self.count * (self.seconds if seconds is None else seconds) / 3600


@dataclass(frozen=True)
class Sample:
    """What is timed for one kind of evaluation: `members` trained side by side, or a `teacher`. `count` of the kind are
    left to do."""

    fidelity: Fidelity
    members: list[Architecture]
    count: int
    teacher: TeacherTask | None = None


def dry_run(settings: RunSettings, run_dir: Path, display: Display) -> Json:
    """What a search with these settings has left to do, and its expected cost on this machine.

    A worker times a few steps of real trainings, in less than a minute: a cohort of low-fidelity students over the
    whole range of MACs, a full training of a student of median size, a final one of the largest candidate, and the
    teacher. The numbers of evaluations are the most that the budget allows. Raises EngineError as a search does, and
    NoWinner if a timed training fails.
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
            estimates = {}
            for place, sample in enumerate(samples):
                left = (settings.started + END_S - time.monotonic()) / (len(samples) - place)
                found = time_sample(context, facts, sample, teacher, max(LEAST_S, left))
                estimates[sample.fidelity.name] = found
    display.say(summary(estimates, run_dir, wanted.workers, describe(wanted)))
    return as_json(estimates, run_dir, wanted.workers, candidates)


def _samples(
    context: RunContext, facts: DataFacts, folder: RunFolder, gpu: bool
) -> tuple[list[Sample], Path, int]:
    """What to time for the run in `folder`, the teacher's weights to time it with, and the number of candidates."""
    config, budget = context.config, context.budget
    plan = search_plan(config, budget)
    everything, fit = find_candidates(context.space, config, facts, context.display)
    if needs_latency(config):
        # A search that has begun keeps its latencies. Until then each call measures again, here in a scratch folder.
        begun = bool(read_journal(folder.journal).asked)
        fit = limit_latency(context, fit, facts, folder if begun else context.folder)
    scores = len(to_score(context, plan, facts.images["train"], fit))
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
    if needs_teacher(context):  # made without training, or checked against the data before anything is timed
        context.answer(replace(teacher_task(context, everything, untrained=to_train), path=teacher))
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
    if plan.opening is not None:
        left = opening_size(fit, plan) - done.get(plan.opening, 0)
        samples.insert(0, Sample(plan.opening, evenly_spaced(fit, 1), max(0, left)))
    if to_train:
        fidelity = Fidelity("teacher", epochs=config.teacher_epochs)
        made = teacher_task(context, everything)
        samples.insert(0, Sample(fidelity, [largest_member(everything)], 1, made))
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


def time_sample(
    context: RunContext, facts: DataFacts, sample: Sample, teacher: Path, seconds: float
) -> WorkEstimate:
    """Estimates an evaluation from some of its steps, which are timed for about `seconds`."""
    fidelity, config, made = sample.fidelity, context.config, sample.teacher
    trials = tuple(Trial(number, one, fidelity, config.seed) for number, one in enumerate(sample.members))
    task = TimingTask(context.worker, trials, teacher, seconds)
    if made is not None:
        task = replace(task, network=made.network, origin=made.origin)
        config = teacher_config(config, made.origin == "finetune")
    context.display.say(f"timing: {fidelity.name}, {len(trials)} at a time")
    found = task_from_json(TimingFacts, context.answer(task))
    train = facts.images["train"] + (facts.images["valid"] if fidelity.with_valid else 0)
    images = max(round(fidelity.fraction * train), len(facts.classes))
    batch = min(config.batch_size, images)
    steps = fidelity.epochs * (images // batch)

    def each(step: float) -> float:
        return (found.setup + steps * step + found.score) / len(trials)

    timed = found.step
    low, high = sureness(timed, batch, len(trials))
    between = each(low * timed.fastest), each(high * timed.slowest)
    return WorkEstimate(
        sample.count, images, fidelity.epochs, each(timed.mean), between, basis(timed, batch, len(trials))
    )


def sureness(timed: StepTimes, batch: int, networks: int) -> tuple[float, float]:
    """The factors from a timed step to the least and the most that a whole one may take."""
    low = high = 1.0
    for scaled, (least, most) in ((timed.images < batch, FEWER_IMAGES), (timed.networks < networks, FEWER_NETWORKS)):
        low, high = (low * least, high * most) if scaled else (low, high)
    return low, high


def basis(timed: StepTimes, batch: int, networks: int) -> str:
    """What was timed, and what not."""
    if not timed.count:
        return "one score"
    parts = [f"{timed.images} of {batch} images"] if timed.images < batch else []
    parts += [f"{timed.networks} of {networks} networks"] if timed.networks < networks else []
    return f"{timed.count} steps" + (f" of {' and '.join(parts)}, scaled up" if parts else "")


def hours(estimates: dict[str, WorkEstimate], workers: int, pick: Callable[[WorkEstimate], float]) -> float:
    """Wall time: the teacher is trained first and alone, then all workers are busy. `pick` gives the seconds of one."""
    alone = sum(work.hours(pick(work)) for name, work in estimates.items() if name == "teacher")
    return alone + sum(work.hours(pick(work)) for name, work in estimates.items() if name != "teacher") / workers


def hours_between(estimates: dict[str, WorkEstimate], workers: int) -> tuple[float, float]:
    """The bounds of the wall time."""
    return hours(estimates, workers, lambda w: w.between[0]), hours(estimates, workers, lambda w: w.between[1])


def summary(estimates: dict[str, WorkEstimate], run_dir: Path, workers: int, machines: str) -> str:
    """The estimate as text."""
    lines = [f"estimate for {run_dir} on {machines}; nothing has been started"]
    for name, work in estimates.items():
        fast, slow = map(_span, work.between)
        lines.append(
            f"  {name:<9}{work.count:>5} x {work.images:,} images x {work.epochs} epochs: "
            f"{_span(work.seconds)} each ({fast} to {slow}; {work.basis}), {work.hours():,.2f} worker-hours"
        )
    least, most = hours_between(estimates, workers)
    lines.append(
        f"  at most {sum(work.hours() for work in estimates.values()):,.2f} worker-hours; about "
        f"{hours(estimates, workers, lambda work: work.seconds):,.2f} hours if workers do not slow each other down, "
        f"and between {least:,.2f} and {most:,.2f} as far as the timed steps tell; a busy machine is slower"
    )
    return "\n".join(lines)


def _span(seconds: float) -> str:
    return f"{seconds:.1f} s" if seconds < 10 else duration(seconds)


def as_json(estimates: dict[str, WorkEstimate], run_dir: Path, workers: int, candidates: int) -> Json:
    described = {
        name: {
            "evaluations": w.count,
            "images": w.images,
            "epochs": w.epochs,
            "seconds": round(w.seconds, 3),
            "between": [round(seconds, 3) for seconds in w.between],
            "basis": w.basis,
        }
        for name, w in estimates.items()
    }
    return {
        "run_dir": str(run_dir.absolute()),
        "status": "planned",
        "candidates": candidates,
        "workers": workers,
        **described,
        "worker_hours": round(sum(work.hours() for work in estimates.values()), 4),
        "hours": round(hours(estimates, workers, lambda work: work.seconds), 4),
        "hours_between": [round(value, 4) for value in hours_between(estimates, workers)],
    }
