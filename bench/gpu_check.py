"""All GPU tests and GPU benches of the project in one call, one JSON out: `make gpu-check OUT=folder`.

Runs under any Python that has torch, torchvision, triton, numpy, pillow, safetensors, pyyaml, psutil, pytest and
pytest-benchmark; installs nothing. Tests and benches take 10 minutes each at most: every part has a limit, and what a
limit cut off is said in the JSON, with the failures up to there. The JSON is written after each part; `--only tests`
and `--only benches`, for machines that end a command after 10 minutes, write one of their own. Exits with 1 if a test
failed or was cut off, with 2 where there is no CUDA device.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
# Some 130 tests of kernels have two compilations or more each, and ten of them torch.compile's: minutes in all.
TESTS_S = 560
# The benches that run on a device, in this order, and at most so many seconds each.
BENCHES_S = {"bench_kernels.py": 250, "bench_students.py": 180, "bench_step.py": 100}
SUMMARY_S = 15  # for pytest to say what failed when a limit interrupts it


def run_pytest(arguments: list[str], limit_s: float) -> dict[str, Any]:
    """Exit code, closing line and failures of one pytest process; exit code None where the limit ended it."""
    command = [sys.executable, "-m", "pytest", "-v", "--no-header", "-p", "no:cacheprovider", *arguments]
    start = time.monotonic()
    with tempfile.TemporaryFile("w+") as out:
        environment = {**os.environ, "PYTHONUNBUFFERED": "1"}  # what is killed has said what it knew
        process = subprocess.Popen(command, cwd=ROOT, stdout=out, stderr=subprocess.STDOUT, env=environment)
        code = end(process, limit_s)
        out.seek(0)
        lines = out.read().splitlines()
    print("\n".join(lines[-40:]), flush=True)
    failed, last = failures(lines), [line.strip() for line in lines if line.strip()][-3:]
    if code and (code != 1 or not failed):  # a package or plugin that is missing, no tests: nothing may have run
        failed.append(" | ".join(last))
    return {
        "arguments": arguments,
        "exit_code": code,
        "seconds": round(time.monotonic() - start, 1),
        "closing_line": last[-1] if last else "",
        "failures": failed,
    }


def end(process: subprocess.Popen[bytes], limit_s: float) -> int | None:
    """Its exit code; None where the limit ended it, with an interrupt first."""
    try:
        return process.wait(limit_s)
    except subprocess.TimeoutExpired:
        process.send_signal(signal.SIGINT)
    try:
        process.wait(SUMMARY_S)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
    return None


def failures(lines: list[str]) -> list[str]:
    """What failed, each once: as pytest sums it up at the end, and what it only named as it came."""
    summed = [line for line in lines if re.match(r"(FAILED|ERROR) ", line)]
    named = (re.match(r"(\S+::.+?) (FAILED|ERROR)\b", line) for line in lines)
    early = [f"{one[2]} {one[1]}" for one in named if one]
    return summed + [one for one in early if not any(line.startswith(one) for line in summed)]


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


def run_tests() -> dict[str, Any]:
    """Only files that hold GPU tests: the others may need packages that a borrowed machine does not have."""
    files = [str(file) for file in sorted((ROOT / "tests").glob("test_*.py")) if "mark.gpu" in file.read_text()]
    return run_pytest(["-m", "gpu", *files], TESTS_S)


def run_bench(name: str) -> dict[str, Any]:
    """As `run_pytest`, with the figures."""
    with tempfile.TemporaryDirectory() as scratch:
        raw, lines = Path(scratch, "figures.json"), Path(scratch, "lines.jsonl")
        os.environ["BENCH_LINES"] = str(lines)
        file = str(ROOT / "bench" / name)
        bench = run_pytest([file, "--benchmark-only", f"--benchmark-json={raw}"], BENCHES_S[name])
        return {"file": name, **bench, "figures": figures(raw, lines)}


def write(report: dict[str, Any], path: Path) -> None:
    partial = path.with_suffix(".json.part")
    partial.write_text(json.dumps(report, indent=1) + "\n")
    partial.replace(path)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("folder", type=Path, help="for gpu-check.json; gpu-check-tests.json with --only")
    parser.add_argument("--only", choices=("tests", "benches"), help="one half")
    chosen = parser.parse_args()
    try:
        import torch
    except ImportError:
        print("gpu-check needs torch: PYTHON=python3 make gpu-check takes the interpreter that has it", file=sys.stderr)
        return 2
    if not torch.cuda.is_available():
        print("gpu-check needs a CUDA device and torch sees none: nothing was checked or measured", file=sys.stderr)
        return 2
    chosen.folder.mkdir(parents=True, exist_ok=True)
    path = chosen.folder / (f"gpu-check-{chosen.only}.json" if chosen.only else "gpu-check.json")
    report: dict[str, Any] = {"machine": machine()}
    if chosen.only != "benches":
        report["tests"] = run_tests()
        write(report, path)
    report["benches"] = []
    for name in BENCHES_S if chosen.only != "tests" else ():
        report["benches"].append(run_bench(name))
        write(report, path)
    print(f"wrote {path}")
    parts = [report.get("tests", {"exit_code": 0}), *report["benches"]]
    return 1 if any(part["exit_code"] != 0 for part in parts) else 0


if __name__ == "__main__":
    sys.exit(main())
