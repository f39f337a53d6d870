"""Distillation losses against common implementations: forward + backward, all contenders interleaved.

    make bench-kernels                       CPU sizes, a table and plots in OUT
    python -m pytest bench/bench_kernels.py  CPU sizes, or GPU sizes on CUDA

Every bench first checks the gradients that it will time against a float64 formula. The peers are rewritten from their
formulas: `repdistiller` (KD, AT, NST), `torchdistill` (KD with batchmean), `eager` PyTorch, `compile` (torch.compile
of eager), `bmm` (NST through batched products), `liger` (Liger-Kernel, on CUDA).
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import platform
import shutil
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import kernels

CUDA = torch.cuda.is_available()
DEVICE = "cuda" if CUDA else "cpu"
DTYPE = torch.bfloat16 if CUDA else torch.float32
SECONDS = 0.5 if CUDA else 2.5  # for one bench's interleaved rounds, after warming up
LINES = os.environ.get("BENCH_LINES")  # a file for each bench's figures at once, in case a time limit ends the run
ROUNDS = (5, 60)  # at least, at most
FLUSH_BYTES = 256 * 2**20  # more than any current L2 cache
Loss = Callable[[Tensor, Tensor], Tensor]


def eager_kd(temperature: float, y: Tensor) -> Loss:
    def loss(s: Tensor, t: Tensor) -> Tensor:
        soft = F.kl_div(F.log_softmax(s / temperature, 1), F.softmax(t / temperature, 1), reduction="sum")
        return 0.1 * F.cross_entropy(s, y) + 0.9 * soft * temperature**2 / s.shape[0]

    return loss


def torchdistill_kd(temperature: float, y: Tensor) -> Loss:
    def loss(s: Tensor, t: Tensor) -> Tensor:
        soft = torch.softmax(t / temperature, 1)
        kl = F.kl_div(torch.log_softmax(s / temperature, 1), soft, reduction="batchmean")
        return 0.1 * F.cross_entropy(s, y) + 0.9 * temperature**2 * kl

    return loss


def liger_kd(temperature: float, y: Tensor) -> Loss | None:
    """Liger's KL divergence and cross entropy, including the softmax; None if it cannot run."""
    if not CUDA:
        return None
    try:
        from liger_kernel.transformers import LigerCrossEntropyLoss, LigerKLDIVLoss
    except ImportError:
        return None
    kl, ce = LigerKLDIVLoss(reduction="batchmean"), LigerCrossEntropyLoss()

    def loss(s: Tensor, t: Tensor) -> Tensor:
        soft = kl(torch.log_softmax(s / temperature, 1), torch.softmax(t / temperature, 1))
        return 0.1 * ce(s.clone(), y) + 0.9 * temperature**2 * soft  # Liger overwrites its input

    return loss


def eager_at(s: Tensor, t: Tensor) -> Tensor:
    a, b = (F.normalize(f.pow(2).mean(1).flatten(1)) for f in (s, t))
    return (a - b).pow(2).mean()


def repdistiller_nst(s: Tensor, t: Tensor) -> Tensor:
    def kernel(a: Tensor, b: Tensor) -> Tensor:
        return (a.unsqueeze(2) * b.unsqueeze(1)).sum(-1).pow(2)

    s, t = (F.normalize(f.flatten(2), dim=2) for f in (s, t))
    return kernel(t, t).mean() + kernel(s, s).mean() - 2 * kernel(s, t).mean()


def bmm_nst(s: Tensor, t: Tensor) -> Tensor:
    s, t = (F.normalize(f.flatten(2), dim=2) for f in (s, t))
    terms = [torch.bmm(a, b.mT).pow(2).mean() for a, b in ((t, t), (s, s), (s, t))]
    return terms[0] + terms[1] - 2 * terms[2]


def compiled(loss: Loss) -> Loss:
    """Compiled for this case's sizes only: a cache from another case would make sizes symbolic and the code slower."""
    torch._dynamo.reset()
    return torch.compile(loss, dynamic=False)


KD_SIZES = [(128, 10), (128, 100), (1024, 100), (256, 1000), (1024, 1000), (128, 21841)]
AT_SIZES = [(128, 24, 24, 32), (128, 64, 64, 16), (128, 160, 160, 8), (128, 640, 640, 4)]
# CIFAR maps of the spaces and maps of the paper's ShuffleNets, with N small enough for the literal formula on a CPU.
NST_SIZES = [(16, 24, 24, 32), (16, 64, 64, 16), (16, 160, 160, 8), (8, 320, 320, 4), (4, 640, 640, 4),
             (16, 40, 40, 16), (16, 80, 80, 8), (16, 160, 160, 4)]  # fmt: skip
