"""The Chart class, and the traces, units and colours that the charts of a report share."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from engine.search.runs import Run
from engine.trial import Architecture

Json = dict[str, Any]

# CSS variables of page.css.
LOW, FULL, BEST, FAILED = "var(--low)", "var(--full)", "var(--best)", "var(--failed)"
WAIT, SOFT, RULE = "var(--wait)", "var(--soft)", "var(--rule)"
# With fewer pairs, a rank correlation means nothing.
MIN_PAIRS = 3


@dataclass(frozen=True)
class Chart:
    """A chart with its title and caption. With too little data to draw, `data` is empty and the caption says so."""

    name: str
    title: str
    caption: str
    data: list[Json] = field(default_factory=list)
    layout: Json = field(default_factory=dict)
    wide: bool = False
    height: int = 340


def axis(title: str, **more: Any) -> Json:
    return {"title": {"text": title}, **more}


def points(x: Sequence[Any], y: Sequence[Any], names: Sequence[str], name: str, colour: Any, **more: Any) -> Json:
    """A trace of markers; hovering shows `names`."""
    marker = {"color": colour, "size": 9, "line": {"width": 1, "color": "var(--card)"}, **more.pop("marker", {})}
    return {
        "type": "scatter",
        "mode": "markers",
        "x": list(x),
        "y": list(y),
        "text": list(names),
        "name": name,
        "marker": marker,
        **more,
    }


def label(run: Run, architecture: Architecture) -> str:
    """An architecture as hover text, with its standing by training-free scores if it has some."""
    standing = run.standing.get(architecture)
    return f"<b>{architecture}</b>" + (f"<br>standing before training {standing:.2f}" if standing is not None else "")


def coloured_by(values: Sequence[float], title: str) -> Json:
    """Properties of a marker whose colour shows a number, with a colour bar."""
    bar = {"title": {"text": title}, "thickness": 10, "outlinewidth": 0}
    return {"color": list(values), "colorscale": [[0, LOW], [1, FULL]], "colorbar": bar}


def line(x: Sequence[Any], y: Sequence[Any], name: str, colour: str, **more: Any) -> Json:
    """A line without hover text, unless `more` sets one."""
    style = {"color": colour, "width": 2, **more.pop("line", {})}
    guide = {"hoverinfo": "skip", "mode": "lines"}
    return {"type": "scatter", "x": list(x), "y": list(y), "name": name, "line": style, **guide, **more}


def percent(accuracy: float) -> float:
    return 100 * accuracy


def time_unit(seconds: float) -> tuple[float, str]:
    """The unit in which to show times up to `seconds`, as its length in seconds and its name."""
    if seconds >= 2 * 3600:
        return 3600.0, "hours"
    return (60.0, "minutes") if seconds >= 120 else (1.0, "seconds")
