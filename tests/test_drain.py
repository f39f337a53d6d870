"""A search that is told to stop: what runs finishes or keeps its state, and the same command continues it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from engine import evaluate, orders
from engine.config import Study, to_dict
from engine.trial import Architecture, Drained, Fidelity, Trial, evaluation_from_json, trial_to_json

SPACE = "nasbench201:channels=4,cells=1"


def test_a_full_training_stops_after_its_epoch_and_goes_on_to_the_same_end(tiny_npz: Path, tmp_path: Path) -> None:
    low, high = Fidelity("low", epochs=1), Fidelity("high", epochs=3)
    study = Study(space=SPACE, data=str(tiny_npz), batch_size=16, low=low, high=high)
    trial = Trial(0, Architecture((3, 1, 2, 0, 3, 1)), high)

    def answer(name: str, folder: Path | None) -> float:
        task = {"study": to_dict(study), "run_dir": str(tmp_path / name), "device": "cpu", "teacher": ""}
        task |= {"trials": [trial_to_json(trial)], "orders": str(folder) if folder else None}
        (got,) = evaluate.run_trials(json.loads(json.dumps(task)))
        return evaluation_from_json(got).accuracy

    whole = answer("whole", None)
    folder = orders.give(tmp_path)
    orders.drain(folder)
    for done in (1, 2):
        with pytest.raises(Drained, match=f"epoch {done} of 3"):
            answer("drained", folder)
    assert answer("drained", folder) == whole  # what has come to its end is scored
