"""A fidelity study: what it asks, finds and drops, and the search that starts with its evaluations."""

from __future__ import annotations

import csv
import json
import re
from dataclasses import replace
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import cli
from engine.config import Budget, Resources, RunSettings, SearchConfig, config_at, search_plan
from engine.fleet.devices import layout
from engine.report.accuracy_charts import low_against_full
from engine.report.prediction_charts import predicted_against_measured
from engine.run_folder import RunFolder
from engine.search import one_architecture, run_context, search
from engine.search.fidelity_study.design import FidelityStudy, study_architectures
from engine.search.fidelity_study.ranking import StudyScores, difference, macs_alone, rank, repeatability
from engine.search.fidelity_study.study import (
    default_lows,
    luck_warning,
    recommended,
    run_fidelity_study,
    study_before_search,
)
from engine.search.fidelity_study.summary import table
from engine.search.journal import Journal, read_journal
from engine.search.predictions import load_predictions
from engine.search.progress import Display
from engine.search.run_context import open_context
from engine.search.runs import open_run
from engine.search.setup import SearchSetup, probe
from engine.search.warm_start import warm_start
from engine.space import candidates
from engine.spaces.load import load_space
from engine.trial import (
    Architecture,
    Evaluation,
    Fidelity,
    NoWinner,
    Status,
    Trial,
    UsageError,
    evaluation_to_json,
    trial_from_json,
)
from tests.at_once import AtOnce, hits_of

SPACE = "nasbench201:channels=8,cells=1"
QUIET, TWO_WORKERS = Display("none"), Resources(device="cpu", workers=2)
CONFIG = SearchConfig(space=SPACE, high=Fidelity("high", epochs=9))
GOOD, FAIR, NOISE = Fidelity.parse("kd@1/9x3"), Fidelity.parse("at@1/9x3"), Fidelity.parse("none@1/9x3")
LUCK = {GOOD: 0.01, FAIR: 0.15, NOISE: 10.0}


class Formula(AtOnce):
    """A fleet whose answers are a formula of the trial: a quality that MACs do not predict, plus noise as in `LUCK`."""

    capacity = 2

    def __init__(self, broken: Fidelity | None = None) -> None:
        self.broken = broken
        self.asked: list[tuple[Architecture, Fidelity, int]] = []

    def run_teacher(self, task: dict[str, Any]) -> dict[str, Any]:
        Path(task["path"]).parent.mkdir(exist_ok=True)
        Path(task["path"]).touch()
        return super().run_teacher(task)

    def run_trials(self, task: dict[str, Any]) -> list[dict[str, Any]]:
        return [evaluation_to_json(self.measure(trial_from_json(data), task)) for data in task["trials"]]

    def measure(self, trial: Any, task: dict[str, Any]) -> Evaluation:
        self.asked.append((trial.architecture, trial.fidelity, trial.seed))
        if trial.fidelity == self.broken:
            return Evaluation(trial, "oom", error="no memory")
        full = trial.fidelity.name == "high"
        if full:
            weights = RunFolder(Path(task["worker"]["run_dir"])).weights(trial)
            weights.parent.mkdir(parents=True, exist_ok=True)
            weights.write_text(f"weights of {trial.architecture}")
        luck = 0.005 if full else LUCK.get(trial.fidelity, 0.1)
        quality = np.random.default_rng(trial.architecture.choices).random()
        score = 0.5 + 0.1 * (quality + luck * np.random.default_rng(int(trial.key, 16)).normal())
        hits = hits_of(trial, score)
        return Evaluation(trial, "ok", score, seconds=9.0 if full else 1.0, macs=10, params=5, hits=hits)


@pytest.fixture
def fleet(monkeypatch: pytest.MonkeyPatch) -> Formula:
    made = Formula()
    monkeypatch.setattr(run_context, "open_fleet", lambda resources, layout, logs: made)
    return made


def run(folder: Path, study: FidelityStudy, config: SearchConfig = CONFIG) -> dict[str, Any]:
    return run_fidelity_study(RunSettings(config, Budget(), TWO_WORKERS), study, folder, QUIET)


def run_search(folder: Path, config: SearchConfig, budget: Budget = Budget()) -> dict[str, Any]:  # noqa: B008 - frozen
    return search.search(RunSettings(config, budget, TWO_WORKERS), folder, QUIET)


