"""The report: what its charts show, and that the page is self-contained. test_report_browser.py opens the page."""

from __future__ import annotations

import csv
import itertools
import json
import re
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from plotly import graph_objects

import cli
from engine.report import accuracy_charts, front_section
from engine.report.architecture_drawing import draw
from engine.report.final_trainings import LETTER, label_box, label_places
from engine.report.prediction_charts import learned_to_trust, predicted_against_measured
from engine.report.training_charts import spans_of, timeline
from engine.search import runs
from engine.search.front import FrontMember, front
from engine.search.predictions import load_predictions
from engine.spaces.load import load_space
from engine.trial import Architecture

CHARTS = ["front", "incumbent", "low-full", "predicted", "calibration", "weights", "timeline", "cost", "teacher"]
CHARTS += ["class-accuracy", "confusion"]


@pytest.fixture
def copy(finished_run: Path, tmp_path: Path) -> Path:
    shutil.copytree(finished_run, tmp_path / "run")
    return tmp_path / "run"


def reported(folder: Path, capsys: pytest.CaptureFixture[str]) -> dict[str, Any]:
    assert cli.main(["report", str(folder)]) == 0
    found: dict[str, Any] = json.loads(capsys.readouterr().out)
    return found


def test_the_page_has_every_chart_and_is_self_contained(copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = reported(copy, capsys)
    assert found["charts"] == CHARTS
    assert found["left_out"] == {}
    page = (copy / "report" / "index.html").read_text()
    ours = page[: page.index("plotly.js v")] + page[page.rindex("<script>") :]
    assert re.findall(r"""(?:src|href)\s*=\s*["'](?!data:)""", ours) == []
    assert "@import" not in ours
    assert "default-src 'none'" in page  # forbids all requests
    assert "87.65 \N{PLUS-MINUS SIGN} 1.0 %" in page  # the winner's test accuracy
    assert "The search was worth it: &lt;it&gt; was." in page
    assert "90.1 \N{PLUS-MINUS SIGN} 1.2" in page  # after its final training
    assert "+2.1 \N{PLUS-MINUS SIGN} 0.8" in page  # its difference from a baseline
    assert "<td>unlucky network</td><td>oom</td>" in page
    drawn = json.loads(page.split('id="charts">')[1].split("</script>")[0])
    for chart in drawn:
        graph_objects.Figure(data=chart["data"], layout=chart["layout"])  # raises if plotly does not know a property


def test_the_csv_holds_every_evaluation(copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    reported(copy, capsys)
    rows = list(csv.DictReader((copy / "report" / "trials.csv").open()))
    answers = runs.open_run(str(copy)).answers
    assert [(int(r["number"]), r["architecture"]) for r in rows] == [
        (e.trial.number, str(e.trial.architecture)) for e in answers
    ]


def test_text_of_a_failure_is_escaped(copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    reported(copy, capsys)
    page = (copy / "report" / "index.html").read_text()
    assert "no memory left </script>" not in page
    assert r"no memory left &lt;/script&gt;" in page


def test_a_report_that_cannot_be_written(copy: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    (copy / "report").write_text("in the way")
    assert cli.main(["report", str(copy)]) == 3
    assert "choose another folder with --out" in capsys.readouterr().err
    assert cli.main(["report", str(copy), "--out", str(tmp_path / "elsewhere")]) == 0
    assert (tmp_path / "elsewhere" / "index.html").is_file()


def test_a_run_that_has_just_started_has_a_report(copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """One answer, no result, no teacher: the report says what cannot be drawn yet."""
    lines = (copy / "journal.jsonl").read_text().splitlines(keepends=True)
    first = next(i for i, line in enumerate(lines) if "answered" in line)
    (copy / "journal.jsonl").write_text("".join(lines[: first + 1]))
    shutil.rmtree(copy / "teacher")
    found = reported(copy, capsys)
    assert found["charts"] == ["timeline", "cost"]
    assert "No full-fidelity evaluation" in found["left_out"]["incumbent"]
    assert "Architectures with both scores: 0" in found["left_out"]["low-full"]
    assert "weights file is missing" in found["left_out"]["teacher"]


def test_an_empty_run_is_refused(copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (copy / "journal.jsonl").write_text('{"journal":1}\n')
    assert cli.main(["report", str(copy)]) == 2
    assert "has no evaluations yet" in capsys.readouterr().err


def test_the_curve_of_the_best_rises_with_the_cost(finished_run: Path) -> None:
    run = runs.open_run(str(finished_run))
    step, full, low = accuracy_charts.incumbent(run).data
    assert step["y"] == sorted(step["y"])
    assert step["y"][-1] == max(full["y"])
    spent = sum(e.seconds for e in run.answers) + 60.0  # the teacher's training
    assert step["x"][-1] == pytest.approx(spent / 60)
    assert len(low["x"]) == len(run.at(run.plan.lows[0]))


def test_rank_correlations_come_with_their_intervals(finished_run: Path) -> None:
    chart = accuracy_charts.low_against_full(runs.open_run(str(finished_run)))
    number = r"-?\d\.\d\d \[-?\d\.\d\d, -?\d\.\d\d\]"
    assert re.search(f"Kendall's tau {number} over \\d+ architectures; with MACs held fixed {number};", chart.caption)


def test_a_point_of_the_front_leads_to_its_network_its_numbers_and_how_to_export_it(finished_run: Path) -> None:
    run = runs.open_run(str(finished_run))
    found = front_section.front_data(run)
    assert found is not None
    assert (found["cost"], list(found["costs"])) == ("macs", ["macs", "params"])
    axis = found["costs"]["macs"]
    on_front = [found["networks"][place] for place in axis["front"]]
    assert [one["architecture"] for one in on_front] == [str(member.architecture) for member in run.front]
    for place, member in zip(axis["front"], run.front, strict=True):
        network = found["networks"][place]
        assert axis["x"][place] == pytest.approx(member.macs / 1e6)
        assert network["accuracy"] == pytest.approx(100 * member.valid_accuracy)
        assert network["drawing"] == draw(load_space(run.config.space), member.architecture)
        assert network["command"].endswith(f"export {finished_run} --arch {member.architecture}")
        assert network["how"] == "Trained for 20 epochs with seed 0; scored on 20 validation images."
    (shown,) = [t for t in front_section.front_chart(run).data if t["meta"] == "macs" and t["name"] == "on the front"]
    assert shown["customdata"] == axis["front"]
    assert shown["error_y"]["array"] == pytest.approx([100 * member.valid_standard_error for member in run.front])
    winner = found["networks"][found["chosen"]]
    assert run.result is not None
    assert winner["architecture"] == run.result["winner"]["architecture"]


def test_the_panel_says_what_beats_a_network_and_whether_that_is_within_the_error(finished_run: Path) -> None:
    run = runs.open_run(str(finished_run))

    def network(name: str, accuracy: float, macs: int, error: float) -> FrontMember:
        one = run.trained[0]
        standing = {"valid_accuracy": accuracy, "valid_standard_error": error, "macs": macs}
        return replace(one, architecture=Architecture.parse(name), **standing)

    cheap, better, worse = network("0", 0.5, 10, 0.01), network("1", 0.7, 20, 0.01), network("2", 0.6, 40, 0.01)
    close = network("3", 0.71, 40, 0.01)
    trained = [close, worse, better, cheap]
    members = front(trained, "macs")
    said = [front_section.standing(member, members, "macs") for member in (cheap, better, close, worse)]
    assert said[0] == "On the front: its cheapest member."
    assert said[1] == "On the front, and clearly more accurate than every cheaper member of it."
    assert said[2].startswith("On the front, but within the error of 1, at 0.50 times the MACs: the difference of 1.00")
    assert said[3] == "Not on the front: 3 is 11.00 points better (clearly), at 1.00 times the MACs."


def test_the_report_says_why_the_winner_is_not_the_highest_dot(finished_run: Path) -> None:
    run = runs.open_run(str(finished_run))
    assert run.result is not None
    highest = max(run.trained, key=lambda member: member.valid_accuracy).architecture
    other = next(str(member.architecture) for member in run.trained if member.architecture != highest)

    def caption(winner: str) -> str:
        result = run.result or {}
        return front_section.front_chart(replace(run, result={**result, "winner": {"architecture": winner}})).caption

    assert f"The winner is not the highest dot, {highest}: the best of several" in caption(other)
    assert "not the highest dot" not in caption(str(highest))


def test_the_finished_winner_and_its_baselines_are_named_in_the_picture(finished_run: Path) -> None:
    run = runs.open_run(str(finished_run))
    chart = front_section.front_chart(run)
    (shown,) = [trace for trace in chart.data if trace["meta"] == "macs" and trace["name"] == "final"]
    assert shown["text"] == ["finished winner", "largest within the limits", "largest network"]
    assert shown["y"] == pytest.approx([90.12, 88.02, 88.02])
    assert shown["error_y"]["array"] == pytest.approx([1.23] * 3)
    assert run.result is not None
    assert shown["x"][2] == pytest.approx(2 * run.result["winner"]["macs"] / 1e6)
    assert "on the test images, after the final training" in chart.caption
    without = {key: value for key, value in run.result.items() if key not in ("final", "baselines", "verdict")}
    plain = front_section.front_chart(replace(run, result=without))  # as an earlier version wrote it
    assert "final" not in {trace["name"] for trace in plain.data}


@pytest.mark.parametrize(
    ("x", "y"),
    [
        ([8.5, 10.2, 17.0], [90.1, 88.0, 88.0]),
        ([0.6, 0.7, 1.2], [88.0, 88.0, 88.0]),
        ([1.0, 2.0, 1.9], [50.0, 70.0, 80.0]),
    ],
)
def test_names_in_the_picture_stay_apart(x: list[float], y: list[float]) -> None:
    names = ["finished winner", "largest within the limits", "largest network"]
    ends = (max(x), min(y) - 25)
    places = label_places(names, x, y, ends)
    scaled = [(a / ends[0], (b - ends[1]) / (max(y) - ends[1])) for a, b in zip(x, y, strict=True)]
    boxes = [
        label_box(place, LETTER * len(name), *at) for name, place, at in zip(names, places, scaled, strict=True)
    ]
    for one, other in itertools.combinations(boxes, 2):
        assert one[2] <= other[0] or other[2] <= one[0] or one[3] <= other[1] or other[3] <= one[1], (places, boxes)


def test_predictions_are_shown_against_their_outcomes(finished_run: Path) -> None:
    run = runs.open_run(str(finished_run))
    past = load_predictions(run)
    said = past.at_ask_time()
    scatter, calibration = predicted_against_measured(past)
    dots = scatter.data[1]
    assert dots["x"] == [predict.mean for predict in said.values()]
    measured = accuracy_charts.mean_percent(run.at(run.plan.high))
    order = [measured[t.architecture] for t in run.record.asked if t.number in said]
    assert sorted(range(len(order)), key=order.__getitem__) == sorted(range(len(order)), key=dots["y"].__getitem__)
    assert calibration.data[1]["y"] == sorted(calibration.data[1]["y"])


def test_the_weights_of_the_last_fit_are_drawn_with_their_intervals(finished_run: Path) -> None:
    past = load_predictions(runs.open_run(str(finished_run)))
    dots = learned_to_trust(past).data[1]
    weights = {weight.name: weight for weight in past.weights()}
    assert dots["y"] == ["low fidelity", "macs"]
    assert dots["x"] == [weights[name].mean for name in dots["y"]]
    assert dots["error_x"]["array"] == [1.645 * weights[name].std for name in dots["y"]]


def test_the_report_does_not_claim_that_another_method_asks_the_surrogate(
    copy: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def said(folder: Path) -> tuple[str, str, str]:
        run = runs.open_run(str(folder))
        past = load_predictions(run)
        assert cli.main(["explain", str(folder), "0-0-0-1-0-0"]) == 0
        told = capsys.readouterr().out
        return accuracy_charts.low_against_full(run).caption, predicted_against_measured(past)[0].caption, told

    pair, scatter, told = said(copy)
    assert "selected as promising" in pair
    assert "selected for a high prediction" in scatter
    assert "promised more" in told
    path = copy / "config.yaml"
    path.write_text(path.read_text().replace("method: mfkd", "method: random"))
    pair, scatter, told = said(copy)
    assert "were drawn at random" in pair
    assert "The method random did not ask the surrogate" in scatter
    assert "the method chose others" in told


def test_a_cohort_is_one_bar_and_pauses_between_calls_are_left_out(finished_run: Path) -> None:
    some = runs.open_run(str(finished_run)).at(runs.open_run(str(finished_run)).plan.high)[:4]
    mates = [replace(e, worker="a", started=1000.0, seconds=10.0) for e in some[:2]]
    next_day = [replace(some[2], worker="a", started=90_000.0, seconds=5.0)]
    beside = [replace(some[3], worker="b", started=1015.0, seconds=5.0)]
    spans, pauses = spans_of([*mates, *next_day, *beside])
    assert pauses == 1
    assert [(s.worker, s.start, s.seconds, len(s.members)) for s in spans] == [
        ("a", 0.0, 20.0, 2),
        ("b", 15.0, 5.0, 1),
        ("a", 20.0, 5.0, 1),
    ]


def test_evaluations_without_times_have_no_timeline(finished_run: Path) -> None:
    run = runs.open_run(str(finished_run))
    untimed = {n: replace(e, started=0.0) for n, e in run.record.answers.items()}
    chart = timeline(replace(run, record=replace(run.record, answers=untimed)))
    assert not chart.data
    assert "have no start times" in chart.caption


@pytest.mark.parametrize(
    ("space", "architecture", "shows"),
    [
        ("nasbench201", "3-0-1-4-2-3", ["conv 3x3", "skip connect", "avg pool 3x3", "2&lt;-0: none"]),
        ("mobilenetv2", "3-0-0-0-0-0-0-0-0-0-0-0-0-1", ["stage1: 4 blocks of 16 channels", "stage7: 1 blocks of 480"]),
        ("shufflenetv2", "0-0-0-0-0-0", ["stage1: ", "stage3: "]),
        ("examples/my_space.py:SPACE", "2-1-0-0-0-3-1-0-2", ["depth", '<span class="pill taken">5</span>']),
    ],
)
def test_an_architecture_of_any_space_is_drawn(space: str, architecture: str, shows: list[str]) -> None:
    root = Path(__file__).resolve().parent.parent
    spec = f"{root}/{space}" if space.endswith("SPACE") else space
    drawing = draw(load_space(spec), Architecture.parse(architecture))
    for text in shows:
        assert text in drawing


def test_a_real_search_can_be_inspected(tiny_npz: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A real search has the times and workers of evaluations, the teacher's losses, and metrics for TensorBoard."""
    flags = "--space=nasbench201:channels=4,cells=1 --batch-size=16 --teacher-epochs=2 --low.fraction=1/2 "
    flags += "--low.epochs=1 --high.epochs=1 --max-low=4 --max-high=3 --device=cpu --workers=1 --log=tensorboard"
    assert cli.main(["search", *flags.split(), f"--data={tiny_npz}", f"--run-dir={tmp_path}/run"]) == 0
    winner = json.loads(capsys.readouterr().out)["winner"]["architecture"]
    found = reported(tmp_path / "run", capsys)
    assert found["charts"] == CHARTS
    assert list((tmp_path / "run" / "tensorboard").glob("events.out.tfevents.*"))
    assert cli.main(["explain", str(tmp_path / "run"), winner, "--json"]) == 0
    explained = json.loads(capsys.readouterr().out)
    assert [one["fidelity"] for one in explained["evaluations"]].count("high") >= 1
    assert cli.main(["status", str(tmp_path / "run"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["state"] == "finished"
