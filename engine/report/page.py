"""The report's page: the winner first, then the charts with a caption under each."""

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
from engine.report import final_trainings, front_section
from engine.report.accuracy_charts import mean_percent
from engine.report.architecture_drawing import draw
from engine.report.chart import Chart, Json
from engine.search.runs import Run
from engine.spaces.load import load_space
from engine.trial import Evaluation, failed

TABLE_ROWS = 10
NARROW = {0, 1, 3}  # columns of the table that a narrow screen shows


def page(run: Run, charts: list[Chart], library: str) -> str:
    """The HTML text of the page; `library` is the source of plotly.js."""
    best = run.best
    state = "finished" if run.finished else "not finished"
    config = run.config
    method = config.method if run.kind == "search" else "fidelity study"
    return Template(_asset("page.html")).substitute(
        title=escape(f"{run.folder.path.name}: search report"),
        name=escape(run.folder.path.name),
        about=escape("; ".join((f"{method} in {config.space} on {config.data}", state, *_warnings(run)))),
        claim="Winner" if run.result else "Best so far",
        architecture=escape(str(best.trial.architecture)) if best else "none yet",
        facts=_pairs(_facts(run, best)),
        drawing=draw(load_space(config.space), best.trial.architecture) if best else "",
        charts="\n".join(_figure(run, chart) for chart in charts),
        final=_final(run),
        best=_table(run),
        settings=_pairs(_settings(run)),
        calls=_commands(run),
        footer=f"Written on {datetime.now():%-d %B %Y at %H:%M}. trials.csv, beside this page, holds every evaluation.",
        data=_embedded([asdict(chart) for chart in charts if chart.data]),
        front=_embedded(front_section.front_data(run)),
        style=_asset("page.css"),
        script=_asset("front.js") + _asset("page.js"),
        library=library,
    )


def _embedded(values: Any) -> str:
    """JSON for a script element: text from elsewhere in it (errors, paths) cannot end the element."""
    return json.dumps(values).replace("<", "\\u003c")


def _asset(name: str) -> str:
    return Path(__file__).with_name(name).read_text()


def _facts(run: Run, best: Evaluation | None) -> Iterable[tuple[str, str]]:
    if best is not None:
        result = run.result or {"winner": {}}
        if result.get("final"):
            yield "test accuracy, finished", _percent(result["final"], "test")
        if "test_accuracy" in result["winner"]:
            yield "test accuracy" + (", as searched" if result.get("final") else ""), _percent(result["winner"], "test")
        searched = {"valid_standard_error": None, **result["winner"], "valid_accuracy": best.accuracy}
        yield "validation accuracy", _percent(searched, "valid")
        yield "multiply-accumulates", f"{best.macs / 1e6:.2f} M"
        yield "parameters", f"{best.params / 1e6:.3f} M" if best.params >= 1e5 else f"{best.params:,}"
    low = sum(e.trial.fidelity in run.plan.lows for e in run.answers)
    high = sum(e.trial.fidelity == run.plan.high for e in run.answers)
    final = sum(e.trial.fidelity.with_valid for e in run.answers)
    if run.plan.opening is not None:
        opened = sum(e.trial.fidelity == run.plan.opening for e in run.answers)
        yield "scored with inherited weights", f"{opened}"
    yield "low-fidelity evaluations", f"{low}"
    yield "full evaluations", f"{high}"
    if final:
        yield "final trainings", f"{final}"
    for name, count in (
        ("of these failed", sum(failed(e.status) for e in run.answers)),
        ("of these too slow", sum(e.status == "too_slow" for e in run.answers)),
    ):
        if count:
            yield name, f"{count}"
    seconds = sum(e.seconds for e in run.answers)
    yield "worker time", f"{seconds / 3600:.1f} h" if seconds >= 3600 else f"{seconds / 60:.1f} min"


def _warnings(run: Run) -> Iterable[str]:
    return [f"warning: {warning}" for warning in run.data.warnings] if "data" in run.facts else []


def _settings(run: Run) -> Iterable[tuple[str, Any]]:
    """What the run was asked to do, and the images that it found."""
    if "data" in run.facts:
        yield "images", "; ".join((run.data.summary, *run.data.warnings))
    yield from flatten(config_to_dict(run.config) | config_to_dict(run.budget))


def _percent(row: Json, split: str) -> str:
    """An accuracy with its standard error, which results of earlier versions lack."""
    error = row.get(f"{split}_standard_error")
    around = f" \N{PLUS-MINUS SIGN} {100 * error:.1f}" if error is not None else ""
    return f"{100 * row[f'{split}_accuracy']:.2f}{around} %"


def _pairs(pairs: Iterable[tuple[str, Any]]) -> str:
    return "".join(f"<div><dt>{escape(str(key))}</dt><dd>{escape(str(value))}</dd></div>" for key, value in pairs)


def _figure(run: Run, chart: Chart) -> str:
    if chart.data and chart.name == front_section.NAME:
        return front_section.figure(run, chart)
    picture = f'<div class="chart" id="{chart.name}" style="min-height:{chart.height}px"></div>' if chart.data else ""
    return (
        f'<figure class="card{" wide" if chart.wide else ""}"><h2>{escape(chart.title)}</h2>{picture}'
        f"<figcaption>{escape(chart.caption)}</figcaption></figure>"
    )


def _final(run: Run) -> str:
    """The section on the finished winner and its baselines; "" if the search has not come to it."""
    content = final_trainings.table(run)
    return f'<section class="card wide"><h2>Was the search worth it?</h2>{content}</section>' if content else ""


def _table(run: Run) -> str:
    """The best full-fidelity evaluations."""
    low = mean_percent(run.at(run.plan.lows[0]))
    full = sorted(run.at(run.plan.high), key=lambda e: -e.accuracy)[:TABLE_ROWS]
    rows = []
    for e in full:
        low_mean = low.get(e.trial.architecture)
        cells = [
            escape(str(e.trial.architecture)),
            f"{100 * e.accuracy:.2f} %",
            f"{low_mean:.2f} %" if low_mean is not None else "",
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
    return f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"


def _extra(column: int) -> str:
    """The class of columns that a narrow screen leaves out."""
    return "" if column in NARROW else ' class="extra"'


def _commands(run: Run) -> str:
    def lines(call: Json) -> str:
        versions = ", ".join(f"{name} {number}" for name, number in call["versions"].items() if number)
        return f"{' '.join(call['command'])}\n  Python {call['python']}, {call['device']}; {versions}"

    return f"<pre>{escape(chr(10).join(map(lines, run.facts.get('calls', []))))}</pre>"
