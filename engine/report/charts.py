"""The charts of a report, each a pure function of the run."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import accumulate
from typing import Any

import numpy as np
import numpy.typing as npt

from engine.report.chart import (
    BEST,
    FEW,
    FULL,
    LOW,
    Chart,
    Json,
    axis,
    coloured_by,
    line,
    percent,
    points,
    time_unit,
)
from engine.search.runs import PHASES, Run
from engine.trial import Architecture, Evaluation, Fidelity, mean_accuracies
from surrogate.quality import bootstrap_interval, kendall_tau, partial_tau

Array = npt.NDArray[np.float64]

PHASE_COLOURS = {
    "setup": "var(--phase-1)",
    "data": "var(--phase-2)",
    "teacher": "var(--phase-3)",
    "train": "var(--phase-4)",
    "evaluate": "var(--phase-5)",
    "other": "var(--wait)",
}


def incumbent(run: Run) -> Chart:
    """Best full accuracy so far against the workers' time."""
    title = "Best so far against cost"
    full = run.at(run.plan.high)
    if not full:
        return Chart("incumbent", title, "No full-fidelity evaluation has succeeded yet.")
    before = own_teacher_seconds(run)
    spent = [before + s for s in accumulate(e.seconds for e in run.answers)]
    when = dict(zip((e.trial.number for e in run.answers), spent, strict=True))
    divisor, unit = time_unit(spent[-1])

    def marks(answers: Sequence[Evaluation], name: str, colour: str, **more: Any) -> Json:
        x = [when[e.trial.number] / divisor for e in answers]
        hover = "%{text}<br>" + name + ": %{y:.2f} %<br>after %{x:.3g} " + unit + "<extra></extra>"
        architectures = [e.trial.architecture for e in answers]
        y = [percent(e.accuracy) for e in answers]
        return points(x, y, architectures, name, colour, hovertemplate=hover, **more)

    best = list(accumulate((percent(e.accuracy) for e in full), max))
    x = [when[e.trial.number] / divisor for e in full]
    step = line([*x, spent[-1] / divisor], [*best, best[-1]], "best so far", BEST, line={"shape": "hv"})
    low = [e for e in run.answers if e.ok and e.trial.fidelity in run.plan.lows]
    help = (
        "Each dot is an evaluation, where the time of all workers together had come when it was answered"
        + (", the training of the teacher included" if before else "")
        + ". Low-fidelity accuracies, below, are of short trainings: only their order counts."
    )
    data = [step, marks(full, "full", FULL)]
    layout = {
        "xaxis": axis(f"{unit} of work", rangemode="tozero", anchor="y2" if low else "y"),
        "yaxis": axis("full, %", domain=[0.36 if low else 0, 1]),
        "yaxis2": axis("low fidelity, %", domain=[0, 0.28]),
    }
    if low:
        data.append(marks(low, "low fidelity", LOW, yaxis="y2", marker={"size": 7}))
    return Chart("incumbent", title, help, data, layout, wide=True, height=440)


def own_teacher_seconds(run: Run) -> float:
    """What the training of a teacher by this run itself took."""
    card = run.teacher_card() if run.config.teacher == "auto" else None
    return float(card["seconds"]) if card else 0.0


def means(answers: Sequence[Evaluation]) -> dict[Architecture, float]:
    """Mean accuracy in percent of each architecture."""
    return {architecture: percent(mean) for architecture, mean in mean_accuracies(answers).items()}


def low_against_full(run: Run) -> Chart:
    """Does the cheap judgement rank as the full one does, and better than size alone?"""
    title = "Low against full fidelity"
    low, full = means(run.at(run.plan.lows[0])), means(run.at(run.plan.high))
    macs = {e.trial.architecture: float(e.macs) for e in run.at(run.plan.high)}
    both = [architecture for architecture in full if architecture in low]
    if len(both) < FEW:
        return Chart("low-full", title, f"Only {len(both)} architectures have both scores; a picture needs {FEW}.")
    x, y = np.array([low[a] for a in both]), np.array([full[a] for a in both])
    size = np.array([macs[a] for a in both])
    colour = coloured_by((size / 1e6).tolist(), "million<br>MACs")
    hover = "%{text}<br>low %{x:.2f} %, full %{y:.2f} %<br>%{marker.color:.1f} million MACs<extra></extra>"
    data = [points(x.tolist(), y.tolist(), both, "architectures", None, marker=colour, hovertemplate=hover)]
    layout = {"xaxis": axis("low-fidelity accuracy, %"), "yaxis": axis("full accuracy, %"), "showlegend": False}
    words = [
        f"Kendall's tau {with_interval(kendall_tau, x, y)} over {len(both)} architectures",
        f"with MACs held fixed {with_interval(partial_tau, x, y, size)}",
        f"of MACs alone {with_interval(kendall_tau, size, y)}",
    ]
    help = (
        "A cheap judgement is worth its price if the dots rise from left to right, and more so than by size (colour) "
        f"alone. {'; '.join(words)}; in brackets 90 % intervals by bootstrap. Only what was trained in full is here: "
        f"{_chosen(run)}."
    )
    return Chart("low-full", title, help, data, layout)


def _chosen(run: Run) -> str:
    """How the architectures that were trained in full were chosen, and so what their rank correlations are worth."""
    if run.kind == "fidelity-study":
        return "spread evenly over multiply-accumulates, so these rank correlations are estimates for the whole space"
    if run.config.method == "random":
        return "drawn at random, so these rank correlations are estimates for the whole space"
    brought = ", but for what came with a study" if run.imported else ""
    return f"chosen for being good{brought}, so these rank correlations are not those of the whole space"


