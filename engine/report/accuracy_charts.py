"""The charts of measured accuracies: against time, and between fidelities. Pure functions of the run."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import accumulate

import numpy as np
import numpy.typing as npt

from engine.report.chart import (
    BEST,
    FULL,
    LOW,
    MIN_PAIRS,
    Chart,
    Json,
    axis,
    coloured_by,
    label,
    line,
    percent,
    points,
    time_unit,
)
from engine.search.runs import Run
from engine.trial import Architecture, Evaluation, mean_accuracies
from surrogate.quality import bootstrap_interval, kendall_tau, partial_tau

Array = npt.NDArray[np.float64]
NONE_YET = "No full-fidelity evaluation has succeeded yet."


def incumbent(run: Run) -> Chart:
    """Best full accuracy so far against worker time."""
    title = "Best accuracy so far against cost"
    full = run.at(run.plan.high)
    if not full:
        return Chart("incumbent", title, NONE_YET)
    before = own_teacher_seconds(run)
    spent = [before + s for s in accumulate(e.seconds for e in run.answers)]
    divisor, unit = time_unit(spent[-1])
    when = {e.trial.number: s / divisor for e, s in zip(run.answers, spent, strict=True)}

    best = list(accumulate((percent(e.accuracy) for e in full), max))
    x = [when[e.trial.number] for e in full]
    step = line([*x, spent[-1] / divisor], [*best, best[-1]], "best so far", BEST, line={"shape": "hv"})
    low = [e for e in run.answers if e.ok and e.trial.fidelity in run.plan.lows]
    caption = (
        "Each dot is an evaluation, placed at the time that all workers together had spent when it finished"
        + (" (training the teacher included)" if before else "")
        + ". Low-fidelity accuracies, in the lower panel, come from short trainings: only their order matters."
    )
    data = [step, _dots(run, full, when, (unit, "full", FULL))]
    layout = {
        "xaxis": axis(f"{unit} of worker time", rangemode="tozero", anchor="y2" if low else "y"),
        "yaxis": axis("full, %", domain=[0.36 if low else 0, 1]),
        "yaxis2": axis("low fidelity, %", domain=[0, 0.28]),
    }
    if low:
        data.append(_dots(run, low, when, (unit, "low fidelity", LOW)) | {"yaxis": "y2"})
    return Chart("incumbent", title, caption, data, layout, wide=True, height=440)


def _dots(run: Run, answers: Sequence[Evaluation], when: dict[int, float], style: tuple[str, str, str]) -> Json:
    """Evaluations at the times `when` they finished, by trial number; `style` is the unit, the name and the colour."""
    unit, name, colour = style
    hover = "%{text}<br>" + name + ": %{y:.2f} %<br>after %{x:.3g} " + unit + "<extra></extra>"
    x = [when[e.trial.number] for e in answers]
    y = [percent(e.accuracy) for e in answers]
    size = {"size": 7 if colour == LOW else 9}
    about = [label(run, e.trial.architecture) for e in answers]
    return points(x, y, about, name, colour, hovertemplate=hover, marker=size)


def own_teacher_seconds(run: Run) -> float:
    """Seconds that training this run's own teacher took; 0 if it has none."""
    card = run.teacher_card() if run.config.teacher == "auto" else None
    return float(card["seconds"]) if card else 0.0


def mean_percent(answers: Sequence[Evaluation]) -> dict[Architecture, float]:
    """Mean accuracy of each architecture, in percent."""
    return {architecture: percent(mean) for architecture, mean in mean_accuracies(answers).items()}


def low_against_full(run: Run) -> Chart:
    """Whether the low fidelity ranks as the full one does, and better than size alone."""
    title = "Low against full fidelity"
    low, full = mean_percent(run.at(run.plan.lows[0])), mean_percent(run.at(run.plan.high))
    macs = {e.trial.architecture: float(e.macs) for e in run.at(run.plan.high)}
    both = [architecture for architecture in full if architecture in low]
    if len(both) < MIN_PAIRS:
        return Chart("low-full", title, f"Architectures with both scores: {len(both)}; a chart needs {MIN_PAIRS}.")
    x, y = np.array([low[a] for a in both]), np.array([full[a] for a in both])
    size = np.array([macs[a] for a in both])
    colour = coloured_by((size / 1e6).tolist(), "million<br>MACs")
    hover = "%{text}<br>low %{x:.2f} %, full %{y:.2f} %<br>%{marker.color:.1f} million MACs<extra></extra>"
    about = [label(run, architecture) for architecture in both]
    data = [points(x.tolist(), y.tolist(), about, "architectures", None, marker=colour, hovertemplate=hover)]
    layout = {"xaxis": axis("low-fidelity accuracy, %"), "yaxis": axis("full accuracy, %"), "showlegend": False}
    caption = (
        "A low fidelity is worth its cost if it ranks (dots rising from left to right) better than size (colour) does. "
        f"Kendall's tau {with_interval(kendall_tau, x, y)} over {len(both)} architectures; "
        f"with MACs held fixed {with_interval(partial_tau, x, y, size)}; "
        f"of MACs alone {with_interval(kendall_tau, size, y)}. Brackets are 90 % bootstrap intervals. Only "
        f"architectures trained in full appear here: {_how_selected(run)}."
    )
    return Chart("low-full", title, caption, data, layout)


def _how_selected(run: Run) -> str:
    """How the architectures trained in full were selected, and so what their rank correlations are worth."""
    if run.kind == "fidelity-study":
        return "they are spread evenly over MACs, so these rank correlations are estimates for the whole space"
    if run.config.method == "random":
        return "they were drawn at random, so these rank correlations are estimates for the whole space"
    imported = ", except those imported from a fidelity study" if run.imported else ""
    return f"they were selected as promising{imported}, so these rank correlations are not those of the whole space"


def with_interval(statistic: Callable[..., float], *samples: Array) -> str:
    """A statistic with its bootstrap interval, as text."""
    least, most = bootstrap_interval(statistic, *samples)
    return f"{statistic(*samples):.2f} [{least:.2f}, {most:.2f}]"
