"""The pages of results are what their raw results say, and the page on evidence quotes them as they are."""

from __future__ import annotations

import csv
import json
import re
from pathlib import Path
from types import ModuleType

import pytest

from bench import kernel_page
from bench.evidence import baselines, low_fidelities
from engine.search.methods import propose
from engine.search.replay.replay import replay
from engine.search.replay.simulate import Replay

ROOT = Path(__file__).resolve().parent.parent
DOCS, RESULTS = ROOT / "docs", ROOT / "docs" / "results"
REPLAYS = ROOT / "bench" / "results" / "replay"
FIGURE = re.compile(r"([+-]?)(\d+\.\d+) ± (\d+\.\d+)")


def rows(page: Path) -> set[tuple[str, ...]]:
    lines = (line.strip() for line in page.read_text().splitlines())
    return {tuple(cell.strip(" *`") for cell in line.strip("|").split("|")) for line in lines if line.startswith("|")}


def test_times_of_the_losses_are_those_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernel_page, "PAGE", tmp_path / "kernels.md")
    kernel_page.main()
    assert (tmp_path / "kernels.md").read_text() == (RESULTS / "kernels.md").read_text()


def test_the_page_on_baselines_is_made_from_the_searches() -> None:
    assert "\n".join(baselines.page()) + "\n" == baselines.PAGE.read_text()


@pytest.mark.parametrize("name", ["baselines-cifar100-again", "glyphs-mobilenetv2"])
def test_the_section_of_a_study_is_made_from_its_evaluations(name: str) -> None:
    result = low_fidelities.summarise(name)
    assert result is not None
    assert "\n".join(low_fidelities.section(name, result)) in (RESULTS / "low-fidelities.md").read_text()


def test_every_study_has_its_raw_results_and_a_section() -> None:
    studies = {path.stem for path in low_fidelities.CONFIGURATIONS.glob("*.yaml")}
    assert studies == {*low_fidelities.SETS, *low_fidelities.OTHERS} == set(low_fidelities.read_facts())
    page = (RESULTS / "low-fidelities.md").read_text()
    assert all(low_fidelities.kept(name).exists() and f"\n## {name}\n" in page for name in studies)


def test_replays_are_quoted_from_their_summaries() -> None:
    shown = rows(RESULTS / "replay.md")
    found = json.loads((REPLAYS / "nasbench201_cifar100" / "summary.json").read_text())
    for method, by_hours in found["methods"].items():
        hours = [by_hours[at] for at in ("15", "20", "40", "60")]
        line = [f"{one['mean']:.2f} ± {one['stderr']:.2f}" for one in hours]
        assert any(row[:5] == (method, *line) for row in shown), method
    with open(REPLAYS / "mfkd_mobilenetv2_seconds_to_best.csv", newline="") as file:
        for row in csv.DictReader(file):
            seconds = f"{row['seconds_mean']} ± {row['seconds_stderr']}"
            if row["method"] in ("mfkd", "mfkd2"):
                assert any(line[0] == row["low_fidelity"] and seconds in line for line in shown), row


def figures(text: str) -> set[tuple[str, str]]:
    """Values with an error, to two decimals where there are more, without their sign."""
    found = FIGURE.findall(" ".join(text.split()))
    return {(short(value), short(error)) for _, value, error in found}


def short(number: str) -> str:
    return f"{float(number):.2f}" if len(number.partition(".")[2]) > 2 else number


def test_every_figure_of_the_evidence_stands_in_a_page_that_its_paragraph_links_to() -> None:
    page = DOCS / "evidence.md"
    blocks = re.split(r"\n\n(?!\|)|\n(?=- )", page.read_text())  # a table belongs to the paragraph above it
    quoted = 0
    for block in blocks:
        linked = [DOCS / target for target in re.findall(r"\]\((results/[^)#]+)", block)]
        known = set().union(*(figures(target.read_text()) for target in linked))
        assert figures(block) <= known, f"{figures(block) - known} in: {block[:80]}"
        quoted += len(figures(block))
    assert quoted > 40


@pytest.mark.parametrize("page", ["README.md", "docs/pretrained.md"])
def test_accuracies_of_cut_networks_are_those_measured(page: str) -> None:
    known = figures((RESULTS / "pretrained" / "peers.md").read_text()) | figures((RESULTS / "demo.md").read_text())
    quoted = figures((ROOT / page).read_text())
    assert len(quoted) >= 6
    assert quoted <= known


def test_the_method_of_the_page_on_search_is_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """The code of a method of one's own runs as it stands, in a replay."""
    text = (DOCS / "search.md").read_text().partition("## Your own method")[2]
    code = re.search(r"```python\n(.*?)```", text, re.DOTALL)
    assert code is not None
    module = ModuleType("mine")
    exec(code[1], module.__dict__)
    monkeypatch.setitem(propose.METHODS, "greedy", module.greedy)  # type: ignore[attr-defined]
    table = ROOT / "tests" / "data" / "synthetic_table.csv"
    found = replay(Replay(table, ("greedy",), gpu_hours=4, at=(4,), seeds=2, processes=1))
    assert found["methods"]["greedy"]["evaluations"]["full"] > 1