def recommended_config(study: Path) -> SearchConfig:
    """The settings that a study in this folder gives a search at the fidelity GOOD."""
    return recommended(CONFIG, GOOD, RunFolder(study))


def test_a_fidelity_is_read_from_its_short_form() -> None:
    found = Fidelity.parse("kd+at@1/27x30:width=0.5,at_weight=100,kd_temperature=2")
    assert (found.fraction, found.epochs, found.width, found.kd_loss) == (Fraction(1, 27), 30, 0.5, "kd+at")
    assert found.weights == (("at_weight", 100.0), ("kd_temperature", 2.0))
    config = config_at(SearchConfig(), found)
    assert (config.at_weight, config.kd_temperature, config.kd_weight) == (100.0, 2.0, SearchConfig().kd_weight)
    assert Fidelity.parse("none@1x3:resolution=16").resolution == 16


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("kd", "write LOSS@FRACTIONxEPOCHS"),
        ("kd@1/0x3", "write LOSS@FRACTIONxEPOCHS"),
        ("kd@1/9x3:width", "write LOSS@FRACTIONxEPOCHS"),
        ("magic@1/9x3", "no loss named 'magic'; choose from none, kd,"),
        ("kd@1/9x3:at_wait=3", "no weight 'at_wait'; choose from kd_temperature"),
        ("kd@4/3x3", "at most 1"),
    ],
)
def test_a_malformed_fidelity_is_refused_with_a_hint(text: str, says: str) -> None:
    with pytest.raises(UsageError, match=says):
        Fidelity.parse(text)


def test_study_architectures_spread_over_macs_and_a_smaller_study_is_part_of_a_larger_one() -> None:
    members = candidates(load_space(SPACE), classes=10, width=1.0, resolution=32)
    many = study_architectures(members, 16, seed=3)
    assert study_architectures(members, 6, seed=3) == many[:6]
    assert len(set(many)) == 16
    order = np.argsort(np.argsort(members.macs, kind="stable"))
    slices = {int(order[members.row(a)] * 16 / len(members)) for a in many}
    assert len(slices) >= 12  # of 16: many networks have equal MACs


def test_a_study_trains_every_architecture_at_every_fidelity_and_recommends_the_best(
    tmp_path: Path, fleet: Formula
) -> None:
    result = run(tmp_path / "study", FidelityStudy((NOISE, FAIR, GOOD), 12, repeats=2, low_repeats=2, drop=False))
    by_fidelity = {f: [(a, s) for a, g, s in fleet.asked if g == f] for f in (CONFIG.high, *LUCK)}
    assert [len(set(trainings)) for trainings in by_fidelity.values()] == [24, 24, 24, 24]
    rows = {row["name"]: row for row in result["fidelities"]}
    assert result["full"] == 12
    assert result["recommended"] == GOOD.name
    assert rows[GOOD.name]["tau"] > 0.9
    assert rows[GOOD.name]["tau"] > rows[FAIR.name]["tau"] > rows[NOISE.name]["tau"]
    assert rows[GOOD.name]["relative_cost"] == pytest.approx(1 / 9)
    assert rows[GOOD.name]["cost_per_tau"] == pytest.approx(1 / 9 / rows[GOOD.name]["tau"])
    assert result["repeatability"] > 0.9
    gap = next(g for g in result["distilled_less_undistilled"] if g["name"] == GOOD.name)
    assert gap["tau_given_macs"] > 2 * gap["stderr"]
    with open(tmp_path / "study" / "evaluations.csv") as file:
        assert len(list(csv.DictReader(file))) == 4 * 24


def test_a_clearly_worse_fidelity_is_dropped(tmp_path: Path, fleet: Formula) -> None:
    result = run(tmp_path / "study", FidelityStudy((NOISE, GOOD), 24))
    counts = {f.name: sum(1 for _, g, _ in fleet.asked if g == f) for f in (NOISE, GOOD)}
    assert counts[GOOD.name] == 24
    assert 8 <= counts[NOISE.name] < 24
    assert [row["dropped"] for row in result["fidelities"]] == [True, False]
    assert result["complete"]


