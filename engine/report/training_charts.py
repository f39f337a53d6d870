"""The charts of training: what each worker did when, where the time went, and how the teacher learned."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape

from engine.config import is_full
from engine.report.accuracy_charts import own_teacher_seconds
from engine.report.chart import BEST, FAILED, FULL, LOW, SOFT, WAIT, Chart, Json, axis, line, percent, time_unit
from engine.search.runs import PHASES, Run
from engine.trial import Evaluation, Fidelity, failed

# If no worker was busy for longer than this, the search was not running; the time axis leaves such pauses out.
PAUSE_S = 300.0
PHASE_COLOURS = {
    "setup": "var(--phase-1)",
    "data": "var(--phase-2)",
    "teacher": "var(--phase-3)",
    "train": "var(--phase-4)",
    "evaluate": "var(--phase-5)",
    "other": "var(--wait)",
}


@dataclass(frozen=True)
class Span:
    """One piece of a worker's work, a cohort or a single evaluation, on the axis without pauses (in seconds)."""

    worker: str
    start: float
    seconds: float
    members: list[Evaluation]


def timeline(run: Run) -> Chart:
    """Busy, waiting and failed time of each worker."""
    title = "Worker timeline"
    timed = [e for e in run.answers if e.started > 0]
    if not timed:
        return Chart("timeline", title, "The evaluations of this run have no start times.")
    spans, pauses = spans_of(timed)
    workers = sorted({span.worker for span in spans})
    end = max(span.start + span.seconds for span in spans)
    divisor, unit = time_unit(end)
    data = [_waiting(workers, end / divisor)]
    for name, (colour, members) in _by_status(timed, run).items():
        own = [span for span in spans if span.members[0] in members]
        if own:
            data.append(_bars(own, name, colour, divisor))
    busy = sum(span.seconds for span in spans) / (len(workers) * end)
    cut = f" Pauses between calls ({pauses}) are left out." if pauses else ""
    caption = (
        "One row per worker, one bar per training; the low-fidelity trainings of a cohort share a bar. "
        f"{len(workers)} workers were busy {100 * busy:.0f} % of the time.{cut}"
    )
    layout = {
        "barmode": "overlay",
        "bargap": 0.25,
        "xaxis": axis(f"{unit} since the first training began", showgrid=False),
        "yaxis": {"type": "category", "automargin": True, "showgrid": False, "categoryarray": workers[::-1]},
        "hovermode": "closest",
    }
    return Chart("timeline", title, caption, data, layout, wide=True, height=min(900, 150 + 26 * len(workers)))


def spans_of(timed: Sequence[Evaluation]) -> tuple[list[Span], int]:
    """The work of every worker, each cohort as one span, and the number of pauses left out."""
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
    """Evaluations grouped by how they are coloured: name -> (colour, evaluations)."""
    return {
        "low fidelity": (LOW, [e for e in answers if e.ok and not is_full(run.config, e.trial.fidelity)]),
        "full": (FULL, [e for e in answers if e.ok and e.trial.fidelity == run.plan.high]),
        "final": (BEST, [e for e in answers if e.ok and e.trial.fidelity.with_valid]),
        "failed": (FAILED, [e for e in answers if failed(e.status)]),
        "too slow": (SOFT, [e for e in answers if e.status == "too_slow"]),
    }


def _waiting(workers: list[str], end: float) -> Json:
    """A bar over the whole time of each worker, behind the bars of its work."""
    return {
        "type": "bar",
        "orientation": "h",
        "name": "waiting",
        "y": workers,
        "x": [end] * len(workers),
        "base": 0,
        "marker": {"color": WAIT},
        "hoverinfo": "skip",
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
        "text": ["<br>".join(_outcome(e) for e in span.members[:8]) for span in spans],
        "textposition": "none",
        "hovertemplate": "%{text}<br>%{y}, %{customdata:.1f} s<extra></extra>",
        "customdata": [span.seconds for span in spans],
    }


