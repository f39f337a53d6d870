"""`make gpu-check` without a GPU: its time limits, its report, and each part on a stand-in for the device."""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import re
import struct
import subprocess
import sys
import tarfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import torch

from bench import bench_kernels, gpu_bundle, gpu_check, gpu_parts
from bench.gpu_check import Part
from bench.naive import BenchCase
from engine.config import Resources
from engine.training import evaluate as worker
from engine.trial import Trial

ROOT = Path(__file__).resolve().parent.parent


def python(name: str, code: str, limit_s: float = 60, beside: bool = False) -> Part:
    return Part(name, ("-c", code), limit_s, beside=beside)


def checked(parts: list[Part], folder: Path, total_s: float = 100) -> dict[str, dict[str, Any]]:
    path = folder / "gpu-check.json"
    gpu_check.run(parts, {"parts": []}, path, total_s)
    return {part["name"]: part for part in json.loads(path.read_text())["parts"]}


def test_all_parts_fit_into_the_time_limit() -> None:
    parts = gpu_check.parts(Path("bundle"))
    assert sum(part.limit_s for part in parts if not part.beside) <= gpu_check.TOTAL_S
    assert gpu_check.TOTAL_S + gpu_check.END_S < 600, "a shared GPU machine may stop a command after 600 s"
    for part in parts:
        name = part.arguments[2]
        assert name in gpu_parts.PARTS or all((ROOT / file).is_file() for file in part.arguments if "tests/" in file)


def test_the_report_has_figures_failures_and_timeouts(tmp_path: Path) -> None:
    found = checked(
        [
            python("good", "print('a warning'); print('{\"ms\": 1.5}')"),
            python("bad", "raise RuntimeError('kernels are off by 1e-1')"),
            python("hangs", "import time; print('half way', flush=True); time.sleep(100)", 2),
            python("after", "print('{}')"),
        ],
        tmp_path,
    )
    assert (found["good"]["figures"], found["good"]["failures"]) == ({"ms": 1.5}, [])
    assert "kernels are off by 1e-1" in found["bad"]["failures"][0]
    assert found["hangs"]["failures"] == ["cut off after 2 s"]
    assert "half way" in found["hangs"]["last_lines"]
    assert found["after"]["failures"] == []


def test_a_part_without_time_left_is_a_failure(tmp_path: Path) -> None:
    found = checked([python("long", "import time; time.sleep(60)"), python("late", "print('{}')")], tmp_path, 2)
    assert found["long"]["failures"] == ["cut off after 2 s"]
    assert found["late"]["failures"] == ["no time was left"]


def test_a_part_beside_another_is_waited_for(tmp_path: Path) -> None:
    found = checked([python("beside", "print('{}')", beside=True), python("main", "print('{}')")], tmp_path)
    assert [part["failures"] for part in found.values()] == [[], []]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("def test_one(): assert False", "FAILED"),
        ("import pytest\n@pytest.mark.skip(reason='no card')\ndef test_one(): ...", r"SKIPPED \[1\] .*no card"),
        ("", "exit code 5"),
        ("import no_such_package", "ERROR"),
    ],
    ids=["fails", "skips", "no tests", "import fails"],
)
def test_a_test_that_fails_or_does_not_run_is_a_failure(text: str, said: str, tmp_path: Path) -> None:
    (tmp_path / "test_it.py").write_text(text)
    arguments = ("-m", "pytest", "-rsfE", "-q", "-p", "no:cacheprovider", str(tmp_path / "test_it.py"))
    found = checked([Part("tests", arguments, 100)], tmp_path)["tests"]
    assert any(re.match(said, line) for line in found["failures"]), found


def test_without_a_gpu_it_reports_that_nothing_was_checked(tmp_path: Path) -> None:
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    child = subprocess.run([sys.executable, ROOT / "bench" / "gpu_check.py", tmp_path], env=environment,
                           capture_output=True, text=True)  # fmt: skip
    assert child.returncode == 2
    assert "nothing was checked" in child.stderr


# ---- the parts -----------------------------------------------------------------------------------------