def test_a_journal_cut_after_any_line_leads_to_the_same_result(tmp_path: Path, fleet: Formula) -> None:
    plan = FidelityStudy((NOISE, GOOD), 12, repeats=2)
    whole = run(tmp_path / "study", plan)
    path = tmp_path / "study" / "journal.jsonl"
    lines = path.read_bytes().splitlines(keepends=True)
    record = read_journal(path)
    for cut in range(1, len(lines), 12):
        path.write_bytes(b"".join(lines[:cut]))
        fleet.asked.clear()
        assert run(tmp_path / "study", plan) == whole, cut
        assert read_journal(path).asked == record.asked
    fleet.asked.clear()
    assert run(tmp_path / "study", plan) == whole
    assert fleet.asked == []


def test_a_study_can_be_extended(tmp_path: Path, fleet: Formula) -> None:
    """With more architectures and another fidelity; nothing is measured twice."""
    run(tmp_path / "study", FidelityStudy((NOISE,), 6))
    result = run(tmp_path / "study", FidelityStudy((FAIR, GOOD, NOISE), 12, drop=False))
    assert {row["name"]: row["n"] for row in result["fidelities"]} == {FAIR.name: 12, GOOD.name: 12, NOISE.name: 12}
    assert len(set(fleet.asked)) == len(fleet.asked)


