"""The demo over several seeds: `python -m bench.demo --seeds 5 --out docs/results`.

Runs `cli.py search -c configs/demo.yaml` once for each seed (a run that is finished is only read; an interrupted one
resumes) and writes demo.json and demo.md: the finished winner beside what it is compared with, and in how many runs the
demo's last sentence says that the search was worth it.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch

Json = dict[str, Any]
ROOT = Path(__file__).resolve().parents[1]
WORTH = "The search was worth it:"


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--runs", type=Path, default=Path("runs"), help="folder of the runs demo-0, demo-1, ...")
    parser.add_argument("--out", type=Path, required=True)
    given = parser.parse_args(arguments)
    results = [run(seed, given.runs / f"demo-{seed}") for seed in range(given.seeds)]
    record = {"machine": machine(), "runs": [summary(seed, result) for seed, result in enumerate(results)]}
    given.out.mkdir(parents=True, exist_ok=True)
    (given.out / "demo.json").write_text(json.dumps(record, indent=1) + "\n")
    page = "\n".join(lines(record)) + "\n"
    (given.out / "demo.md").write_text(page)
    print(page)


def run(seed: int, folder: Path) -> Json:
    """The result of the demo with a seed; its seconds are those of the call that finished it."""
    stored = folder / "result.json"
    if stored.exists():
        found: Json = json.loads(stored.read_text())
        return found
    command = [sys.executable, "cli.py", "search", "-c", "configs/demo.yaml", f"--seed={seed}", f"--run-dir={folder}"]
    done = subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.PIPE, text=True)
    result: Json = json.loads(done.stdout.splitlines()[-1])
    return result


def summary(seed: int, result: Json) -> Json:
    """What the page shows of a run. Accuracies are on the test images, the seconds are of the whole search."""
    rows = [{"name": "the winner", **result["final"]}, *result["baselines"]]
    kept = ("name", "architecture", "test_accuracy", "test_standard_error", "macs", "params", "difference")
    networks = [{key: row[key] for key in (*kept, "difference_standard_error") if key in row} for row in rows]
    return {"seed": seed, "seconds": result["seconds"], "verdict": result["verdict"], "networks": networks}


def machine() -> str:
    versions = f"Python {platform.python_version()}, torch {torch.__version__}"
    return f"{os.cpu_count()} cores ({platform.machine()}), {versions}"


def lines(record: Json) -> list[str]:
    """The page, in Markdown."""
    runs = record["runs"]
    names = list(dict.fromkeys(row["name"] for run in runs for row in run["networks"]))
    worth = sum(run["verdict"].startswith(WORTH) for run in runs)
    return [
        "# The demo over several seeds",
        "",
        f"Made by `python -m bench.demo --seeds {len(runs)} --out docs/results` on {record['machine']}. Accuracy on "
        "the 420 test photos in percent, with its standard error; in brackets, million multiply-accumulates.",
        "",
        f"| seed | {' | '.join(names)} | seconds | worth it? |",
        f"| --- | {'--- | ' * len(names)}--- | --- |",
        *(row(run, names) for run in runs),
        f"| mean | {' | '.join(mean(runs, name) for name in names)} | "
        f"{np.mean([run['seconds'] for run in runs]):.0f} | {worth} of {len(runs)} |",
    ]


def row(run: Json, names: list[str]) -> str:
    found = {network["name"]: network for network in run["networks"]}
    cells = [
        f"{100 * found[name]['test_accuracy']:.1f} ± {100 * found[name]['test_standard_error']:.1f} "
        f"({found[name]['macs'] / 1e6:.1f})"
        if name in found and "test_accuracy" in found[name]
        else ""
        for name in names
    ]
    worth = "yes" if run["verdict"].startswith(WORTH) else "no"
    return f"| {run['seed']} | {' | '.join(cells)} | {run['seconds']:.0f} | {worth} |"


def mean(runs: list[Json], name: str) -> str:
    """Mean accuracy over the runs that have the network, with the standard error over them."""
    found = [n["test_accuracy"] for run in runs for n in run["networks"] if n["name"] == name and "test_accuracy" in n]
    error = np.std(found, ddof=1) / len(found) ** 0.5 if len(found) > 1 else 0.0
    return f"{100 * np.mean(found):.1f} ± {100 * error:.1f}"


if __name__ == "__main__":
    main()
