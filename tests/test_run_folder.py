"""The run folder: the names of its files, and the settings that stay fixed for its life."""

from __future__ import annotations

import os
from dataclasses import replace
from fractions import Fraction
from pathlib import Path

import pytest
import yaml
from torch import nn

from engine.config import Budget, SearchConfig, Slots, slots_for
from engine.run_folder import RunFolder, write_atomically
from engine.training.weights import save_weights
from engine.trial import Architecture, EnvironmentUnusable, Fidelity, Trial, UsageError

CONFIG = SearchConfig(low=Fidelity("low", Fraction(1, 27), 30, kd_loss="kd+at"))


@pytest.fixture
def folder(tmp_path: Path) -> RunFolder:
    return RunFolder(tmp_path)


def test_each_file_of_a_run_has_a_path_of_its_own(folder: RunFolder) -> None:
    trial = Trial(0, Architecture((1, 2)), Fidelity("high"))
    paths = [
        folder.config,
        folder.journal,
        folder.run_file,
        folder.result,
        folder.latencies,
        folder.teacher,
        folder.logs,
        folder.report,
        folder.tensorboard,
        folder.mlflow_id,
        folder.first_study.path,
        folder.study_result,
        folder.study_picture,
        folder.study_evaluations,
        folder.recommended,
        folder.weights(trial),
        folder.training_state(trial),
        folder.export("1-2"),
    ]
    assert len(set(paths)) == len(paths)
    assert all(path.is_relative_to(folder.path) for path in paths)


def test_trials_share_weights_only_if_they_ask_the_same_question(folder: RunFolder) -> None:
    trial = Trial(0, Architecture((1, 2)), Fidelity("high"))
    assert folder.weights(replace(trial, number=7)) == folder.weights(trial)
    for other in (replace(trial, seed=1), replace(trial, fidelity=Fidelity("high", epochs=3))):
        assert folder.weights(other) != folder.weights(trial)
        assert folder.training_state(other) != folder.training_state(trial)


def test_the_teacher_is_the_file_that_the_settings_name_or_the_run_s_own(folder: RunFolder) -> None:
    assert folder.teacher_weights(SearchConfig()) == folder.teacher
    assert folder.teacher_weights(SearchConfig(teacher="timm:resnet18")) == folder.teacher
    named = folder.teacher_weights(SearchConfig(teacher="mine.safetensors"))
    assert named == Path("mine.safetensors").absolute()


def test_a_resumed_run_keeps_its_slots(folder: RunFolder) -> None:
    first = folder.fix_config("search", CONFIG, Budget(), slots_for(workers=8, cohort=4))
    assert first == Slots(total=40, cohort=4)
    assert folder.fix_config("search", CONFIG, Budget(max_high=9), slots_for(workers=1, cohort=1)) == first


def test_a_later_call_with_more_workers_adds_slots_and_the_run_keeps_them(folder: RunFolder) -> None:
    folder.fix_config("search", CONFIG, Budget(), slots_for(workers=1, cohort=4))
    grown = folder.fix_config("search", CONFIG, Budget(), slots_for(workers=8, cohort=1))
    assert grown == slots_for(workers=8, cohort=4)
    assert folder.fix_config("search", CONFIG, Budget(), slots_for(workers=2, cohort=4)) == grown


def test_other_settings_are_refused_with_the_difference(folder: RunFolder) -> None:
    folder.fix_config("search", CONFIG, Budget(), Slots(1, 1))
    changed = replace(CONFIG, lr=0.3, low=replace(CONFIG.low, epochs=5))
    with pytest.raises(UsageError, match=r"low.epochs: 30 there, 5 here; lr: 0.1 there, 0.3 here"):
        folder.fix_config("search", changed, Budget(), Slots(1, 1))


def test_a_folder_holds_one_kind_of_run(folder: RunFolder) -> None:
    folder.fix_config("search", CONFIG, Budget(), Slots(1, 1))
    with pytest.raises(UsageError, match=r"holds a run of `search`.*for `fidelity-study`"):
        folder.fix_config("fidelity-study", CONFIG, Budget(), Slots(1, 1))


