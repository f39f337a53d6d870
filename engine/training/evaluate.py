"""The tasks of a worker: a probe, a teacher, a cohort of trials, the winner's test. The only place where an exception
becomes a status. Tasks take and return plain JSON values, so that any engine can carry them; each holds "study",
"run_dir" and "device" beside what its function names."""

from __future__ import annotations

import hashlib
import json
import math
import os
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import replace
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from engine.config import Resources, Study, for_fidelity, parse_bytes, side_by_side
from engine.data.parts import fingerprint
from engine.networks import count_cost
from engine.space import load_space
from engine.training import checkpoint
from engine.training import teacher as teachers
from engine.training.checkpoint import Progress
from engine.training.spacecheck import glance
from engine.training.student import Student, fatal, place, prepare, status_of
from engine.training.taught import Teacher
from engine.training.teaching import adopt_teacher, fetch_teacher, train_teacher
from engine.training.train import Stopwatch, train
from engine.training.weights import load_weights, save_weights
from engine.training.workbench import Bench, device_name, open_bench, peak_memory
from engine.trial import (
    Drained,
    EnvironmentUnusable,
    Evaluation,
    Fidelity,
    Trial,
    UsageError,
    evaluation_to_json,
    trial_from_json,
    weights_path,
)

Json = dict[str, Any]
DEFAULT = Resources()
# Python's words, and those of torch and safetensors, which raise errors of their own.
UNWRITABLE = ("No space left on device", "Disk quota exceeded", "Read-only file system", "StreamWriter failed writing")


def run_probe(task: Json) -> Json:
    """What a driver must know of data and device before it decides anything. Raises EngineError for either."""
    if task["device"] == "cuda" and not torch.cuda.is_available():
        raise EnvironmentUnusable(
            "a GPU was given to this worker but torch cannot use it; check the driver with nvidia-smi, "
            "or take --device cpu"
        )
    bench = open_bench(task)
    study, classes = bench.study, len(bench.data.classes)
    if ".py:" in study.space:
        for fidelity in (study.low, study.high):
            glance(study.space, classes, fidelity.width, bench.resolution(fidelity))
    return {
        "classes": list(bench.data.classes),
        "resolution": bench.data.resolution,
        "mean": list(bench.data.mean),
        "std": list(bench.data.std),
        "fingerprint": fingerprint(bench.data),
        "files": bench.data.train.files is not None,
        "images": {"train": len(bench.data.train.labels), "valid": len(bench.data.valid.labels)},
        "device": device_name(bench.device),
    }


def run_trials(task: Json) -> list[Json]:
    """Trains and scores a cohort: {"trials", "teacher" (its file), "resources" (or the defaults), ...} -> an evaluation
    for each trial."""
    cohort = [trial_from_json(trial) for trial in task["trials"]]
    return [evaluation_to_json(one) for one in evaluate(open_bench(task), task["teacher"], cohort, _resources(task))]


def run_teacher(task: Json) -> Json:
    """Trains `task["network"]` on the full training part and saves it at `task["path"]`, if it is not there yet.

    With task["weights"], a file for that network, or task["pretrained"], a library's, there is nothing to train; `mean`
    and `std` are then those of the images that it knows (default: the data's). Returns what the card of
    the weights file says, and whether we trained it on other data or on another split of them. Raises UsageError where
    its classes are not the data's.
    """
    bench, path = open_bench(task), Path(task["path"])
    if path.exists():
        pass
    elif task.get("weights"):
        adopt_teacher(bench, task, path)
    elif task["pretrained"]:
        fetch_teacher(bench, task["network"], path)
    else:
        train_teacher(bench, task["network"], path, _resources(task))
    card = teachers.read_card(path)
    teachers.check_fits(card, bench.data.classes)
    return {
        "path": str(path),
        "network": card.network,
        "epochs": card.epochs,
        "accuracy": card.accuracy,
        "seconds": card.seconds,
        "elsewhere": card.epochs > 0 and card.fingerprint != fingerprint(bench.data),
    }


def run_test(task: Json) -> Json:
    """Accuracy of a full-fidelity trial's stored weights on the test part: {"trial", ...} -> {"test_accuracy",
    "weights" (their file)}."""
    bench = open_bench(task)
    trial = trial_from_json(task["trial"])
    space = load_space(bench.study.space)
    network = space.build(trial.architecture.choices, len(bench.data.classes), trial.fidelity.width)
    stored = weights_path(bench.run_dir, trial)
    load_weights(stored, network)
    network = place(network, bench.device)
    return {"test_accuracy": bench.accuracy(network, bench.data.test, trial.fidelity), "weights": str(stored)}


def run_latency(task: Json) -> list[float]:
    """Milliseconds of a forward pass of each of `task["architectures"]`, at full fidelity's width and resolution."""
    bench = open_bench(task)
    space, width = load_space(bench.study.space), bench.study.high.width
    return [
        bench.latency_ms(space.build(tuple(choices), len(bench.data.classes), width))
        for choices in task["architectures"]
    ]


