"""The fidelity studies of bench/evidence as one page: docs/results/low-fidelities.md and .png.

`python -m bench.evidence.low_fidelities` makes them in seconds from what is kept in docs/results: the evaluations of
each study (NAME.csv) and facts about its run (studies.json). What a study is about is the comment at the head of its
configuration.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator
from itertools import takewhile
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import yaml

from engine.search.fidelity_study import summary
from engine.search.fidelity_study.ranking import StudyScores
from engine.search.fidelity_study.study import luck_warning
from engine.trial import Architecture, Fidelity

Json = dict[str, Any]

CONFIGURATIONS = Path(__file__).parent
RESULTS = Path(__file__).resolve().parents[2] / "docs" / "results"
FACTS = RESULTS / "studies.json"
NAME = RESULTS / "low-fidelities"
# The sets of trainings that share nothing, by data and kind of network.
SETS = {
    "cifar100-nasbench201": ("CIFAR-100", "cells", "24, spread over MACs"),
    "cifar100-nasbench201-cap": ("CIFAR-100", "cells", "24, within 10 % in MACs"),
    "cifar100-nasbench201-kd": ("CIFAR-100", "cells", "80, at most 1.1 million MACs"),
    "baselines-cifar100-again": ("CIFAR-100", "cells", "64 others of that size, a cheaper teacher"),
    "cifar100-mobilenetv2": ("CIFAR-100", "MobileNetV2", "24, spread over MACs"),
    "cifar100-mobilenetv2-cap": ("CIFAR-100", "MobileNetV2", "32, within 10 % in MACs"),
    "glyphs-nasbench201": ("glyphs", "cells", "24, spread over MACs"),
    "glyphs-nasbench201-cap": ("glyphs", "cells", "24, within 10 % in MACs"),
    "baselines-glyphs": ("glyphs", "cells", "64, at most 1.1 million MACs"),
    "baselines-glyphs-again": ("glyphs", "cells", "52 others of that size, a cheaper teacher"),
    "glyphs-mobilenetv2": ("glyphs", "MobileNetV2", "24, spread over MACs"),
    "glyphs-mobilenetv2-cap": ("glyphs", "MobileNetV2", "24, within 10 % in MACs"),
}
OTHERS = ("why-settings", "why-teacher", "baselines-cifar100", "baselines-cifar100-weak", "baselines-glyphs-weak")
# Losses that several sets have, as (loss, weights), with the weights that they have there.
LOSSES = {
    "KD": ("kd", ""),
    "KD + AT": ("kd+at", "at_weight=10"),
    "AT": ("at", "at_weight=10"),
    "NST": ("nst", ""),
}


class Gap(NamedTuple):
    """A difference of tau given MACs, and its standard error."""

    value: float
    error: float

    def __str__(self) -> str:
        return f"{self.value:+.2f} ± {self.error:.2f}"


def main() -> None:
    found = {name: result for name in (*SETS, *OTHERS) if (result := summarise(name)) is not None}
    NAME.with_suffix(".md").write_text("\n".join(page(found)) + "\n")
    draw({name: same_epochs(found[name]) for name in SETS if name in found}, NAME.with_suffix(".png"))


def kept(name: str) -> Path:
    """The raw results of a study."""
    return RESULTS / f"{name}.csv"


def read_facts() -> Json:
    return dict(json.loads(FACTS.read_text())) if FACTS.exists() else {}


def summarise(name: str) -> Json | None:
    """What a study found, from its raw results; None if they are not kept."""
    if not kept(name).exists():
        return None
    scores = study_scores(name)
    result = summary.summarise(scores)
    assert result is not None, f"{kept(name)} has no architecture with both a low-fidelity and a full score"
    return result | {"warning": luck_warning(scores, read_facts()[name]["classes"])}


def study_scores(name: str) -> StudyScores:
    """The scores of a study at the fidelities that its configuration names."""
    rows = [row for row in read_rows(name) if row["status"] == "ok"]
    high = Fidelity("high")
    lows = [Fidelity.parse(text) for text in yaml.safe_load(configuration(name).read_text())["lows"]]
    macs = {row["architecture"]: float(row["macs"]) for row in rows if row["fidelity"] == high.name}

    def column(key: str, fidelity: Fidelity) -> list[list[float]]:
        mine = [row for row in rows if row["fidelity"] == fidelity.name]
        return [[float(row[key]) for row in mine if row["architecture"] == name] for name in macs]

    seconds = {f: column("seconds", f) for f in (high, *lows)}
    return StudyScores(
        architectures=[Architecture(tuple(map(int, name.split("-")))) for name in macs],
        macs=np.array(list(macs.values())),
        high=high,
        accuracies={f: column("accuracy", f) for f in (high, *lows)},
        seconds={f: [sum(own) / max(1, len(own)) for own in column] for f, column in seconds.items()},
    )


def read_rows(name: str) -> list[dict[str, str]]:
    with open(kept(name), newline="") as file:
        return list(csv.DictReader(file))


def configuration(name: str) -> Path:
    return CONFIGURATIONS / f"{name}.yaml"


def about(name: str) -> str:
    """The comment at the head of a study's configuration."""
    lines = takewhile(lambda line: line.startswith("#"), configuration(name).read_text().splitlines())
    return "\n".join(line.removeprefix("#").strip() for line in lines)


