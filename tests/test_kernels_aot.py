"""The kernels' machine code, compiled without a GPU: nothing spills, and equal features give exactly 0.

Compiles a sample of the variants for each architecture; `make aot` compiles them all.
"""

from __future__ import annotations

import os

import pytest

pytest.importorskip("triton")
from kernels import _tiles, aot, sass

pytestmark = pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="this process interprets")


def launches(title: str, kernel: str = "") -> list[aot.Launch]:
    found = [x for x in aot.shipped_launches() if x.title == title and x.kernel.fn.__name__.startswith(kernel)]
    assert found, f"no variant {title!r} of {kernel!r}"
    return found


@pytest.mark.parametrize(
    ("title", "kernel", "arch"),
    [
        ("dkd C=8192 fp32", "tile", 80),
        ("ce_kd C=21841 mixed", "loop", 120),
        ("ce_kd C=21841 bf16", "loop", 90),
        ("at 24/256 56x56 bf16 p=2 mean NHWC", "", 100),
        ("at 640/640 4x4 bf16 p=2 mean NHWC", "fused", 120),
        ("nst channel 64/64 16x16 fp32 NHWC", "channel_kernel", 120),
        ("nst channel 64/128 16x16 bf16 NHWC", "", 80),
        ("nst spatial 1280/2048 7x7 bf16 NHWC", "", 90),
        ("nst spatial 160/160 8x8 fp32 NCHW", "spatial_kernel", 100),
    ],
)
def test_the_largest_variants_fit(title: str, kernel: str, arch: int) -> None:
    for launch in launches(title, kernel):
        usage = aot.compile_launch(launch, arch)
        assert usage.fits, usage


def test_every_kernel_has_a_shipped_variant() -> None:
    from kernels._triton import attention, ce_kd, norm_act, nst

    modules = (attention, ce_kd, norm_act, nst)
    written = {name for module in modules for name in vars(module) if name.endswith("_kernel")}
    assert {launch.kernel.fn.__name__ for launch in aot.shipped_launches()} == written
    assert len(aot.shipped_launches()) >= 90


def test_a_tile_too_large_is_found() -> None:
    """One spatial NST tile of 14 x 14 positions does not fit, and the report must say so."""
    (sound,) = launches("nst spatial 160/160 8x8 bf16 NHWC", "spatial_kernel")
    assert sound.arguments["BLOCK_P"] <= _tiles.SPATIAL_POSITIONS
    too_large = sound._replace(arguments={**sound.arguments, "P": 196, "BLOCK_P": 256})
    assert aot.compile_launch(sound, 90).fits
    assert not aot.compile_launch(too_large, 90).fits


def test_the_exit_code_says_whether_everything_fits() -> None:
    spilled = aot.Usage("x", "kernel", 90, 4, 255, 8, 0, 0.1)
    assert not spilled.fits
    assert not spilled._replace(stack=0, shared=228 * 1024).fits
    assert spilled._replace(stack=0, shared=227 * 1024).fits
    assert not spilled._replace(stack=0, shared=227 * 1024, arch=120).fits
    assert aot.exit_code([spilled]) == 1
    assert aot.exit_code([spilled._replace(stack=0)]) == 0


@pytest.mark.parametrize(
    ("title", "kernel"),
    [
        ("at 640/640 4x4 bf16 p=2 mean NHWC", "fused"),
        ("at 24/24 32x32 bf16 p=2 mean NHWC", "finish"),
        ("nst spatial 640/640 4x4 bf16 NHWC", "spatial_kernel"),
    ],
)
def test_equal_features_cannot_differ_by_a_fused_rounding(title: str, kernel: str) -> None:
    """A fused multiply-add in x / a - y / b rounds only one quotient, so x = y and a = b would not give 0."""
    (launch,) = launches(title, kernel)
    _, cubin = aot.compile_cubin(launch, 90)
    assert not [text for _, text in sass.instructions(cubin) if "FFMA" in text]


def test_long_rows_move_as_vectors_without_a_reduction_in_the_loop() -> None:
    """Rows of 21841 bfloat16 numbers, which may start anywhere in a 16-byte vector."""
    (launch,) = launches("ce_kd C=21841 bf16", "loop")
    code = sass.read(launch)
    assert code.load_bits == 128
    assert code.blocks >= 2
    assert code.shuffles == code.barriers == 0
    assert code.instructions < 60
