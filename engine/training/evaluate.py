"""Trains and scores a cohort of students. The only place where an exception becomes the status of an evaluation."""

from __future__ import annotations

import hashlib
import json
import math
import os
import time
from collections.abc import Callable
from dataclasses import replace
from functools import lru_cache
from pathlib import Path

import torch
from torch import nn

from engine.config import Resources, SearchConfig, cohort_size, config_at, is_full, parse_bytes
from engine.networks import count_cost
from engine.spaces.load import load_space
from engine.training import checkpoint
from engine.training import teacher as teachers
from engine.training.checkpoint import Progress
from engine.training.context import WorkerContext, device_name, peak_memory
from engine.training.curves import Curves
from engine.training.inherit import inherited
from engine.training.observe import Observer, observed
from engine.training.student import Student, end_if_fatal, prepare, status_of
from engine.training.teacher_cache import CachedTeacher
from engine.training.train import Readout, Stopwatch, train
from engine.training.weights import load_weights, save_weights
from engine.trial import Drained, EnvironmentUnusable, Evaluation, Trial, hits_to_text

DEFAULT = Resources()
# Messages of Python, torch and safetensors when a disk cannot be written; the libraries have error types of their own.
UNWRITABLE = ("No space left on device", "Disk quota exceeded", "Read-only file system", "StreamWriter failed writing")


def evaluate(
    context: WorkerContext, teacher_file: Path, trials: list[Trial], resources: Resources = DEFAULT
) -> list[Evaluation]:
    """Trains trials of one fidelity and one seed side by side and scores each on images that it has not seen."""
    started, start, watch = time.time(), time.perf_counter(), Stopwatch()
    if context.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(context.device)
    answers = _in_rounds(
        context, trials, resources, lambda group: _attempt(context, teacher_file, group, watch, resources)
    )
    seconds = time.perf_counter() - start
    images = sum(context.images(answer.trial.fidelity) for answer in answers if answer.ok)
    costs = {**watch.seconds, "images_per_s": images / seconds, "peak_memory_bytes": peak_memory(context.device)}
    # The cohort shares its costs: each trial carries an equal part, so that the trials add up to what was spent.
    shared = {name: value / len(trials) if name in watch.seconds else value for name, value in costs.items()}
    device = device_name(context.device)
    worker = os.environ.get("MFKD_WORKER", "")
    each = seconds / len(trials)
    return [
        replace(answer, seconds=each, costs={**shared, **answer.costs}, device=device, worker=worker, started=started)
        for answer in answers
    ]


def _in_rounds(
    context: WorkerContext,
    trials: list[Trial],
    resources: Resources,
    attempt: Callable[[list[Trial]], list[Evaluation]],
) -> list[Evaluation]:
    """Evaluates all trials, as many at a time as fit into memory.

    Trials that run out of memory beside others are retried in smaller groups; a trial is "oom" only if it runs out of
    memory alone. The group size that worked is used for later cohorts. It does not affect scores.
    """
    fidelity, waiting = trials[0].fidelity, list(trials)
    limit = min(cohort_size(resources, context.device.type == "cuda"), context.max_cohort.get(fidelity, len(trials)))
    answers: dict[int, Evaluation] = {}
    out: set[int] = set()
    while waiting:
        group, waiting = waiting[:limit], waiting[limit:]
        got = attempt(group)
        again = [answer.trial for answer in got if answer.status == "oom"] if len(group) > 1 else []
        answers |= {answer.trial.number: answer for answer in got if answer.trial not in again}
        if again:
            limit = (len(group) - len(again)) or len(group) // 2
            out |= {trial.number for trial in again}
            waiting = [*again, *waiting]
        elif any(answer.ok and answer.trial.number in out for answer in got):
            context.max_cohort[fidelity] = limit
    return [answers[trial.number] for trial in trials]


