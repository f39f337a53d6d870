"""The final trainings in the report: a table of the finished winner and its baselines, and where their names go in the
chart of the front."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

from engine.report.chart import Json
from engine.search.comparison import with_error
from engine.search.runs import Run

FINISHED = "finished winner"
Box = tuple[float, float, float, float]
# Places of a name beside its mark, the best first; its size and distance as shares of a picture as narrow as a phone.
PLACES = (
    *("top center", "bottom center", "middle right", "middle left"),
    *("top right", "top left", "bottom right", "bottom left"),
)
LETTER, LINE, GAP = 0.026, 0.06, 0.04
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
    gain = with_error(row["difference"], row["difference_standard_error"], sign="+") if "difference" in row else ""
    return [
        escape(row["name"]),
        with_error(row["test_accuracy"], row["test_standard_error"]),
        gain,
        f"{row['macs'] / 1e6:.2f}" if row["macs"] else "",
        f"{row['params']:,}" if row["params"] else "",
        escape(str(row.get("architecture") or row["network"])),
    ]


def _extra(column: int) -> str:
    """The class of columns that a narrow screen leaves out."""
    return ' class="extra"' if column >= NARROW else ""


def label_places(names: Sequence[str], x: Sequence[float], y: Sequence[float], ends: tuple[float, float]) -> list[str]:
    """Where the name of each mark goes, as plotly's textposition: in the picture, off the other names and marks.

    The picture reaches from 0 to `ends[0]` across and from `ends[1]` up to the highest mark.
    """
    most, least = ends
    height = max(max(y) - least, 1e-9)
    at = [(a / most, (b - least) / height) for a, b in zip(x, y, strict=True)]
    taken = [(a - GAP, b - GAP, a + GAP, b + GAP) for a, b in at]
    places = []
    for name, (a, b) in zip(names, at, strict=True):
        boxes = {place: label_box(place, LETTER * len(name), a, b) for place in PLACES}
        place = min(boxes, key=lambda place: _outside(boxes[place]) + sum(_overlap(boxes[place], o) for o in taken))
        taken.append(boxes[place])
        places.append(place)
    return places


def label_box(place: str, width: float, x: float, y: float) -> Box:
    """The box of a name beside a mark at (x, y), as shares of the picture: left, bottom, right, top."""
    level, side = place.split()
    left = {"left": x - GAP - width, "center": x - width / 2, "right": x + GAP}[side]
    bottom = {"bottom": y - GAP - LINE, "middle": y - LINE / 2, "top": y + GAP}[level]
    return left, bottom, left + width, bottom + LINE


def _outside(box: Box) -> float:
    """How far a box reaches out of the sides of the picture; plotly makes room above and below."""
    return max(0.0, -box[0]) + max(0.0, box[2] - 1.0)


def _overlap(one: Box, other: Box) -> float:
    """The area of the overlap of two boxes, in lines of text: comparable to `_outside`."""
    width = min(one[2], other[2]) - max(one[0], other[0])
    height = min(one[3], other[3]) - max(one[1], other[1])
    return max(0.0, width) * max(0.0, height) / LINE
