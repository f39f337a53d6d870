"""The frozen configuration of a run, each value with its help text, and its YAML form."""

from __future__ import annotations

import dataclasses
import math
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path
from typing import Any, Literal, TypeVar

import yaml

from engine.trial import EnvironmentUnusable, Fidelity, UsageError, fidelity_from_json, fidelity_to_json

T = TypeVar("T")
DATA_MADE = ("glyphs", "cifar10", "cifar100")  # data that are made or fetched; all other names are paths
Execution = Literal["auto", "graph", "eager"]
Kind = Literal["search", "fidelity"]  # of a run folder


def option(default: T, text: str) -> T:
    """A field with its default and the text that `--help` prints."""
    return field(default=default, metadata={"help": text})


def of_a_job(default: T, text: str) -> T:
    """An option of what runs as a job of a cluster: the workers of a search, or (`submit`) the search itself."""
    return field(default=default, metadata={"help": text, "of_a_job": True})


@dataclass(frozen=True, slots=True)
class Study:
    """What the results of a run depend on. Fixed for the life of a run folder."""

    space: str = option("nasbench201", "search space: NAME[:option=value,...] or FILE.py:NAME")
    data: str = option("glyphs", "glyphs[:N], cifar10, cifar100, a .npz file, or a folder of images")
    resolution: int = option(0, "pixels that images are brought to; 0 is the data's own, and 224 for a folder")
    valid_fraction: float = option(0.2, "part of the training images kept for validation")
    flip: Literal["auto", "always", "never"] = option(
        "auto",
        "mirror half of the training images; auto: as the data say, and always for a folder of images. never is for "
        "digits, text, signs: where a mirror image is of another class",
    )
    method: str = option(
        "mfkd",
        "search method (docs/surrogate.md): mfkd, mfkd-front, mfkd1, mfkd2, cokriging, gp, random, evolution, halving, "
        "asha, macs",
    )
    teacher: str = option(
        "auto",
        "auto (train the largest member of the space), a weights FILE of the teacher command, or torchvision:NAME or "
        "timm:NAME with the weights that the library has for it",
    )
    teacher_epochs: int = option(20, "epochs that a teacher trained by the run gets")
    low: Fidelity = option(
        Fidelity("low", Fraction(1, 9), 20, kd_loss="kd"), "the cheap judgement that every candidate starts with"
    )
    high: Fidelity = option(Fidelity("high", Fraction(1), 60), "the full judgement that the winner is named by")
    kd_temperature: float = option(4.0, "softmax temperature of the distillation term")
    ce_weight: float = option(1.0, "weight of the cross entropy with the labels")
    kd_weight: float = option(1.0, "weight of the softmax-temperature term (times T^2)")
    at_weight: float = option(1000.0, "weight of attention transfer, summed over stages (RepDistiller's beta)")
    nst_weight: float = option(50.0, "weight of neuron-selectivity transfer, summed over stages (RepDistiller's beta)")
    hint_weight: float = option(100.0, "weight of the hint loss (RepDistiller's beta)")
    similarity_weight: float = option(3000.0, "weight of similarity preservation (RepDistiller's beta)")
    batch_size: int = option(64, "images per step")
    lr: float = option(0.1, "peak learning rate of SGD; cosine decay to 0")
    momentum: float = option(0.9, "Nesterov momentum of SGD")
    weight_decay: float = option(5e-4, "weight decay of SGD")
    ema_decay: float = option(
        0.0, "decay of the running average of the weights that full-fidelity evaluations score and keep; 0 is none"
    )
    amp_dtype: Literal["auto", "float32", "bfloat16"] = option(
        "auto", "precision of the forward pass in training; auto is bfloat16 on CUDA and float32 on CPU"
    )
    data_backend: Literal["dali", "resident", "synthetic"] = option("dali", "what feeds the training")
    min_macs: float = option(0.0, "propose only architectures with at least so many multiply-accumulates")
    max_macs: float = option(float("inf"), "propose only architectures with at most so many multiply-accumulates")
    max_params: float = option(float("inf"), "propose only architectures with at most so many parameters")
    max_latency_ms: float = option(
        float("inf"), "propose only architectures whose forward pass takes at most so many milliseconds on this device"
    )
    latency_batch: int = option(1, "images in the forward pass that --max-latency-ms is about")
    objectives: Literal["accuracy", "accuracy,macs"] = option(
        "accuracy",
        "`accuracy` looks for the most accurate network, `accuracy,macs` for the front against multiply-accumulates",
    )
    only: str = option("", "ARCHITECTUREs that may be proposed, joined by commas; empty is the whole space")
    initial_weights: str = option("", "FILE of weights that full trainings start from (of one network: see --only)")
    pilot: str = option(
        "", "run folder of the fidelity command whose results this search begins with; auto makes that study first"
    )
    seed: int = option(0, "seed of everything: data split, subsets, weights, order, augmentation, surrogate")


