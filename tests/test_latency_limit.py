"""Limits on latency."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch

from engine.config import Budget, Resources, RunSettings, SearchConfig
from engine.search.journal import read_journal
from engine.search.latency.limit import fast_enough, recorded_table
from engine.search.latency.model import PROBES, choose_probes, fit_model, looked_up
from engine.search.latency.table import BuiltSpace, LatencyTable, read_table
from engine.search.progress import Display
from engine.search.runs import open_run, rows
from engine.search.search import search
from engine.space import Candidates, candidates
from engine.tasks import LatencyTask, WorkerSettings, task_to_json
from engine.training.run_tasks import run_latency
from engine.trial import Architecture, EngineError, Fidelity, UsageError

SPACE = "nasbench201:channels=4,cells=1"


WIDE = BuiltSpace("mobilenetv2:width=0.25", 10, 1.0, 32)


@pytest.fixture(scope="module")
def everything() -> Candidates:
    return candidates(WIDE.space, WIDE.classes, WIDE.width, WIDE.resolution).where(np.arange(2_097_152) % 41 == 0)


def true_ms(everything: Candidates) -> np.ndarray:
    """Latencies of an invented device: so much per layer, so much per multiply-accumulate, and 5 % noise."""
    layers = everything.choices[:, ::2].sum(axis=1) + 7.0
    luck = np.random.default_rng(1).normal(0, 0.05, len(everything))
    return (0.2 * layers + 0.4 * everything.macs / 1e6) * np.exp(luck)


class Device:
    def __init__(self, everything: Candidates) -> None:
        self.ms, self.everything, self.asked = true_ms(everything), everything, 0

    def measure(self) -> LatencyTable:
        probes = choose_probes(WIDE, self.everything, PROBES, seed=0)
        self.asked += len(probes)
        rows = [self.everything.row(architecture) for architecture in probes]
        return LatencyTable(dict(zip(map(str, probes), self.ms[rows].tolist(), strict=True)), device="invented")

    def fast(self, limit: float, path: Path, begun: bool = False) -> tuple[Candidates, str]:
        return fast_enough(self.everything, WIDE, recorded_table(path, begun, self.measure), limit)


def test_most_kept_candidates_meet_the_limit_and_few_others_are_lost(everything: Candidates, tmp_path: Path) -> None:
    device, path = Device(everything), tmp_path / "latency.json"
    limit = float(np.median(device.ms))
    kept, how = device.fast(limit, path)
    assert device.asked == PROBES
    ms = {choices.tobytes(): value for choices, value in zip(everything.choices, device.ms, strict=True)}
    taken = np.array([ms[choices.tobytes()] for choices in kept.choices])
    assert np.mean(taken <= limit) > 0.95
    # Every candidate that is faster than the limit by more than the margin, and the error of a prediction, is kept.
    error = fit_model(WIDE, read_table(path)).accuracy
    assert 0.02 < error.median < 0.1
    clear = device.ms < limit / error.factor**2
    assert clear.sum() > 100
    assert len(kept) > clear.sum()
    assert f"{PROBES} measured, the others predicted with a median error of {100 * error.median:.0f} %" in how
    # The latencies are a column of the candidates, known before any training.
    np.testing.assert_allclose(kept.trends["latency:invented"], taken, rtol=0.5)
    assert float(np.corrcoef(kept.trends["latency:invented"], taken)[0, 1]) > 0.9


def test_a_run_keeps_its_measurements(everything: Candidates, tmp_path: Path) -> None:
    device, path = Device(everything), tmp_path / "latency.json"
    first, _ = device.fast(5.0, path)
    again, _ = device.fast(5.0, path, begun=True)
    assert device.asked == PROBES
    np.testing.assert_array_equal(first.choices, again.choices)
    np.testing.assert_array_equal(first.trends["latency:invented"], again.trends["latency:invented"])
    path.unlink()
    with pytest.raises(EngineError, match=r"latency.json is missing; the candidates depend on it: restore it"):
        device.fast(5.0, path, begun=True)


def test_until_a_search_has_begun_each_call_measures_again(everything: Candidates, tmp_path: Path) -> None:
    """The earlier call may have had another batch size, space, resolution or device; nothing depends on it yet."""
    path, slow = tmp_path / "latency.json", Device(everything)
    slow.ms = 100 * slow.ms
    with pytest.raises(UsageError, match="no architecture takes at most 5 ms on invented"):
        slow.fast(5.0, path)
    kept, _ = Device(everything).fast(5.0, path)
    fresh, _ = Device(everything).fast(5.0, tmp_path / "new.json")
    np.testing.assert_array_equal(kept.choices, fresh.choices)


def test_few_candidates_are_all_measured(everything: Candidates, tmp_path: Path) -> None:
    few = everything.where(np.arange(len(everything)) % 2000 == 0)
    device = Device(few)
    limit = float(np.median(device.ms))
    kept, how = device.fast(limit, tmp_path / "latency.json")
    np.testing.assert_array_equal(kept.choices, few.choices[device.ms <= limit])
    np.testing.assert_array_equal(kept.trends["latency:invented"], device.ms[device.ms <= limit])
    assert "predicted" not in how


def test_from_too_few_measurements_nothing_is_predicted(everything: Candidates) -> None:
    one, other, third = (everything.architecture(row) for row in (0, 100, 200))
    table = LatencyTable({str(one): 2.0, str(other): 3.0})
    assert looked_up(WIDE, table, [one, third]) == {one: (2.0, True)}
    assert looked_up(WIDE, table, [third]) == {}


def test_without_a_limit_all_candidates_get_their_latency(everything: Candidates, tmp_path: Path) -> None:
    every, how = Device(everything).fast(math.inf, tmp_path / "latency.json")
    assert len(every) == len(everything)
    assert np.isfinite(every.trends["latency:invented"]).all()
    assert f"{len(everything):,} candidates take " in how


def test_a_search_under_a_limit_names_a_winner_that_meets_it_and_a_front(tiny_npz: Path, tmp_path: Path) -> None:
    torch.set_num_threads(1)
    config = SearchConfig(
        space=SPACE,
        data=str(tiny_npz),
        low=Fidelity("low", Fraction(1, 2), 1),
        high=Fidelity("high", epochs=1),
        objectives="accuracy,macs",
        latency_batch=32,
        data_backend="resident",
    )
    worker = WorkerSettings(config, tmp_path, "cpu")
    two = LatencyTask(worker, (Architecture((1,) * 6), Architecture((3,) * 6)))
    fast, slow = run_latency(task_to_json(two))["milliseconds"]
    assert fast < slow
    limited = replace(config, max_latency_ms=fast**0.25 * slow**0.75)  # far from both: other work may slow one
    settings = RunSettings(limited, Budget(4, 8), Resources(device="cpu", workers=1))
    with Display("none") as display:
        result = search(settings, tmp_path / "run", display)
    assert 0 < result["winner"]["latency_ms"] <= limited.max_latency_ms
    networks = [result["winner"], result["final"], *result["baselines"], *result["front"]]
    assert {network["latency_source"] for network in networks} == {"measured"}
    answers = read_journal(tmp_path / "run" / "journal.jsonl").answers.values()
    full = [e for e in answers if e.trial.fidelity == limited.high]
    assert full
    for evaluation in full:
        assert evaluation.ok == (evaluation.costs["latency_ms"] <= limited.max_latency_ms), evaluation
        assert evaluation.status in ("ok", "too_slow")
    assert result["front"]
    assert {entry["architecture"] for entry in result["front"]} <= {str(e.trial.architecture) for e in full if e.ok}
    assert len(json.loads((tmp_path / "run" / "latency.json").read_text())["milliseconds"]) == PROBES
    listed = rows(open_run(str(tmp_path / "run")), answers)
    assert {(row["fidelity"] == "low", row["latency_source"]) for row in listed} >= {(False, "measured")}
    assert all(row["latency_ms"] > 0 for row in listed)
