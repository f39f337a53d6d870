"""What the kernels' machine code says about their speed, for the shapes of `bench/bench_kernels.py`.

`python -m kernels.sass` compiles each launch for sm_90 without a GPU and prints docs/results/machine-code.md.
"""
from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from kernels import aot

ARCH = 90
REGISTERS, SHARED, THREADS, BLOCKS = 65536, 228 * 1024, 2048, 32  # of an SM of this architecture
# Values that a kernel reads per class: student and teacher, twice in a long row. Elsewhere an element is one value.
READS = {"tile_kernel": 2, "loop_kernel": 4}


HEAD = """# What the machine code of the kernels says

Made by `python -m kernels.sass > docs/results/machine-code.md`, without a GPU: Triton {triton}, sm_90, bfloat16,
NHWC, the shapes of `bench/bench_kernels.py`. Registers of a thread; blocks that fit on an SM; the width in bits of
the loads that move the most bytes; and, inside the loops over classes, channels or positions, barriers, shuffles
and instructions of one thread, per class (CE + KD, student and teacher) or per loaded value. A kernel without a
loop is counted whole.
"""


class Code(NamedTuple):
    """One kernel's row of the table."""

    title: str
    kernel: str
    warps: int
    registers: int
    blocks: int  # on an SM at a time
    load_bits: int  # of the loads that move the most bytes
    barriers: int  # in the loops
    shuffles: int  # in the loops
    instructions: float  # per element


def bench_launches() -> list[aot.Launch]:
    """The launches of the bench matrix, forward and backward, on bfloat16 NHWC tensors without memory."""
    launches: list[aot.Launch] = []
    for title, run in _bench_calls():
        with aot.recording(title, launches):
            run()
    return launches


def read(launch: aot.Launch) -> Code:
    """Compiles one launch and reads its machine code."""
    usage, cubin = aot.compile_cubin(launch, ARCH)
    code = instructions(cubin)
    loops = [body for body in _innermost(code) if _loaded(body)]
    counted = [line for body in loops for _, line in body] or [line for _, line in code]
    widths: dict[int, int] = {}
    for bits in map(_load_bits, counted):
        widths[bits] = widths.get(bits, 0) + bits
    itemsize = next(value.element_size() for value in launch.arguments.values() if isinstance(value, Tensor))
    values = sum(widths.values()) / (8 * itemsize)
    main_width = max(widths, key=lambda width: (widths[width], width))
    in_loops = counted if loops else []
    return Code(
        usage.title, usage.kernel, usage.warps, usage.registers, _blocks(usage), main_width,
        sum("BAR" in line.split(".")[0] for line in in_loops), sum("SHFL" in line for line in in_loops),
        READS.get(usage.kernel, 1) * len(counted) / max(values, 1),
    )  # fmt: skip


def instructions(cubin: bytes) -> list[tuple[int, str]]:
    """(address, text) of every instruction, from the cuobjdump that Triton ships."""
    from triton import knobs

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "kernel.cubin")
        path.write_bytes(cubin)
        command = [knobs.nvidia.cuobjdump.path, "-sass", str(path)]
        shown = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    lines = re.findall(r"^\s+/\*([0-9a-f]{4,})\*/\s+(.*?);", shown, re.MULTILINE)
    return [(int(address, 16), text) for address, text in lines if text.strip() != "NOP"]


def _innermost(code: list[tuple[int, str]]) -> list[list[tuple[int, str]]]:
    """Bodies of the innermost loops; a loop ends in a backward jump."""
    spans = []
    for address, text in code:
        jump = re.search(r"\bBRA\b.*\b0x([0-9a-f]+)", text)
        if jump and int(jump[1], 16) < address:
            spans.append((int(jump[1], 16), address))
    inner = [a for a in spans if not any(a[0] <= b[0] and b[1] < a[1] for b in spans if b != a)]
    return [[line for line in code if start <= line[0] <= end] for start, end in inner]


def _loaded(body: list[tuple[int, str]]) -> int:
    return sum(_load_bits(text) for _, text in body)


def _load_bits(text: str) -> int:
    """Bits that an instruction loads from global memory, without the last program's sums, whose loads bypass L1."""
    load = re.search(r"\b(?:LDG|LDGSTS)((?:\.\w+)+)", text)
    if not load or "STRONG" in load[1]:
        return 0
    width = re.search(r"\.[US]?(8|16|64|128)\b", load[1])
    return int(width[1]) if width else 32


def _blocks(usage: aot.Usage) -> int:
    registers = -(-usage.registers // 8) * 8 * 32 * usage.warps
    return min(REGISTERS // registers, SHARED // (usage.shared + 1024), THREADS // (32 * usage.warps), BLOCKS)


def _bench_calls() -> Iterator[tuple[str, Any]]:
    for rows, classes, pad in ((128, 100, 0), (1024, 100, 0), (1024, 1000, 0), (8192, 8192, 0), (8192, 21841, 0),
                               (8192, 21841, 7)):  # fmt: skip
        title = f"CE+KD {rows}x{classes}" + (f" stride {classes + pad}" if pad else "")
        yield title, aot.ce_kd_call(classes, torch.bfloat16, pad=pad, rows=rows)
    for n, s, t, size in (
        (128, 24, 24, 32), (128, 64, 64, 16), (128, 160, 160, 8), (128, 640, 640, 4),
        (256, 24, 256, 56), (256, 40, 512, 28), (256, 160, 1024, 14), (256, 1280, 2048, 7),
    ):  # fmt: skip
        yield f"AT {n}x{s}/{t}x{size}x{size}", aot.attention_call((n, s, size, size), (n, t, size, size))
    for n, s, t, size, method in (
        (128, 24, 24, 32, "channel"), (64, 40, 40, 16, "channel"), (128, 64, 64, 16, "channel"),
        (128, 160, 160, 8, "spatial"), (128, 640, 640, 4, "spatial"), (256, 1280, 2048, 7, "spatial"),
    ):  # fmt: skip
        yield f"NST {n}x{s}/{t}x{size}x{size}", aot.nst_call((n, s, size, size), (n, t, size, size), method)


def main() -> None:
    import triton

    print(HEAD.format(triton=triton.__version__))
    print("| case | kernel | warps | registers | blocks per SM | load bits | barriers | shuffles | instructions |")
    print("|---|---|---|---|---|---|---|---|---|")
    for launch in bench_launches():
        row = read(launch)
        print("|", " | ".join([*map(str, row[:-1]), f"{row.instructions:.3g}"]), "|", flush=True)


if __name__ == "__main__":
    main()