@dataclass(frozen=True, slots=True)
class Budget:
    """When to stop. Counted over the whole life of a run folder; the first limit reached wins; may be raised later."""

    max_low: int = option(50, "low-fidelity evaluations")
    max_high: int = option(20, "full-fidelity evaluations")
    gpu_hours: float = option(float("inf"), "hours of worker time, summed over the workers")
    wall_time: float = option(float("inf"), "hours of this call; a search stopped by it goes on at the next call")
    target_accuracy: float = option(float("inf"), "stop when a full-fidelity validation accuracy (0..1) reaches this")
    max_failures: int = option(10, "stop with exit code 4 after so many failed evaluations in a row")


@dataclass(frozen=True, slots=True)
class Resources:
    """Where a run takes place. May differ from call to call."""

    device: Literal["auto", "cuda", "cpu"] = option("auto", "auto takes the GPUs there are, else the CPU cores")
    gpus: str = option("auto", "auto, a count (8), or a choice among the visible (0,2)")
    students_per_gpu: str = option(
        "auto",
        "low-fidelity students trained side by side in a worker process, on the same batches; auto is 8 on a GPU, as "
        "far as its memory goes, and 4 on a CPU core",
    )
    execution: Execution = option(
        "auto", "how students' steps run on a GPU: as CUDA graphs, eagerly, or (auto) as graphs where they can and pay"
    )
    teacher_cache: str = option(
        "2GiB", "memory per worker for what the teacher said of a batch, for later students that see it; 0 is none"
    )
    compile: bool = option(False, "torch.compile the networks of full-fidelity evaluations")
    workers: int = option(0, "worker processes of each machine; 0 is one for each GPU, else one for each CPU core")
    executor: Literal["local", "slurm", "pbs", "lsf", "kubernetes"] = option(
        "local", "what starts the workers: this machine (or all of the Slurm allocation it is in), or jobs of a cluster"
    )
    min_nodes: int = of_a_job(1, "jobs of one node each that are kept while there is nothing for them to do")
    max_nodes: int = of_a_job(1, "jobs of one node each, at most; --gpus and --workers count for each node")
    partition: str = of_a_job("", "partition (Slurm), queue (PBS, LSF) or namespace (Kubernetes)")
    account: str = of_a_job("", "account or project that the jobs are charged to")
    qos: str = of_a_job("", "quality of service (Slurm)")
    time: str = of_a_job("", "time limit of a job: HH:MM:SS")
    cpus: int = of_a_job(0, "cores of each node; 0 is the whole node, which only Slurm can be asked for")
    memory_gb: int = of_a_job(0, "memory of each node; 0 is what the scheduler gives")
    job_options: str = of_a_job("", "more options of sbatch, qsub or bsub, as one writes them: '--constraint=h100'")
    worker_init: str = of_a_job("", "shell command that comes first in a job: 'module load cuda'")
    image: str = of_a_job("", "container image that holds this package (Kubernetes)")
    claim: str = of_a_job("", "volume claim for data and runs, and where it is mounted (Kubernetes): work:/work")
    trial_timeout: float = option(0.0, "seconds that an evaluation may take before it is ended as 'timeout'; 0: any")
    grace_s: float = option(60.0, "seconds that what runs may still take when the search is told to stop")
    time_limit: str = option(
        "auto", "end at which to have drained: seconds from the start, none, or auto, which asks the batch scheduler"
    )
    address: str = option("", "address of this machine that the nodes reach; by default, that of its name")


