"""The end of a search: the winner's last training, its baselines, and what the result says of them."""

from __future__ import annotations

import json
import math
import re
from dataclasses import replace
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file

import cli
import mfkd
from engine.commands.search import summary
from engine.config import Budget, SearchConfig, final_fidelity
from engine.run_folder import RunFolder
from engine.search.baseline_networks import LARGEST, WITHIN, Baseline, baseline_networks, family_members
from engine.search.comparison import difference, standard_error, verdict
from engine.search.journal import read_journal
from engine.search.runs import open_run
from engine.space import Choice, FloatArray, IntMatrix, SearchSpace, candidates
from engine.trial import Architecture, Fidelity, Trial, fidelity_to_json, hits_from_text, hits_to_text, trial_from_json
from tests.searches import finish, measured, processes, read, search, start, until
from tests.test_search import BUDGET, CONFIG, Formula, run

EVERYTHING = replace(BUDGET, final_training="always", baselines="always")
NOTHING = replace(BUDGET, final_training="never")


def finals(run_dir: Path) -> list[Trial]:
    return [trial for trial in read_journal(run_dir / "journal.jsonl").asked if trial.fidelity.with_valid]


def questions(run_dir: Path) -> list[tuple[Any, ...]]:
    """What a search has asked, without its final trainings."""
    asked = read_journal(run_dir / "journal.jsonl").searched.asked
    return [(trial.architecture, trial.fidelity, trial.seed) for trial in asked]


class Breaking(Formula):
    """A fleet that fails at the final training of some architectures."""

    def __init__(self, *unlucky: str) -> None:
        super().__init__()
        self.unlucky = unlucky

    def run_trials(self, task: dict[str, Any]) -> list[dict[str, Any]]:
        answers = super().run_trials(task)
        for answer in answers:
            trial = trial_from_json(answer["trial"])
            if trial.fidelity.with_valid and ("*" in self.unlucky or str(trial.architecture) in self.unlucky):
                answer |= {"status": "oom", "accuracy": 0.0, "hits": "", "error": "no memory"}
        return answers


# ---- the winner ----------------------------------------------------------


