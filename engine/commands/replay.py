"""`replay`: search methods on a table of recorded results."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from jsonargparse import ArgumentParser, Namespace

from engine.commands.flags import command_parser
from engine.trial import UsageError

HELP = {
    "table": "CSV of recorded results (docs/surrogate.md has its form; two published ones are read as they are)",
    "method": "methods, joined by commas",
    "low": "low fidelities of the table to offer, joined by commas, the main one first; all by default",
    "workers": "simulated workers",
    "gpu_hours": "worker-hours of each run",
    "at": "worker-hours at which accuracies are printed, joined by commas",
    "seeds": "runs of each method",
    "max_low": "low-fidelity evaluations of a run, at most",
    "min_macs": "leave out architectures with fewer MACs; 0 is no limit",
    "max_macs": "leave out architectures with more MACs",
    "max_params": "leave out architectures with more parameters",
    "noise": "standard deviation of one full run around the recorded one, in points",
    "until_best": "end a run when the best architecture has been trained",
    "processes": "processes that run replays; 0 is one per core",
    "out": "folder for curves.csv, curves.png, summary.json, and finished runs: the same line goes on from them",
}


def parser() -> ArgumentParser:
    """Flags of the command."""
    from engine.search.replay.simulate import Replay

    made = command_parser("Run search methods on a table of recorded results with a simulated clock.")
    defaults: dict[str, Any] = {item.name: item.default for item in dataclasses.fields(Replay)}
    made.add_argument("--table", type=str, required=True, help=HELP["table"])
    made.add_argument("--method", type=str, default=",".join(defaults["methods"]), help=HELP["method"])
    made.add_argument("--low", type=str, default="", help=HELP["low"])
    made.add_argument("--at", type=str, default=",".join(f"{h:g}" for h in defaults["at"]), help=HELP["at"])
    made.add_argument("--out", type=str | None, default=None, help=HELP["out"])
    for name in HELP:
        if name not in defaults or name in ("table", "at", "out"):
            continue
        flag = f"--{name.replace('_', '-')}"
        made.add_argument(flag, type=type(defaults[name]), default=defaults[name], help=HELP[name])
    return made


def run(values: Namespace) -> dict[str, Any]:
    from engine.search.replay.simulate import Replay, replay

    def words(text: str) -> tuple[str, ...]:
        return tuple(word.strip() for word in text.split(",") if word.strip())

    try:
        at = tuple(float(word) for word in words(values.at))
    except ValueError:
        raise UsageError(f"--at {values.at}: write hours joined by commas, like 15,20,60") from None
    given = {name: values[name] for name in vars(values).keys() & {f.name for f in dataclasses.fields(Replay)}}
    given |= {"table": Path(values.table), "methods": words(values.method), "lows": words(values.low), "at": at}
    return replay(Replay(**given | {"out": Path(values.out) if values.out else None}))
