"""Tasks between driver and worker: each survives its JSON form, and has a function that takes it."""

from __future__ import annotations

import dataclasses
import importlib
import json
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest

from engine import tasks
from engine.config import Resources, SearchConfig
from engine.trial import Architecture, Fidelity, Trial

LOW = Fidelity("low", Fraction(1, 27), 30, 0.5, 16, "kd+at", (("kd_temperature", 2.0),))
WORKER = tasks.WorkerSettings(SearchConfig(low=LOW), Path("/runs/a"), "cuda", Resources(workers=3))
TRIALS = (Trial(7, Architecture((3, 0, 12)), LOW, 5), Trial(8, Architecture((1,)), Fidelity("high"), 0))
MEAN, STD = (0.5, 0.4, 0.3), (0.2, 0.2, 0.1)
NORMALISATION = tasks.Normalisation(("cat", "dog"), MEAN, STD)

EXAMPLES: list[Any] = [
    WORKER,
    NORMALISATION,
    tasks.DataFacts(("cat", "dog"), 32, MEAN, STD, {"train": 80, "valid": 20}, True, "f", "cpu"),
    tasks.ProbeTask(WORKER),
    tasks.TeacherTask(WORKER, "nasbench201#3-3-3-3-3-3", Path("/t.safetensors")),
    tasks.TeacherTask(WORKER, "mine.py:NET", Path("/t.safetensors"), "import", Path("/w.safetensors"), MEAN, STD),
    tasks.TeacherFacts("timm:resnet18", 0.9, 20, 61.5, False, Path("/t.safetensors")),
    tasks.TrialsTask(WORKER, TRIALS, Path("/t.safetensors"), 90.0),
    tasks.TimingTask(WORKER, TRIALS[:1], Path("/t.safetensors"), 8.0, "timm:resnet18", "finetune"),
    tasks.StepTimes(0.2, 0.1, 0.3, 5, 32, 4),
    tasks.TimingFacts(0.5, tasks.StepTimes(0.2, 0.1, 0.3, 5, 32, 4), 1.5),
    tasks.TestTask(WORKER, TRIALS[1]),
    tasks.LatencyTask(WORKER, (Architecture((1, 2)), Architecture((0, 3)))),
    tasks.Timings((1.5, 2.0), "a phone", "onnxruntime 1.32.0", 0.01, ""),
    tasks.ExportProbeTask("nasbench201", Architecture((1, 2)), 10, 0.5, 32, Path("/probes")),
    tasks.ProxyTask(WORKER, (Architecture((1, 2)),)),
    tasks.ProxyTask(WORKER, (Architecture((1, 2)), Architecture((0, 3))), Path("/t.safetensors"), 90.0),
    tasks.ProxyScores((1, 2), {"naswot": 231.4}, {"diswot": "no teacher"}, 0.07),
    tasks.ScoreTask(WORKER, TRIALS[1], Path("/w.safetensors"), "all"),
    tasks.ScoreTask(WORKER, TRIALS[1], Path("/w.safetensors"), "valid", NORMALISATION),
    tasks.ExportTask(
        Path("/runs/a"), TRIALS[1], "nasbench201", Path("/t"), Path("/out"), NORMALISATION, 32, "cpu", {"title": "x"}
    ),
    tasks.InputFormat(NORMALISATION, 32, True),
    tasks.PredictTask(Path("/out/model.onnx"), (Path("a.jpg"), Path("b")), 3, "cpu"),
    tasks.PredictTask(
        Path("/w"), (Path("a"),), 1, "cuda", "mine.py:S", TRIALS[1], tasks.InputFormat(NORMALISATION, 32, False)
    ),
    tasks.Activity("node/0/1", "teacher", epoch=1, epochs=2, curve=((2.25, None), (1.5, 0.75)), at=1.7e9),
    tasks.Activity("node/0/2", "low", (3, 4), ("1-2", "0-3"), 3, 20, 1.25, 800.5, 61.5, at=1.7e9),
    tasks.SpaceCheckTask("nasbench201", 10, 32, "auto", 0),
]


@pytest.mark.parametrize("task", EXAMPLES, ids=lambda task: type(task).__name__)
def test_a_task_survives_json(task: Any) -> None:
    sent = json.loads(json.dumps(tasks.task_to_json(task)))
    received = tasks.task_from_json(type(task), sent)
    assert received == task
    assert tasks.task_to_json(received) == sent


def test_every_kind_of_task_and_answer_is_among_the_examples() -> None:
    kinds = {
        kind for kind in vars(tasks).values()
        if isinstance(kind, type) and dataclasses.is_dataclass(kind) and kind.__module__ == tasks.__name__
    }  # fmt: skip
    assert {type(example) for example in EXAMPLES} == kinds - {tasks.Task}


@pytest.mark.parametrize(
    ("module", "kinds"),
    [
        (
            "engine.training.run_tasks",
            [
                tasks.ProbeTask,
                tasks.TeacherTask,
                tasks.TrialsTask,
                tasks.TimingTask,
                tasks.TestTask,
                tasks.LatencyTask,
                tasks.ProxyTask,
                tasks.ScoreTask,
            ],
        ),
        ("engine.export.formats", [tasks.ExportTask]),
        ("engine.training.predict", [tasks.PredictTask]),
        ("engine.latency.probes", [tasks.ExportProbeTask]),
        ("engine.training.spacecheck", [tasks.SpaceCheckTask]),
    ],
)
def test_a_worker_has_a_function_for_each_kind_of_task(module: str, kinds: list[type[tasks.Task]]) -> None:
    functions = importlib.import_module(module)
    for kind in kinds:
        assert callable(getattr(functions, kind.function)), kind


def test_a_value_that_a_task_does_not_have_is_refused() -> None:
    sent = tasks.task_to_json(tasks.SpaceCheckTask("nasbench201", 10, 32, "auto", 0))
    with pytest.raises((KeyError, TypeError)):
        tasks.task_from_json(tasks.SpaceCheckTask, {**sent, "unknown": 1})