if CUDA:
    KD_SIZES = [(n, c) for n in (128, 256, 512, 1024) for c in (10, 100, 120, 1000)] + [(1024, 21841), (1024, 21848)]
    AT_SIZES = [(n, c, k * c, size) for n in (128, 1024) for c, size in ((24, 32), (64, 16), (160, 8), (640, 4))
                for k in (1, 2)]  # fmt: skip
    AT_SIZES += [(256, 24, 256, 56), (256, 40, 512, 28), (256, 160, 1024, 14), (256, 1280, 2048, 7)]
    NST_SIZES = [(128, 24, 24, 32), (128, 64, 64, 16), (128, 160, 160, 8), (128, 640, 640, 4), (64, 40, 40, 16),
                 (64, 80, 80, 8), (64, 160, 160, 4), (256, 1280, 2048, 7), (256, 160, 1024, 14)]  # fmt: skip
# Compiling takes 5 to 20 s per size: one size on a CPU (if it has a C++ compiler), the largest ones on a GPU.
COMPILED_KD = [(1024, 100), (1024, 1000), (1024, 21848)] if CUDA else [(128, 100)]
COMPILED_AT = [size for size in AT_SIZES if size[0] == 256 or size[1] == size[2]] if CUDA else [(128, 160, 160, 8)]
COMPILE_HERE = CUDA or shutil.which("g++") is not None


def labels(n: int, c: int) -> Tensor:
    return torch.randint(0, c, (n,), generator=torch.Generator().manual_seed(2)).to(DEVICE)


def draw(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE, DTYPE)


@pytest.mark.parametrize(("n", "cs", "ct", "size"), NST_SIZES, ids=lambda v: str(v))
def test_nst(benchmark: Any, n: int, cs: int, ct: int, size: int) -> None:
    s, t = draw(n, cs, size, size, seed=0), draw(n, ct, size, size, seed=1)
    if CUDA:
        s, t = (f.to(memory_format=torch.channels_last) for f in (s, t))
    products = n * max(cs, ct) ** 2 * size * size * 4 * s.element_size()
    peers: dict[str, Loss | None] = {
        "bmm": bmm_nst,
        "repdistiller": repdistiller_nst if not CUDA or products < 60 * 2**30 else None,
        "compile": compiled(bmm_nst) if CUDA and n * cs * ct < 2**23 else None,
    }
    race(benchmark, "nst", f"{n}x{cs}/{ct}x{size}x{size}", kernels.nst_loss, peers, s, t,
         bytes_moved=3 * s.nbytes + t.nbytes)  # fmt: skip


@pytest.mark.parametrize(("n", "cs", "ct", "size"), AT_SIZES, ids=lambda v: str(v))
@pytest.mark.parametrize("layout", ["NHWC"] if CUDA else ["NHWC", "NCHW"])
def test_attention(benchmark: Any, n: int, cs: int, ct: int, size: int, layout: str) -> None:
    s, t = draw(n, cs, size, size, seed=0), draw(n, ct, size, size, seed=1)
    if layout == "NHWC":
        s, t = (f.to(memory_format=torch.channels_last) for f in (s, t))
    peers: dict[str, Loss | None] = {
        "eager": eager_at,  # the formula of both RepDistiller and torchdistill
        "compile": compiled(eager_at) if (n, cs, ct, size) in COMPILED_AT and layout == "NHWC" else None,
    }
    race(benchmark, "attention", f"{n}x{cs}/{ct}x{size}x{size} {layout}", kernels.attention_transfer_loss, peers, s, t,
         bytes_moved=3 * s.nbytes + t.nbytes)  # fmt: skip


@pytest.mark.parametrize(("n", "c"), KD_SIZES, ids=lambda v: str(v))
def test_ce_kd(benchmark: Any, n: int, c: int) -> None:
    temperature = 4.0
    compiles = (n, c) in COMPILED_KD
    width = 21848 if c == 21848 else c  # the padded classifier: 21841 classes at a stride of 21848
    c = min(c, 21841)
    s, t = (draw(n, width, seed=i)[:, :c] for i in (0, 1))
    y = labels(n, c)
    peers: dict[str, Loss | None] = {
        "eager": eager_kd(temperature, y),
        "torchdistill": torchdistill_kd(temperature, y),
        "liger": liger_kd(temperature, y),
        "compile": compiled(eager_kd(temperature, y)) if compiles else None,
    }
    size = f"{n}x{c} stride {width}" if width != c else f"{n}x{c}"
    race(benchmark, "ce_kd", size, lambda a, b: kernels.ce_kd_loss(a, b, y, temperature=temperature), peers, s, t,
         bytes_moved=5 * s.nbytes)  # fmt: skip


