"""A run folder as it can be read: settings, journal, result. Its search may still be running."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from engine import config
from engine.config import Budget, Plan, Study
from engine.search import ground, journal
from engine.search.journal import Record
from engine.trial import EnvironmentUnusable, Evaluation, Fidelity, Trial, UsageError

Json = dict[str, Any]

SURROGATE_METHODS = ("mfkd", "mfkd-front")
# What an evaluation's seconds are split into; `costs` holds rates and sizes besides.
PHASES = ("setup", "data", "teacher", "train", "evaluate")


@dataclass(frozen=True)
class Run:
    """What a run folder holds: `facts` is run.json, `result` is result.json where it is that of the whole journal; a
    fidelity study has none."""

    folder: Path
    kind: config.Kind
    study: Study
    budget: Budget
    record: Record
    facts: Json
    result: Json | None

    @property
    def plan(self) -> Plan:
        """The plan of the search; of a fidelity study, with the low fidelities that it has compared."""
        plan = config.plan(self.study, self.budget)
        asked = dict.fromkeys(trial.fidelity for trial in self.record.asked if trial.fidelity != plan.high)
        return plan if not asked or self.study.low in asked else replace(plan, lows=tuple(asked))

    @property
    def finished(self) -> bool:
        """Whether the search has named its winner, or the study has measured all that it was to and has asked for no
        more since."""
        if self.kind == "fidelity":
            found = _read(self.folder / "fidelity.json") or {}
            return bool(found.get("complete")) and found.get("evaluations") == len(self.record.asked)
        return self.result is not None

    @property
    def answers(self) -> list[Evaluation]:
        """Every evaluation, in the order in which they arrived."""
        return list(self.record.answers.values())

    @property
    def pending(self) -> list[Trial]:
        """What was asked and not answered yet: under way, or cut short by the end of the search."""
        return [trial for trial in self.record.asked if trial.number not in self.record.answers]

    @property
    def asks_surrogate(self) -> bool:
        """Whether full trainings are those that the surrogate thinks best of."""
        return self.kind == "search" and self.plan.method in SURROGATE_METHODS

    @property
    def adopted(self) -> set[int]:
        """Numbers of the trials that the run did not ask itself: it began with their answers, see --pilot."""
        asked = zip(self.record.asked, self.record.seen, strict=True)
        return {trial.number for trial, seen in asked if seen < 0} if self.study.pilot else set()

    def at(self, fidelity: Fidelity) -> list[Evaluation]:
        """The evaluations at a fidelity that gave a score."""
        return [e for e in self.answers if e.ok and e.trial.fidelity == fidelity]

    def teacher_card(self) -> Json | None:
        """What the file of the run's teacher says of itself (teacher.Card), None where there is none."""
        path = ground.teacher_path(self.study, self.folder)
        try:
            with safe_open(path, "np") as stored:
                card: Json = json.loads(stored.metadata()["card"])
        except (OSError, SafetensorError, KeyError, TypeError, ValueError):
            return None
        return card

    @property
    def best(self) -> Evaluation | None:
        """The winner, or the best full-fidelity evaluation so far; None where there is none yet."""
        full = self.at(self.plan.high)
        if self.result is not None:
            name = self.result["winner"]["architecture"]
            full = [e for e in full if str(e.trial.architecture) == name] or full
        return max(full, key=lambda e: e.accuracy, default=None)


def open_run(name: str) -> Run:
    """The run that a command names: a folder, or a name under runs/.

    Raises UsageError where there is none, EngineError where another version wrote it.
    """
    folder = find(name)
    stored = config.read_stored(folder / "config.yaml")
    try:
        study, budget = config.study_from_dict(stored["study"]), Budget(**stored["budget"])
    except (KeyError, TypeError) as error:
        raise UsageError(
            f"{folder / 'config.yaml'} was written by another version ({error}); use that version to look into it"
        ) from error
    path = folder / "journal.jsonl"
    if not path.is_file():
        raise UsageError(f"{folder} has no journal.jsonl, which is all that is known of a run; restore it from a copy")
    record = journal.read(path)
    facts, kind = _read(folder / "run.json") or {}, stored.get("kind", "search")
    return Run(folder, kind, study, budget, record, facts, _result(folder, record))


def find(name: str) -> Path:
    """The folder of a run; UsageError says which runs there are."""
    for folder in (Path(name), Path("runs") / name):
        if (folder / "config.yaml").is_file():
            return folder.absolute()
    known = sorted(path.parent.name for path in Path("runs").glob("*/config.yaml"))
    there = f"runs/ has {', '.join(known)}" if known else "give the folder that search wrote with --run-dir"
    raise UsageError(f"'{name}' is no run: no folder with a config.yaml, and no name under runs/; {there}")


def with_answers(run: Run) -> Run:
    """The run itself; UsageError where nothing has been measured in it yet."""
    if not run.record.answers:
        raise UsageError(f"nothing has been measured in {run.folder} yet; wait for the first evaluation")
    return run


def _result(folder: Path, record: Record) -> Json | None:
    """result.json, unless the search has gone on since it was written."""
    result = _read(folder / "result.json")
    if result is None or sum(result["evaluations"].values()) != len(record.answers):
        return None
    return result


def _read(path: Path) -> Json | None:
    if not path.is_file():
        return None
    try:
        content: Json = json.loads(path.read_text())
    except ValueError as error:
        raise EnvironmentUnusable(f"{path} cannot be read ({error}); restore it from a copy, or remove it") from error
    return content


def row(evaluation: Evaluation) -> Json:
    """An evaluation as the columns of trials.csv: plain values, one level deep."""
    trial = evaluation.trial
    fidelity = trial.fidelity
    return {
        **row_of_trial(trial),
        "status": evaluation.status,
        "accuracy": evaluation.accuracy if evaluation.ok else None,
        "macs": evaluation.macs if evaluation.ok else None,
        "params": evaluation.params if evaluation.ok else None,
        "latency_ms": evaluation.costs.get("latency_ms"),
        "seconds": round(evaluation.seconds, 3),
        **{f"{name}_seconds": round(evaluation.costs.get(name, 0.0), 3) for name in PHASES},
        "images_per_s": round(evaluation.costs.get("images_per_s", 0.0), 1),
        "peak_memory_bytes": int(evaluation.costs.get("peak_memory_bytes", 0)),
        "fraction": str(fidelity.fraction),
        "epochs": fidelity.epochs,
        "width": fidelity.width,
        "resolution": fidelity.resolution,
        "kd_loss": fidelity.kd_loss,
        "worker": evaluation.worker,
        "started": round(evaluation.started, 3),
        "device": evaluation.device,
        "error": evaluation.error,
        "execution": evaluation.execution,
    }


def row_of_trial(trial: Trial) -> Json:
    """What is known of a trial before its answer."""
    return {
        "number": trial.number,
        "architecture": str(trial.architecture),
        "fidelity": trial.fidelity.name,
        "seed": trial.seed,
        "status": "pending",
    }


def as_csv(rows: Iterable[Json]) -> str:
    """Rows of the same kind as CSV with a header; missing values are empty."""
    rows = list(rows)
    columns = list(dict.fromkeys(name for one in rows for name in one))
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()
