"""The command line as a user meets it: what it prints, where, and its exit codes."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest
import yaml

import cli
from engine import journal
from engine.config import Budget

ROOT = Path(__file__).resolve().parent.parent
SMALL = [
    "--space=nasbench201:channels=4,cells=1",
    "--batch-size=16",
    "--teacher-epochs=1",
    "--low.fraction=1/2",
    "--low.epochs=1",
    "--high.epochs=2",
    "--max-low=5",
    "--max-high=2",
    "--device=cpu",
    "--progress=lines",
]


def small(data: Path, run_dir: Path, workers: int = 1) -> list[str]:
    return ["search", *SMALL, f"--data={data}", f"--run-dir={run_dir}", f"--workers={workers}"]


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["search", "--max-hihg=3"], 2, "did you mean --max-high"),
        (["search", "--max-high=many"], 2, "max_high"),
        (["search", "--low.kd-loss=magic"], 2, "kd"),
        (["search", "--low.fraction=3/2"], 2, "at most 1"),
        (["search", "--low.fraction=1/0"], 2, "divides by zero"),
        (["search", "--max-high=0"], 2, "at least 1"),
        (["search", "--gpu-hours=-1"], 2, "must be over 0"),
        (["search", "--method=magic"], 2, "no method 'magic'"),
        (["search", "--space=magic"], 2, "no space 'magic'; built in are"),
        (["search", "--space=nasbench201:depth=3"], 2, "no option 'depth'; it has"),
        (["search", "--space=nowhere.py:SPACE"], 2, "no file nowhere.py"),
        (["search", "--gpus=8", "--device=auto"], 2, "8 asked for, 0 visible"),
        (["search", "--device=cuda"], 3, "no GPU is visible"),
        (["search", "--data=nowhere.npz", "--workers=1"], 3, "nowhere.npz"),
        (["search", "--teacher=nowhere.safetensors", "--workers=1"], 2, "no teacher file nowhere.safetensors"),
        (["teacher", "--check=nowhere.safetensors"], 2, "no teacher file nowhere.safetensors"),
        (["serch"], 2, "did you mean search"),
        ([], 2, "no command given"),
    ],
)
def test_wrong_uses_end_with_their_code_and_one_message(
    arguments: list[str],
    code: int,
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    if arguments and "--data=nowhere.npz" not in arguments:
        arguments = [*arguments, "--data=glyphs:144"]
    try:
        got = cli.main(arguments)
    except SystemExit as stop:
        got = stop.code  # type: ignore[assignment]
    err = capsys.readouterr().err
    assert got == code, err
    assert message in err
    assert "Traceback" not in err


def test_a_gpu_that_torch_cannot_use_is_said_before_any_training(
    tiny_npz: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "GPU-pretended")
    arguments = [word for word in small(tiny_npz, tmp_path) if "device" not in word and "workers" not in word]
    assert cli.main([*arguments, "--gpus=1"]) == 3
    assert "torch cannot use it" in capsys.readouterr().err


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_stopped_search_says_so_and_leaves_nothing_behind(
    number: int, code: int, tiny_npz: Path, tmp_path: Path, mark: Callable[[], list[psutil.Process]]
) -> None:
    command = [sys.executable, "cli.py", *small(tiny_npz, tmp_path, workers=2), "--max-low=50", "--low.epochs=20"]
    process = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True)
    wait_for(lambda: len(journal.read(tmp_path / "journal.jsonl").answers) >= 1 or process.poll() is not None)
    process.send_signal(number)
    _, err = process.communicate(timeout=30)
    assert process.returncode == code, err
    assert "Traceback" not in err
    wait_for(lambda: not mark())
    assert len(journal.read(tmp_path / "journal.jsonl").answers) >= 1


def wait_for(condition: Callable[[], bool], seconds: float = 90) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.05)


def test_help_gives_every_flag_its_default(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        cli.main(["search", "--help"])
    text = capsys.readouterr().out
    for flag in ("--low.kd-loss", "--max-high", "--gpus", "--run-dir", "--seed"):
        assert flag in text
    assert text.count("default:") > 40


def test_a_search_prints_one_object_and_the_same_line_finds_it_done(
    tiny_npz: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(small(tiny_npz, tmp_path)) == 0
    out, err = capsys.readouterr()
    (line,) = out.splitlines()
    result = json.loads(line)
    assert set(result) >= {"run_dir", "status", "winner", "evaluations", "tau", "seconds"}
    assert set(result["winner"]) == {"architecture", "valid_accuracy", "test_accuracy", "macs", "params"}
    assert result["evaluations"]["high"] == 2
    assert "winner" in err
    kept = {"config.yaml", "run.json", "journal.jsonl", "result.json", "teacher", "checkpoints"}
    assert {path.name for path in tmp_path.iterdir()} >= kept
    before = (tmp_path / "journal.jsonl").read_bytes()
    assert cli.main(small(tiny_npz, tmp_path)) == 0
    assert json.loads(capsys.readouterr().out)["winner"] == result["winner"]
    assert (tmp_path / "journal.jsonl").read_bytes() == before


def test_other_settings_in_the_same_folder_are_refused(
    tiny_npz: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = [*small(tiny_npz, tmp_path), "--max-low=2", "--max-high=1"]
    assert cli.main(arguments) == 0
    assert cli.main([*arguments, "--lr=0.5"]) == 2
    assert "lr: 0.1 there, 0.5 here" in capsys.readouterr().err


def test_flags_may_come_from_a_file_and_the_line_wins(tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_text("max_low: 7\nmax_high: 3\nlow:\n  fraction: 1/27\n  kd_loss: nst\n")
    values = cli.parse(["search", "-c", str(tmp_path / "c.yaml"), "--max-high=5"])[1]
    assert (values.max_low, values.max_high, str(values.low.fraction), values.low.kd_loss) == (7, 5, "1/27", "nst")


def test_an_unknown_key_of_a_file_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "c.yaml").write_text("max_hihg: 7\n")
    with pytest.raises(SystemExit) as stop:
        cli.main(["search", "-c", str(tmp_path / "c.yaml")])
    assert stop.value.code == 2
    assert "did you mean --max-high" in capsys.readouterr().err


def test_a_search_of_nothing_is_the_demo() -> None:
    demo = cli.parse(["search", "--workers=2"])[1]
    assert (demo.space, demo.max_low) == ("nasbench201:channels=8,cells=1", 24)
    assert cli.parse(["search", "--data=cifar10"])[1].max_low == Budget().max_low


def test_every_shipped_configuration_is_understood() -> None:
    for path in sorted((ROOT / "configs").glob("*.yaml")):
        values = cli.parse(["search", "-c", str(path)])[1]
        assert set(yaml.safe_load(path.read_text())) <= set(vars(values)), path


def test_killed_and_called_again_it_comes_to_the_same_end(tiny_npz: Path, tmp_path: Path) -> None:
    """kill -9 in the middle, against an unbroken run."""
    whole = finish(small(tiny_npz, tmp_path / "whole"))
    command = small(tiny_npz, tmp_path / "killed", workers=1)
    process = subprocess.Popen([sys.executable, "cli.py", *command], cwd=ROOT, stderr=subprocess.DEVNULL)
    path = tmp_path / "killed" / "journal.jsonl"
    wait_for(lambda: len(journal.read(path).answers) >= 3 or process.poll() is not None)
    process.kill()
    process.wait()
    answered = journal.read(path).answers
    assert len(answered) >= 3
    again = finish(command)
    assert again["winner"] == whole["winner"]
    record = journal.read(path)
    assert all(record.answers[number] == answer for number, answer in answered.items())
    assert len(path.read_text().splitlines()) == 1 + len(record.asked) + len(record.answers)  # nothing twice


def finish(command: list[str]) -> dict:  # type: ignore[type-arg]
    done = subprocess.run([sys.executable, "cli.py", *command], cwd=ROOT, check=True, capture_output=True, text=True)
    return json.loads(done.stdout.splitlines()[-1])
