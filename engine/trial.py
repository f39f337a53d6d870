"""The words of a search: Architecture, Fidelity, Trial (a question), Evaluation (a measurement), and their JSON."""

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


# Settings of the loss that a fidelity may bring of its own.
LOSS_WEIGHTS = (
    "kd_temperature",
    "ce_weight",
    "kd_weight",
    "at_weight",
    "nst_weight",
    "hint_weight",
    "similarity_weight",
)


class EngineError(Exception):
    """An error that a user can act on: its text says what to do, `exit_code` is what the command returns."""

    exit_code = 1


class UsageError(EngineError):
    """Flags or configuration that cannot be used together, or at all."""

    exit_code = 2


class WrongFlags(UsageError):
    """A flag or setting that does not exist or has a value of the wrong kind."""


class EnvironmentUnusable(EngineError):
    """Data missing or unreadable, no such device, a dependency that does not load."""

    exit_code = 3


def install(extra: str) -> str:
    """What to do about a package of an extra of pyproject.toml that is not there."""
    return f"run: pip install -c constraints.txt -e '.[{extra}]'"


def not_installed(what: str, extra: str) -> EnvironmentUnusable:
    """The error for a package of an optional extra that is not there."""
    return EnvironmentUnusable(f"{what}; {install(extra)}")


class NoWinner(EngineError):
    """Too many evaluations failed, or none can be called the winner."""

    exit_code = 4


class Drained(EngineError):
    """The search was told to stop and has; the same command continues it. `result` is what the command prints."""

    exit_code = 75

    def __init__(self, text: str, result: dict[str, Any] | None = None) -> None:
        super().__init__(text)
        self.result = result


@dataclass(frozen=True, slots=True)
class Architecture:
    """A point of a search space: one option index per choice."""

    choices: tuple[int, ...]

    def __str__(self) -> str:
        """Digits joined by '-', the form that commands take and print."""
        return "-".join(map(str, self.choices))

    @classmethod
    def parse(cls, text: str) -> Architecture:
        """The inverse of `str`; raises UsageError for anything else."""
        try:
            return cls(tuple(int(part) for part in text.split("-")))
        except ValueError:
            raise UsageError(f"'{text}' is no architecture; write option indices joined by '-', like 3-0-2") from None


@dataclass(frozen=True, slots=True)
class Fidelity:
    """How thoroughly an architecture is judged.

    `fraction` of the training images, for `epochs` passes, at a `width` multiplier and a `resolution` in pixels
    (0: the data's own), with the distillation terms named by `kd_loss`. `weights` are (name, value) pairs of
    LOSS_WEIGHTS that replace the study's.
    """

    name: str
    fraction: Fraction = Fraction(1)
    epochs: int = 10
    width: float = 1.0
    resolution: int = 0
    kd_loss: KDLoss = "none"
    weights: tuple[tuple[str, float], ...] = ()

    def __post_init__(self) -> None:
        if not 0 < self.fraction <= 1:
            raise UsageError(f"{self.name}.fraction is {self.fraction}; it must be over 0 and at most 1")
        if self.epochs < 1:
            raise UsageError(f"{self.name}.epochs is {self.epochs}; it must be at least 1")
        if not 0 < self.width < math.inf:
            raise UsageError(f"{self.name}.width is {self.width}; it must be over 0")
        if self.resolution < 0:
            raise UsageError(f"{self.name}.resolution is {self.resolution}; it is in pixels, 0 for the data's own")
        for name, value in self.weights:
            if name not in LOSS_WEIGHTS:
                raise UsageError(f"{self.name} has no weight '{name}'; there are {', '.join(LOSS_WEIGHTS)}")
            if not 0 <= value < math.inf or (name == "kd_temperature" and value == 0):
                raise UsageError(f"{self.name}: {name} is {value}; it must be over 0")

    @classmethod
    def parse(cls, text: str) -> Fidelity:
        """The fidelity that `LOSS@FRACTIONxEPOCHS[:name=value,...]` describes, by that name: kd+at@1/27x30:width=0.5.

        The names are width, resolution and LOSS_WEIGHTS. Raises UsageError for anything else.
        """
        match = re.fullmatch(r"([a-z+]+)@([\d./]+)x(\d+)(?::(.+))?", text)
        example = "write LOSS@FRACTIONxEPOCHS, like kd+at@1/27x30 or kd@1/9x20:width=0.5,kd_temperature=2"
        if match is None:
            raise UsageError(f"'{text}' is no fidelity; {example}")
        loss, fraction, epochs, rest = match.groups(default="")
        if loss not in get_args(KDLoss):
            raise UsageError(f"'{text}': no loss '{loss}'; there are {', '.join(get_args(KDLoss))}")
        try:
            own = {name: float(value) for name, value in (word.split("=") for word in rest.split(",") if word)}
            width, resolution = own.pop("width", 1.0), int(own.pop("resolution", 0))
            part = Fraction(fraction)
        except (ValueError, OverflowError, ZeroDivisionError):
            raise UsageError(f"'{text}' is no fidelity; {example}") from None
        return cls(text, part, int(epochs), width, resolution, loss, tuple(sorted(own.items())))  # type: ignore[arg-type]

    def cost(self) -> float:
        """Passes over the full training set that it takes: what its price is proportional to, all else equal."""
        return float(self.fraction) * self.epochs


