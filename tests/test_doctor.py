"""`doctor` reports what works on a machine, and exits with 3 if something required does not."""

from __future__ import annotations

import json
import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest

import cli
from engine import doctor


@pytest.fixture
def no_gpu(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def test_everything_required_works_on_this_machine(
    no_gpu: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["doctor", "--json", f"--run-dir={tmp_path / 'runs'}"]) == 0
    report = json.loads(capsys.readouterr().out)
    status = {finding["name"]: finding["status"] for finding in report["findings"]}
    assert report["ok"]
    assert {status[name] for name in ("packages", "kernel self-test", "DALI self-test", "free space")} == {"ok"}
    assert "interpreted" in next(f["detail"] for f in report["findings"] if f["name"] == "kernel self-test")
    assert not (tmp_path / "runs").exists(), "a check must leave nothing behind"


def test_a_missing_device_is_broken_with_a_remedy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "GPU-missing")
    assert cli.main(["doctor", f"--run-dir={tmp_path}"]) == 3
    out, err = capsys.readouterr()
    assert "BROKEN" in out
    assert "torch on GPU GPU-missing" in err
    assert "--device cpu" in " ".join(out.split())


def test_a_gpu_that_works_has_its_kernels_graphs_and_loader_tested(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each has a line of its own, and a broken one says how to work without it."""
    asked: list[tuple[tuple[str, ...], tuple[str, ...]]] = []

    def start(names: tuple[str, ...], tokens: tuple[str, ...]) -> list[tuple[str, str, subprocess.Popen[str]]]:
        asked.append((names, tokens))
        broken = "raise SystemExit('no graph: the driver is too old')"
        codes = {name: broken if name == "graphs" else "print('fine')" for name in names}
        return [(name, token, python(code)) for token in tokens for name, code in codes.items()]

    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "GPU-1")
    monkeypatch.setattr(doctor, "_self_tests", start)
    found = {finding.name: finding for finding in doctor.examine(tmp_path)}
    assert asked == [(("device",), ("GPU-1",)), (("kernels", "graphs", "loader"), ("GPU-1",))]
    assert found["kernel self-test on GPU GPU-1"].status == found["DALI self-test on GPU GPU-1"].status == "ok"
    graphs = found["CUDA graph self-test on GPU GPU-1"]
    assert (graphs.status, graphs.detail) == ("broken", "no graph: the driver is too old")
    assert "--execution eager" in graphs.remedy


def python(code: str) -> subprocess.Popen[str]:
    return subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def test_gpus_and_their_mig_slices_are_listed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A fake nvidia-smi prints the listing of an H100 with two MIG slices."""
    listing = "GPU 0: NVIDIA H100 (UUID: GPU-1)\n  MIG 3g.40gb     Device  0: (UUID: MIG-a)\n"
    listing += "  MIG 3g.40gb     Device  1: (UUID: MIG-b)\n"
    tool = tmp_path / "nvidia-smi"
    tool.write_text(
        f"#!/bin/sh\nif [ $1 = -L ]; then printf '{listing}'; else echo 'NVIDIA H100, 81559 MiB, 580.1'; fi\n"
    )
    tool.chmod(tool.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    found = doctor._driver(("MIG-a", "MIG-b"))
    assert found.status == "ok"
    for fact in ("NVIDIA H100", "580.1", "MIG 3g.40gb MIG-a", "MIG-b", "2 visible"):
        assert fact in found.detail
    tool.write_text("#!/bin/sh\necho 'Failed to initialize NVML: Driver/library version mismatch'; exit 18\n")
    found = doctor._driver(("0",))
    assert (found.status, "version mismatch" in found.detail) == ("broken", True)


def test_a_folder_that_cannot_be_written_is_broken(tmp_path: Path) -> None:
    (found,) = doctor._folder(Path("/proc/runs"))
    assert found.status == "broken"
    assert "--run-dir" in found.remedy


def test_an_old_or_missing_package_is_named() -> None:
    assert doctor._package("numpy>=2.0")[1] == ""
    assert "but 99.5 is required" in doctor._package("numpy>=99.5")[1]
    assert doctor._package("no-such-package>=1")[1] == "no-such-package is missing"
