"""What the charts of a report share: their form, units, colours and hover texts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from engine.trial import Architecture

Json = dict[str, Any]

# CSS variables of page.css.
LOW, FULL, BEST, FAILED = "var(--low)", "var(--full)", "var(--best)", "var(--failed)"
WAIT, SOFT, RULE = "var(--wait)", "var(--soft)", "var(--rule)"
# Pairs under which a rank correlation says nothing.
FEW = 3


@dataclass(frozen=True)
class Chart:
    """A chart with its title and the sentences under it. Without `data` the sentences say why there is none."""

    name: str
    title: str
    help: str
    data: list[Json] = field(default_factory=list)
    layout: Json = field(default_factory=dict)
    wide: bool = False
    height: int = 340


def axis(title: str, **more: Any) -> Json:
    return {"title": {"text": title}, **more}


def points(x: Sequence[Any], y: Sequence[Any], names: Sequence[Any], name: str, colour: Any, **more: Any) -> Json:
    """A trace of markers; `names` are what hovering shows in bold."""
    marker = {"color": colour, "size": 9, "line": {"width": 1, "color": "var(--card)"}, **more.pop("marker", {})}
    return {
        "type": "scatter",
        "mode": "markers",
        "x": list(x),
        "y": list(y),
        "text": [f"<b>{one}</b>" if isinstance(one, Architecture) else str(one) for one in names],
        "name": name,
        "marker": marker,
        **more,
    }


def coloured_by(values: Sequence[float], title: str) -> Json:
    """A marker whose colour says a number, with the bar that explains it."""
    bar = {"title": {"text": title}, "thickness": 10, "outlinewidth": 0}
    return {"color": list(values), "colorscale": [[0, LOW], [1, FULL]], "colorbar": bar}


def line(x: Sequence[Any], y: Sequence[Any], name: str, colour: str, **more: Any) -> Json:
    """A trace without hover: a guide for the eye, unless `more` says otherwise."""
    style = {"color": colour, "width": 2, **more.pop("line", {})}
    guide = {"hoverinfo": "skip", "mode": "lines"}
    return {"type": "scatter", "x": list(x), "y": list(y), "name": name, "line": style, **guide, **more}


def percent(accuracy: float) -> float:
    return 100 * accuracy


def time_unit(seconds: float) -> tuple[float, str]:
    """What to divide seconds by, and its name, so that the greatest is a number people read."""
    if seconds >= 2 * 3600:
        return 3600.0, "hours"
    return (60.0, "minutes") if seconds >= 120 else (1.0, "seconds")