@pytest.fixture
def cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs the parts, and trains their students, on the CPU."""

    def ours(at: BenchCase, trials: list[Trial], size: int, execution: str = "graph") -> list[float]:
        answers = worker.evaluate(at.context, at.teacher_file, trials, Resources(students_per_gpu=str(size)))
        assert all(answer.ok for answer in answers), [answer.error for answer in answers]
        return [answer.accuracy for answer in answers]

    monkeypatch.setattr(gpu_parts, "ours", ours)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)


def test_the_naive_loop_runs_beside_ours(cpu: None) -> None:
    found = gpu_parts.naive_loop(images=64, epochs=1, naive_epochs=1, size=1)
    assert found["minutes_for_100"] > 0
    assert found["ratio"] == pytest.approx(found["naive_minutes_for_100"] / found["minutes_for_100"])


def test_accuracies_are_compared_on_real_images(cpu: None, tiny_npz: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_parts, "SIDE", 16)
    found = gpu_parts.accuracy(str(tiny_npz), epochs=1, size=1)
    assert found["graph"] == found["eager"]
    assert found["rms_apart"] == 0


def test_a_shape_is_timed_against_its_peers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench_kernels, "SECONDS", 0.1)
    monkeypatch.setattr(gpu_parts, "SHAPES", (("ce_kd", (128, 10)), ("nst", (4, 64, 64, 4))))
    found = gpu_parts.kernel_shapes()
    assert set(found) == {"ce_kd 128x10", "nst 4x64/64x4x4"}
    assert all(figures["ratio"] > 0 for figures in found.values())


def on_the_fake_device() -> None:
    """Steps and cohorts run; the fake device's times mean nothing."""
    from tests.fake_cuda import fake_cuda

    with fake_cuda() as device:
        assert gpu_parts.step_ms(2, "graph", 3) > 0
        assert device.replays == 6
        assert gpu_parts.step_ms(1, "eager", 3) > 0
        no_rows = contextlib.nullcontext(SimpleNamespace(key_averages=list))
        for lean in (True, False):
            with mock.patch.object(torch.profiler, "profile", return_value=no_rows):
                found = gpu_parts.profiled(torch.bfloat16, torch.contiguous_format, True, lean, steps=1)
            assert found["kernels"] == 0


def test_steps_and_cohorts_run_on_a_fake_device() -> None:
    child = subprocess.run([sys.executable, "-W", "ignore", "-m", "tests.test_gpu_check"], cwd=ROOT,
                           env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True)  # fmt: skip
    assert child.stdout.endswith("passed\n"), child.stderr[-3000:]


# ---- the bundle ----------------------------------------------------------------------------------------


def fat_binary(*entries: tuple[int, int, bytes]) -> bytes:
    """Entries of (kind, architecture, code)."""
    body = b""
    for kind, architecture, code in entries:
        header = struct.pack("<HHIQ", kind, 0, 64, len(code)).ljust(28, b"\0") + struct.pack("<I", architecture)
        body += header.ljust(64, b"\0") + code
    return struct.pack("<IHHQ", gpu_bundle.MAGIC, 1, 16, len(body)) + body


def test_slimming_removes_only_the_code_of_other_architectures(tmp_path: Path) -> None:
    library = tmp_path / "lib.so"
    one, other = b"a" * 96, b"b" * 128
    plain = b"head" + fat_binary((2, 80, one), (2, 90, other), (1, 90, one)) + b"between" + fat_binary((2, 75, other))
    library.write_bytes(plain + b"tail")
    gpu_bundle.slim(library)
    slim = library.read_bytes()
    assert len(slim) == len(plain) + 4
    assert other in slim
    assert one not in slim
    assert slim.count(other) == 1
    assert slim.startswith(b"head")
    assert b"between" in slim
    assert slim.endswith(b"tail")


def test_python_can_import_from_an_unpacked_bundle(tmp_path: Path) -> None:
    (tmp_path / "packages").mkdir()
    (tmp_path / "packages" / "from_a_bundle.py").write_text("value = 7")
    gpu_bundle.archive(tmp_path, tmp_path / "dali.tar.xz")
    with tarfile.open(tmp_path / "dali.tar.xz") as packed:
        assert any(name.endswith("from_a_bundle.py") for name in packed.getnames())
    with gpu_parts.unpacked(tmp_path / "dali.tar.xz"):
        assert importlib.import_module("from_a_bundle").value == 7


if __name__ == "__main__":
    on_the_fake_device()
    print("passed", flush=True)
    os._exit(0)  # state left by fake tensors can break the interpreter's normal exit
