"""Keeps what a study of bench/evidence found: its raw results and picture, and its table in docs/evidence.md.

`python -m bench.evidence.keep build/evidence/NAME`
"""

from __future__ import annotations

import json
import re
import shutil
import sys
from pathlib import Path
from typing import Any

from engine.search.runs import open_run

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "docs" / "evidence.md"
KEPT = ROOT / "docs" / "evidence"


def main(run_dir: Path) -> None:
    write(run_dir.name, "\n".join(kept(run_dir)))


def kept(run_dir: Path) -> list[str]:
    """Copies the raw results and the picture to docs/evidence; returns what the page says of the study."""
    name = run_dir.name
    result = json.loads((run_dir / "fidelity.json").read_text())
    KEPT.mkdir(exist_ok=True)
    shutil.copyfile(run_dir / "evaluations.csv", KEPT / f"{name}.csv")
    shutil.copyfile(run_dir / "fidelity.png", KEPT / f"{name}.png")
    warning = [result["warning"], ""] if result["warning"] else []
    return [*facts(run_dir, result), "", *table(result), "", *warning, f"![{name}](evidence/{name}.png)"]


def write(name: str, text: str) -> None:
    """Puts `text` between the marks of `name` in docs/evidence.md."""
    begin, end = f"<!-- begin {name} -->", f"<!-- end {name} -->"
    page = PAGE.read_text()
    if begin not in page:
        raise SystemExit(f"{PAGE} has no place for {name}: put {begin} and {end} where its table shall be")
    found = re.compile(re.escape(begin) + ".*?" + re.escape(end), re.DOTALL)
    PAGE.write_text(found.sub(lambda _: f"{begin}\n{text}\n{end}", page))


def facts(run_dir: Path, result: dict[str, Any]) -> list[str]:
    run = json.loads((run_dir / "run.json").read_text())
    answers = [json.loads(line) for line in (run_dir / "journal.jsonl").read_text().splitlines()]
    evaluations = [entry["answered"] for entry in answers if "answered" in entry]
    hours = sum(e["seconds"] for e in evaluations) / 3600
    full = [e["accuracy"] for e in evaluations if e["trial"]["fidelity"]["name"] == "high" and e["status"] == "ok"]
    failed = sum(e["status"] != "ok" for e in evaluations)
    last = run["calls"][-1]
    versions = ", ".join(f"{key} {last['versions'][key]}" for key in ("torch", "nvidia-dali-cuda130"))
    low, high = min(full), max(full)
    return [
        f"{result['full']} architectures, {len(evaluations)} evaluations ({failed} failed), {hours:.2f} worker hours "
        f"on {last['device']}; Python {last['python']}, {versions}. Teacher: {teacher(run_dir)}. Full accuracies "
        f"from {low:.3f} to {high:.3f}. Raw results: [csv](evidence/{run_dir.name}.csv)."
    ]


def teacher(run_dir: Path) -> str:
    """The teacher of a run, what it is worth and what it took."""
    card = teacher_card(run_dir)
    good, seconds = 100 * card["accuracy"], card["seconds"]
    return f"`{card['network']}`, {good:.1f} % on the validation part, trained in {seconds:.0f} s"


def teacher_card(run_dir: Path) -> dict[str, Any]:
    card = open_run(str(run_dir)).teacher_card()
    if card is None:
        raise SystemExit(f"{run_dir} has no teacher, or its file cannot be read")
    return card


def table(result: dict[str, Any]) -> list[str]:
    head = ["low fidelity", "score", "tau", "95 %", "Spearman", "tau given MACs", "95 %", "top fifth", "s", "price"]
    lines = [row(head), row(["---"] * len(head))]
    for r in result["fidelities"]:
        top = "" if r["tau_top_fifth"] is None else f"{r['tau_top_fifth']:.2f}"
        cells = [f"`{r['name']}`", f"{r['accuracy']:.3f}", f"{r['tau']:.2f}", span(r["tau_interval"])]
        cells += [f"{r['spearman']:.2f}", f"{r['tau_given_macs']:.2f} ± {r['stderr']:.2f}", span(r["interval"]), top]
        lines.append(row([*cells, f"{r['seconds']:.1f}", f"{r['price']:.2f}"]))
    macs = result["macs"]
    lines.append(row(["MACs alone", "", f"{macs['tau']:.2f}", span(macs["interval"]), *[""] * 5, "0"]))
    if result["repeatability"] is not None:
        lines.append(row(["full, another seed", "", f"{result['repeatability']:.2f}", *[""] * 6, "1"]))
    lines += ["", row(["distilled", "price", "without a teacher", "price", "difference of tau given MACs"])]
    lines.append(row(["---"] * 5))
    prices = {r["name"]: f"{r['price']:.2f}" for r in result["fidelities"]}
    for gap in result["distilled_less_undistilled"]:
        pair = [cell for name in (gap["name"], gap["against"]) for cell in (f"`{name}`", prices[name])]
        lines.append(row([*pair, f"{gap['tau_given_macs']:+.2f} ± {gap['stderr']:.2f}"]))
    return [*lines, "", f"Recommended: `{result['recommended']}`: {result['reason']}."]


def span(interval: list[float]) -> str:
    return f"{interval[0]:.2f} to {interval[1]:.2f}"


def row(cells: list[str]) -> str:
    return f"| {' | '.join(cells)} |"


if __name__ == "__main__":
    main(Path(sys.argv[1]))
