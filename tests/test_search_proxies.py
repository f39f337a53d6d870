"""Training-free scores in a search: which candidates get them, how they are recorded, and that resuming keeps them."""

from __future__ import annotations

import json
import os
import shutil
import signal
from collections.abc import Sequence
from dataclasses import replace
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import cli
from engine.config import Budget, Plan, Resources, RunSettings, SearchConfig, search_plan
from engine.fleet.supervisor import WorkerDied
from engine.report import accuracy_charts
from engine.run_folder import RunFolder
from engine.search import proxies, run_context, runs, search
from engine.search.journal import read_journal
from engine.search.methods import propose
from engine.search.predictions import load_predictions
from engine.search.progress import Display
from engine.search.proxies import CHUNK, IMAGES_PER_SCORE, LEAST, pool, ranks, read_scores, standing
from engine.space import Candidates, candidates
from engine.spaces.load import load_space
from engine.tasks import PROXIES, ProxyScores, ProxyTask, TeacherTask, WorkerSettings, task_to_json
from engine.training.run_tasks import run_proxies, run_teacher
from engine.trial import Architecture, Drained, EnvironmentUnusable, Fidelity, History, Trial
from tests.searches import finish, read, start, until
from tests.test_search import BUDGET, Formula

SPACE = "nasbench201:channels=4,cells=1"
# 80 training images and 60 epochs: 160 of 6,466 candidates are scored.
CONFIG = SearchConfig(space=SPACE, low=Fidelity("low", Fraction(1, 9), 3), high=Fidelity("high", epochs=60))
SCORED = 80 * 60 // IMAGES_PER_SCORE


class Scoring(Formula):
    """Scores are a formula of the choices; `scored` lists the architectures that were asked, `kills` ends workers."""

    def __init__(self, seconds: float = 0.01, kills: str = "") -> None:
        super().__init__(capacity=2)
        self.seconds, self.kills = seconds, kills
        self.scored: list[str] = []
        self.stop_after = 10**9
        self.on_stop: Any = None

    def run_proxies(self, task: dict[str, Any]) -> list[dict[str, Any]]:
        asked = ["-".join(map(str, choices)) for choices in task["architectures"]]
        if self.kills in asked:
            raise WorkerDied("the worker died: Segmentation fault")
        if len(self.scored) >= self.stop_after:
            self.on_stop()
            raise Drained("the search is being stopped")
        self.scored += asked
        return [self.score(choices) for choices in task["architectures"]]

    def score(self, choices: list[int]) -> dict[str, Any]:
        own = {"naswot": 10.0 * sum(choices), "diswot": -float(choices[0])}
        missing = {"diswot": "constant"} if choices[0] == 4 else {}
        scores = {name: value for name, value in own.items() if name not in missing}
        return {"choices": choices, "scores": scores, "missing": missing, "seconds": self.seconds}


class Watching:
    """The project's method, which keeps the candidates that it was shown."""

    def __init__(self) -> None:
        self.seen: list[Candidates] = []

    def __call__(self, found: Candidates, history: History, plan: Plan, slots: int) -> list[Trial]:
        self.seen.append(found)
        return propose.propose(found, history, plan, slots)


def run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fleet: Formula, config: SearchConfig = CONFIG, **budget: Any
) -> Candidates:
    """Runs or resumes a search; returns the candidates that its method saw."""
    monkeypatch.setattr(run_context, "open_fleet", lambda resources, layout, logs: fleet)
    settings = RunSettings(config, replace(BUDGET, **budget), Resources(device="cpu", workers=fleet.capacity))
    method = Watching()
    search.search(settings, tmp_path / "run", Display("none"), method=method)
    return method.seen[-1]


def same_trends(one: Candidates, other: Candidates) -> None:
    assert one.trends.keys() == other.trends.keys()
    for name, column in one.trends.items():
        np.testing.assert_array_equal(column, other.trends[name])


# Which candidates


