"""The tasks that a driver sends to its workers: a frozen dataclass for each, and its JSON form.

A task is sent as the name of a function and a JSON object, which only `task_to_json` and `task_from_json` know.
`Task.function` names the function of `engine.training.run_tasks` that takes it (or of another module, see
`engine.fleet.fleet.open_fleet`).
"""

from __future__ import annotations

import dataclasses
import types
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal, TypeVar, get_args, get_origin, get_type_hints

from engine.config import Budget, Resources, SearchConfig, config_from_dict, config_to_dict
from engine.trial import Architecture, Curve, Trial, trial_from_json, trial_to_json

Json = dict[str, Any]
T = TypeVar("T")
SplitName = Literal["valid", "test", "all"]
TeacherOrigin = Literal["scratch", "finetune", "import", "untrained"]
Statistic = tuple[float, float, float]  # one number per channel


@dataclass(frozen=True, slots=True)
class WorkerSettings:
    """What every task of a run needs: settings, the run folder (on a shared file system) and the kind of device.

    `curves`: trainings also measure their validation accuracy after epochs, for a log.
    """

    config: SearchConfig
    run_dir: Path
    device: str
    resources: Resources = Resources()  # noqa: RUF009 - frozen
    curves: bool = False


@dataclass(frozen=True, slots=True)
class Normalisation:
    """The classes of a data set, and the mean and standard deviation of each channel, for pixels in 0..1."""

    classes: tuple[str, ...]
    mean: Statistic
    std: Statistic


@dataclass(frozen=True, slots=True)
class DataFacts:
    """What a worker found out about the data and its device.

    `resolution` is the side in pixels of the images that a network sees, `images` the size of each split. `files` tells
    whether the images are files of a folder. `fingerprint` identifies the content (engine.data.dataset.fingerprint).
    `notes` tell how a folder was read and what was passed over, `warnings` what is probably a mistake in it.
    """

    classes: tuple[str, ...]
    resolution: int
    mean: Statistic
    std: Statistic
    images: dict[str, int]
    files: bool = False
    fingerprint: str = ""
    device: str = ""
    notes: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()

    @property
    def summary(self) -> str:
        """One line: the size of each split, the number of classes, how a folder was read, what was passed over."""
        sizes = ", ".join(f"{count:,} {split}" for split, count in self.images.items())
        return "; ".join((f"{sizes}, {len(self.classes)} classes", *self.notes))

    @property
    def normalisation(self) -> Normalisation:
        return Normalisation(self.classes, self.mean, self.std)


@dataclass(frozen=True, slots=True)
class Task:
    """Work for a worker."""

    function: ClassVar[str]


@dataclass(frozen=True, slots=True)
class ProbeTask(Task):
    """Check data and device; the answer is a DataFacts."""

    function: ClassVar[str] = "run_probe"
    worker: WorkerSettings


@dataclass(frozen=True, slots=True)
class TeacherTask(Task):
    """Make sure that `path` holds a teacher that fits the data; the answer is a TeacherFacts.

    If there is no such file, `network` is trained from scratch, or fine-tuned from the weights of its library or those
    in the file `weights`, or imported: `weights` are used as they are. `mean` and `std` describe the images that
    imported weights were trained on; by default, they are those of the data. An untrained network is for timing.
    """

    function: ClassVar[str] = "run_teacher"
    worker: WorkerSettings
    network: str
    path: Path
    origin: TeacherOrigin = "scratch"
    weights: Path | None = None
    mean: Statistic | None = None
    std: Statistic | None = None


@dataclass(frozen=True, slots=True)
class TeacherFacts:
    """The card in a teacher's file, with its `curve`. `elsewhere`: it was trained here, but on other images or another
    split."""

    network: str
    accuracy: float
    epochs: int
    seconds: float
    elsewhere: bool
    path: Path
    curve: Curve = ()