@dataclass(frozen=True, slots=True)
class Plan:
    """What a policy is told of a run: its method, the fidelities it may ask for, how many of each, and a seed.

    `lows` holds the low fidelities, the main one first; most methods use that one only. Repeats of the best few
    (the same architecture at full fidelity with another seed) count towards `max_high`. A worker has `cohort` slots:
    so many low-fidelity trials share it, while a full one takes all of them. Scores are accuracies on `valid_images`
    images; 0 where that is not known.
    """

    lows: tuple[Fidelity, ...]
    high: Fidelity
    method: str = "mfkd"
    max_low: int = 50
    max_high: int = 20
    seed: int = 0
    cohort: int = 1
    valid_images: int = 0


def ready_made(teacher: str) -> bool:
    """Whether a teacher is named as one of a library's, whose own weights are meant."""
    return teacher.startswith(("torchvision:", "timm:"))


def plan(study: Study, budget: Budget) -> Plan:
    method = study.method if study.objectives == "accuracy" else "mfkd-front"
    return Plan((study.low,), study.high, method, budget.max_low, budget.max_high, study.seed)


def check(study: Study, budget: Budget, resources: Resources) -> None:
    """Raises UsageError for values that cannot work, before anything is started."""
    for name, value, least in (
        ("batch-size", study.batch_size, 1),
        ("teacher-epochs", study.teacher_epochs, 1),
        ("resolution", study.resolution, 0),
        ("latency-batch", study.latency_batch, 1),
        ("seed", study.seed, 0),
        ("max-low", budget.max_low, 0),
        ("max-high", budget.max_high, 1),
        ("max-failures", budget.max_failures, 1),
        ("workers", resources.workers, 0),
        ("trial-timeout", resources.trial_timeout, 0),
        ("students-per-gpu", side_by_side(resources, gpu=False), 1),
    ):
        if value < least:
            raise UsageError(f"--{name} is {value}; it must be at least {least}")
    for name, number in (
        ("kd-temperature", study.kd_temperature),
        ("lr", study.lr),
        ("gpu-hours", budget.gpu_hours),
        ("wall-time", budget.wall_time),
        ("target-accuracy", budget.target_accuracy),
        ("grace-s", resources.grace_s),
        ("max-macs", study.max_macs),
        ("max-params", study.max_params),
        ("max-latency-ms", study.max_latency_ms),
    ):
        if not number > 0:
            raise UsageError(f"--{name} is {number}; it must be over 0")
    if study.objectives != "accuracy" and study.method not in ("mfkd", "mfkd-front"):
        raise UsageError(f"--objectives {study.objectives} is for --method mfkd; {study.method} has no front")
    if study.initial_weights and (not study.only or "," in study.only):
        raise UsageError("--initial-weights fit one architecture: name it with --only")
    for name in (*(item.name for item in dataclasses.fields(Study) if item.name.endswith("_weight")), "weight_decay"):
        if not 0 <= getattr(study, name) < math.inf:
            raise UsageError(f"--{name.replace('_', '-')} is {getattr(study, name)}; it must be at least 0")
    if not 0 <= study.momentum < 1:
        raise UsageError(f"--momentum is {study.momentum}; it must be at least 0 and below 1")
    if 1 < budget.target_accuracy < math.inf:
        raise UsageError(f"--target-accuracy is {budget.target_accuracy}; it is a share: write 0.95 for 95 %")
    if not 0 <= study.ema_decay < 1:
        raise UsageError(f"--ema-decay is {study.ema_decay}; it must be at least 0 and below 1, like 0.999")
    if resources.execution == "graph" and resources.device == "cpu":
        raise UsageError("--execution graph needs a GPU; leave it out, or leave out --device cpu")
    parse_bytes("teacher-cache", resources.teacher_cache)
    check_jobs(resources)
    if not 0 < study.valid_fraction <= 0.5:
        raise UsageError(f"--valid-fraction is {study.valid_fraction}; it must be over 0 and at most 0.5")
    if study.high.kd_loss != "none" and study.low.kd_loss == "none":
        raise UsageError("--high.kd-loss without --low.kd-loss: only the low fidelity would go without a teacher")


