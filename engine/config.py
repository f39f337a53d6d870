"""The settings of a run: frozen dataclasses whose fields carry their own help texts, checked before anything starts."""

from __future__ import annotations

import dataclasses
import math
import re
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path
from typing import Any, Literal, TypeVar, get_args

from engine.spaces.load import load_space
from engine.trial import Architecture, EnvironmentUnusable, Fidelity, UsageError, fidelity_from_json, fidelity_to_json

T = TypeVar("T")
# Generated, shipped, or downloaded; every other name is a path.
BUILT_IN_DATA = ("glyphs", "caltech21", "cifar10", "cifar100")
Execution = Literal["auto", "graph", "eager"]
RunKind = Literal["search", "fidelity-study"]
Recipe = Literal["auto", "finetune", "scratch"]
Optimizer = Literal["sgd", "adamw"]
Augment = Literal["crop", "trivial"]
Runtime = Literal["torch", "torch.compile", "onnxruntime"]
When = Literal["auto", "always", "never"]
Objectives = Literal["accuracy", "accuracy,macs", "accuracy,params", "accuracy,latency"]
FRONT_METHODS = ("mfkd", "nsga2", "random")  # those that can search for a front
FINAL_SETTINGS = ("epochs", "kd_loss")  # of the final fidelity; in all else it is the full one


def option(default: T, text: str) -> T:
    """A field with its default and its `--help` text."""
    return field(default=default, metadata={"help": text})


def job_option(default: T, text: str) -> T:
    """An option of cluster jobs, which run the workers of a search or (`submit`) the search itself."""
    return field(default=default, metadata={"help": text, "job": True})