@dataclass(frozen=True, slots=True)
class TrialsTask(Task):
    """Train and score trials of one fidelity and one seed side by side; the answer is an evaluation for each.

    `teacher` is the teacher's weights file, unused if the fidelity does not distil. `timeout_s` is the time limit of
    the whole task in seconds (0: none).
    """

    function: ClassVar[str] = "run_trials"
    worker: WorkerSettings
    trials: tuple[Trial, ...]
    teacher: Path
    timeout_s: float = 0.0


@dataclass(frozen=True, slots=True)
class TimingTask(Task):
    """Time a few steps of trials that would be trained side by side, or (`network`, as in TeacherTask) of a teacher at
    the fidelity of the only trial, for about `seconds`; the answer is a TimingFacts."""

    function: ClassVar[str] = "run_timing"
    worker: WorkerSettings
    trials: tuple[Trial, ...]
    teacher: Path
    seconds: float
    network: str = ""
    origin: TeacherOrigin = "scratch"


@dataclass(frozen=True, slots=True)
class StepTimes:
    """Seconds of a whole step: the `mean` of `count` timed steps, and their extremes.

    Each was timed with `images` images and `networks` networks: fewer than a whole step has, if that would have taken
    too long, and scaled up.
    """

    mean: float = 0.0
    fastest: float = 0.0
    slowest: float = 0.0
    count: int = 0
    images: int = 0
    networks: int = 0


@dataclass(frozen=True, slots=True)
class TimingFacts:
    """Seconds of the parts of a training, of all trials of a TimingTask together: its setup, a step, a score."""

    setup: float
    step: StepTimes
    score: float


@dataclass(frozen=True, slots=True)
class TestTask(Task):
    """Score the stored weights of a full training, or (None) those of the teacher file `teacher`, on the test split.

    The answer holds test_accuracy, weights (their file), hits (engine.trial.hits_to_text) and the confusion matrix.
    """

    __test__ = False  # pytest would take it for a test class
    function: ClassVar[str] = "run_test"
    worker: WorkerSettings
    trial: Trial | None
    teacher: Path = Path()


@dataclass(frozen=True, slots=True)
class LatencyTask(Task):
    """Time the forward pass of each architecture, all in turn; the answer is a Timings."""

    function: ClassVar[str] = "run_latency"
    worker: WorkerSettings
    architectures: tuple[Architecture, ...]


@dataclass(frozen=True, slots=True)
class Timings:
    """`milliseconds` of networks, the device and runtime they were measured with, and `noise`: by what share the same
    network took longer in one round than in another. `warning` says so if that is much."""

    milliseconds: tuple[float, ...]
    device: str
    runtime: str
    noise: float
    warning: str


@dataclass(frozen=True, slots=True)
class ExportProbeTask(Task):
    """Write a network to be timed elsewhere into the folder `out`; the answer is null."""

    function: ClassVar[str] = "run_export_probe"
    space: str
    architecture: Architecture
    classes: int
    width: float
    resolution: int
    out: Path


@dataclass(frozen=True, slots=True)
class ProxyTask(Task):
    """Score the untrained network of each architecture; the answer is a ProxyScores for each.

    `teacher` is the weights file of the run's teacher, if it has one: one of the scores compares with it. `timeout_s`
    is the time limit of the whole task in seconds (0: none).
    """

    function: ClassVar[str] = "run_proxies"
    worker: WorkerSettings
    architectures: tuple[Architecture, ...]
    teacher: Path | None = None
    timeout_s: float = 0.0


PROXIES = ("naswot", "jacobian_covariance", "diswot", "expressivity")


@dataclass(frozen=True, slots=True)
class ProxyScores:
    """Training-free scores of an architecture by name (PROXIES), greater is better, and the reasons for missing ones.

    `seconds` is the wall time of building and scoring the network.
    """

    choices: tuple[int, ...]
    scores: dict[str, float]
    missing: dict[str, str]
    seconds: float = 0.0


@dataclass(frozen=True, slots=True)
class ScoreTask(Task):
    """Score the weights in a file on a split of the data, or on all of it.

    `trained_on` describes the data that the weights were trained on; None means these data.
    """

    function: ClassVar[str] = "run_score"
    worker: WorkerSettings
    trial: Trial
    weights: Path
    split: SplitName
    trained_on: Normalisation | None = None


