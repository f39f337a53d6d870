"""All GPU tests and GPU benches of the project in one call, one JSON out: `make gpu-check OUT=folder`.

Runs under any Python that has torch, triton, pytest and pytest-benchmark; installs nothing. Ends within 8
minutes: each part has a limit, and what a limit cut off is said in the JSON. Exits with 1 if a test
failed, with 2 where there is no CUDA device.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
TOTAL_S = 450  # of 480; the rest is for starting up and writing
TESTS_S = 150
# The benches that run on a device, in this order, and at most so many seconds each.
BENCHES_S = {"bench_kernels.py": 130, "bench_students.py": 200, "bench_step.py": 60}


def run_pytest(arguments: list[str], limit_s: float) -> dict[str, Any]:
    """Exit code, closing line and failures of one pytest process; exit code None where the limit ended it."""
    command = [sys.executable, "-m", "pytest", "-q", "--no-header", "-p", "no:cacheprovider", *arguments]
    start = time.monotonic()
    with tempfile.TemporaryFile("w+") as out:
        process = subprocess.Popen(command, cwd=ROOT, stdout=out, stderr=subprocess.STDOUT)
        try:
            code: int | None = process.wait(limit_s)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
            code = None
        out.seek(0)
        lines = out.read().splitlines()
    print("\n".join(lines[-40:]), flush=True)
    return {
        "arguments": arguments,
        "exit_code": code,
        "seconds": round(time.monotonic() - start, 1),
        "closing_line": lines[-1] if lines else "",
        "failures": [line for line in lines if re.match(r"(FAILED|ERROR) ", line)],
    }


def machine() -> dict[str, Any]:
    """Card, driver and versions."""
    import torch

    try:
        import triton

        triton_version = triton.__version__
    except ImportError:
        triton_version = None
    query = ["nvidia-smi", "--query-gpu=driver_version,clocks.sm,clocks.mem", "--format=csv,noheader"]
    try:
        smi = subprocess.run(query, capture_output=True, text=True, timeout=30).stdout.strip()
    except (OSError, subprocess.TimeoutExpired):
        smi = "nvidia-smi did not answer"
    properties = torch.cuda.get_device_properties(0)
    return {
        "card": properties.name,
        "memory_bytes": properties.total_memory,
        "capability": f"{properties.major}.{properties.minor}",
        "driver_and_clocks": smi,
        "cuda": torch.version.cuda,
        "torch": torch.__version__,
        "triton": triton_version,
        "python": platform.python_version(),
        "cores": os.cpu_count(),
    }


def figures(raw: Path, lines: Path) -> list[dict[str, Any]]:
    """A bench file's figures: the plugin's report, or the lines written before a limit ended the run."""
    if raw.exists() and raw.stat().st_size:
        benches = json.loads(raw.read_text())["benchmarks"]
        return [{"name": one["name"], "median_s": one["stats"]["median"]} | one["extra_info"] for one in benches]
    return [json.loads(line) for line in lines.read_text().splitlines()] if lines.exists() else []


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("folder", type=Path, help="gpu-check.json is written here")
    folder = parser.parse_args().folder
    try:
        import torch
    except ImportError:
        print("gpu-check needs torch: PYTHON=python3 make gpu-check takes the interpreter that has it", file=sys.stderr)
        return 2
    if not torch.cuda.is_available():
        print("gpu-check needs a CUDA device and torch sees none: nothing was checked or measured", file=sys.stderr)
        return 2
    start = time.monotonic()
    folder.mkdir(parents=True, exist_ok=True)
    # Only files that hold GPU tests: the others may need packages that a borrowed machine does not have.
    tests = [str(file) for file in sorted((ROOT / "tests").glob("test_*.py")) if "mark.gpu" in file.read_text()]
    report: dict[str, Any] = {"machine": machine(), "tests": run_pytest(["-m", "gpu", *tests], TESTS_S), "benches": []}
    for name, most_s in BENCHES_S.items():
        file = ROOT / "bench" / name
        left_s = min(TOTAL_S - (time.monotonic() - start), most_s)
        if left_s < 10:
            report["benches"].append({"file": file.name, "exit_code": None, "closing_line": "not run: no time left"})
            continue
        with tempfile.TemporaryDirectory() as scratch:
            raw, lines = Path(scratch, "figures.json"), Path(scratch, "lines.jsonl")
            os.environ["BENCH_LINES"] = str(lines)
            bench = run_pytest([str(file), "--benchmark-only", f"--benchmark-json={raw}"], left_s)
            bench["figures"] = figures(raw, lines)
        bench["file"] = file.name
        report["benches"].append(bench)
    report["seconds"] = round(time.monotonic() - start, 1)
    partial = folder / "gpu-check.json.part"
    partial.write_text(json.dumps(report, indent=1) + "\n")
    partial.replace(folder / "gpu-check.json")
    print(f"wrote {folder / 'gpu-check.json'} after {report['seconds']} s")
    return 0 if report["tests"]["exit_code"] == 0 else 1


if __name__ == "__main__":
    sys.exit(main())
