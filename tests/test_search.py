"""The loop of a search, on a fleet that answers at once: what is decided, journalled, resumed and concluded."""

from __future__ import annotations

import json
from dataclasses import replace
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from engine.commands.search import summary
from engine.config import Budget, Resources, SearchConfig, search_plan
from engine.fleet.fleet import TaskLost
from engine.fleet.supervisor import TimedOut, WorkerDied
from engine.search import search
from engine.search.journal import read_journal
from engine.search.progress import Display
from engine.trial import (
    Architecture,
    Evaluation,
    Fidelity,
    History,
    NoWinner,
    Trial,
    UsageError,
    evaluation_to_json,
    trial_from_json,
)
from tests.at_once import AtOnce

SPACE = "nasbench201:channels=8,cells=1"
STUDY = SearchConfig(space=SPACE, low=Fidelity("low", Fraction(1, 9), 3, kd_loss="kd"), high=Fidelity("high", epochs=4))
BUDGET = Budget(max_low=8, max_high=4)


class Recorded(AtOnce):
    """A fleet whose answers are a function of the trial; counts what it was asked."""

    def __init__(self, capacity: int = 3, broken: set[str] = frozenset()) -> None:  # type: ignore[assignment]
        self.capacity, self.broken = capacity, broken
        self.trials: list[int] = []

    def run_trials(self, task: dict[str, Any]) -> list[dict[str, Any]]:
        answers = []
        for data in task["trials"]:
            trial = trial_from_json(data)
            self.trials.append(trial.number)
            if trial.fidelity.name in self.broken:
                answers.append(Evaluation(trial, "oom", error="no memory"))
                continue
            noise = np.random.default_rng(int(trial.key, 16)).normal(0, 0.02)
            quality = sum(trial.architecture.choices) / 24
            answers.append(Evaluation(trial, "ok", 0.5 + 0.3 * quality + noise, seconds=2.0, macs=10, params=5))
        return [evaluation_to_json(answer) for answer in answers]


def run(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    fleet: Recorded,
    config: SearchConfig = STUDY,
    budget: Budget = BUDGET,
    students: str = "auto",
) -> dict[str, Any]:
    monkeypatch.setattr(search, "open_fleet", lambda resources, layout, logs: fleet)
    resources = Resources(device="cpu", workers=fleet.capacity, students_per_gpu=students)
    return search.search(config, budget, resources, tmp_path / "run", Display("none"))


def test_the_way_that_steps_run_is_the_teacher_s_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[dict[str, Any]] = []
    fleet = Recorded()
    monkeypatch.setattr(fleet, "run_teacher", lambda task: asked.append(task) or AtOnce().run_teacher(task))
    monkeypatch.setattr(search, "open_fleet", lambda resources, layout, logs: fleet)
    resources = Resources(device="cpu", execution="eager")
    search.search(STUDY, BUDGET, resources, tmp_path / "run", Display("none"))
    assert [task["resources"]["execution"] for task in asked] == ["eager"]


