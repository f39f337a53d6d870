"""The chart of what each worker did when."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

from engine.report.chart import FAILED, FULL, LOW, SOFT, WAIT, Chart, Json, axis, time_unit
from engine.search.runs import Run
from engine.trial import Evaluation, failed

# Where no worker was busy for longer, the search was not running: the axis leaves such a pause out.
PAUSE_S = 300.0


@dataclass(frozen=True)
class Span:
    """One piece of a worker's work, a cohort or one evaluation, on the axis without pauses (seconds)."""

    worker: str
    start: float
    seconds: float
    members: list[Evaluation]


def timeline(run: Run) -> Chart:
    """Busy, waiting and failed time of each worker."""
    title = "What the workers did"
    timed = [e for e in run.answers if e.started > 0]
    if not timed:
        return Chart("timeline", title, "The evaluations of this run do not say when and where they were made.")
    spans, pauses = spans_of(timed)
    workers = sorted({span.worker for span in spans})
    end = max(span.start + span.seconds for span in spans)
    divisor, unit = time_unit(end)
    waiting: Json = {
        "type": "bar",
        "orientation": "h",
        "name": "waiting",
        "y": workers,
        "x": [end / divisor] * len(workers),
        "base": 0,
        "marker": {"color": WAIT},
        "hoverinfo": "skip",
    }
    data = [waiting]
    for name, (colour, members) in _by_status(timed, run).items():
        own = [span for span in spans if span.members[0] in members]
        if own:
            data.append(_bars(own, name, colour, divisor))
    busy = sum(span.seconds for span in spans) / (len(workers) * end)
    cut = f" {pauses} pauses between calls are left out." if pauses else ""
    help = (
        f"A row a worker, a bar a training (low-fidelity ones share theirs with their cohort). "
        f"{len(workers)} workers were busy {100 * busy:.0f} % of the time.{cut}"
    )
    layout = {
        "barmode": "overlay",
        "bargap": 0.25,
        "xaxis": axis(f"{unit} since the first began", showgrid=False),
        "yaxis": {"type": "category", "automargin": True, "showgrid": False, "categoryarray": workers[::-1]},
        "hovermode": "closest",
    }
    return Chart("timeline", title, help, data, layout, wide=True, height=min(900, 150 + 26 * len(workers)))


def spans_of(timed: Sequence[Evaluation]) -> tuple[list[Span], int]:
    """The work of every worker, a cohort as one, and how many pauses were left out of its clock."""
    groups: dict[tuple[str, float, bool], list[Evaluation]] = {}
    for e in timed:
        groups.setdefault((e.worker or "worker", e.started, e.ok), []).append(e)
    raw = [Span(key[0], key[1], sum(e.seconds for e in members), members) for key, members in groups.items()]
    raw.sort(key=lambda span: span.start)
    spans, pauses, shift, busy_until = [], 0, raw[0].start, raw[0].start
    for span in raw:
        if span.start - busy_until > PAUSE_S:
            shift += span.start - busy_until
            pauses += 1
        busy_until = max(busy_until, span.start + span.seconds)
        spans.append(Span(span.worker, span.start - shift, span.seconds, span.members))
    return spans, pauses


def _by_status(answers: Sequence[Evaluation], run: Run) -> dict[str, tuple[str, list[Evaluation]]]:
    """Evaluations in the groups that are coloured: name -> (colour, evaluations)."""
    return {
        "low fidelity": (LOW, [e for e in answers if e.ok and e.trial.fidelity != run.plan.high]),
        "full": (FULL, [e for e in answers if e.ok and e.trial.fidelity == run.plan.high]),
        "failed": (FAILED, [e for e in answers if failed(e.status)]),
        "too slow to train": (SOFT, [e for e in answers if e.status == "too_slow"]),
    }


def _bars(spans: Sequence[Span], name: str, colour: str, divisor: float) -> Json:
    return {
        "type": "bar",
        "orientation": "h",
        "name": name,
        "y": [span.worker for span in spans],
        "x": [span.seconds / divisor for span in spans],
        "base": [span.start / divisor for span in spans],
        "marker": {"color": colour, "line": {"width": 1, "color": "var(--card)"}},
        "text": ["<br>".join(_words(e) for e in span.members[:8]) for span in spans],
        "textposition": "none",
        "hovertemplate": "%{text}<br>%{y}, %{customdata:.1f} s<extra></extra>",
        "customdata": [span.seconds for span in spans],
    }


def _words(evaluation: Evaluation) -> str:
    outcome = f"{100 * evaluation.accuracy:.2f} %" if evaluation.ok else f"{evaluation.status}: {evaluation.error[:80]}"
    outcome = escape(outcome)  # hover texts are read as a kind of HTML
    return f"<b>{evaluation.trial.architecture}</b> {outcome}"
