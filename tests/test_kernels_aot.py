"""Every shipped kernel variant compiles for sm_80 and sm_90 without a GPU, spills nothing, and fits."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

pytest.importorskip("triton")
pytestmark = pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="this process interprets")


@pytest.mark.parametrize("loss", ["ce_kd", "attention", "nst"])
def test_every_variant_fits(loss: str) -> None:
    command = [sys.executable, "-W", "ignore", "-m", "kernels.aot", "--report", "--only", loss]
    shown = subprocess.run(command, capture_output=True, text=True, timeout=400)
    assert shown.returncode == 0, f"{shown.stdout}{shown.stderr[-3000:]}"
    rows = shown.stdout.splitlines()[2:]
    assert len(rows) >= 20
    assert {"80", "90"} == {row.split()[-6] for row in rows}


def test_a_tile_too_large_is_found() -> None:
    """A spatial NST tile of 10 x 10 positions spills: the report must say so."""
    from kernels import _tiles, aot

    sound = next(launch for launch in aot.shipped_launches() if launch.kernel.fn.__name__ == "spatial_kernel")
    assert sound.arguments["BLOCK_P"] <= _tiles.SPATIAL_POSITIONS
    too_large = sound._replace(arguments={**sound.arguments, "P": 100, "BLOCK_P": 128})
    assert aot.compile_launch(sound, 90).fits
    assert not aot.compile_launch(too_large, 90).fits


def test_an_occupied_exit_code() -> None:
    """The command's exit code is what CI sees: 1 if a variant does not fit."""
    from kernels import aot

    spilled = aot.Usage("x", "kernel", 90, 4, 255, 8, 0, 0.1)
    assert not spilled.fits
    assert not spilled._replace(stack=0, shared=228 * 1024).fits
    assert spilled._replace(stack=0, shared=227 * 1024).fits
    assert aot.exit_code([spilled]) == 1
    assert aot.exit_code([spilled._replace(stack=0)]) == 0
