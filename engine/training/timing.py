"""What a training would take, from a few of its steps: as many as fit into a number of seconds."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import pairwise

import numpy as np
import torch

from engine.config import parse_bytes
from engine.data.batches import Batch, Batches
from engine.recipes import teacher_config
from engine.spaces.load import load_space
from engine.tasks import StepTimes, TimingFacts, TimingTask
from engine.training import teacher as teachers
from engine.training.context import WorkerContext
from engine.training.evaluate import load_teacher, make_student
from engine.training.student import Student, prepare
from engine.training.teacher_cache import CachedTeacher
from engine.training.train import Stopwatch, read_out, train
from engine.trial import Evaluation, NoWinner, Trial

# Steps that are timed at most, after one that warms up; the fewest; the images of the first, careful ones.
MOST, FEWEST, FEW_IMAGES = 12, 2, 2
SHARED = ("data", "teacher")  # phases of a step that all students of a cohort share; the other is "train"
SCORED = 16  # images in each of three batches that are scored


def time_training(context: WorkerContext, task: TimingTask) -> TimingFacts:
    """What a TimingTask asks for. Raises NoWinner if the network cannot be trained."""
    start = time.perf_counter()
    if task.network:
        fine_tuned = task.origin == "finetune"
        context = replace(context, config=teacher_config(context.config, fine_tuned))
    case = _Case(context, task, _teacher(context, task))
    loaded = time.perf_counter() - start
    middle = case.student(len(task.trials) // 2)
    built = time.perf_counter() - start - loaded
    step, deadline = StepTimes(), start + task.seconds
    if task.trials[0].fidelity.epochs:
        step = _timed_step(case, middle, built, deadline)
    score = _seconds_per_score(case, middle)
    networks = len(task.trials)
    return TimingFacts(
        setup=loaded + networks * built,
        step=step,
        score=networks * score * len(context.score_split(task.trials[0].fidelity)),
    )


def _teacher(context: WorkerContext, task: TimingTask) -> CachedTeacher | None:
    fidelity = task.trials[0].fidelity
    if task.network or (fidelity.kd_loss == "none" and load_space(context.config.space).inherit is None):
        return None
    found = load_teacher(task.teacher, context)
    found.budget = parse_bytes("teacher-cache", task.worker.resources.teacher_cache)
    return found


@dataclass
class _Case:
    """What is timed: the students of a task, on batches of its data."""

    context: WorkerContext
    task: TimingTask
    teacher: CachedTeacher | None

    @property
    def trial(self) -> Trial:
        return self.task.trials[0]

    def student(self, place: int) -> Student:
        """The student of a trial, or the teacher; NoWinner if it cannot be built."""
        context, task, trial = self.context, self.task, self.task.trials[place]
        if task.network:
            data = context.data
            built = teachers.build(task.network, len(data.classes), data.resolution)
            example = torch.zeros(2, 3, data.resolution, data.resolution, device=context.device)
            return prepare(built, None, context.config, "none", example)
        made = make_student(context, trial, self.teacher, task.worker.resources)
        if not isinstance(made, Student):
            raise self.failure(made)
        return made

    def failure(self, ended: Student | Evaluation) -> NoWinner:
        """Why the training cannot be timed."""
        what, name = self.task.network or self.trial.architecture, self.trial.fidelity.name
        return NoWinner(f"a timed training of {what} at {name} fidelity failed: {ended.status}: {ended.error}")

    def batches(self, images: int, steps: int) -> Batches:
        """Batches of `images` images. Each step is an epoch of its own, so that `train` reports when it ends."""
        whole = self.context.train_batches(self.trial.fidelity, self.trial.seed)
        assert whole.indices is not None
        return replace(whole, batch_size=images, indices=whole.indices[:images], epochs=steps)

    def steps(self, students: list[Student], images: int, steps: int) -> list[dict[str, float]]:
        """Seconds by phase of each step, without the first."""
        watch, seen = Stopwatch(), list[dict[str, float]]()

        def after_step(done: int) -> None:
            seen.append(dict(watch.seconds))

        guide = self.teacher if self.trial.fidelity.kd_loss != "none" else None
        execution = self.task.worker.resources.execution
        train(students, guide, self.batches(images, steps), self.context.config, watch, after_step, execution)
        failed = next((student for student in students if student.status != "ok"), None)
        if failed is not None:
            raise self.failure(failed)
        return [
            {name: now[name] - before[name] for name in (*SHARED, "train")}
            for before, now in pairwise(seen)
        ]


def _timed_step(case: _Case, middle: Student, built: float, deadline: float) -> StepTimes:
    """Times whole steps if the time allows, else steps of fewer networks or, if that is too much, of fewer images.

    How many are possible is known from two small steps. A GPU takes whole ones at once: they are fast, and small ones
    say little about them.
    """
    batch, networks = case.context.subset(case.trial.fidelity)[1], len(case.task.trials)
    images, together, steps, few, small = batch, networks, MOST, batch, dict[str, float]()
    if case.context.device.type == "cpu":
        few = min(FEW_IMAGES, batch)
        small = min(case.steps([middle], few, 1 + FEWEST), key=lambda step: sum(step.values()))
        left = deadline - time.perf_counter()
        images, together, steps = _affordable(left, sum(small.values()) / few, built, batch, networks)
    students = [middle]
    if together > 1:
        others = (place for place in range(networks) if place != networks // 2)
        students += [case.student(place) for place in others]
    found = case.steps(students, images, 1 + steps)
    copies = networks / len(students)
    whole = [_seconds(step, copies) for step in found]
    if images < batch:
        less = _seconds(small, copies) if images > few else 0.0
        whole = [_extrapolated((few, less), (images, seconds), batch) for seconds in whole]
    return StepTimes(float(np.mean(whole)), min(whole), max(whole), len(whole), images, len(students))


def _seconds(step: dict[str, float], copies: float) -> float:
    """The seconds of a step with `copies` times its students."""
    return sum(step[name] for name in SHARED) + copies * step["train"]


def _extrapolated(small: tuple[int, float], large: tuple[int, float], batch: int) -> float:
    """The seconds of a step of `batch` images from those of two smaller ones, (images, seconds): a step costs something
    for itself and something for each image. The latter is at least half of what it seems from the larger step."""
    (few, less), (images, seconds) = small, large
    each = seconds / images
    slope = (seconds - less) / (images - few) if images > few else each
    return seconds + (batch - images) * max(each / 2, min(each, slope))


def _affordable(left: float, one: float, built: float, batch: int, networks: int) -> tuple[int, int, int]:
    """(images, networks, timed steps) that take about `left` seconds: `one` is the time for an image of a network in a
    step, `built` that for building another network."""
    for together in (networks, 1):
        step = one * batch * together
        room = left - built * (together - 1)
        if (1 + FEWEST) * step <= room:
            return batch, together, min(MOST, int(room / step) - 1)
    images = int(left / one / (1 + FEWEST))
    return max(min(FEW_IMAGES, batch), min(batch, images)), 1, FEWEST


def _seconds_per_score(case: _Case, student: Student) -> float:
    """Seconds of scoring an image: of the later ones of a few batches, since making a loader takes time once."""
    context, fidelity = case.context, case.trial.fidelity
    split = context.score_split(fidelity)
    size = max(1, min(SCORED, len(split) // 3))
    few = split.select(np.arange(min(3 * size, len(split))))
    times: list[float] = []

    def noted(batches: Batches) -> Iterator[Batch]:
        for batch in batches:
            times.append(time.perf_counter())
            yield batch

    (found,) = read_out([student.network], noted(replace(context.eval_batches(few, fidelity), batch_size=size)))
    if isinstance(found, Exception):
        raise NoWinner(f"scoring {case.task.network or case.trial.architecture} failed: {found}")
    times.append(time.perf_counter())
    return (times[-1] - times[min(1, len(times) - 2)]) / max(1, len(few) - size)