@dataclass(frozen=True, slots=True)
class SearchConfig:
    """The settings that results depend on. They are fixed for the life of a run folder."""

    space: str = option("nasbench201", "search space: NAME[:option=value,...] or FILE.py:NAME")
    data: str = option(
        "glyphs",
        "glyphs, caltech21, cifar10, cifar100, a .npz file or a folder of images; glyphs:N generates N images",
    )
    resolution: int = option(0, "image size in pixels; 0 means the size of the data, and 224 for a folder")
    valid_fraction: float = option(0.2, "fraction of the training images held out for validation")
    flip: Literal["auto", "always", "never"] = option(
        "auto",
        "mirror training images at random; auto follows the data, and mirrors images from a folder; use never if a "
        "mirror image belongs to another class: digits, text, signs",
    )
    method: str = option(
        "mfkd",
        "search method; one of mfkd, mfkd1, mfkd2, cokriging, gp, random, evolution, halving, asha, macs, bore, "
        "proxies, naswot, nsga2, optuna-tpe, optuna-gp (docs/search.md)",
    )
    teacher: str = option(
        "auto",
        "auto, FILE, torchvision:NAME or timm:NAME; auto trains the largest member of the space, a FILE comes from the "
        "command teacher, and a library's network is fine-tuned from its weights",
    )
    teacher_weights: str = option("", "weights to fine-tune a teacher from, instead of the library's")
    from_scratch: bool = option(False, "train a torchvision, timm or pretrained teacher from random weights instead")
    teacher_epochs: int = option(20, "epochs of a teacher that the run trains itself; 0 lets the recipe choose")
    recipe: Recipe = option(
        "auto",
        "defaults of the training settings; finetune is for networks that start from pretrained weights, scratch for "
        "others, and auto chooses by the space (docs/training.md; the command config shows the values)",
    )
    low: Fidelity = option(
        Fidelity("low", Fraction(1, 9), 20, kd_loss="kd"), "the low fidelity: the cheap training that ranks candidates"
    )
    high: Fidelity = option(Fidelity("high", Fraction(1), 60), "the full fidelity: the training that picks the winner")
    final: Fidelity = option(
        Fidelity("final", epochs=0, kd_loss="kd"),
        "the last training of the winner, on training and validation images together, and of the baselines",
    )
    proxies: Literal["auto", "none"] = option(
        "auto",
        "training-free scores of candidates, for the surrogate; auto computes as many as one full training pays for",
    )
    kd_temperature: float = option(4.0, "softmax temperature of the distillation loss")
    ce_weight: float = option(1.0, "weight of the cross entropy with the labels")
    kd_weight: float = option(1.0, "weight of the distillation loss (times T^2)")
    at_weight: float = option(1000.0, "weight of attention transfer, summed over stages (RepDistiller's beta)")
    nst_weight: float = option(50.0, "weight of neuron selectivity transfer, summed over stages (RepDistiller's beta)")
    hint_weight: float = option(100.0, "weight of the hint loss (RepDistiller's beta)")
    similarity_weight: float = option(3000.0, "weight of similarity preservation (RepDistiller's beta)")
    label_smoothing: float = option(0.0, "share of each label that is spread over all classes, in the cross entropy")
    batch_size: int = option(0, "images per step; 0 means auto: 64 from scratch, 32 in fine-tuning, or less")
    optimizer: Optimizer = option("sgd", "sgd (with Nesterov momentum) or adamw")
    lr: float = option(0.1, "peak learning rate, with cosine decay to 0")
    backbone_lr_factor: float = option(
        1.0, "learning rate of a pretrained teacher's layers, relative to that of its new classifier"
    )
    warmup_fraction: float = option(0.05, "fraction of the steps in which the learning rate rises linearly to its peak")
    momentum: float = option(0.9, "Nesterov momentum of SGD")
    weight_decay: float = option(5e-4, "weight decay of all weights except biases and normalisation")
    augment: Augment = option(
        "crop", "random crops and mirror images; trivial adds a random TrivialAugment operation for each image"
    )
    min_crop_area: float = option(0.08, "smallest share of an image file that a random crop covers")
    ema_decay: float = option(
        0.0, "decay of a moving average of the weights; full trainings then score and save the average; 0 turns it off"
    )
    amp_dtype: Literal["auto", "float32", "bfloat16"] = option(
        "auto", "precision of the forward pass; auto means bfloat16 on CUDA and float32 on CPU"
    )
    data_backend: Literal["dali", "resident", "synthetic"] = option(
        "dali", "data loader; resident holds the images in memory, synthetic makes them up, to time training alone"
    )
    min_macs: float = option(0.0, "minimum MACs (multiply-accumulates) of a candidate")
    max_macs: float = option(float("inf"), "maximum MACs (multiply-accumulates) of a candidate")
    max_params: float = option(float("inf"), "maximum number of parameters of a candidate")
    max_latency_ms: float = option(float("inf"), "maximum milliseconds of a candidate's forward pass")
    latency: str = option(
        "torch",
        "what latency means; that of torch, torch.compile or onnxruntime (one thread of the CPU) on this machine, or "
        "that of another device, from a FILE that the latency command has written",
    )
    latency_batch: int = option(1, "batch size at which latency is measured")
    objectives: Objectives = option(
        "accuracy",
        "what to optimise; accuracy,COST finds the front, the most accurate network at each cost (with --method mfkd, "
        "nsga2 or random)",
    )
    only: str = option("", "comma-separated architectures to choose from; empty means the whole space")
    initial_weights: str = option("", "weights that full trainings start from; they fit one architecture (--only)")
    fidelity_study: str = option(
        "", "fidelity study whose evaluations the search starts with, a run folder; auto runs such a study first"
    )
    seed: int = option(0, "seed of everything; data split, subsets, weights, order, augmentation, surrogate")


@dataclass(frozen=True, slots=True)
class Budget:
    """When to stop: at the first limit reached, counted over the life of the run folder. Limits can be raised later."""

    max_low: int = option(50, "low-fidelity evaluations, at most")
    max_high: int = option(20, "full-fidelity evaluations, at most")
    gpu_hours: float = option(float("inf"), "maximum worker-hours, summed over all workers")
    wall_time: float = option(float("inf"), "maximum hours of this call; the same command resumes the run")
    target_accuracy: float = option(float("inf"), "stop at this validation accuracy of a full training, like 0.95")
    max_failures: int = option(10, "stop with exit code 4 after this many failed evaluations in a row")
    final_training: When = option(
        "auto", "train the winner once more, for --final.epochs; auto does so if it costs no more than the search has"
    )
    baselines: When = option(
        "auto",
        "train baselines to compare the winner with; the largest network and other obvious choices, trained like the "
        "winner; auto trains as many as cost no more than the search has, the winner's last training included",
    )


