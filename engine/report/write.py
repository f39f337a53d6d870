"""Writes the report of a run: report/index.html and report/trials.csv."""

from __future__ import annotations

from pathlib import Path

from engine.report.accuracy_charts import incumbent, low_against_full
from engine.report.chart import Chart, Json
from engine.report.class_charts import class_charts
from engine.report.front_section import front_chart
from engine.report.page import page
from engine.report.prediction_charts import learned_to_trust, predicted_against_measured
from engine.report.training_charts import cost_by_phase, teacher, timeline
from engine.run_folder import write_atomically
from engine.search.predictions import load_predictions
from engine.search.runs import Run, as_csv, rows
from engine.trial import EnvironmentUnusable, not_installed


def write(run: Run, folder: Path) -> Json:
    """Writes both files into a folder; returns their paths, and the charts drawn and left out for lack of data.

    Raises EnvironmentUnusable if the folder cannot be written.
    """
    library = plotly()
    charts = all_charts(run)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        write_atomically(folder / "index.html", page(run, charts, library))
        write_atomically(folder / "trials.csv", as_csv(rows(run, run.answers)))
    except OSError as error:
        raise EnvironmentUnusable(f"cannot write {folder}: {error}; choose another folder with --out") from error
    return {
        "run_dir": str(run.folder),
        "report": str(folder / "index.html"),
        "trials": str(folder / "trials.csv"),
        "charts": [chart.name for chart in charts if chart.data],
        "left_out": {chart.name: chart.caption for chart in charts if not chart.data},
    }


def all_charts(run: Run) -> list[Chart]:
    """The charts, in the order of the page."""
    past = load_predictions(run)
    return [
        front_chart(run),
        incumbent(run),
        low_against_full(run),
        *predicted_against_measured(past),
        learned_to_trust(past),
        timeline(run),
        cost_by_phase(run),
        teacher(run),
        *class_charts(run),
    ]


def plotly() -> str:
    """The source of plotly.js, which the Python package plotly contains."""
    try:
        from plotly.offline import get_plotlyjs
    except ImportError:
        raise not_installed("the report needs plotly", "report") from None
    source: str = get_plotlyjs()
    return source
