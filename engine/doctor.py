"""Checks of this machine: packages, devices, kernels, data loader, and the file system of the run folder."""

from __future__ import annotations

import fcntl
import importlib.metadata
import os
import platform
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from engine import __version__
from engine.fleet.devices import visible_devices
from engine.fleet.supervisor import ROOT
from engine.trial import install

REQUIRED_EXTRAS = ("", "cli")
SCHEDULERS = {"sbatch": "Slurm", "qsub": "PBS", "bsub": "LSF", "kubectl": "Kubernetes"}
# The titles of the self-tests.
TITLES = {
    "device": "torch",
    "kernels": "kernel self-test",
    "graphs": "CUDA graph self-test",
    "loader": "DALI self-test",
}
REMEDIES = {
    "device": "check the driver with nvidia-smi, or search with --device cpu",
    "kernels": "install torch and triton as in constraints.txt; without triton the losses use PyTorch",
    "graphs": "search with --execution eager, which is slower",
    "loader": "install DALI as in constraints.txt, or search with --data-backend resident",
}
SELF_TEST_S = 300  # a first import from a network file system, or on a busy machine, takes a minute
REQUIRED_BYTES = 1e9


@dataclass(frozen=True, slots=True)
class Finding:
    """What was checked, and what was found. "broken": a search needs it, and `remedy` says how to repair it; "note":
    worth knowing, with nothing to repair."""

    name: str
    status: Literal["ok", "note", "broken"]
    detail: str
    remedy: str = ""


def examine(run_dir: Path) -> list[Finding]:
    """All findings, in the order in which they are shown. The self-tests run in parallel, in their own processes."""
    devices = visible_devices()
    if not devices:
        tests = _self_tests(("kernels", "loader"), ("",))
        return [*_machine(run_dir, devices), *_results(tests)]
    found = [*_machine(run_dir, devices), *_results(_self_tests(("device",), devices))]
    answers = found[-len(devices) :]
    usable = tuple(token for token, answer in zip(devices, answers, strict=True) if answer.status == "ok")
    return [*found, *_results(_self_tests(("kernels", "graphs", "loader"), usable))]


def _machine(run_dir: Path, devices: tuple[str, ...]) -> list[Finding]:
    return [_program(), *_packages(), _driver(devices), *_folder(run_dir), _schedulers()]


def _program() -> Finding:
    cores = len(os.sched_getaffinity(0))
    return Finding(
        "program", "ok", f"mfkd {__version__}, Python {platform.python_version()}, {platform.platform()}, {cores} cores"
    )


def _packages() -> Iterator[Finding]:
    """The packages that pyproject.toml requires, one finding for each extra."""
    try:
        required = importlib.metadata.requires("mfkd") or []
    except importlib.metadata.PackageNotFoundError:
        yield Finding("packages", "broken", "mfkd is not installed in this environment", install("cli"))
        return
    extras: dict[str, list[str]] = {}
    for line in required:
        extra = re.search(r"""extra == ['"](\w+)['"]""", line)
        extras.setdefault(extra[1] if extra else "", []).append(line.partition(";")[0].strip())
    for name, lines in extras.items():
        found, wrong = zip(*map(_package, lines), strict=True)
        title = f"packages [{name}]" if name else "packages"
        if any(wrong):
            status: Literal["note", "broken"] = "broken" if name in REQUIRED_EXTRAS else "note"
            yield Finding(title, status, "; ".join(filter(None, wrong)), install(name or "cli"))
        else:
            yield Finding(title, "ok", ", ".join(found))


def _package(requirement: str) -> tuple[str, str]:
    """Checks a requirement like numpy>=2.0; returns ("name version", its problem or "")."""
    name, least = re.match(r"([\w.-]+)(?:.*?>=([\d.]+))?", requirement).groups()  # type: ignore[union-attr]
    try:
        version = importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return name, f"{name} is missing"
    numbers = [[int(part) for part in re.findall(r"\d+", text)] for text in (version, least or "0")]
    return f"{name} {version}", f"{name} is {version}, but {least} is required" if numbers[0] < numbers[1] else ""


def _driver(devices: tuple[str, ...]) -> Finding:
    """The GPUs and MIG slices that nvidia-smi lists, and those that a search would use."""
    if shutil.which("nvidia-smi") is None:
        if devices:
            detail = f"CUDA_VISIBLE_DEVICES names {', '.join(devices)}, but nvidia-smi is missing"
            return Finding("GPUs", "note", detail, "install NVIDIA's driver, or unset CUDA_VISIBLE_DEVICES")
        return Finding("GPUs", "note", "no nvidia-smi, so no GPU: searches run on the CPU cores")
    try:
        gpus = _ask_driver("--query-gpu=name,memory.total,driver_version", "--format=csv,noheader")
        listed = _ask_driver("-L")
    except (OSError, subprocess.SubprocessError) as error:
        message = (getattr(error, "stdout", "") or str(error)).strip()
        remedy = "repair the driver, or search with --device cpu"
        return Finding("GPUs", "broken", f"nvidia-smi fails: {message}", remedy)
    slices = re.findall(r"MIG (\S+).*UUID: (MIG-[\w/-]+)", listed)
    detail = "; ".join(line.strip() for line in gpus.splitlines())
    detail += "".join(f"; MIG {profile} {uuid}" for profile, uuid in slices)
    visible = f"{len(devices)} visible to a search: {', '.join(devices)}" if devices else "none visible to a search"
    remedy = "" if devices else "check CUDA_VISIBLE_DEVICES"
    return Finding("GPUs", "ok" if devices else "note", f"{detail}; {visible}", remedy)


