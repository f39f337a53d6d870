from __future__ import annotations

import json
from dataclasses import replace
from fractions import Fraction
from pathlib import Path

import pytest

from engine import config
from engine.config import Budget, Resources, Slots, Study
from engine.trial import Fidelity, UsageError

STUDY = Study(low=Fidelity("low", Fraction(1, 27), 30, kd_loss="kd+at"))


def test_a_study_survives_json() -> None:
    assert config.study_from_dict(json.loads(json.dumps(config.to_dict(STUDY)))) == STUDY


def test_the_same_study_continues_with_the_slots_it_began_with(tmp_path: Path) -> None:
    first = config.fix(tmp_path, STUDY, Budget(), config.slots(workers=8, cohort=4))
    assert first == Slots(total=40, cohort=4)
    assert config.fix(tmp_path, STUDY, Budget(max_high=9), config.slots(workers=1, cohort=1)) == first


def test_another_study_in_the_same_folder_is_refused_with_the_difference(tmp_path: Path) -> None:
    config.fix(tmp_path, STUDY, Budget(), Slots(1, 1))
    changed = replace(STUDY, lr=0.3, low=replace(STUDY.low, epochs=5))
    with pytest.raises(UsageError, match=r"low.epochs: 30 there, 5 here; lr: 0.1 there, 0.3 here"):
        config.fix(tmp_path, changed, Budget(), Slots(1, 1))


@pytest.mark.parametrize(
    ("study", "budget", "message"),
    [
        (replace(STUDY, batch_size=0), Budget(), "--batch-size is 0"),
        (replace(STUDY, kd_temperature=0.0), Budget(), "--kd-temperature is 0"),
        (replace(STUDY, valid_fraction=1.0), Budget(), "--valid-fraction"),
        (STUDY, Budget(max_high=0), "--max-high is 0"),
        (STUDY, Budget(gpu_hours=-1.0), "--gpu-hours is -1"),
        (replace(STUDY, lr=float("nan")), Budget(), "--lr is nan"),
    ],
)
def test_values_that_cannot_work_are_refused(study: Study, budget: Budget, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        config.check(study, budget, Resources())


def test_every_setting_has_a_help_text() -> None:
    for kind in (Study, Budget, Resources):
        for name, item in kind.__dataclass_fields__.items():
            assert len(item.metadata["help"]) > 5, name
