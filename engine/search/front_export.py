"""Exports every member of a run's front, with a table of them. Run again, it exports only what has changed since."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from engine.config import Resources
from engine.run_folder import export_record_of, front_tables_of, write_atomically
from engine.search.comparison import with_error
from engine.search.front import FrontMember, in_unit, member_row
from engine.search.one_architecture import export, exporter, select_evaluation
from engine.search.progress import Display
from engine.search.runs import Run, as_csv
from engine.trial import EngineError, Evaluation, UsageError

Json = dict[str, Any]


def export_front(run: Run, out: Path, resources: Resources, display: Display) -> Json:
    """Exports every member of the front to `out`/ARCHITECTURE, as `export` does, and writes front.csv and front.md.

    A member whose weights have been exported there is skipped. One that cannot be exported does not keep the others
    from it: its error is raised at the end. Raises UsageError if no network has been trained in full.
    """
    if not run.front:
        raise UsageError(f"{run.folder} has no network trained in full yet; wait for the first one")
    if out.exists() and not out.is_dir():
        raise UsageError(f"{out} is a file; give --out a folder")
    chosen = {str(member.architecture): select_evaluation(run, str(member.architecture)) for member in run.front}
    missing = {name: evaluation for name, evaluation in chosen.items() if not is_exported(run, evaluation, out / name)}
    skipped = [name for name in chosen if name not in missing]
    if skipped:
        display.say(f"exported before: {', '.join(skipped)}")
    failures = _export_each(run, missing, out, resources, display) if missing else {}
    members = [member for member in run.front if str(member.architecture) not in failures]
    tables = write_tables(run, members, out) if members else []
    if failures:
        name, error = next(iter(failures.items()))
        raise type(error)(f"{len(failures)} of {len(chosen)} members were not exported to {out}; {name}: {error}")
    return {
        "run_dir": str(run.folder),
        "folder": str(out),
        "tables": list(map(str, tables)),
        "exported": list(missing),
        "skipped": skipped,
    }


def _export_each(
    run: Run, chosen: dict[str, Evaluation], out: Path, resources: Resources, display: Display
) -> dict[str, EngineError]:
    """Exports networks one after the other by the same worker; returns the errors, by architecture."""
    failures: dict[str, EngineError] = {}
    with exporter(run, resources) as fleet:
        for name, evaluation in chosen.items():
            try:
                export(run, evaluation, out / name, fleet, display)
            except EngineError as error:
                display.say(f"{name} was not exported: {error}")
                failures[name] = error
    return failures


def is_exported(run: Run, evaluation: Evaluation, folder: Path) -> bool:
    """Whether a folder holds a complete export of just these weights."""
    record, weights = read_record(folder), run.folder.weights(evaluation.trial)
    if record is None or not weights.is_file() or not all((folder / name).is_file() for name in record["files"]):
        return False
    return bool(record["weights_sha256"] == hashlib.sha256(weights.read_bytes()).hexdigest())


def read_record(folder: Path) -> Json | None:
    """What an export has recorded of itself; None if there is no whole record."""
    try:
        record: Json = json.loads(export_record_of(folder).read_text())
    except (OSError, ValueError):
        return None
    return record if {"files", "weights_sha256", "latency_ms"} <= record.keys() else None


def write_tables(run: Run, members: Sequence[FrontMember], out: Path) -> tuple[Path, Path]:
    """Writes the members of the front as CSV, one column per fact, and as Markdown."""
    records = {member.architecture: read_record(out / str(member.architecture)) or {} for member in members}
    rows = []
    for member in members:
        here = {f"{name} (ms)": ms for name, ms in records[member.architecture].get("latency_ms", {}).items()}
        row = member_row(member) | {"seeds": " ".join(map(str, member.seeds))}
        rows.append({"folder": str(member.architecture)} | row | here)
    as_table, as_text = front_tables_of(out)
    write_atomically(as_table, as_csv(rows))
    write_atomically(as_text, markdown(run, members))
    return as_table, as_text


def markdown(run: Run, members: Sequence[FrontMember]) -> str:
    """The front as a page: a table that links the model cards, and how to read it."""
    less = {"macs": "fewer MACs", "params": "fewer parameters", "latency_ms": "a lower latency"}[run.front_cost]
    winner = run.best.trial.architecture if run.result and run.best else None
    heads = ["network", "validation, %", "test, %", "million MACs", "parameters"]
    timed = any(member.latency_ms is not None for member in members)
    heads += ["ms"] * timed + ["trained for", "not clearly better than"]
    lines = [f"# The front of {run.folder.path.name}\n"]
    lines.append(
        f"Networks of `{run.config.space}` on `{run.config.data}`. Of those that the run trained in full, no other one "
        f"has both a higher validation accuracy and {less}. Each has a folder here, with its model card.\n"
    )
    lines += [f"| {' | '.join(heads)} |", f"|{' --- |' * len(heads)}"]
    for member in members:
        lines.append(f"| {' | '.join(_cells(member, winner == member.architecture, timed))} |")
    lines.append(
        f"\nEach \N{PLUS-MINUS SIGN} is one standard error. Validation accuracies are those of the search, "
        f"on {members[0].valid_images:,} images; the best of several is partly luck. The test accuracy is that of the "
        "weights in the folder where these come from a final training, on training and validation images together. The "
        "last column names the cheapest network whose validation accuracy is not lower by more than two standard "
        "errors of the difference.\n"
    )
    return "\n".join(lines)


def _cells(member: FrontMember, won: bool, timed: bool) -> list[str]:
    name = str(member.architecture)
    test, epochs = "", f"{member.epochs} epochs"
    if member.test_accuracy is not None and member.test_standard_error is not None:
        test = with_error(member.test_accuracy, member.test_standard_error, 2)
        epochs += f"; {member.final_epochs} in its final training"
    time = [] if not timed else ["" if member.latency_ms is None else in_unit(member.latency_ms, "latency_ms")]
    return [
        f"[`{name}`]({name}/README.md)" + (" (winner)" if won else ""),
        with_error(member.valid_accuracy, member.valid_standard_error, 2),
        test,
        in_unit(member.macs, "macs"),
        f"{member.params:,}",
        *time,
        epochs,
        f"`{member.within_error_of}`" if member.within_error_of else "",
    ]