def test_a_search_asks_low_then_high_and_names_a_winner(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fleet = Recorded()
    result = run(tmp_path, monkeypatch, fleet)
    record = read_journal(tmp_path / "run" / "journal.jsonl")
    names = [trial.fidelity.name for trial in record.asked]
    assert names.count("low") >= 1
    assert names.count("high") == BUDGET.max_high
    assert result["winner"]["test_accuracy"] == 0.75
    assert result["evaluations"] == {"low": names.count("low"), "high": 4, "failed": 0}
    low, high = ({t.architecture for t in record.asked if t.fidelity.name == name} for name in ("low", "high"))
    assert high <= low  # so that the cheap judgement can be compared with the full one
    assert result["tau"]["low_vs_high"] is not None
    assert json.loads((tmp_path / "run" / "result.json").read_text()) == result
    full = [e for e in record.answers.values() if e.trial.fidelity == STUDY.high]
    assert result["winner"]["valid_accuracy"] in [e.accuracy for e in full]


def test_rank_correlations_are_of_the_means_of_repeated_trainings() -> None:
    """As in the report. By its second training alone the first architecture would be the worst, not the best."""
    plan, names = search_plan(STUDY, BUDGET), [Architecture((i,)) for i in range(3)]
    rows = [(plan.lows[0], 0, (0.3, 0.2, 0.1)), (plan.high, 0, (0.9, 0.6, 0.5)), (plan.high, 1, (0.4, 0.6, 0.5))]
    answers = [
        Evaluation(Trial(0, name, fidelity, seed), "ok", accuracy, macs=100 - name.choices[0])
        for fidelity, seed, accuracies in rows
        for name, accuracy in zip(names, accuracies, strict=True)
    ]
    assert search.taus(answers, plan) == {"low_vs_high": 1.0, "macs_vs_high": 1.0}


@pytest.mark.parametrize(
    ("flags", "fronts"), [({"method": "mfkd-front"}, True), ({"objectives": "accuracy,macs"}, True), ({}, False)]
)
def test_a_search_for_a_front_prints_one(
    flags: dict[str, Any], fronts: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    result = run(tmp_path, monkeypatch, Recorded(), replace(STUDY, **flags))
    assert ("front" in result) == fronts
    assert ("front " in summary(result)) == fronts


def test_cut_after_any_line_the_search_comes_to_the_same_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The journal after a kill is a prefix of whole lines; nothing answered is asked of a worker again."""
    whole = run(tmp_path, monkeypatch, Recorded())
    path = tmp_path / "run" / "journal.jsonl"
    lines = path.read_bytes().splitlines(keepends=True)
    record = read_journal(path)
    for cut in range(len(lines)):
        path.write_bytes(b"".join(lines[:cut]))
        answered = set(read_journal(path).answers)
        fleet = Recorded()
        again = run(tmp_path, monkeypatch, fleet)
        assert again["winner"] == whole["winner"], cut
        assert set(fleet.trials).isdisjoint(answered)
        assert read_journal(path).asked == record.asked
        assert read_journal(path).answers == record.answers


def test_a_run_continues_on_a_machine_of_another_size(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = run(tmp_path, monkeypatch, Recorded(capacity=4))
    path = tmp_path / "run" / "journal.jsonl"
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join(lines[: len(lines) // 2]))
    assert run(tmp_path, monkeypatch, Recorded(capacity=1))["winner"] == whole["winner"]


def test_a_finished_run_asks_nothing_more(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = run(tmp_path, monkeypatch, Recorded())
    fleet = Recorded()
    second = run(tmp_path, monkeypatch, fleet)
    assert fleet.trials == []
    assert second["winner"] == first["winner"]


def test_a_larger_budget_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run(tmp_path, monkeypatch, Recorded())
    result = run(tmp_path, monkeypatch, Recorded(), budget=replace(BUDGET, max_high=6))
    assert result["evaluations"]["high"] == 6


def test_changed_data_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run(tmp_path, monkeypatch, Recorded())
    fleet = Recorded()
    monkeypatch.setattr(fleet, "run_probe", lambda task: {**Recorded().run_probe(task), "fingerprint": "other"})
    with pytest.raises(UsageError, match="the data have changed"):
        run(tmp_path, monkeypatch, fleet)


def test_failures_are_counted_and_the_search_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    result = run(tmp_path, monkeypatch, Recorded(broken={"low"}), budget=replace(BUDGET, max_failures=50))
    assert result["evaluations"]["failed"] >= 1
    assert result["evaluations"]["high"] >= 1


def test_too_many_failures_in_a_row_end_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fleet = Recorded(broken={"low", "high"})
    with pytest.raises(NoWinner, match="5 evaluations in a row failed.*no memory"):
        run(tmp_path, monkeypatch, fleet, budget=replace(BUDGET, max_failures=5))


def test_what_was_repaired_goes_on_after_too_many_failures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    budget = Budget(max_low=40, max_high=8, max_failures=5)
    with pytest.raises(NoWinner, match="5 evaluations in a row failed"):
        run(tmp_path, monkeypatch, Recorded(broken={"low", "high"}), budget=budget)
    result = run(tmp_path, monkeypatch, Recorded(), budget=budget)
    assert result["evaluations"]["failed"] >= 5
    assert result["evaluations"]["high"] == 8


def test_what_the_report_lacks_is_asked_of_all_workers_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Full trainings at random have no low score to be compared with until the end."""
    plan = search_plan(replace(STUDY, method="random"), replace(BUDGET, max_high=6))
    trained = [Trial(i, Architecture((i % 5, 0, 0, 0, 0, i % 3)), plan.high) for i in range(6)]
    record = [Evaluation(trial, "ok", 0.5) for trial in trained]
    history = History(record)
    first = search.unpaired(history, plan)[:2]
    history.pending = list(first)
    more = search.unpaired(history, plan)
    assert [t.number for t in more] == [8, 9, 10, 11]
    assert {t.architecture for t in [*first, *more]} == {e.trial.architecture for e in record}
    history.pending.append(Trial(12, Architecture((4, 4, 4, 4, 4, 4)), plan.high))
    assert search.unpaired(history, plan) == [], "something else is under way: the method is not at its end"


@pytest.mark.parametrize(
    ("error", "status"), [(WorkerDied, "crashed"), (TimedOut, "timeout"), (TaskLost, "lost")]
)
@pytest.mark.parametrize("students", ["1", "4"])
def test_a_task_without_an_end_is_tried_alone_and_then_an_evaluation(
    students: str,
    error: type[Exception],
    status: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    fleet = Recorded()
    answers, seen = fleet.run_trials, []

    def deadly(task: dict[str, Any]) -> list[dict[str, Any]]:
        numbers = [trial["number"] for trial in task["trials"]]
        if 2 not in numbers:
            return answers(task)
        seen.append(len(numbers))
        raise error("no answer")

    monkeypatch.setattr(fleet, "run_trials", deadly)
    result = run(tmp_path, monkeypatch, fleet, students=students)
    assert result["evaluations"]["failed"] == 1
    assert read_journal(tmp_path / "run" / "journal.jsonl").answers[2].status == status
    alone = 2 if students == "1" and error is WorkerDied else 1
    assert seen == ([4] if students == "4" else []) + [1] * alone


def test_low_fidelity_trials_go_in_cohorts_and_full_ones_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fleet = Recorded()
    sizes: dict[str, list[int]] = {"low": [], "high": []}
    answers = fleet.run_trials

    def counted(task: dict[str, Any]) -> list[dict[str, Any]]:
        sizes[task["trials"][0]["fidelity"]["name"]].append(len(task["trials"]))
        return answers(task)

    monkeypatch.setattr(fleet, "run_trials", counted)
    run(tmp_path, monkeypatch, fleet)
    assert set(sizes["high"]) == {1}
    assert sizes["low"][:2] == [4, 4]
    assert max(sizes["low"]) == 4


def test_no_candidate_within_the_limits_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UsageError, match="no architecture of .* fits --max-macs 10 .* the smallest has"):
        run(tmp_path, monkeypatch, Recorded(), config=replace(STUDY, max_macs=10.0))


def test_only_architectures_within_the_limits_are_asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from engine.space import candidates
    from engine.spaces.load import load_space

    space = load_space(STUDY.space)
    limit = 4e6
    run(tmp_path, monkeypatch, Recorded(), config=replace(STUDY, max_macs=limit))
    members = candidates(space, classes=2, width=1.0, resolution=32)
    for trial in read_journal(tmp_path / "run" / "journal.jsonl").asked:
        assert members.macs[members.row(trial.architecture)] <= limit


def test_an_unknown_method_is_refused_before_anything_starts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UsageError, match="no method 'magic'"):
        run(tmp_path, monkeypatch, Recorded(), config=replace(STUDY, method="magic"))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("lowered", [{"gpu_hours": 1e-9}, {"target_accuracy": 0.01}, {"wall_time": 1e-9}])
def test_a_budget_that_was_lowered_ends_a_run_with_all_it_knows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, lowered: dict[str, float]
) -> None:
    first = run(tmp_path, monkeypatch, Recorded(capacity=1))
    more = Recorded(capacity=1)
    again = run(tmp_path, monkeypatch, more, budget=replace(BUDGET, max_high=9, **lowered))  # type: ignore[arg-type]
    assert (again["winner"], again["evaluations"]) == (first["winner"], first["evaluations"])
    assert more.trials == []


def test_a_reached_target_ends_the_search(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    result = run(tmp_path, monkeypatch, Recorded(capacity=1), budget=replace(BUDGET, target_accuracy=0.01))
    assert result["evaluations"]["high"] == 1