def race(
    benchmark: Any,
    loss: str,
    size: str,
    ours: Loss,
    peers: dict[str, Loss | None],
    s: Tensor,
    t: Tensor,
    bytes_moved: int,
) -> None:
    """Checks all contenders, then times them in turn, round by round; the plugin itself times only ours."""
    contenders = {"ours": ours, **{name: peer for name, peer in peers.items() if peer is not None and runs(name)}}
    leaf = s.detach().requires_grad_()

    def step(contender: Loss) -> Callable[[], Tensor]:
        return lambda: torch.autograd.grad(contender(leaf, t), leaf)[0]

    steps = {name: step(contender) for name, contender in contenders.items()}
    first_call_s = {}
    wanted = correct(peers, leaf, t)
    for name, run in steps.items():
        start = time.perf_counter()
        gradient = run().double()
        wait()
        first_call_s[name] = time.perf_counter() - start
        most = wanted.abs().max()
        # The peers get a looser bound, because plain bfloat16 loses digits that ours keeps.
        bound = (2e-2 if name == "ours" else 2e-1) if CUDA else 1e-4
        assert (gradient - wanted).abs().max() <= bound * most, f"{name} is wrong: nothing is timed"
    times = interleaved(steps)
    benchmark.pedantic(steps["ours"], rounds=5, warmup_rounds=1)
    median = {name: statistics.median(values) for name, values in times.items()}
    best = min((name for name in median if name != "ours"), key=lambda name: median[name])
    benchmark.extra_info.update(
        loss=loss, size=size, dtype=str(s.dtype)[6:], device=DEVICE,
        rounds={name: len(values) for name, values in times.items()},
        peer=best, ratio=median[best] / median["ours"],
        median_ms={name: 1e3 * value for name, value in median.items()},
        spread_ms={name: [1e3 * q for q in quantiles(values)] for name, values in times.items()},
        first_call_s=first_call_s, left_out=[name for name in peers if name not in contenders],
    )  # fmt: skip
    if CUDA:
        benchmark.extra_info.update(on_device(steps, bytes_moved))
    if LINES:
        with Path(LINES).open("a") as out:
            out.write(json.dumps(benchmark.extra_info) + "\n")


def runs(name: str) -> bool:
    return name != "compile" or COMPILE_HERE


def correct(peers: dict[str, Loss | None], leaf: Tensor, t: Tensor) -> Tensor:
    """The gradient of the first peer's formula in float64, which shares no code with ours."""
    wide = leaf.detach().double().requires_grad_()
    formula = next(peer for peer in peers.values() if peer is not None)
    return torch.autograd.grad(formula(wide, t.double()), wide)[0]


def interleaved(steps: dict[str, Callable[[], Tensor]]) -> dict[str, list[float]]:
    """Seconds by contender and round, host to host. A contender slower than the budget runs fewer rounds."""
    for run in steps.values():
        run()
    wait()
    times: dict[str, list[float]] = {name: [] for name in steps}
    share = SECONDS / len(steps)
    start = time.perf_counter()
    while len(times["ours"]) < ROUNDS[1] and (time.perf_counter() - start < SECONDS or len(times["ours"]) < ROUNDS[0]):
        for name, run in steps.items():
            if len(times[name]) >= 3 and sum(times[name]) > share:
                continue
            begin = time.perf_counter()
            run()
            wait()
            times[name].append(time.perf_counter() - begin)
        if all(len(v) >= 3 and sum(v) > share for v in times.values()):
            break
    return times


def quantiles(values: list[float]) -> list[float]:
    """The 20 % and 80 % quantiles."""
    ordered = sorted(values)
    return [ordered[int(q * (len(ordered) - 1))] for q in (0.2, 0.8)]


def wait() -> None:
    if CUDA:
        torch.cuda.synchronize()


