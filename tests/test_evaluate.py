"""A worker's tasks, on tiny data: scores, statuses, weights on disk, teachers."""

from __future__ import annotations

import dataclasses
import json
import resource
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from engine import orders
from engine.config import Study, to_dict
from engine.networks import count_cost
from engine.training import evaluate, teacher
from engine.training.checkpoint import Progress
from engine.trial import (
    Architecture,
    Drained,
    Evaluation,
    Fidelity,
    Trial,
    UsageError,
    evaluation_from_json,
    trial_to_json,
)

SPACE = "nasbench201:channels=4,cells=1"
LOW = Fidelity("low", Fraction(1, 2), 2, kd_loss="kd+at")
HIGH = Fidelity("high", epochs=3)
ARCHITECTURES = [Architecture((3, 1, 2, 0, 3, 1)), Architecture((0,) * 6), Architecture((4, 3, 3, 1, 1, 1))]

Tasks = Callable[..., dict[str, Any]]


@pytest.fixture(scope="module")
def study(tiny_npz: Path) -> Study:
    return Study(space=SPACE, data=str(tiny_npz), batch_size=16, low=LOW, high=HIGH, teacher_epochs=2)


@pytest.fixture(scope="module")
def task(study: Study, tmp_path_factory: pytest.TempPathFactory) -> Tasks:
    """Makes tasks of a run whose teacher is trained already."""
    run_dir = tmp_path_factory.mktemp("run")
    path = str(run_dir / "teacher" / "teacher.safetensors")
    base = {"run_dir": str(run_dir), "device": "cpu", "teacher": path, "path": path}
    base |= {"network": f"{SPACE}#3-3-3-3-3-3", "pretrained": False}

    def make(changed: dict[str, Any] | None = None, **more: Any) -> dict[str, Any]:
        settings = dataclasses.replace(study, **(changed or {}))
        return json.loads(json.dumps({"study": to_dict(settings), **base, **more}))  # what crosses the wire is JSON

    evaluate.run_teacher(make())
    return make


def run(make: Tasks, trials: list[Trial], changed: dict[str, Any] | None = None) -> list[Evaluation]:
    answers = evaluate.run_trials(make(changed, trials=[trial_to_json(trial) for trial in trials]))
    return [evaluation_from_json(answer) for answer in answers]


def cohort(fidelity: Fidelity, seed: int = 0) -> list[Trial]:
    return [Trial(number, architecture, fidelity, seed) for number, architecture in enumerate(ARCHITECTURES)]


def test_a_trial_gives_a_score_and_what_it_cost(task: Tasks) -> None:
    (answer,) = run(task, cohort(LOW)[:1])
    assert answer.ok
    assert 0 <= answer.accuracy <= 1
    assert answer.macs > 0
    assert answer.params > 0
    assert {"setup", "data", "teacher", "train", "evaluate", "images_per_s", "peak_memory_bytes"} <= set(answer.costs)
    phases = sum(answer.costs[name] for name in ("setup", "data", "teacher", "train", "evaluate"))
    assert phases == pytest.approx(answer.seconds, rel=0.2)


def test_the_cost_of_an_architecture_is_counted_once(task: Tasks, monkeypatch: pytest.MonkeyPatch) -> None:
    counted: list[int] = []

    def count(network: nn.Module, resolution: int) -> tuple[int, int]:
        counted.append(resolution)
        return count_cost(network, resolution)

    monkeypatch.setattr(evaluate, "count_cost", count)
    architecture = Architecture((1, 1, 1, 1, 1, 2))
    asked = [Trial(0, architecture, *how) for how in ((LOW, 0), (LOW, 1), (HIGH, 0))]
    answers = [run(task, [trial])[0] for trial in asked]
    assert len({(answer.macs, answer.params) for answer in answers}) == 1
    assert len(counted) == 1


