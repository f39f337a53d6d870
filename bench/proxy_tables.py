"""The engine's own training-free scores of every architecture of three recorded tables, for replays that use them.

`python -m bench.proxy_tables ../shared/data [NAME ...]` writes build/proxies/NAME.csv.gz, a table to `--join`; scores
are kept one by one, and the same command goes on from there. All batches are CIFAR-10 images, and the teacher is the
ResNet-56 of `make real-size`, even if a table's accuracies are those on CIFAR-100.
"""

from __future__ import annotations

import argparse
import csv
import gzip
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from torch import nn

from bench.real_size import study
from bench.real_size.study import ROOT
from engine.networks import mobilenetv2
from engine.networks.mobilenetv2 import InvertedResidual
from engine.networks.staged import Staged, conv_bn, he_init, pooled_classifier
from engine.search.replay.published import MACRO_BLOCKS, convert
from engine.search.replay.tables import Row, dump
from engine.space import Choice, SearchSpace
from engine.spaces.nasbench201 import nasbench201
from engine.tasks import PROXIES
from engine.training.proxies import make_batch, score_architectures
from engine.trial import Architecture

BUILD = ROOT / "build" / "proxies"
FILES = {
    "nasbench201": "nasbench201_cifar100.csv.gz",
    "macro": "nasbench_macro_cifar10.csv.gz",
    "mobilenetv2": "mfkd_mobilenetv2_cifar100.csv.gz",
}
CLASSES, SEED = 10, 0
# NAS-Bench-Macro (Su et al. 2021, arXiv 2103.11922): layers of each stage, channels after the stem and before pooling.
MACRO_STAGES, MACRO_STEM, MACRO_LAST = (2, 3, 3), 32, 1280
MACRO_KERNEL_AND_EXPANSION = {"mbconv3_e3": (3, 3), "mbconv5_e6": (5, 6)}
MOBILENETV2_STEM = 32

Described = tuple[SearchSpace, list[tuple[int, ...]], list[Row]]  # a space, members, and the rows that name them


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("shared", type=Path)
    parser.add_argument("names", nargs="*", default=list(TABLES), help=f"of {', '.join(TABLES)}")
    values = parser.parse_args()
    for name in values.names:
        print(make(name, values.shared))


def make(name: str, shared: Path) -> Path:
    """Scores what is left of a table; returns the file of its scores."""
    made = BUILD / f"{name}.csv.gz"
    if made.exists():
        return made
    space, members, rows = TABLES[name](read(shared / FILES[name]))
    BUILD.mkdir(parents=True, exist_ok=True)
    kept = f"{name}.jsonl"
    scores = {tuple(line["choices"]): line["scores"] for line in study.read(BUILD, kept)}
    left = [member for member in members if member not in scores]
    if left:
        context, teacher = study.open_study(ROOT / "build" / "real-size", shared)
        batch = make_batch(context.data, SEED, torch.device("cpu"), teacher.network, backend="resident")
        for member in left:
            (found,) = score_architectures(space, [Architecture(member)], batch, CLASSES, 1.0, SEED)
            scores[member] = found.scores
            study.append(BUILD, {"choices": member, "scores": found.scores}, kept)
    dump([row | _columns(scores[member]) for member, row in zip(members, rows, strict=True)], made)
    return made


def _columns(scores: dict[str, float]) -> Row:
    return {f"proxy:{name}": f"{scores[name]:.8g}" if name in scores else "" for name in PROXIES}


def read(path: Path) -> list[Row]:
    with gzip.open(path, "rt", newline="") as file:
        return list(csv.DictReader(file))


def choices_of(row: Row) -> Row:
    return {column: value for column, value in row.items() if column.startswith("choice:")}


def cells(rows: list[Row]) -> Described:
    """NAS-Bench-201: the first cell of each class of isomorphic ones."""
    first = list({row["iso"]: row for row in reversed(rows)}.values())[::-1]
    members = [tuple(map(int, row["ops"])) for row in first]
    return nasbench201(), members, [choices_of(row) for row in convert(first)]


def macro(rows: list[Row]) -> Described:
    """NAS-Bench-Macro: 8 layers in 3 stages."""
    choices = tuple(Choice(f"layer{i}", MACRO_BLOCKS) for i in range(sum(MACRO_STAGES)))
    members = [tuple(map(int, row["arch"])) for row in rows]
    return SearchSpace("macro", choices, macro_network), members, [choices_of(row) for row in convert(rows)]


def macro_network(choices: tuple[int, ...], classes: int, _: float) -> Staged:
    stages, place, c_in = [], 0, MACRO_STEM
    for depth in MACRO_STAGES:
        blocks, c_out = [], 2 * c_in
        for stride in (2, *[1] * (depth - 1)):
            blocks.append(_macro_block(MACRO_BLOCKS[choices[place]], c_in, c_out, stride))
            place, c_in = place + 1, c_out
        stages.append(nn.Sequential(*blocks))
    last = conv_bn(c_in, MACRO_LAST, 1, activation=nn.ReLU())
    head = nn.Sequential(last, *pooled_classifier(MACRO_LAST, classes))
    network = Staged(conv_bn(3, MACRO_STEM, 3, activation=nn.ReLU()), stages, head)
    he_init(network)
    return network


def _macro_block(name: str, c_in: int, c_out: int, stride: int) -> nn.Module:
    if name in MACRO_KERNEL_AND_EXPANSION:
        kernel, expansion = MACRO_KERNEL_AND_EXPANSION[name]
        return InvertedResidual(c_in, c_out, expansion, stride, kernel, nn.ReLU)
    return nn.Identity() if stride == 1 else conv_bn(c_in, c_out, 1, stride)


def authors(measured: list[Row]) -> Described:
    """The paper authors' 100 MobileNetV2, whose blocks are described by numbers."""
    rows = list({row["arch"]: row for row in measured}.values())
    encodings = tuple(row["encoding"] for row in rows)
    full = [row | {"kd": "nokd", "train_divisor": "1"} for row in rows]
    space = SearchSpace("authors", (Choice("encoding", encodings),), partial(authors_network, encodings))
    return space, [(i,) for i in range(len(rows))], [choices_of(row) for row in convert(full)]


def authors_network(encodings: tuple[str, ...], choices: tuple[int, ...], classes: int, _: float) -> Staged:
    described = encodings[choices[0]].split(";")
    *stages, (_, last, *_) = [tuple(map(int, block.split(","))) for block in described]
    return mobilenetv2.network(MOBILENETV2_STEM, 1, stages, last, classes)


TABLES: dict[str, Callable[[list[Row]], Described]] = {
    "nasbench201": cells,
    "macro": macro,
    "mobilenetv2": authors,
}

if __name__ == "__main__":
    main()
