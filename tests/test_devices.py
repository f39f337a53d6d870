"""Which GPUs a search sees where no scheduler has said: those of nvidia-smi, which is pretended here."""

from __future__ import annotations

import os
import stat
from collections.abc import Callable
from pathlib import Path

import pytest

from engine.fleet.devices import visible_devices

WHOLE = "GPU 0: NVIDIA H200 (UUID: GPU-1)\nGPU 1: NVIDIA H200 (UUID: GPU-2)\n"
SLICES = "  MIG 3g.71gb     Device  0: (UUID: MIG-a1-b2)\n  MIG 3g.71gb     Device  1: (UUID: MIG-GPU-2/7/0)\n"


@pytest.fixture
def listed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Sets what `nvidia-smi -L` says on a machine whose CUDA_VISIBLE_DEVICES is not set."""
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)

    def says(text: str) -> None:
        tool = tmp_path / "nvidia-smi"
        tool.write_text(f"#!/bin/sh\ncat <<'END'\n{text}END\n")
        tool.chmod(tool.stat().st_mode | stat.S_IXUSR)

    return says


@pytest.mark.parametrize(
    ("said", "tokens"),
    [
        (WHOLE, ("0", "1")),
        (WHOLE + SLICES, ("0", "MIG-a1-b2", "MIG-GPU-2/7/0")),
        ("GPU 0: NVIDIA H200 (UUID: GPU-1)\n" + SLICES, ("MIG-a1-b2", "MIG-GPU-2/7/0")),
        ("No devices found.\n", ()),
    ],
    ids=["whole", "the second cut in two", "the only one cut in two", "none"],
)
def test_a_gpu_that_is_cut_up_counts_by_its_slices(
    said: str, tokens: tuple[str, ...], listed: Callable[[str], None]
) -> None:
    """A process can use one slice; the number of their GPU would give all workers the same first one."""
    listed(said)
    assert visible_devices() == tokens


def test_slurm_says_in_its_way_that_there_is_none(
    listed: Callable[[str], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    listed(WHOLE)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "NoDevFiles")
    assert visible_devices() == ()