@pytest.fixture(scope="module")
def everything() -> Candidates:
    return candidates(load_space(SPACE), 10, 1.0, 32)


def a_plan(epochs: int = 60, max_high: int = 20, seed: int = 0) -> Plan:
    return search_plan(replace(CONFIG, high=Fidelity("high", epochs=epochs), seed=seed), Budget(max_high=max_high))


def test_a_small_space_is_scored_whole_and_a_large_one_as_far_as_one_full_training_pays(everything: Candidates) -> None:
    rows = np.arange(len(everything))
    assert len(pool(everything, a_plan(), 400)) == 400 * 60 // IMAGES_PER_SCORE < len(everything)
    some = pool(everything.where(rows % 65 == 0), a_plan(), 4000)
    assert sorted(map(str, some)) == sorted(str(everything.architecture(row)) for row in rows[::65])
    assert set(pool(everything, a_plan(), 10**9)) == {everything.architecture(row) for row in rows}


def test_a_pool_is_spread_over_macs_and_so_is_its_beginning(everything: Candidates) -> None:
    """Scoring may end early, when its time is up."""
    found = [everything.row(architecture) for architecture in pool(everything, a_plan(), 400)]
    ranked = np.argsort(np.argsort(everything.macs, kind="stable"))[found] / len(everything)
    assert len(set(found)) == len(found) == 800
    for part in (ranked, ranked[:200]):
        np.testing.assert_allclose(np.quantile(part, [0.25, 0.5, 0.75]), [0.25, 0.5, 0.75], atol=0.1)


def test_a_pool_depends_on_the_seed_alone(everything: Candidates) -> None:
    assert pool(everything, a_plan(), 400) == pool(everything, a_plan(), 400)
    assert pool(everything, a_plan(), 400) != pool(everything, a_plan(seed=1), 400)


def test_nothing_is_scored_where_it_could_not_help(everything: Candidates) -> None:
    few = everything.where(np.arange(len(everything)) < 20)
    assert pool(few, a_plan(max_high=20), 4000) == []  # all are trained in full
    assert len(pool(few, a_plan(max_high=19), 4000)) == 20
    assert pool(everything, a_plan(epochs=1), IMAGES_PER_SCORE * (LEAST - 1)) == []
    assert len(pool(everything, a_plan(epochs=1), IMAGES_PER_SCORE * LEAST)) == LEAST


def test_a_method_that_cannot_do_without_scores_has_some(everything: Candidates) -> None:
    for method in ("proxies", "naswot"):
        assert len(pool(everything, replace(a_plan(epochs=1), method=method), 1)) == LEAST
        few = everything.where(np.arange(len(everything)) < 20)
        assert len(pool(few, replace(a_plan(), method=method), 4000)) == 20


# In a search