def test_a_failing_fidelity_is_left_out_and_a_study_without_any_score_has_no_result(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    broken = Formula(broken=GOOD)
    monkeypatch.setattr(run_context, "open_fleet", lambda resources, layout, logs: broken)
    result = run(tmp_path / "one", FidelityStudy((GOOD, FAIR), 8))
    assert [row["name"] for row in result["fidelities"]] == [FAIR.name]
    with pytest.raises(NoWinner, match="fewer than three architectures"):
        run(tmp_path / "none", FidelityStudy((GOOD,), 8))


@pytest.mark.parametrize(
    ("plan", "says"),
    [
        (FidelityStudy((GOOD,), 3), "--architectures is 3; it must be at least 4"),
        (FidelityStudy((GOOD,), repeats=0), "--repeats is 0"),
        (FidelityStudy((GOOD, GOOD)), "names a fidelity twice"),
    ],
)
def test_a_study_that_could_show_nothing_is_refused(tmp_path: Path, plan: FidelityStudy, says: str) -> None:
    with pytest.raises(UsageError, match=says):
        run(tmp_path / "study", plan)
    assert not (tmp_path / "study").exists()


def test_a_search_starts_with_the_evaluations_of_its_study(tmp_path: Path, fleet: Formula) -> None:
    """Nothing is trained again, the weights are there, and the evaluations count towards the budget."""
    result = run(tmp_path / "study", FidelityStudy((NOISE, GOOD), 8, repeats=2, drop=False))
    measured = set(fleet.asked)
    fleet.asked.clear()
    command = ["search", "-c", result["config"], "--max-high", "20", "--run-dir", str(tmp_path / "run"), "-q"]
    assert cli.main(command) == 0
    record = read_journal(tmp_path / "run" / "journal.jsonl")
    assert sum(t.fidelity == CONFIG.high for t in record.asked) == 20
    assert [t.number for t in record.asked] == list(range(len(record.asked)))
    imported = record.asked[:24]
    known = {(a, f.kd_loss, s) for a, f, s in measured}
    assert {(t.architecture, t.fidelity.kd_loss, t.seed) for t in imported} <= known
    full = {(a, s) for a, f, s in measured if f == CONFIG.high}
    assert full.isdisjoint((a, s) for a, f, s in fleet.asked if f == CONFIG.high)
    for trial in record.asked:
        if trial.fidelity == CONFIG.high:
            weights = tmp_path / "run" / "checkpoints" / str(trial.architecture) / f"{trial.key}.safetensors"
            assert weights.read_text() == f"weights of {trial.architecture}"


def test_evaluations_imported_from_a_study_are_not_taken_for_choices_of_the_surrogate(
    tmp_path: Path, fleet: Formula, capsys: pytest.CaptureFixture[str]
) -> None:
    """Neither by the predictions in the report nor by `explain`."""
    result = run(tmp_path / "study", FidelityStudy((GOOD,), 8))
    command = ["search", "-c", result["config"], "--max-high", "14", "--run-dir", str(tmp_path / "run"), "-q"]
    assert cli.main(command) == 0
    opened = open_run(str(tmp_path / "run"))
    full = [trial for trial in opened.record.asked if trial.fidelity == CONFIG.high]
    imported = {trial.architecture for trial in full[:8]}
    assert sorted(load_predictions(opened).at_ask_time()) == [
        trial.number for trial in full if trial.architecture not in imported and trial.seed == 0
    ]
    assert "except those imported from a fidelity study" in low_against_full(opened).caption
    capsys.readouterr()
    own = next(trial.architecture for trial in full if trial.architecture not in imported)
    for architecture, says, not_so in (
        (full[0].architecture, f"it was imported from the fidelity study {tmp_path}/study", "It was promoted"),
        (own, "It was promoted to full training", "it was imported"),
    ):
        assert cli.main(["explain", str(tmp_path / "run"), str(architecture)]) == 0
        told = capsys.readouterr().out
        assert says in told
        assert not_so not in told


def test_a_study_killed_while_being_extended_is_not_finished(tmp_path: Path, fleet: Formula) -> None:
    run(tmp_path / "study", FidelityStudy((GOOD,), 6))
    assert open_run(str(tmp_path / "study")).finished
    before = (tmp_path / "study" / "fidelity-study.json").read_bytes()
    run(tmp_path / "study", FidelityStudy((GOOD,), 8))
    assert open_run(str(tmp_path / "study")).finished
    (tmp_path / "study" / "fidelity-study.json").write_bytes(before)  # as a kill leaves it
    assert not open_run(str(tmp_path / "study")).finished


def test_the_report_of_a_study_does_not_describe_a_search(tmp_path: Path, fleet: Formula) -> None:
    run(tmp_path / "study", FidelityStudy((GOOD,), 8))
    opened = open_run(str(tmp_path / "study"))
    assert "spread evenly over MACs" in low_against_full(opened).caption
    for chart in predicted_against_measured(load_predictions(opened)):
        assert not chart.data
        assert "asks no surrogate" in chart.caption


def test_imported_evaluations_survive_a_cut_journal_and_other_settings_are_refused(
    tmp_path: Path, fleet: Formula
) -> None:
    run(tmp_path / "study", FidelityStudy((GOOD,), 8))
    config = recommended_config(tmp_path / "study")
    budget = Budget(max_low=12, max_high=10)
    whole = run_search(tmp_path / "run", config, budget)
    path = tmp_path / "run" / "journal.jsonl"
    lines = path.read_bytes().splitlines(keepends=True)
    for cut in (2, 10, 20):
        path.write_bytes(b"".join(lines[:cut]))
        assert run_search(tmp_path / "run", config, budget)["winner"] == whole["winner"]
        assert b"".join(sorted(path.read_bytes().splitlines())) == b"".join(sorted(b"".join(lines).splitlines()))
    with pytest.raises(UsageError, match="has other settings .*lr: 0.1 there, 0.2 here"):
        run_search(tmp_path / "other", replace(config, lr=0.2), budget)
    with pytest.raises(UsageError, match="no run folder; give that of a fidelity study"):
        run_search(tmp_path / "third", replace(config, fidelity_study=str(tmp_path)), budget)


def test_a_study_can_start_with_the_full_trainings_of_another(tmp_path: Path, fleet: Formula) -> None:
    """With other fidelities or another teacher: the full trainings are the expensive part."""
    run(tmp_path / "one", FidelityStudy((GOOD,), 6, repeats=2))
    fleet.asked.clear()
    teacher = tmp_path / "one" / "teacher" / "teacher.safetensors"
    config = replace(CONFIG, fidelity_study=str(tmp_path / "one"), teacher=str(teacher))
    result = run(tmp_path / "two", FidelityStudy((FAIR, NOISE), 6, repeats=2, drop=False), config)
    assert {f for _, f, _ in fleet.asked} == {FAIR, NOISE}
    assert [row["n"] for row in result["fidelities"]] == [6, 6]


def test_a_study_and_a_search_do_not_share_a_run_folder(tmp_path: Path, fleet: Formula) -> None:
    run(tmp_path / "study", FidelityStudy((GOOD,), 6))
    low = replace(GOOD, name="low")
    with pytest.raises(UsageError, match="holds a run of `fidelity-study`; choose another --name"):
        run_search(tmp_path / "study", replace(CONFIG, low=low))


def test_a_search_imports_only_what_it_may_propose(tmp_path: Path, fleet: Formula) -> None:
    run(tmp_path / "study", FidelityStudy((GOOD,), 8))
    studied = {e.trial.architecture for e in read_journal(tmp_path / "study" / "journal.jsonl").answers.values()}
    members = candidates(load_space(SPACE), classes=2, width=1.0, resolution=32)
    limit = float(np.median([members.macs[members.row(a)] for a in studied]))
    config = replace(recommended_config(tmp_path / "study"), max_macs=limit)
    run_search(tmp_path / "run", config, Budget(max_low=12, max_high=10))
    record = read_journal(tmp_path / "run" / "journal.jsonl").searched  # the baselines of its end may be larger
    assert all(members.macs[members.row(t.architecture)] <= limit for t in record.asked)
    assert studied & {t.architecture for t in record.asked}
    timed = replace(config, max_macs=float("inf"), max_latency_ms=5.0)
    assert not [t for t in _imported(timed, tmp_path / "timed") if t.fidelity == CONFIG.high]


def test_training_one_architecture_ignores_the_study_and_the_limits_of_its_search(
    tmp_path: Path, fleet: Formula
) -> None:
    run(tmp_path / "study", FidelityStudy((GOOD,), 6))
    config = replace(recommended_config(tmp_path / "study"), max_macs=3e6, max_latency_ms=5.0)
    wanted = "3-3-3-3-3-3"  # the largest
    fleet.asked.clear()
    settings = RunSettings(config, Budget(), Resources(device="cpu", workers=1))
    result = one_architecture.train(settings, wanted, tmp_path / "one", QUIET)
    assert result["architecture"] == wanted
    assert [str(architecture) for architecture, _, _ in fleet.asked] == [wanted]


@pytest.mark.parametrize("status", ["timeout", "diverged"])
def test_only_another_call_repeats_a_failed_training(
    status: Status, tmp_path: Path, fleet: Formula, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is the same trial, under whose key the training keeps its state between epochs."""

    def train() -> dict[str, Any]:
        settings = RunSettings(CONFIG, Budget(), Resources(device="cpu", workers=1))
        return one_architecture.train(settings, "0-1-2-3-2-1", tmp_path / "one", QUIET)

    with monkeypatch.context() as broken:
        broken.setattr(fleet, "measure", lambda trial, task: Evaluation(trial, status, error="too bad"))
        for _ in range(2):
            with pytest.raises(NoWinner, match="too bad"):
                train()
    assert train()["architecture"] == "0-1-2-3-2-1"
    record = read_journal(tmp_path / "one" / "journal.jsonl")
    assert [record.answers[t.number].status for t in record.asked] == [status, status, "ok"]
    assert len({trial.key for trial in record.asked}) == 1
    assert train()["valid_accuracy"] == record.answers[2].accuracy
    assert len(fleet.asked) == 1, "a successful training is not repeated"
    assert open_run(str(tmp_path / "one")).finished


def _imported(config: SearchConfig, path: Path) -> list[Trial]:
    """The trials of its study that a search with these settings starts with."""
    path.mkdir()
    folder, settings = RunFolder(path), RunSettings(config, Budget(), TWO_WORKERS)
    members = candidates(load_space(SPACE), classes=2, width=1.0, resolution=32)
    with open_context(settings, folder, layout(TWO_WORKERS), QUIET) as context, Journal(folder.journal) as journal:
        setup = SearchSetup(context, search_plan(config, Budget()), members, probe(context), members)
        warm_start(RunFolder(Path(config.fidelity_study)), setup, journal)
    return read_journal(folder.journal).asked


def test_a_study_of_other_images_or_a_missing_one_is_refused_before_a_teacher_is_trained(
    tmp_path: Path, fleet: Formula
) -> None:
    run(tmp_path / "study", FidelityStudy((GOOD,), 6))
    stored = json.loads((tmp_path / "study" / "run.json").read_text())
    stored["data"]["fingerprint"] = "of other images"
    (tmp_path / "study" / "run.json").write_text(json.dumps(stored))
    config = replace(CONFIG, fidelity_study=str(tmp_path / "study"), low=replace(GOOD, name="low"))
    for study, says in (
        (config.fidelity_study, "was run on other data"),
        (str(tmp_path / "typo"), "no run folder; give that of a fidelity study"),
    ):
        with pytest.raises(UsageError, match=says):
            run_search(tmp_path / "run", replace(config, fidelity_study=study))
        assert not (tmp_path / "run" / "teacher").exists()
    # No setting of the folder is fixed by then.
    run_search(tmp_path / "run", replace(config, fidelity_study=""), Budget(max_low=8, max_high=4))


def test_a_study_without_its_weights_is_refused_and_fixes_no_setting(tmp_path: Path, fleet: Formula) -> None:
    run(tmp_path / "study", FidelityStudy((GOOD,), 6))
    next((tmp_path / "study" / "checkpoints").glob("*/*.safetensors")).unlink()
    config = recommended_config(tmp_path / "study")
    few = Budget(max_low=8, max_high=4)
    says = "lacks the weights of 1 of its 6 full trainings: restore .* or leave --fidelity-study out"
    with pytest.raises(UsageError, match=says):
        run_search(tmp_path / "run", config, few)
    assert not read_journal(tmp_path / "run" / "journal.jsonl").asked
    other = {**fleet.run_probe({}), "fingerprint": "of other images"}
    fleet.run_probe = lambda task: other  # type: ignore[method-assign]
    run_search(tmp_path / "run", replace(config, fidelity_study=""), few)


def test_if_full_trainings_are_distilled_the_recommended_fidelity_is_too(tmp_path: Path, fleet: Formula) -> None:
    """And the search that follows starts with the study."""
    config = replace(CONFIG, high=replace(CONFIG.high, kd_loss="kd"))
    result = run(tmp_path / "study", FidelityStudy((NOISE, FAIR), 8, drop=False), config)
    assert result["recommended"] == FAIR.name
    fleet.asked.clear()
    command = ["search", "-c", result["config"], "--max-high", "10", "--run-dir", str(tmp_path / "run"), "-q"]
    assert cli.main(command) == 0
    assert len([f for _, f, _ in fleet.asked if f == config.high]) == 2


def test_loss_weights_of_a_low_fidelity_are_refused_if_full_trainings_are_distilled_too(
    tmp_path: Path, fleet: Formula
) -> None:
    config, warm = replace(CONFIG, high=replace(CONFIG.high, kd_loss="kd")), Fidelity.parse("kd@1/9x3:kd_temperature=2")
    with pytest.raises(UsageError, match="a search uses one set of weights for both"):
        run(tmp_path, FidelityStudy((NOISE, warm), 8), config)
    assert fleet.asked == []


def test_an_unfinished_study_is_resumed_before_its_search(
    tmp_path: Path, fleet: Formula, monkeypatch: pytest.MonkeyPatch
) -> None:
    short = RunSettings(CONFIG, Budget(max_high=20, gpu_hours=60 / 3600), TWO_WORKERS)
    with pytest.raises(NoWinner, match="is not finished"):
        study_before_search(short, tmp_path / "run", QUIET)
    assert not json.loads((tmp_path / "run" / "fidelity-study" / "fidelity-study.json").read_text())["complete"]
    settings = study_before_search(replace(short, budget=Budget(max_high=20)), tmp_path / "run", QUIET)
    assert settings.config.fidelity_study == str(tmp_path / "run" / "fidelity-study")
    assert json.loads((tmp_path / "run" / "fidelity-study" / "fidelity-study.json").read_text())["full"] == 10


@pytest.mark.parametrize("teacher", ["the same", "another"])
def test_low_scores_are_imported_if_the_teacher_is_the_same(teacher: str, tmp_path: Path, fleet: Formula) -> None:
    plain = Fidelity.parse("none@1/9x10")
    run(tmp_path / "one", FidelityStudy((plain, GOOD), 6, drop=False))
    (tmp_path / "one" / "teacher" / "teacher.safetensors").write_text("the same")
    mine = tmp_path / "mine.safetensors"
    mine.write_text(teacher)
    fleet.asked.clear()
    config = replace(CONFIG, fidelity_study=str(tmp_path / "one"), teacher=str(mine), teacher_epochs=7)
    run(tmp_path / "two", FidelityStudy((plain, GOOD, NOISE), 6, drop=False), config)
    assert {f for _, f, _ in fleet.asked} == ({NOISE} if teacher == "the same" else {GOOD, NOISE})
    journalled = read_journal(tmp_path / "two" / "journal.jsonl").asked
    assert {t.fidelity for t in journalled} == {CONFIG.high, plain, GOOD, NOISE}


def test_low_scores_with_other_loss_weights_are_not_imported(tmp_path: Path, fleet: Formula) -> None:
    run(tmp_path / "one", FidelityStudy((GOOD,), 6), replace(CONFIG, kd_temperature=2.0))
    fleet.asked.clear()
    teacher = tmp_path / "one" / "teacher" / "teacher.safetensors"
    config = replace(CONFIG, fidelity_study=str(tmp_path / "one"), teacher=str(teacher))
    run(tmp_path / "two", FidelityStudy((GOOD,), 6), config)
    assert {f for _, f, _ in fleet.asked} == {GOOD}


def test_low_auto_runs_a_study_first_and_only_once(
    tmp_path: Path, fleet: Formula, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["search", "--low", "auto", "--space", SPACE, "--max-high", "20", "--progress", "lines"]
    command += ["--run-dir", str(tmp_path / "run")]
    assert cli.main(command) == 0
    counted = [int(number) for number in re.findall(r"\] high +(\d+) ", capsys.readouterr().err)]
    assert counted == [*range(1, 11), *range(1, 21)], "the full trainings of the study, then those of the search"
    found = json.loads((tmp_path / "run" / "fidelity-study" / "fidelity-study.json").read_text())
    assert found["full"] == 10
    assert found["recommended"] in [low.name for low in default_lows(SearchConfig())]
    fleet.asked.clear()
    assert cli.main(command) == 0
    assert fleet.asked == []
    with pytest.raises(UsageError, match="--max-high must be more than 8"):
        study_before_search(RunSettings(CONFIG, Budget(max_high=8), TWO_WORKERS), tmp_path / "small", QUIET)


def fake(lows: dict[Fidelity, np.ndarray], full: np.ndarray, macs: np.ndarray) -> StudyScores:
    """Scores of architectures without networks; `full` (n, seeds)."""
    high = CONFIG.high
    accuracies = {high: full.tolist()} | {low: values[:, None].tolist() for low, values in lows.items()}
    seconds = {f: [9.0 if f == high else 1.0] * len(macs) for f in accuracies}
    return StudyScores([Architecture((i,)) for i in range(len(macs))], macs, high, accuracies, seconds)


def test_a_warning_if_full_training_ranks_by_luck_judging_by_a_second_seed_or_by_accuracy() -> None:
    once = np.array([[0.51], [0.53], [0.52]])
    found = fake({GOOD: once[:, 0]}, once, np.ones(3))
    assert "reaches 52.0 % on 2 classes" in luck_warning(found, 2)
    assert luck_warning(found, 100) == ""
    # Near guessing, but two seeds agree, so there is something to rank.
    alike = np.array([[0.03, 0.04], [0.05, 0.06], [0.07, 0.08]])
    assert luck_warning(fake({GOOD: alike[:, 0]}, alike, np.ones(3)), 100) == ""
    apart = np.array([[0.81, 0.84], [0.82, 0.83], [0.83, 0.82]])
    assert "a tau of only -1.00" in luck_warning(fake({GOOD: apart[:, 0]}, apart, np.ones(3)), 10)


def test_a_score_that_only_reflects_macs_has_no_tau_given_macs() -> None:
    rng = np.random.default_rng(0)
    macs, own = rng.random(60), rng.random(60)
    found = fake({NOISE: macs + 0.1 * rng.normal(size=60), GOOD: own}, (macs + own)[:, None], macs)
    plain, good = rank(found, NOISE), rank(found, GOOD)
    assert plain is not None
    assert good is not None
    assert plain.tau.value == pytest.approx(macs_alone(found).value, abs=0.1)
    assert abs(plain.given_macs.value) < 2 * plain.given_macs.stderr
    assert good.given_macs.value > 5 * good.given_macs.stderr
    gap = difference(found, GOOD, NOISE)
    assert gap is not None
    assert gap.value == pytest.approx(good.given_macs.value - plain.given_macs.value)


def test_a_study_ranks_by_every_readout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Cross entropy here ranks as full training does, and agreement at random; only distilled trainings have it."""

    class Reading(Formula):
        def measure(self, trial: Any, task: dict[str, Any]) -> Evaluation:
            quality = np.random.default_rng(trial.architecture.choices).random()
            luck = np.random.default_rng(int(trial.key, 16)).random()
            distilled = trial.fidelity.kd_loss != "none"
            more = {"cross_entropy": 2 - quality, "agreement": luck if distilled else None}
            return replace(super().measure(trial, task), **more)

    fleet = Reading()
    monkeypatch.setattr(run_context, "open_fleet", lambda resources, layout, logs: fleet)
    result = run(tmp_path / "study", FidelityStudy((NOISE, FAIR), 12, drop=False))
    undistilled, distilled = (row["readouts"] for row in result["fidelities"])
    assert set(undistilled) == {"cross_entropy"}
    assert set(distilled) == {"cross_entropy", "agreement"}
    assert undistilled["cross_entropy"]["tau"] > 0.9
    assert abs(distilled["agreement"]["tau"]) < 0.6
    assert result["fidelities"][0]["tau"] < 0.9, "accuracy is another readout"
    lines = table(result)
    assert [line.split()[:3] for line in lines if line.startswith("  by")] == [
        ["by", "cross", "entropy"], ["by", "cross", "entropy"], ["by", "agreement", "12"]
    ]  # fmt: skip
    assert len({len(line) for line in lines if line.startswith("  by")}) == 1, "columns are aligned"
    with open(tmp_path / "study" / "evaluations.csv") as file:
        rows = list(csv.DictReader(file))
    assert all(row["cross_entropy"] for row in rows)
    assert [row["fidelity"] for row in rows if row["agreement"]] == [FAIR.name] * 12


def test_intervals_have_their_nominal_coverage() -> None:
    """Over many studies the 95 % interval of tau contains the tau of the population nearly as often."""
    rng = np.random.default_rng(1)
    inside = 0
    for _ in range(60):
        quality = rng.normal(size=30)
        low = 0.7 * quality + np.sqrt(1 - 0.49) * rng.normal(size=30)
        found = rank(fake({GOOD: low}, quality[:, None], rng.random(30)), GOOD)
        assert found is not None
        inside += found.tau.low <= 2 / np.pi * np.arcsin(0.7) <= found.tau.high
    assert inside >= 50


def test_seeds_are_resampled_too_and_show_how_repeatable_full_training_is() -> None:
    rng = np.random.default_rng(2)
    quality, macs = rng.normal(size=20), rng.random(20)
    sharp = fake({GOOD: quality}, quality[:, None] + 0.01 * rng.normal(size=(20, 3)), macs)
    noisy = fake({GOOD: quality}, quality[:, None] + 2.0 * rng.normal(size=(20, 3)), macs)
    assert repeatability(sharp) > 0.95
    assert repeatability(noisy) < 0.6
    assert repeatability(fake({GOOD: quality}, quality[:, None], macs)) is None
    sharp.accuracies[sharp.high][4] = sharp.accuracies[sharp.high][4][:1]  # two of its trainings failed
    assert repeatability(sharp) > 0.95
    sure, unsure = rank(sharp, GOOD), rank(noisy, GOOD)
    assert sure is not None
    assert unsure is not None
    assert sure.tau.stderr < unsure.tau.stderr


def test_a_study_of_real_trainings(tmp_path: Path, tiny_npz: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The whole route on real networks. A fidelity's own loss weight reaches its loss: an absurd one fails."""
    command = ["fidelity-study", "--data", str(tiny_npz), "--space", "nasbench201:channels=4,cells=1", "--workers", "1"]
    command += ["--batch-size", "32", "--teacher-epochs", "1", "--high.epochs", "2", "--architectures", "4"]
    command += ["--lows", "none@1/2x1", "kd@1/2x1", "kd@1/2x1:ce_weight=3.3e38", "--device", "cpu"]
    assert cli.main([*command, "--run-dir", str(tmp_path / "study")]) == 0
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert result["full"] == 4
    assert [row["name"] for row in result["fidelities"]] == ["none@1/2x1", "kd@1/2x1"]
    with open(tmp_path / "study" / "evaluations.csv") as file:
        statuses = {row["status"] for row in csv.DictReader(file) if "weight" in row["fidelity"]}
    assert statuses
    assert "ok" not in statuses
    assert {"name", "tau", "tau_given_macs", "stderr", "seconds"} <= set(result["fidelities"][0])