def check_files(study: Study) -> None:
    """Raises EngineError where --data or --teacher names a path that is not there, before a worker has started."""
    made = study.data.partition(":")[0] in DATA_MADE
    if not made and not Path(study.data).expanduser().exists():
        raise EnvironmentUnusable(
            f"--data {study.data}: no such file or folder; give a folder of images, a .npz file, {', '.join(DATA_MADE)}"
        )
    if study.initial_weights and not Path(study.initial_weights).is_file():
        raise UsageError(f"--initial-weights {study.initial_weights}: no such file")
    if study.low.kd_loss == "none" or study.teacher == "auto" or ready_made(study.teacher):
        return
    if not study.teacher.endswith(".safetensors"):
        raise UsageError(f"--teacher {study.teacher}: give auto, FILE.safetensors, torchvision:NAME or timm:NAME")
    if not Path(study.teacher).is_file():
        raise UsageError(f"no teacher file {study.teacher}; make one with: cli.py teacher --out {study.teacher}")


def check_jobs(resources: Resources) -> None:
    """Raises UsageError for options of a cluster's jobs that cannot work."""
    for name in ("cpus", "memory_gb", "min_nodes"):
        if getattr(resources, name) < 0:
            raise UsageError(f"--{name.replace('_', '-')} is {getattr(resources, name)}; it must be at least 0")
    if not max(1, resources.min_nodes) <= resources.max_nodes:
        raise UsageError(f"--max-nodes is {resources.max_nodes}; it must be at least 1, and at least --min-nodes")
    if resources.time:
        walltime_s(resources.time)


def gpus_of_a_node(resources: Resources) -> int:
    """How many GPUs a cluster's job has on each node; UsageError where that is not said."""
    if resources.device == "cpu":
        return 0
    if not resources.gpus.isdecimal():
        raise UsageError(
            f"--gpus {resources.gpus}: the nodes of a cluster cannot be seen from here; say how many GPUs each of them "
            "shall have (--gpus 8), or --device cpu"
        )
    return int(resources.gpus)


def walltime_s(text: str) -> int:
    """Seconds of a time limit HH:MM:SS; UsageError for other forms, which schedulers read differently."""
    parts = text.split(":")
    if len(parts) != 3 or not all(part.isdigit() for part in parts) or not int("".join(parts)):
        raise UsageError(f"--time is '{text}'; write HH:MM:SS, like 24:00:00")
    hours, minutes, seconds = map(int, parts)
    return 3600 * hours + 60 * minutes + seconds


def side_by_side(resources: Resources, gpu: bool) -> int:
    """How many low-fidelity students share a worker's batches and its teacher; UsageError for what is no number.

    Where memory does not hold so many, the worker takes fewer at a time: that changes no score.
    """
    if resources.students_per_gpu == "auto":
        return 8 if gpu else 4
    try:
        return int(resources.students_per_gpu)
    except ValueError:
        raise UsageError(f"--students-per-gpu is '{resources.students_per_gpu}'; give auto or a number") from None