@dataclass(frozen=True, slots=True)
class Trial:
    """A question: how good is `architecture`, judged at `fidelity` with `seed`? `number` is its place in the run."""

    number: int
    architecture: Architecture
    fidelity: Fidelity
    seed: int = 0

    @property
    def key(self) -> str:
        """What the answer depends on, without the number: the same question has the same key in every run."""
        question = json.dumps([self.architecture.choices, fidelity_to_json(self.fidelity), self.seed])
        return hashlib.sha256(question.encode()).hexdigest()[:16]


@dataclass(frozen=True, slots=True)
class Evaluation:
    """A measurement: the trial, how it ended, accuracy in 0..1 on the validation part, and what it cost.

    `seconds` is the wall time of the whole evaluation on its worker; `costs` splits it (train, teacher, data,
    evaluate, setup; seconds) and holds images_per_s and peak_memory_bytes. `worker` names where it was made and
    `started` when that began (seconds since 1970; 0: not known); a cohort begins at once and shares its seconds.
    `test_accuracy` is known in tables of recorded results only: a search reads the test part once, for its winner.
    No policy looks at it. `error` says why a status is not "ok", `execution` how its steps ran: "graph", or "eager"
    with the reason.
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

    @property
    def ok(self) -> bool:
        return self.status == "ok"


@dataclass
class History:
    """What a policy sees: answers in the order in which they count, and the questions still open.

    `answered` and `pending` are in the order of the run's clock, not of arrival (see engine/search/loop.py).
    """

    answered: list[Evaluation] = field(default_factory=list)
    pending: list[Trial] = field(default_factory=list)

    @property
    def asked(self) -> int:
        return len(self.answered) + len(self.pending)

    def seconds(self) -> float:
        """Worker seconds that the answers took."""
        return sum(evaluation.seconds for evaluation in self.answered)


def fidelity_to_json(fidelity: Fidelity) -> dict[str, Any]:
    values = {**dataclasses.asdict(fidelity), "fraction": str(fidelity.fraction), "weights": dict(fidelity.weights)}
    return values if fidelity.weights else {key: value for key, value in values.items() if key != "weights"}


def fidelity_from_json(data: dict[str, Any]) -> Fidelity:
    weights = tuple(sorted(data.get("weights", {}).items()))
    return _fidelity(**{**data, "weights": weights})


@lru_cache(maxsize=256)
def _fidelity(**fields: Any) -> Fidelity:
    """A journal has a few fidelities and many lines that hold them."""
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
    """Whether a status is of an evaluation that went wrong: "too_slow" is one that was over the limit on latency."""
    return status not in ("ok", "too_slow", "pending")


def mean_accuracies(answers: Iterable[Evaluation]) -> dict[Architecture, float]:
    """Mean accuracy (0..1) of each architecture over its evaluations, which have all succeeded."""
    groups: dict[Architecture, list[float]] = {}
    for evaluation in answers:
        groups.setdefault(evaluation.trial.architecture, []).append(evaluation.accuracy)
    return {architecture: sum(values) / len(values) for architecture, values in groups.items()}


def evaluation_to_json(evaluation: Evaluation) -> dict[str, Any]:
    fields = {f.name: getattr(evaluation, f.name) for f in dataclasses.fields(evaluation)}
    return {**fields, "trial": trial_to_json(evaluation.trial)}


def evaluation_from_json(data: dict[str, Any]) -> Evaluation:
    return Evaluation(**{**data, "trial": trial_from_json(data["trial"])})