def _outcome(evaluation: Evaluation) -> str:
    """An architecture and its accuracy or failure, for a hover text."""
    outcome = f"{100 * evaluation.accuracy:.2f} %" if evaluation.ok else f"{evaluation.status}: {evaluation.error[:80]}"
    return f"<b>{evaluation.trial.architecture}</b> {escape(outcome)}"  # plotly reads hover texts as a kind of HTML


def cost_by_phase(run: Run) -> Chart:
    """Worker time by phase."""
    totals = seconds_by_phase(run)
    divisor, unit = time_unit(max(sum(phases.values()) for phases in totals.values()))
    names = list(totals)[::-1]
    data: list[Json] = [
        {
            "type": "bar",
            "orientation": "h",
            "name": phase,
            "y": names,
            "x": [totals[name].get(phase, 0.0) / divisor for name in names],
            "marker": {"color": colour},
            "hovertemplate": "%{y}, %{fullData.name}: %{x:.3g} " + unit + "<extra></extra>",
        }
        for phase, colour in PHASE_COLOURS.items()
    ]
    whole = sum(sum(phases.values()) for phases in totals.values())
    shares = [f"{name} {100 * sum(phases.values()) / max(whole, 1e-9):.0f} %" for name, phases in totals.items()]
    caption = (
        f"Worker time by phase: {', '.join(shares)}. In the bars of students, teacher means its forward passes. "
        "A GPU runs behind its host, so only the total of a bar is exact there."
    )
    layout = {"barmode": "stack", "xaxis": axis(unit), "yaxis": {"automargin": True, "showgrid": False}}
    return Chart("cost", "Where the time went", caption, data, layout, height=300)


def seconds_by_phase(run: Run) -> dict[str, dict[str, float]]:
    """Seconds of each phase for low-fidelity, full and final trainings and the run's own teacher."""
    groups: dict[str, Callable[[Fidelity], bool]] = {
        "low fidelity": lambda fidelity: fidelity in run.plan.lows,
        "full": lambda fidelity: fidelity == run.plan.high,
        "final": lambda fidelity: fidelity.with_valid,
    }
    totals: dict[str, dict[str, float]] = {}
    for name, belongs in groups.items():
        answers = [e for e in run.answers if belongs(e.trial.fidelity)]
        if name == "final" and not answers:
            continue
        phases = {phase: sum(e.costs.get(phase, 0.0) for e in answers) for phase in PHASES}
        phases["other"] = max(0.0, sum(e.seconds for e in answers) - sum(phases.values()))
        totals[name] = phases
    teacher_seconds = own_teacher_seconds(run)
    return totals | ({"teacher": {"train": teacher_seconds}} if teacher_seconds else {})


def teacher(run: Run) -> Chart:
    """The teacher's training loss by epoch."""
    title = "Teacher"
    if run.config.low.kd_loss == "none" and run.config.high.kd_loss == "none":
        return Chart("teacher", title, "This run does not distil from a teacher.")
    card = run.teacher_card()
    if card is None:
        return Chart("teacher", title, "The teacher's weights file is missing.")
    about = f"{card['network']}, validation accuracy {percent(card['accuracy']):.2f} %"
    losses = card.get("losses", [])
    if not losses:
        return Chart("teacher", title, f"{about}. It was trained elsewhere: its file holds no training curve.")
    hover = "epoch %{x}<br>mean loss %{y:.4f}<extra></extra>"
    x = list(range(1, len(losses) + 1))
    data = [line(x, losses, "loss", FULL, mode="lines+markers", hoverinfo=None, hovertemplate=hover)]
    layout = {
        "xaxis": axis("epoch", tick0=1, dtick=math.ceil(len(losses) / 12)),
        "yaxis": axis("mean training loss", rangemode="tozero"),
        "showlegend": False,
    }
    caption = (
        f"{about}. Mean cross entropy of each epoch, on the augmented training images. Students learn from the weights "
        "of the last epoch."
    )
    return Chart("teacher", title, caption, data, layout)