@dataclass(frozen=True, slots=True)
class Resources:
    """Where and how a run is computed. It may differ from call to call."""

    device: Literal["auto", "cuda", "cpu"] = option(
        "auto", "what to train on; auto means the GPUs if there are any, else the CPU cores"
    )
    gpus: str = option("auto", "GPUs to use; auto for all, a count (8), or a choice among the visible ones (0,2)")
    students_per_gpu: str = option(
        "auto",
        "low-fidelity students that a worker trains side by side; they share batches and teacher; auto means 8 on a "
        "GPU, memory permitting, and 4 on a CPU core",
    )
    execution: Execution = option(
        "auto", "how a GPU runs training steps; as CUDA graphs, eagerly, or (auto) as graphs where that is faster"
    )
    teacher_cache: str = option("2GiB", "memory per worker for teacher outputs that later students reuse; 0 means none")
    compile: bool = option(False, "torch.compile the networks of full trainings")
    workers: int = option(0, "worker processes per machine; 0 means one per GPU or CPU core")
    executor: Literal["local", "slurm", "pbs", "lsf", "kubernetes"] = option(
        "local", "where workers run; local means this machine, or all of its Slurm allocation; else in cluster jobs"
    )
    min_nodes: int = job_option(1, "minimum number of one-node jobs, kept even while idle")
    max_nodes: int = job_option(1, "maximum number of one-node jobs; --gpus and --workers are per node")
    partition: str = job_option("", "partition (Slurm), queue (PBS, LSF) or namespace (Kubernetes)")
    account: str = job_option("", "account or project to charge")
    qos: str = job_option("", "quality of service (Slurm)")
    time: str = job_option("", "time limit of a job, like 24:00:00")
    cpus: int = job_option(0, "cores per node; 0 requests the whole node (Slurm only)")
    memory_gb: int = job_option(0, "memory per node in GB; 0 means the scheduler's default")
    job_options: str = job_option("", "extra options for sbatch, qsub or bsub, like '--constraint=h100'")
    worker_init: str = job_option("", "shell command to run first in a job, like 'module load cuda'")
    image: str = job_option("", "container image that contains this package (Kubernetes)")
    claim: str = job_option("", "volume claim for data and runs, and where it is mounted, like work:/work (Kubernetes)")
    trial_timeout: float = option(0.0, "time limit of an evaluation in seconds; 0 means none")
    grace_s: float = option(60.0, "seconds for running trials to finish once the search is asked to stop")
    time_limit: str = option(
        "auto", "seconds after which the search must have stopped; none for no limit, auto to ask the scheduler"
    )
    address: str = option("", "address of this machine as seen from the nodes; by default that of its host name")


@dataclass(frozen=True, slots=True)
class RunSettings:
    """Everything a user can set: what results depend on, when to stop, and where to run."""

    config: SearchConfig
    budget: Budget = Budget()
    resources: Resources = Resources()
    started: float = field(default_factory=time.monotonic)  # of this call, which may consist of several runs


@dataclass(frozen=True, slots=True)
class Plan:
    """What a search method knows of a run: its name, the fidelities it may ask for, how many of each, and a seed.

    `lows` holds the low fidelities, the main one first; most methods use only that one. `opening` is the fidelity at
    which a search in a pretrained space scores many candidates before it trains any, and `first` are the architectures
    that it trains in full before others. Repeats of the best few (the same architecture at full fidelity with another
    seed) count towards `max_high`. A worker has `cohort` slots: it trains that many low-fidelity trials side by side,
    while a full training takes all of them. Scores are accuracies on `valid_images` images (0: unknown). A
    search for a front has a second objective, `cost`, by a name that `Candidates.cost` knows.
    """

    lows: tuple[Fidelity, ...]
    high: Fidelity
    method: str = "mfkd"
    max_low: int = 50
    max_high: int = 20
    seed: int = 0
    cohort: int = 1
    valid_images: int = 0
    opening: Fidelity | None = None
    first: tuple[Architecture, ...] = ()
    cost: str = ""

    @property
    def below_full(self) -> tuple[Fidelity, ...]:
        """The fidelities that tell the surrogate about the full one, the main one first."""
        return (*self.lows, *([self.opening] if self.opening else []))