def _ask_driver(*arguments: str) -> str:
    call = ["nvidia-smi", *arguments]
    return subprocess.run(call, capture_output=True, text=True, timeout=30, check=True).stdout


def _folder(run_dir: Path) -> Iterator[Finding]:
    """What a run folder needs from its file system: append and sync, rename, lock, space.

    If the folder does not exist, its closest existing parent is tested.
    """
    place = next(path for path in (run_dir.absolute(), *run_dir.absolute().parents) if path.exists())
    name = f"run folder {run_dir}"
    try:
        with tempfile.TemporaryDirectory(dir=place, prefix=".doctor-") as scratch:
            sync_ms = _append(Path(scratch) / "journal")
            (Path(scratch) / "temporary").write_text("whole")
            (Path(scratch) / "temporary").replace(Path(scratch) / "journal")
            locked = _locks(Path(scratch) / "journal")
    except OSError as error:
        yield Finding(name, "broken", f"{place}: {error.strerror or error}", "choose another --run-dir, or free space")
        return
    if locked:
        yield Finding(name, "ok", f"{place} ({_file_system(place)}): append and sync {sync_ms:.1f} ms, rename, lock")
    else:
        detail = f"{place} ({_file_system(place)}) does not enforce locks: two searches could write to one journal"
        yield Finding(name, "broken", detail, "put runs on a file system with flock (NFS: version 4)")
    free = shutil.disk_usage(place).free
    if free >= REQUIRED_BYTES:
        yield Finding("free space", "ok", f"{free / 1e9:.1f} GB at {place}")
    else:
        yield Finding("free space", "broken", f"{free / 1e6:.0f} MB at {place}", "free 1 GB, or use another --run-dir")


def _append(path: Path) -> float:
    """The median time of appending a line and syncing it, in milliseconds."""
    times = []
    with open(path, "ab") as file:
        for _ in range(10):
            start = time.perf_counter()
            file.write(b"x" * 300 + b"\n")
            file.flush()
            os.fsync(file.fileno())
            times.append(time.perf_counter() - start)
    return 1e3 * statistics.median(times)


def _locks(path: Path) -> bool:
    """Whether a lock on a file keeps a second open file description from locking it."""
    with open(path, "rb") as one, open(path, "rb") as other:
        fcntl.flock(one, fcntl.LOCK_EX | fcntl.LOCK_NB)
        try:
            fcntl.flock(other, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
        return False


def _file_system(place: Path) -> str:
    """The type of the file system that holds a folder, as /proc/mounts names it."""
    mounts = [line.split() for line in Path("/proc/mounts").read_text().splitlines()]
    around = [(len(mount[1]), mount[2]) for mount in mounts if place.is_relative_to(mount[1])]
    return max(around)[1] if around else "unknown"


def _schedulers() -> Finding:
    found = [f"{name} ({command})" for command, name in SCHEDULERS.items() if shutil.which(command)]
    if not found:
        return Finding("schedulers", "note", "none found: searches run on this machine")
    return Finding("schedulers", "ok", ", ".join(found))


def _self_tests(names: tuple[str, ...], tokens: tuple[str, ...]) -> list[tuple[str, str, subprocess.Popen[str]]]:
    """Starts self-tests (engine/selftest.py): each of `names` on each GPU, or on the CPU for the token ""."""
    return [(name, token, _start(name, token)) for token in tokens for name in names]


def _start(name: str, token: str) -> subprocess.Popen[str]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": token}
    if not token:
        environment["TRITON_INTERPRET"] = "1"
    return subprocess.Popen(
        [sys.executable, "-W", "ignore", "-m", "engine.selftest", name, "cuda" if token else "cpu"],
        cwd=ROOT,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def _results(tests: list[tuple[str, str, subprocess.Popen[str]]]) -> list[Finding]:
    deadline = time.monotonic() + SELF_TEST_S
    return [_result(name, token, process, deadline) for name, token, process in tests]


def _result(name: str, token: str, process: subprocess.Popen[str], deadline: float) -> Finding:
    title = f"{TITLES[name]} on GPU {token}" if token else TITLES[name]
    try:
        out, err = process.communicate(timeout=max(1.0, deadline - time.monotonic()))
    except subprocess.TimeoutExpired:
        process.kill()
        process.communicate()
        return Finding(title, "broken", f"did not finish within {SELF_TEST_S} s", REMEDIES[name])
    if process.returncode == 0:
        return Finding(title, "ok", out.strip().splitlines()[-1])
    reason = err.strip().splitlines()[-1] if err.strip() else f"the process ended with exit code {process.returncode}"
    return Finding(title, "broken", reason, REMEDIES[name])