def on_device(steps: dict[str, Callable[[], Tensor]], bytes_moved: int) -> dict[str, Any]:
    """Device milliseconds with a cold and a hot L2 cache, launches, peak memory, fraction of copy bandwidth."""
    flush = torch.empty(FLUSH_BYTES, dtype=torch.int8, device="cuda")
    figures: dict[str, Any] = {"cold_ms": {}, "hot_ms": {}, "launches": {}, "peak_bytes": {}}

    def timed(run: Callable[[], Any], cold: bool) -> float:
        values = []
        for _ in range(50):
            if cold:
                flush.zero_()
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            torch.cuda._sleep(2_000_000)  # 1 ms: the host gets 30 or more launches ahead, so no gap is timed
            begin.record()
            run()
            end.record()
            end.synchronize()
            values.append(begin.elapsed_time(end))
        return statistics.median(values)

    for name, run in steps.items():
        figures["cold_ms"][name], figures["hot_ms"][name] = timed(run, True), timed(run, False)
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        wait()
        figures["peak_bytes"][name] = torch.cuda.max_memory_allocated() - before
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
            run()
            wait()
        figures["launches"][name] = sum(e.count for e in profile.key_averages() if e.self_device_time_total > 0)
    half = torch.empty(max(bytes_moved // 2, 1), dtype=torch.int8, device="cuda")
    target = torch.empty_like(half)
    figures["copy_fraction"] = timed(lambda: target.copy_(half), True) / figures["cold_ms"]["ours"]
    return figures


# ---- table and plots -------------------------------------------------------------------------------------


def summarize(source: Path, folder: Path) -> None:
    """Writes kernels.csv, machine.json and one PNG per loss from pytest-benchmark's JSON."""
    report = json.loads(source.read_text())
    rows = [bench["extra_info"] for bench in report["benchmarks"]]
    folder.mkdir(parents=True, exist_ok=True)
    cpu = report["machine_info"].get("cpu", {})
    machine = {
        "cpu": cpu.get("brand_raw"), "cores": os.cpu_count(), "threads": torch.get_num_threads(),
        "python": platform.python_version(), "torch": torch.__version__, "date": report["datetime"][:10],
        "device": torch.cuda.get_device_name() if CUDA else "cpu", "benches": len(rows),
    }  # fmt: skip
    (folder / "machine.json").write_text(json.dumps(machine, indent=1) + "\n")
    with (folder / "kernels.csv").open("w", newline="") as out:
        table = csv.writer(out, lineterminator="\n")
        table.writerow(("loss", "size", "dtype", "contender", "median_ms", "p20_ms", "p80_ms", "rounds", "multiple"))
        for row in rows:
            for name, median in row["median_ms"].items():
                numbers = (f"{value:.4g}" for value in (median, *row["spread_ms"][name]))
                multiple = f"{median / row['median_ms']['ours']:.3g}"
                table.writerow([row["loss"], row["size"], row["dtype"], name, *numbers, row["rounds"][name], multiple])
    for loss in dict.fromkeys(row["loss"] for row in rows):
        plot([row for row in rows if row["loss"] == loss], folder / f"{loss}.png", machine)


def plot(rows: list[dict[str, Any]], path: Path, machine: dict[str, Any]) -> None:
    """Plots times as multiples of ours, one group of bars per size, on a logarithmic scale."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    names = [n for n in dict.fromkeys(n for row in rows for n in row["median_ms"]) if n != "ours"]
    figure, axes = pyplot.subplots(figsize=(9, 0.6 + 0.5 * len(rows)), layout="constrained")
    height = 0.8 / len(names)
    for k, name in enumerate(names):
        medians = [(i, row["median_ms"]) for i, row in enumerate(rows) if name in row["median_ms"]]
        places = [i + (k - (len(names) - 1) / 2) * height for i, _ in medians]
        axes.barh(places, [median[name] / median["ours"] for _, median in medians], height, label=name)
    axes.axvline(1, color="black", linewidth=1)
    axes.set(xscale="log", yticks=range(len(rows)), yticklabels=[r["size"] for r in rows],
             xlabel="time of forward + backward, as a multiple of ours (line)",
             title=f"{rows[0]['loss']}: {machine['cpu'] if not CUDA else machine['device']}, "
                   f"{machine['threads']} thread(s), torch {machine['torch']}")  # fmt: skip
    axes.invert_yaxis()
    axes.legend()
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Table and plots from a pytest-benchmark JSON.")
    parser.add_argument("json", type=Path)
    parser.add_argument("folder", type=Path)
    arguments = parser.parse_args()
    summarize(arguments.json, arguments.folder)
