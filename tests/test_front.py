"""The front of a run: which networks are on it, how sure that is, and its export as a whole."""

from __future__ import annotations

import csv
import hashlib
import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import cli
from engine.run_folder import RunFolder
from engine.search import front_export
from engine.search.comparison import standard_error
from engine.search.front import COSTS, FrontMember, cost_axis, front, in_unit, trained_in_full
from engine.search.runs import open_run
from engine.trial import Architecture, Evaluation, Fidelity, Trial, hits_to_text

HIGH, FINAL = Fidelity("high", epochs=20), Fidelity("final", epochs=60, with_valid=True)
FOLDER = RunFolder(Path("/run"))


def evaluated(name: int, accuracy: float, seed: int = 0, fidelity: Fidelity = HIGH, **more: Any) -> Evaluation:
    trial = Trial(1000 * seed + name, Architecture((name,)), fidelity, seed)
    return Evaluation(trial, "ok", accuracy, **{"macs": 10 * (name + 1), "params": 5 * (name + 1), **more})


@pytest.mark.parametrize("cost", COSTS)
@pytest.mark.parametrize("seed", range(5))
def test_no_network_beats_one_of_the_front_and_one_of_the_front_beats_every_other(cost: str, seed: int) -> None:
    rng = np.random.default_rng(seed)

    def drawn(name: int) -> Evaluation:  # few values, so that some networks are equal in one or in both
        time = {"latency_ms": float(rng.integers(1, 8))} if name % 7 else {}
        sizes = {"macs": int(rng.integers(1, 12)), "params": int(rng.integers(1, 12))}
        return evaluated(name, rng.integers(3, 9) / 10, **sizes, costs=time)

    trained = trained_in_full([drawn(name) for name in range(40)], HIGH, 100, FOLDER)
    found = {member.architecture for member in front(trained, cost)}

    def as_good(one: FrontMember, other: FrontMember) -> bool:
        own, theirs = one.cost(cost), other.cost(cost)
        return own is not None and own <= (theirs or 0.0) and one.valid_accuracy >= other.valid_accuracy

    known = [one for one in trained if one.cost(cost) is not None]
    assert {one.architecture for one in known} >= found
    assert len(known) == (34 if cost == "latency_ms" else 40)
    for one in known:
        rivals = [other for other in known if other is not one and as_good(other, one)]
        if one.architecture in found:
            assert all(as_good(one, other) for other in rivals), "only an equal may be as good"
        else:
            assert any(other.architecture in found for other in rivals)


def test_repeated_trainings_count_by_their_mean_and_their_spread() -> None:
    lucky = [evaluated(0, 0.7, seed=0), evaluated(0, 0.5, seed=1), evaluated(0, 0.6, seed=2)]
    steady = evaluated(1, 0.65)
    members = front(trained_in_full([*lucky, steady], HIGH, 1000, FOLDER), "macs")
    assert [m.valid_accuracy for m in members] == pytest.approx([0.6, 0.65])
    assert members[0].seeds == (0, 1, 2)
    assert members[0].weights == FOLDER.weights(lucky[0].trial)
    images, seeds = standard_error(0.6, 1000), 0.1 / 3**0.5
    assert members[0].valid_standard_error == pytest.approx((images**2 + seeds**2) ** 0.5)
    assert members[0].judged == (
        "Trained for 20 epochs with the seeds 0, 1, 2 (their mean); scored on 1,000 validation images"
    )
    assert members[1].valid_standard_error == pytest.approx(standard_error(0.65, 1000))


def test_a_member_that_is_not_clearly_better_than_a_cheaper_one_names_it() -> None:
    """On 1,000 images the difference of two accuracies of 60 % has a standard error of 2.2 points."""
    trained = trained_in_full([evaluated(i, a) for i, a in enumerate((0.5, 0.6, 0.64, 0.8))], HIGH, 1000, FOLDER)
    assert [m.within_error_of for m in front(trained, "macs")] == [None, None, Architecture((1,)), None]
    few = trained_in_full([evaluated(i, a) for i, a in enumerate((0.5, 0.6, 0.64, 0.8))], HIGH, 20, FOLDER)
    assert [m.within_error_of for m in front(few, "macs")] == [None, *[Architecture((0,))] * 2, Architecture((1,))]


def test_only_full_trainings_count_and_a_final_one_adds_its_test_accuracy() -> None:
    final = evaluated(0, 0.9, fidelity=FINAL, hits=hits_to_text([True] * 9 + [False]))
    others = [evaluated(1, 0.99, fidelity=Fidelity("low")), Evaluation(Trial(5, Architecture((2,)), HIGH), "oom")]
    (member,) = front(trained_in_full([evaluated(0, 0.6), final, *others], HIGH, 100, FOLDER), "macs")
    assert (member.valid_accuracy, member.epochs, member.test_accuracy, member.final_epochs) == (0.6, 20, 0.9, 60)
    assert (member.test_images, member.final_weights) == (10, FOLDER.weights(final.trial))
    assert member.test_standard_error == pytest.approx((0.9 * 0.1 / 10) ** 0.5)


def test_a_latency_from_elsewhere_stands_in_for_one_that_was_not_measured() -> None:
    timed, untimed = evaluated(0, 0.5, costs={"latency_ms": 2.0}), evaluated(1, 0.6)
    elsewhere = {Architecture((0,)): 9.0, Architecture((1,)): 3.0}
    assert [m.latency_ms for m in front(trained_in_full([timed, untimed], HIGH, 9, FOLDER), "latency_ms")] == [2.0]
    known = trained_in_full([timed, untimed], HIGH, 9, FOLDER, elsewhere)
    assert [m.latency_ms for m in front(known, "latency_ms")] == [2.0, 3.0]