def same_epochs(result: Json) -> dict[str, list[Gap]]:
    """By loss of LOSSES: distilled minus no teacher for the same epochs on the same images, fewest images first."""
    found: dict[str, list[tuple[float, Gap]]] = {label: [] for label in LOSSES}
    for gap in result["distilled_less_undistilled"]:
        loss, _, rest = gap["name"].partition("@")
        images_and_epochs, _, weights = rest.partition(":")
        for label, wanted in LOSSES.items():
            if wanted == (loss, weights) and gap["against"] == f"none@{images_and_epochs}":
                fraction = float(Fidelity.parse(gap["name"]).fraction)
                found[label].append((fraction, Gap(gap["tau_given_macs"], gap["stderr"])))
    return {label: [gap for _, gap in sorted(gaps)] for label, gaps in found.items()}


def mean(gaps: list[Gap]) -> Gap:
    """The mean weighted by inverse variance, as if the differences were independent."""
    weights = np.array([gap.error**-2 for gap in gaps])
    values = np.array([gap.value for gap in gaps])
    return Gap(float(weights @ values / weights.sum()), float(weights.sum() ** -0.5))


def page(found: dict[str, Json]) -> list[str]:
    gaps = {name: same_epochs(found[name]) for name in SETS if name in found}
    return [
        "# Which low fidelity ranks beyond MACs?",
        "",
        "Fidelity studies on two CPU cores, made by `make evidence`, `make why` and `make baselines`; this page is",
        "made from their raw results by `make results`. The columns are explained in",
        "[search](../search.md#what-a-study-prints). Cells are NAS-Bench-201's with 8 channels, one per stage;",
        "MobileNetV2 has width 0.25. Images have 16 x 16 pixels, except 32 x 32 for MobileNetV2 on glyphs.",
        "",
        "## Distilled minus no teacher",
        "",
        "Tau given MACs of a distilled low fidelity, minus that of training without a teacher on the same images for",
        "the same epochs, ± its standard error. Two values: on the fewer images (1/27 of CIFAR-100, 1/9 of glyphs)",
        "and on the more (1/9, 1/3). AT has weight 10. The rows share no trainings.",
        "",
        row(["data", "networks", "two full trainings agree", *LOSSES]),
        row(["---"] * (3 + len(LOSSES))),
        *(row(cells_of(name, found[name], gaps[name])) for name in gaps),
        "",
        "Means weighted by inverse variance, as if all differences were independent, and how many there are:",
        "",
        row(["data", "networks", *LOSSES]),
        row(["---"] * (2 + len(LOSSES))),
        *means(gaps),
        "",
        "![differences of tau given MACs](low-fidelities.png)",
        "",
        *(line for name, result in found.items() for line in section(name, result)),
    ][:-1]


def cells_of(name: str, result: Json, gaps: dict[str, list[Gap]]) -> list[str]:
    data, kind, which = SETS[name]
    agreement = "" if result["repeatability"] is None else f"{result['repeatability']:.2f}"
    return [data, f"{kind}: {which}", agreement, *(", ".join(map(str, gaps[label])) for label in LOSSES)]


def means(gaps: dict[str, dict[str, list[Gap]]]) -> Iterator[str]:
    """A row for each kind of data and network."""
    for group in dict.fromkeys(SETS[name][:2] for name in gaps):
        mine = [own for name, own in gaps.items() if SETS[name][:2] == group]
        together = [[gap for own in mine for gap in own[label]] for label in LOSSES]
        yield row([*group, *(f"{mean(some)} ({len(some)})" if some else "" for some in together)])