def test_the_score_depends_on_the_trial_and_not_on_its_mates(task: Tasks) -> None:
    together = run(task, cohort(LOW))
    alone = [run(task, [trial])[0] for trial in reversed(cohort(LOW))][::-1]
    assert [a.accuracy for a in together] == [a.accuracy for a in alone]
    assert [a.trial for a in together] == cohort(LOW)


def test_another_seed_is_another_training_and_the_same_seed_the_same(task: Tasks) -> None:
    def weights(trial: Trial) -> dict[str, Any]:
        path = evaluate.weights_path(Path(task()["run_dir"]), trial)
        path.unlink(missing_ok=True)
        run(task, [trial])
        return load_file(path)

    zero, one = cohort(HIGH)[0], cohort(HIGH, seed=1)[0]
    first, again, other = weights(zero), weights(zero), weights(one)
    assert all(first[name].equal(again[name]) for name in first)
    assert not all(first[name].equal(other[name]) for name in first)


def test_the_weights_of_a_full_evaluation_are_kept_and_tested(task: Tasks, study: Study) -> None:
    trial = cohort(HIGH)[0]
    run(task, [trial])
    path = evaluate.weights_path(Path(task()["run_dir"]), trial)
    assert path.exists()
    tested = evaluate.run_test(task(trial=trial_to_json(trial)))
    assert 0 <= tested["test_accuracy"] <= 1
    run(task, [cohort(LOW)[1]])
    assert not evaluate.weights_path(Path(task()["run_dir"]), cohort(LOW)[1]).exists()


def test_a_full_evaluation_goes_on_where_it_was_killed(task: Tasks, monkeypatch: pytest.MonkeyPatch) -> None:
    trial = Trial(0, ARCHITECTURES[2], HIGH, seed=5)
    path = evaluate.weights_path(Path(task()["run_dir"]), trial)
    (whole,) = run(task, [trial])
    weights = load_file(path)
    path.unlink()
    epochs: list[int] = []
    save = evaluate.checkpoint.save

    def die_after_two(path: Path, member: Any, progress: Progress, of: str) -> None:
        save(path, member, progress, of)
        epochs.append(progress.epochs)
        if progress.epochs == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr(evaluate.checkpoint, "save", die_after_two)
    with pytest.raises(KeyboardInterrupt):
        run(task, [trial])
    (again,) = run(task, [trial])
    assert epochs == [1, 2, 3]  # the second call trained the third epoch only
    assert again.accuracy == whole.accuracy
    assert all(weights[name].equal(value) for name, value in load_file(path).items())
    assert list(path.parent.glob("*.state.pt")) == []


@pytest.mark.parametrize(("status", "kept"), [("diverged", False), ("error", False), ("oom", True)])
def test_a_full_training_that_would_fail_again_leaves_no_state(
    task: Tasks, monkeypatch: pytest.MonkeyPatch, status: Any, kept: bool
) -> None:
    trial = Trial(0, ARCHITECTURES[1], HIGH, seed=6)
    state = evaluate.state_path(Path(task()["run_dir"]), trial)

    def fail_in_the_second_epoch(students: list[Any], *_: Any) -> None:
        evaluate.checkpoint.save(state, students[0], Progress(1))
        students[0].leave(status, "for a reason")

    monkeypatch.setattr(evaluate, "train", fail_in_the_second_epoch)
    (answer,) = run(task, [trial])
    assert (answer.status, state.exists()) == (status, kept)
    state.unlink(missing_ok=True)


CROWDED = '''
import sys
from torch import nn
from engine.networks import Staged, pooled_classifier
from engine.space import Choice, SearchSpace

ALIVE = sys.__dict__.setdefault("alive_in_a_test", [])  # the file is read anew for each network

class Net(Staged):
    """Of these, memory holds as many in training as `ROOM` says; the largest it never holds."""

    ROOM = 2

    def forward(self, images):
        if self.training:
            ALIVE.append(id(self)) if id(self) not in ALIVE else None
            if ALIVE.index(id(self)) >= self.ROOM or self.large:
                raise MemoryError("not enough memory")
        elif id(self) in ALIVE:
            ALIVE.clear()
        return super().forward(images)

def build(choices, classes, width):
    net = Net(nn.Conv2d(3, 4, 3, 2, 1), [nn.Sequential(nn.Conv2d(4, 4, 3, 2, 1), nn.ReLU())],
              nn.Sequential(*pooled_classifier(4, classes)))
    net.large = choices[0] == 5
    return net

space = SearchSpace("crowded", (Choice("size", (1, 2, 3, 4, 5, 6)),), build)
'''


