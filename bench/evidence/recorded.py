"""The paper authors' own measurements as a fidelity study: 100 MobileNetV2 on CIFAR-100, trained on a GPU.

`python -m bench.evidence.recorded ../shared/data/mfkd_mobilenetv2_cifar100.csv.gz`

Of the table's losses those that the engine has; the truth is test accuracy after training on all of the data.
"""

from __future__ import annotations

import sys
from fractions import Fraction
from pathlib import Path

import numpy as np

from bench.evidence.keep import KEPT, table, write
from engine.search.fidelity_study import summary
from engine.search.fidelity_study.ranking import Measured
from engine.search.replay import tables
from engine.trial import Fidelity, KDLoss

NAME = "authors-mobilenetv2"
LOSSES: dict[str, KDLoss] = {
    "nokd": "none", "kd": "kd", "attention": "at", "nst": "nst", "hint": "hint", "similarity": "similarity",
}  # fmt: skip
DIVISORS = (27, 9, 3)


def main(path: Path) -> None:
    result = summary.summarise(measured(tables.load(path)))
    if result is None:
        raise SystemExit(f"{path} holds no architecture with a full and a low-fidelity result")
    KEPT.mkdir(exist_ok=True)
    summary.draw(KEPT / f"{NAME}.png", result)
    write(NAME, "\n".join([*table(result), "", f"![{NAME}](evidence/{NAME}.png)"]))


def measured(recorded: tables.Table) -> Measured:
    high = Fidelity("high")
    lows = {
        f"{loss}/{divisor}": Fidelity(f"{ours}@1/{divisor}", Fraction(1, divisor), kd_loss=ours)
        for divisor in DIVISORS
        for loss, ours in LOSSES.items()
    }
    places = range(len(recorded.candidates))
    scores = {fidelity: [[float(value)] for value in recorded.valid[name]] for name, fidelity in lows.items()}
    seconds = {fidelity: recorded.seconds[name].tolist() for name, fidelity in lows.items()}
    return Measured(
        architectures=[recorded.candidates.architecture(place) for place in places],
        macs=np.asarray(recorded.candidates.macs),
        high=high,
        scores={high: [[float(value)] for value in recorded.test], **scores},
        seconds={high: recorded.seconds[tables.FULL].tolist(), **seconds},
    )


if __name__ == "__main__":
    main(Path(sys.argv[1]))
