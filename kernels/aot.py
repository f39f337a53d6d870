"""Compiles every shipped kernel variant without a GPU and reports its registers, stack and shared memory.

`python -m kernels.aot --report` runs the launch code of `kernels/_triton` on tensors without memory, records
each launch instead of starting it, and compiles exactly that: argument types, constants, alignment, warps. It
does so for sm_80, sm_90, sm_100 and sm_120, and exits with 1 if a variant spills registers (a stack above 0)
or asks for more shared memory than a block of that architecture can have. The results stay in Triton's cache.
"""
from __future__ import annotations

import argparse
import contextlib
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from kernels import reference

# Bytes that a block may use, by architecture; sm_80's 163 KB are reduced to what consumer cards of its generation have.
SHARED_LIMIT = {80: 99 * 1024, 90: 227 * 1024, 100: 227 * 1024, 120: 99 * 1024}
ARCHES = tuple(SHARED_LIMIT)
POINTERS = {
    torch.float32: "*fp32", torch.bfloat16: "*bf16", torch.float16: "*fp16",
    torch.int64: "*i64", torch.int32: "*i32",
}  # fmt: skip


class Launch(NamedTuple):
    """A recorded launch: the kernel and its arguments by name."""

    title: str
    kernel: Any
    arguments: dict[str, Any]
    options: dict[str, Any]


class Usage(NamedTuple):
    """Resources of a compiled variant: registers per thread, bytes of stack and of shared memory."""

    title: str
    kernel: str
    arch: int
    warps: int
    registers: int
    stack: int
    shared: int
    seconds: float

    @property
    def fits(self) -> bool:
        return self.stack == 0 and self.shared <= SHARED_LIMIT[self.arch]


def shipped_launches() -> list[Launch]:
    """Launches that cover every tile of `_tiles` and every branch of the kernels."""
    launches: list[Launch] = []
    for title, run in _calls():
        with recording(title, launches):
            run()
    return launches


def compile_launch(launch: Launch, arch: int) -> Usage:
    """Compiles one launch for sm_`arch` and reads registers, stack and shared memory."""
    return compile_cubin(launch, arch)[0]