def with_interval(statistic: Callable[..., float], *samples: Array) -> str:
    """A statistic with its bootstrap interval, as text."""
    least, most = bootstrap_interval(statistic, *samples)
    return f"{statistic(*samples):.2f} [{least:.2f}, {most:.2f}]"


def pareto(run: Run) -> Chart:
    """Accuracy against each cost that is known, with the front; buttons choose the cost."""
    title = "Accuracy against size"
    full = run.at(run.plan.high)
    if not full:
        return Chart("pareto", title, "No full-fidelity evaluation has succeeded yet.")
    costs = {"million MACs": [e.macs / 1e6 for e in full], "million parameters": [e.params / 1e6 for e in full]}
    if all("latency_ms" in e.costs for e in full):
        costs["latency, ms"] = [e.costs["latency_ms"] for e in full]
    name_of_best = "winner" if run.result else "best so far"
    groups = [_against(name, x, full, run.best, name_of_best) for name, x in costs.items()]
    data = [trace | {"visible": place == 0} for place, group in enumerate(groups) for trace in group]
    buttons = [
        {
            "label": name.split(",")[0].removeprefix("million "),
            "method": "update",
            "args": [
                {"visible": [place == chosen for place, group in enumerate(groups) for _ in group]},
                {"xaxis.title.text": name},
            ],
        }
        for chosen, name in enumerate(costs)
    ]
    menu = {"type": "buttons", "direction": "right", "buttons": buttons, "showactive": False}
    menu |= {"x": 0, "xanchor": "left", "y": 1.02, "yanchor": "bottom"}
    layout = {
        "xaxis": axis(next(iter(costs)), rangemode="tozero"),
        "yaxis": axis("validation accuracy, %"),
        "updatemenus": [menu],
        "showlegend": False,
    }
    help = (
        f"Full-fidelity accuracy against what a network costs; the star is the {name_of_best}. The line joins those "
        "that no other beats in both: what to choose from if the star is too large."
    )
    return Chart("pareto", title, help, data, layout)


def _against(
    name: str, x: Sequence[float], full: Sequence[Evaluation], best: Evaluation | None, name_of_best: str
) -> list[Json]:
    """The front, the evaluations and the best of them against one cost x (n,)."""
    y = [percent(e.accuracy) for e in full]
    architectures = [e.trial.architecture for e in full]
    hover = "%{text}<br>%{y:.2f} %, %{x:.4g} " + name + "<extra></extra>"
    kept = front(x, y)
    won = [i for i, e in enumerate(full) if best and e.trial == best.trial]
    star = points(
        [x[i] for i in won],
        [y[i] for i in won],
        [architectures[i] for i in won],
        name_of_best,
        BEST,
        marker={"symbol": "star", "size": 15},
        hovertemplate=hover,
    )
    edge = line([x[i] for i in kept], [y[i] for i in kept], "front", BEST, line={"shape": "hv"})
    return [edge, points(x, y, architectures, "full", FULL, hovertemplate=hover), star]


def front(x: Sequence[float], y: Sequence[float]) -> list[int]:
    """Places of the points that none beats (smaller or equal x, greater y), by rising x."""
    kept: list[int] = []
    for i in sorted(range(len(x)), key=lambda i: (x[i], -y[i])):
        if not kept or y[i] > y[kept[-1]]:
            kept.append(i)
    return kept


def teacher(run: Run) -> Chart:
    """The teacher's loss by epoch."""
    title = "The teacher"
    if run.config.low.kd_loss == "none" and run.config.high.kd_loss == "none":
        return Chart("teacher", title, "This search distils from no teacher.")
    card = run.teacher_card()
    if card is None:
        return Chart("teacher", title, "The teacher's weights file is not where the search had it.")
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
    help = (
        f"{about}. Cross entropy on the augmented training images, the mean of each epoch; students learn from what "
        "the last epoch left."
    )
    return Chart("teacher", title, help, data, layout)


def cost_by_phase(run: Run) -> Chart:
    """What the workers' time went into."""
    title = "Where the time went"
    groups: dict[str, Callable[[Fidelity], bool]] = {
        "low fidelity": lambda fidelity: fidelity in run.plan.lows,
        "full": lambda fidelity: fidelity == run.plan.high,
    }
    totals: dict[str, dict[str, float]] = {}
    for name, belongs in groups.items():
        answers = [e for e in run.answers if belongs(e.trial.fidelity)]
        parts = {phase: sum(e.costs.get(phase, 0.0) for e in answers) for phase in PHASES}
        parts["other"] = max(0.0, sum(e.seconds for e in answers) - sum(parts.values()))
        totals[name] = parts
    before = own_teacher_seconds(run)
    if before:
        totals["teacher"] = {"train": before}
    divisor, unit = time_unit(max(sum(parts.values()) for parts in totals.values()))
    names = list(totals)[::-1]
    hover = "%{y}, %{fullData.name}: %{x:.3g} " + unit + "<extra></extra>"
    data: list[Json] = [
        {
            "type": "bar",
            "orientation": "h",
            "name": phase,
            "y": names,
            "x": [totals[name].get(phase, 0.0) / divisor for name in names],
            "marker": {"color": colour},
            "hovertemplate": hover,
        }
        for phase, colour in PHASE_COLOURS.items()
    ]
    whole = sum(sum(parts.values()) for parts in totals.values())
    shares = ", ".join(f"{name} {100 * sum(parts.values()) / max(whole, 1e-9):.0f} %" for name, parts in totals.items())
    help = (
        f"Time of all workers by what it went into: {shares}. In the bars of students, teacher is its forward passes. "
        "On a GPU the device runs behind the host: only the sum of a bar is exact there."
    )
    layout = {"barmode": "stack", "xaxis": axis(unit), "yaxis": {"automargin": True, "showgrid": False}}
    return Chart("cost", title, help, data, layout, height=300)
