"""A search on a fleet that answers at once: what it decides, journals, resumes and concludes."""

from __future__ import annotations

import json
from dataclasses import replace
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from engine.commands.search import summary
from engine.config import Budget, Resources, RunSettings, SearchConfig, search_plan
from engine.fleet.fleet import TaskLost
from engine.fleet.supervisor import TimedOut, WorkerDied
from engine.search import run_context, search
from engine.search.front import member_row
from engine.search.journal import read_journal
from engine.search.progress import Display
from engine.search.runs import open_run
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
from tests.at_once import AtOnce, hits_of

SPACE = "nasbench201:channels=8,cells=1"
CONFIG = SearchConfig(
    space=SPACE, low=Fidelity("low", Fraction(1, 9), 3, kd_loss="kd"), high=Fidelity("high", epochs=4)
)
BUDGET = Budget(max_low=8, max_high=4)


class Formula(AtOnce):
    """A fleet whose answers are a formula of the trial; `trials` lists what it was asked."""

    def __init__(self, capacity: int = 3, broken: frozenset[str] = frozenset()) -> None:
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
            accuracy = 0.5 + 0.3 * quality + noise
            hits = hits_of(trial, accuracy)
            answers.append(Evaluation(trial, "ok", accuracy, seconds=2.0, macs=10, params=5, hits=hits))
        return [evaluation_to_json(answer) for answer in answers]


def run(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    fleet: Formula,
    config: SearchConfig = CONFIG,
    budget: Budget = BUDGET,
    **resources: Any,
) -> dict[str, Any]:
    monkeypatch.setattr(run_context, "open_fleet", lambda resources, layout, logs: fleet)
    settings = RunSettings(config, budget, Resources(device="cpu", workers=fleet.capacity, **resources))
    return search.search(settings, tmp_path / "run", Display("none"))


