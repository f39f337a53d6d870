"""Neural architecture search from Python: the search, fidelity studies and replays that `cli.py` runs.

    import mfkd

    run = mfkd.search(data="photos/", space="mobilenetv2:stem_stride=2", run_dir="runs/photos", max_macs=320e6)
    print(run.winner)
    run.export()

Settings have the names and defaults of the command-line flags, with underscores for dashes: `--max-macs` is `max_macs`,
`--low.epochs 20` is part of `low="kd@1/9x20"`. Wrong settings raise `mfkd.Error` with the message that the command
prints. Nothing is shown unless `progress` asks for it. docs/api.md describes every name.
"""

from __future__ import annotations

import dataclasses
import inspect
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypedDict, TypeVar, Unpack, overload

from engine import __version__
from engine.config import FINAL_SETTINGS, Budget, Resources, RunSettings, SearchConfig
from engine.search.front import FrontMember
from engine.space import Choice, SearchSpace
from engine.trial import Architecture, Drained, EngineError, Evaluation, Fidelity

if TYPE_CHECKING:
    from engine.search.runs import Run as StoredRun

__all__ = [
    "Architecture",
    "Choice",
    "Drained",
    "Error",
    "Evaluation",
    "Fidelity",
    "FrontMember",
    "Network",
    "Replay",
    "Run",
    "SearchSpace",
    "Settings",
    "Study",
    "Trials",
    "__version__",
    "fidelity_study",
    "open_run",
    "replay",
    "search",
]

F = TypeVar("F", bound=Callable[..., Any])
Error = EngineError
PathOrName = str | os.PathLike[str]
Progress = Literal["auto", "bar", "lines", "none"]


class Settings(TypedDict, total=False):
    """Settings of a search, see `search --help-all`. Their defaults are those of the flags.

    `low`, `high` and `final` are fidelities: `mfkd.Fidelity`, or its short form LOSS@FRACTIONxEPOCHS[:name=value,...]
    like "kd@1/9x20"; of `final`, only loss and epochs count. `low="auto"` runs a fidelity study first. `config` names a
    YAML file of flags; other settings win.
    """

    config: PathOrName
    space: str
    data: PathOrName
    resolution: int
    valid_fraction: float
    flip: Literal["auto", "always", "never"]
    method: str
    teacher: PathOrName
    teacher_weights: PathOrName
    from_scratch: bool
    teacher_epochs: int
    recipe: Literal["auto", "finetune", "scratch"]
    low: Fidelity | str
    high: Fidelity | str
    final: Fidelity | str
    proxies: Literal["auto", "none"]
    kd_temperature: float
    ce_weight: float
    kd_weight: float
    at_weight: float
    nst_weight: float
    hint_weight: float
    similarity_weight: float
    label_smoothing: float
    batch_size: int
    optimizer: Literal["sgd", "adamw"]
    lr: float
    backbone_lr_factor: float
    warmup_fraction: float
    momentum: float
    weight_decay: float
    augment: Literal["crop", "trivial"]
    min_crop_area: float
    ema_decay: float
    amp_dtype: Literal["auto", "float32", "bfloat16"]
    data_backend: Literal["dali", "resident", "synthetic"]
    min_macs: float
    max_macs: float
    max_params: float
    max_latency_ms: float
    latency: PathOrName
    latency_batch: int
    objectives: Literal["accuracy", "accuracy,macs", "accuracy,params", "accuracy,latency"]
    only: str | Sequence[Architecture | str]
    initial_weights: PathOrName
    fidelity_study: PathOrName
    seed: int
    max_low: int
    max_high: int
    gpu_hours: float
    wall_time: float
    target_accuracy: float
    max_failures: int
    final_training: Literal["auto", "always", "never"]
    baselines: Literal["auto", "always", "never"]
    device: Literal["auto", "cuda", "cpu"]
    gpus: int | str
    students_per_gpu: int | str
    execution: Literal["auto", "graph", "eager"]
    teacher_cache: str
    compile: bool
    workers: int
    executor: Literal["local", "slurm", "pbs", "lsf", "kubernetes"]
    min_nodes: int
    max_nodes: int
    partition: str
    account: str
    qos: str
    time: str
    cpus: int
    memory_gb: int
    job_options: str
    worker_init: str
    image: str
    claim: str
    trial_timeout: float
    grace_s: float
    time_limit: int | float | str
    address: str


