"""The measurements of `make gpu-check`, one process per part: `python -m bench.gpu_parts NAME` prints figures as JSON.

A part raises if something is wrong. It needs torch, triton, and the packages that the engine imports for training.
"""

from __future__ import annotations

import json
import platform
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from fractions import Fraction
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch.profiler import ProfilerActivity

from bench.count_kernels import median_architecture
from bench.naive import BenchCase, naive, noise, setup
from engine.config import Execution, Resources, SearchConfig
from engine.data.dataset import load
from engine.data.loader import Backend, Batches, train_batches
from engine.latency.runtimes import timed_by_events
from engine.latency.time_probes import quietest, time_in_rounds
from engine.spaces.load import load_space
from engine.training import evaluate as worker
from engine.training.student import Inputs, Student, prepare, take_step
from engine.training.train import Stopwatch, train
from engine.trial import Fidelity, Trial

Figures = dict[str, Any]
SPACE, CLASSES, SIDE, BATCH = "mobilenetv2", 100, 32, 64
CUDA = torch.device("cuda")
PRECISIONS = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
LAYOUTS = {"NHWC": torch.channels_last, "NCHW": torch.contiguous_format}
# (loss, size): a small, a usual and a large size for each loss.
SHAPES: tuple[tuple[str, tuple[Any, ...]], ...] = (
    ("ce_kd", (128, 100)), ("ce_kd", (1024, 1000)), ("ce_kd", (1024, 21848)),
    ("attention", (128, 24, 24, 32, "NHWC")), ("attention", (256, 24, 256, 56, "NHWC")),
    ("attention", (256, 1280, 2048, 7, "NHWC")),
    ("nst", (128, 24, 24, 32)), ("nst", (128, 640, 640, 4)), ("nst", (256, 160, 1024, 14)),
)  # fmt: skip


def machine() -> Figures:
    """GPU, driver, versions, and copy bandwidth."""
    import triton

    query = ["nvidia-smi", "--query-gpu=driver_version,clocks.sm,clocks.mem", "--format=csv,noheader"]
    properties = torch.cuda.get_device_properties(0)
    source = torch.empty(2**30, dtype=torch.uint8, device=CUDA)
    target = torch.empty_like(source)
    (copies,) = time_in_rounds([lambda: timed_by_events(lambda: target.copy_(source))])
    return {
        "card": properties.name,
        "memory_bytes": properties.total_memory,
        "capability": f"{properties.major}.{properties.minor}",
        "driver_and_clocks": subprocess.run(query, capture_output=True, text=True, timeout=30).stdout.strip(),
        "versions": {"python": platform.python_version(), "torch": torch.__version__, "triton": triton.__version__},
        "cuda": torch.version.cuda,
        "copy_bytes_per_s": round(2 * source.nbytes / quietest(copies) * 1000),
    }


def selftest() -> Figures:
    """The losses' kernels, the lean forward pass against the network's own, and graphs against eager steps."""
    from engine import selftest as tests

    return {"kernels": tests.kernels("cuda"), "lean": lean_against_plain(), "graphs": tests.graphs("cuda")}


def lean_against_plain() -> Figures:
    """Loss and gradients of one float32 step with the lean forward pass; raises if they are off by more than 1 %."""
    found = []
    for lean in (True, False):
        student, inputs = student_and_inputs(torch.float32)
        forward = student.forward if lean else student.network
        loss = student.objective(forward(inputs.images), None, inputs.labels)
        found.append((loss.detach(), torch.autograd.grad(loss, list(student.network.parameters()))))
    (loss, gradients), (other, wanted) = found
    scale = max(float(gradient.abs().max()) for gradient in wanted)
    worst = max(float((a - b).abs().max()) for a, b in zip(gradients, wanted, strict=True)) / scale
    if not (worst < 0.01 and abs(float(loss - other)) < 0.01):
        raise RuntimeError(f"lean and plain differ: losses {float(loss)} and {float(other)}, gradients {worst:.1e}")
    return {"losses": [float(loss), float(other)], "gradients_apart": worst}


def step_profile() -> Figures:
    """Device time of a training step by kernel: precisions, layouts, with cuDNN's search, without the lean forward."""
    cases = [(precision, layout, False, True) for precision in PRECISIONS for layout in LAYOUTS]
    cases += [(precision, "NHWC", False, False) for precision in PRECISIONS]
    cases += [(precision, "NHWC", True, True) for precision in ("bf16", "fp16")]  # a second each
    return {
        f"{precision} {layout}{' cudnn.benchmark' if search else ''}{'' if lean else ' plain'}": profiled(
            PRECISIONS[precision], LAYOUTS[layout], search, lean
        )
        for precision, layout, search, lean in cases
    }


