"""A search in a pretrained space, from a weights file to a finished network, through the command line."""

from __future__ import annotations

import json
import re
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

import cli
from engine.networks import library
from engine.run_folder import RunFolder
from engine.search.journal import read_journal
from engine.search.runs import open_run
from tests.searches import finish, launch, measured, processes, until

SPACE = "pretrained:torchvision:mobilenet_v3_small,min_side=0.5"
QUICK = [
    f"--space={SPACE}",
    "--data=glyphs:200",
    "--data-backend=resident",
    "--resolution=32",
    "--teacher-epochs=1",
    "--low.epochs=1",
    "--high.epochs=2",
    "--final.epochs=2",
    "--final-training=always",
    "--baselines=always",
    "--max-low=4",
    "--max-high=3",
    "--max-macs=2.1e6",
    "--device=cpu",
    "--workers=1",
    "--progress=none",
]


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Weights of the library's network for ten other classes."""
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("weights") / "mobilenet.safetensors"
    state = library.network("torchvision:mobilenet_v3_small", 10).state_dict()
    save_file({name: value.contiguous() for name, value in state.items()}, path)
    return path


def start(run_dir: Path, weights: Path, *more: str) -> subprocess.Popen[str]:
    return launch(run_dir, *QUICK, f"--teacher-weights={weights}", *more, OMP_NUM_THREADS="1")


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, weights: Path) -> tuple[Path, dict[str, Any]]:
    """The run folder and the result of an undisturbed search."""
    folder = tmp_path_factory.mktemp("whole")
    return folder, finish(start(folder, weights), seconds=600)[0]


def test_a_search_ends_with_a_finished_network_and_its_baselines(whole: tuple[Path, dict[str, Any]]) -> None:
    folder, result = whole
    assert result["status"] == "finished"
    assert {row["name"] for row in result["baselines"]} == {
        "lower resolution", "uniform width", "the pretrained network, fine-tuned",
    }  # fmt: skip
    rows = [result["final"], *result["baselines"]]
    assert all(row["macs"] <= 2.1e6 for row in rows if row.get("within_limits", True))
    assert Path(result["final"]["weights"]).is_file()
    assert result["verdict"]
    assert open_run(str(folder)).result is not None, "it covers all evaluations"
    names = [trial.fidelity.name for trial in read_journal(RunFolder(folder).journal).asked]
    opening = names.count("inherited")
    assert opening >= 64
    assert set(names[:opening]) == {"inherited"}, "everything else waits for the opening"


def test_the_report_and_the_export_of_such_a_search(
    whole: tuple[Path, dict[str, Any]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, result = whole
    for command in (["report", str(folder)], ["trials", str(folder)], ["status", str(folder)]):
        assert cli.main(command) == 0
        capsys.readouterr()
    page = (folder / "report" / "index.html").read_text()
    for label, count in (("full evaluations", "high"), ("scored with inherited weights", "inherited")):
        (shown,) = re.findall(rf"{label}</dt>\s*<dd[^>]*>(\d+)", page)
        assert int(shown) == result["evaluations"][count]
    assert cli.main(["export", str(folder), "--out", str(tmp_path / "out")]) == 0
    exported = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert exported["architecture"] == result["final"]["architecture"]
    assert set(exported["differences"]) == {"model.py", "model.pt2", "model.onnx"}
    assert max(exported["differences"].values()) < 1e-4


@pytest.mark.parametrize("phase", ["inherited", "final"])
def test_a_search_killed_in_its_opening_or_its_end_comes_to_the_same_end(
    phase: str, whole: tuple[Path, dict[str, Any]], weights: Path, tmp_path: Path
) -> None:
    folder, result = whole
    process = start(tmp_path, weights)
    journal = RunFolder(tmp_path).journal
    until(lambda: any(t.fidelity.name == phase for t in read_journal(journal).asked) or process.poll() is not None, 600)
    assert process.poll() is None, "it was killed too late"
    process.kill()
    process.communicate()
    until(lambda: not processes(tmp_path), 30)
    again, _ = finish(start(tmp_path, weights), seconds=600)
    assert measured(tmp_path) == measured(folder)
    assert Path(again["final"]["weights"]).read_bytes() == Path(result["final"]["weights"]).read_bytes()


def test_a_teacher_of_another_network_is_refused(weights: Path, tmp_path: Path) -> None:
    _, message = finish(start(tmp_path, weights, "--teacher=torchvision:resnet18"), code=2, seconds=300)
    assert "inherit the weights of its largest member" in message


def test_a_width_multiplier_is_refused(weights: Path, tmp_path: Path) -> None:
    _, message = finish(start(tmp_path, weights, "--low.width=0.5"), code=2, seconds=300)
    assert "leave out --low.width" in message


def test_missing_weights_are_named_with_where_they_may_come_from(tmp_path: Path) -> None:
    _, message = finish(start(tmp_path, tmp_path / "none.safetensors"), code=2, seconds=300)
    assert "--teacher-weights" in message
