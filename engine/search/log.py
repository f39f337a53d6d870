"""Logs the metrics of a search to TensorBoard's event files or an MLflow server.

The log follows the journal: a resumed search logs its old evaluations again, and each appears only once.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

from engine.config import SearchConfig, config_to_dict, flatten
from engine.run_folder import RunFolder
from engine.tasks import Activity, TeacherFacts
from engine.trial import Curve, EnvironmentUnusable, Evaluation, not_installed

LogKind = Literal["none", "tensorboard", "mlflow"]
Metrics = dict[str, float]


def _ignore(news: Any) -> None:
    """Logs nothing."""


def _no_curve(name: str, epoch: int, when: float, values: Metrics) -> None:
    """Logs no curve."""


@dataclass(frozen=True)
class Log:
    """What a log is told, from any thread; by default, it keeps nothing."""

    evaluated: Callable[[Evaluation], None] = _ignore
    running: Callable[[Sequence[Activity]], None] = _ignore
    teacher: Callable[[TeacherFacts], None] = _ignore


@dataclass(frozen=True)
class Destination:
    """Where metrics go: `send` takes (trial number, seconds since 1970, metrics) of an evaluation, `send_epoch` (name
    of a training, epochs done, seconds since 1970, metrics); `end_training` takes the name of one that has no more."""

    send: Callable[[int, float, Metrics], None]
    send_epoch: Callable[[str, int, float, Metrics], None]
    end_training: Callable[[str], None]


COSTS = ("images_per_s", "peak_memory_bytes")

log = logging.getLogger(__name__)


@contextmanager
def open_log(kind: LogKind, config: SearchConfig, folder: RunFolder) -> Iterator[Log]:
    """A log; steps are trial numbers, and in the curves of trainings, epochs.

    Raises EnvironmentUnusable if the library is missing or the server does not answer. After a later failure the search
    goes on without a log, and says so once.
    """
    if kind == "none":
        yield Log()
        return
    with (_tensorboard if kind == "tensorboard" else _mlflow)(config, folder) as destination:
        sender = _Sender(destination, config)
        try:
            yield Log(sender.evaluated, sender.running, sender.teacher)
        finally:
            sender.close()


def metrics(evaluation: Evaluation) -> Metrics:
    """The metrics of an evaluation: FIDELITY/accuracy (0..1) and its costs, or FIDELITY/failed."""
    fidelity = evaluation.trial.fidelity.name
    if not evaluation.ok:
        return {f"{fidelity}/failed": 1.0}
    costs = {name: evaluation.costs[name] for name in COSTS if name in evaluation.costs}
    values = {"accuracy": evaluation.accuracy, "seconds": evaluation.seconds, "macs": float(evaluation.macs), **costs}
    readouts = {"cross_entropy": evaluation.cross_entropy, "agreement": evaluation.agreement}
    values |= {name: value for name, value in readouts.items() if value is not None}
    return {f"{fidelity}/{name}": value for name, value in values.items()}


class _Sender:
    """Sends metrics to a destination: evaluations with the best full accuracy so far, and each epoch of a curve once.

    They come from several threads; a lost server must not stop them.
    """

    def __init__(self, destination: Destination, config: SearchConfig) -> None:
        self._destination, self._config = destination, config
        self._lock, self._best, self._lost = threading.Lock(), 0.0, False
        self._epochs: dict[str, int] = {}  # that were sent, by training

    def evaluated(self, evaluation: Evaluation) -> None:
        self._send(lambda: self._send_evaluation(evaluation))

    def running(self, activities: Sequence[Activity]) -> None:
        def send() -> None:
            for one in activities:
                self._send_curve(training_name(one.phase, one.numbers, one.networks), one.curve, one.at, 0.0)

        self._send(send)

    def teacher(self, facts: TeacherFacts) -> None:
        self._send(lambda: self._send_curve("teacher", facts.curve, time.time() - facts.seconds, facts.seconds))

    def close(self) -> None:
        with self._lock:
            self._lost = True

    def _send(self, work: Callable[[], None]) -> None:
        with self._lock:
            try:
                if not self._lost:
                    work()
            except Exception as error:
                self._lost = True
                log.warning("metrics are no longer logged: %s; the journal goes on", error)

    def _send_evaluation(self, evaluation: Evaluation) -> None:
        trial, values = evaluation.trial, metrics(evaluation)
        if evaluation.ok and trial.fidelity == self._config.high:
            self._best = max(self._best, evaluation.accuracy)
            values["best/accuracy"] = self._best
        when = evaluation.started + evaluation.seconds if evaluation.started else time.time()
        self._destination.send(trial.number, when, values)
        name = training_name(trial.fidelity.name, (trial.number,), (str(trial.architecture),))
        self._send_curve(name, evaluation.curve, evaluation.started, evaluation.seconds)
        self._destination.end_training(name)

    def _send_curve(self, name: str, curve: Curve, started: float, seconds: float) -> None:
        """Sends the epochs of a curve that are new, spread evenly over the seconds of the training."""
        sent = self._epochs.get(name, 0)
        for epoch, (loss, accuracy) in enumerate(curve[sent:], sent + 1):
            values = {"training/loss": loss} | ({} if accuracy is None else {"training/valid_accuracy": accuracy})
            self._destination.send_epoch(name, epoch, started + seconds * epoch / len(curve), values)
        self._epochs[name] = max(sent, len(curve))


def training_name(phase: str, numbers: Sequence[int], networks: Sequence[str]) -> str:
    """The name of a training's curves: its fidelity, trial and architecture; that of a teacher is its phase."""
    return f"{phase} {numbers[0]:03} {networks[0]}" if numbers else phase


