"""Searches on a real Slurm of two nodes (make test-slurm)."""

from __future__ import annotations

import json
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
CROWD = [sys.executable, str(Path(__file__).with_name("crowd.py"))]


@pytest.mark.parametrize(("flags", "each"), [(["--gpus=8"], 1), (["--gpus=2", "--workers=4"], 2)])
def test_each_worker_of_an_allocation_has_a_gpu(flags: list[str], each: int, slurm: Any, tmp_path: Path) -> None:
    """A driver in a job of two nodes uses both, through srun; every GPU has its workers and no others."""
    job = slurm.batch([*CROWD, str(tmp_path), *flags], tmp_path / "out", "--nodes=2", "--gpus-per-node=8")
    slurm.until(lambda: slurm.state(job) in ("COMPLETED", "FAILED"), "the workers have met", 150)
    assert slurm.state(job) == "COMPLETED", (tmp_path / "out").read_text()
    met = json.loads((tmp_path / "out").read_text().splitlines()[-1])
    places = Counter((worker["SLURMD_NODENAME"], worker["CUDA_VISIBLE_DEVICES"]) for worker in met)
    gpus = 8 if each == 1 else 2
    assert places == {(node, str(gpu)): each for node in ("n1", "n2") for gpu in range(gpus)}
