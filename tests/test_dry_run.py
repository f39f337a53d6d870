"""`search --dry-run`: what a search would cost, without starting it."""

from __future__ import annotations

import json
from fractions import Fraction
from pathlib import Path

import pytest

import cli
from engine.search.journal import Journal
from engine.trial import Architecture, Evaluation, Fidelity, Trial

FLAGS = [
    "--space=nasbench201:channels=4,cells=1", "--batch-size=16", "--teacher-epochs=4", "--low.fraction=1/2",
    "--low.epochs=3", "--high.epochs=2", "--max-low=50", "--max-high=6", "--device=cpu", "--workers=2",
]  # fmt: skip


def test_a_dry_run_counts_what_is_left_and_touches_nothing(
    tiny_npz: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    low = Fidelity("low", Fraction(1, 2), 3, kd_loss="kd")
    run_dir = tmp_path / "run"
    run_dir.mkdir()
    with Journal(run_dir / "journal.jsonl") as journal:
        trials = [Trial(number, Architecture((number,) * 6), low) for number in range(3)]
        journal.ask(trials)
        for trial in trials[:2]:
            journal.answer(Evaluation(trial, "ok", 0.5))
    before = (run_dir / "journal.jsonl").read_bytes()
    assert cli.main(["search", *FLAGS, f"--data={tiny_npz}", f"--run-dir={run_dir}", "--dry-run"]) == 0
    out, err = capsys.readouterr()
    planned = json.loads(out)
    assert planned["status"] == "planned"
    assert {key: planned["low"][key] for key in ("evaluations", "images", "epochs")} == {
        "evaluations": 54, "images": 48, "epochs": 3,
    }  # fmt: skip
    assert {key: planned["high"][key] for key in ("evaluations", "images")} == {"evaluations": 6, "images": 96}
    assert planned["teacher"]["epochs"] == 4
    assert {key: planned["final"][key] for key in ("evaluations", "images", "epochs")} == {
        "evaluations": 2, "images": 120, "epochs": 4,
    }  # fmt: skip
    kinds = [planned[name] for name in ("teacher", "low", "high", "final")]
    assert all(kind["seconds"] > 0 for kind in kinds)
    hours = sum(kind["evaluations"] * kind["seconds"] for kind in kinds) / 3600
    assert planned["worker_hours"] == pytest.approx(hours, abs=1e-3)
    assert "nothing has been started" in err
    assert [path.name for path in run_dir.iterdir()] == ["journal.jsonl"]
    assert (run_dir / "journal.jsonl").read_bytes() == before


def test_a_dry_run_mentions_training_free_scores(
    tiny_npz: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["search", *FLAGS, f"--data={tiny_npz}", f"--run-dir={tmp_path / 'run'}", "--dry-run", "--no-final"]
    assert cli.main([*arguments, "--high.epochs=20"]) == 0
    assert "64 training-free scores, which take about as long as 1.0 full trainings" in capsys.readouterr().err
    assert cli.main([*arguments, "--high.epochs=20", "--proxies=none"]) == 0
    assert "training-free" not in capsys.readouterr().err


def test_a_dry_run_respects_the_latency_limit(
    tiny_npz: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["search", *FLAGS, f"--data={tiny_npz}", f"--run-dir={tmp_path / 'run'}", "--dry-run"]
    assert cli.main([*arguments, "--max-latency-ms=1e-6"]) == 2
    err = capsys.readouterr().err
    assert "latency: measuring" in err
    assert "--max-latency-ms" in err
    assert not (tmp_path / "run").exists()
