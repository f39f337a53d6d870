"""Writes the report of a run: report/index.html and report/trials.csv."""

from __future__ import annotations

from pathlib import Path

from engine.report import charts, predictions
from engine.report.chart import Chart, Json
from engine.report.page import page
from engine.report.timeline import timeline
from engine.run_folder import write_atomically
from engine.search.predictions import load_predictions
from engine.search.runs import Run, as_csv, row
from engine.trial import EnvironmentUnusable, not_installed


def write(run: Run, folder: Path) -> Json:
    """Writes both files into a folder and returns where they are, and which charts there was too little data for.

    Raises EnvironmentUnusable where it cannot be written.
    """
    library = plotly()
    drawn = make(run)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        write_atomically(folder / "index.html", page(run, drawn, library))
        write_atomically(folder / "trials.csv", as_csv(map(row, run.answers)))
    except OSError as error:
        raise EnvironmentUnusable(f"{folder} cannot be written: {error}; choose another folder with --out") from error
    return {
        "run_dir": str(run.folder),
        "report": str(folder / "index.html"),
        "trials": str(folder / "trials.csv"),
        "charts": [chart.name for chart in drawn if chart.data],
        "left_out": {chart.name: chart.help for chart in drawn if not chart.data},
    }


def make(run: Run) -> list[Chart]:
    """The charts in the order of the page."""
    past = load_predictions(run)
    return [
        charts.incumbent(run),
        charts.low_against_full(run),
        charts.pareto(run),
        *predictions.predicted(past, past.at_ask_time()),
        timeline(run),
        charts.cost_by_phase(run),
        charts.teacher(run),
    ]


def plotly() -> str:
    """The source of plotly.js, from the copy that its Python package has."""
    try:
        from plotly.offline import get_plotlyjs
    except ImportError:
        raise not_installed("the report needs plotly", "report") from None
    source: str = get_plotlyjs()
    return source
