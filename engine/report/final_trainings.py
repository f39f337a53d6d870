"""The final trainings in the report: a table of the finished winner and its baselines, and their marks in a chart."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

from engine.report.chart import BEST, FULL, SOFT, Json, percent, points
from engine.search.runs import Run

FINISHED = "finished winner"
# The keys of rows of result.json, in millions, by the title of an axis.
COSTS = {"million MACs": "macs", "million parameters": "params"}
NARROW = 3  # columns of the table that a narrow screen shows


def trained_rows(run: Run) -> list[Json]:
    """The rows of result.json that have a test accuracy, by name, the finished winner first; [] if there are none."""
    result = run.result or {}
    if not result.get("final"):
        return []
    return [{"name": FINISHED, **result["final"]}, *(row for row in result["baselines"] if "test_accuracy" in row)]


def table(run: Run) -> str:
    """The verdict in words, and a table of the finished winner and all baselines; "" for a run without a verdict."""
    result = run.result or {}
    if not result.get("verdict"):
        return ""
    said = f"<p>{escape(result['verdict'])}</p>"
    if not result["final"]:
        return said
    failures = [row for row in result["baselines"] if "test_accuracy" not in row]
    heads = ("network", "test, %", "difference", "million MACs", "parameters", "architecture")
    lines = [_cells(row) for row in trained_rows(run)]
    lines += [[escape(row["name"]), escape(row["status"]), "", "", "", escape(row["architecture"])] for row in failures]
    head = "".join(f"<th{_extra(place)}>{name}</th>" for place, name in enumerate(heads))
    body = "".join(
        f"<tr>{''.join(f'<td{_extra(place)}>{cell}</td>' for place, cell in enumerate(line))}</tr>" for line in lines
    )
    note = (
        "Test accuracies after the final training, and the finished winner's minus that of each other network. Each "
        "\N{PLUS-MINUS SIGN} is one standard error; that of a difference is paired over the test images."
    )
    return f'{said}<table class="named"><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table><p>{note}</p>'


def _cells(row: Json) -> list[str]:
    gain = _with_error(row["difference"], row["difference_standard_error"], "+") if "difference" in row else ""
    return [
        escape(row["name"]),
        _with_error(row["test_accuracy"], row["test_standard_error"]),
        gain,
        f"{row['macs'] / 1e6:.2f}" if row["macs"] else "",
        f"{row['params']:,}" if row["params"] else "",
        escape(str(row.get("architecture") or row["network"])),
    ]


def _with_error(value: float, error: float, sign: str = "") -> str:
    return f"{100 * value:{sign}.1f} \N{PLUS-MINUS SIGN} {100 * error:.1f}"


def _extra(column: int) -> str:
    """The class of columns that a narrow screen leaves out."""
    return ' class="extra"' if column >= NARROW else ""


def marks(rows: Sequence[Json], cost: str) -> list[Json]:
    """The finished winner and the baselines against a cost (an axis), with their names and standard errors."""
    key = COSTS.get(cost, "")
    known = [row for row in rows if row.get(key)]
    if not known:
        return []
    x, y = [row[key] / 1e6 for row in known], [percent(row["test_accuracy"]) for row in known]
    hover = "%{text}<br>test %{y:.2f} %, %{x:.4g} " + cost + "<extra></extra>"
    drawn = points(
        x,
        y,
        [row["name"] for row in known],
        "final training, on test images",
        [BEST if row["name"] == FINISHED else FULL for row in known],
        marker={"symbol": ["star" if row["name"] == FINISHED else "diamond" for row in known], "size": 14},
        hovertemplate=hover,
        mode="markers+text",
        textposition=label_places(x, y),
        textfont={"size": 11},
        error_y={
            "array": [percent(row["test_standard_error"]) for row in known],
            "color": SOFT,
            "thickness": 1,
            "width": 3,
        },
    )
    return [drawn]


def label_places(x: Sequence[float], y: Sequence[float]) -> list[str]:
    """Where the label of each mark goes: to the side with more room, and off the labels of its neighbours.

    Of the marks on a side, the label of the highest is above it, that of the lowest below; a lone one's is below on the
    left and above on the right, so that two at the same height do not meet.
    """
    places = [""] * len(x)
    middle = max(x) / 2
    for side, members in (
        ("right", [i for i, value in enumerate(x) if value <= middle]),
        ("left", [i for i, value in enumerate(x) if value > middle]),
    ):
        order = sorted(members, key=lambda i: -y[i])
        levels = ["top", *["middle"] * (len(order) - 2), "bottom"]
        if len(order) == 1:
            levels = ["bottom" if side == "right" else "top"]
        for i, level in zip(order, levels, strict=False):
            places[i] = f"{level} {side}"
    return places
