"""Results of the study at the benchmark's own size: tables in docs/results/real-size.md, figures in .csv and .json.

`python -m bench.real_size.conclude FOLDER --shared ../shared/data`

Reads FOLDER/trainings.jsonl and FOLDER/untrained.jsonl, complete or not; cells that do not have every loss yet are left
out. Truth is the benchmark's test accuracy after 200 epochs. Standard errors come from 1,000 bootstrap samples of the
cells; both sides of a difference use the same samples.
"""

from __future__ import annotations

import argparse
import csv
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from bench.real_size.study import LOSSES, ROOT, SPLITS, drawn, read, read_window
from bench.real_size.untrained import SCORES, SEEDS, SIZES, read_cifar100, sample
from engine.spaces.load import load_space
from engine.tasks import PROXIES
from engine.training.proxies import IMAGES, NOISE_IMAGES
from surrogate.quality import kendall_taus, normal_scores, partial_taus

Array = npt.NDArray[np.float64]
Rows = list[dict[str, Any]]
NAME = ROOT / "docs" / "results" / "real-size"
READOUTS = ("accuracy", "agreement", "cross_entropy")
DRAWS = 1000
OWN = (IMAGES, NOISE_IMAGES, 0)  # the size of the engine's own batch, and its seed


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--shared", type=Path, default=ROOT.parent / "shared" / "data", help="folder of the data")
    given = parser.parse_args()
    window, table = read_window(given.shared), read_cifar100(given.shared)
    trainings, untrained = read(given.folder), read(given.folder, SCORES)
    trained = finished(trainings, window)
    result = {
        "trained cells": len(trained),
        "trainings": trained_scores(trainings, untrained, window, trained),
        "untrained, window": untrained_scores(untrained, drawn(window, 64), window),
        "untrained, whole space": untrained_scores(untrained, sample(table), table),
        "batch sizes": batch_sizes(untrained, window),
    }
    NAME.with_suffix(".json").write_text(json.dumps(result, indent=2) + "\n")
    NAME.with_suffix(".md").write_text("\n".join(page(result)) + "\n")
    write_csv(trainings, untrained, window)
    print(NAME.with_suffix(".md").read_text())


def finished(trainings: Rows, window: dict[str, dict[str, float]]) -> list[str]:
    """The cells that are trained with every loss, in the order drawn."""
    done = {(line["cell"], line["loss"]) for line in trainings if line["status"] == "ok"}
    return [cell for cell in drawn(window, 64) if all((cell, loss) in done for loss in LOSSES)]


def trained_scores(
    trainings: Rows, untrained: Rows, window: dict[str, dict[str, float]], cells: list[str]
) -> dict[str, Any]:
    """Rank quality over the cells of each loss and readout and of the free scores, and selected differences."""
    scores, seconds = columns(trainings, cells)
    free = free_columns(untrained, cells, window)
    truth = np.array([window[cell]["test_e200"] for cell in cells])
    given = np.array([window[cell]["macs"] for cell in cells])
    found = ranked({**scores, **free}, truth, given)
    for name, spent in seconds.items():
        found["scores"][name]["seconds"] = spent
    base = "no teacher, accuracy"
    pairs = [(f"{loss}, accuracy", base) for loss in LOSSES if loss != "no teacher"]
    pairs += [(f"{loss}, {readout}", f"{loss}, accuracy") for loss in LOSSES for readout in READOUTS[1:]]
    pairs += [(name, base) for name in free if name != "MACs"]
    return {"scores": found["scores"], "differences": differences(found["draws"], pairs)}


def columns(trainings: Rows, cells: list[str]) -> tuple[dict[str, Array], dict[str, float]]:
    """Scores of the cells by "loss, readout" (greater is better), and the median CPU seconds of a training.

    The first training of a process also runs the teacher, so a median is used. Trainings from before CPU seconds were
    recorded count only for the scores.
    """
    lines = {(line["cell"], line["loss"]): line for line in trainings}
    scores: dict[str, Array] = {}
    seconds: dict[str, float] = {}
    for loss in LOSSES:
        mine = [lines[cell, loss] for cell in cells]
        for readout in READOUTS:
            sign = -1 if readout == "cross_entropy" else 1
            scores[f"{loss}, {readout}"] = np.array([sign * line["unseen"][readout] for line in mine])
            seconds[f"{loss}, {readout}"] = float(np.nanmedian([line.get("cpu_seconds", np.nan) for line in mine]))
    return scores, seconds


