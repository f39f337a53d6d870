from __future__ import annotations

import json
from fractions import Fraction
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.trial import (
    Architecture,
    Evaluation,
    Fidelity,
    Trial,
    UsageError,
    evaluation_from_json,
    evaluation_to_json,
    trial_from_json,
    trial_to_json,
)

fidelities = st.builds(
    Fidelity,
    name=st.sampled_from(["low", "high"]),
    fraction=st.fractions(min_value=Fraction(1, 1000), max_value=1),
    epochs=st.integers(1, 500),
    width=st.floats(0.1, 4),
    resolution=st.integers(0, 512),
    kd_loss=st.sampled_from(["none", "kd", "kd+at"]),
)
trials = st.builds(
    Trial,
    number=st.integers(0, 10**6),
    architecture=st.builds(Architecture, st.lists(st.integers(0, 9), min_size=1, max_size=14).map(tuple)),
    fidelity=fidelities,
    seed=st.integers(0, 100),
)


@given(trials)
def test_a_trial_survives_json(trial: Trial) -> None:
    assert trial_from_json(json.loads(json.dumps(trial_to_json(trial)))) == trial


@given(trials, st.floats(0, 1), st.sampled_from(["ok", "oom"]))
def test_an_evaluation_survives_json(trial: Trial, accuracy: float, status: str) -> None:
    evaluation = Evaluation(trial, status, accuracy, costs={"train": 1.5}, macs=3, error="äh")  # type: ignore[arg-type]
    assert evaluation_from_json(json.loads(json.dumps(evaluation_to_json(evaluation)))) == evaluation


def test_an_evaluation_of_an_earlier_version_is_read() -> None:
    evaluation = Evaluation(Trial(0, Architecture((3,)), Fidelity("low")), "ok", 0.5)
    stored = evaluation_to_json(evaluation)
    del stored["cross_entropy"], stored["agreement"]
    assert evaluation_from_json(json.loads(json.dumps(stored))) == evaluation


@given(trials)
def test_the_key_of_a_trial_does_not_depend_on_its_number(trial: Trial) -> None:
    other = Trial(trial.number + 1, trial.architecture, trial.fidelity, trial.seed)
    again = Trial(trial.number, trial.architecture, trial.fidelity, trial.seed + 1)
    assert other.key == trial.key != again.key


def test_an_architecture_is_read_back_from_its_text() -> None:
    architecture = Architecture((3, 0, 12))
    assert str(architecture) == "3-0-12"
    assert Architecture.parse("3-0-12") == architecture
    with pytest.raises(UsageError, match="joined by '-'"):
        Architecture.parse("3-x")


@pytest.mark.parametrize(
    ("field", "value"), [("fraction", Fraction(0)), ("fraction", Fraction(3, 2)), ("epochs", -1), ("width", 0.0)]
)
def test_a_fidelity_outside_its_range_is_refused(field: str, value: object) -> None:
    with pytest.raises(UsageError, match=f"low.{field}"):
        Fidelity("low", **{field: value})  # type: ignore[arg-type]


@pytest.mark.parametrize("fraction", ["1/10", 0.1, Fraction(1, 10)])
def test_python_callers_may_write_a_fraction_as_text_or_number(fraction: Any) -> None:
    assert Fidelity("low", fraction).fraction == Fraction(1, 10)
    assert Fidelity("low", fraction) == Fidelity("low", Fraction(1, 10))


def test_a_fraction_that_is_not_a_number_is_refused() -> None:
    with pytest.raises(UsageError, match=r"low\.fraction is a third; write 1/27 or 0\.1"):
        Fidelity("low", "a third")  # type: ignore[arg-type]
