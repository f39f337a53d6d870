"""The charts of the surrogate's predictions, made before the outcomes were known, against the outcomes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from engine.report.accuracy_charts import mean_percent
from engine.report.chart import FULL, MIN_PAIRS, RULE, SOFT, Chart, axis, coloured_by, label, line, percent, points
from engine.search.predictions import Prediction, RunPredictions
from engine.search.runs import Run
from engine.trial import Architecture
from surrogate.quality import coverage, kendall_tau

Array = npt.NDArray[np.float64]

LEVELS = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95)


@dataclass(frozen=True)
class Outcomes:
    """Predictions of n architectures, and their outcomes `measured` (n,), all in normal scores."""

    architectures: Sequence[Architecture]
    predictions: Sequence[Prediction]
    measured: Array

    @property
    def mean(self) -> Array:
        return np.array([prediction.mean for prediction in self.predictions])

    @property
    def std(self) -> Array:
        return np.array([prediction.std for prediction in self.predictions])


def predicted_against_measured(past: RunPredictions) -> list[Chart]:
    """Two charts: the predictions for architectures at the time they were asked for in full, against the outcomes."""
    titles = {"predicted": "Predicted against measured", "calibration": "Calibration"}
    if past.run.kind == "fidelity-study":
        why = "A fidelity study asks no surrogate: its architectures are spread evenly over multiply-accumulates."
        return [Chart(name, title, why) for name, title in titles.items()]
    outcomes = outcomes_of(past)
    count = len(outcomes.architectures)
    if count < MIN_PAIRS:
        why = f"Predictions with an outcome so far: {count}; a chart needs {MIN_PAIRS}."
        return [Chart(name, title, why) for name, title in titles.items()]
    return [scatter(titles["predicted"], past.run, outcomes), calibration(titles["calibration"], outcomes)]


def learned_to_trust(past: RunPredictions) -> Chart:
    """The weights that the surrogate gives to what is known of the candidates, with their uncertainty."""
    title = "What this run has learned to trust"
    weights = past.weights()[::-1]  # the first at the top
    if not weights:
        return Chart("weights", title, "No full result of a search yet, from which weights could be learned.")
    about = [f"<b>{w.name}</b><br>says something with probability {w.included:.2f}" for w in weights]
    mean, names = [w.mean for w in weights], [w.name for w in weights]
    bars = {"type": "data", "array": [1.645 * w.std for w in weights], "color": RULE, "thickness": 1.5, "width": 0}
    style = {"error_x": bars, "hovertemplate": "%{text}<br>weight %{x:.2f} ± %{error_x.array:.2f}<extra></extra>"}
    data = [
        line([0, 0], [names[0], names[-1]], "no weight", SOFT, line={"dash": "dot", "width": 1}),
        points(mean, names, about, "weights", FULL, **style),
    ]
    layout = {"xaxis": axis("weight in full accuracy"), "yaxis": axis("", automargin=True), "showlegend": False}
    caption = (
        "By how many standard deviations full accuracy rises with one of each quantity, all others fixed, as the last "
        "fit has it; bars are 90 % intervals. It starts from what was believed of MACs and low fidelities, and from "
        "nothing for training-free scores, and follows the full trainings. A weight around 0 is not trusted."
    )
    return Chart("weights", title, caption, data, layout)


def outcomes_of(past: RunPredictions) -> Outcomes:
    """The predictions made at ask time whose architectures have been measured since."""
    measured = dict(zip(rows_of_full(past), past.at_the_end.y.tolist(), strict=True))
    trials = {trial.number: trial for trial in past.run.record.asked}
    rows = [
        (trials[number].architecture, prediction, past.candidates.row(trials[number].architecture))
        for number, prediction in past.at_ask_time().items()
    ]
    known = [(architecture, prediction, measured[row]) for architecture, prediction, row in rows if row in measured]
    return Outcomes([a for a, _, _ in known], [p for _, p, _ in known], np.array([y for _, _, y in known]))


def rows_of_full(past: RunPredictions) -> list[int]:
    """Rows of the candidates measured in full, in the order of the surrogate's scores."""
    rows = [past.candidates.row(e.trial.architecture) for e in past.run.at(past.run.plan.high)]
    return list(dict.fromkeys(row for row in rows if row is not None))


def scatter(title: str, run: Run, outcomes: Outcomes) -> Chart:
    full, mean, measured = mean_percent(run.at(run.plan.high)), outcomes.mean, outcomes.measured
    about = [
        f"{label(run, a)}<br>measured {full[a]:.2f} %<br>given {p.low} low and {p.full} full scores"
        for a, p in zip(outcomes.architectures, outcomes.predictions, strict=True)
    ]
    ends = [float(min(measured.min(), mean.min())), float(max(measured.max(), mean.max()))]
    bars = {"type": "data", "array": (1.645 * outcomes.std).tolist(), "color": RULE, "thickness": 1.5, "width": 0}
    style = {
        "error_x": bars,
        "marker": coloured_by([p.full for p in outcomes.predictions], "full<br>scores<br>known"),
        "hovertemplate": "%{text}<br>predicted %{x:.2f} ± %{error_x.array:.2f}, measured %{y:.2f}<extra></extra>",
    }
    data = [
        line(ends, ends, "measured as predicted", SOFT, line={"dash": "dot", "width": 1}),
        points(mean.tolist(), measured.tolist(), about, "architectures", None, **style),
    ]
    axes = {
        "xaxis": axis("predicted, normal score"),
        "yaxis": axis("measured, normal score"),
        "showlegend": False,
    }
    return Chart("predicted", title, _scatter_caption(run, outcomes), data, axes)


def _scatter_caption(run: Run, outcomes: Outcomes) -> str:
    count = len(outcomes.measured)
    inside = round(coverage(outcomes.measured, outcomes.mean, outcomes.std) * count)
    selected = (
        "Architectures were selected for a high prediction, so the dots are expected to lean below the dotted line."
        if run.asks_surrogate
        else f"The method {run.config.method} did not ask the surrogate: its predictions are shown for comparison."
    )
    return (
        "Each prediction was made when its architecture was asked for, from the answers available then: none has seen "
        "its outcome. On the surrogate's scale, 0 is the middle of all candidates and 1 is one standard deviation "
        f"above it. Bars are 90 % intervals; {inside} of {count} contain the outcome. Kendall's tau is "
        f"{kendall_tau(outcomes.mean, outcomes.measured):.2f}. {selected}"
    )


def calibration(title: str, outcomes: Outcomes) -> Chart:
    """Observed against nominal coverage of the prediction intervals."""
    mean, std, count = outcomes.mean, outcomes.std, len(outcomes.measured)
    observed = [percent(coverage(outcomes.measured, mean, std, level)) for level in LEVELS]
    x = [percent(level) for level in LEVELS]
    hover = "intervals of %{x:.0f} %<br>contain %{y:.0f} % of the outcomes<extra></extra>"
    data = [
        line([0, 100], [0, 100], "calibrated", SOFT, line={"dash": "dot", "width": 1}),
        line(x, observed, "observed", FULL, mode="lines+markers", hoverinfo=None, hovertemplate=hover),
    ]
    layout = {
        "xaxis": axis("nominal coverage of the intervals, %", range=[0, 102]),
        "yaxis": axis("outcomes inside, %", range=[0, 102]),
    }
    caption = (
        "The share of outcomes inside the prediction interval of each level. Above the dotted line the surrogate was "
        f"underconfident, below it overconfident. With {count} outcomes, one outcome is {100 / count:.0f} points."
    )
    return Chart("calibration", title, caption, data, layout)