def run_score(task: Json) -> Json:
    """Accuracy of the weights in a file on `task["part"]` (valid, test or all) of the data, which may be another data
    set than they were trained on: {"trial", "weights", "part", "trained_on" (classes, mean and std), ...}.

    Raises UsageError where the classes are not those, in the same order.
    """
    bench, trial, known = open_bench(task), trial_from_json(task["trial"]), task["trained_on"]
    if known:
        if tuple(known["classes"]) != bench.data.classes:
            raise UsageError(
                f"{bench.study.data} has the classes {', '.join(bench.data.classes)}, the network was trained on "
                f"{', '.join(known['classes'])}; they must be the same, in the same order"
            )
        bench = replace(bench, data=replace(bench.data, mean=tuple(known["mean"]), std=tuple(known["std"])))
    network = load_space(bench.study.space).build(
        trial.architecture.choices, len(bench.data.classes), trial.fidelity.width
    )
    load_weights(Path(task["weights"]), network)
    names = ("train", "valid", "test") if task["part"] == "all" else (task["part"],)
    parts = [getattr(bench.data, name) for name in names]
    network, images = place(network, bench.device), sum(map(len, parts))
    right = sum(len(part) * bench.accuracy(network, part, trial.fidelity) for part in parts)
    return {"accuracy": right / images, "images": images, "device": device_name(bench.device)}


def state_path(run_dir: Path, trial: Trial) -> Path:
    """Where a full training keeps its state between epochs, until it is done or has failed for good."""
    return weights_path(run_dir, trial).with_suffix(".state.pt")


def evaluate(
    bench: Bench, teacher_file: str, trials: list[Trial], resources: Resources = DEFAULT
) -> list[Evaluation]:
    """Trains the trials of one fidelity and one seed side by side and scores each on the validation part."""
    started, start, watch = time.time(), time.perf_counter(), Stopwatch()
    if bench.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(bench.device)
    answers = _in_rounds(bench, trials, resources, lambda group: _attempt(bench, teacher_file, group, watch, resources))
    seconds = time.perf_counter() - start
    images = sum(bench.images(answer.trial.fidelity) for answer in answers if answer.ok)
    costs = {**watch.seconds, "images_per_s": images / seconds, "peak_memory_bytes": peak_memory(bench.device)}
    # The cohort shares its costs: each trial carries an equal part, so that the sum over trials is what was spent.
    shared = {name: value / len(trials) if name in watch.seconds else value for name, value in costs.items()}
    device = device_name(bench.device)
    worker = os.environ.get("MFKD_WORKER", "")
    each = seconds / len(trials)
    return [
        replace(answer, seconds=each, costs={**shared, **answer.costs}, device=device, worker=worker, started=started)
        for answer in answers
    ]


def _in_rounds(
    bench: Bench, trials: list[Trial], resources: Resources, attempt: Callable[[list[Trial]], list[Evaluation]]
) -> list[Evaluation]:
    """The answers to all trials, as many at a time as memory holds.

    Who runs out of memory beside others is tried again, in groups of as many as did not: a trial is "oom" only where
    it is so alone. What was learnt is kept for the cohorts to come. Scores do not depend on it.
    """
    fidelity, waiting = trials[0].fidelity, list(trials)
    limit = min(side_by_side(resources, bench.device.type == "cuda"), bench.room.get(fidelity, len(trials)))
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
            bench.room[fidelity] = limit
    return [answers[trial.number] for trial in trials]


def _attempt(
    bench: Bench, teacher_file: str, trials: list[Trial], watch: Stopwatch, resources: Resources
) -> list[Evaluation]:
    try:
        return _evaluate(bench, teacher_file, trials, watch, resources)
    except (Drained, EnvironmentUnusable):
        raise
    except Exception as error:
        return [_failed(trial, error) for trial in trials]


def _evaluate(
    bench: Bench, teacher_file: str, trials: list[Trial], watch: Stopwatch, resources: Resources
) -> list[Evaluation]:
    fidelity, seed = trials[0].fidelity, trials[0].seed
    if any((trial.fidelity, trial.seed) != (fidelity, seed) for trial in trials):
        raise ValueError("the trials of a cohort share fidelity and seed: they train on the same batches")
    with watch.phase("setup"):
        teacher = _teacher(teacher_file, bench) if fidelity.kd_loss != "none" else None
        if teacher is not None:
            teacher.budget = parse_bytes("teacher-cache", resources.teacher_cache)
        cohort = [_admit(bench, trial, teacher, resources) for trial in trials]
        students = [member for member in cohort if isinstance(member, Student)]
        # Seconds of work are not worth a file; a full training, which is alone, goes on where it was killed.
        state = state_path(bench.run_dir, trials[0]) if fidelity == bench.study.high and len(trials) == 1 else None
        done = checkpoint.restore(state, students[0]).epochs if state and students else 0
    if students:
        batches = bench.lessons(fidelity, seed, done)
        keep = partial(_keep, bench, state, students[0], fidelity) if state else None
        train(students, teacher, batches, bench.study, watch, keep, resources.execution)
    with watch.phase("evaluate"):
        trained = [member for member in students if member.status == "ok"]
        found = bench.scores([member.network for member in trained], bench.data.valid, fidelity)
        scores = dict(zip(map(id, trained), found, strict=True))
        return [
            _answer(bench, trial, member, scores.get(id(member), 0.0)) if isinstance(member, Student) else member
            for trial, member in zip(trials, cohort, strict=True)
        ]