def test_a_cohort_that_memory_does_not_hold_is_split_and_only_who_never_fits_is_oom(
    task: Tasks, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "crowded.py"
    file.write_text(CROWDED)
    fidelity = dataclasses.replace(LOW, kd_loss="none")
    trials = [Trial(number, Architecture((number,)), fidelity) for number in (0, 1, 2, 3, 4)]
    changed = {"space": f"{file}:space", "low": fidelity}
    sizes: list[int] = []
    attempt = evaluate._attempt
    monkeypatch.setattr(evaluate, "_attempt", lambda *a: (sizes.append(len(a[2])), attempt(*a))[1])
    answers = run(task, trials, changed)
    assert [answer.status for answer in answers] == ["ok"] * 5
    assert sizes == [4, 2, 1]
    sizes.clear()
    alone = run(task, [*trials[:1], Trial(5, Architecture((5,)), fidelity), trials[2]], changed)
    assert [answer.status for answer in alone] == ["ok", "oom", "ok"]
    assert sizes[0] == 2  # what was learnt holds for the next cohort
    assert [a.accuracy for a in alone if a.ok] == [answers[0].accuracy, answers[2].accuracy]


def test_an_answer_says_how_its_steps_ran(task: Tasks) -> None:
    (answer,) = run(task, cohort(LOW)[:1])
    assert answer.execution == "eager"


def test_a_budget_for_the_teacher_changes_no_score(task: Tasks) -> None:
    """Neither does how many students share a worker."""

    def scores(**resources: Any) -> list[float]:
        trials = [trial_to_json(trial) for trial in cohort(LOW)]
        return [answer["accuracy"] for answer in evaluate.run_trials(task(trials=trials, resources=resources))]

    without = scores(teacher_cache="0")
    assert scores(teacher_cache="1MB") == without  # some of the steps
    assert scores(teacher_cache="1GiB") == without
    assert scores(teacher_cache="1GiB", students_per_gpu="1") == without


def test_a_step_takes_the_memory_that_the_last_one_gave_back(task: Tasks) -> None:
    evaluate.run_probe(task())  # opens the worker's bench

    def faults(count: int) -> int:
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        for _ in range(count):
            torch.ones(6 * 2**20)
        return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

    faults(2)
    assert [faults(10), faults(10)][1] < 6 * 2**20 * 4 / 4096  # the pages of one of the ten


def test_memory_stays_flat(task: Tasks) -> None:
    """A worker lives as long as its search: 50 evaluations take no more than the first ones did."""

    def grown_to(count: int) -> int:
        for number in range(count):
            run(task, [Trial(0, ARCHITECTURES[number % 3], LOW, seed=number % 2)])
        return psutil.Process().memory_info().rss

    settled = grown_to(10)
    assert grown_to(50) <= 1.03 * settled


def test_a_diverged_student_is_an_evaluation(task: Tasks) -> None:
    good, _, _ = run(task, cohort(LOW))
    diverged = run(task, cohort(LOW), changed={"lr": 1e18})
    assert good.ok
    assert diverged[0].status == "diverged"
    assert "no longer finite" in diverged[0].error


def test_an_architecture_that_cannot_be_built_does_not_stop_the_others(task: Tasks) -> None:
    strange = Trial(9, Architecture((9,) * 6), LOW)
    bad, good = run(task, [strange, cohort(LOW)[0]])
    assert (bad.status, good.status) == ("error", "ok")
    assert "must be 0 to 4" in bad.error


def test_a_missing_teacher_is_an_evaluation_with_its_reason(task: Tasks) -> None:
    trials = [trial_to_json(trial) for trial in cohort(LOW)]
    answers = evaluate.run_trials(task(trials=trials, teacher="nowhere.safetensors"))
    assert [a["status"] for a in answers] == ["error"] * 3
    assert "no teacher file nowhere" in answers[0]["error"]


def test_a_small_part_is_one_batch(task: Tasks) -> None:
    tiny = dataclasses.replace(LOW, fraction=Fraction(1, 12))
    (answer,) = run(task, [Trial(0, ARCHITECTURES[0], tiny)])
    assert answer.ok


def test_width_and_resolution_are_fidelities(task: Tasks) -> None:
    wide = dataclasses.replace(LOW, width=2.0, resolution=8)
    (full,), (answer,) = run(task, cohort(LOW)[:1]), run(task, [Trial(0, ARCHITECTURES[0], wide)])
    assert answer.ok
    assert answer.params > 3 * full.params  # twice as wide
    assert answer.macs < 1.1 * full.macs  # at a quarter of the pixels


def test_a_teacher_is_trained_once_and_says_what_it_is(task: Tasks, study: Study) -> None:
    path = Path(task()["path"])
    before = path.stat().st_mtime_ns
    evaluate.run_teacher(task())
    assert path.stat().st_mtime_ns == before
    card = teacher.read_card(path)
    assert card.network == f"{SPACE}#3-3-3-3-3-3"
    assert card.epochs == study.teacher_epochs
    assert len(card.losses) == study.teacher_epochs
    assert 0 < card.losses[-1] < card.losses[0]  # means of an epoch, falling


def test_a_teacher_of_another_split_is_told(task: Tasks) -> None:
    assert not evaluate.run_teacher(task())["elsewhere"]
    assert evaluate.run_teacher(task({"seed": 1}))["elsewhere"], "it knows some of what is a validation image now"


def test_a_teacher_in_training_stops_after_its_epoch_and_goes_on_to_the_same_end(task: Tasks, tmp_path: Path) -> None:
    """Another training that is to end in the same file begins anew; settings that it does not depend on may change."""
    path, folder = tmp_path / "t.safetensors", orders.give(tmp_path)
    others: list[dict[str, Any]] = [{"lr": 0.01}, {}, {"low": dataclasses.replace(LOW, epochs=5), "kd_weight": 2.0}]
    another, asked, compared = (task(changed, path=str(path), orders=str(folder)) for changed in others)
    orders.drain(folder)
    for this in (another, asked):
        with pytest.raises(Drained, match="epoch 1 of 2"):
            evaluate.run_teacher(this)
    evaluate.run_teacher(compared)
    card, unbroken = teacher.read_card(path), teacher.read_card(Path(task()["path"]))
    assert (card.accuracy, card.losses) == (unbroken.accuracy, unbroken.losses)
    assert all(load_file(task()["path"])[name].equal(value) for name, value in load_file(path).items())
    assert list(tmp_path.glob("*.state.pt")) == []


def test_a_teacher_of_other_classes_is_refused(task: Tasks, tmp_path: Path) -> None:
    network = teacher.build(f"{SPACE}#3-3-3-3-3-3", classes=5, resolution=16)
    card = dataclasses.replace(teacher.read_card(Path(task()["path"])), classes=tuple("abcde"))
    teacher.save(tmp_path / "five.safetensors", network, card)
    with pytest.raises(UsageError, match="knows 5 classes, the data has 3"):
        evaluate.run_teacher(task(path=str(tmp_path / "five.safetensors")))


def test_the_probe_tells_the_driver_what_it_needs(task: Tasks) -> None:
    facts = evaluate.run_probe(task())
    assert (len(facts["classes"]), facts["resolution"]) == (3, 16)
    assert facts["images"]["train"] + facts["images"]["valid"] == 120