@dataclass(frozen=True, slots=True)
class ExportTask(Task):
    """Write the weights of a full-fidelity trial of `run_dir` in every export format into `out`, with a model card.

    `card` holds what the run knows about the network (engine/export/card.py).
    """

    function: ClassVar[str] = "run_export"
    run_dir: Path
    trial: Trial
    space: str
    teacher: Path
    out: Path
    normalisation: Normalisation
    resolution: int
    device: str
    card: Json


@dataclass(frozen=True, slots=True)
class InputFormat:
    """How a trained network takes images: of `resolution` pixels a side, normalised.

    If `cropped`, an image is resized by its shorter side and cut to its centre, as the files of a folder are; otherwise
    it is resized whole, as arrays are.
    """

    normalisation: Normalisation
    resolution: int
    cropped: bool


@dataclass(frozen=True, slots=True)
class PredictTask(Task):
    """Classify image files, and those below folders; see engine/training/predict.py for the answer.

    The network is that of a `trial` in `space`, with the weights in the file `network`; or without a trial, the
    model.onnx `network` of an export, which holds its input format. `top` classes are told for each image.
    """

    function: ClassVar[str] = "run_predict"
    network: Path
    images: tuple[Path, ...]
    top: int
    device: str
    space: str = ""
    trial: Trial | None = None
    inputs: InputFormat | None = None
    data_backend: str = "dali"


@dataclass(frozen=True, slots=True)
class Activity:
    """What a worker says of its present training, or of a cohort side by side.

    `phase` is the name of a fidelity, or "teacher". `epoch` of `epochs` are done (0 of 0: nothing is trained, or not
    yet), at a recent mean `loss` (None: not yet known); the speed counts the images of each network. `curve` holds the
    loss and, where it was measured, the validation accuracy of each epoch, of a training alone. `at` is the time of the
    report, in seconds since 1970.
    """

    worker: str
    phase: str
    numbers: tuple[int, ...] = ()
    networks: tuple[str, ...] = ()
    epoch: int = 0
    epochs: int = 0
    loss: float | None = None
    images_per_s: float = 0.0
    seconds_left: float | None = None
    curve: Curve = ()
    at: float = 0.0


@dataclass(frozen=True, slots=True)
class SpaceCheckTask(Task):
    """Check that a search space meets the requirements of a search."""

    function: ClassVar[str] = "run_check"
    space: str
    classes: int
    resolution: int
    teacher: str
    seed: int


def task_to_json(task: Any) -> Json:
    """A task, or one of the dataclasses above, as plain JSON values."""
    return {item.name: _encode(getattr(task, item.name)) for item in dataclasses.fields(task)}


def task_from_json(kind: type[T], values: Json) -> T:
    """The inverse of `task_to_json`."""
    hints = get_type_hints(kind)
    return kind(**{name: _decode(hints[name], value) for name, value in values.items()})


def _encode(value: Any) -> Any:
    if isinstance(value, SearchConfig | Budget | Resources):
        return config_to_dict(value)
    if isinstance(value, Trial):
        return trial_to_json(value)
    if isinstance(value, Architecture):
        return list(value.choices)
    if isinstance(value, Path):
        return str(value)
    if isinstance(value, tuple):
        return [_encode(entry) for entry in value]
    return task_to_json(value) if dataclasses.is_dataclass(value) else value


def _decode(kind: Any, value: Any) -> Any:
    if isinstance(kind, types.UnionType):  # X | None
        return None if value is None else _decode(get_args(kind)[0], value)
    if get_origin(kind) is tuple:  # tuple[X, ...], or of equal types
        return tuple(_decode(get_args(kind)[0], entry) for entry in value)
    if kind is SearchConfig:
        return config_from_dict(value)
    if kind is Resources:
        return Resources(**value)
    if kind is Trial:
        return trial_from_json(value)
    if kind is Architecture:
        return Architecture(tuple(value))
    if kind is Path:
        return Path(value)
    if isinstance(kind, type) and dataclasses.is_dataclass(kind):
        return task_from_json(kind, value)
    return value
