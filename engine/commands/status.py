"""`status`: the progress of a run on one screen."""

from __future__ import annotations

import os
import time
from collections import Counter
from collections.abc import Collection, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jsonargparse import ArgumentParser, Namespace

from engine.commands.flags import add_run_argument, command_parser

if TYPE_CHECKING:
    from rich.table import Table

    from engine.search.runs import Run
    from engine.tasks import Activity
    from engine.trial import Fidelity

EVERY_S = 2.0
SHOWN = 8  # workers that have a line each
FRONT_ROWS = 8


def parser() -> ArgumentParser:
    """Flags of the command."""
    parser = command_parser(
        "Show how far a run is, its best architecture so far, and failures. The search may still be running."
    )
    add_run_argument(parser)
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of the screen")
    parser.add_argument("--watch", action="store_true", help="refresh the screen every 2 s until the run has finished")
    return parser


def run(values: Namespace) -> dict[str, Any] | None:
    from rich.console import Console
    from rich.live import Live

    from engine.search.runs import open_run
    from engine.trial import UsageError

    if values.json and values.watch:
        raise UsageError("--json prints one object and --watch refreshes a screen: give one of them")
    state = summary(open_run(values.run))
    if values.json:
        return state
    console = Console(highlight=False, markup=False)
    if not values.watch:
        console.print(screen(state))
        return None
    with suppress(KeyboardInterrupt), Live(screen(state), console=console, auto_refresh=False) as live:
        before = state["state"]
        # One that is not running here may be running on another machine; one that was has ended, if only early.
        while state["state"] != "finished" and (before, state["state"]) != ("running", "stopped"):
            time.sleep(EVERY_S)
            before, state = state["state"], summary(open_run(values.run))
            live.update(screen(state), refresh=True)
    return None


LABELS = {"inherited": "inherited weights", "low": "low fidelity", "high": "full", "final": "final"}


def summary(run: Run) -> dict[str, Any]:
    """The state of a run as plain values. `state` is running, finished, or stopped (no search is running on this
    machine); `idle_seconds` counts from the last line of the journal, or of the training-free scores, or the last word
    of a worker. `phase` and `activities` say what its workers are doing (engine.tasks.Activity)."""
    from engine.search.activity import read_activities
    from engine.search.front import member_row
    from engine.search.proxies import seconds
    from engine.tasks import task_to_json
    from engine.trial import failed

    path = run.folder.journal
    best, plan = run.best, run.plan
    opening = evaluation_counts(run, plan.below_full[len(plan.lows) :])
    state = "running" if is_locked(path.stat().st_ino) else "finished" if run.finished else "stopped"
    activities = [] if state == "finished" else read_activities(run.folder)
    written = [*map(modified, (path, run.folder.proxies)), *(activity.at for activity in activities)]
    final = evaluation_counts(run, {t.fidelity for t in run.record.asked if t.fidelity.with_valid})
    return {
        "run_dir": str(run.folder),
        "state": state,
        "phase": phase(run, activities) if state != "finished" else "finished",
        "activities": [task_to_json(activity) for activity in activities],
        "space": run.config.space,
        "data": run.config.data,
        "method": run.config.method if run.kind == "search" else "fidelity study",
        "evaluations": {
            **({"inherited": opening | {"limit": sum(opening.values())}} if any(opening.values()) else {}),
            "low": evaluation_counts(run, plan.lows) | {"limit": plan.max_low * len(plan.lows)},
            "high": evaluation_counts(run, (plan.high,)) | {"limit": plan.max_high},
            **({"final": final | {"limit": sum(final.values())}} if any(final.values()) else {}),
        },
        "proxies": {"candidates": len(run.proxies), "seconds": round(seconds(run.proxies), 1)} if run.proxies else None,
        "statuses": dict(Counter(e.status for e in run.answers)),
        "best": best
        and {
            "architecture": str(best.trial.architecture),
            "valid_accuracy": best.accuracy,
            "macs": best.macs,
            "params": best.params,
        },
        "winner": run.result and run.result["winner"],
        "front_cost": run.front_cost,
        "front": [member_row(member) for member in run.front],
        "final": run.result and run.result.get("final"),
        "verdict": run.result and run.result.get("verdict"),
        "worker_seconds": round(sum(e.seconds for e in run.answers), 1),
        "idle_seconds": round(max(0.0, time.time() - max(written)), 1),
        "last_failure": next((f"{e.status}: {e.error}" for e in reversed(run.answers) if failed(e.status)), None),
    }


def evaluation_counts(run: Run, fidelities: Collection[Fidelity]) -> dict[str, int]:
    """The evaluations at some fidelities, by status."""
    from engine.trial import failed

    statuses = [e.status for e in run.answers if e.trial.fidelity in fidelities]
    return {
        "ok": statuses.count("ok"),
        "failed": sum(map(failed, statuses)),
        "too_slow": statuses.count("too_slow"),
        "pending": sum(trial.fidelity in fidelities for trial in run.pending),
    }