def test_sizes_from_tiny_to_huge_networks_are_readable() -> None:
    assert [in_unit(macs, "macs") for macs in (142_912, 8_490_000, 99_960_000, 4_121_900_000)] == [
        "0.143", "8.49", "100", "4,122",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("objectives", "cost"),
    [
        ("accuracy", "macs"),
        ("accuracy,macs", "macs"),
        ("accuracy,params", "params"),
        ("accuracy,latency", "latency_ms"),
    ],
)
def test_the_cost_of_the_front_is_that_of_the_objectives(objectives: str, cost: str) -> None:
    assert cost_axis(objectives) == cost


def test_status_and_trials_show_the_front(finished_run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    members = open_run(str(finished_run)).front
    names = [str(member.architecture) for member in members]
    assert len(names) > 1
    assert cli.main(["trials", str(finished_run), "--front", "--json"]) == 0
    listed = json.loads(capsys.readouterr().out)["front"]
    assert [(one["architecture"], one["valid_accuracy"]) for one in listed] == [
        (str(member.architecture), member.valid_accuracy) for member in members
    ]
    assert listed[0]["weights"] == str(members[0].weights)
    assert cli.main(["trials", str(finished_run), "--front", "--limit", "1"]) == 0
    table = capsys.readouterr().out
    assert names[0] in table
    assert names[1] not in table
    assert cli.main(["status", str(finished_run), "--json"]) == 0
    assert [one["architecture"] for one in json.loads(capsys.readouterr().out)["front"]] == names
    assert cli.main(["status", str(finished_run)]) == 0
    screen = capsys.readouterr().out
    assert f"valid {members[0].valid_accuracy:.4f} ± {members[0].valid_standard_error:.4f}" in screen
    assert cli.main(["trials", str(finished_run), "--front", "--sort", "macs"]) == 2
    assert "leave --fidelity, --status and --sort out" in capsys.readouterr().err


class Exports:
    """Stands for the worker: writes what an export leaves, or fails for the architectures in `broken`."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.made: list[str] = []
        self.broken: set[str] = set()
        self.workers = 0
        monkeypatch.setattr(front_export, "exporter", self._worker)
        monkeypatch.setattr(front_export, "export", self._export)

    @contextmanager
    def _worker(self, run: Any, resources: Any) -> Iterator[None]:
        self.workers += 1
        yield None

    def _export(self, run: Any, evaluation: Evaluation, out: Path, fleet: Any, display: Any) -> None:
        name = str(evaluation.trial.architecture)
        if name in self.broken:
            raise front_export.UsageError(f"torch cannot export {name}")
        out.mkdir(parents=True, exist_ok=True)
        (out / "README.md").write_text(f"# {name}")
        checkpoint = run.folder.weights(evaluation.trial).read_bytes()
        record = {"files": ["README.md"], "latency_ms": {"torch, batch 1": 1.5}}
        record["weights_sha256"] = hashlib.sha256(checkpoint).hexdigest()
        (out / "export.json").write_text(json.dumps(record))
        self.made.append(name)


@pytest.fixture
def trained(finished_run: Path, tmp_path: Path) -> Path:
    """A copy of the finished run with a weights file for each network on its front."""
    shutil.copytree(finished_run, tmp_path / "run")
    for member in open_run(str(tmp_path / "run")).front:
        member.weights.parent.mkdir(parents=True)
        member.weights.write_text(f"weights of {member.architecture}")
    return tmp_path / "run"


def test_the_front_is_exported_as_a_whole_and_only_what_has_changed_is_exported_again(
    trained: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    exports, members = Exports(monkeypatch), open_run(str(trained)).front
    names = [str(member.architecture) for member in members]
    exports.broken = {names[0]}
    assert cli.main(["export", str(trained), "--front"]) == 2
    said = capsys.readouterr().err
    assert f"1 of {len(names)} members were not exported to {trained / 'export'}; {names[0]}: torch cannot" in said
    assert exports.made == names[1:], "one that cannot be exported does not keep the others from it"
    exports.broken, exports.made = set(), []
    assert cli.main(["export", str(trained), "--front"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["exported"], found["skipped"]) == ([names[0]], names[1:])
    rows = list(csv.DictReader((trained / "export" / "front.csv").open()))
    assert [row["architecture"] for row in rows] == [row["folder"] for row in rows] == names
    assert [float(row["valid_standard_error"]) for row in rows] == [m.valid_standard_error for m in members]
    assert rows[0]["torch, batch 1 (ms)"] == "1.5"
    page = (trained / "export" / "front.md").read_text()
    assert f"| [`{names[0]}`]({names[0]}/README.md) |" in page
    assert page.count("(winner)") == 1

    exports.made, exports.workers = [], 0
    assert cli.main(["export", str(trained), "--front"]) == 0
    assert (exports.made, exports.workers) == ([], 0), "nothing to do starts no worker"
    members[0].weights.write_text("other weights, after a longer training")
    (trained / "export" / names[1] / "README.md").unlink()
    assert cli.main(["export", str(trained), "--front"]) == 0
    assert exports.made == names[:2]


def test_a_front_without_a_network_or_with_a_file_in_its_place_is_refused(
    trained: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["export", str(trained), "--front", "--out", str(trained / "config.yaml")]) == 2
    assert "config.yaml is a file; give --out a folder" in capsys.readouterr().err
    assert cli.main(["export", str(trained), "--front", "--arch", "3-3-3-3-3-3"]) == 2
    assert "give one of them" in capsys.readouterr().err
    run = open_run(str(trained))
    empty = replace(run, record=replace(run.record, answers={}))
    with pytest.raises(front_export.UsageError, match="no network trained in full yet"):
        front_export.export_front(empty, trained / "out", None, None)  # type: ignore[arg-type]