def _attempt(
    context: WorkerContext, teacher_file: Path, trials: list[Trial], watch: Stopwatch, resources: Resources
) -> list[Evaluation]:
    try:
        return _evaluate(context, teacher_file, trials, watch, resources)
    except (Drained, EnvironmentUnusable):
        raise
    except Exception as error:
        return [_failed(trial, error) for trial in trials]


def _evaluate(
    context: WorkerContext, teacher_file: Path, trials: list[Trial], watch: Stopwatch, resources: Resources
) -> list[Evaluation]:
    with observed(context.folder, trials[0].fidelity.name, trials) as observer:
        return _evaluate_observed(context, teacher_file, trials, watch, resources, observer)


def _evaluate_observed(
    context: WorkerContext,
    teacher_file: Path,
    trials: list[Trial],
    watch: Stopwatch,
    resources: Resources,
    observer: Observer | None,
) -> list[Evaluation]:
    fidelity, seed = trials[0].fidelity, trials[0].seed
    if any((trial.fidelity, trial.seed) != (fidelity, seed) for trial in trials):
        raise ValueError("the trials of a cohort must share fidelity and seed: they train on the same batches")
    with watch.phase("setup"):
        inherits = load_space(context.config.space).inherit is not None
        teacher = load_teacher(teacher_file, context) if fidelity.kd_loss != "none" or inherits else None
        guide = teacher if fidelity.kd_loss != "none" else None
        if teacher is not None:
            teacher.budget = parse_bytes("teacher-cache", resources.teacher_cache)
        cohort = [make_student(context, trial, teacher, resources) for trial in trials]
        students = [entry for entry in cohort if isinstance(entry, Student)]
        # Only a full training is saved: it runs alone, and resumes after its last epoch. Others take seconds.
        resumable = is_full(context.config, fidelity) and len(trials) == 1
        state = context.folder.training_state(trials[0]) if resumable else None
        done = checkpoint.restore(state, students[0]).epochs if state and students else 0
    if students and fidelity.epochs:
        batches = context.train_batches(fidelity, seed, done)
        curves = Curves(context, students, fidelity, observer)

        def after_epoch(epochs: int) -> None:
            with watch.phase("evaluate"):
                curves.after_epoch()
            if state is not None:
                context.save_progress(state, students[0], Progress(epochs), fidelity.epochs)

        train(students, guide, batches, context.config, watch, after_epoch, resources.execution, observer)
    with watch.phase("evaluate"):
        trained = [student for student in students if student.status == "ok"]
        found = context.score([student.network for student in trained], fidelity, guide)
        readouts = dict(zip(map(id, trained), found, strict=True))
        return [
            _answer(context, trial, entry, readouts.get(id(entry))) if isinstance(entry, Student) else entry
            for trial, entry in zip(trials, cohort, strict=True)
        ]


def make_student(
    context: WorkerContext, trial: Trial, teacher: CachedTeacher | None, resources: Resources
) -> Student | Evaluation:
    """A student ready to train, or an evaluation with the reason why not. A user's space may raise anything."""
    try:
        network = _network(context, trial, teacher)
        size = context.resolution(trial.fidelity)
        example = torch.zeros(2, 3, size, size, device=context.device).contiguous(memory_format=torch.channels_last)
        full = is_full(context.config, trial.fidelity)
        if full and context.config.initial_weights:
            load_weights(Path(context.config.initial_weights), network)
        limit = context.config.max_latency_ms
        latency = context.latency_ms(network) if full else 0.0
        if latency > limit and not trial.fidelity.with_valid:  # the winner has been measured before
            reason = f"measured {latency:.3g} ms, over --max-latency-ms {limit:g}"
            return Evaluation(trial, "too_slow", error=reason, costs={"latency_ms": latency})
        student = prepare(
            network,
            teacher.network if teacher is not None and trial.fidelity.kd_loss != "none" else None,
            config_at(context.config, trial.fidelity),
            trial.fidelity.kd_loss,
            example,
            seed=_key(context.config, trial),
            average=full and context.config.ema_decay > 0,
            compiled=full and resources.compile,
        )
        student.latency_ms = latency
        return student
    except Exception as error:
        return _failed(trial, error)