def free_columns(untrained: Rows, cells: list[str], table: dict[str, dict[str, float]]) -> dict[str, Array]:
    """Scores without a training of ours, by name, NaN if a cell has none: the engine's scores with seed 0, their mean
    rank, and the table's accuracy after 12 epochs on all data."""
    own = {line["cell"]: line for line in untrained if key(line) == OWN}
    choices = np.array([[int(digit) for digit in cell] for cell in cells], dtype=np.int8)
    count = load_space("nasbench201").activations
    assert count is not None
    found = {
        "MACs": np.array([table[cell]["macs"] for cell in cells]),
        "activations": count(choices, 10, 1.0, 32),
    }
    for name in PROXIES:
        found[name] = np.array([own.get(cell, {"scores": {}})["scores"].get(name, np.nan) for cell in cells])
    floors = [np.where(np.isnan(found[name]), -np.inf, found[name]) for name in PROXIES]
    found["mean rank of the four"] = np.mean([normal_scores(floor) for floor in floors], axis=0)
    found["12 epochs, all data (the table's)"] = np.array([table[cell]["val_e12"] for cell in cells])
    return found


def untrained_scores(untrained: Rows, cells: list[str], table: dict[str, dict[str, float]]) -> dict[str, Any]:
    """Rank quality over the cells that have every score, and CPU seconds per cell."""
    free = free_columns(untrained, cells, table)
    known = np.all([np.isfinite(values) for values in free.values()], axis=0)
    truth, given = (np.array([table[cell][name] for cell in cells])[known] for name in ("test_e200", "macs"))
    found = ranked({name: values[known] for name, values in free.items()}, truth, given)
    spent = [line["cpu_seconds"] for line in untrained if line["cell"] in cells and key(line) == OWN]
    return {
        "cells": int(known.sum()),
        "of": len(cells),
        "cpu_seconds": float(np.mean(spent)),
        "scores": found["scores"],
    }


def key(line: dict[str, Any]) -> tuple[int, int, int]:
    return line["images"], line["noise"], line["seed"]


def batch_sizes(untrained: Rows, window: dict[str, dict[str, float]]) -> Rows:
    """For each batch size, each score's mean tau over seeds in the window, and CPU seconds per cell."""
    cells, found = drawn(window, 64), []
    truth = np.array([window[cell]["test_e200"] for cell in cells])
    for images, noise in SIZES:
        lines = {(line["cell"], line["seed"]): line for line in untrained if key(line)[:2] == (images, noise)}
        if any((cell, seed) not in lines for cell in cells for seed in range(SEEDS)):
            continue
        rows = [[lines[cell, seed] for cell in cells] for seed in range(SEEDS)]
        taus = {
            name: kendall_taus([[line["scores"][name] for line in row] for row in rows], [truth] * SEEDS)
            for name in PROXIES
        }
        spent = float(np.mean([line["cpu_seconds"] for row in rows for line in row]))
        means = {name: float(tau.mean()) for name, tau in taus.items()}
        found.append({"images": images, "noise": noise, "cpu_seconds": spent, "tau": means})
    return found


def ranked(scores: dict[str, Array], truth: Array, given: Array) -> dict[str, Any]:
    """tau and tau given MACs of each score, with standard errors; `draws` holds the bootstrap's tau given MACs."""
    picks = np.random.default_rng(0).integers(len(truth), size=(DRAWS, len(truth)))
    picks = np.concatenate([np.arange(len(truth))[None], picks])  # the first is the sample itself
    found, draws = {}, {}
    for name, score in scores.items():
        taus = kendall_taus(score[picks], truth[picks])
        draws[name] = taus if name == "MACs" else partial_taus(score[picks], truth[picks], given[picks])
        found[name] = {"tau": taus[0], "tau_error": taus[1:].std(), **estimate(draws[name])}
    return {"scores": found, "draws": draws}


def estimate(draws: Array) -> dict[str, float]:
    return {"given_macs": float(draws[0]), "given_macs_error": float(draws[1:].std())}


def differences(draws: dict[str, Array], pairs: Iterable[tuple[str, str]]) -> Rows:
    return [{"of": one, "less": other, **estimate(draws[one] - draws[other])} for one, other in pairs]


