"""`trials`: the evaluations of a run, filtered and sorted."""

from __future__ import annotations

import fnmatch
import sys
from typing import TYPE_CHECKING, Any, Literal

from jsonargparse import ArgumentParser, Namespace

from engine.commands.flags import add_run_argument, command_parser

if TYPE_CHECKING:
    from engine.search.runs import Run

SHOWN = ("number", "architecture", "fidelity", "seed", "status", "accuracy", "macs", "params", "seconds", "worker")


def parser() -> ArgumentParser:
    """Flags of the command."""
    made = command_parser("List the evaluations of a run, those under way included.")
    add_run_argument(made)
    made.add_argument("--fidelity", type=Literal["all", "low", "high"], default="all", help="only those at a fidelity")
    made.add_argument("--status", type=str, default="all", help="only those: ok, failed, pending, or a status like oom")
    made.add_argument("--arch", type=str, default="*", help="only architectures like this, * for anything: 3-*-1")
    keys = Literal["number", "accuracy", "seconds", "macs", "params"]
    made.add_argument("--sort", type=keys, default="number", help="order: number and costs rise, accuracy falls")
    made.add_argument("--limit", type=int, default=0, help="only the first so many; 0 is all")
    made.add_argument("--csv", action="store_true", help="CSV on stdout, every column of report's trials.csv")
    made.add_argument("--json", action="store_true", help="one JSON object with the same columns")
    return made


def run(values: Namespace) -> dict[str, Any] | None:
    from engine.search.runs import as_csv, open_run

    opened = open_run(values.run)
    rows = chosen(opened, values)
    if values.json:
        return {"run_dir": str(opened.folder), "trials": rows}
    if values.csv:
        sys.stdout.write(as_csv(rows))
        return None
    _print(rows)
    return None


def chosen(run: Run, values: Namespace) -> list[dict[str, Any]]:
    """The rows that the flags ask for, in their order."""
    from engine.search.runs import row, row_of_trial

    rows = [row(e) for e in run.answers] + [row_of_trial(t) for t in run.pending]
    rows = [
        one
        for one in rows
        if values.fidelity in ("all", "high" if one["fidelity"] == run.plan.high.name else "low")
        and _has_status(one["status"], values.status)
        and fnmatch.fnmatchcase(one["architecture"], values.arch)
    ]
    sign = -1 if values.sort == "accuracy" else 1

    def order(one: dict[str, Any]) -> tuple[bool, float]:
        value = one.get(values.sort)
        return value is None, sign * (value or 0)  # what has no value comes last

    rows.sort(key=order)
    return rows[: values.limit or None]


def _has_status(status: str, wanted: str) -> bool:
    from engine.trial import failed

    return wanted in ("all", status) or (wanted == "failed" and failed(status))


def _print(rows: list[dict[str, Any]]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(box=None, pad_edge=False)
    for name in SHOWN:
        text = name in ("architecture", "fidelity", "status", "worker")
        table.add_column(name, justify="left" if text else "right", no_wrap=name == "architecture")
    for one in rows:
        table.add_row(*(_text(name, one.get(name)) for name in SHOWN))
    # What goes into a pipe is not cut to the width of a terminal that is not there.
    Console(highlight=False, markup=False, width=None if sys.stdout.isatty() else 200).print(table)


def _text(name: str, value: Any) -> str:
    if value is None:
        return ""
    if name == "accuracy":
        return f"{value:.4f}"
    if name == "seconds":
        return f"{value:.1f}"
    return f"{value:,}" if name in ("macs", "params") else str(value)
