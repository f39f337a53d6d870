from __future__ import annotations

import json
from dataclasses import replace
from fractions import Fraction
from pathlib import Path

import pytest

from engine.config import (
    Budget,
    Resources,
    SearchConfig,
    Slots,
    check_config,
    cohort_size,
    config_from_dict,
    config_to_dict,
    fix_config,
    parse_bytes,
    slots_for,
)
from engine.trial import Fidelity, UsageError

STUDY = SearchConfig(low=Fidelity("low", Fraction(1, 27), 30, kd_loss="kd+at"))


def test_a_study_survives_json() -> None:
    assert config_from_dict(json.loads(json.dumps(config_to_dict(STUDY)))) == STUDY


def test_the_same_study_continues_with_the_slots_it_began_with(tmp_path: Path) -> None:
    first = fix_config("search", tmp_path, STUDY, Budget(), slots_for(workers=8, cohort=4))
    assert first == Slots(total=40, cohort=4)
    assert fix_config("search", tmp_path, STUDY, Budget(max_high=9), slots_for(workers=1, cohort=1)) == first


def test_more_workers_in_a_later_call_find_something_to_do_and_the_call_after_it_keeps_that(tmp_path: Path) -> None:
    fix_config("search", tmp_path, STUDY, Budget(), slots_for(workers=1, cohort=4))
    grown = fix_config("search", tmp_path, STUDY, Budget(), slots_for(workers=8, cohort=1))
    assert grown == slots_for(workers=8, cohort=4)
    assert fix_config("search", tmp_path, STUDY, Budget(), slots_for(workers=2, cohort=4)) == grown


def test_another_study_in_the_same_folder_is_refused_with_the_difference(tmp_path: Path) -> None:
    fix_config("search", tmp_path, STUDY, Budget(), Slots(1, 1))
    changed = replace(STUDY, lr=0.3, low=replace(STUDY.low, epochs=5))
    with pytest.raises(UsageError, match=r"low.epochs: 30 there, 5 here; lr: 0.1 there, 0.3 here"):
        fix_config("search", tmp_path, changed, Budget(), Slots(1, 1))


@pytest.mark.parametrize(
    ("config", "budget", "message"),
    [
        (replace(STUDY, batch_size=0), Budget(), "--batch-size is 0"),
        (replace(STUDY, kd_temperature=0.0), Budget(), "--kd-temperature is 0"),
        (replace(STUDY, valid_fraction=1.0), Budget(), "--valid-fraction"),
        (STUDY, Budget(max_high=0), "--max-high is 0"),
        (STUDY, Budget(gpu_hours=-1.0), "--gpu-hours is -1"),
        (replace(STUDY, lr=float("nan")), Budget(), "--lr is nan"),
    ],
)
def test_values_that_cannot_work_are_refused(config: SearchConfig, budget: Budget, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        check_config(config, budget, Resources())


def test_every_setting_has_a_help_text() -> None:
    for kind in (SearchConfig, Budget, Resources):
        for name, item in kind.__dataclass_fields__.items():
            assert len(item.metadata["help"]) > 5, name


@pytest.mark.parametrize(
    ("text", "count"), [("0", 0), ("12", 12), ("2GiB", 2**31), ("1.5 MB", 1_500_000), ("3kib", 3072), ("7B", 7)]
)
def test_sizes_are_read_as_people_write_them(text: str, count: int) -> None:
    assert parse_bytes("teacher-cache", text) == count


@pytest.mark.parametrize("text", ["", "GiB", "2 Gigs", "-1", "1e9"])
def test_what_is_no_size_is_refused(text: str) -> None:
    with pytest.raises(UsageError, match="--teacher-cache is .*; give a size like 2GiB"):
        check_config(SearchConfig(), Budget(), Resources(teacher_cache=text))


def test_students_side_by_side_are_a_number_or_auto() -> None:
    assert cohort_size(Resources(), gpu=True) == 8
    assert cohort_size(Resources(), gpu=False) == 4
    assert cohort_size(Resources(students_per_gpu="3"), gpu=True) == 3
    for wrong in ("many", "0"):
        with pytest.raises(UsageError, match="--students-per-gpu"):
            check_config(SearchConfig(), Budget(), Resources(students_per_gpu=wrong))


def test_graphs_are_for_gpus() -> None:
    with pytest.raises(UsageError, match="--execution graph needs a GPU"):
        check_config(SearchConfig(), Budget(), Resources(device="cpu", execution="graph"))


def test_a_run_of_an_older_version_has_the_defaults_of_what_it_did_not_know(tmp_path: Path) -> None:
    fix_config("search", tmp_path, STUDY, Budget(), Slots(1, 1))
    path = tmp_path / "config.yaml"
    path.write_text("".join(line for line in path.read_text().splitlines(True) if "ema_decay" not in line))
    fix_config("search", tmp_path, STUDY, Budget(), Slots(1, 1))
    with pytest.raises(UsageError, match=r"ema_decay: 0.0 there, 0.9 here"):
        fix_config("search", tmp_path, replace(STUDY, ema_decay=0.9), Budget(), Slots(1, 1))