def test_the_teacher_is_trained_with_the_same_execution(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[dict[str, Any]] = []
    fleet = Formula()
    monkeypatch.setattr(fleet, "run_teacher", lambda task: asked.append(task) or AtOnce().run_teacher(task))
    run(tmp_path, monkeypatch, fleet, execution="eager")
    assert [task["worker"]["resources"]["execution"] for task in asked] == ["eager"]


def test_a_search_asks_low_then_high_and_names_a_winner(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fleet = Formula()
    result = run(tmp_path, monkeypatch, fleet)
    record = read_journal(tmp_path / "run" / "journal.jsonl")
    names = [trial.fidelity.name for trial in record.asked]
    assert names.count("low") >= 1
    assert names.count("high") == BUDGET.max_high
    assert result["winner"]["test_accuracy"] == 0.75
    assert result["evaluations"] == {"low": names.count("low"), "high": 4, "final": names.count("final"), "failed": 0}
    low, high = ({t.architecture for t in record.asked if t.fidelity.name == name} for name in ("low", "high"))
    assert high <= low  # so that low and full scores can be compared
    assert result["tau"]["low_vs_high"] is not None
    assert json.loads((tmp_path / "run" / "result.json").read_text()) == result
    full = [e for e in record.answers.values() if e.trial.fidelity == CONFIG.high]
    assert result["winner"]["valid_accuracy"] in [e.accuracy for e in full]


def test_rank_correlations_use_the_means_of_repeated_trainings() -> None:
    """As in the report. By its second training alone, the first architecture would be the worst, not the best."""
    plan, names = search_plan(CONFIG, BUDGET), [Architecture((i,)) for i in range(3)]
    rows = [(plan.lows[0], 0, (0.3, 0.2, 0.1)), (plan.high, 0, (0.9, 0.6, 0.5)), (plan.high, 1, (0.4, 0.6, 0.5))]
    answers = [
        Evaluation(Trial(0, name, fidelity, seed), "ok", accuracy, macs=100 - name.choices[0])
        for fidelity, seed, accuracies in rows
        for name, accuracy in zip(names, accuracies, strict=True)
    ]
    assert search.taus(answers, plan) == {"low_vs_high": 1.0, "macs_vs_high": 1.0}


@pytest.mark.parametrize(
    ("flags", "cost"),
    [
        ({}, "macs"),
        ({"objectives": "accuracy,macs"}, "macs"),
        ({"objectives": "accuracy,params", "method": "nsga2"}, "params"),
        ({"objectives": "accuracy,macs", "method": "random"}, "macs"),
    ],
)
def test_every_search_names_its_front(
    flags: dict[str, Any], cost: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its result has the front that can be read from its journal while it runs."""
    result = run(tmp_path, monkeypatch, Formula(), replace(CONFIG, **flags))
    read = open_run(str(tmp_path / "run"))
    assert result["front"] == json.loads(json.dumps([member_row(member) for member in read.front]))
    assert (result["front_cost"], read.front_cost) == (cost, cost)
    (member,) = result["front"]  # all networks here have the same MACs
    full = [e for e in read.answers if e.trial.fidelity == CONFIG.high]
    assert member["valid_accuracy"] == max(e.accuracy for e in full)
    assert "\n1 on the front of accuracy and million " in summary(result)


@pytest.mark.parametrize(("files", "warned"), [(True, True), (False, False)])
def test_few_photos_to_train_from_scratch_are_worth_a_warning(
    files: bool, warned: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fleet, said = Formula(), []
    facts = {**fleet.run_probe({}), "files": files}
    monkeypatch.setattr(fleet, "run_probe", lambda task: facts)
    monkeypatch.setattr(Display, "say", lambda self, text: said.append(text))
    run(tmp_path, monkeypatch, fleet)
    assert any("80 images are few to train" in line and "--space pretrained:" in line for line in said) == warned


def test_a_journal_cut_after_any_line_leads_to_the_same_result(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """After a kill, the journal is a prefix of whole lines; no worker repeats an evaluation that it holds."""
    whole = run(tmp_path, monkeypatch, Formula())
    path = tmp_path / "run" / "journal.jsonl"
    lines = path.read_bytes().splitlines(keepends=True)
    record = read_journal(path)
    for cut in range(len(lines)):
        path.write_bytes(b"".join(lines[:cut]))
        answered = set(read_journal(path).answers)
        fleet = Formula()
        again = run(tmp_path, monkeypatch, fleet)
        assert again["winner"] == whole["winner"], cut
        assert set(fleet.trials).isdisjoint(answered)
        assert read_journal(path).asked == record.asked
        assert read_journal(path).answers == record.answers


def test_a_run_resumes_on_a_machine_of_another_size(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = run(tmp_path, monkeypatch, Formula(capacity=4))
    path = tmp_path / "run" / "journal.jsonl"
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join(lines[: len(lines) // 2]))
    assert run(tmp_path, monkeypatch, Formula(capacity=1))["winner"] == whole["winner"]


def test_a_finished_run_asks_nothing_more(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = run(tmp_path, monkeypatch, Formula())
    fleet = Formula()
    second = run(tmp_path, monkeypatch, fleet)
    assert fleet.trials == []
    assert second["winner"] == first["winner"]


def test_a_larger_budget_extends_a_finished_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run(tmp_path, monkeypatch, Formula())
    result = run(tmp_path, monkeypatch, Formula(), budget=replace(BUDGET, max_high=6))
    assert result["evaluations"]["high"] == 6


def test_a_run_refuses_changed_data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run(tmp_path, monkeypatch, Formula())
    fleet = Formula()
    monkeypatch.setattr(fleet, "run_probe", lambda task: {**Formula().run_probe(task), "fingerprint": "other"})
    with pytest.raises(UsageError, match="the data have changed"):
        run(tmp_path, monkeypatch, fleet)


def test_failures_are_counted_and_the_search_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    result = run(tmp_path, monkeypatch, Formula(broken=frozenset({"low"})), budget=replace(BUDGET, max_failures=50))
    assert result["evaluations"]["failed"] >= 1
    assert result["evaluations"]["high"] >= 1


def test_too_many_failures_in_a_row_end_the_search(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fleet = Formula(broken=frozenset({"low", "high"}))
    with pytest.raises(NoWinner, match="5 evaluations in a row failed.*no memory"):
        run(tmp_path, monkeypatch, fleet, budget=replace(BUDGET, max_failures=5))


def test_after_too_many_failures_a_repaired_search_resumes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    budget = Budget(max_low=40, max_high=8, max_failures=5)
    with pytest.raises(NoWinner, match="5 evaluations in a row failed"):
        run(tmp_path, monkeypatch, Formula(broken=frozenset({"low", "high"})), budget=budget)
    result = run(tmp_path, monkeypatch, Formula(), budget=budget)
    assert result["evaluations"]["failed"] >= 5
    assert result["evaluations"]["high"] == 8


def test_missing_low_scores_are_asked_of_all_workers_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Random search trains in full without a low score; at the end, each gets one to be compared with."""
    plan = search_plan(replace(CONFIG, method="random"), replace(BUDGET, max_high=6))
    trained = [Trial(i, Architecture((i % 5, 0, 0, 0, 0, i % 3)), plan.high) for i in range(6)]
    record = [Evaluation(trial, "ok", 0.5) for trial in trained]
    history = History(record)
    first = search.unpaired(history, plan)[:2]
    history.pending = list(first)
    more = search.unpaired(history, plan)
    assert [t.number for t in more] == [8, 9, 10, 11]
    assert {t.architecture for t in [*first, *more]} == {e.trial.architecture for e in record}
    history.pending.append(Trial(12, Architecture((4, 4, 4, 4, 4, 4)), plan.high))
    assert search.unpaired(history, plan) == [], "another trial is running: the method has not finished"


@pytest.mark.parametrize(
    ("error", "status"), [(WorkerDied, "crashed"), (TimedOut, "timeout"), (TaskLost, "lost")]
)
@pytest.mark.parametrize("students", ["1", "4"])
def test_a_trial_whose_task_never_ends_is_retried_alone_and_then_recorded_as_failed(
    students: str,
    error: type[Exception],
    status: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    fleet = Formula()
    answers, seen = fleet.run_trials, []

    def deadly(task: dict[str, Any]) -> list[dict[str, Any]]:
        numbers = [trial["number"] for trial in task["trials"]]
        if 2 not in numbers:
            return answers(task)
        seen.append(len(numbers))
        raise error("no answer")

    monkeypatch.setattr(fleet, "run_trials", deadly)
    result = run(tmp_path, monkeypatch, fleet, students_per_gpu=students)
    assert result["evaluations"]["failed"] == 1
    assert read_journal(tmp_path / "run" / "journal.jsonl").answers[2].status == status
    alone = 2 if students == "1" and error is WorkerDied else 1
    assert seen == ([4] if students == "4" else []) + [1] * alone


def test_low_fidelity_trials_go_in_cohorts_and_full_ones_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fleet = Formula()
    sizes: dict[str, list[int]] = {"low": [], "high": [], "final": []}
    answers = fleet.run_trials

    def counted(task: dict[str, Any]) -> list[dict[str, Any]]:
        sizes[task["trials"][0]["fidelity"]["name"]].append(len(task["trials"]))
        return answers(task)

    monkeypatch.setattr(fleet, "run_trials", counted)
    run(tmp_path, monkeypatch, fleet, budget=replace(BUDGET, baselines="always"))
    assert set(sizes["high"]) == {1}
    assert sizes["final"] == [1, 1]
    assert sizes["low"][:2] == [4, 4]
    assert max(sizes["low"]) == 4


def test_a_search_without_candidates_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    says = "no architecture of .* meets --max-macs 10 at .* pixels; its architectures have"
    with pytest.raises(UsageError, match=says):
        run(tmp_path, monkeypatch, Formula(), config=replace(CONFIG, max_macs=10.0))


def test_only_architectures_within_the_limits_are_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from engine.space import candidates
    from engine.spaces.load import load_space

    space = load_space(CONFIG.space)
    limit = 4e6
    run(tmp_path, monkeypatch, Formula(), config=replace(CONFIG, max_macs=limit))
    members = candidates(space, classes=2, width=1.0, resolution=32)
    for trial in read_journal(tmp_path / "run" / "journal.jsonl").searched.asked:
        assert members.macs[members.row(trial.architecture)] <= limit


def test_an_unknown_method_is_refused_before_anything_starts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UsageError, match="no method named 'magic'"):
        run(tmp_path, monkeypatch, Formula(), config=replace(CONFIG, method="magic"))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("lowered", [{"gpu_hours": 1e-9}, {"target_accuracy": 0.01}, {"wall_time": 1e-9}])
def test_a_lowered_budget_ends_a_run_with_all_that_it_has_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, lowered: dict[str, float]
) -> None:
    first = run(tmp_path, monkeypatch, Formula(capacity=1))
    more = Formula(capacity=1)
    again = run(tmp_path, monkeypatch, more, budget=replace(BUDGET, max_high=9, **lowered))  # type: ignore[arg-type]
    assert (again["winner"], again["evaluations"]) == (first["winner"], first["evaluations"])
    assert more.trials == []


def test_a_reached_target_ends_the_search(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    result = run(tmp_path, monkeypatch, Formula(capacity=1), budget=replace(BUDGET, target_accuracy=0.01))
    assert result["evaluations"]["high"] == 1