def test_a_later_call_of_a_study_may_compare_other_low_fidelities(folder: RunFolder) -> None:
    folder.fix_config("fidelity-study", CONFIG, Budget(), Slots(1, 1))
    folder.fix_config("fidelity-study", replace(CONFIG, low=Fidelity("low", epochs=1)), Budget(), Slots(1, 1))
    with pytest.raises(UsageError, match=r"high.epochs: 60 there, 7 here"):
        folder.fix_config("fidelity-study", replace(CONFIG, high=Fidelity("high", epochs=7)), Budget(), Slots(1, 1))


def test_settings_unknown_to_an_older_version_count_as_their_defaults(folder: RunFolder) -> None:
    folder.fix_config("search", CONFIG, Budget(), Slots(1, 1))
    lines = folder.config.read_text().splitlines(keepends=True)
    folder.config.write_text("".join(line for line in lines if "ema_decay" not in line))
    folder.fix_config("search", CONFIG, Budget(), Slots(1, 1))
    with pytest.raises(UsageError, match=r"ema_decay: 0.0 there, 0.9 here"):
        folder.fix_config("search", replace(CONFIG, ema_decay=0.9), Budget(), Slots(1, 1))


@pytest.mark.parametrize("text", ["config: [1\n", "just text\n", "config: {}\n"])
def test_a_damaged_configuration_is_named(text: str, folder: RunFolder) -> None:
    folder.config.write_text(text)
    with pytest.raises(EnvironmentUnusable, match=r"(?s)config.yaml.*restore it"):
        folder.read_config()


def test_paths_into_a_moved_folder_are_updated(tmp_path: Path) -> None:
    """A run of `--low auto` starts with the study in its own folder, and uses the teacher of that study."""
    old = RunFolder(tmp_path / "old")
    old.first_study.teacher.parent.mkdir(parents=True)
    old.first_study.teacher.touch()
    config = replace(CONFIG, fidelity_study=str(old.first_study), teacher=str(old.first_study.teacher))
    slots = old.fix_config("search", config, Budget(), Slots(2, 1))
    new = RunFolder(old.path.rename(tmp_path / "new"))
    stored = new.read_config()["config"]
    assert (stored["fidelity_study"], stored["teacher"]) == (str(new.first_study), str(new.first_study.teacher))
    moved = replace(CONFIG, fidelity_study=stored["fidelity_study"], teacher=stored["teacher"])
    assert new.fix_config("search", moved, Budget(), Slots(2, 1)) == slots


def test_a_run_has_begun_once_it_has_a_teacher_a_training_free_score_or_a_trial(folder: RunFolder) -> None:
    assert not folder.has_begun()
    folder.journal.write_text('{"journal":1}\n')
    assert not folder.has_begun()
    folder.journal.write_text('{"journal":1}\n{"asked":{}}\n')
    assert folder.has_begun()
    folder.journal.unlink()
    folder.teacher.parent.mkdir()
    assert not folder.has_begun()
    folder.teacher.touch()
    assert folder.has_begun()
    folder.teacher.unlink()
    folder.proxies.touch()
    assert folder.has_begun()


def test_settings_of_a_call_that_did_no_work_can_be_forgotten(folder: RunFolder) -> None:
    folder.fix_config("search", CONFIG, Budget(), Slots(1, 1))
    folder.forget_settings()
    folder.fix_config("search", replace(CONFIG, lr=0.3), Budget(), Slots(1, 1))
    assert yaml.safe_load(folder.config.read_text())["config"]["lr"] == 0.3


def test_a_write_that_fails_leaves_the_file_as_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "file.json"
    write_atomically(path, "old")

    def full(self: Path, text: str) -> int:
        self.write_bytes(text[:1].encode())
        raise OSError("No space left on device")

    monkeypatch.setattr(Path, "write_text", full)
    with pytest.raises(OSError, match="No space left"):
        write_atomically(path, "new")
    assert path.read_text() == "old"


def test_weights_are_as_readable_as_other_files(tmp_path: Path) -> None:
    """In a folder that people share: safetensors alone would write them for their owner."""
    before = os.umask(0o027)
    try:
        save_weights(tmp_path / "weights.safetensors", nn.Linear(2, 2))
    finally:
        os.umask(before)
    assert (tmp_path / "weights.safetensors").stat().st_mode & 0o777 == 0o640