@dataclass(frozen=True, slots=True)
class Slots:
    """`total` slots for trials that are open at once; a full-fidelity trial takes all slots of a `cohort`."""

    total: int
    cohort: int


def slots_for(workers: int, cohort: int) -> Slots:
    """A quarter more slots than the workers have, so that a worker that finishes early has its next cohort waiting."""
    return Slots((workers + math.ceil((workers - 1) / 4)) * cohort, cohort)


def search_plan(config: SearchConfig, budget: Budget) -> Plan:
    """The plan of a search with these settings."""
    opening = None if load_space(config.space).inherit is None else Fidelity("inherited", epochs=0)
    plan = Plan((config.low,), config.high, config.method, budget.max_low, budget.max_high, config.seed)
    cost = config.objectives.partition(",")[2]
    return dataclasses.replace(plan, opening=opening if config.method == "mfkd" else None, cost=cost)


def final_fidelity(config: SearchConfig) -> Fidelity:
    """The fidelity of the last training of the winner, and of the baselines that it is compared with.

    It trains as the full fidelity does, but for longer, on training and validation images, and distilled if the search
    distils and its teacher is good enough (engine/search/final.py).
    """
    high, final = config.high, config.final
    distils = config.low.kd_loss != "none"
    return dataclasses.replace(
        high,
        name="final",
        fraction=Fraction(1),
        epochs=final.epochs,
        kd_loss=final.kd_loss if distils else "none",
        weights=final.weights,
        with_valid=True,
    )


def is_full(config: SearchConfig, fidelity: Fidelity) -> bool:
    """Whether a trial at this fidelity trains alone, resumes after its last epoch, and keeps its weights."""
    return fidelity == config.high or fidelity.with_valid


def needs_latency(config: SearchConfig) -> bool:
    """Whether the latency of candidates matters: it is limited, or an objective."""
    return config.max_latency_ms < math.inf or "latency" in config.objectives.split(",")


def measures_latency(config: SearchConfig) -> bool:
    """Whether networks are timed here, in the runtime `config.latency`: it matters, and is not another device's."""
    return needs_latency(config) and config.latency in get_args(Runtime)


def is_library_model(teacher: str) -> bool:
    """Whether a teacher is named as a network of torchvision or timm."""
    return teacher.startswith(("torchvision:", "timm:"))


def check_settings(settings: RunSettings) -> None:
    """Raises UsageError for values that cannot work, before anything is started."""
    config, budget, resources = settings.config, settings.budget, settings.resources
    _check_ranges(config, budget, resources)
    if config.objectives != "accuracy" and config.method not in FRONT_METHODS:
        raise UsageError(
            f"--objectives {config.objectives}: {config.method} finds no front; choose from {', '.join(FRONT_METHODS)}"
        )
    if config.initial_weights and (not config.only or "," in config.only):
        raise UsageError("--initial-weights fit a single architecture: name it with --only")
    if resources.execution == "graph" and resources.device == "cpu":
        raise UsageError("--execution graph needs a GPU; leave it out, or leave out --device cpu")
    if config.high.kd_loss != "none" and config.low.kd_loss == "none":
        raise UsageError("--high.kd-loss without --low.kd-loss: the low fidelity must be distilled too")
    if (config.final.fraction, config.final.width, config.final.resolution) != (1, 1, 0):
        raise UsageError("final: only its epochs and kd_loss can be set; it has the width and resolution of high")
    parse_bytes("teacher-cache", resources.teacher_cache)
    if resources.time:
        walltime_s(resources.time)


