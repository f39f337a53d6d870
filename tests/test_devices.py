"""Which GPUs a search uses if no scheduler has assigned any: those that nvidia-smi, here a fake one, lists."""

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
    """Sets the output of `nvidia-smi -L` on a machine without CUDA_VISIBLE_DEVICES."""
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)

    def set_listing(text: str) -> None:
        tool = tmp_path / "nvidia-smi"
        tool.write_text(f"#!/bin/sh\ncat <<'END'\n{text}END\n")
        tool.chmod(tool.stat().st_mode | stat.S_IXUSR)

    return set_listing


@pytest.mark.parametrize(
    ("listing", "tokens"),
    [
        (WHOLE, ("0", "1")),
        (WHOLE + SLICES, ("0", "MIG-a1-b2", "MIG-GPU-2/7/0")),
        ("GPU 0: NVIDIA H200 (UUID: GPU-1)\n" + SLICES, ("MIG-a1-b2", "MIG-GPU-2/7/0")),
        ("No devices found.\n", ()),
    ],
    ids=["whole", "the second partitioned", "the only one partitioned", "none"],
)
def test_a_partitioned_gpu_counts_as_its_slices(
    listing: str, tokens: tuple[str, ...], listed: Callable[[str], None]
) -> None:
    """A process can use only one slice; by the number of its GPU, all workers would use the first slice."""
    listed(listing)
    assert visible_devices() == tokens


def test_slurm_has_its_own_word_for_no_gpu(listed: Callable[[str], None], monkeypatch: pytest.MonkeyPatch) -> None:
    listed(WHOLE)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "NoDevFiles")
    assert visible_devices() == ()
