"""Accuracy by class and confusion matrix: the numbers, the table in a terminal, the record, the charts."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from plotly import graph_objects
from scipy import stats

from engine.report.class_charts import class_charts
from engine.run_folder import RunFolder
from engine.search import class_scores, runs
from engine.training.train import confusion


def random_scores(classes: int, images: int = 20) -> dict[str, object]:
    """The scores of a network that is right two times out of three, on some images of each class."""
    rng = np.random.default_rng(classes)
    labels = np.repeat(np.arange(classes), images)
    predicted = np.where(rng.random(len(labels)) < 2 / 3, labels, rng.integers(0, classes, len(labels)))
    names = [f"class number {place} of this data set" for place in range(classes)]
    return class_scores.class_scores(names, confusion(labels, predicted, classes))


def test_the_scores_are_those_of_the_matrix() -> None:
    counts = confusion(np.array([0, 0, 0, 1, 1, 3]), np.array([0, 0, 1, 1, 0, 3]), 4)
    assert counts == [[2, 1, 0, 0], [1, 1, 0, 0], [0, 0, 0, 0], [0, 0, 0, 1]]
    found = class_scores.class_scores(["a", "b", "c", "d"], counts)
    assert (found["images"], found["accuracy"]) == (6, 4 / 6)
    assert found["standard_error"] == pytest.approx((4 / 6 * 2 / 6 / 6) ** 0.5)
    assert [row["accuracy"] for row in found["classes"]] == [2 / 3, 0.5, None, 1.0]
    assert [row["precision"] for row in found["classes"]] == [2 / 3, 0.5, None, 1.0]
    assert class_scores.confusions(found) == [(1, "a", "b"), (1, "b", "a")]


@pytest.mark.parametrize(("right", "images"), [(0, 5), (5, 5), (18, 20), (700, 1000)])
def test_the_interval_is_wilsons(right: int, images: int) -> None:
    known = stats.binomtest(right, images).proportion_ci(0.95, "wilson")
    assert class_scores.wilson(right, images) == pytest.approx((known.low, known.high), abs=1e-4)


@pytest.mark.parametrize("classes", [2, 3, 12, 100])
def test_the_table_fits_a_terminal(classes: int) -> None:
    scores = random_scores(classes)
    lines = list(class_scores.table(scores, 80))
    assert max(map(len, lines)) <= 80
    assert len(lines) <= 45
    worst = min(scores["classes"], key=lambda row: row["accuracy"])  # type: ignore[attr-defined]
    assert f"{worst['right']:,} of {worst['images']:>5}" in lines[1]
    square = any(line.startswith("true / given") for line in lines)
    assert square or any("taken for" in line and line.startswith("  ") for line in lines[5:])
    assert square == (classes <= 3)  # the columns of twelve do not fit beside names of 20 characters


def test_the_record_is_that_of_one_training(finished_run: Path, tmp_path: Path) -> None:
    folder, (one, other, *_) = RunFolder(tmp_path), runs.open_run(str(finished_run)).answers
    scores = random_scores(3)
    class_scores.save(folder, one, "test", scores)
    class_scores.save(folder, one, "valid", random_scores(2))
    found = class_scores.load(folder, one, "test")
    assert found is not None
    assert found["confusion"] == scores["confusion"]
    assert class_scores.load(folder, other, "test") is None
    folder.class_scores.write_text("{")
    assert class_scores.load(folder, one, "test") is None


@pytest.mark.parametrize("classes", [3, 30, 300])
def test_the_charts_draw_any_number_of_classes(classes: int, finished_run: Path, tmp_path: Path) -> None:
    shutil.copytree(finished_run, tmp_path / "run")
    run = runs.open_run(str(tmp_path / "run"))
    assert run.best is not None
    class_scores.save(run.folder, run.best, "test", random_scores(classes))
    bars, matrix = class_charts(run)
    assert len(bars.data[0]["x"]) == min(classes, 40)
    assert ("best classes are left out" in bars.caption) == (classes > 40)
    assert bool(matrix.data) == (classes <= 100)
    assert "taken for" in matrix.caption
    for chart in (bars, matrix):
        graph_objects.Figure(data=chart.data, layout=chart.layout)  # raises if plotly does not know a property
        json.dumps(chart.data)
    run.folder.class_scores.unlink()
    assert [chart.data for chart in class_charts(run)] == [[], []]
    assert f"cli.py eval {run.folder} --split test" in class_charts(run)[0].caption