def _check_ranges(config: SearchConfig, budget: Budget, resources: Resources) -> None:
    """Raises UsageError for a number outside its range."""
    for name, value, least in (
        ("low.epochs", config.low.epochs, 0),
        ("high.epochs", config.high.epochs, 0),
        ("batch-size", config.batch_size, 0),
        ("teacher-epochs", config.teacher_epochs, 0),
        ("resolution", config.resolution, 0),
        ("latency-batch", config.latency_batch, 1),
        ("seed", config.seed, 0),
        ("max-low", budget.max_low, 0),
        ("max-high", budget.max_high, 1),
        ("max-failures", budget.max_failures, 1),
        ("workers", resources.workers, 0),
        ("trial-timeout", resources.trial_timeout, 0),
        ("students-per-gpu", cohort_size(resources, gpu=False), 1),
        ("cpus", resources.cpus, 0),
        ("memory-gb", resources.memory_gb, 0),
        ("min-nodes", resources.min_nodes, 0),
    ):
        if value < least:
            raise UsageError(f"--{name} is {value}; it must be at least {least}")
    for name, number in (
        ("kd-temperature", config.kd_temperature),
        ("lr", config.lr),
        ("backbone-lr-factor", config.backbone_lr_factor),
        ("gpu-hours", budget.gpu_hours),
        ("wall-time", budget.wall_time),
        ("target-accuracy", budget.target_accuracy),
        ("grace-s", resources.grace_s),
        ("max-macs", config.max_macs),
        ("max-params", config.max_params),
        ("max-latency-ms", config.max_latency_ms),
    ):
        if not number > 0:
            raise UsageError(f"--{name} is {number}; it must be greater than 0")
    weights = [item.name for item in dataclasses.fields(SearchConfig) if item.name.endswith("_weight")]
    for name in (*weights, "weight_decay"):
        if not 0 <= getattr(config, name) < math.inf:
            raise UsageError(f"--{name.replace('_', '-')} is {getattr(config, name)}; it must be at least 0")
    for name in ("momentum", "label_smoothing", "warmup_fraction"):
        if not 0 <= getattr(config, name) < 1:
            flag = name.replace("_", "-")
            raise UsageError(f"--{flag} is {getattr(config, name)}; it must be at least 0 and below 1")
    if config.min_macs > config.max_macs:
        raise UsageError(f"--min-macs {config.min_macs:g} is more than --max-macs {config.max_macs:g}")
    if not 0 < config.min_crop_area <= 1:
        raise UsageError(f"--min-crop-area is {config.min_crop_area}; it must be greater than 0 and at most 1")
    if not 0 <= config.ema_decay < 1:
        raise UsageError(f"--ema-decay is {config.ema_decay}; it must be at least 0 and below 1, like 0.999")
    if not 0 < config.valid_fraction <= 0.5:
        raise UsageError(f"--valid-fraction is {config.valid_fraction}; it must be greater than 0 and at most 0.5")
    if 1 < budget.target_accuracy < math.inf:
        raise UsageError(f"--target-accuracy is {budget.target_accuracy}; it is a fraction: write 0.95 for 95 %")
    if not max(1, resources.min_nodes) <= resources.max_nodes:
        raise UsageError(f"--max-nodes is {resources.max_nodes}; it must be at least 1, and at least --min-nodes")


def check_paths(config: SearchConfig) -> None:
    """Raises EngineError where --data, --teacher, --latency or --initial-weights names a file that does not exist."""
    built_in = config.data.partition(":")[0] in BUILT_IN_DATA
    if not built_in and not (config.data and Path(config.data).expanduser().exists()):
        raise EnvironmentUnusable(
            f"--data {config.data}: no such file or folder; give a folder of images, a .npz file, "
            f"{', '.join(BUILT_IN_DATA)}"
        )
    for name in ("initial_weights", "teacher_weights"):
        if getattr(config, name):
            _check_weights(f"--{name.replace('_', '-')}", Path(getattr(config, name)))
    if config.latency not in get_args(Runtime) and not Path(config.latency).is_file():
        raise UsageError(
            f"--latency {config.latency}: no such file; give {', '.join(get_args(Runtime))}, or a FILE written by: "
            "cli.py latency import"
        )
    if config.low.kd_loss == "none" or config.teacher == "auto" or is_library_model(config.teacher):
        return
    if not config.teacher.endswith(".safetensors"):
        raise UsageError(f"--teacher {config.teacher}: give auto, FILE.safetensors, torchvision:NAME or timm:NAME")
    if not Path(config.teacher).is_file():
        raise UsageError(f"no teacher file {config.teacher}; train one with: cli.py teacher --out {config.teacher}")