def test_the_method_sees_the_recorded_scores_as_trends(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fleet = Scoring()
    seen = run(tmp_path, monkeypatch, fleet)
    recorded = read_scores(tmp_path / "run" / "proxies.jsonl")
    assert len(recorded) == len(fleet.scored) == SCORED
    assert set(seen.trends) == {"proxy:naswot", "proxy:diswot"}
    assert (~np.isnan(seen.trends["proxy:naswot"])).sum() == SCORED
    missing = 0
    for architecture, known in recorded.items():
        row = seen.row(architecture)
        assert seen.trends["proxy:naswot"][row] == 10.0 * sum(architecture.choices)
        if architecture.choices[0] == 4:
            assert known.missing == {"diswot": "constant"}
            assert np.isnan(seen.trends["proxy:diswot"][row])
            missing += 1
    assert missing
    same_trends(load_predictions(runs.open_run(str(tmp_path / "run"))).candidates, seen)


@pytest.mark.parametrize(
    "change",
    [{"proxies": "none"}, {"method": "random"}, {"high": Fidelity("high", epochs=1)}],
    ids=["switched off", "a method without a surrogate", "trainings too short to pay for scores"],
)
def test_a_search_without_scores(change: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fleet = Scoring()
    seen = run(tmp_path, monkeypatch, fleet, replace(CONFIG, **change))
    assert fleet.scored == []
    assert seen.trends == {}
    assert not (tmp_path / "run" / "proxies.jsonl").exists()


def test_a_space_with_inherited_weights_is_not_scored_with_random_ones(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A search there opens with scores of inherited weights instead."""
    space = load_space(SPACE)
    inheriting = replace(space, inherit=lambda network, choices: network)
    monkeypatch.setattr(run_context, "load_space", lambda spec: inheriting)
    fleet = Scoring()
    assert run(tmp_path, monkeypatch, fleet).trends == {}
    assert fleet.scored == []


def test_an_interrupted_scoring_goes_on_where_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """After a kill the file is a prefix, perhaps with a torn line; what it holds is not scored again."""
    whole = run(tmp_path, monkeypatch, Scoring())
    folder = RunFolder(tmp_path / "run")
    trials = read_journal(folder.journal).asked
    lines = folder.proxies.read_bytes().splitlines(keepends=True)
    for kept, torn in ((0, b""), (1, b'{"choices":[1,'), (CHUNK + 3, b""), (SCORED, b"")):
        folder.proxies.write_bytes(b"".join(lines[:kept]) + torn)
        folder.journal.write_bytes(folder.journal.read_bytes().splitlines(keepends=True)[0])
        fleet = Scoring()
        same_trends(run(tmp_path, monkeypatch, fleet), whole)
        assert len(fleet.scored) == SCORED - kept
        assert sorted(folder.proxies.read_bytes().splitlines(keepends=True)) == sorted(lines)
        assert read_journal(folder.journal).asked == trials


def test_a_search_that_has_begun_uses_exactly_the_recorded_scores(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = run(tmp_path, monkeypatch, Scoring())
    fleet = Scoring()
    same_trends(run(tmp_path, monkeypatch, fleet, max_high=6), whole)
    assert fleet.scored == []
    path = tmp_path / "run" / "proxies.jsonl"
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join(lines[:-1]))
    with pytest.raises(EnvironmentUnusable, match=r"proxies.jsonl is missing or incomplete.*restore it from a copy"):
        run(tmp_path, monkeypatch, Scoring())
    path.write_bytes(b"".join([*lines[:2], b"not json\n", *lines[2:]]))
    with pytest.raises(EnvironmentUnusable, match=r"proxies.jsonl, line 3: not a line that this program wrote"):
        run(tmp_path, monkeypatch, Scoring())


def test_a_run_of_an_earlier_version_resumes_without_scores(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run(tmp_path, monkeypatch, Scoring(), replace(CONFIG, proxies="none"))
    folder = RunFolder(tmp_path / "run")
    folder.config.write_text(folder.config.read_text().replace("  proxies: none\n", ""))
    facts = json.loads(folder.run_file.read_text())
    del facts["proxies"]
    folder.run_file.write_text(json.dumps(facts))
    for max_high in (5, 6):
        fleet = Scoring()
        assert run(tmp_path, monkeypatch, fleet, max_high=max_high).trends == {}
        assert fleet.scored == []


def test_a_network_that_kills_its_worker_has_no_scores_and_the_others_have(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run(tmp_path, monkeypatch, Scoring())
    victim = next(iter(read_scores(tmp_path / "run" / "proxies.jsonl")))
    fleet = Scoring(kills=str(victim))
    seen = run(tmp_path / "again", monkeypatch, fleet)
    known = read_scores(tmp_path / "again" / "run" / "proxies.jsonl")
    assert len(known) == SCORED
    assert known[victim].scores == {}
    assert known[victim].missing == dict.fromkeys(PROXIES, "the worker died: Segmentation fault")
    assert np.isnan(seen.trends["proxy:naswot"][seen.row(victim)])
    assert (~np.isnan(seen.trends["proxy:naswot"])).sum() == SCORED - 1


@pytest.mark.parametrize(("budget", "allowed"), [({}, 1800), ({"gpu_hours": 2.0}, 720), ({"wall_time": 1.0}, 720)])
def test_scoring_a_slow_space_ends_when_its_time_is_up(
    budget: dict[str, float], allowed: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A tenth of --gpu-hours, or of the hours of two workers; at most half an hour of one worker."""
    fleet = Scoring(seconds=30.0)
    seen = run(tmp_path, monkeypatch, fleet, **budget)
    chunks = -(-allowed // (30 * CHUNK))
    assert chunks * CHUNK <= len(fleet.scored) <= (chunks + 3) * CHUNK < SCORED
    assert (~np.isnan(seen.trends["proxy:naswot"])).sum() == len(fleet.scored)


def test_a_stop_while_scoring_keeps_what_has_arrived(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fleet = Scoring()
    fleet.stop_after, fleet.on_stop = 3 * CHUNK, lambda: os.kill(os.getpid(), signal.SIGTERM)
    with pytest.raises(Drained, match="SIGTERM"):
        run(tmp_path, monkeypatch, fleet)
    folder = RunFolder(tmp_path / "run")
    assert read_journal(folder.journal).asked == []
    assert len(read_scores(folder.proxies)) == 3 * CHUNK
    again = Scoring()
    run(tmp_path, monkeypatch, again)
    assert len(again.scored) == SCORED - 3 * CHUNK


def test_a_search_killed_while_it_scores_comes_to_the_same_end(tmp_path: Path) -> None:
    """Real processes; the space has 64 members."""
    flags = ("--high.epochs=20", "--max-high=1", "--max-low=2", "--no-final", "--no-baselines")
    whole, killed = RunFolder(tmp_path / "whole"), RunFolder(tmp_path / "killed")
    finish(start(whole.path, *flags))
    process = start(killed.path, *flags, TRIAL_S="0.05")
    until(lambda: killed.proxies.exists() and killed.proxies.read_bytes().count(b"\n") >= CHUNK)
    process.kill()
    process.communicate()
    before = killed.proxies.read_bytes()
    assert read(killed.path).asked == []
    finish(start(killed.path, *flags))
    assert killed.proxies.read_bytes().startswith(before[: before.rfind(b"\n") + 1])
    one, other = (read_scores(folder.proxies) for folder in (whole, killed))
    assert len(one) == 64
    assert {a: known.scores for a, known in one.items()} == {a: known.scores for a, known in other.items()}
    assert read(whole.path).asked == read(killed.path).asked


# On a worker


def test_a_worker_scores_with_the_run_s_teacher(tiny_npz: Path, tmp_path: Path) -> None:
    torch.set_num_threads(1)
    config = replace(CONFIG, data=str(tiny_npz), teacher_epochs=1, data_backend="resident")
    worker, path = WorkerSettings(config, tmp_path, "cpu"), tmp_path / "teacher.safetensors"
    run_teacher(task_to_json(TeacherTask(worker, f"{SPACE}#3-3-3-3-3-3", path)))
    two = (Architecture((3, 1, 2, 3, 3, 2)), Architecture((2, 3, 3, 1, 0, 2)))

    def score(architectures: Sequence[Architecture], teacher: Path | None) -> list[ProxyScores]:
        answer = run_proxies(json.loads(json.dumps(task_to_json(ProxyTask(worker, tuple(architectures), teacher)))))
        return [ProxyScores(tuple(a["choices"]), a["scores"], a["missing"], a["seconds"]) for a in answer]

    both, (alone,) = score(two, path), score(two[1:], path)
    assert [known.choices for known in both] == [one.choices for one in two]
    assert all(set(known.scores) == set(PROXIES) and known.seconds > 0 for known in both)
    assert alone.scores == both[1].scores  # whoever is scored beside it
    (without,) = score(two[1:], None)
    assert without.scores == {name: value for name, value in alone.scores.items() if name != "diswot"}
    assert "needs a teacher" in without.missing["diswot"]


# Shown


def known(choices: int, **scores: float) -> tuple[Architecture, ProxyScores]:
    return Architecture((choices,)), ProxyScores((choices,), scores, {})


def test_ranks_and_standing() -> None:
    recorded = dict([known(0, a=1.0, b=5.0), known(1, a=3.0, b=5.0), known(2, a=2.0), known(3)])
    names = [Architecture((i,)) for i in range(4)]
    assert ranks(recorded) == {
        names[0]: {"a": 3, "b": 1},
        names[1]: {"a": 1, "b": 1},
        names[2]: {"a": 2},
        names[3]: {},
    }
    assert standing(recorded) == {names[0]: 0.5, names[1]: 1.0, names[2]: 0.5}
    assert standing({}) == {}


@pytest.fixture
def scored_run(finished_run: Path, tmp_path: Path) -> runs.Run:
    """A finished run in which every second architecture that was asked for has scores."""
    shutil.copytree(finished_run, tmp_path / "run")
    folder = RunFolder(tmp_path / "run")
    asked = list(dict.fromkeys(trial.architecture for trial in read_journal(folder.journal).asked))
    entries = [
        {"choices": list(a.choices), "scores": {"naswot": float(i)}, "missing": {"diswot": "no teacher"}, "seconds": 2}
        for i, a in enumerate(asked[::2])
    ]
    folder.proxies.write_text("".join(json.dumps(entry) + "\n" for entry in entries))
    return runs.open_run(str(folder))


def test_commands_show_the_scores(scored_run: runs.Run, capsys: pytest.CaptureFixture[str]) -> None:
    def command(line: str) -> str:
        assert cli.main(line.split()) == 0
        return capsys.readouterr().out

    folder, count = scored_run.folder, len(scored_run.proxies)
    best = list(scored_run.proxies)[-1]
    rows = json.loads(command(f"trials {folder} --sort standing --json"))["trials"]
    assert (rows[0]["architecture"], rows[0]["standing"]) == (str(best), 1.0)
    assert rows[0]["proxy:naswot"] == count - 1
    assert "standing" not in rows[-1]
    assert "standing" in command(f"trials {folder}")
    assert "proxy:naswot" in command(f"trials {folder} --csv").splitlines()[0]
    state = json.loads(command(f"status {folder} --json"))
    assert state["proxies"] == {"candidates": count, "seconds": 2.0 * count}
    assert f"{count} candidates scored" in command(f"status {folder}")
    explained = command(f"explain {folder} {best}")
    assert f"untrained: naswot {count - 1:.4g} (1 of {count})" in explained
    assert "untrained: no diswot: no teacher" in explained


def test_hovering_shows_the_standing(scored_run: runs.Run, finished_run: Path) -> None:
    chart = accuracy_charts.low_against_full(scored_run)
    texts = chart.data[0]["text"]
    assert any("<br>standing before training" in text for text in texts)
    plain = accuracy_charts.low_against_full(runs.open_run(str(finished_run))).data[0]["text"]
    assert plain == [text.partition("<br>")[0] for text in texts]


def test_a_run_without_scores_shows_none(finished_run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["trials", str(finished_run)]) == 0
    assert "standing" not in capsys.readouterr().out
    assert cli.main(["explain", str(finished_run), "3-3-3-3-3-3"]) == 0
    assert "untrained" not in capsys.readouterr().out


def test_the_summary_names_the_most_common_reason() -> None:
    recorded = dict([known(0, a=1.0), known(1)])
    recorded[Architecture((1,))] = ProxyScores((1,), {}, {"naswot": "no ReLU"}, 3.0)
    expected = "2 candidates scored without training in 3 worker seconds; 1 of them without some score, mostly "
    assert proxies.summary(recorded) == expected + "naswot: no ReLU"