@dataclass(frozen=True)
class Network:
    """A network that was trained in full. Accuracies are fractions of 1; `test_accuracy` is known for a winner only,
    and `valid_accuracy` is None for one that was trained on the validation images too."""

    architecture: Architecture
    valid_accuracy: float | None
    macs: int
    params: int
    test_accuracy: float | None = None
    latency_ms: float | None = None
    latency_source: Literal["measured", "predicted"] | None = None


class Trials(Sequence[Evaluation]):
    """The evaluations of a run, in order of arrival."""

    def __init__(self, evaluations: Sequence[Evaluation]) -> None:
        self._evaluations = tuple(evaluations)

    @overload
    def __getitem__(self, index: int) -> Evaluation: ...
    @overload
    def __getitem__(self, index: slice) -> Trials: ...
    def __getitem__(self, index: int | slice) -> Evaluation | Trials:
        if isinstance(index, slice):
            return Trials(self._evaluations[index])
        return self._evaluations[index]

    def __len__(self) -> int:
        return len(self._evaluations)

    def __repr__(self) -> str:
        return f"<{len(self)} evaluations, {sum(e.ok for e in self)} of them successful>"

    def to_csv(self, path: PathOrName | None = None) -> str:
        """The evaluations as CSV text with a header, also written to `path` if given."""
        from engine.search.runs import as_csv, row

        text = as_csv(map(row, self._evaluations))
        if path is not None:
            Path(path).write_text(text)
        return text


class Run:
    """A run folder. It reads what is on disk now; open it again to see what a running search has added since."""

    def __init__(self, stored: StoredRun) -> None:
        self._stored = stored

    def __repr__(self) -> str:
        state = f"winner {self.winner.architecture}" if self.winner else "not finished"
        return f"<run {self.path}: {state}, {len(self.trials)} evaluations>"

    @property
    def path(self) -> Path:
        """The run folder."""
        return self._stored.folder.path

    @property
    def finished(self) -> bool:
        """Whether the search has named its winner, or the fidelity study is complete."""
        return self._stored.finished

    @cached_property
    def trials(self) -> Trials:
        """All evaluations so far, failed ones included."""
        return Trials(self._stored.answers)

    @cached_property
    def winner(self) -> Network | None:
        """The network that the search recommends, with its test accuracy; None until the search has finished."""
        result = self._stored.result
        if result is None:
            return None
        return _network(result["winner"])

    @cached_property
    def final(self) -> Network | None:
        """The winner after its last training, which included the validation images; None if it has had none."""
        result = self._stored.result
        return _network(result["final"]) if result and result.get("final") else None

    @property
    def verdict(self) -> str:
        """Whether the search was worth it, compared with its baselines; empty until it has finished."""
        return (self._stored.result or {}).get("verdict", "")

    @property
    def front(self) -> list[FrontMember]:
        """The networks that no other one trained in full so far beats in both validation accuracy and cost, cheapest
        first. The cost is that of `objectives`, else multiply-accumulates."""
        return self._stored.front

    @property
    def tau(self) -> Mapping[str, float | None]:
        """Kendall's tau of the low fidelity ("low_vs_high") and of MACs ("macs_vs_high") with full accuracy."""
        from engine.search.search import taus

        return taus([e for e in self._stored.answers if e.ok], self._stored.plan)

    def report(self, out: PathOrName | None = None) -> Path:
        """Writes the HTML report and trials.csv into `out` (default: RUN/report); returns the path of the page."""
        from engine.report.write import write
        from engine.search.runs import with_answers

        written = write(with_answers(self._stored), Path(out).absolute() if out else self._stored.folder.report)
        return Path(written["report"])

    def export(
        self, architecture: Architecture | str | None = None, out: PathOrName | None = None, device: str = "auto"
    ) -> Path:
        """Writes the winner, or another architecture trained in full, as safetensors, model.py, ONNX and torch.export.

        Each format is verified against the checkpoint. Returns the folder: `out`, or RUN/export/ARCHITECTURE.
        """
        from engine.search.one_architecture import export, exporter, select_evaluation
        from engine.search.progress import Display

        chosen = select_evaluation(self._stored, None if architecture is None else str(architecture))
        folder = Path(out) if out else self._stored.folder.export(chosen.trial.architecture)
        resources = Resources(device=device)  # type: ignore[arg-type]
        with Display("none") as display, exporter(self._stored, resources) as fleet:
            return Path(export(self._stored, chosen, folder, fleet, display)["folder"])

    def export_front(self, out: PathOrName | None = None, device: str = "auto") -> Path:
        """Exports every network of `front` to its own folder in `out` (default: RUN/export), with front.csv and
        front.md.

        Networks that are there already are skipped. Returns the folder.
        """
        from engine.search.front_export import export_front
        from engine.search.progress import Display

        folder = Path(out or self._stored.folder.exports).absolute()
        resources = Resources(device=device)  # type: ignore[arg-type]
        with Display("none") as display:
            return Path(export_front(self._stored, folder, resources, display)["folder"])