def gpus_per_node(resources: Resources) -> int:
    """GPUs on each node of a cluster job; UsageError if --gpus does not give the number."""
    if resources.device == "cpu":
        return 0
    if not resources.gpus.isdecimal():
        raise UsageError(
            f"--gpus {resources.gpus}: the nodes of a cluster are not visible from here; say how many GPUs each node "
            "has (--gpus 8), or use --device cpu"
        )
    return int(resources.gpus)


def walltime_s(text: str) -> int:
    """Seconds of a time limit HH:MM:SS; UsageError for other forms, which schedulers interpret differently."""
    parts = text.split(":")
    if len(parts) != 3 or not all(part.isdigit() for part in parts) or not int("".join(parts)):
        raise UsageError(f"--time is '{text}'; write HH:MM:SS, like 24:00:00")
    hours, minutes, seconds = map(int, parts)
    return 3600 * hours + 60 * minutes + seconds


def _check_weights(flag: str, path: Path) -> None:
    """Raises UsageError if a file is missing or, by its first bytes, no weights; else only a worker would notice."""
    if not path.is_file():
        raise UsageError(f"{flag} {path}: no such file")
    with open(path, "rb") as file:
        start = file.read(9)
    if not (start.startswith((b"PK", b"\x80")) or start[8:] == b"{"):
        raise UsageError(f"{flag} {path} holds no weights: give a .safetensors file, or a state dict that torch saved")


def cohort_size(resources: Resources, gpu: bool) -> int:
    """How many low-fidelity students share the batches and the teacher of a worker; UsageError if not a number.

    A worker that runs out of memory trains fewer at a time, which changes no scores.
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
        raise UsageError(f"--{flag} is '{text}'; give a size like 2GiB or 500MB, or 0")
    number, unit, binary = match.groups()
    power = " KMGT".index(unit.upper()) if unit else 0
    return int(float(number) * (1024 if binary else 1000) ** power)


def config_to_dict(config: SearchConfig | Budget | Resources) -> dict[str, Any]:
    """Plain values, as in YAML: fidelities as mappings without their name, fractions as text."""
    values: dict[str, Any] = {}
    for item in dataclasses.fields(config):
        value = getattr(config, item.name)
        if isinstance(value, Fidelity):
            value = {key: entry for key, entry in fidelity_to_json(value).items() if key != "name"}
        values[item.name] = value
    return values


def config_from_dict(values: dict[str, Any]) -> SearchConfig:
    """The inverse of `config_to_dict` for a SearchConfig."""
    known = [key for key in ("low", "high", "final") if key in values]  # earlier versions had no final fidelity
    fidelities: dict[str, Any] = {key: fidelity_from_json({"name": key, **values[key]}) for key in known}
    return SearchConfig(**{**values, **fidelities})


def config_at(config: SearchConfig, fidelity: Fidelity) -> SearchConfig:
    """The configuration with the loss weights of a fidelity that has its own."""
    own: dict[str, Any] = dict(fidelity.weights)
    return dataclasses.replace(config, **own) if own else config


def left_to_auto(config: SearchConfig) -> set[str]:
    """Dotted names of the settings that are 0 for auto, which engine/recipes.py turns into numbers."""
    return {
        name
        for name, value in flatten(config_to_dict(config))
        if value == 0 and (name == "batch_size" or name.endswith("epochs"))
    }


def flatten(values: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Dotted keys and their values."""
    for key, value in values.items():
        if isinstance(value, dict):
            yield from flatten(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value