def test_the_winner_is_trained_once_more_on_training_and_validation_images(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    result = run(tmp_path, monkeypatch, Formula(), budget=EVERYTHING)
    trial = finals(tmp_path / "run")[0]
    assert str(trial.architecture) == result["winner"]["architecture"] == result["final"]["architecture"]
    assert trial.fidelity == replace(
        CONFIG.high, name="final", epochs=2 * CONFIG.high.epochs, kd_loss="kd", with_valid=True
    )
    evaluation = read_journal(tmp_path / "run" / "journal.jsonl").answers[trial.number]
    assert result["final"]["test_accuracy"] == evaluation.accuracy
    assert result["final"]["weights"] == str(RunFolder(tmp_path / "run").weights(trial))
    assert result["winner"]["valid_standard_error"] == standard_error(result["winner"]["valid_accuracy"], 20)
    assert open_run(str(tmp_path / "run")).result == result


@pytest.mark.parametrize(("accuracy", "kd_loss"), [(0.3, "none"), (0.95, "kd")])
def test_only_a_teacher_better_than_the_winner_teaches_it_in_the_end(
    accuracy: float, kd_loss: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fleet = Formula()
    monkeypatch.setattr(fleet, "run_teacher", lambda task: Formula().run_teacher(task) | {"accuracy": accuracy})
    result = run(tmp_path, monkeypatch, fleet, budget=EVERYTHING)
    assert {trial.fidelity.kd_loss for trial in finals(tmp_path / "run")} == {kd_loss}
    assert [row["kd_loss"] for row in [result["final"], *result["baselines"]]] == [kd_loss, kd_loss]
    state = open_run(str(tmp_path / "run"))
    assert state.final is not None
    assert state.final.trial.fidelity.kd_loss == kd_loss


def test_the_final_fidelity_follows_the_search() -> None:
    high = replace(CONFIG.high, width=2.0, resolution=48)
    undistilled = replace(CONFIG, low=replace(CONFIG.low, kd_loss="none"), high=high)
    assert final_fidelity(undistilled).kd_loss == "none"
    assert (final_fidelity(undistilled).width, final_fidelity(undistilled).resolution) == (2.0, 48)
    longer = replace(CONFIG, final=Fidelity("final", epochs=50, kd_loss="kd+at"))
    assert (final_fidelity(longer).epochs, final_fidelity(longer).kd_loss) == (50, "kd+at")


def test_old_questions_keep_their_keys() -> None:
    """The names of weights files depend on them."""
    assert "with_valid" not in fidelity_to_json(CONFIG.high)
    trial = Trial(0, Architecture((1, 2)), Fidelity("high", epochs=60))
    assert trial.key == "278982d852f1fa38"
    assert replace(trial, fidelity=replace(trial.fidelity, with_valid=True)).key != trial.key


def test_final_trainings_do_not_change_what_the_search_asks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither in the first call nor after the budget was raised, with final trainings in the middle of the journal."""
    for name, budget in (("with", EVERYTHING), ("without", NOTHING)):
        for max_high in (BUDGET.max_high, BUDGET.max_high + 3):
            run(tmp_path / name, monkeypatch, Formula(), budget=replace(budget, max_high=max_high))
    asked = read_journal(tmp_path / "with" / "run" / "journal.jsonl").asked
    assert [trial.number for trial in asked] == list(range(len(asked)))
    assert len(finals(tmp_path / "with" / "run")) >= 2
    assert not finals(tmp_path / "without" / "run")
    assert questions(tmp_path / "with" / "run") == questions(tmp_path / "without" / "run")


def test_a_killed_extension_of_a_finished_search_comes_to_the_same_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run(tmp_path, monkeypatch, Formula(), budget=EVERYTHING)
    path = tmp_path / "run" / "journal.jsonl"
    before = len(path.read_bytes().splitlines())
    longer = replace(EVERYTHING, max_high=BUDGET.max_high + 3)
    whole = run(tmp_path, monkeypatch, Formula(), budget=longer)
    lines, record = path.read_bytes().splitlines(keepends=True), read_journal(path)
    for cut in range(before, len(lines)):
        path.write_bytes(b"".join(lines[:cut]))
        again = run(tmp_path, monkeypatch, Formula(), budget=longer)
        assert (again["winner"], again["final"], again["baselines"]) == tuple(
            whole[key] for key in ("winner", "final", "baselines")
        )
        assert read_journal(path).asked == record.asked
        assert read_journal(path).answers == record.answers


def test_a_finished_run_trains_nothing_again_but_may_do_what_it_left_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    short = run(tmp_path, monkeypatch, Formula(), budget=NOTHING)
    assert (short["final"], short["verdict"]) == (None, "")
    whole = run(tmp_path, monkeypatch, Formula(), budget=EVERYTHING)
    assert whole["winner"] == short["winner"]
    assert len(finals(tmp_path / "run")) == 1 + len({row["architecture"] for row in whole["baselines"]})
    fleet = Formula()
    assert run(tmp_path, monkeypatch, fleet, budget=EVERYTHING)["final"] == whole["final"]
    assert fleet.trials == []


# ---- which baselines -----------------------------------------------------


def test_the_baselines_of_a_space_are_its_largest_network_and_the_largest_within_the_limits() -> None:
    from engine.spaces.load import load_space

    space = load_space("nasbench201:channels=8,cells=1")
    members = candidates(space, classes=10, width=1.0, resolution=32)
    largest = members.architecture(int(members.macs.argmax()))
    assert baseline_networks(space, members, largest) == [Baseline(LARGEST, largest, within=True)]
    limit = float(np.quantile(members.macs, 0.4))
    inside = members.where(members.macs <= limit)
    within, whole = baseline_networks(space, inside, largest)
    assert (within.name, within.within, whole) == (WITHIN, True, Baseline(LARGEST, largest, within=False))
    assert members.macs[members.row(within.architecture)] == inside.macs.max()


def cut_space(size: int = 4) -> SearchSpace:
    """A space of resolution, width and depth with two families; MACs grow with every option."""
    factors = np.array([4.0, 2.0, 1.0])

    def cost(choices: IntMatrix, classes: int, width: float, resolution: int) -> tuple[FloatArray, FloatArray]:
        macs = 10.0 + choices.astype(float) @ factors
        return macs, macs

    top = size - 1
    families = {
        "lower resolution": np.array([[r, top, top] for r in range(size)], dtype=np.int8),
        "uniform width": np.array([[top, w, top] for w in range(size)], dtype=np.int8),
    }
    options = tuple(range(size))
    choices = tuple(Choice(name, options, ordinal=True) for name in ("resolution", "width", "depth"))
    return SearchSpace("cut", choices, lambda choices, classes, width: None, cost, families=families)  # type: ignore[arg-type,return-value]


@pytest.mark.parametrize(
    ("limit", "expected"),
    [
        (math.inf, {"lower resolution": (3, 3, 3), "uniform width": (3, 3, 3)}),
        (25.0, {"lower resolution": (1, 3, 3), "uniform width": (3, 0, 3)}),
        (23.0, {"lower resolution": (1, 3, 3)}),
        (18.0, {}),
    ],
)
def test_each_family_gives_its_largest_member_within_the_limits(
    limit: float, expected: dict[str, tuple[int, ...]]
) -> None:
    space = cut_space()
    members = candidates(space, classes=10, width=1.0, resolution=32)
    inside = members.where(members.macs <= limit)
    found = {name: inside.architecture(row).choices for name, row in family_members(space, inside).items()}
    assert found == expected
    if expected:
        names = [one.name for one in baseline_networks(space, inside, Architecture((3, 3, 3)))]
        assert names == list(expected)


def test_the_sample_of_a_large_space_contains_its_families(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("engine.space.POOL", 16)
    members = candidates(cut_space(), classes=10, width=1.0, resolution=32)
    assert len(members) < 64
    assert set(family_members(cut_space(), members)) == {"lower resolution", "uniform width"}


def test_a_baseline_that_is_the_winner_is_not_trained_twice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = replace(CONFIG, only="3-3-3-3-3-3,0-0-0-0-0-1")
    result = run(tmp_path, monkeypatch, Formula(), config=config, budget=replace(EVERYTHING, max_high=2))
    (row,) = result["baselines"]
    assert row["architecture"] == result["winner"]["architecture"] == "3-3-3-3-3-3"
    assert len(finals(tmp_path / "run")) == 1
    assert result["verdict"] == "The search was not needed: its winner is the baseline 'largest network'."


# ---- how much ------------------------------------------------------------


def test_by_default_the_end_of_a_search_costs_no_more_than_the_search(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cheap = replace(CONFIG, final=Fidelity("final", epochs=1))
    result = run(tmp_path / "cheap", monkeypatch, Formula(), config=cheap)
    assert result["final"]["epochs"] == 1
    assert [row["name"] for row in result["baselines"]] == [LARGEST]
    dear = replace(CONFIG, final=Fidelity("final", epochs=1000))
    result = run(tmp_path / "dear", monkeypatch, Formula(), config=dear)
    assert not finals(tmp_path / "dear" / "run")
    assert "because that would have cost more than the search did; --final-training always does it" in result["verdict"]
    always = replace(BUDGET, final_training="always")
    result = run(tmp_path / "dear", monkeypatch, Formula(), config=dear, budget=always)
    assert result["final"]["epochs"] == 1000
    assert result["baselines"] == []
    assert "no baseline was trained, because that would have cost more" in result["verdict"]


@pytest.mark.parametrize("limit", ["gpu_hours", "wall_time"])
def test_a_search_whose_time_is_used_up_names_the_flag_to_raise(
    limit: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run(tmp_path, monkeypatch, Formula(), budget=NOTHING)
    spent: dict[str, Any] = {limit: 1e-9}
    result = run(tmp_path, monkeypatch, Formula(), budget=replace(EVERYTHING, **spent))
    assert not finals(tmp_path / "run")
    flag = limit.replace("_", "-")
    assert f"because --{flag} was used up; raise it and run the same command again" in result["verdict"]


class Slow(Formula):
    """A fleet whose final trainings take 1,000 seconds."""

    def run_trials(self, task: dict[str, Any]) -> list[dict[str, Any]]:
        slow = {"seconds": 1000.0} if task["trials"][0]["fidelity"]["name"] == "final" else {}
        return [answer | slow for answer in super().run_trials(task)]


def test_final_trainings_count_towards_the_gpu_hours_of_an_extended_search(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run(tmp_path, monkeypatch, Slow(capacity=1), budget=EVERYTHING)
    for seconds, more in ((500, False), (5000, True)):
        fleet = Slow(capacity=1)
        longer = replace(EVERYTHING, max_high=BUDGET.max_high + 2, gpu_hours=seconds / 3600)
        run(tmp_path, monkeypatch, fleet, budget=longer)
        assert bool(fleet.trials) == more


def test_a_reached_target_does_not_keep_the_winner_from_its_last_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    result = run(tmp_path, monkeypatch, Formula(capacity=1), budget=replace(EVERYTHING, target_accuracy=0.01))
    assert result["evaluations"]["high"] < BUDGET.max_high
    assert result["final"] is not None


# ---- failures ------------------------------------------------------------


def test_a_baseline_that_fails_does_not_fail_the_search(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    budget = replace(EVERYTHING, max_failures=1)
    result = run(tmp_path, monkeypatch, Breaking("3-3-3-3-3-3"), budget=budget)
    (row,) = result["baselines"]
    assert (row["architecture"], row["status"], row["error"]) == ("3-3-3-3-3-3", "oom", "no memory")
    assert result["final"]["test_accuracy"] > 0
    assert "is not known: every baseline failed (largest network: oom)" in result["verdict"]
    assert re.search(r"\n  largest network +oom", summary(result))
    assert result["evaluations"]["failed"] == 1
    assert open_run(str(tmp_path / "run")).finished


def test_a_winner_whose_last_training_fails_is_still_the_winner(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from engine.search.one_architecture import select_evaluation

    result = run(tmp_path, monkeypatch, Breaking("*"), budget=EVERYTHING)
    assert result["final"] is None
    assert "its last training failed (oom: no memory)" in result["verdict"]
    chosen = select_evaluation(open_run(str(tmp_path / "run")), None)
    assert str(chosen.trial.architecture) == result["winner"]["architecture"]
    assert chosen.trial.fidelity == CONFIG.high


# ---- what it says --------------------------------------------------------


def test_hits_survive_their_text() -> None:
    for hits in ([False, False, True], [True] * 9, [False] * 4):
        assert hits_from_text(hits_to_text(hits)) == hits


def test_the_error_of_a_difference_is_that_of_paired_images() -> None:
    rng = np.random.default_rng(0)
    one, other = rng.random(400) < 0.8, rng.random(400) < 0.7
    gain, error = difference(hits_to_text(one), hits_to_text(other))
    pairs = one.astype(float) - other.astype(float)
    assert gain == pytest.approx(pairs.mean())
    assert error == pytest.approx(pairs.std() / 20)
    assert difference(hits_to_text(one), hits_to_text(one)) == (0.0, 0.0)


def row(difference: float, macs: float = 100.0, **more: Any) -> dict[str, Any]:
    tested = {"test_accuracy": 0.7 - difference, "test_images": 200, "difference_standard_error": 0.01}
    return {"name": "base", "within_limits": True, "difference": difference, "macs": macs, **tested, **more}


@pytest.mark.parametrize(
    ("rows", "says"),
    [
        ([row(0.05)], "The search was worth it: the finished winner is 5.0 points more accurate than .* 'base'"),
        ([row(0.01, 50)], r"The search was not shown to be worth it: .*, \+1.0 points .*at 1.00 times its"),
        ([row(-0.01)], r"The search was worth it for the size, as far as the test can tell: .*, -1.0 points .*at 0.50"),
        ([row(-0.05)], "The search was a trade of accuracy for size: the finished winner is 5.0 points less accurate"),
        ([row(-0.05, 50)], "The search was not worth it: the finished winner is 5.0 points less accurate"),
        ([row(0.05), row(0.03, name="better")], "more accurate than the baseline 'better'"),
        ([row(0.05), row(-0.2, name="larger", within_limits=False)], "5.0 points more accurate than .* 'base'"),
        ([row(0.05, None, network="timm:x")], r"error of the difference 1.0, paired over 200 test images\)\."),
        ([], "is not known: some reason"),
    ],
)
def test_the_verdict_is_one_plain_sentence(rows: list[dict[str, Any]], says: str) -> None:
    final = {"architecture": "1-2", "macs": 50, "test_accuracy": 0.7, "test_images": 200}
    said = verdict(final, rows, "some reason", classes=10)
    assert re.search(says, said), said
    assert said.endswith(".")


@pytest.mark.parametrize(("accuracy", "known"), [(0.14, False), (0.15, True)])
def test_a_winner_at_chance_level_was_not_worth_anything(accuracy: float, known: bool) -> None:
    """On 200 images, a guess among ten classes gets 0.10 ± 0.021."""
    final = {"architecture": "1-2", "macs": 50, "test_accuracy": accuracy, "test_images": 200}
    said = verdict(final, [row(0.05)], "", classes=10)
    assert ("no better than a guess among 10 classes" not in said) == known


def test_the_summary_names_both_networks_and_the_baselines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    result = run(tmp_path, monkeypatch, Formula(), budget=EVERYTHING)
    said = summary(result)
    assert f", test {100 * result['winner']['test_accuracy']:.1f} ± " in said
    assert re.search(rf"\n  the winner +{100 * result['final']['test_accuracy']:.1f} ± ", said)
    (row,) = result["baselines"]
    gap = f"{100 * row['difference']:+.1f} ± {100 * row['difference_standard_error']:.1f}"
    assert re.search(rf"\n  largest network +{100 * row['test_accuracy']:.1f} ± \S+ % +{re.escape(gap)} ", said)
    assert result["verdict"] in said


def test_a_configuration_of_an_earlier_version_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from engine.config import config_from_dict, config_to_dict

    stored = config_to_dict(SearchConfig())
    del stored["final"]
    assert config_from_dict(stored) == SearchConfig()
    assert Budget(max_low=3).baselines == "auto"
    assert Fraction(1) == final_fidelity(SearchConfig()).fraction


def test_the_final_fidelity_is_set_from_python_and_from_a_recommendation(tmp_path: Path) -> None:
    from engine.commands import search as command
    from engine.commands.flags import gather_settings
    from engine.search.fidelity_study.study import recommended_yaml

    flags = [f"--{key.replace('_', '-')}={value}" for key, value in mfkd._flags({"final": "kd+at@1x40"})]
    config = gather_settings(command.parser().parse_args(flags)).config
    assert config.final == Fidelity("final", epochs=40, kd_loss="kd+at")
    file = tmp_path / "recommended.yaml"
    file.write_text(recommended_yaml(config, config.low, RunFolder(tmp_path), "a reason"))
    assert gather_settings(command.parser().parse_args(["-c", str(file)])).config.final == config.final
    never = gather_settings(command.parser().parse_args(["--no-final", "--no-baselines"])).budget
    assert (never.final_training, never.baselines) == ("never", "never")


def test_a_single_candidate_is_finished_without_baselines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = replace(CONFIG, only="0-0-0-0-0-1")
    result = run(tmp_path, monkeypatch, Formula(), config=config, budget=replace(EVERYTHING, max_low=0))
    assert result["final"]["architecture"] == "0-0-0-0-0-1"
    assert result["baselines"] == []
    assert "there was only one candidate" in result["verdict"]


# ---- with real workers ---------------------------------------------------


LONG = ["--final.epochs=20", "--final-training=always", "--baselines=always"]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run folder of an undisturbed search with its final trainings."""
    folder = tmp_path_factory.mktemp("whole")
    search(folder, *LONG)
    return folder


def called(capsys: pytest.CaptureFixture[str], *arguments: str | Path) -> tuple[dict[str, Any], str]:
    assert cli.main([*map(str, arguments), "--device=cpu", "--progress=lines"]) == 0
    said = capsys.readouterr()
    return json.loads(said.out.splitlines()[-1]), said.err


def test_the_finished_weights_are_those_that_are_scored_and_exported(
    whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    result = json.loads(RunFolder(whole).result.read_text())
    final, winner = result["final"], result["winner"]
    scored, _ = called(capsys, "eval", whole)
    assert (scored["split"], scored["accuracy"]) == ("test", final["test_accuracy"])
    _, said = called(capsys, "eval", whole, "--split=valid")
    assert "this network was trained on the valid split too" in said
    baseline = result["baselines"][0]
    scored, _ = called(capsys, "eval", whole, "--arch", baseline["architecture"])
    assert scored["accuracy"] == baseline["test_accuracy"]
    called(capsys, "export", whole, "--out", tmp_path / "out")
    exported, theirs = (load_file(path) for path in (tmp_path / "out" / "weights.safetensors", final["weights"]))
    assert all(np.array_equal(exported[name], theirs[name]) for name in theirs)
    card = (tmp_path / "out" / "README.md").read_text()
    for text in (
        f"| accuracy, test split | {100 * final['test_accuracy']:.2f} % |",
        f"{100 * winner['valid_accuracy']:.2f} % validation, {100 * winner['test_accuracy']:.2f} % test",
        "| training | 20 epochs on all images, those of the validation split included",
        "| training in the search | 2 epochs on all images",
    ):
        assert text in card, text


def test_status_and_trials_know_final_trainings(whole: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["trials", str(whole), "--fidelity", "final", "--json"]) == 0
    listed = json.loads(capsys.readouterr().out)["trials"]
    assert [one["number"] for one in listed] == [trial.number for trial in finals(whole)]
    assert cli.main(["trials", str(whole), "--fidelity", "low", "--json"]) == 0
    assert {one["fidelity"] for one in json.loads(capsys.readouterr().out)["trials"]} == {"low"}
    assert cli.main(["status", str(whole), "--json"]) == 0
    state = json.loads(capsys.readouterr().out)
    assert state["state"] == "finished"
    assert state["evaluations"]["final"]["ok"] == len(finals(whole))
    assert state["evaluations"]["high"]["ok"] == 3
    assert cli.main(["status", str(whole)]) == 0
    assert state["verdict"].split(":")[0] in capsys.readouterr().out


def test_a_search_killed_in_its_final_training_ends_with_the_same_weights(whole: Path, tmp_path: Path) -> None:
    """Driver and worker are killed after an epoch of the winner's last training, which resumes there."""
    process = start(tmp_path, *LONG)
    winner = finals(whole)[0]
    state = RunFolder(tmp_path).training_state(winner)
    until(lambda: bool(read(tmp_path).answers))
    (worker,) = processes(tmp_path, "engine.fleet.worker")
    until(lambda: state.exists() or process.poll() is not None)
    process.kill()
    worker.kill()
    process.communicate()
    until(lambda: not processes(tmp_path), 30)
    assert state.exists(), "the training ended before it could be killed"
    assert winner.number not in read(tmp_path).answers
    finish(start(tmp_path, *LONG))
    assert measured(tmp_path) == measured(whole)
    for trial in finals(whole):
        mine, theirs = (load_file(RunFolder(folder).weights(trial)) for folder in (tmp_path, whole))
        assert all(np.array_equal(mine[name], theirs[name]) for name in theirs)
    results = [json.loads(RunFolder(folder).result.read_text()) for folder in (tmp_path, whole)]
    assert results[0]["final"]["test_accuracy"] == results[1]["final"]["test_accuracy"]
    assert results[0]["verdict"] == results[1]["verdict"]
