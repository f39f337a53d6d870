"""Reads a run folder: settings, journal, result. The run may still be in progress."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from engine.config import Budget, Plan, RunKind, SearchConfig, config_from_dict, needs_latency, search_plan
from engine.run_folder import RunFolder
from engine.search.front import FrontMember, cost_axis, front, trained_in_full
from engine.search.journal import Record, read_journal
from engine.search.latency.limit import latency_row, networks_of
from engine.search.latency.model import looked_up
from engine.search.latency.table import read_table
from engine.search.proxies import read_scores, standing
from engine.space import PROXY
from engine.tasks import DataFacts, ProxyScores, task_from_json
from engine.trial import Architecture, EnvironmentUnusable, Evaluation, Fidelity, Trial, UsageError

Json = dict[str, Any]

# The phases that make up the seconds of an evaluation; `costs` also holds rates and sizes.
PHASES = ("setup", "data", "teacher", "train", "evaluate")


@dataclass(frozen=True)
class Run:
    """The content of a run folder.

    `facts` is run.json. `result` is result.json if it covers the whole journal; a fidelity study has none.
    """

    folder: RunFolder
    kind: RunKind
    config: SearchConfig
    budget: Budget
    record: Record
    facts: Json
    result: Json | None

    @property
    def plan(self) -> Plan:
        """The plan of the search; for a fidelity study, with the low fidelities that it has compared."""
        plan = search_plan(self.config, self.budget)
        if self.kind == "search":
            return plan
        asked = dict.fromkeys(t.fidelity for t in self.record.searched.asked if t.fidelity != plan.high)
        return replace(plan, lows=tuple(asked) or plan.lows, opening=None)

    @property
    def data(self) -> DataFacts:
        """The facts about the data in run.json; EnvironmentUnusable if no worker has seen the data yet."""
        if "data" not in self.facts:
            raise EnvironmentUnusable(
                f"{self.folder.run_file} does not describe the data: the run was stopped before it began; run the same "
                "command again to resume it"
            )
        return task_from_json(DataFacts, self.facts["data"])

    @property
    def finished(self) -> bool:
        """Whether the search has named its winner, or the fidelity study has measured everything that it asked for."""
        if self.kind == "fidelity-study":
            found = _read(self.folder.study_result) or {}
            return bool(found.get("complete")) and found.get("evaluations") == len(self.record.asked)
        return self.result is not None

    @property
    def answers(self) -> list[Evaluation]:
        """All evaluations, in order of arrival."""
        return list(self.record.answers.values())

    @property
    def pending(self) -> list[Trial]:
        """Trials without an evaluation: still running, or cut short by the end of the search."""
        return [trial for trial in self.record.asked if trial.number not in self.record.answers]

    @property
    def asks_surrogate(self) -> bool:
        """Whether a surrogate chooses the architectures that are trained in full."""
        return self.kind == "search" and self.plan.method == "mfkd"

    @cached_property
    def proxies(self) -> dict[Architecture, ProxyScores]:
        """Training-free scores of the candidates that have some."""
        return read_scores(self.folder.proxies)

    @cached_property
    def standing(self) -> dict[Architecture, float]:
        """Where each architecture with training-free scores stands by them, from 0 to 1."""
        return standing(self.proxies)

    @cached_property
    def latencies(self) -> dict[Architecture, tuple[float, bool]]:
        """Milliseconds of the architectures asked for, and whether measured before the search rather than predicted;
        {} if the search knew nothing of latency."""
        asked = list(dict.fromkeys(trial.architecture for trial in self.record.asked))
        if not asked or not needs_latency(self.config) or not self.folder.latencies.exists():
            return {}
        return looked_up(networks_of(self.config, self.data), read_table(self.folder.latencies), asked)

    @property
    def imported(self) -> set[int]:
        """The numbers of trials imported from a fidelity study (--fidelity-study)."""
        asked = zip(self.record.asked, self.record.seen, strict=True)
        return {trial.number for trial, seen in asked if seen < 0} if self.config.fidelity_study else set()

    def at(self, fidelity: Fidelity) -> list[Evaluation]:
        """The successful evaluations at a fidelity."""
        return [e for e in self.answers if e.ok and e.trial.fidelity == fidelity]

    def teacher_card(self) -> Json | None:
        """The card in the teacher's weights file (engine.training.teacher.Card); None if there is no such file."""
        try:
            with safe_open(self.folder.teacher_weights(self.config), "np") as stored:
                card: Json = json.loads(stored.metadata()["card"])
        except (OSError, SafetensorError, KeyError, TypeError, ValueError):
            return None
        return card

    @property
    def final(self) -> Evaluation | None:
        """The last training of the winner, which `export` and `eval` take; None if there is none."""
        if self.result is None or self.kind != "search":
            return None
        name = self.result["winner"]["architecture"]
        return next((e for e in reversed(self.finals) if str(e.trial.architecture) == name), None)

    @property
    def finals(self) -> list[Evaluation]:
        """The successful final trainings."""
        return [e for e in self.answers if e.ok and e.trial.fidelity.with_valid]

    @cached_property
    def trained(self) -> list[FrontMember]:
        """Every network that was trained in full so far, in order of its first training."""
        answers = self.answers
        images = self.data.images["valid"] if answers else 0
        latencies = {architecture: milliseconds for architecture, (milliseconds, _) in self.latencies.items()}
        return trained_in_full(answers, self.plan.high, images, self.folder, latencies)

    @property
    def front_cost(self) -> str:
        """The cost that the front trades accuracy for (engine.search.front.COSTS)."""
        return cost_axis(self.config.objectives)

    @cached_property
    def front(self) -> list[FrontMember]:
        """The networks that no other one trained in full beats in both accuracy and `front_cost`, cheapest first."""
        return front(self.trained, self.front_cost)

    @property
    def best(self) -> Evaluation | None:
        """The winner's training in the search, or the best full-fidelity evaluation so far; None if there is none."""
        full = self.at(self.plan.high)
        if self.result is not None:
            name = self.result["winner"]["architecture"]
            full = [e for e in full if str(e.trial.architecture) == name] or full
        return max(full, key=lambda e: e.accuracy, default=None)


