"""`replay`: search methods on a table of recorded results."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from jsonargparse import ArgumentParser, Namespace

from engine.commands.flags import command_parser
from engine.trial import UsageError

HELP = {
    "table": "CSV of recorded results (format: docs/search.md; some published tables are read as they are)",
    "join": "comma-separated CSV files of training-free scores or latencies of the table's architectures",
    "methods": "comma-separated methods; all means every one that can search for these objectives",
    "caps": "compare under caps on MACs, or on COST with COST=...: comma-separated shares of the architectures, 1 for "
    "none; prints regrets at a grid of worker-hours, in place of --gpu-hours and --at",
    "maxima": "maximum of any cost in the table (macs, params, DEVICE_latency); repeat the flag for others",
    "objectives": "accuracy, or accuracy,COST to replay the search for a front: the figures are then hypervolumes, the "
    "accuracy within a budget averaged over all budgets",
    "lows": "comma-separated low fidelities of the table that methods may use, the main one first; by default, all",
    "workers": "simulated workers",
    "gpu_hours": "worker-hours per run",
    "at": "comma-separated worker-hours at which to print accuracies",
    "seeds": "runs per method",
    "max_low": "maximum number of low-fidelity evaluations per run",
    "min_macs": "minimum MACs of a candidate; 0 means no limit",
    "max_macs": "maximum MACs of a candidate",
    "max_params": "maximum number of parameters of a candidate",
    "noise": "standard deviation of a full training around its recorded accuracy, in percentage points",
    "until_best": "end a run once the best architecture has been trained",
    "processes": "processes that run replays; 0 means one per core",
    "out": "folder for curves.csv, curves.png, summary.json and finished runs, from which the same command resumes; "
    "with --caps a folder for each cap, and regret.csv",
}
EXAMPLES = {"--at": "15,20,60", "--caps": "0.33,0.6,1 or edgegpu_latency=0.1,0.25", "--max": "edgegpu_latency=4"}


def parser() -> ArgumentParser:
    """Flags of the command."""
    from engine.search.replay.simulate import Replay

    parser = command_parser("Run search methods on a table of recorded results, with a simulated clock.")
    defaults: dict[str, Any] = {item.name: item.default for item in dataclasses.fields(Replay)}
    parser.add_argument("--table", type=str, required=True, help=HELP["table"])
    parser.add_argument("--join", type=str, default="", help=HELP["join"])
    parser.add_argument("--methods", type=str, default=",".join(defaults["methods"]), help=HELP["methods"])
    parser.add_argument("--caps", type=str, default="", help=HELP["caps"])
    most: dict[str, Any] = {"action": "append", "type": str, "default": [], "metavar": "COST=X"}
    parser.add_argument("--max", dest="maxima", help=HELP["maxima"], **most)
    parser.add_argument("--objectives", type=str, default="accuracy", help=HELP["objectives"])
    parser.add_argument("--lows", type=str, default="", help=HELP["lows"])
    parser.add_argument("--at", type=str, default=",".join(f"{h:g}" for h in defaults["at"]), help=HELP["at"])
    parser.add_argument("--out", type=str | None, default=None, help=HELP["out"])
    for name in HELP:
        if name not in defaults or name in ("table", "join", "methods", "lows", "at", "out", "maxima", "objectives"):
            continue
        flag = f"--{name.replace('_', '-')}"
        parser.add_argument(flag, type=type(defaults[name]), default=defaults[name], help=HELP[name])
    return parser


def run(values: Namespace) -> dict[str, Any]:
    from engine.search.replay.compare import all_methods, compare
    from engine.search.replay.replay import replay
    from engine.search.replay.simulate import Replay, load_table

    given = {name: values[name] for name in vars(values).keys() & {f.name for f in dataclasses.fields(Replay)}}
    given |= {"table": Path(values.table), "join": tuple(map(Path, _words(values.join)))}
    given |= {"methods": _words(values.methods), "lows": _words(values.lows), "at": _numbers("--at", values.at)}
    given |= {"objectives": _words(values.objectives), "maxima": tuple(map(_maximum, values.maxima or ()))}
    settings = Replay(**given | {"out": Path(values.out) if values.out else None})
    if settings.methods == ("all",):
        settings = dataclasses.replace(settings, methods=all_methods(load_table(settings), bool(settings.cost)))
    if not values.caps:
        return replay(settings)
    cost, _, shares = values.caps.rpartition("=")
    return compare(settings, _numbers("--caps", shares), cost or "macs")


def _maximum(text: str) -> tuple[str, float]:
    """A cost and its limit, as written COST=NUMBER."""
    name, _, number = text.partition("=")
    try:
        return name.strip(), float(number)
    except ValueError:
        raise UsageError(f"--max {text}: write COST=NUMBER, like {EXAMPLES['--max']}") from None


def _words(text: str) -> tuple[str, ...]:
    return tuple(word.strip() for word in text.split(",") if word.strip())


def _numbers(flag: str, text: str) -> tuple[float, ...]:
    try:
        return tuple(float(word) for word in _words(text))
    except ValueError:
        raise UsageError(f"{flag} {text}: write comma-separated numbers, like {EXAMPLES[flag]}") from None
