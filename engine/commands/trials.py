"""`trials`: lists the evaluations of a run, filtered and sorted."""

from __future__ import annotations

import fnmatch
import sys
from typing import TYPE_CHECKING, Any, Literal

from jsonargparse import ArgumentParser, Namespace

from engine.commands.flags import add_run_argument, command_parser
from engine.config import final_fidelity
from engine.trial import Status, UsageError, failed

if TYPE_CHECKING:
    from engine.search.runs import Run

MEASURED = ("number", "architecture", "fidelity", "seed", "status", "accuracy", "macs", "params")
SHOWN = (*MEASURED, "latency_ms", "latency_source", "standing", "seconds", "worker")
COSTS = ("macs", "params", "latency_ms")
FRONT_SHOWN: tuple[str, ...] = ("architecture", "valid_accuracy", "valid_standard_error", "test_accuracy", *COSTS)
FRONT_SHOWN += ("epochs", "seeds", "valid_images", "within_error_of")
# Columns that are shown if a row has a value.
SOMETIMES = ("standing", "test_accuracy", "latency_ms", "latency_source", "within_error_of")


def parser() -> ArgumentParser:
    """Flags of the command."""
    parser = command_parser("List the evaluations of a run, including those still running.")
    add_run_argument(parser)
    names = Literal["all", "low", "high", "final"]
    parser.add_argument("--fidelity", type=names, default="all", help="only this fidelity")
    parser.add_argument(
        "--status",
        type=Literal["all", "failed", "pending", Status],
        default="all",
        metavar="STATUS",
        help="only evaluations that are ok, pending, failed, or failed in one way (diverged, oom, error, crashed, "
        "lost, timeout), or too_slow",
    )
    parser.add_argument("--arch", type=str, default="*", help="only architectures that match this pattern, like 3-*-1")
    parser.add_argument(
        "--front",
        action="store_true",
        help="instead, list the networks on the front: those that no other one trained in full beats in both accuracy "
        "and cost, the cheapest first",
    )
    keys = Literal["number", "accuracy", "standing", "seconds", "macs", "params", "latency_ms"]
    parser.add_argument(
        "--sort",
        type=keys,
        default="number",
        help="sort by this column: accuracy and standing (by training-free scores) from the highest, others from the "
        "lowest",
    )
    parser.add_argument("--limit", type=int, default=0, help="at most this many rows; 0 means all")
    parser.add_argument("--csv", action="store_true", help="print CSV with every column of the report's trials.csv")
    parser.add_argument("--json", action="store_true", help="print one JSON object with the same columns")
    return parser


def run(values: Namespace) -> dict[str, Any] | None:
    from engine.search.runs import as_csv, open_run

    if values.limit < 0:
        raise UsageError(f"--limit is {values.limit}; give a number of rows, or 0 for all")
    opened = open_run(values.run)
    rows = front_rows(opened, values) if values.front else select_rows(opened, values)
    if values.json:
        return {"run_dir": str(opened.folder), "front" if values.front else "trials": rows}
    if values.csv:
        sys.stdout.write(as_csv(rows))
        return None
    shown = FRONT_SHOWN if values.front else SHOWN
    _print(rows, [name for name in shown if name not in SOMETIMES or any(one.get(name) is not None for one in rows)])
    return None


def front_rows(run: Run, values: Namespace) -> list[dict[str, Any]]:
    """The networks on the front, the cheapest first. UsageError for flags that select or order evaluations."""
    from engine.search.front import member_row

    if (values.fidelity, values.status, values.sort) != ("all", "all", "number"):
        raise UsageError("--front lists networks in the order of their cost: leave --fidelity, --status and --sort out")
    rows = [member_row(member) for member in run.front if fnmatch.fnmatchcase(str(member.architecture), values.arch)]
    return [one | {"seeds": " ".join(map(str, one["seeds"]))} for one in rows[: values.limit or None]]


def select_rows(run: Run, values: Namespace) -> list[dict[str, Any]]:
    """The rows that the flags select, in the order they ask for."""
    from engine.search.runs import row_of_trial, rows, with_known

    own = (run.plan.high.name, final_fidelity(run.config).name)  # those of a fidelity study have names like kd@1/9x20
    pending = [with_known(run, trial, row_of_trial(trial)) for trial in run.pending]
    found = [
        one
        for one in rows(run, run.answers) + pending
        if values.fidelity in ("all", one["fidelity"] if one["fidelity"] in own else "low")
        and _has_status(one["status"], values.status)
        and fnmatch.fnmatchcase(one["architecture"], values.arch)
    ]
    sign = -1 if values.sort in ("accuracy", "standing") else 1

    def order(one: dict[str, Any]) -> tuple[bool, float]:
        value = one.get(values.sort)
        return value is None, sign * (value or 0)  # rows without a value come last

    return sorted(found, key=order)[: values.limit or None]


def _has_status(status: str, wanted: str) -> bool:
    return wanted in ("all", status) or (wanted == "failed" and failed(status))


def _print(rows: list[dict[str, Any]], shown: list[str]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(box=None, pad_edge=False)
    for name in shown:
        text = name in ("architecture", "fidelity", "status", "worker", "latency_source", "within_error_of")
        heading = name.replace("_", " ") if name in FRONT_SHOWN else name
        table.add_column(heading, justify="left" if text else "right", no_wrap=name == "architecture")
    for one in rows:
        table.add_row(*(_text(name, one.get(name)) for name in shown))
    # Output to a pipe is not cut to the width of a terminal.
    Console(highlight=False, markup=False, width=None if sys.stdout.isatty() else 200).print(table)


def _text(name: str, value: Any) -> str:
    if value is None:
        return ""
    if name.endswith(("accuracy", "error")):
        return f"{value:.4f}"
    if name in ("standing", "latency_ms"):
        return f"{value:.2f}"
    if name == "seconds":
        return f"{value:.1f}"
    return f"{value:,}" if name in ("macs", "params", "valid_images") else str(value)
