"""Metrics of a search in TensorBoard's files and on an MLflow server: every evaluation is there, once."""

from __future__ import annotations

import logging
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from engine.run_folder import RunFolder
from engine.search import runs
from engine.search.log import open_log
from engine.tasks import Activity, TeacherFacts
from engine.trial import EnvironmentUnusable


@pytest.fixture(scope="module")
def run(finished_run: Path) -> runs.Run:
    return runs.open_run(str(finished_run))


def logged(folder: Path) -> Any:
    """What TensorBoard itself reads from a folder."""
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    reader = accumulator.EventAccumulator(str(folder))
    reader.Reload()
    return reader


def test_tensorboard_shows_every_evaluation_once_however_often_the_search_was_resumed(
    run: runs.Run, tmp_path: Path
) -> None:
    pytest.importorskip("tensorboard", reason="TensorBoard is not installed (extra: tensorboard)")
    for count in (4, len(run.answers)):  # a call that was interrupted, and the one that resumed it
        with open_log("tensorboard", run.config, RunFolder(tmp_path)) as log:
            for evaluation in run.answers[:count]:
                log.evaluated(evaluation)
    read = logged(tmp_path / "tensorboard")
    low = {scalar.step: scalar.value for scalar in read.Scalars("low/accuracy")}
    expected = {e.trial.number: e.accuracy for e in run.at(run.plan.lows[0])}
    assert low == pytest.approx(expected)
    best = [scalar.value for scalar in read.Scalars("best/accuracy")]
    assert best == sorted(best)
    assert best[-1] == pytest.approx(max(e.accuracy for e in run.at(run.plan.high)))
    assert [scalar.step for scalar in read.Scalars("low/failed")] == [3]
    first = run.answers[0]
    assert read.Scalars("low/accuracy")[0].wall_time == first.started + first.seconds


def test_tensorboard_shows_the_curve_of_each_training_while_it_runs_and_once(run: runs.Run, tmp_path: Path) -> None:
    """The start of a full training is seen live, the rest comes with its evaluation; a teacher's with its card."""
    evaluation = replace(run.at(run.plan.high)[0], curve=((2.0, 0.25), (1.5, None), (1.25, 0.5)))
    number, network = evaluation.trial.number, str(evaluation.trial.architecture)
    live = Activity("node/0/0", "high", (number,), (network,), 1, 3, curve=evaluation.curve[:1], at=1.7e9)
    facts = TeacherFacts("net", 0.9, 2, 60.0, False, Path("t"), ((3.0, None), (2.5, None)))
    with open_log("tensorboard", run.config, RunFolder(tmp_path)) as log:
        log.teacher(facts)
        for _ in range(2):
            log.running([live])
        log.evaluated(evaluation)
    log.running([live])  # from the thread that watches the workers, which may come too late
    read = logged(tmp_path / "tensorboard" / f"high {number:03} {network}")
    assert [(one.step, one.value) for one in read.Scalars("training/loss")] == [(1, 2.0), (2, 1.5), (3, 1.25)]
    assert [(one.step, one.value) for one in read.Scalars("training/valid_accuracy")] == [(1, 0.25), (3, 0.5)]
    assert [one.value for one in logged(tmp_path / "tensorboard" / "teacher").Scalars("training/loss")] == [3.0, 2.5]


def test_mlflow_has_every_evaluation_once_and_the_settings(
    run: runs.Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mlflow = pytest.importorskip("mlflow", reason="MLflow's client is not installed (extra: mlflow)")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", (tmp_path / "store").as_uri())
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    for count in (4, len(run.answers)):
        with open_log("mlflow", run.config, RunFolder(tmp_path)) as log:
            for evaluation in run.answers[:count]:
                log.evaluated(evaluation)
    client = mlflow.MlflowClient()
    run_id = (tmp_path / "mlflow.txt").read_text().strip()
    history = client.get_metric_history(run_id, "low/accuracy")
    assert len(history) == len(run.at(run.plan.lows[0]))
    kept = client.get_run(run_id)
    assert kept.info.status == "FINISHED"
    assert kept.data.params["high.epochs"] == str(run.config.high.epochs)
    assert kept.data.metrics["best/accuracy"] == max(e.accuracy for e in run.at(run.plan.high))


def test_a_log_that_fails_later_does_not_stop_the_search(
    run: runs.Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    writer = pytest.importorskip("tensorboard.summary.writer.event_file_writer").EventFileWriter

    def full(*event: object) -> None:
        raise OSError("No space left on device")

    with caplog.at_level(logging.WARNING), open_log("tensorboard", run.config, RunFolder(tmp_path)) as log:
        monkeypatch.setattr(writer, "add_event", full)
        for evaluation in run.answers:
            log.evaluated(evaluation)
    assert [record.getMessage() for record in caplog.records] == [
        "metrics are no longer logged: No space left on device; the journal goes on"
    ]


@pytest.mark.parametrize("library", ["tensorboard", "mlflow"])
def test_a_missing_library_is_reported_with_the_command_that_installs_it(
    run: runs.Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, library: Any
) -> None:
    for name in [name for name in sys.modules if name.split(".")[0] == library] + [library]:
        monkeypatch.setitem(sys.modules, name, None)
    with (
        pytest.raises(EnvironmentUnusable, match=rf"pip install -c constraints.txt -e '.\[{library}\]'"),
        open_log(library, run.config, RunFolder(tmp_path)),
    ):
        pass


def test_logging_to_tensorboard_needs_no_torch(tmp_path: Path) -> None:
    """The process that drives a search never imports torch."""
    pytest.importorskip("tensorboard", reason="TensorBoard is not installed (extra: tensorboard)")
    code = (
        "import sys; from pathlib import Path\n"
        "from engine.config import SearchConfig; from engine.run_folder import RunFolder\n"
        "from engine.search.log import open_log\n"
        f"with open_log('tensorboard', SearchConfig(), RunFolder(Path({str(tmp_path)!r}))): pass\n"
        "assert 'torch' not in sys.modules and 'tensorflow' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).resolve().parent.parent)