def parse_bytes(flag: str, text: str) -> int:
    """Bytes of a size like 2GiB, 500MB or 0; UsageError for anything else."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*(?:([KMGT])(i?)B|B)?", text.strip(), re.IGNORECASE)
    if match is None:
        raise UsageError(f"--{flag} is '{text}'; give a size like 2GiB or 500MB, 0 for none")
    number, unit, binary = match.groups()
    power = " KMGT".index(unit.upper()) if unit else 0
    return int(float(number) * (1024 if binary else 1000) ** power)


def to_dict(config: Study | Budget | Resources) -> dict[str, Any]:
    """Plain values, as in YAML: fidelities as mappings without their name, fractions as text."""
    values: dict[str, Any] = {}
    for item in dataclasses.fields(config):
        value = getattr(config, item.name)
        if isinstance(value, Fidelity):
            value = {key: entry for key, entry in fidelity_to_json(value).items() if key != "name"}
        values[item.name] = value
    return values


def for_fidelity(study: Study, fidelity: Fidelity) -> Study:
    """The study with the loss weights that the fidelity brings of its own."""
    own: dict[str, Any] = dict(fidelity.weights)
    return dataclasses.replace(study, **own) if own else study


def study_from_dict(values: dict[str, Any]) -> Study:
    fidelities = {key: fidelity_from_json({"name": key, **values[key]}) for key in ("low", "high")}
    return Study(**{**values, **fidelities})


def flatten(values: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Dotted keys and their values."""
    for key, value in values.items():
        if isinstance(value, dict):
            yield from flatten(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


@dataclass(frozen=True, slots=True)
class Slots:
    """How many trials may be open at once: `total`, of which a full-fidelity one takes as many as a `cohort` has."""

    total: int
    cohort: int


def slots(workers: int, cohort: int) -> Slots:
    """A quarter more than the workers can do at once: one that ends early finds the next cohort waiting."""
    return Slots((workers + math.ceil((workers - 1) / 4)) * cohort, cohort)


def fix(kind: Kind, run_dir: Path, study: Study, budget: Budget, wanted: Slots) -> Slots:
    """Writes config.yaml into a run folder; refuses a study that differs from the one already there, but in the low
    fidelity of a study that compares several: it may have more of them later.

    Decisions depend on the slots, so they hold for the life of the run, whatever machine continues it, and grow only
    where a later call brings more workers: those would be idle. They are returned.
    """
    path = run_dir / "config.yaml"
    if path.exists():
        stored = read_stored(path)
        there = stored.get("kind", kind)
        if there != kind:
            raise UsageError(f"{run_dir} is a run of `{there}`; for `{kind}` choose another --name or --run-dir")
        # A setting that an older version did not have is at its default.
        before = {**dict(flatten(to_dict(Study()))), **dict(flatten(stored["study"]))}
        now = dict(flatten(to_dict(study)))
        held = [key for key in now if kind == "search" or not key.startswith("low.")]
        changed = [f"{key}: {before.get(key)} there, {now[key]} here" for key in held if now[key] != before.get(key)]
        if changed:
            raise UsageError(
                f"{run_dir} holds a search with other settings ({'; '.join(changed)}); "
                "repeat its settings to continue it, or choose another folder (--run-dir or --out)"
            )
        first = Slots(**stored["slots"])
        wanted = Slots(max(first.total, wanted.total // wanted.cohort * first.cohort), first.cohort)
    slots = dataclasses.asdict(wanted)
    content = {"kind": kind, "study": to_dict(study), "budget": to_dict(budget), "slots": slots, "folder": str(run_dir)}
    write_whole(path, yaml.safe_dump(content, sort_keys=False))
    return wanted


def read_stored(path: Path) -> dict[str, Any]:
    """What config.yaml of a run folder holds, with the paths inside it as they are now that it may have been moved.

    Raises EnvironmentUnusable where this program did not write it.
    """
    try:
        stored = yaml.safe_load(path.read_text())
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise EnvironmentUnusable(
            f"{path} cannot be read ({error}); restore it, "
            "or take another folder (--run-dir or --out)"
        ) from error
    if not isinstance(stored, dict) or not {"study", "slots"} <= stored.keys():
        raise EnvironmentUnusable(
            f"{path} is no configuration of a run; restore it, "
            "or choose another folder (--run-dir or --out)"
        )
    here = str(path.absolute().parent)
    there = stored.get("folder", here)
    for name in ("pilot", "teacher"):
        inside = str(stored["study"].get(name, "")).removeprefix(there + os.sep)
        if (Path(here) / inside).exists() and inside != stored["study"].get(name, ""):
            stored["study"][name] = str(Path(here) / inside)
    return stored


def begun(run_dir: Path) -> bool:
    """Whether a run folder holds what took work: a teacher, or a trial in its journal."""
    book = run_dir / "journal.jsonl"
    return any((run_dir / "teacher").glob("*")) or (book.exists() and book.read_bytes().count(b"\n") > 1)


def write_whole(path: Path, text: str) -> None:
    """Writes a file aside and moves it into place: a reader never sees half of it."""
    aside = path.with_suffix(".tmp")
    aside.write_text(text)
    aside.replace(path)