def _network(context: WorkerContext, trial: Trial, teacher: CachedTeacher | None) -> nn.Module:
    """The network of a trial before its training: with inherited weights, or new ones."""
    if load_space(context.config.space).inherit is not None and teacher is not None:
        return inherited(context, trial.architecture, teacher.network)
    return build_student(context.config, trial, len(context.data.classes))


def build_student(config: SearchConfig, trial: Trial, classes: int) -> nn.Module:
    """The network of a trial. Its initial weights depend only on seed, space and architecture."""
    space = load_space(config.space)
    torch.manual_seed(_key(config, trial))
    return space.build(space.check(trial.architecture).choices, classes, trial.fidelity.width)


def _key(config: SearchConfig, trial: Trial) -> int:
    """The seed of a student's random numbers, derived from the trial's seed, space and architecture."""
    identity = json.dumps([trial.seed, load_space(config.space).name, trial.architecture.choices]).encode()
    return int.from_bytes(hashlib.sha256(identity).digest()[:7], "big")


def _answer(
    context: WorkerContext, trial: Trial, student: Student, readout: Readout | Exception | None
) -> Evaluation:
    """The evaluation of a trained student; the weights of a full training are saved."""
    if readout is None:
        if student.status != "oom":  # another job on the device may have caused that, so the training may be repeated
            context.folder.training_state(trial).unlink(missing_ok=True)
        return Evaluation(trial, student.status, error=student.error, execution=student.execution)
    try:
        if isinstance(readout, Exception):
            raise readout
        macs, params = _cost(context, trial, student.network)
        if is_full(context.config, trial.fidelity):
            save_weights(context.folder.weights(trial), student.network)
            context.folder.training_state(trial).unlink(missing_ok=True)
    except EnvironmentUnusable:
        raise
    except Exception as error:
        return _failed(trial, error)
    costs = {"latency_ms": student.latency_ms} if student.latency_ms else {}
    return Evaluation(
        trial,
        "ok",
        readout.accuracy,
        macs=macs,
        params=params,
        costs=costs,
        execution=student.execution,
        cross_entropy=readout.cross_entropy if math.isfinite(readout.cross_entropy) else None,
        agreement=readout.agreement,
        hits=hits_to_text(readout.hits) if trial.fidelity.with_valid else "",
        curve=tuple(student.curve),
    )


def _cost(context: WorkerContext, trial: Trial, network: nn.Module) -> tuple[int, int]:
    """(MACs, parameters), counted once per architecture: that takes a fifth of a second, a training may take a few."""
    key = trial.architecture, trial.fidelity.width, context.resolution(trial.fidelity)
    if key not in context.costs:
        context.costs[key] = count_cost(network, key[2])
    return context.costs[key]


def _failed(trial: Trial, error: Exception) -> Evaluation:
    end_if_fatal(error)
    if any(words in str(error) for words in UNWRITABLE):
        raise EnvironmentUnusable(f"cannot write the run folder: {error}; free space and run the command again")
    return Evaluation(trial, status_of(error), error=f"{type(error).__name__}: {error}"[:2000])


@lru_cache(maxsize=1)
def load_teacher(path: Path, context: WorkerContext) -> CachedTeacher:
    """The teacher in a weights file, with its cached outputs for this worker's batches."""
    return CachedTeacher(ready_teacher(path, context))


def ready_teacher(path: Path, context: WorkerContext) -> nn.Module:
    """The network in a teacher's weights file, frozen, for images as this worker normalises them."""
    card, data = teachers.read_card(path), context.data
    teachers.check_fits(card, data.classes)
    built = teachers.renormalised(teachers.load(path), (data.mean, data.std), (card.mean, card.std))
    return teachers.freeze(built, context.device)
