"""Charts of how good the winner is at each class: accuracies with their uncertainty, and what is taken for what."""

from __future__ import annotations

from engine.report.chart import FULL, SOFT, Chart, Json, axis, percent
from engine.search.class_scores import confusions, load
from engine.search.comparison import with_error
from engine.search.runs import Run

BARS = 40  # classes that have a bar, the worst first
SQUARE, COUNTED = 100, 15  # classes of the largest matrix that is drawn, and of the largest with its counts written in
ROW = 22  # pixels of a bar


def class_charts(run: Run) -> list[Chart]:
    """The two charts; empty, with the command that fills them, if the winner's classes were not scored."""
    titles = {"class-accuracy": "Accuracy by class", "confusion": "What is taken for what"}
    winner = run.final or run.best if run.result else None
    if winner is None:
        return [Chart(name, title, "The run has no winner yet.") for name, title in titles.items()]
    tested = load(run.folder, winner, "test")
    found = tested or load(run.folder, winner, "valid")
    if found is None:
        missing = f"The winner's classes were not scored; do so with: cli.py eval {run.folder} --split test"
        return [Chart(name, title, missing) for name, title in titles.items()]
    about = (
        f"{with_error(found['accuracy'], found['standard_error'])} % of "
        f"{found['images']:,} {'test' if tested else 'validation'} images are classified right by the winner"
        + (" after its final training." if run.final else ".")
    )
    return [_accuracies(titles["class-accuracy"], found, about), _matrix(titles["confusion"], found)]


def _accuracies(title: str, found: Json, about: str) -> Chart:
    rows = sorted((row for row in found["classes"] if row["images"]), key=lambda row: row["accuracy"])
    shown = rows[:BARS][::-1]  # the first is drawn at the bottom
    exact = [percent(row["accuracy"]) for row in shown]
    bars = {
        "type": "bar",
        "orientation": "h",
        "x": exact,
        "y": [row["name"] for row in shown],
        "text": [f"{row['right']:,} of {row['images']:,}" for row in shown],
        "textposition": "none",
        "marker": {"color": FULL},
        "error_x": {
            "type": "data",
            "symmetric": False,
            "array": [percent(row["interval"][1] - row["accuracy"]) for row in shown],
            "arrayminus": [percent(row["accuracy"] - row["interval"][0]) for row in shown],
            "color": SOFT,
            "thickness": 1,
            "width": 3,
        },
        "hovertemplate": "<b>%{y}</b><br>%{x:.1f} %, %{text}<extra></extra>",
    }
    left_out = f" The {len(rows) - BARS:,} best classes are left out." if len(rows) > BARS else ""
    layout = {
        "xaxis": axis("images of the class that are classified right, %", range=[0, 100]),
        "yaxis": axis("", automargin=True, type="category", dtick=1),
        "showlegend": False,
        "bargap": 0.3,
    }
    caption = f"{about} The lines are 95 % intervals (Wilson).{left_out}"
    return Chart("class-accuracy", title, caption, [bars], layout, height=110 + ROW * len(shown))


def _matrix(title: str, found: Json) -> Chart:
    names, counts = [row["name"] for row in found["classes"]], found["confusion"]
    mistakes = [f"{true} taken for {given} ({count:,})" for count, true, given in confusions(found)[:5]]
    most = f"Most frequent confusions: {', '.join(mistakes)}." if mistakes else "No image is given a wrong class."
    if len(names) > SQUARE:
        return Chart("confusion", title, f"{most} A matrix of {len(names):,} classes is too large to draw.")
    shares = [[percent(count / max(1, sum(row))) for count in row] for row in counts]
    cells = {
        "type": "heatmap",
        "z": shares,
        "x": names,
        "y": names,
        "text": counts,
        "zmin": 0,
        "zmax": 100,
        "colorscale": [[0, "var(--card)"], [1, FULL]],
        "colorbar": {"title": {"text": "%"}, "thickness": 10, "outlinewidth": 0},
        "xgap": 1,
        "ygap": 1,
        "hovertemplate": "<b>%{y}</b> taken for <b>%{x}</b><br>%{text} images, %{z:.1f} %<extra></extra>",
        **({"texttemplate": "%{text}"} if len(names) <= COUNTED else {}),
    }
    few = {"dtick": 1} if len(names) <= BARS else {}
    layout = {
        "xaxis": axis("given class", type="category", automargin=True, **few),
        "yaxis": axis("true class", type="category", automargin=True, autorange="reversed", **few),
    }
    height = 160 + min(26, 600 // len(names) + 8) * len(names)
    return Chart("confusion", title, f"Shares of each true class. {most}", [cells], layout, height=height)
