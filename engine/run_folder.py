"""The run folder: the names of its files, and its config.yaml."""

from __future__ import annotations

import dataclasses
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from engine.config import Budget, RunKind, SearchConfig, Slots, config_to_dict, flatten, left_to_auto
from engine.trial import EnvironmentUnusable, Trial, UsageError


@dataclass(frozen=True, slots=True)
class RunFolder:
    """A run folder at `path` (absolute). Only this class knows the names of the files in it."""

    path: Path

    def __str__(self) -> str:
        return str(self.path)

    @property
    def config(self) -> Path:
        """The settings and slots of the run."""
        return self.path / "config.yaml"

    @property
    def journal(self) -> Path:
        """Every trial asked and every evaluation received: the only record that a run depends on."""
        return self.path / "journal.jsonl"

    @property
    def run_file(self) -> Path:
        """The data of the run, and the versions, device and command line of each call."""
        return self.path / "run.json"

    @property
    def result(self) -> Path:
        """The winner of a finished search."""
        return self.path / "result.json"

    @property
    def class_scores(self) -> Path:
        """Accuracy by class and confusion matrix of the winner, by split (engine/search/class_scores.py)."""
        return self.path / "class-scores.json"

    @property
    def latencies(self) -> Path:
        """Milliseconds of the architectures measured for --max-latency-ms."""
        return self.path / "latency.json"

    @property
    def proxies(self) -> Path:
        """Training-free scores of the candidates; decisions depend on them."""
        return self.path / "proxies.jsonl"

    @property
    def teacher(self) -> Path:
        """Weights of the teacher, if the run makes it itself."""
        return self.path / "teacher" / "teacher.safetensors"

    @property
    def logs(self) -> Path:
        return self.path / "logs"

    @property
    def activities(self) -> Path:
        """What each busy worker is doing, while a driver runs (engine/search/activity.py)."""
        return self.logs / "activities"

    def activity(self, worker: str) -> Path:
        return self.activities / f"{worker.replace('/', '-')}.json"

    @property
    def report(self) -> Path:
        return self.path / "report"

    @property
    def tensorboard(self) -> Path:
        return self.path / "tensorboard"

    @property
    def mlflow_id(self) -> Path:
        """The id of this run on the MLflow server."""
        return self.path / "mlflow.txt"

    @property
    def first_study(self) -> RunFolder:
        """The fidelity study that `search --low auto` runs first."""
        return RunFolder(self.path / "fidelity-study")

    @property
    def study_result(self) -> Path:
        """The findings of a fidelity study."""
        return self.path / "fidelity-study.json"

    @property
    def study_picture(self) -> Path:
        return self.path / "fidelity-study.png"

    @property
    def study_evaluations(self) -> Path:
        """The evaluations of a fidelity study, as CSV."""
        return self.path / "evaluations.csv"

    @property
    def recommended(self) -> Path:
        """The settings that a fidelity study recommends, for `search -c`."""
        return self.path / "recommended.yaml"

    def weights(self, trial: Trial) -> Path:
        """Trained weights of a full-fidelity trial."""
        return self.path / "checkpoints" / str(trial.architecture) / f"{trial.key}.safetensors"

    def training_state(self, trial: Trial) -> Path:
        """State of a full training between epochs, see `training_state_of`."""
        return training_state_of(self.weights(trial))

    @property
    def exports(self) -> Path:
        """The folder of all that was exported, by default."""
        return self.path / "export"

    def export(self, architecture: object) -> Path:
        return self.exports / str(architecture)

    def job_script(self, name: str) -> Path:
        return self.path / name

    def teacher_weights(self, config: SearchConfig) -> Path:
        """The teacher's weights: the file named in `config`, else the one that the run makes itself."""
        return Path(config.teacher).absolute() if config.teacher.endswith(".safetensors") else self.teacher

    def has_begun(self) -> bool:
        """Whether any work was done: there is a teacher, a training-free score, or a trial in the journal."""
        asked = self.journal.exists() and self.journal.read_bytes().count(b"\n") > 1
        return asked or self.proxies.exists() or any(self.teacher.parent.glob("*"))

    def forget_settings(self) -> None:
        """Forgets the settings and data of a call that failed before any work was done."""
        self.config.unlink(missing_ok=True)
        self.run_file.unlink(missing_ok=True)

    def fix_config(self, kind: RunKind, config: SearchConfig, budget: Budget, wanted: Slots) -> Slots:
        """Writes config.yaml, or checks `config` against the one already there; returns the slots of the run.

        Decisions depend on the slots, so a run keeps them when it resumes on another machine. They only grow, if a
        later call brings more workers, which would otherwise be idle. A later call of a fidelity study may compare
        other low fidelities. Raises UsageError if any other setting differs.
        """
        self.check_config(kind, config)
        if self.config.exists():
            stored = self.read_config()
            first = Slots(**stored["slots"])
            wanted = Slots(max(first.total, wanted.total // wanted.cohort * first.cohort), first.cohort)
        content = {
            "kind": kind,
            "config": config_to_dict(config),
            "budget": config_to_dict(budget),
            "slots": dataclasses.asdict(wanted),
            "folder": str(self),
        }
        write_atomically(self.config, yaml.safe_dump(content, sort_keys=False))
        return wanted

    def recorded(self) -> dict[str, Any]:
        """The configuration in config.yaml; {} if there is none yet."""
        found: dict[str, Any] = self.read_config()["config"] if self.config.exists() else {}
        return found

    def check_config(self, kind: RunKind, config: SearchConfig) -> None:
        """Raises UsageError if the folder holds a run of another kind or with other settings.

        Settings that are left to auto may have any value there.
        """
        if not self.config.exists():
            return
        stored = self.read_config()
        if stored.get("kind", kind) != kind:
            raise UsageError(
                f"{self} holds a run of `{stored['kind']}`; choose another --name or --run-dir for `{kind}`"
            )
        # A setting unknown to the version that wrote the file counts as its default.
        before = {**dict(flatten(config_to_dict(SearchConfig()))), **dict(flatten(stored["config"]))}
        now = dict(flatten(config_to_dict(config)))
        open_still = left_to_auto(config)
        fixed = [k for k in now if k not in open_still and (kind == "search" or not k.startswith("low."))]
        changed = [f"{key}: {before.get(key)} there, {now[key]} here" for key in fixed if now[key] != before.get(key)]
        if changed:
            raise UsageError(
                f"{self} holds a search with other settings ({'; '.join(changed)}); repeat its settings to resume it, "
                "or choose another folder (--name, --run-dir or --out)"
            )

    def read_config(self) -> dict[str, Any]:
        """The content of config.yaml, with paths into the run folder updated if the folder has been moved.

        Raises EnvironmentUnusable if the file cannot be read or is not the configuration of a run.
        """
        try:
            stored = yaml.safe_load(self.config.read_text())
        except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
            raise EnvironmentUnusable(
                f"cannot read {self.config} ({error}); restore it, or use another folder (--run-dir or --out)"
            ) from error
        if not isinstance(stored, dict) or not {"config", "slots"} <= stored.keys():
            raise EnvironmentUnusable(
                f"{self.config} is not the configuration of a run; restore it, "
                "or use another folder (--run-dir or --out)"
            )
        here = str(self.config.absolute().parent)
        there = stored.get("folder", here)
        for name in ("fidelity_study", "teacher"):
            path = str(stored["config"].get(name, ""))
            inside = path.removeprefix(there + os.sep)
            if inside != path and (Path(here) / inside).exists():
                stored["config"][name] = str(Path(here) / inside)
        return stored


def training_state_of(weights: Path) -> Path:
    """State of the training that will write `weights`; removed once it has finished or failed for good."""
    return weights.with_suffix(".state.pt")


def export_record_of(folder: Path) -> Path:
    """What an export in `folder` has measured, and of which weights, as JSON."""
    return folder / "export.json"


def front_tables_of(folder: Path) -> tuple[Path, Path]:
    """The tables of a front that was exported to `folder`: CSV and Markdown."""
    return folder / "front.csv", folder / "front.md"


def write_atomically(path: Path, text: str) -> None:
    """Writes a temporary file and moves it into place, so that a reader never sees half a file."""
    temporary = path.with_suffix(".tmp")
    temporary.write_text(text)
    temporary.replace(path)