def compile_cubin(launch: Launch, arch: int) -> tuple[Usage, bytes]:
    """Like `compile_launch`, and also returns the binary."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    signature: dict[str, str] = {}
    constants: dict[tuple[int, ...], Any] = {}
    attributes: dict[tuple[int, ...], list[list[Any]]] = {}
    for position, parameter in enumerate(launch.kernel.params):
        value = launch.arguments[parameter.name]
        if parameter.is_constexpr or (
            isinstance(value, int) and value == 1 and not parameter.do_not_specialize
        ):
            signature[parameter.name] = "constexpr"
            constants[(position,)] = value
            continue
        signature[parameter.name] = _type_of(value)
        aligned = isinstance(value, Tensor) or (isinstance(value, int) and value % 16 == 0)
        if aligned and not parameter.do_not_specialize:
            attributes[(position,)] = [["tt.divisibility", 16]]
    source = ASTSource(launch.kernel, signature, constants, attributes)
    start = time.perf_counter()
    compiled = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=launch.options)
    seconds = time.perf_counter() - start
    registers, stack = _resources(compiled.asm["cubin"])
    usage = Usage(launch.title, launch.kernel.fn.__name__, arch, launch.options["num_warps"], registers, stack,
                  compiled.metadata.shared, seconds)  # fmt: skip
    return usage, compiled.asm["cubin"]


def ce_kd_call(
    classes: int, dtype: torch.dtype, kind: str = "index", pad: int = 0, rows: int = 1024, **changes: Any
) -> Any:
    """A forward and backward call of CE + KD; `kind` of target: index, mixed (mixup), soft or none."""
    spec = reference.CEKDSpec(4.0, 0.1, 0.9, 0.0, -100, "kd", 1.0, 8.0, False, "mean")._replace(**changes)
    logits = _meta((rows, classes + pad), dtype)[:, :classes]
    target = _meta((rows, classes), torch.float32) if kind == "soft" else _meta((rows,), torch.int64)
    target_b, lam = (target, _meta((rows,), torch.float32)) if kind == "mixed" else (None, None)

    def run() -> None:
        from kernels._triton import ce_kd as kernels

        loss, _, grad, count = kernels.ce_kd_forward(
            logits, logits, None if kind == "none" else target, target_b, lam, spec, True
        )
        kernels.ce_kd_backward(grad, loss, count, spec.reduction)

    return run


def attention_call(
    shape_s: tuple[int, ...], shape_t: tuple[int, ...], dtype: torch.dtype = torch.bfloat16, p: float = 2.0,
    mode: str = "mean", layout: torch.memory_format = torch.channels_last,
) -> Any:  # fmt: skip
    """A forward and backward call of attention transfer."""
    s, t = _meta(shape_s, dtype, layout), _meta(shape_t, dtype, layout)

    def run() -> None:
        from kernels._triton import attention as kernels

        loss, coef = kernels.attention_forward(s, t, p, mode, 1e-12)
        kernels.attention_backward(s, coef, loss, p)

    return run


def nst_call(
    shape_s: tuple[int, ...], shape_t: tuple[int, ...], method: str, dtype: torch.dtype = torch.bfloat16,
    term: bool = True, layout: torch.memory_format = torch.channels_last,
) -> Any:  # fmt: skip
    """A forward and backward call of NST."""
    s, t = _meta(shape_s, dtype, layout), _meta(shape_t, dtype, layout)

    def run() -> None:
        from kernels._triton import nst as kernels

        loss, one, two = kernels.nst_forward(s, t, method, term, 1e-12)
        kernels.nst_backward(s, t, one, two, loss, method, 1e-12)

    return run


def norm_act_call(channels: int, size: int, dtype: torch.dtype, training: bool, activation: str) -> Any:
    """A forward and backward call of BatchNorm with an activation."""
    x, one = _meta((64, channels, size, size), dtype, torch.channels_last), _meta((channels,), torch.float32)

    def run() -> None:
        from kernels._triton import norm_act as kernels

        y, saved = kernels.norm_act_forward(x, one, one, one, one, training, 0.1, 1e-5, activation)
        kernels.norm_act_backward(x, y, one, one, saved, training, activation)

    return run


def _calls() -> Iterator[tuple[str, Any]]:
    """(title, call) for forward and backward on tensors without memory."""
    yield from _ce_kd_calls()
    for channels, size in ((24, 32), (144, 16), (576, 4)):  # both sets of constants, masked channels
        for dtype, training, activation in (
            (torch.bfloat16, True, "relu6"), (torch.float32, True, "none"), (torch.float16, False, "relu"),
        ):  # fmt: skip
            title = f"norm_act {channels} {size}x{size} {_name(dtype)} {'training' if training else 'evaluation'}"
            yield title, norm_act_call(channels, size, dtype, training, activation)
    bf16, fp32, fp16 = torch.bfloat16, torch.float32, torch.float16
    last, first = torch.channels_last, torch.contiguous_format
    for s, t, size, dtype, p, mode, layout in (
        (24, 24, 32, bf16, 2.0, "mean", last), (24, 24, 32, fp32, 2.0, "mean", first),
        (64, 64, 16, bf16, 2.0, "mean", last), (160, 160, 8, bf16, 2.0, "mean", last),
        (640, 640, 4, bf16, 2.0, "mean", last), (640, 640, 4, fp32, 1.0, "paper", first),
        (24, 256, 56, bf16, 2.0, "mean", last), (40, 512, 28, bf16, 2.0, "mean", last),
        (160, 1024, 14, fp16, 2.5, "batchmean", first),
        (1280, 2048, 7, bf16, 2.0, "mean", last), (16, 16, 128, fp32, 2.0, "paper", last),
    ):  # fmt: skip
        title = f"at {s}/{t} {size}x{size} {_name(dtype)} p={p:g} {mode} {'NHWC' if layout == last else 'NCHW'}"
        yield title, attention_call((128, s, size, size), (128, t, size, size), dtype, p, mode, layout)
    yield "at 160 14x14 / 1024 7x7 bf16", attention_call((128, 160, 14, 14), (128, 1024, 7, 7))
    yield "at 24 32x32 / 64 64x64 bf16", attention_call((128, 24, 32, 32), (128, 64, 64, 64))
    for s, t, size, dtype, method, term, layout in (
        (24, 24, 32, bf16, "channel", True, last), (24, 24, 32, fp32, "channel", True, first),
        (64, 64, 16, bf16, "channel", True, last), (64, 64, 16, fp32, "channel", True, last),
        (64, 128, 16, bf16, "channel", True, last), (40, 80, 16, fp16, "channel", False, last),
        (160, 160, 8, bf16, "spatial", True, last), (160, 160, 8, fp32, "spatial", True, first),
        (160, 320, 8, fp16, "spatial", False, last), (640, 640, 4, bf16, "spatial", True, last),
        (1280, 2048, 7, bf16, "spatial", True, last), (1280, 2048, 7, fp32, "spatial", True, last),
    ):  # fmt: skip
        title = f"nst {method} {s}/{t} {size}x{size} {_name(dtype)} {'NHWC' if layout == last else 'NCHW'}"
        yield title, nst_call((128, s, size, size), (128, t, size, size), method, dtype, term, layout)
    for n, s, t, method, size in ((1024, 64, 64, "channel", 16), (1024, 160, 160, "spatial", 8)):
        yield f"nst {method} {n}x{s}/{t} bf16", nst_call((n, s, size, size), (n, t, size, size), method)


def _ce_kd_calls() -> Iterator[tuple[str, Any]]:
    bf16, fp32, fp16 = torch.bfloat16, torch.float32, torch.float16
    for classes, dtype in ((10, bf16), (100, bf16), (100, fp32), (100, fp16), (1000, bf16), (4096, bf16),
                           (8192, bf16), (8192, fp32), (21841, bf16), (21841, fp32)):  # fmt: skip
        yield f"ce_kd C={classes} {_name(dtype)}", ce_kd_call(classes, dtype)
    yield "ce_kd C=21841 T=3 bf16", ce_kd_call(21841, bf16, temperature=3.0)
    yield "ce_kd C=21841 stride 21848 bf16", ce_kd_call(21841, bf16, pad=7)
    for classes in (100, 8192, 21841):
        yield f"ce_kd C={classes} soft", ce_kd_call(classes, bf16, "soft", label_smoothing=0.1)
        yield f"ce_kd C={classes} mixed", ce_kd_call(classes, bf16, "mixed", label_smoothing=0.1)
    yield "ce_kd C=100 no target, by row", ce_kd_call(100, bf16, "none", reduction="none")
    yield "ce_kd C=21841 no target, by row", ce_kd_call(21841, bf16, "none", reduction="none")
    for classes, dtype in ((100, bf16), (8192, bf16), (8192, fp32)):
        yield f"dkd C={classes} {_name(dtype)}", ce_kd_call(classes, dtype, variant="dkd")
        yield f"standardized C={classes} {_name(dtype)}", ce_kd_call(classes, dtype, standardize=True)
    for classes in (100, 4096):
        yield f"dkd standardized C={classes}", ce_kd_call(classes, bf16, variant="dkd", standardize=True)


def _meta(shape: tuple[int, ...], dtype: torch.dtype, layout: Any = torch.contiguous_format) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta", memory_format=layout)


def _name(dtype: torch.dtype) -> str:
    return POINTERS[dtype][1:]


@contextlib.contextmanager
def recording(title: str, launches: list[Launch]) -> Iterator[None]:
    """Within the block, `kernel[grid](...)` launches nothing and appends the launch to `launches`."""
    from triton.runtime.jit import JITFunction

    start = JITFunction.run

    def record(self: Any, *arguments: Any, grid: Any, warmup: bool, **named: Any) -> None:
        named.update(zip(self.arg_names, arguments, strict=False))
        options = {name: named.pop(name) for name in set(named) - set(self.arg_names)}
        launches.append(Launch(title, self, named, {"num_warps": 4, **options}))

    JITFunction.run = record
    try:
        yield
    finally:
        JITFunction.run = start


def _type_of(value: Any) -> str:
    if isinstance(value, Tensor):
        return POINTERS[value.dtype]
    if isinstance(value, float):
        return "fp32"
    return "i32" if abs(value) < 2**31 else "i64"


def _resources(cubin: bytes) -> tuple[int, int]:
    """Registers per thread and bytes of stack, from Triton's own cuobjdump."""
    from triton import knobs

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "kernel.cubin")
        path.write_bytes(cubin)
        shown = subprocess.run([knobs.nvidia.cuobjdump.path, "-res-usage", str(path)], check=True,
                               capture_output=True, text=True).stdout  # fmt: skip
    fields = dict(word.split(":")[:2] for word in shown.split() if word.startswith(("REG:", "STACK:")))
    return int(fields["REG"]), int(fields["STACK"])


