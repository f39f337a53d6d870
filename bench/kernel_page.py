"""The figures of `make bench-kernels` as a page: `python -m bench.kernel_page` writes docs/results/kernels.md.

It reads kernels.csv and machine.json of bench/results/cpu-amd-epyc, where `bench.bench_kernels` has put them.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
SOURCE = ROOT / "bench" / "results" / "cpu-amd-epyc"
PAGE = ROOT / "docs" / "results" / "kernels.md"
TITLES = {
    "nst": "NST, samples x channels of student/teacher x height x width, NCHW",
    "attention": "Attention transfer",
    "ce_kd": "Cross entropy + KD, samples x classes, T = 4",
}


def main() -> None:
    with open(SOURCE / "kernels.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    machine = json.loads((SOURCE / "machine.json").read_text())
    lines = [
        "# Times of the losses",
        "",
        "Made by `make bench-kernels` and `python -m bench.kernel_page`. Median ms of forward + backward, float32,",
        f"{machine['threads']} thread of {machine['cores']} cores of an {machine['cpu']} that other work was using;",
        f"Python {machine['python']}, PyTorch {machine['torch']}, {machine['date']}. Contenders alternate round by",
        "round in one process, and their gradients are checked against a float64 formula first. In brackets: as a",
        "multiple of ours. These ratios varied between runs by up to a third for most, and by several times for the",
        "widest NST maps. Spreads and rounds: [csv](../../bench/results/cpu-amd-epyc/kernels.csv).",
    ]
    for loss, title in TITLES.items():
        lines += ["", f"## {title}", "", *table([row for row in rows if row["loss"] == loss])]
    PAGE.write_text("\n".join(lines) + "\n")


def table(rows: list[dict[str, str]]) -> Iterator[str]:
    """A line for each size, a column for each contender."""
    names = list(dict.fromkeys(row["contender"] for row in rows))
    yield f"| size | {' | '.join(names)} |"
    yield f"| --- | {' | '.join(['---'] * len(names))} |"
    for size in dict.fromkeys(row["size"] for row in rows):
        found = {row["contender"]: row for row in rows if row["size"] == size}
        yield f"| {size} | {' | '.join(cell(found.get(name)) for name in names)} |"


def cell(row: dict[str, str] | None) -> str:
    if row is None:
        return ""
    return row["median_ms"] if row["contender"] == "ours" else f"{row['median_ms']} ({row['multiple']})"


if __name__ == "__main__":
    main()