def profiled(dtype: torch.dtype, layout: torch.memory_format, search: bool, lean: bool, steps: int = 5) -> Figures:
    """Device milliseconds and kernels per step, and the kernels that take the most time."""
    student, inputs = student_and_inputs(dtype, layout)
    if not lean:
        student.forward = student.network
    torch.backends.cudnn.benchmark = search
    for _ in range(3):
        take_step(student, inputs)
    with torch.profiler.profile(activities=[ProfilerActivity.CUDA]) as profile:
        for _ in range(steps):
            take_step(student, inputs)
        torch.cuda.synchronize()
    torch.backends.cudnn.benchmark = False
    rows = sorted(profile.key_averages(), key=lambda row: -row.self_device_time_total)
    return {
        "device_ms": sum(row.self_device_time_total for row in rows) / steps / 1000,
        "kernels": sum(row.count for row in rows if row.self_device_time_total > 0) / steps,
        "most": [[row.key[:90], row.count / steps, row.self_device_time_total / steps / 1000] for row in rows[:15]],
    }


def student_and_inputs(
    dtype: torch.dtype, layout: torch.memory_format = torch.channels_last
) -> tuple[Student, Inputs]:
    torch.manual_seed(0)
    network = load_space(SPACE).build(median_architecture(SPACE), CLASSES, 1.0)
    example = torch.zeros(2, 3, SIDE, SIDE, device=CUDA)
    student = prepare(network, None, SearchConfig(batch_size=BATCH), "none", example)
    student.network.to(memory_format=layout)
    images = torch.randn(BATCH, 3, SIDE, SIDE, device=CUDA, dtype=dtype).contiguous(memory_format=layout)
    labels = torch.arange(BATCH, device=CUDA) % CLASSES
    return student, Inputs(images, labels, None, torch.full((), 0.01, device=CUDA))


def cohorts(sizes: tuple[int, ...] = (1, 2, 4, 8), eager: tuple[int, ...] = (1, 8), steps: int = 200) -> Figures:
    """Milliseconds per student-step in the steady state on synthetic images, by number of students side by side."""
    found = {f"graph, K = {size}": step_ms(size, "graph", steps) for size in sizes}
    return found | {f"eager, K = {size}": step_ms(size, "eager", steps) for size in eager}


def connections() -> Figures:
    """`cohorts` for eight students only, to be run with another CUDA_DEVICE_MAX_CONNECTIONS."""
    return cohorts((8,), ())


def step_ms(size: int, execution: Execution, steps: int) -> float:
    space, rng, config = load_space(SPACE), np.random.default_rng(0), SearchConfig(batch_size=BATCH, lr=0.01)
    drawn = [tuple(int(rng.integers(radix)) for radix in space.radices) for _ in range(size)]
    example = torch.zeros(2, 3, SIDE, SIDE, device=CUDA)
    cohort = [prepare(space.build(choices, CLASSES, 1.0), None, config, "none", example) for choices in drawn]
    watch = Stopwatch()
    torch.cuda.synchronize()
    start = time.perf_counter()
    train(cohort, None, batches_of_noise(steps, "synthetic"), config, watch, execution=execution)
    torch.cuda.synchronize()
    spent = time.perf_counter() - start - watch.seconds["capture"]
    wrong = [student.error or student.execution for student in cohort if not student.execution.startswith(execution)]
    if wrong or any(student.status != "ok" for student in cohort):
        raise RuntimeError(f"{execution}, K = {size}: {wrong} {[student.error for student in cohort]}")
    return 1000 * spent / steps / size


def batches_of_noise(steps: int, backend: Backend) -> Batches:
    data = noise(BATCH * steps, 1)
    return train_batches(data.train, np.arange(len(data.train)), data=data, batch_size=BATCH, epochs=1,
                         resolution=SIDE, seed=0, device="cuda", backend=backend, threads=4)  # fmt: skip


