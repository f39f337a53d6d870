"""A worker's tasks on tiny data: scores, statuses, weights on disk, teachers."""

from __future__ import annotations

import dataclasses
import json
import resource
from dataclasses import replace
from fractions import Fraction
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from engine import stop_files
from engine.config import Resources, SearchConfig
from engine.networks import count_cost
from engine.run_folder import RunFolder
from engine.tasks import (
    Activity,
    DataFacts,
    ProbeTask,
    Task,
    TeacherFacts,
    TeacherTask,
    TestTask,
    TrialsTask,
    WorkerSettings,
    task_from_json,
    task_to_json,
)
from engine.training import checkpoint, context, curves, evaluate, observe, run_tasks, teacher, train
from engine.training.checkpoint import Progress
from engine.training.context import open_context
from engine.trial import (
    Architecture,
    Drained,
    Evaluation,
    Fidelity,
    Trial,
    UsageError,
    evaluation_from_json,
    hits_from_text,
)

SPACE = "nasbench201:channels=4,cells=1"
LOW = Fidelity("low", Fraction(1, 2), 2, kd_loss="kd+at")
HIGH = Fidelity("high", epochs=3)
FINAL = Fidelity("final", epochs=3, kd_loss="kd", with_valid=True)
ARCHITECTURES = [Architecture((3, 1, 2, 0, 3, 1)), Architecture((0,) * 6), Architecture((4, 3, 3, 1, 1, 1))]


class TinyRun:
    """A run folder whose teacher is trained already, and the tasks that a worker of the run is given."""

    def __init__(self, config: SearchConfig, path: Path) -> None:
        self.config, self.folder = config, RunFolder(path)
        self.teach(self.teacher_task())

    def worker(self, changed: dict[str, Any] | None = None, **resources: Any) -> WorkerSettings:
        config = dataclasses.replace(self.config, **(changed or {}))
        return WorkerSettings(config, self.folder.path, "cpu", Resources(**resources))

    def teacher_task(self, changed: dict[str, Any] | None = None, path: Path | None = None) -> TeacherTask:
        return TeacherTask(self.worker(changed), f"{SPACE}#3-3-3-3-3-3", path or self.folder.teacher)

    def teach(self, task: TeacherTask) -> TeacherFacts:
        return task_from_json(TeacherFacts, run_tasks.run_teacher(sent(task)))

    def evaluate(
        self, trials: list[Trial], changed: dict[str, Any] | None = None, teacher: Path | None = None, **resources: Any
    ) -> list[Evaluation]:
        worker = self.worker(changed, **resources)
        task = TrialsTask(worker, tuple(trials), teacher or self.folder.teacher)
        return [evaluation_from_json(answer) for answer in run_tasks.run_trials(sent(task))]


def sent(task: Task) -> dict[str, Any]:
    """A task as a worker receives it."""
    payload: dict[str, Any] = json.loads(json.dumps(task_to_json(task)))
    return payload


@pytest.fixture(scope="module")
def tiny_run(tiny_npz: Path, tmp_path_factory: pytest.TempPathFactory) -> TinyRun:
    config = SearchConfig(space=SPACE, data=str(tiny_npz), batch_size=16, low=LOW, high=HIGH, teacher_epochs=2)
    return TinyRun(config, tmp_path_factory.mktemp("run"))


def cohort(fidelity: Fidelity, seed: int = 0) -> list[Trial]:
    return [Trial(number, architecture, fidelity, seed) for number, architecture in enumerate(ARCHITECTURES)]


def test_a_trial_gives_a_score_and_its_costs(tiny_run: TinyRun) -> None:
    (answer,) = tiny_run.evaluate(cohort(LOW)[:1])
    assert answer.ok
    assert 0 <= answer.accuracy <= 1
    assert answer.macs > 0
    assert answer.params > 0
    assert {"setup", "data", "teacher", "train", "evaluate", "images_per_s", "peak_memory_bytes"} <= set(answer.costs)
    phases = sum(answer.costs[name] for name in ("setup", "data", "teacher", "train", "evaluate"))
    assert phases == pytest.approx(answer.seconds, rel=0.2)


