"""The charts of what the surrogate said before it could know, against what came out."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from engine.report.chart import FEW, FULL, RULE, SOFT, Chart, axis, coloured_by, line, percent, points
from engine.report.charts import means
from engine.search.predictions import Prediction, RunPredictions
from engine.search.runs import Run
from engine.trial import Architecture
from surrogate.quality import coverage, kendall_tau

Array = npt.NDArray[np.float64]

LEVELS = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95)


def predicted(past: RunPredictions, said: dict[int, Prediction]) -> list[Chart]:
    """What the surrogate said of each architecture when it was asked for in full, against what came out."""
    titles = ("Predicted against measured", "Calibration")
    run = past.run
    if run.kind == "fidelity-study":
        why = "A study of low fidelities asks no surrogate: the architectures are spread over multiply-accumulates."
        return [Chart("predicted", titles[0], why), Chart("calibration", titles[1], why)]
    ending = past.at_the_end
    measured = dict(zip(rows_of_full(past), ending.y.tolist(), strict=True))
    trials = {t.number: t for t in run.record.asked}
    pairs = [(trials[n].architecture, o) for n, o in said.items()]
    pairs = [(a, o) for a, o in pairs if past.candidates.row(a) in measured]
    if len(pairs) < FEW:
        why = f"Only {len(pairs)} predictions have an outcome yet; a picture needs {FEW}."
        return [Chart("predicted", titles[0], why), Chart("calibration", titles[1], why)]
    truth = np.array([measured[past.candidates.row(a)] for a, _ in pairs])  # type: ignore[index]
    mean, std = np.array([o.mean for _, o in pairs]), np.array([o.std for _, o in pairs])
    return [scatter_of(titles[0], run, pairs, truth, mean, std), calibration(titles[1], truth, mean, std)]


def rows_of_full(past: RunPredictions) -> list[int]:
    """Rows of the candidates measured in full, in the order in which the surrogate holds their scores."""
    rows = [past.candidates.row(e.trial.architecture) for e in past.run.at(past.run.plan.high)]
    return list(dict.fromkeys(row for row in rows if row is not None))


def scatter_of(
    title: str, run: Run, pairs: Sequence[tuple[Architecture, Prediction]], truth: Array, mean: Array, std: Array
) -> Chart:
    full = means(run.at(run.plan.high))
    about = [
        f"<b>{a}</b><br>measured {full[a]:.2f} %<br>on {o.low} low and {o.full} full scores" for a, o in pairs
    ]
    least, most = float(min(truth.min(), mean.min())), float(max(truth.max(), mean.max()))
    style = {
        "error_x": {"type": "data", "array": (1.645 * std).tolist(), "color": RULE, "thickness": 1.5, "width": 0},
        "marker": coloured_by([o.full for _, o in pairs], "full<br>scores<br>known"),
        "hovertemplate": "%{text}<br>predicted %{x:.2f} ± %{error_x.array:.2f}, came out %{y:.2f}<extra></extra>",
    }
    data = [
        line([least, most], [least, most], "as predicted", SOFT, line={"dash": "dot", "width": 1}),
        points(mean.tolist(), truth.tolist(), about, "architectures", None, **style),
    ]
    axes = {
        "xaxis": axis("predicted, normal score"),
        "yaxis": axis("came out, normal score"),
        "showlegend": False,
    }
    inside = round(coverage(truth, mean, std) * len(truth))
    tau = kendall_tau(mean, truth)
    picked = (
        "Architectures were picked for a high prediction: that dots lean below the dotted line is expected."
        if run.asks_surrogate
        else f"The method {run.config.method} did not ask the surrogate: this is for comparison."
    )
    help = (
        "Each prediction was made when its architecture was asked for, from the answers that were there by then: none "
        "has seen its outcome. On the scale of the surrogate 0 is the middle of all candidates and 1 a standard "
        f"deviation above it; bars are 90 % intervals, and {inside} of {len(truth)} hold the outcome. Kendall's tau "
        f"{tau:.2f}. {picked}"
    )
    return Chart("predicted", title, help, data, axes)


def calibration(title: str, truth: Array, mean: Array, std: Array) -> Chart:
    observed = [percent(coverage(truth, mean, std, level)) for level in LEVELS]
    x = [percent(level) for level in LEVELS]
    hover = "intervals of %{x:.0f} %<br>held %{y:.0f} % of the outcomes<extra></extra>"
    data = [
        line([0, 100], [0, 100], "as promised", SOFT, line={"dash": "dot", "width": 1}),
        line(x, observed, "observed", FULL, mode="lines+markers", hoverinfo=None, hovertemplate=hover),
    ]
    layout = {
        "xaxis": axis("interval promised to hold, %", range=[0, 102]),
        "yaxis": axis("of the outcomes held, %", range=[0, 102]),
    }
    help = (
        "Of the same predictions: how many outcomes lay within the interval of each level. Above the dotted line the "
        f"surrogate was more careful than it had to be, below it too sure. With {len(truth)} outcomes a step is "
        f"{100 / len(truth):.0f} points."
    )
    return Chart("calibration", title, help, data, layout)