@contextmanager
def _tensorboard(config: SearchConfig, folder: RunFolder) -> Iterator[Destination]:
    """Event files below RUN/tensorboard, rewritten by each call of the search: one, and one for each training."""
    try:
        from tensorboard.compat.proto.event_pb2 import Event
        from tensorboard.compat.proto.summary_pb2 import Summary
        from tensorboard.summary.writer.event_file_writer import EventFileWriter
    except ImportError:
        raise not_installed("--log tensorboard needs TensorBoard", "tensorboard") from None
    events = folder.tensorboard
    for old in events.rglob("events.out.tfevents.*"):
        old.unlink()
    writers = {"": EventFileWriter(str(events), flush_secs=5)}

    def send_epoch(name: str, step: int, when: float, values: Metrics) -> None:
        if name not in writers:
            writers[name] = EventFileWriter(str(events / name), flush_secs=5)
        summary = Summary(value=[Summary.Value(tag=tag, simple_value=value) for tag, value in values.items()])
        writers[name].add_event(Event(wall_time=when, step=step, summary=summary))

    def end_training(name: str) -> None:
        if name in writers:  # each has a thread and an open file
            writers.pop(name).close()

    try:
        yield Destination(partial(send_epoch, ""), send_epoch, end_training)
    finally:
        for writer in writers.values():
            writer.close()


@contextmanager
def _mlflow(config: SearchConfig, folder: RunFolder) -> Iterator[Destination]:
    """A run in MLflow's experiment "mfkd" at MLFLOW_TRACKING_URI; RUN/mlflow.txt keeps its id."""
    try:
        from mlflow import MlflowClient
        from mlflow.entities import Metric, Param
    except ImportError:
        raise not_installed("--log mlflow needs MLflow's client", "mlflow") from None
    try:
        client = MlflowClient()
        run_id = _mlflow_run(client, folder)
        client.log_batch(run_id, params=[Param(key, str(value)) for key, value in flatten(config_to_dict(config))])
        logged = _logged_steps(client, run_id)
    except Exception as error:
        raise EnvironmentUnusable(
            f"MLflow does not answer ({error}); set MLFLOW_TRACKING_URI to your server, or leave --log mlflow out"
        ) from error

    def send(step: int, when: float, values: Metrics) -> None:
        if step not in logged:
            client.log_batch(run_id, [Metric(name, v, round(1000 * when), step) for name, v in values.items()])

    status = "KILLED"  # the search stopped early and can be resumed
    try:
        yield Destination(send, _no_curve, _ignore)
        status = "FINISHED"
    finally:
        try:
            client.set_terminated(run_id, status)
        except Exception as error:
            log.warning("cannot mark the run as ended in MLflow: %s", error)


def _mlflow_run(client: Any, folder: RunFolder) -> str:
    """The id of this search's run on the server, from an earlier call or new."""
    kept = folder.mlflow_id
    if kept.exists():
        run_id = kept.read_text().strip()
        client.update_run(run_id, "RUNNING")
        return run_id
    experiment = client.get_experiment_by_name("mfkd")
    number = experiment.experiment_id if experiment else client.create_experiment("mfkd")
    run_id = str(client.create_run(number, run_name=folder.path.name).info.run_id)
    kept.write_text(run_id + "\n")
    return run_id


def _logged_steps(client: Any, run_id: str) -> set[int]:
    """The trial numbers whose metrics are on the server."""
    names = [name for name in client.get_run(run_id).data.metrics if name.endswith(("/accuracy", "/failed"))]
    return {metric.step for name in names for metric in client.get_metric_history(run_id, name)}