def _network(row: Mapping[str, Any]) -> Network:
    """The network that a row of result.json describes."""
    known: dict[str, Any] = {item.name: row.get(item.name) for item in dataclasses.fields(Network)}
    return Network(**{**known, "architecture": Architecture.parse(row["architecture"])})


@dataclass(frozen=True)
class Study:
    """What a fidelity study found. `fidelities` holds a row per low fidelity: name, tau, tau_given_macs, stderr,
    relative_cost and more (docs/search.md); `warning` is empty unless full training ranks mostly by luck."""

    run: Run
    recommended: Fidelity
    reason: str
    fidelities: list[dict[str, Any]]
    complete: bool
    warning: str


@dataclass(frozen=True)
class Replay:
    """What a replay found: `methods[name]["15"]` holds mean and stderr of the test accuracy in percent at 15 GPU-hours,
    and `optimum` is the best test accuracy in the table (docs/search.md); in a search for a front, of the
    hypervolume."""

    table: str
    optimum: float
    methods: dict[str, dict[str, Any]]


def _with_settings(function: F) -> F:
    """Shows every setting with its default in the signature of a function of **settings, for help() and completion."""
    own = [p for p in inspect.signature(function).parameters.values() if p.kind is not p.VAR_KEYWORD]
    given = [item for kind in (SearchConfig, Budget, Resources) for item in dataclasses.fields(kind)]
    settings = [inspect.Parameter(item.name, inspect.Parameter.KEYWORD_ONLY, default=item.default) for item in given]
    names = {parameter.name for parameter in own}
    shown = [*own, *(one for one in settings if one.name not in names)]
    function.__signature__ = inspect.Signature(shown)  # type: ignore[attr-defined]
    return function


@_with_settings
def search(
    *,
    run_dir: PathOrName | None = None,
    progress: Progress = "none",
    log: Literal["none", "tensorboard", "mlflow"] = "none",
    **settings: Unpack[Settings],
) -> Run:
    """Starts the search of a run folder, or resumes it if called again with the same settings; returns its run.

    `run_dir` defaults to runs/search. An interrupt (Ctrl-C, or the notebook's stop button) lets running trials finish
    within `grace_s` seconds and raises Drained; call again to resume. Raises Error for settings that cannot work.
    """
    from engine.commands import search as command
    from engine.search.fidelity_study.study import study_before_search
    from engine.search.progress import Display
    from engine.search.search import search as run_search

    ready, folder = _parse(command.parser(), run_dir, settings)
    with Display(progress) as display:
        if ready.config.fidelity_study == "auto":
            ready = study_before_search(ready, folder, display)
        return open_run(run_search(ready, folder, display, log)["run_dir"])


@_with_settings
def fidelity_study(
    *,
    lows: Sequence[Fidelity | str] = (),
    architectures: int = 16,
    repeats: int = 1,
    low_repeats: int = 1,
    drop: bool = True,
    run_dir: PathOrName | None = None,
    progress: Progress = "none",
    **settings: Unpack[Settings],
) -> Study:
    """Trains some architectures in full and at the low fidelities `lows`, and recommends one of these for a search.

    `lows` defaults to four that suit the full fidelity. Call again with the same settings to resume, or with more
    architectures or fidelities to extend the study. To search with the result: `mfkd.search(config=study.run.path /
    "recommended.yaml")`. Raises Error for settings that cannot work.
    """
    from engine.commands import fidelity_study as command
    from engine.search.fidelity_study.design import FidelityStudy
    from engine.search.fidelity_study.study import run_fidelity_study
    from engine.search.progress import Display

    ready, folder = _parse(command.parser(), run_dir, settings)
    compared = tuple(low if isinstance(low, Fidelity) else Fidelity.parse(low) for low in lows)
    study = FidelityStudy(compared, architectures, repeats, low_repeats, drop)
    with Display(progress) as display:
        found = run_fidelity_study(ready, study, folder, display)
    given = {low.name: low for low in compared}
    best = given.get(found["recommended"]) or Fidelity.parse(found["recommended"])
    return Study(
        run=open_run(found["run_dir"]),
        recommended=best,
        reason=found["reason"],
        fidelities=found["fidelities"],
        complete=found["complete"],
        warning=found["warning"],
    )


