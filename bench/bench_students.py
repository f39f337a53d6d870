"""Whole low-fidelity evaluations: cohorts of students against a training script's usual loop, in the same run.

    python -m pytest bench/bench_students.py --benchmark-json=raw.json
    python -m bench.bench_students raw.json bench/results/cpu-amd-epyc     # students.json and students.png

`naive` trains one student at a time, like RepDistiller: a DataLoader with torchvision's transforms, the teacher's
forward pass for each student, losses in plain PyTorch, NCHW, and a host read of the loss in every step. Both sides
start from the same weights and train for the same number of steps on the same number of images; set-up and the final
evaluation count. Seconds are CPU-seconds of the process (one thread), which other work on the machine affects little.
The naive loop runs in its own process, so that none of our settings speeds it up. For a GPU see bench/gpu_parts.py.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import platform
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any

import pytest
import torch

from bench.naive import BenchCase, naive, naive_loss, noise, setup
from engine.config import Resources
from engine.training import teacher as teachers
from engine.training.distill import Objective, teacher_output
from engine.training.evaluate import build_student, evaluate
from engine.trial import Evaluation, Fidelity, KDLoss, Trial

ROUNDS = 2


def ours(at: BenchCase, trials: list[Trial], **resources: Any) -> list[Evaluation]:
    answers = evaluate(at.context, at.teacher_file, trials, Resources(**resources))
    assert [answer.error for answer in answers if not answer.ok] == []
    return answers


def naive_seconds(at: BenchCase, trial: Trial) -> float:
    torch.set_num_threads(1)
    return seconds(lambda: naive(at, trial))


def check(at: BenchCase, trial: Trial) -> None:
    """Checks on one batch, before anything is timed, that both sides minimise the same loss."""
    config, classes = at.context.config, len(at.context.data.classes)
    torch.manual_seed(0)
    images, labels = torch.randn(8, 3, 32, 32), torch.arange(8) % classes
    with torch.no_grad():
        student, target = build_student(config, trial, classes)(images), teachers.load(at.teacher_file).eval()(images)
        objective = Objective(config, trial.fidelity.kd_loss, student, target)
        fused = objective(student, teacher_output(target, objective.feature_keys), labels)
        torch.testing.assert_close(
            fused, naive_loss(config, trial.fidelity.kd_loss, student, target, labels), rtol=2e-3, atol=0
        )


def seconds(work: Callable[[], Any]) -> float:
    start = time.process_time()
    work()
    return time.process_time() - start


def compared(benchmark: Any, at: BenchCase, trials: list[Trial], cohorts: int) -> None:
    """Times `cohorts` cohorts of `trials`, one after another, alternating with the naive loop over the same trials."""
    check(at, trials[0])
    other = ProcessPoolExecutor(1, multiprocessing.get_context("spawn"))
    short = replace(trials[0], fidelity=replace(trials[0].fidelity, epochs=1))
    other.submit(naive_seconds, at, short).result()  # warm up: imports, oneDNN's choices, a first pipeline
    ours(at, [short], teacher_cache="0")
    theirs: list[float] = []
    first: list[float] = []
    later: list[float] = []

    def one_round() -> None:
        from engine.training import evaluate as worker

        worker._teacher.cache_clear()  # as at the start of a search: an empty teacher cache
        theirs.append(sum(other.submit(naive_seconds, at, one).result() for one in trials) / len(trials))
        first.append(seconds(lambda: ours(at, trials)) / len(trials))
        later.extend(seconds(lambda: ours(at, trials)) / len(trials) for _ in range(cohorts - 1))

    with other:
        benchmark.pedantic(one_round, rounds=ROUNDS)
    whole = (median(first) + (cohorts - 1) * median(later)) / cohorts
    benchmark.extra_info.update(
        peer="naive loop",
        ratio=round(median(theirs) / whole, 2),
        ratio_first_cohort=round(median(theirs) / median(first), 2),
        ratio_later_cohorts=round(median(theirs) / median(later), 2),
        evaluations_per_hour=round(3600 / whole, 1),
        naive_evaluations_per_hour=round(3600 / median(theirs), 1),
        seconds_each={"naive": theirs, "first cohort": first, "later cohorts": later},
        cohort=len(trials),
        cohorts=cohorts,
        space=at.context.config.space,
        kd_loss=at.low.kd_loss,
    )


@pytest.mark.benchmark(group="students: whole low-fidelity evaluations, ResNet-56 as teacher")
@pytest.mark.parametrize(
    ("space", "kd_loss"),
    [("mobilenetv2", "kd"), ("mobilenetv2", "nst"), ("nasbench201:cells=1", "kd"), ("nasbench201:cells=1", "nst")],
    ids=["mobilenetv2-kd", "mobilenetv2-nst", "light-nasbench201-kd", "light-nasbench201-nst"],
)
def test_evaluations(benchmark: Any, tmp_path: Path, space: str, kd_loss: KDLoss) -> None:
    """Two cohorts of 4, as in a search: the second uses cached teacher outputs, like all but the first in a search."""
    at = setup(tmp_path, noise(128, 64), Fidelity("low", epochs=2, kd_loss=kd_loss), space)
    compared(benchmark, at, at.trials(4), cohorts=2)


@pytest.mark.benchmark(group="students: evaluations per hour by size of the cohort")
def test_cohort_sizes(benchmark: Any, tmp_path: Path) -> None:
    """Without the teacher cache, to show the effect of sharing within a cohort; predictions are from K = 1."""
    at = setup(tmp_path, noise(128, 64), Fidelity("low", epochs=2, kd_loss="kd"), "nasbench201:cells=1")
    trials, sizes = at.trials(8), (1, 2, 4, 8)
    spent: dict[int, list[float]] = {size: [] for size in sizes}
    shares: list[float] = []

    def cohort(size: int) -> None:
        groups = [trials[i : i + size] for i in range(0, 8, size)]
        answers: list[Evaluation] = []
        options = {"teacher_cache": "0", "students_per_gpu": str(size)}
        spent[size].append(
            seconds(lambda: answers.extend(a for group in groups for a in ours(at, group, **options))) / 8
        )
        if size == 1:
            shared = sum(a.costs["teacher"] + a.costs["data"] for a in answers)
            shares.append(shared / sum(a.seconds for a in answers))

    def one_round() -> None:
        for size in sizes:
            cohort(size)

    ours(at, trials[:2], teacher_cache="0")
    benchmark.pedantic(one_round, rounds=ROUNDS)
    alone, share = median(spent[1]), median(shares)
    table = {
        size: {
            "evaluations_per_hour": round(3600 / median(spent[size]), 1),
            "predicted": round(3600 / (alone * (1 - share + share / size)), 1),
            "seconds_each": [round(value, 3) for value in spent[size]],
        }
        for size in sizes
    }
    ratio = round(alone / median(spent[8]), 2)
    benchmark.extra_info.update(peer="K = 1", ratio=ratio, shared_part=round(share, 3), by_size=table)


# ---- table and plot ------------------------------------------------------------------------------------


def summarize(source: Path, folder: Path) -> None:
    """Writes students.json and students.png (evaluations per hour by cohort size) from pytest-benchmark's JSON."""
    raw = json.loads(source.read_text())
    folder.mkdir(parents=True, exist_ok=True)
    machine = {
        "cpu": raw["machine_info"].get("cpu", {}).get("brand_raw"), "cores": os.cpu_count(),
        "python": platform.python_version(), "torch": torch.__version__, "date": raw["datetime"][:10],
        "load": [round(one, 1) for one in os.getloadavg()],
    }  # fmt: skip
    figures = {bench["name"]: bench["extra_info"] for bench in raw["benchmarks"]}
    (folder / "students.json").write_text(json.dumps({"machine": machine, "figures": figures}, indent=1) + "\n")
    if "test_cohort_sizes" in figures:
        plot(figures["test_cohort_sizes"]["by_size"], folder / "students.png", machine)


def plot(by_size: dict[str, dict[str, Any]], path: Path, machine: dict[str, Any]) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    sizes = [int(size) for size in by_size]
    figure, axes = pyplot.subplots(figsize=(7, 4.2), layout="constrained")
    for row in zip(*(entry["seconds_each"] for entry in by_size.values()), strict=True):
        axes.plot(sizes, [3600 / value for value in row], "o", color="C0", alpha=0.4)
    axes.plot(sizes, [entry["evaluations_per_hour"] for entry in by_size.values()], "C0", label="measured (median)")
    axes.plot(sizes, [entry["predicted"] for entry in by_size.values()], "k--", label="predicted from K = 1")
    axes.set(xlabel="students side by side (K)", ylabel="evaluations per hour of one core", xticks=sizes,
             title=f"128 images, 2 epochs, KD from ResNet-56, nasbench201:cells=1\n{machine['cpu']}, 1 thread, torch "
                   f"{machine['torch']}", ylim=(0, None))  # fmt: skip
    axes.legend()
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Table and plot from a pytest-benchmark JSON.")
    parser.add_argument("json", type=Path)
    parser.add_argument("folder", type=Path)
    arguments = parser.parse_args()
    summarize(arguments.json, arguments.folder)