def test_a_training_says_how_far_it_is_and_its_curve_changes_no_score(
    tiny_run: TinyRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With averaged weights, whose validation accuracy is measured after each epoch, and in a cohort without."""
    changed, trial, said = {"ema_decay": 0.9}, cohort(HIGH)[0], []
    (before,) = tiny_run.evaluate([trial], changed)
    assert [accuracy for _, accuracy in before.curve] == [None] * HIGH.epochs
    monkeypatch.setenv("MFKD_WORKER", "node/0/0")
    monkeypatch.setattr(observe, "FIRST_S", 0.0)
    monkeypatch.setattr(observe, "EVERY_S", 0.0)
    monkeypatch.setattr(observe, "write_atomically", lambda path, text: said.append((path, json.loads(text))))
    monkeypatch.setattr(curves, "SHARE", 1.0)
    tiny_run.folder.activities.mkdir(parents=True)
    try:
        task = TrialsTask(replace(tiny_run.worker(changed), curves=True), (trial,), tiny_run.folder.teacher)
        (answer,) = (evaluation_from_json(one) for one in run_tasks.run_trials(sent(task)))
        told = [task_from_json(Activity, text) for _, text in said]
        said.clear()
        tiny_run.evaluate(cohort(LOW))
    finally:
        tiny_run.folder.activities.rmdir()  # empty: nothing is left of a training that has ended
    assert (answer.accuracy, answer.cross_entropy) == (before.accuracy, before.cross_entropy)
    assert [loss for loss, _ in answer.curve] == [loss for loss, _ in before.curve]
    assert answer.curve[-1][1] == answer.accuracy  # that of the averaged weights
    assert (told[0].phase, told[0].numbers, told[0].networks) == ("high", (0,), (str(trial.architecture),))
    steps = HIGH.epochs * (96 // 16)
    assert [one.epoch for one in told[2:]] == [step * HIGH.epochs // steps for step in range(1, steps + 1)]
    assert all(one.images_per_s > 0 and one.loss is not None for one in told[2:])
    assert told[-1].seconds_left == 0
    assert told[-1].curve == answer.curve[:-1]
    last = said[-1][1]
    assert (last["phase"], last["numbers"], last["curve"]) == ("low", [0, 1, 2], [])


def test_nothing_is_reported_where_the_driver_does_not_look(
    tiny_run: TinyRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MFKD_WORKER", "node/0/0")
    monkeypatch.setattr(observe, "FIRST_S", 0.0)
    (answer,) = tiny_run.evaluate(cohort(LOW)[:1])
    assert answer.ok
    assert not tiny_run.folder.activities.exists()


def test_a_distilled_trial_also_tells_how_far_it_agrees_with_the_teacher(
    tiny_run: TinyRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The teacher classifies the validation images once per worker, not once per cohort."""
    evaluate.load_teacher.cache_clear()
    asked: list[int] = []
    monkeypatch.setattr(context, "classify", lambda *how: asked.append(1) or train.classify(*how))
    first, again = (tiny_run.evaluate(cohort(LOW)) for _ in range(2))
    assert len(asked) == 1
    for answer, same in zip(first, again, strict=True):
        assert answer.cross_entropy == same.cross_entropy > 0
        assert answer.agreement == same.agreement
        assert 0 <= answer.agreement <= 1
    (plain,) = tiny_run.evaluate(cohort(HIGH)[:1])
    assert plain.cross_entropy is not None
    assert plain.agreement is None
    assert len(asked) == 1


def test_the_teacher_agrees_with_itself(tiny_run: TinyRun) -> None:
    here = context.open_context(tiny_run.worker())
    cached = evaluate.load_teacher(tiny_run.folder.teacher, here)
    (found,) = here.score([cached.network], LOW, cached)
    assert isinstance(found, train.Readout)
    assert found.agreement == 1.0
    assert found.accuracy == teacher.read_card(tiny_run.folder.teacher).accuracy


def test_the_cost_of_an_architecture_is_counted_once(tiny_run: TinyRun, monkeypatch: pytest.MonkeyPatch) -> None:
    counted: list[int] = []

    def count(network: nn.Module, resolution: int) -> tuple[int, int]:
        counted.append(resolution)
        return count_cost(network, resolution)

    monkeypatch.setattr(evaluate, "count_cost", count)
    architecture = Architecture((1, 1, 1, 1, 1, 2))
    trials = [Trial(0, architecture, *how) for how in ((LOW, 0), (LOW, 1), (HIGH, 0))]
    answers = [tiny_run.evaluate([trial])[0] for trial in trials]
    assert len({(answer.macs, answer.params) for answer in answers}) == 1
    assert len(counted) == 1


def test_a_score_does_not_depend_on_the_other_trials_of_the_cohort(tiny_run: TinyRun) -> None:
    together = tiny_run.evaluate(cohort(LOW))
    alone = [tiny_run.evaluate([trial])[0] for trial in reversed(cohort(LOW))][::-1]
    assert [a.accuracy for a in together] == [a.accuracy for a in alone]
    assert [a.trial for a in together] == cohort(LOW)


def test_equal_seeds_give_equal_weights_and_other_seeds_do_not(tiny_run: TinyRun) -> None:
    def weights(trial: Trial) -> dict[str, Any]:
        path = tiny_run.folder.weights(trial)
        path.unlink(missing_ok=True)
        tiny_run.evaluate([trial])
        return load_file(path)

    zero, one = cohort(HIGH)[0], cohort(HIGH, seed=1)[0]
    first, again, other = weights(zero), weights(zero), weights(one)
    assert all(first[name].equal(again[name]) for name in first)
    assert not all(first[name].equal(other[name]) for name in first)


def test_the_weights_of_a_full_evaluation_are_saved_and_tested(tiny_run: TinyRun) -> None:
    trial = cohort(HIGH)[0]
    tiny_run.evaluate([trial])
    path = tiny_run.folder.weights(trial)
    assert path.exists()
    tested = run_tasks.run_test(sent(TestTask(tiny_run.worker(), trial)))
    assert 0 <= tested["test_accuracy"] <= 1
    tiny_run.evaluate([cohort(LOW)[1]])
    assert not tiny_run.folder.weights(cohort(LOW)[1]).exists()


def test_a_final_training_learns_from_the_validation_images_and_is_scored_on_the_test_images(
    tiny_run: TinyRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It also keeps its weights, and its cache of teacher outputs is its own."""
    context = open_context(tiny_run.worker())
    train, valid, test = (len(split) for split in (context.data.train, context.data.valid, context.data.test))
    joined = context.train_split(FINAL)
    assert joined.images is not None
    assert context.data.train.images is not None
    assert (joined.images[:train] == context.data.train.images).all()  # so that their augmentation stays the same
    assert (joined.labels[train:] == context.data.valid.labels).all()
    seen = {int(row) for batch in context.train_batches(FINAL, 0) for row in batch.indices}
    assert seen == set(range(train + valid))
    trial = cohort(FINAL)[0]
    (answer,) = tiny_run.evaluate([trial])
    hits = hits_from_text(answer.hits)
    assert len(hits) == test
    assert answer.accuracy == sum(hits) / test
    assert answer.cross_entropy is not None
    assert answer.agreement is None, "the teacher's classes are those of validation images"
    tested = run_tasks.run_test(sent(TestTask(tiny_run.worker(), trial)))
    assert (tested["test_accuracy"], tested["hits"]) == (answer.accuracy, answer.hits)
    (plain,) = tiny_run.evaluate([cohort(replace(FINAL, with_valid=False))[0]])
    assert plain.hits == ""
    assert plain.agreement is not None
    assert tiny_run.evaluate([trial])[0].hits == answer.hits


def test_the_teacher_is_scored_on_the_test_images(tiny_run: TinyRun) -> None:
    tested = run_tasks.run_test(sent(TestTask(tiny_run.worker(), None, tiny_run.folder.teacher)))
    assert tested["test_accuracy"] == sum(hits_from_text(tested["hits"])) / len(hits_from_text(tested["hits"]))
    assert tested["weights"] == str(tiny_run.folder.teacher)


@pytest.mark.parametrize("fidelity", ["high", "final"])
def test_a_killed_full_evaluation_resumes_after_its_last_epoch(
    fidelity: str, tiny_run: TinyRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    trial = Trial(0, ARCHITECTURES[2], HIGH if fidelity == "high" else FINAL, seed=5)
    path = tiny_run.folder.weights(trial)
    (whole,) = tiny_run.evaluate([trial])
    weights = load_file(path)
    path.unlink()
    epochs: list[int] = []
    save = checkpoint.save

    def die_after_two(path: Path, student: Any, progress: Progress, of: str) -> None:
        save(path, student, progress, of)
        epochs.append(progress.epochs)
        if progress.epochs == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr(checkpoint, "save", die_after_two)
    with pytest.raises(KeyboardInterrupt):
        tiny_run.evaluate([trial])
    (again,) = tiny_run.evaluate([trial])
    assert epochs == [1, 2, 3]  # the second call trained the third epoch only
    assert again.accuracy == whole.accuracy
    assert all(weights[name].equal(value) for name, value in load_file(path).items())
    assert list(path.parent.glob("*.state.pt")) == []


@pytest.mark.parametrize(("status", "kept"), [("diverged", False), ("error", False), ("oom", True)])
def test_a_full_training_that_would_fail_again_leaves_no_state(
    tiny_run: TinyRun, monkeypatch: pytest.MonkeyPatch, status: Any, kept: bool
) -> None:
    trial = Trial(0, ARCHITECTURES[1], HIGH, seed=6)
    state = tiny_run.folder.training_state(trial)

    def fail_in_the_second_epoch(students: list[Any], *_: Any) -> None:
        checkpoint.save(state, students[0], Progress(1))
        students[0].drop(status, "for a reason")

    monkeypatch.setattr(evaluate, "train", fail_in_the_second_epoch)
    (answer,) = tiny_run.evaluate([trial])
    assert (answer.status, state.exists()) == (status, kept)
    state.unlink(missing_ok=True)


CROWDED = '''
import sys
from torch import nn
from engine.networks import Staged, pooled_classifier
from engine.space import Choice, SearchSpace

ALIVE = sys.__dict__.setdefault("alive_in_a_test", [])  # the file is imported again for each network

class Net(Staged):
    """Memory holds at most `ROOM` of these in training, and never the largest."""

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


def test_a_cohort_too_large_for_memory_is_split_and_only_a_student_that_never_fits_is_oom(
    tiny_run: TinyRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "crowded.py"
    file.write_text(CROWDED)
    fidelity = dataclasses.replace(LOW, kd_loss="none")
    trials = [Trial(number, Architecture((number,)), fidelity) for number in (0, 1, 2, 3, 4)]
    changed = {"space": f"{file}:space", "low": fidelity}
    sizes: list[int] = []
    attempt = evaluate._attempt
    monkeypatch.setattr(evaluate, "_attempt", lambda *a: (sizes.append(len(a[2])), attempt(*a))[1])
    answers = tiny_run.evaluate(trials, changed)
    assert [answer.status for answer in answers] == ["ok"] * 5
    assert sizes == [4, 2, 1]
    sizes.clear()
    alone = tiny_run.evaluate([*trials[:1], Trial(5, Architecture((5,)), fidelity), trials[2]], changed)
    assert [answer.status for answer in alone] == ["ok", "oom", "ok"]
    assert sizes[0] == 2  # the size that worked is used for the next cohort
    assert [a.accuracy for a in alone if a.ok] == [answers[0].accuracy, answers[2].accuracy]


def test_an_evaluation_says_how_its_steps_ran(tiny_run: TinyRun) -> None:
    (answer,) = tiny_run.evaluate(cohort(LOW)[:1])
    assert answer.execution == "eager"


def test_neither_teacher_cache_nor_cohort_size_changes_a_score(tiny_run: TinyRun) -> None:
    def scores(**resources: Any) -> list[float]:
        return [answer.accuracy for answer in tiny_run.evaluate(cohort(LOW), **resources)]

    without = scores(teacher_cache="0")
    assert scores(teacher_cache="1MB") == without  # some of the steps
    assert scores(teacher_cache="1GiB") == without
    assert scores(teacher_cache="1GiB", students_per_gpu="1") == without


def test_a_step_reuses_the_memory_that_the_last_one_freed(tiny_run: TinyRun) -> None:
    run_tasks.run_probe(sent(ProbeTask(tiny_run.worker())))  # opens the context, which sets malloc

    def faults(count: int) -> int:
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        for _ in range(count):
            torch.ones(6 * 2**20)
        return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

    faults(2)
    assert [faults(10), faults(10)][1] < 6 * 2**20 * 4 / 4096  # the pages of one tensor of the ten


def test_memory_stays_flat(tiny_run: TinyRun) -> None:
    """A worker lives as long as its search: 50 evaluations take no more memory than the first 10."""

    def memory_after(count: int) -> int:
        for number in range(count):
            tiny_run.evaluate([Trial(0, ARCHITECTURES[number % 3], LOW, seed=number % 2)])
        return psutil.Process().memory_info().rss

    settled = memory_after(10)
    assert memory_after(50) <= 1.03 * settled


def test_a_diverged_student_is_an_evaluation(tiny_run: TinyRun) -> None:
    good, _, _ = tiny_run.evaluate(cohort(LOW))
    diverged = tiny_run.evaluate(cohort(LOW), changed={"lr": 1e18})
    assert good.ok
    assert diverged[0].status == "diverged"
    assert "no longer finite" in diverged[0].error


def test_an_architecture_that_cannot_be_built_does_not_stop_the_others(tiny_run: TinyRun) -> None:
    strange = Trial(9, Architecture((9,) * 6), LOW)
    bad, good = tiny_run.evaluate([strange, cohort(LOW)[0]])
    assert (bad.status, good.status) == ("error", "ok")
    assert "must be 0 to 4" in bad.error


def test_a_missing_teacher_is_an_evaluation_with_its_reason(tiny_run: TinyRun) -> None:
    answers = tiny_run.evaluate(cohort(LOW), teacher=Path("nowhere.safetensors"))
    assert [answer.status for answer in answers] == ["error"] * 3
    assert "no teacher file nowhere" in answers[0].error


def test_a_small_subset_is_one_batch(tiny_run: TinyRun) -> None:
    tiny = dataclasses.replace(LOW, fraction=Fraction(1, 12))
    (answer,) = tiny_run.evaluate([Trial(0, ARCHITECTURES[0], tiny)])
    assert answer.ok


def test_width_and_resolution_are_fidelities(tiny_run: TinyRun) -> None:
    wide = dataclasses.replace(LOW, width=2.0, resolution=8)
    (full,), (answer,) = tiny_run.evaluate(cohort(LOW)[:1]), tiny_run.evaluate([Trial(0, ARCHITECTURES[0], wide)])
    assert answer.ok
    assert answer.params > 3 * full.params  # twice as wide
    assert answer.macs < 1.1 * full.macs  # at a quarter of the pixels


def test_a_teacher_is_trained_once_and_describes_itself(tiny_run: TinyRun) -> None:
    path = tiny_run.folder.teacher
    before = path.stat().st_mtime_ns
    tiny_run.teach(tiny_run.teacher_task())
    assert path.stat().st_mtime_ns == before
    card = teacher.read_card(path)
    assert card.network == f"{SPACE}#3-3-3-3-3-3"
    assert card.epochs == tiny_run.config.teacher_epochs
    assert len(card.losses) == tiny_run.config.teacher_epochs
    assert 0 < card.losses[-1] < card.losses[0]  # the mean loss falls from epoch to epoch


def test_a_teacher_of_another_split_is_reported(tiny_run: TinyRun) -> None:
    assert not tiny_run.teach(tiny_run.teacher_task()).elsewhere
    assert tiny_run.teach(tiny_run.teacher_task({"seed": 1})).elsewhere, (
        "it was trained on some of the validation images"
    )


def test_a_teacher_training_stops_after_an_epoch_and_resumes_to_the_same_result(
    tiny_run: TinyRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A different training for the same file starts again; settings that it does not depend on may change."""
    path, folder = tmp_path / "t.safetensors", stop_files.create(tmp_path)
    monkeypatch.setenv("MFKD_STOP_FILES", str(folder))
    others: list[dict[str, Any]] = [{"lr": 0.01}, {}, {"low": dataclasses.replace(LOW, epochs=5), "kd_weight": 2.0}]
    another, asked, compared = (tiny_run.teacher_task(changed, path) for changed in others)
    stop_files.drain(folder)
    for task in (another, asked):
        with pytest.raises(Drained, match="epoch 1 of 2"):
            tiny_run.teach(task)
    tiny_run.teach(compared)
    card, unbroken = teacher.read_card(path), teacher.read_card(tiny_run.folder.teacher)
    assert (card.accuracy, card.losses) == (unbroken.accuracy, unbroken.losses)
    assert all(load_file(tiny_run.folder.teacher)[name].equal(value) for name, value in load_file(path).items())
    assert list(tmp_path.glob("*.state.pt")) == []


def test_a_teacher_of_other_classes_is_refused(tiny_run: TinyRun, tmp_path: Path) -> None:
    network = teacher.build(f"{SPACE}#3-3-3-3-3-3", classes=5, resolution=16)
    card = dataclasses.replace(teacher.read_card(tiny_run.folder.teacher), classes=tuple("abcde"))
    teacher.save(tmp_path / "five.safetensors", network, card)
    with pytest.raises(UsageError, match="knows 5 classes, the data has 3"):
        tiny_run.teach(tiny_run.teacher_task(path=tmp_path / "five.safetensors"))


def test_the_probe_tells_the_driver_what_it_needs(tiny_run: TinyRun) -> None:
    facts = task_from_json(DataFacts, run_tasks.run_probe(sent(ProbeTask(tiny_run.worker()))))
    assert (len(facts.classes), facts.resolution) == (3, 16)
    assert facts.images["train"] + facts.images["valid"] == 120
