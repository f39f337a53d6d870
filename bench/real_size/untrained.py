"""Training-free scores of NAS-Bench-201 cells at the benchmark's own size, with the CPU seconds of each cell.

`python -m bench.real_size.untrained FOLDER --shared ../shared/data`

Scores the cells of the CIFAR-10 window with batches of several sizes and seeds, and a random sample of the whole space
with the engine's own batch. All batches have CIFAR-10 images, even if the truth is from CIFAR-100. Each score is
appended to FOLDER/untrained.jsonl; run the same command again to resume.
"""

from __future__ import annotations

import argparse
import csv
import gzip
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from bench.real_size.study import ROOT, Lab, append, drawn, read, read_window, setup
from engine.spaces.load import load_space
from engine.training.proxies import IMAGES, NOISE_IMAGES, make_batch, score_architectures
from engine.trial import Architecture

CIFAR100 = "nasbench201_cifar100.csv.gz"
SCORES = "untrained.jsonl"
SAMPLE = 200  # cells of the whole space
SIZES, SEEDS = ((8, 8), (16, 4), (16, 8), (24, 8), (32, 8)), 3  # (images, noise images)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--shared", type=Path, default=ROOT.parent / "shared" / "data", help="folder of the data")
    given = parser.parse_args()
    lab = setup(given.folder, given.shared)
    window, table = drawn(read_window(given.shared), 64), read_cifar100(given.shared)
    done = {key(line) for line in read(given.folder, SCORES)}
    for images, noise in sorted(SIZES, key=lambda size: size != (IMAGES, NOISE_IMAGES)):  # the engine's own first
        for seed in range(SEEDS):
            both = window + (sample(table) if (images, noise) == (IMAGES, NOISE_IMAGES) else [])
            left = [cell for cell in dict.fromkeys(both) if (cell, images, noise, seed) not in done]
            for found in scored(lab, left, images, noise, seed):
                append(given.folder, found, SCORES)


def key(line: dict[str, Any]) -> tuple[str, int, int, int]:
    return line["cell"], line["images"], line["noise"], line["seed"]


def read_cifar100(shared: Path) -> dict[str, dict[str, float]]:
    """The benchmark's CIFAR-100 results, one cell per class of isomorphic cells."""
    rows: dict[str, dict[str, float]] = {}
    seen = set()
    with gzip.open(shared / CIFAR100, "rt") as file:
        for row in csv.DictReader(file):
            if row["iso"] not in seen:
                seen.add(row["iso"])
                rows[row["ops"]] = {name: float(row[name]) for name in ("macs", "params", "val_e12", "test_e200")}
    return rows


def sample(table: dict[str, dict[str, float]]) -> list[str]:
    """SAMPLE cells of the table, drawn at random."""
    cells = sorted(table)
    return [cells[i] for i in np.random.default_rng(0).permutation(len(cells))[:SAMPLE]]


def scored(lab: Lab, cells: list[str], images: int, noise: int, seed: int) -> Iterator[dict[str, Any]]:
    """The scores of each cell and their CPU seconds, including building the network."""
    space, data, teacher = load_space(lab.context.config.space), lab.context.data, lab.teacher.network
    batch = make_batch(data, seed, torch.device("cpu"), teacher, backend="resident", images=images, noise=noise)
    for cell in cells:
        architecture, start = Architecture(tuple(map(int, cell))), time.process_time()
        (found,) = score_architectures(space, [architecture], batch, len(data.classes), 1.0, seed)
        spent = time.process_time() - start
        about = {"cell": cell, "images": images, "noise": noise, "seed": seed, "cpu_seconds": spent}
        yield {**about, "scores": found.scores, "missing": found.missing}


if __name__ == "__main__":
    main()