def _keep(bench: Bench, state: Path, member: Student, fidelity: Fidelity, done: int) -> None:
    bench.keep(state, member, Progress(done), fidelity.epochs)


def _admit(bench: Bench, trial: Trial, teacher: Teacher | None, resources: Resources) -> Student | Evaluation:
    """A student ready to train, or why it cannot be had. A space that a user wrote may raise anything."""
    try:
        network = build_student(bench.study, trial, len(bench.data.classes))
        size = bench.resolution(trial.fidelity)
        example = torch.zeros(2, 3, size, size, device=bench.device).contiguous(memory_format=torch.channels_last)
        full = trial.fidelity == bench.study.high
        if full and bench.study.initial_weights:
            load_weights(Path(bench.study.initial_weights), network)
        limit = bench.study.max_latency_ms
        taken = bench.latency_ms(network) if full and limit < math.inf else 0.0
        if taken > limit:
            why = f"measured {taken:.3g} ms, over --max-latency-ms {limit:g}"
            return Evaluation(trial, "unfit", error=why, costs={"latency_ms": taken})
        student = prepare(
            network,
            teacher.network if teacher is not None else None,
            for_fidelity(bench.study, trial.fidelity),
            trial.fidelity.kd_loss,
            example,
            seed=_key(bench.study, trial),
            average=full and bench.study.ema_decay > 0,
            compiled=full and resources.compile,
        )
        student.latency_ms = taken
        return student
    except Exception as error:
        return _failed(trial, error)


def build_student(study: Study, trial: Trial, classes: int) -> nn.Module:
    """The network of a trial. Its weights depend on seed and architecture alone, never on what was built before."""
    space = load_space(study.space)
    torch.manual_seed(_key(study, trial))
    return space.build(space.check(trial.architecture).choices, classes, trial.fidelity.width)


def _key(study: Study, trial: Trial) -> int:
    """What a student's random numbers depend on: seed, space and architecture."""
    identity = json.dumps([trial.seed, load_space(study.space).name, trial.architecture.choices]).encode()
    return int.from_bytes(hashlib.sha256(identity).digest()[:7], "big")


def _answer(bench: Bench, trial: Trial, member: Student, score: float | Exception) -> Evaluation:
    """The evaluation of a student after its training; the weights of a full-fidelity one are kept."""
    if member.status != "ok":
        if member.status != "oom":  # which may be for another job on the device: to repeat the training then helps
            state_path(bench.run_dir, trial).unlink(missing_ok=True)
        return Evaluation(trial, member.status, error=member.error, execution=member.execution)
    try:
        if isinstance(score, Exception):
            raise score
        macs, params = _cost(bench, trial, member.network)
        if trial.fidelity == bench.study.high:
            save_weights(weights_path(bench.run_dir, trial), member.network)
            state_path(bench.run_dir, trial).unlink(missing_ok=True)
    except EnvironmentUnusable:
        raise
    except Exception as error:
        return _failed(trial, error)
    costs = {"latency_ms": member.latency_ms} if member.latency_ms else {}
    return Evaluation(trial, "ok", score, macs=macs, params=params, costs=costs, execution=member.execution)


def _cost(bench: Bench, trial: Trial, network: nn.Module) -> tuple[int, int]:
    """(MACs, parameters), counted once for an architecture: a fifth of a second, for trainings of a few."""
    key = trial.architecture, trial.fidelity.width, bench.resolution(trial.fidelity)
    if key not in bench.costs:
        bench.costs[key] = count_cost(network, key[2])
    return bench.costs[key]


def _failed(trial: Trial, error: Exception) -> Evaluation:
    if fatal(error):
        traceback.print_exception(error)  # the supervisor tells the end of the log
        sys.stderr.flush()
        os._exit(70)  # a lost CUDA context cannot be had back in this process; the fleet starts another
    if any(words in str(error) for words in UNWRITABLE):
        raise EnvironmentUnusable(f"the run folder cannot be written: {error}; free space and repeat the command")
    return Evaluation(trial, status_of(error), error=f"{type(error).__name__}: {error}"[:2000])


@lru_cache(maxsize=1)
def _teacher(path: str, bench: Bench) -> Teacher:
    """The teacher of a file, with what it has said of this worker's batches."""
    card, data = teachers.read_card(Path(path)), bench.data
    teachers.check_fits(card, data.classes)
    built = teachers.renormalised(teachers.load(Path(path)), (data.mean, data.std), (card.mean, card.std))
    return Teacher(teachers.freeze(built, bench.device))


def _resources(task: Json) -> Resources:
    return Resources(**task.get("resources", {}))
