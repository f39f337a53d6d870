"""Everything that only a GPU can show, in one command of at most 500 s: `make gpu-check OUT=folder`.

Runs under any Python that has torch, torchvision, triton, numpy, pillow, safetensors, pyyaml, psutil, pytest,
pytest-xdist and hypothesis, and installs nothing. Each part runs in its own process with a time limit, the most
informative first, and gpu-check.json is written after each. A part fails if it raises, skips a test, exceeds its limit
or has no time left; the exit code is then 1. It is 2 if there is no CUDA device. `--bundle` is a folder made by
`make gpu-bundle`; without it, the parts that need real images or DALI do not run, and the JSON lists them.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
TOTAL_S = 500.0
END_S = 5.0  # for an interrupted pytest to report what failed
KERNEL_TESTS = ("tests/test_kernels_gpu.py", "tests/test_kernels_triton.py", "tests/test_norm_act.py")
PYTEST = ("-m", "pytest", "-rsfE", "--no-header", "-q", "-p", "no:cacheprovider", "-m", "gpu")


@dataclass(frozen=True)
class Part:
    """A child process: Python's arguments, a limit in seconds, and environment variables. A part with `beside` runs
    alongside the next one, so its limit adds nothing to the total."""

    name: str
    arguments: tuple[str, ...]
    limit_s: float
    environment: dict[str, str] = field(default_factory=dict)
    beside: bool = False


def figures(name: str, limit_s: float, *arguments: str, **environment: str) -> Part:
    return Part(name, ("-m", "bench.gpu_parts", name, *arguments), limit_s, environment)


def parts(bundle: Path | None) -> list[Part]:
    """All parts, in the order in which they run; their limits add up to TOTAL_S."""
    found = [
        figures("machine", 15),
        figures("selftest", 65),
        Part("graph tests", (*PYTEST, "tests/test_graphs.py"), 110, beside=True),
        # About 190 tests with two or more kernels each; a kernel takes about a second to compile.
        Part("kernel tests", (*PYTEST, "-n", "8", "-k", "not second_device", *KERNEL_TESTS), 110),
        figures("step", 55),
        figures("cohorts", 50),
        figures("connections", 20, CUDA_DEVICE_MAX_CONNECTIONS="8"),
        figures("naive", 65),
        figures("shapes", 50),
    ]
    if bundle is not None:
        found += [figures("dali", 30, str(bundle / "dali.tar.xz")), figures("accuracy", 40, str(bundle / "images.npz"))]
    return found


class Running:
    """A running part."""

    def __init__(self, part: Part) -> None:
        self.part, self.start = part, time.monotonic()
        self.out = tempfile.TemporaryFile("w+")  # noqa: SIM115 - read after the part has ended
        environment = {"CUDA_DEVICE_MAX_CONNECTIONS": "32", **os.environ, "PYTHONUNBUFFERED": "1", **part.environment}
        self.process = subprocess.Popen(
            [sys.executable, *part.arguments], cwd=ROOT, env=environment, stdout=self.out, stderr=subprocess.STDOUT,
            start_new_session=True,
        )  # fmt: skip

    def result(self, limit_s: float) -> dict[str, Any]:
        """The part's entry in the report; `failures` is empty if it succeeded."""
        code = self._end(limit_s)
        self.out.seek(0)
        lines = self.out.read().splitlines()
        found: dict[str, Any] = {"name": self.part.name, "seconds": round(time.monotonic() - self.start, 1)}
        failed = failures(lines) if "pytest" in self.part.arguments else []
        if code is None:
            failed.append(f"cut off after {limit_s:.0f} s")
        elif code:
            failed.append(f"exit code {code}: {' | '.join(lines[-3:])}")
        elif "pytest" not in self.part.arguments:
            found["figures"] = json.loads(lines[-1])
        return found | {"failures": failed, "last_lines": lines[-15:] if failed else lines[-1:]}

    def _end(self, limit_s: float) -> int | None:
        """Exit code; None if the limit was reached, and the process and its children were killed."""
        try:
            return self.process.wait(max(0.0, limit_s - (time.monotonic() - self.start)))
        except subprocess.TimeoutExpired:
            self.process.send_signal(signal.SIGINT)
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(END_S)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
        return None


def failures(lines: list[str]) -> list[str]:
    """The lines of pytest's summary that name a test that failed, could not run, or was skipped."""
    return [line for line in lines if re.match(r"(FAILED|ERROR|SKIPPED) ", line)]


def run(todo: list[Part], report: dict[str, Any], path: Path, total_s: float = TOTAL_S) -> None:
    """Runs the parts within `total_s` and writes the report after each."""
    end = time.monotonic() + total_s
    beside: list[Running] = []
    for part in todo:
        left = end - time.monotonic()
        if left < 1:
            report["parts"].append({"name": part.name, "seconds": 0, "failures": ["no time was left"]})
        elif part.beside:
            beside.append(Running(part))
            continue
        else:
            report["parts"].append(Running(part).result(min(part.limit_s, left)))
        while beside:
            other = beside.pop()
            report["parts"].append(other.result(min(other.part.limit_s, max(1.0, end - time.monotonic()))))
        write(report, path)
        for done in report["parts"][-2:]:
            print(f"{done['name']}: {done['seconds']} s, {'; '.join(done['failures']) or 'ok'}", flush=True)


def write(report: dict[str, Any], path: Path) -> None:
    partial = path.with_suffix(".json.part")
    partial.write_text(json.dumps(report, indent=1) + "\n")
    partial.replace(path)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("folder", type=Path, help="for gpu-check.json")
    parser.add_argument("--bundle", type=Path, help="a folder made by `make gpu-bundle`: real images and DALI")
    given = parser.parse_args()
    try:
        import torch
    except ImportError:
        print("gpu-check needs torch: name an interpreter that has it, PYTHON=python3 make gpu-check", file=sys.stderr)
        return 2
    if not torch.cuda.is_available():
        print("gpu-check needs a CUDA device, but torch sees none: nothing was checked or measured", file=sys.stderr)
        return 2
    given.folder.mkdir(parents=True, exist_ok=True)
    path = given.folder / "gpu-check.json"
    bundle = given.bundle.absolute() if given.bundle else None
    report: dict[str, Any] = {"not_run": [] if bundle else ["dali", "accuracy"], "parts": []}
    run(parts(bundle), report, path)
    print(f"wrote {path}")
    return 1 if any(part["failures"] for part in report["parts"]) else 0


if __name__ == "__main__":
    sys.exit(main())