def replay(
    table: PathOrName,
    methods: Sequence[str] = ("mfkd", "random"),
    *,
    lows: Sequence[str] = (),
    join: Sequence[PathOrName] = (),
    workers: int = 8,
    gpu_hours: float = 60.0,
    at: Sequence[float] = (15.0, 20.0, 60.0),
    seeds: int = 20,
    max_low: int = 100,
    min_macs: float = 0.0,
    max_macs: float = float("inf"),
    max_params: float = float("inf"),
    maxima: Sequence[tuple[str, float]] = (),
    objectives: Sequence[str] = ("accuracy",),
    noise: float = 0.0,
    until_best: bool = False,
    processes: int = 0,
    out: PathOrName | None = None,
) -> Replay:
    """Runs search methods on a table of recorded results with a simulated clock; trains nothing.

    The parameters are the flags of the `replay` command. A script that calls this with `processes` other than 1 needs
    the usual `if __name__ == "__main__"`. Raises Error for an unknown method, or a file that is not such a table.
    """
    from engine.search.replay.replay import replay as run_replay
    from engine.search.replay.simulate import Replay as Request

    request = Request(
        table=Path(table),
        methods=tuple(methods),
        lows=tuple(lows),
        join=tuple(map(Path, join)),
        workers=workers,
        gpu_hours=gpu_hours,
        at=tuple(at),
        seeds=seeds,
        max_low=max_low,
        min_macs=min_macs,
        max_macs=max_macs,
        max_params=max_params,
        maxima=tuple((name, most) for name, most in maxima),
        objectives=tuple(objectives),
        noise=noise,
        until_best=until_best,
        processes=processes,
        out=None if out is None else Path(out),
    )
    found = run_replay(request)
    return Replay(found["table"], found["optimum"], found["methods"])


def open_run(path: PathOrName) -> Run:
    """The run in a folder, or with a name under runs/; it may still be running. Raises Error if there is none."""
    from engine.search.runs import open_run as read_run

    return Run(read_run(os.fspath(path)))


def _parse(parser: Any, run_dir: PathOrName | None, settings: Mapping[str, Any]) -> tuple[RunSettings, Path]:
    """Settings and run folder, checked and converted by the parser of a command."""
    from engine.commands.flags import gather_settings, run_dir_of

    flags = dict(_flags({**settings, "run_dir": run_dir}))
    values = parser.parse_args([f"--{name.replace('_', '-')}={text}" for name, text in flags.items()])
    return gather_settings(values), run_dir_of(values)


def _flags(settings: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Settings as flags and their texts. The weights of a fidelity come first, so that settings of that name win."""
    from engine.commands.flags import FIDELITY_HELP

    fidelities = {name: settings.get(name) for name in ("low", "high", "final")}
    for name, given in fidelities.items():
        if given == "auto":
            yield ("fidelity_study" if name == "low" else name), "auto"
        elif given is not None:
            fidelity = given if isinstance(given, Fidelity) else Fidelity.parse(given)
            yield from ((weight, repr(value)) for weight, value in fidelity.weights)
            for part in FINAL_SETTINGS if name == "final" else FIDELITY_HELP:
                yield f"{name}.{part}", str(getattr(fidelity, part))
    for name, value in settings.items():
        if value is None or name in fidelities:
            continue
        if isinstance(value, bool):
            yield name, str(value).lower()
        elif isinstance(value, Sequence) and not isinstance(value, str):
            yield name, ",".join(map(str, value))
        else:
            yield name, os.fspath(value) if isinstance(value, os.PathLike) else str(value)