def phase(run: Run, activities: Sequence[Activity]) -> str:
    """What a run is at: the teacher, or the fidelity of most of its open trials. Between those, it is starting, scoring
    candidates without training, or choosing what to train next."""
    phases = [activity.phase for activity in activities] or [trial.fidelity.name for trial in run.pending]
    if phases:
        return Counter(phases).most_common(1)[0][0]
    if run.record.asked:
        return "choosing"
    return "training-free scores" if run.proxies else "starting"


def modified(path: Path) -> float:
    """When a file was last written, in seconds since 1970; 0 if there is none."""
    return path.stat().st_mtime if path.exists() else 0.0


def is_locked(inode: int) -> bool:
    """Whether a process on this machine holds a lock on a file. A search holds one on its journal.

    Trying to take the lock would also tell, but a search that starts at that moment would think that another one runs.
    """
    try:
        locks = Path("/proc/locks").read_text().splitlines()
    except OSError:
        return False
    return any(line.split()[-3].rsplit(":", 1)[-1] == str(inode) for line in locks if "FLOCK" in line)


def screen(state: dict[str, Any]) -> Table:
    """The state, for people."""
    from rich.table import Table

    from engine.search.activity import duration

    lines = Table.grid(padding=(0, 2))
    lines.add_column(no_wrap=True)
    idle = f"last written to {duration(state['idle_seconds'])} ago"
    stopped = "not running on this machine" if state["state"] == "stopped" else state["state"]
    lines.add_row("run", f"{os.path.relpath(state['run_dir'])}: {stopped}, {idle}")
    lines.add_row("search", f"{state['method']} in {state['space']} on {state['data']}")
    if state["state"] != "finished":
        lines.add_row("now", _now(state))
    if state["proxies"]:
        scored = state["proxies"]
        took = duration(scored["seconds"])
        lines.add_row("training-free", f"{scored['candidates']:,} candidates scored, {took} of work")
    for name, label in LABELS.items():
        if name in state["evaluations"]:
            lines.add_row(label, _progress(state["evaluations"][name]))
    best, winner = state["best"], state["winner"]
    if best:
        test = f", test {winner['test_accuracy']:.4f}" if winner else ""
        lines.add_row(
            "winner" if winner else "best so far",
            f"{best['architecture']}\nvalid {best['valid_accuracy']:.4f}{test}, {best['macs'] / 1e6:.2f} million MACs, "
            f"{best['params']:,} parameters",
        )
    if state["final"]:
        lines.add_row("finished", f"test {state['final']['test_accuracy']:.4f} after {state['final']['epochs']} epochs")
    if state["verdict"]:
        lines.add_row("verdict", state["verdict"])
    if state["front"]:
        lines.add_row("front", _front(state["front"], state["front_cost"]))
    lines.add_row("workers", f"{duration(state['worker_seconds'])} of work")
    if state["last_failure"]:
        lines.add_row("last failure", state["last_failure"][:200])
    return lines


def _now(state: dict[str, Any]) -> str:
    """The phase, and a line for each busy worker; of many workers, one for each phase."""
    from engine.search.activity import NAMES, by_phase, sentence
    from engine.tasks import Activity, task_from_json

    activities = [task_from_json(Activity, one) for one in state["activities"]]
    groups = [[one] for one in activities] if len(activities) <= SHOWN else list(by_phase(activities).values())
    lines = [f"{NAMES.get(group[0].phase, group[0].phase)}: {sentence(group)}" for group in groups]
    return "\n".join(lines or [NAMES.get(state["phase"], state["phase"])])


def _front(front: list[dict[str, Any]], cost: str) -> Table:
    """The networks on the front, or of a long one some that are spread over it."""
    from rich.table import Table

    from engine.search.front import COSTS, in_unit

    table = Table.grid(padding=(0, 2))
    shown = sorted({round(place * (len(front) - 1) / (FRONT_ROWS - 1)) for place in range(FRONT_ROWS)})
    for one in (front[place] for place in shown):
        accuracy = f"valid {one['valid_accuracy']:.4f} ± {one['valid_standard_error']:.4f}"
        table.add_row(accuracy, f"{in_unit(one[cost], cost)} {COSTS[cost][0]}", one["architecture"])
    if len(shown) < len(front):
        table.add_row(f"{len(shown)} of {len(front)}; all: trials --front")
    return table


def _progress(counts: dict[str, int]) -> Table:
    from rich.progress_bar import ProgressBar
    from rich.table import Table

    done = counts["ok"] + counts["failed"] + counts["too_slow"]
    more = [f"{counts[kind]} {kind.replace('_', ' ')}" for kind in ("pending", "failed", "too_slow") if counts[kind]]
    line = Table.grid(padding=(0, 2))
    if done > counts["limit"]:  # architectures promoted without a low score get one at the end, for comparison
        text = f"{counts['limit']}, and {done - counts['limit']} for comparison"
    else:
        text = f"{done} of at most {counts['limit']}"
    text += f", {', '.join(more)}" if more else ""
    line.add_row(ProgressBar(max(counts["limit"], 1), done, width=24), text)
    return line