def page(result: dict[str, Any]) -> list[str]:
    """The page, with one table per question."""
    size = f"{IMAGES} images and {NOISE_IMAGES} noise images"
    return [
        "# NAS-Bench-201 at its own size",
        "",
        "Made by `make real-size`. Truth is the benchmark's test accuracy after 200 epochs. ± is a bootstrap standard",
        "error over cells. All figures: [csv](real-size.csv) by cell, [json](real-size.json).",
        "",
        f"## Short trainings, {result['trained cells']} of 64 cells of 43 to 47 million MACs on CIFAR-10",
        "",
        "16 channels, 5 cells per stage, 32 pixels, 1,850 images, 10 epochs; the teacher is a ResNet-56 (93.4 %).",
        "Scores are from 1,000 images that the teacher has not seen. Seconds are CPU seconds of a training without the",
        "teacher, whose outputs all cells share.",
        "",
        *table(result["trainings"]["scores"], seconds=True),
        "",
        "| difference in tau given MACs | |",
        "| --- | --- |",
        *(f"| {d['of']} minus {d['less']} | {signed(d)} |" for d in result["trainings"]["differences"]),
        "",
        *untrained_table("CIFAR-10, the 64 cells of that window", result["untrained, window"], size),
        *untrained_table("CIFAR-100, a random sample of the whole space", result["untrained, whole space"], size),
        "## Batch size",
        "",
        f"Mean tau over {SEEDS} seeds, for the 64 cells of the window.",
        "",
        f"| images | noise images | CPU seconds | {' | '.join(PROXIES)} |",
        f"| {' | '.join(['---'] * (3 + len(PROXIES)))} |",
        *(size_row(line) for line in result["batch sizes"]),
    ]


def untrained_table(title: str, found: dict[str, Any], size: str) -> list[str]:
    return [
        f"## Without training: {title}",
        "",
        f"{found['cells']} of {found['of']} cells have every score. The engine's four scores take",
        f"{found['cpu_seconds']:.3f} CPU seconds per cell on one shared core, with {size}.",
        "",
        *table(found["scores"], seconds=False),
        "",
    ]


def table(scores: dict[str, dict[str, float]], seconds: bool) -> list[str]:
    lines = [
        f"| score | tau | tau given MACs |{' seconds |' if seconds else ''}",
        f"| --- | --- | --- |{' --- |' * seconds}",
    ]
    for name, one in scores.items():
        given = "" if name == "MACs" else f"{one['given_macs']:.2f} ± {one['given_macs_error']:.2f}"
        spent = f" {one['seconds']:.0f} |" if "seconds" in one else " |" * seconds
        lines.append(f"| {name} | {one['tau']:.2f} ± {one['tau_error']:.2f} | {given} |{spent}")
    return lines


def signed(one: dict[str, float]) -> str:
    return f"{one['given_macs']:+.2f} ± {one['given_macs_error']:.2f}"


def size_row(line: dict[str, Any]) -> str:
    taus = " | ".join(f"{line['tau'][name]:.3f}" for name in PROXIES)
    return f"| {line['images']} | {line['noise']} | {line['cpu_seconds']:.3f} | {taus} |"


def write_csv(trainings: Rows, untrained: Rows, window: dict[str, dict[str, float]]) -> None:
    """One row per cell and training of the window, and one per cell and training-free score of the engine's batch."""
    with open(NAME.with_suffix(".csv"), "w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["cell", "macs", "test_e200", "score", "part", "readout", "value", "seconds"])
        for line in sorted(trainings, key=lambda line: (line["cell"], line["loss"])):
            about = [line["cell"], window[line["cell"]]["macs"], window[line["cell"]]["test_e200"], line["loss"]]
            for split in SPLITS if line["status"] == "ok" else ():
                for readout, value in line[split].items():
                    spent = round(line.get("cpu_seconds", np.nan), 1)
                    writer.writerow([*about, split, readout, round(value, 5), spent])
        for line in untrained:
            if key(line) == OWN and line["cell"] in window:
                about = [line["cell"], window[line["cell"]]["macs"], window[line["cell"]]["test_e200"]]
                for name, value in line["scores"].items():
                    writer.writerow([*about, name, "", "", round(value, 5), round(line["cpu_seconds"], 4)])


if __name__ == "__main__":
    main()
