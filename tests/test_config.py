from __future__ import annotations

import json
from dataclasses import replace
from fractions import Fraction

import pytest

from engine.config import (
    Budget,
    Resources,
    RunSettings,
    SearchConfig,
    check_settings,
    cohort_size,
    config_from_dict,
    config_to_dict,
    parse_bytes,
)
from engine.trial import Fidelity, UsageError

CONFIG = SearchConfig(low=Fidelity("low", Fraction(1, 27), 30, kd_loss="kd+at"))


def test_a_configuration_survives_json() -> None:
    assert config_from_dict(json.loads(json.dumps(config_to_dict(CONFIG)))) == CONFIG


@pytest.mark.parametrize(
    ("config", "budget", "message"),
    [
        (replace(CONFIG, batch_size=-1), Budget(), "--batch-size is -1"),
        (replace(CONFIG, kd_temperature=0.0), Budget(), "--kd-temperature is 0"),
        (replace(CONFIG, valid_fraction=1.0), Budget(), "--valid-fraction"),
        (replace(CONFIG, objectives="accuracy,macs", method="gp"), Budget(), "gp finds no front; choose"),
        (CONFIG, Budget(max_high=0), "--max-high is 0"),
        (CONFIG, Budget(gpu_hours=-1.0), "--gpu-hours is -1"),
        (replace(CONFIG, lr=float("nan")), Budget(), "--lr is nan"),
    ],
)
def test_values_that_cannot_work_are_refused(config: SearchConfig, budget: Budget, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        check_settings(RunSettings(config, budget))


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
def test_other_text_is_refused_as_a_size(text: str) -> None:
    with pytest.raises(UsageError, match="--teacher-cache is .*; give a size like 2GiB"):
        check_settings(RunSettings(SearchConfig(), resources=Resources(teacher_cache=text)))


def test_the_number_of_students_side_by_side_is_a_number_or_auto() -> None:
    assert cohort_size(Resources(), gpu=True) == 8
    assert cohort_size(Resources(), gpu=False) == 4
    assert cohort_size(Resources(students_per_gpu="3"), gpu=True) == 3
    for wrong in ("many", "0"):
        with pytest.raises(UsageError, match="--students-per-gpu"):
            check_settings(RunSettings(SearchConfig(), resources=Resources(students_per_gpu=wrong)))


def test_graphs_need_a_gpu() -> None:
    with pytest.raises(UsageError, match="--execution graph needs a GPU"):
        check_settings(RunSettings(SearchConfig(), resources=Resources(device="cpu", execution="graph")))
