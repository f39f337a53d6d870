"""The report's page: facts of the winner first, then the charts, a sentence of reading help under each."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import asdict
from datetime import datetime
from html import escape
from pathlib import Path
from string import Template
from typing import Any

from engine.config import config_to_dict, flatten
from engine.report.chart import Chart, Json
from engine.report.charts import means
from engine.report.drawing import draw
from engine.search.runs import Run
from engine.spaces.load import load_space
from engine.trial import Evaluation, failed

BEST = 10


def page(run: Run, charts: list[Chart], library: str) -> str:
    """The whole HTML text; `library` is the source of plotly.js."""
    best = run.best
    state = "finished" if run.finished else "not finished"
    config = run.config
    method = config.method if run.kind == "search" else "a study of low fidelities"
    return Template(_part("page.html")).substitute(
        title=escape(f"{run.folder.path.name}: search report"),
        name=escape(run.folder.path.name),
        about=escape(f"{method} in {config.space} on {config.data}; {state}"),
        claim="The winner" if run.result else "The best so far",
        architecture=escape(str(best.trial.architecture)) if best else "none yet",
        facts=_pairs(_facts(run, best)),
        drawing=draw(load_space(config.space), best.trial.architecture) if best else "",
        charts="\n".join(map(_figure, charts)),
        best=_table(run),
        settings=_pairs(flatten(config_to_dict(config) | config_to_dict(run.budget))),
        calls=_calls(run),
        footer=f"Written {datetime.now():%-d %B %Y, %H:%M}. Every evaluation is in trials.csv beside this page.",
        # Text of others (errors, paths) is in there: nothing in it may end the script element.
        data=json.dumps([asdict(chart) for chart in charts if chart.data]).replace("<", "\\u003c"),
        style=_part("page.css"),
        script=_part("page.js"),
        library=library,
    )


def _part(name: str) -> str:
    return Path(__file__).with_name(name).read_text()


def _facts(run: Run, best: Evaluation | None) -> Iterable[tuple[str, str]]:
    if best is not None:
        tested = run.result["winner"]["test_accuracy"] if run.result else None
        if tested is not None:
            yield "test accuracy", f"{100 * tested:.2f} %"
        yield "validation accuracy", f"{100 * best.accuracy:.2f} %"
        yield "multiply-accumulates", f"{best.macs / 1e6:.2f} M"
        yield "parameters", f"{best.params / 1e6:.3f} M" if best.params >= 1e5 else f"{best.params:,}"
    low = sum(e.trial.fidelity in run.plan.lows for e in run.answers)
    yield "low-fidelity runs", f"{low}"
    yield "full runs", f"{len(run.answers) - low}"
    for name, count in (
        ("of these failed", sum(failed(e.status) for e in run.answers)),
        ("of these too slow", sum(e.status == "too_slow" for e in run.answers)),
    ):
        if count:
            yield name, f"{count}"
    seconds = sum(e.seconds for e in run.answers)
    yield "time of workers", f"{seconds / 3600:.1f} h" if seconds >= 3600 else f"{seconds / 60:.1f} min"


def _pairs(pairs: Iterable[tuple[str, Any]]) -> str:
    return "".join(f"<div><dt>{escape(str(key))}</dt><dd>{escape(str(value))}</dd></div>" for key, value in pairs)


def _figure(chart: Chart) -> str:
    picture = f'<div class="chart" id="{chart.name}" style="min-height:{chart.height}px"></div>' if chart.data else ""
    return (
        f'<figure class="card{" wide" if chart.wide else ""}"><h2>{escape(chart.title)}</h2>{picture}'
        f"<figcaption>{escape(chart.help)}</figcaption></figure>"
    )


def _table(run: Run) -> str:
    """The best of the full-fidelity evaluations."""
    low = means(run.at(run.plan.lows[0]))
    full = sorted(run.at(run.plan.high), key=lambda e: -e.accuracy)[:BEST]
    rows = []
    for e in full:
        cheap = low.get(e.trial.architecture)
        cells = [
            escape(str(e.trial.architecture)),
            f"{100 * e.accuracy:.2f} %",
            f"{cheap:.2f} %" if cheap is not None else "",
            f"{e.macs / 1e6:.2f}",
            f"{e.params:,}",
            f"{e.trial.seed}",
        ]
        rows.append("".join(f"<td{_extra(i)}>{cell}</td>" for i, cell in enumerate(cells)))
    heads = ("architecture", "full", "low fidelity", "million MACs", "parameters", "seed")
    head = "".join(f"<th{_extra(i)}>{name}</th>" for i, name in enumerate(heads))
    body = "".join(f"<tr>{row}</tr>" for row in rows)
    if not rows:
        return "<p>None yet.</p>"
    best, why = run.best, ""
    if run.result and best and best.trial.architecture != full[0].trial.architecture:
        why = (
            "<p>The winner is not the first of these: the best of several noisy scores is partly luck, so the search "
            "weighs each with what the surrogate makes of all others.</p>"
        )
    return f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>{why}"


def _extra(column: int) -> str:
    """What a narrow screen leaves out."""
    return ' class="extra"' if column == 2 or column >= 4 else ""


def _calls(run: Run) -> str:
    def words(call: Json) -> str:
        versions = ", ".join(f"{name} {number}" for name, number in call["versions"].items() if number)
        return f"{' '.join(call['command'])}\n  Python {call['python']}, {call['device']}; {versions}"

    return f"<pre>{escape(chr(10).join(map(words, run.facts.get('calls', []))))}</pre>"
