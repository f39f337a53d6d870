"""The core words: Architecture, Fidelity, Trial (a question), Evaluation (a measurement), History, and their JSON."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from fractions import Fraction
from functools import lru_cache
from typing import Any, Literal, get_args

KDLoss = Literal["none", "kd", "at", "nst", "kd+at", "kd+nst", "hint", "similarity"]
Status = Literal["ok", "diverged", "oom", "error", "crashed", "lost", "timeout", "too_slow"]

# The mean loss of each epoch of a training, and its validation accuracy (0..1; None: not measured) after that epoch.
Curve = tuple[tuple[float, float | None], ...]
# What a training is read by (Evaluation.readout).
READOUTS = ("accuracy", "cross_entropy", "agreement")
# Settings of the loss that a fidelity may override.
LOSS_WEIGHTS = (
    "kd_temperature",
    "ce_weight",
    "kd_weight",
    "at_weight",
    "nst_weight",
    "hint_weight",
    "similarity_weight",
)
MAX_WIDTH = 10.0  # of a width multiplier: with more, no device holds the networks
# Cost of a score without a training, in epochs: BatchNorm's statistics and the score take forward passes only.
UNTRAINED = 0.2


class EngineError(Exception):
    """An error that a user can act on: its message says what to do. `exit_code` is that of the command."""

    exit_code = 1


class UsageError(EngineError):
    """Flags or settings that cannot be used, or not together."""

    exit_code = 2


class WrongFlags(UsageError):
    """A flag or setting that does not exist or has a value of the wrong kind."""


class EnvironmentUnusable(EngineError):
    """Data are missing or unreadable, there is no such device, or a dependency does not load."""

    exit_code = 3


def install(extra: str) -> str:
    """The command that installs an extra of pyproject.toml, for error messages."""
    return f"run: pip install -c constraints.txt -e '.[{extra}]'"


def not_installed(what: str, extra: str) -> EnvironmentUnusable:
    """The error for a missing package of an extra."""
    return EnvironmentUnusable(f"{what}; {install(extra)}")


class NoWinner(EngineError):
    """Too many evaluations failed, or none qualifies as the winner."""

    exit_code = 4


class Drained(EngineError):
    """The search stopped on request; the same command resumes it. `result` is what the command prints."""

    exit_code = 75

    def __init__(self, text: str, result: dict[str, Any] | None = None) -> None:
        super().__init__(text)
        self.result = result


@dataclass(frozen=True, slots=True)
class Architecture:
    """A member of a search space: one option index per choice."""

    choices: tuple[int, ...]

    def __str__(self) -> str:
        """The indices joined by '-', as commands take and print them."""
        return "-".join(map(str, self.choices))

    @classmethod
    def parse(cls, text: str) -> Architecture:
        """The inverse of `str`; raises UsageError for anything else."""
        try:
            return cls(tuple(int(index) for index in text.split("-")))
        except ValueError:
            raise UsageError(f"'{text}' is not an architecture; write option indices joined by '-': 3-0-2") from None


@dataclass(frozen=True, slots=True)
class Fidelity:
    """How thoroughly an architecture is trained before it is scored.

    It is trained for `epochs` passes over a `fraction` of the training images, at a `width` multiplier and a
    `resolution` in pixels (0: the data's own), with the distillation terms named by `kd_loss`. `weights` are
    (name, value) pairs of LOSS_WEIGHTS that override those of the configuration. In a configuration, 0 epochs stand for
    a number that engine/recipes.py finds; in a trial, for no training. `with_valid`: the validation images are trained
    on too, so that only the test split is left to score on, and no decision may depend on the score.
    """

    name: str
    fraction: Fraction = Fraction(1)
    epochs: int = 10
    width: float = 1.0
    resolution: int = 0
    kd_loss: KDLoss = "none"
    weights: tuple[tuple[str, float], ...] = ()
    with_valid: bool = False

    def __post_init__(self) -> None:
        if not isinstance(self.fraction, Fraction):  # Python callers write "1/27" or 0.1
            try:
                fraction = Fraction(str(self.fraction))
            except (ValueError, ZeroDivisionError):
                raise UsageError(f"{self.name}.fraction is {self.fraction}; write 1/27 or 0.1") from None
            object.__setattr__(self, "fraction", fraction)
        if not 0 < self.fraction <= 1:
            raise UsageError(f"{self.name}.fraction is {self.fraction}; it must be greater than 0 and at most 1")
        if self.epochs < 0:
            raise UsageError(f"{self.name}.epochs is {self.epochs}; it must be at least 0")
        if not 0 < self.width <= MAX_WIDTH:
            raise UsageError(f"{self.name}.width is {self.width}; it must be greater than 0 and at most {MAX_WIDTH:g}")
        if self.resolution < 0:
            raise UsageError(f"{self.name}.resolution is {self.resolution}; it is in pixels, 0 for the data's own")
        for name, value in self.weights:
            if name not in LOSS_WEIGHTS:
                raise UsageError(f"{self.name} has no weight '{name}'; choose from {', '.join(LOSS_WEIGHTS)}")
            if not 0 <= value < math.inf or (name == "kd_temperature" and value == 0):
                least = "greater than 0" if name == "kd_temperature" else "at least 0"
                raise UsageError(f"{self.name}: {name} is {value}; it must be {least}")

    @classmethod
    def parse(cls, text: str) -> Fidelity:
        """The fidelity that `LOSS@FRACTIONxEPOCHS[:name=value,...]` describes, like kd+at@1/27x30:width=0.5.

        The options are width, resolution and LOSS_WEIGHTS; the text becomes its name. Raises UsageError for other text.
        """
        match = re.fullmatch(r"([a-z+]+)@([\d./]+)x(\d+)(?::(.+))?", text)
        example = "write LOSS@FRACTIONxEPOCHS, like kd+at@1/27x30 or kd@1/9x20:width=0.5,kd_temperature=2"
        if match is None:
            raise UsageError(f"'{text}' is not a fidelity; {example}")
        loss, fraction, epochs, rest = match.groups(default="")
        if loss not in get_args(KDLoss):
            raise UsageError(f"'{text}': no loss named '{loss}'; choose from {', '.join(get_args(KDLoss))}")
        try:
            own = {name: float(value) for name, value in (word.split("=") for word in rest.split(",") if word)}
            width, resolution = own.pop("width", 1.0), int(own.pop("resolution", 0))
            images = Fraction(fraction)
        except (ValueError, OverflowError, ZeroDivisionError):
            raise UsageError(f"'{text}' is not a fidelity; {example}") from None
        if int(epochs) < 1 and loss != "none":
            raise UsageError(f"'{text}' trains for no epoch, so it has no loss; write none@1x0")
        return cls(text, images, int(epochs), width, resolution, loss, tuple(sorted(own.items())))  # type: ignore[arg-type]

    def cost(self) -> float:
        """Passes over the full training set, to which the cost is proportional if all else is equal."""
        return float(self.fraction) * (self.epochs or UNTRAINED)


@dataclass(frozen=True, slots=True)
class Trial:
    """A question: how accurate is `architecture` at `fidelity` with `seed`? `number` is its place in the run."""

    number: int
    architecture: Architecture
    fidelity: Fidelity
    seed: int = 0

    @property
    def key(self) -> str:
        """A hash of everything but the number: the same question has the same key in every run."""
        question = json.dumps([self.architecture.choices, fidelity_to_json(self.fidelity), self.seed])
        return hashlib.sha256(question.encode()).hexdigest()[:16]


@dataclass(frozen=True, slots=True)
class Evaluation:
    """A measurement: the trial, how it ended, its accuracy in 0..1 on the validation split, and what it cost.

    A training that includes the validation images is scored on the test split instead; `hits` then tells which test
    images it got right (`engine.search.comparison`).

    Two more readouts come from the same pass over the same images: the mean `cross_entropy` in nats (None if it is not
    finite), and the `agreement` with the teacher of a distilled training, the share of images (0..1) to which both give
    the same class (None without a teacher, and on the test split). Evaluations of earlier versions have neither.

    `seconds` is the wall time of the whole evaluation on its worker. `costs` splits it into phases (train, teacher,
    data, evaluate, setup; seconds) and also holds images_per_s and peak_memory_bytes. `worker` names the worker and
    `started` is the start time (seconds since 1970; 0: unknown). The members of a cohort start together and share its
    seconds. `test_accuracy` is known only in tables of recorded results, and no method sees it: a search reads the test
    split only at its end. `error` explains a status other than "ok"; `execution` is how the steps ran: "graph", or
    "eager" with the reason. `curve` shows the training by epoch.
    """

    trial: Trial
    status: Status
    accuracy: float = 0.0
    test_accuracy: float | None = None
    seconds: float = 0.0
    costs: dict[str, float] = field(default_factory=dict)
    macs: int = 0
    params: int = 0
    device: str = ""
    worker: str = ""
    started: float = 0.0
    error: str = ""
    execution: str = ""
    hits: str = ""
    cross_entropy: float | None = None
    agreement: float | None = None
    curve: Curve = ()

    @property
    def ok(self) -> bool:
        return self.status == "ok"

    def readout(self, name: str) -> float | None:
        """One of READOUTS as a score in 0..1, greater is better; None if it was not measured.

        That of cross entropy is exp(-entropy), the geometric mean of the probabilities given to the true classes.
        """
        if name == "cross_entropy":
            return None if self.cross_entropy is None else math.exp(-self.cross_entropy)
        return self.agreement if name == "agreement" else self.accuracy


@dataclass
class History:
    """What a method sees: the evaluations so far and the trials still pending.

    Both are in the order of the run's virtual clock, not of arrival (see engine/search/loop.py).
    """

    answered: list[Evaluation] = field(default_factory=list)
    pending: list[Trial] = field(default_factory=list)

    @property
    def asked(self) -> int:
        return len(self.answered) + len(self.pending)

    def seconds(self) -> float:
        """Worker seconds of all evaluations."""
        return sum(evaluation.seconds for evaluation in self.answered)


def fidelity_to_json(fidelity: Fidelity) -> dict[str, Any]:
    values = {**dataclasses.asdict(fidelity), "fraction": str(fidelity.fraction), "weights": dict(fidelity.weights)}
    # Left out where they are empty: the keys of trials, and so the names of weights files, must not change.
    return {key: value for key, value in values.items() if key not in ("weights", "with_valid") or value}


def fidelity_from_json(data: dict[str, Any]) -> Fidelity:
    weights = tuple(sorted(data.get("weights", {}).items()))
    return _fidelity(**{**data, "weights": weights})


@lru_cache(maxsize=256)
def _fidelity(**fields: Any) -> Fidelity:
    """Cached: a journal repeats a few fidelities on many lines."""
    return Fidelity(**{**fields, "fraction": Fraction(fields["fraction"])})


def trial_to_json(trial: Trial) -> dict[str, Any]:
    return {
        "number": trial.number,
        "architecture": list(trial.architecture.choices),
        "fidelity": fidelity_to_json(trial.fidelity),
        "seed": trial.seed,
    }


def trial_from_json(data: dict[str, Any]) -> Trial:
    return Trial(
        number=data["number"],
        architecture=Architecture(tuple(data["architecture"])),
        fidelity=fidelity_from_json(data["fidelity"]),
        seed=data["seed"],
    )


def failed(status: str) -> bool:
    """Whether a status means that the evaluation went wrong; "too_slow" only means over the latency limit."""
    return status not in ("ok", "too_slow", "pending")


def mean_accuracies(answers: Iterable[Evaluation]) -> dict[Architecture, float]:
    """Mean accuracy (0..1) of each architecture over its evaluations, all of which must have succeeded."""
    return mean_readouts(answers, "accuracy")


def mean_readouts(answers: Iterable[Evaluation], name: str) -> dict[Architecture, float]:
    """Mean of a readout (0..1) of each architecture over its evaluations, all of which must have it."""
    groups: dict[Architecture, list[float]] = {}
    for evaluation in answers:
        value = evaluation.readout(name)
        assert value is not None, f"an evaluation without {name}"
        groups.setdefault(evaluation.trial.architecture, []).append(value)
    return {architecture: sum(values) / len(values) for architecture, values in groups.items()}


def hits_to_text(hits: Iterable[bool]) -> str:
    """Which images were classified right, as hexadecimal digits; a leading 1 bit keeps their count."""
    return f"{int('1' + ''.join('1' if hit else '0' for hit in hits), 2):x}"


def hits_from_text(text: str) -> list[bool]:
    """The inverse of `hits_to_text`."""
    return [bit == "1" for bit in f"{int(text, 16):b}"[1:]]


def evaluation_to_json(evaluation: Evaluation) -> dict[str, Any]:
    fields = {f.name: getattr(evaluation, f.name) for f in dataclasses.fields(evaluation)}
    for name in ("hits", "curve"):
        if not fields[name]:
            del fields[name]
    return {**fields, "trial": trial_to_json(evaluation.trial)}


def evaluation_from_json(data: dict[str, Any]) -> Evaluation:
    curve = tuple((loss, accuracy) for loss, accuracy in data.get("curve", ()))
    return Evaluation(**{**data, "trial": trial_from_json(data["trial"]), "curve": curve})
