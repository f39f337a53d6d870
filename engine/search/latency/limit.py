"""The candidates of a search with their latencies, and which of them are fast enough."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from engine.config import SearchConfig, measures_latency, needs_latency
from engine.search.latency.model import PROBES, Latencies, choose_probes, estimate, looked_up
from engine.search.latency.table import BuiltSpace, LatencyTable, check_table, read_table
from engine.search.run_context import RunContext
from engine.space import LATENCY, Candidates
from engine.tasks import DataFacts, LatencyTask, Timings, task_from_json
from engine.trial import Architecture, EnvironmentUnusable, Evaluation, UsageError

Json = dict[str, Any]


def networks_of(config: SearchConfig, facts: DataFacts) -> BuiltSpace:
    """The networks of a run, as built for its full fidelity."""
    resolution = config.high.resolution or facts.resolution
    return BuiltSpace(config.space, len(facts.classes), config.high.width, resolution)


def recorded_table(path: Path, begun: bool, measure: Callable[[], LatencyTable]) -> LatencyTable:
    """The measurements of a run, in the file `path`.

    Once the search has `begun`, its decisions depend on them. Until then each call measures again, as its settings and
    its device may differ from the last. Raises EnvironmentUnusable if a search that has begun has lost its file.
    """
    if not begun:
        measure().write(path)
    elif not path.exists():
        raise EnvironmentUnusable(f"{path} is missing; the candidates depend on it: restore it from a copy")
    return read_table(path)


def new_table(context: RunContext, networks: BuiltSpace, fit: Candidates) -> LatencyTable:
    """What is to be known of the latency of candidates: the table of another device, or measurements made now."""
    config, display = context.config, context.display
    if not measures_latency(config):
        path = Path(config.latency)
        table = read_table(path)
        check_table(table, path, networks, config.latency_batch)
        return table
    probes = choose_probes(networks, fit, PROBES, config.seed)
    display.say(
        f"latency: measuring {len(probes)} architectures in {config.latency} at batch size {config.latency_batch}"
    )
    found = _measured(context, probes)
    if found.warning:
        display.say(f"warning: latency: {found.warning}")
    return LatencyTable(
        milliseconds=dict(zip(map(str, probes), found.milliseconds, strict=True)),
        device=config.latency,
        runtime=f"{found.runtime}, {found.device}",
        noise=found.noise,
        space=networks.spec,
        classes=networks.classes,
        width=networks.width,
        resolution=networks.resolution,
        batch=config.latency_batch,
    )


def fast_enough(
    candidates: Candidates, networks: BuiltSpace, table: LatencyTable, limit: float
) -> tuple[Candidates, str]:
    """The candidates that take at most `limit` milliseconds, with their latencies as a column of `trends`, and a line
    that says how these are known. Raises UsageError if no candidate meets the limit."""
    latencies = estimate(networks, candidates, table)
    keep = latencies.within(limit)
    if not keep.any():
        least = min(table.milliseconds.values())
        raise UsageError(
            f"no architecture takes at most {limit:g} ms on {table.device} (--max-latency-ms): the fastest measured "
            f"takes {least:.3g}, and predictions keep a margin of {100 * (latencies.margin - 1):.0f} %"
        )
    column = {LATENCY + table.device: latencies.milliseconds}
    left = replace(candidates, trends={**candidates.trends, **column}).where(keep)
    return left, f"latency: {_kept(latencies, int(keep.sum()), limit)} ({_source(latencies, table)})"


def _kept(latencies: Latencies, count: int, limit: float) -> str:
    if limit < math.inf:
        return f"{count:,} candidates take at most {limit:g} ms"
    ms = latencies.milliseconds
    return f"{count:,} candidates take {ms.min():.3g} to {ms.max():.3g} ms"


def _source(latencies: Latencies, table: LatencyTable) -> str:
    """How latencies are known."""
    how = f"{len(table.milliseconds)} measured"
    if latencies.model is None:
        return how
    error = latencies.model.accuracy
    return (
        f"{how}, the others predicted with a median error of {100 * error.median:.0f} %, rank correlation "
        f"{error.rank_correlation:.2f}; margin {100 * (error.factor - 1):.0f} %"
    )


def described(context: RunContext, facts: DataFacts, evaluations: Sequence[Evaluation]) -> dict[str, Json]:
    """`latency_ms` of evaluated architectures, by name, and its `latency_source`, which is "measured" or "predicted";
    {} if the run knows nothing of latency. What can be measured here and was not, is measured now."""
    if not needs_latency(context.config):
        return {}
    known = {e.trial.architecture: e.costs["latency_ms"] for e in evaluations if "latency_ms" in e.costs}
    missing = [one for one in dict.fromkeys(e.trial.architecture for e in evaluations) if one not in known]
    if missing and measures_latency(context.config):
        known |= dict(zip(missing, _measured(context, missing).milliseconds, strict=True))
        missing = []
    found = {one: (milliseconds, True) for one, milliseconds in known.items()}
    if missing:
        found |= looked_up(networks_of(context.config, facts), read_table(context.folder.latencies), missing)
    return {str(one): latency_row(*value) for one, value in found.items()}


def latency_row(milliseconds: float, measured: bool) -> Json:
    return {"latency_ms": round(milliseconds, 4), "latency_source": "measured" if measured else "predicted"}


def _measured(context: RunContext, architectures: Sequence[Architecture]) -> Timings:
    return task_from_json(Timings, context.answer(LatencyTask(context.worker, tuple(architectures))))
