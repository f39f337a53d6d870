"""The table and the picture of a comparison: `python -m bench.pretrained.conclude FOLDER`.

Reads FOLDER/rows.jsonl and writes FOLDER/peers.md and FOLDER/peers.png. An accuracy is the mean over seeds on the test
part. Differences are paired: the same seeds and the same images. The first standard error is over images (of the mean
over seeds), the second over seeds.
"""

from __future__ import annotations

import argparse
import json
import math
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from bench.pretrained.compare import OURS, ROWS, TEACHER
from engine.trial import hits_from_text

Array = npt.NDArray[np.float64]
Rows = dict[int, dict[str, Any]]  # by seed
HEAD = [
    "# Searches in a pretrained space against other ways to cut",
    "",
    "Made by `python -m bench.pretrained.compare` and `conclude` from [rows.jsonl](rows.jsonl), a row per",
    "network. All networks of a table start from the same fine-tuned weights and have the same last training on",
    "the same batches. Accuracies are on the test images, averaged over seeds; differences are paired by seed and",
    "image. The first standard error is over images, the second, where there is one, over seeds.",
    "",
]


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    folder = parser.parse_args(arguments).folder
    caps = read(folder / ROWS)
    page = "\n".join([*HEAD, *(line for cap, contenders in sorted(caps.items()) for line in table(cap, contenders))])
    (folder / "peers.md").write_text(page)
    draw(caps, folder / "peers.png")
    print(page)


def read(path: Path) -> dict[float, dict[str, Rows]]:
    """The rows by cap, name and seed."""
    found: dict[float, dict[str, Rows]] = defaultdict(lambda: defaultdict(dict))
    for line in path.read_text().splitlines():
        row = json.loads(line)
        found[row["max_macs"]][row["name"]][row["seed"]] = row
    return found


def table(cap: float, contenders: dict[str, Rows]) -> list[str]:
    """Markdown, the most accurate first."""
    ours = contenders.get(OURS, {})
    order = sorted(contenders, key=lambda name: -hits(contenders[name]).mean())
    return [
        f"## At most {cap / 1e6:.1f} million MACs",
        "",
        "| network | million MACs | runs | seconds to find | test accuracy, % | our search minus this, points |",
        "| --- | --- | --- | --- | --- | --- |",
        *(line(name, contenders[name], {} if name == OURS else ours) for name in order),
        "",
    ]


def line(name: str, rows: Rows, ours: Rows) -> str:
    macs, seconds = (np.mean([row[key] for row in rows.values()]) for key in ("macs", "seconds"))
    accuracy, shared = hits(rows).mean(0), sorted(rows.keys() & ours.keys())
    compared = ""
    if shared:
        gain = hits({seed: ours[seed] for seed in shared}) - hits({seed: rows[seed] for seed in shared})
        over_seeds = f", {error(100 * gain.mean(1)):.1f}" if len(shared) > 1 else ""
        compared = f"{100 * gain.mean():+.1f} ± {error(100 * gain.mean(0)):.1f}{over_seeds}"
    measured = f"{100 * accuracy.mean():.1f} ± {error(100 * accuracy):.1f}"
    return f"| {name} | {macs / 1e6:.1f} | {len(rows)} | {seconds:.0f} | {measured} | {compared} |"


def hits(rows: Rows) -> Array:
    """1 where a test image is classified right, else 0 (seeds, images)."""
    return np.array([hits_from_text(rows[seed]["hits"]) for seed in sorted(rows)], dtype=np.float64)


def error(values: Array) -> float:
    """Standard error of a mean."""
    return float(values.std(ddof=1)) / math.sqrt(len(values))


def draw(caps: dict[float, dict[str, Rows]], path: Path) -> None:
    """Accuracy over MACs, a line for each contender; the uncut network is a dashed line."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.subplots()
    points: dict[str, list[tuple[float, float, float]]] = defaultdict(list)
    for contenders in caps.values():
        for name, rows in contenders.items():
            macs, accuracy = np.mean([row["macs"] for row in rows.values()]) / 1e6, 100 * hits(rows).mean(0)
            points[name].append((float(macs), float(accuracy.mean()), error(accuracy)))
    for name, values in points.items():
        x, y, errors = zip(*sorted(values), strict=True)
        if name == TEACHER:
            axes.axhline(y[0], color="gray", linestyle="--", label=f"{name} ({x[0]:.1f})")
            continue
        axes.errorbar(x, y, errors, marker="o", capsize=3, linewidth=2.5 if name == OURS else 1, label=name)
    axes.set(xlabel="million MACs", ylabel="test accuracy, %")
    axes.legend(fontsize="small")
    figure.savefig(path, dpi=120)


if __name__ == "__main__":
    main()