def section(name: str, result: Json) -> list[str]:
    """A study: what it is about, what was run, and its tables."""
    warning = [result["warning"][0].upper() + result["warning"][1:] + ".", ""] if result["warning"] else []
    return [f"## {name}", "", about(name), "", extent(name, result), "", *table(result), "", *warning]


def extent(name: str, result: Json) -> str:
    """The extent of a study, its machine, versions and teacher, and where its raw results are."""
    rows, facts = read_rows(name), read_facts()[name]
    full = [float(row["accuracy"]) for row in rows if row["fidelity"] == "high" and row["status"] == "ok"]
    hours = sum(float(row["seconds"]) for row in rows) / 3600
    failed, teacher = sum(row["status"] != "ok" for row in rows), facts["teacher"]
    versions = ", ".join(f"{key} {value}" for key, value in facts["versions"].items())
    return (
        f"{result['full']} architectures, {len(rows)} evaluations ({failed} failed), {hours:.2f} worker hours on "
        f"{facts['device']}; {versions}. Teacher: `{teacher['network']}`, {100 * teacher['accuracy']:.1f} % on the "
        f"validation split, trained in {teacher['seconds']:.0f} s. Full accuracies from {min(full):.3f} to "
        f"{max(full):.3f}. Raw results: [csv]({name}.csv); settings: [yaml](../../bench/evidence/{name}.yaml)."
    )


def table(result: Json) -> list[str]:
    """The figures of a study as Markdown."""
    head = ["low fidelity", "score", "tau", "95 %", "Spearman", "tau given MACs", "95 %", "top fifth", "s"]
    lines = [row([*head, "relative cost"]), row(["---"] * (1 + len(head)))]
    for r in result["fidelities"]:
        top = "" if r["tau_top_fifth"] is None else f"{r['tau_top_fifth']:.2f}"
        cells = [f"`{r['name']}`", f"{r['accuracy']:.3f}", f"{r['tau']:.2f}", span(r["tau_interval"])]
        cells += [f"{r['spearman']:.2f}", f"{r['tau_given_macs']:.2f} ± {r['stderr']:.2f}", span(r["interval"]), top]
        lines.append(row([*cells, f"{r['seconds']:.1f}", f"{r['relative_cost']:.2f}"]))
    macs = result["macs"]
    lines.append(row(["MACs alone", "", f"{macs['tau']:.2f}", span(macs["interval"]), *[""] * 5, "0"]))
    if result["repeatability"] is not None:
        lines.append(row(["full, another seed", "", f"{result['repeatability']:.2f}", *[""] * 6, "1"]))
    head = ["distilled", "relative cost", "without a teacher", "relative cost", "difference of tau given MACs"]
    lines += ["", row(head), row(["---"] * len(head))]
    costs = {r["name"]: f"{r['relative_cost']:.2f}" for r in result["fidelities"]}
    for gap in result["distilled_less_undistilled"]:
        pair = [cell for name in (gap["name"], gap["against"]) for cell in (f"`{name}`", costs[name])]
        lines.append(row([*pair, str(Gap(gap["tau_given_macs"], gap["stderr"]))]))
    return [*lines, "", f"Recommended: `{result['recommended']}`: {result['reason']}."]


def span(interval: list[float]) -> str:
    return f"{interval[0]:.2f} to {interval[1]:.2f}"


def row(cells: list[str]) -> str:
    return f"| {' | '.join(cells)} |"


def draw(gaps: dict[str, dict[str, list[Gap]]], path: Path) -> None:
    """The differences of every set, with a standard error to either side."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 0.6 + 0.45 * len(gaps)), layout="constrained")
    axes = figure.subplots()
    for place, label in enumerate(LOSSES):
        points = [(gap, -i - 0.2 * place + 0.3) for i, own in enumerate(gaps.values()) for gap in own[label]]
        values, heights = [gap.value for gap, _ in points], [height for _, height in points]
        errors = [gap.error for gap, _ in points]
        axes.errorbar(values, heights, xerr=errors, fmt="o", markersize=4, linewidth=1, label=label)
    axes.axvline(0, color="black", linewidth=1)
    axes.set_yticks([-i for i in range(len(gaps))], [": ".join((*SETS[name][:2], SETS[name][2])) for name in gaps])
    axes.set(xlabel="tau given MACs, distilled minus no teacher")
    figure.legend(loc="outside upper center", ncols=len(LOSSES), fontsize="small", frameon=False)
    figure.savefig(path, dpi=110)


if __name__ == "__main__":
    main()