def open_run(name: str) -> Run:
    """The run that a command names: a folder, or a name under runs/.

    Raises UsageError if there is none, EngineError if another version wrote it.
    """
    folder = find_run(name)
    stored = folder.read_config()
    try:
        config, budget = config_from_dict(stored["config"]), Budget(**stored["budget"])
    except (KeyError, TypeError) as error:
        raise UsageError(
            f"{folder.config} was written by another version ({error}); use that version to read it"
        ) from error
    if not folder.journal.is_file():
        raise UsageError(f"{folder} has no {folder.journal.name}, the record of the run; restore it from a copy")
    record = read_journal(folder.journal)
    facts, kind = _read(folder.run_file) or {}, stored.get("kind", "search")
    return Run(folder, kind, config, budget, record, facts, _result(folder, record))


def find_run(name: str) -> RunFolder:
    """The folder of a run; a UsageError lists the runs that exist."""
    for path in (Path(name), Path("runs") / name):
        folder = RunFolder(path.absolute())
        if folder.config.is_file():
            return folder
    known = sorted(path.name for path in Path("runs").glob("*") if RunFolder(path).config.is_file())
    hint = f"runs/ has {', '.join(known)}" if known else "give the folder that search wrote with --run-dir"
    raise UsageError(f"no run named '{name}': not a run folder and not a name under runs/; {hint}")


def with_answers(run: Run) -> Run:
    """The run itself; UsageError if it has no evaluations yet."""
    if not run.record.answers:
        raise UsageError(f"{run.folder} has no evaluations yet; wait for the first one")
    return run


def _result(folder: RunFolder, record: Record) -> Json | None:
    """result.json, unless the search has progressed since it was written."""
    result = _read(folder.result)
    if result is None or sum(result["evaluations"].values()) != len(record.answers):
        return None
    return result


def _read(path: Path) -> Json | None:
    """The content of a JSON file; None if there is none."""
    if not path.is_file():
        return None
    try:
        content: Json = json.loads(path.read_text())
    except ValueError as error:
        raise EnvironmentUnusable(f"cannot read {path} ({error}); restore it from a copy, or remove it") from error
    return content


def rows(run: Run, answers: Iterable[Evaluation]) -> list[Json]:
    """Evaluations as the rows of trials.csv: plain values, one level deep."""
    return [with_known(run, evaluation.trial, row(evaluation)) for evaluation in answers]


def with_known(run: Run, trial: Trial, columns: Json) -> Json:
    """The columns of a trial, and what was known of its architecture before: training-free scores, and its latency
    unless that was measured in the evaluation."""
    latency = run.latencies.get(trial.architecture) if columns.get("latency_ms") is None else None
    return columns | (latency_row(*latency) if latency else {}) | proxy_columns(run, trial)


def proxy_columns(run: Run, trial: Trial) -> Json:
    """The training-free scores of a trial's architecture, and where it stands by them, as columns."""
    known = run.proxies.get(trial.architecture)
    if known is None:
        return {}
    scores = {PROXY + name: value for name, value in known.scores.items()}
    return {"standing": run.standing.get(trial.architecture), **scores}


def row(evaluation: Evaluation) -> Json:
    """What was measured for a trial, as columns."""
    trial = evaluation.trial
    fidelity = trial.fidelity
    return {
        **row_of_trial(trial),
        "status": evaluation.status,
        "accuracy": evaluation.accuracy if evaluation.ok else None,
        "cross_entropy": evaluation.cross_entropy,
        "agreement": evaluation.agreement,
        "macs": evaluation.macs if evaluation.ok else None,
        "params": evaluation.params if evaluation.ok else None,
        "latency_ms": evaluation.costs.get("latency_ms"),
        "latency_source": "measured" if "latency_ms" in evaluation.costs else None,
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
    """The columns that are known before a trial is evaluated."""
    return {
        "number": trial.number,
        "architecture": str(trial.architecture),
        "fidelity": trial.fidelity.name,
        "seed": trial.seed,
        "status": "pending",
    }


def as_csv(rows: Iterable[Json]) -> str:
    """Rows as CSV with a header; missing values are empty."""
    rows = list(rows)
    columns = list(dict.fromkeys(name for one in rows for name in one))
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()
