"""Keeps what a study of bench/evidence found: raw results and picture, and its table in docs/evidence.md.

Run it as `python -m bench.evidence.keep build/evidence/NAME`.
"""

from __future__ import annotations

import json
import re
import shutil
import sys
from pathlib import Path
from typing import Any

from engine.run_folder import RunFolder
from engine.search.runs import open_run

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "docs" / "evidence.md"
KEPT = ROOT / "docs" / "evidence"


def main(run_dir: Path) -> None:
    write(run_dir.name, "\n".join(keep_study(run_dir)))


def keep_study(run_dir: Path) -> list[str]:
    """Copies the raw results and the picture to docs/evidence; returns what the page says about the study."""
    name, folder = run_dir.name, RunFolder(run_dir)
    result = json.loads(folder.study_result.read_text())
    KEPT.mkdir(exist_ok=True)
    shutil.copyfile(folder.study_evaluations, KEPT / f"{name}.csv")
    shutil.copyfile(folder.study_picture, KEPT / f"{name}.png")
    warning = [result["warning"], ""] if result["warning"] else []
    return [*facts(run_dir, result), "", *table(result), "", *warning, f"![{name}](evidence/{name}.png)"]


def write(name: str, text: str) -> None:
    """Puts `text` between the marks of `name` in docs/evidence.md."""
    begin, end = f"<!-- begin {name} -->", f"<!-- end {name} -->"
    page = PAGE.read_text()
    if begin not in page:
        raise SystemExit(f"{PAGE} has no place for {name}: put {begin} and {end} where its table belongs")
    found = re.compile(re.escape(begin) + ".*?" + re.escape(end), re.DOTALL)
    PAGE.write_text(found.sub(lambda _: f"{begin}\n{text}\n{end}", page))


def facts(run_dir: Path, result: dict[str, Any]) -> list[str]:
    """The extent of a study, the machine and versions of its last call, its teacher, and where its raw results are."""
    opened = open_run(str(run_dir))
    hours = sum(e.seconds for e in opened.answers) / 3600
    full = [e.accuracy for e in opened.at(opened.plan.high)]
    failed = sum(not e.ok for e in opened.answers)
    last, count = opened.facts["calls"][-1], len(opened.answers)
    versions = ", ".join(f"{key} {last['versions'][key]}" for key in ("torch", "nvidia-dali-cuda130"))
    return [
        f"{result['full']} architectures, {count} evaluations ({failed} failed), {hours:.2f} worker hours "
        f"on {last['device']}; Python {last['python']}, {versions}. Teacher: {teacher(run_dir)}. Full accuracies "
        f"from {min(full):.3f} to {max(full):.3f}. Raw results: [csv](evidence/{run_dir.name}.csv)."
    ]


def teacher(run_dir: Path) -> str:
    """The network, the accuracy and the training time of a run's teacher."""
    card = teacher_card(run_dir)
    percent, seconds = 100 * card["accuracy"], card["seconds"]
    return f"`{card['network']}`, {percent:.1f} % on the validation split, trained in {seconds:.0f} s"


def teacher_card(run_dir: Path) -> dict[str, Any]:
    card = open_run(str(run_dir)).teacher_card()
    if card is None:
        raise SystemExit(f"{run_dir} has no teacher, or its file cannot be read")
    return card


def table(result: dict[str, Any]) -> list[str]:
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
        lines.append(row([*pair, f"{gap['tau_given_macs']:+.2f} ± {gap['stderr']:.2f}"]))
    return [*lines, "", f"Recommended: `{result['recommended']}`: {result['reason']}."]


def span(interval: list[float]) -> str:
    return f"{interval[0]:.2f} to {interval[1]:.2f}"


def row(cells: list[str]) -> str:
    return f"| {' | '.join(cells)} |"


if __name__ == "__main__":
    main(Path(sys.argv[1]))
