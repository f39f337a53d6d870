"""Logs the metrics of a search to TensorBoard's event files or an MLflow server.

The log follows the journal: a resumed search logs its old evaluations again, and each appears only once.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Literal

from engine.config import SearchConfig, config_to_dict, flatten
from engine.run_folder import RunFolder
from engine.trial import EnvironmentUnusable, Evaluation, not_installed

LogKind = Literal["none", "tensorboard", "mlflow"]
Log = Callable[[Evaluation], None]
# Sends (trial number, seconds since 1970, metrics by name) of an evaluation to its destination.
Send = Callable[[int, float, dict[str, float]], None]

COSTS = ("images_per_s", "peak_memory_bytes")

log = logging.getLogger(__name__)


@contextmanager
def open_log(kind: LogKind, config: SearchConfig, folder: RunFolder) -> Iterator[Log]:
    """A function that logs an evaluation, to be called from any thread; steps are trial numbers.

    Raises EnvironmentUnusable if the library is missing or the server does not answer. After a later failure the search
    goes on without a log, and says so once.
    """
    if kind == "none":
        yield lambda evaluation: None
        return
    with (_tensorboard if kind == "tensorboard" else _mlflow)(config, folder) as send:
        yield _guarded(send, config)


def metrics(evaluation: Evaluation) -> dict[str, float]:
    """The metrics of an evaluation: FIDELITY/accuracy (0..1) and its costs, or FIDELITY/failed."""
    fidelity = evaluation.trial.fidelity.name
    if not evaluation.ok:
        return {f"{fidelity}/failed": 1.0}
    costs = {name: evaluation.costs[name] for name in COSTS if name in evaluation.costs}
    values = {"accuracy": evaluation.accuracy, "seconds": evaluation.seconds, "macs": float(evaluation.macs), **costs}
    readouts = {"cross_entropy": evaluation.cross_entropy, "agreement": evaluation.agreement}
    values |= {name: value for name, value in readouts.items() if value is not None}
    return {f"{fidelity}/{name}": value for name, value in values.items()}


def _guarded(send: Send, config: SearchConfig) -> Log:
    """Adds the best full accuracy so far. Evaluations come from several threads; a lost server must not stop them."""
    lock, best, lost = threading.Lock(), 0.0, False

    def received(evaluation: Evaluation) -> None:
        nonlocal best, lost
        with lock:
            values = metrics(evaluation)
            if evaluation.ok and evaluation.trial.fidelity == config.high:
                best = max(best, evaluation.accuracy)
                values["best/accuracy"] = best
            when = evaluation.started + evaluation.seconds if evaluation.started else time.time()
            try:
                if not lost:
                    send(evaluation.trial.number, when, values)
            except Exception as error:
                lost = True
                log.warning("metrics are no longer logged: %s; the journal goes on", error)

    return received


@contextmanager
def _tensorboard(config: SearchConfig, folder: RunFolder) -> Iterator[Send]:
    """An event file in RUN/tensorboard, rewritten by each call of the search."""
    try:
        from tensorboard.compat.proto.event_pb2 import Event
        from tensorboard.compat.proto.summary_pb2 import Summary
        from tensorboard.summary.writer.event_file_writer import EventFileWriter
    except ImportError:
        raise not_installed("--log tensorboard needs TensorBoard", "tensorboard") from None
    events = folder.tensorboard
    for old in events.glob("events.out.tfevents.*"):
        old.unlink()
    writer = EventFileWriter(str(events), flush_secs=5)

    def send(step: int, when: float, values: dict[str, float]) -> None:
        summary = Summary(value=[Summary.Value(tag=name, simple_value=value) for name, value in values.items()])
        writer.add_event(Event(wall_time=when, step=step, summary=summary))

    try:
        yield send
    finally:
        writer.close()


@contextmanager
def _mlflow(config: SearchConfig, folder: RunFolder) -> Iterator[Send]:
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

    def send(step: int, when: float, values: dict[str, float]) -> None:
        if step not in logged:
            client.log_batch(run_id, [Metric(name, v, round(1000 * when), step) for name, v in values.items()])

    status = "KILLED"  # the search stopped early and can be resumed
    try:
        yield send
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