def naive_loop(images: int = 1850, epochs: int = 50, naive_epochs: int = 4, size: int = 8) -> Figures:
    """The paper's low fidelity with half of its 100 epochs: two cohorts against a training script's usual loop, on
    images of noise."""
    with tempfile.TemporaryDirectory() as folder:
        at = setup(Path(folder), noise(images, 500), Fidelity("low", Fraction(1), epochs, kd_loss="kd"))
        trials = at.trials(2 * size)
        naive(at, trials[0], epochs=1)
        theirs = seconds(lambda: naive(at, trials[0], epochs=naive_epochs)) * epochs / naive_epochs
        first, later = (seconds(lambda group=group: ours(at, group, size)) for group in (trials[:size], trials[size:]))  # type: ignore[misc]
    hundred = first + later * (100 - size) / size
    return {
        "ratio": theirs * 100 / hundred,
        "minutes_for_100": hundred / 60,
        "naive_minutes_for_100": theirs * 100 / 60,
        "seconds_of_first_and_later_cohort": [first, later],
    }


def ours(at: BenchCase, trials: list[Trial], size: int, execution: Execution = "graph") -> list[float]:
    """Accuracies of a cohort; raises if a student did not train in the requested mode."""
    how = Resources(students_per_gpu=str(size), execution=execution)
    answers = worker.evaluate(at.context, at.teacher_file, trials, how)
    wrong = [answer.error or answer.execution for answer in answers if not answer.execution.startswith(execution)]
    if wrong or not all(answer.ok for answer in answers):
        raise RuntimeError(f"{wrong} {[answer.error for answer in answers]}")
    return [answer.accuracy for answer in answers]


def seconds(work: Callable[[], Any]) -> float:
    torch.cuda.synchronize()
    start = time.perf_counter()
    work()
    torch.cuda.synchronize()
    return time.perf_counter() - start


def kernel_shapes() -> Figures:
    """The losses against their peers in nine shapes; the largest of each loss also against torch.compile."""
    from bench import bench_kernels

    found = {}
    for loss, size in SHAPES:
        record = SimpleNamespace(extra_info={}, pedantic=lambda run, **_: run())
        getattr(bench_kernels, f"test_{loss}")(record, *size)
        found[f"{loss} {record.extra_info['size']}"] = record.extra_info
    return found


def accuracy(images: str, epochs: int = 5, size: int = 4) -> Figures:
    """Graphs and eager steps reach the same accuracy on real images, up to the variation between seeds."""
    with tempfile.TemporaryDirectory() as folder:
        data = load(images, valid_fraction=0.2, cache=Path(folder, "cache"))
        at = setup(Path(folder), data, Fidelity("low", Fraction(1), epochs, kd_loss="kd"))
        trials = at.trials(size)
        graph, eager = (ours(at, trials, size, execution) for execution in ("graph", "eager"))  # type: ignore[arg-type]
        reseeded = ours(at, [replace(trial, seed=1) for trial in trials], size)
    apart, by_seed = (float(np.sqrt(np.mean((np.array(graph) - other) ** 2))) for other in (eager, reseeded))
    if apart > 2 * by_seed + 0.03:
        raise RuntimeError(f"graphs and eager steps differ: {graph} and {eager}; another seed gives {reseeded}")
    return {"graph": graph, "eager": eager, "seed 1": reseeded, "rms_apart": apart, "rms_between_seeds": by_seed}


def dali(archive: str) -> Figures:
    """DALI from the archive made by `make gpu-bundle`: its pixels against the resident backend's, its speed, and a
    training whose steps are captured while DALI runs."""
    from engine import selftest as tests

    with unpacked(Path(archive)):
        found: Figures = {"arrays": tests.arrays("cuda")}
        batches = batches_of_noise(200, "dali")
        found["images_per_s"] = BATCH * len(batches) / seconds(lambda: [None for _ in batches])
        student, _ = student_and_inputs(torch.bfloat16)
        train([student], None, batches, SearchConfig(batch_size=BATCH), Stopwatch(), execution="graph")
        if (student.status, student.execution) != ("ok", "graph"):
            raise RuntimeError(student.error or student.execution)
    return found


@contextmanager
def unpacked(archive: Path) -> Iterator[None]:
    with tempfile.TemporaryDirectory() as folder, tarfile.open(archive) as packed:
        packed.extractall(folder, filter="data")
        sys.path.insert(0, folder)
        yield


PARTS: dict[str, Callable[..., Figures]] = {
    "machine": machine,
    "selftest": selftest,
    "step": step_profile,
    "cohorts": cohorts,
    "connections": connections,
    "naive": naive_loop,
    "shapes": kernel_shapes,
    "accuracy": accuracy,
    "dali": dali,
}

if __name__ == "__main__":
    name, *arguments = sys.argv[1:]
    print(json.dumps(PARTS[name](*arguments)))