def exit_code(usages: list[Usage]) -> int:
    """0 if every variant fits."""
    return 0 if all(usage.fits for usage in usages) else 1


def report(module: str = "", arches: tuple[int, ...] = ARCHES) -> list[Usage]:
    """Compiles every distinct shipped variant, or only those of one module of kernels/_triton."""
    seen: set[str] = set()
    usages = []
    for launch in shipped_launches():
        if not launch.kernel.fn.__module__.endswith(module):
            continue
        shape = {k: (v.dtype if isinstance(v, Tensor) else v) for k, v in launch.arguments.items()}
        key = f"{launch.kernel.fn.__name__} {launch.options} {sorted(shape.items(), key=str)}"
        if key not in seen:
            seen.add(key)
            usages += [compile_launch(launch, arch) for arch in arches]
    return usages


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m kernels.aot", description=__doc__.split("\n")[0])
    parser.add_argument("--report", action="store_true", help="print every variant, not only those that do not fit")
    parser.add_argument("--only", default="", choices=("ce_kd", "attention", "nst", "norm_act"), help="one module")
    options = parser.parse_args()
    import triton

    usages = report(options.only)
    print(f"triton {triton.__version__}, torch {torch.__version__}: {len(usages)} compiled variants")
    print(f"{'call':<44} {'kernel':<24} {'sm':>3} {'warps':>5} {'regs':>4} {'stack':>5} {'shared':>7} {'s':>5}")
    for u in usages:
        if options.report or not u.fits:
            print(f"{u.title:<44} {u.kernel:<24} {u.arch:>3} {u.warps:>5} {u.registers:>4} {u.stack:>5} "
                  f"{u.shared:>7} {u.seconds:>5.1f}{'' if u.fits else '   DOES NOT FIT'}")  # fmt: skip
    return exit_code(usages)


if __name__ == "__main__":
    sys.exit(main())
