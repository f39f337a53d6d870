"""The paper authors' own measurements as a fidelity study: 100 MobileNetV2 on CIFAR-100, trained on a GPU.

`python -m bench.evidence.recorded ../shared/data/mfkd_mobilenetv2_cifar100.csv.gz`

It writes docs/results/authors.md, with those losses of the table that the engine has. Low fidelities are compared with
test accuracy after training on all of the data.
"""

from __future__ import annotations

import sys
from fractions import Fraction
from pathlib import Path

import numpy as np

from bench.evidence.low_fidelities import RESULTS, table
from engine.search.fidelity_study import summary
from engine.search.fidelity_study.ranking import StudyScores
from engine.search.replay import tables
from engine.trial import Fidelity, KDLoss

LOSSES: dict[str, KDLoss] = {
    "nokd": "none", "kd": "kd", "attention": "at", "nst": "nst", "hint": "hint", "similarity": "similarity",
}  # fmt: skip
DIVISORS = (27, 9, 3)


def main(path: Path) -> None:
    result = summary.summarise(recorded_scores(tables.load(path)))
    if result is None:
        raise SystemExit(f"{path} has no architecture with both a full and a low-fidelity result")
    page = [
        "# The measurements of the paper's authors",
        "",
        "Made by `make authors`: the published measurements of 100 MobileNetV2 on CIFAR-100, trained on a GPU at",
        "three fractions of the data with many losses, read as a fidelity study. Truth is the test accuracy after",
        "training on all of the data, one seed.",
        "",
        *table(result),
    ]
    (RESULTS / "authors.md").write_text("\n".join(page) + "\n")


def recorded_scores(recorded: tables.Table) -> StudyScores:
    """The scores of a table at the losses and fractions above."""
    high = Fidelity("high")
    lows = {
        f"{loss}/{divisor}": Fidelity(f"{ours}@1/{divisor}", Fraction(1, divisor), kd_loss=ours)
        for divisor in DIVISORS
        for loss, ours in LOSSES.items()
    }
    accuracies = {fidelity: [[float(value)] for value in recorded.valid[name]] for name, fidelity in lows.items()}
    seconds = {fidelity: recorded.seconds[name].tolist() for name, fidelity in lows.items()}
    return StudyScores(
        architectures=[recorded.candidates.architecture(row) for row in range(len(recorded.candidates))],
        macs=np.asarray(recorded.candidates.macs),
        high=high,
        accuracies={high: [[float(value)] for value in recorded.test], **accuracies},
        seconds={high: recorded.seconds[tables.FULL].tolist(), **seconds},
    )


if __name__ == "__main__":
    main(Path(sys.argv[1]))
