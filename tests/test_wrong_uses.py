"""Mistakes of users. Each ends with the documented exit code and one message that says what to do, without a traceback.

Everything is the real command but one thing: tasks of a worker are called in this process, since starting one takes
seconds. What goes wrong between driver and worker is tested in test_fleet.py and test_faults.py.
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from safetensors.numpy import load_file, save_file

import cli
from engine.config import Resources
from engine.fleet.devices import Layout
from engine.search import run_context
from tests.at_once import AtOnce, Task

SMALL = [
    "--space=nasbench201:channels=4,cells=1", "--batch-size=16", "--teacher-epochs=1", "--low.fraction=1/2",
    "--low.epochs=1", "--high.epochs=1", "--max-low=2", "--max-high=1", "--max-failures=2", "--device=cpu",
    "--workers=1", "--progress=none",
]  # fmt: skip
Ends = Callable[[list[str], int, str], None]


class Here(AtOnce):
    """A fleet of one worker: this process."""

    def answer(self, name: str, task: Task) -> Any:
        from engine.training import run_tasks

        return json.loads(json.dumps(getattr(run_tasks, name)(task)))


@pytest.fixture
def ends(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Ends:
    """Calls the command line in an empty folder, on a machine without GPUs, and checks how it ends."""

    def here(resources: Resources, wanted: Layout, logs: Path) -> Here:
        return Here()

    monkeypatch.setattr(run_context, "open_fleet", here)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))

    def check(arguments: list[str], code: int, message: str) -> None:
        try:
            got: Any = cli.main(arguments)
        except SystemExit as stop:
            got = stop.code
        out, err = capsys.readouterr()
        assert got == code, err
        assert message in err
        assert "Traceback" not in err
        assert "internal error" not in err
        assert out == "", "a failed command prints no result"

    return check


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        ("", 2, "no command given"),
        ("serch", 2, "did you mean search"),
        ("--data=photos", 2, "search --data=photos"),
        ("search photos", 2, "a value follows its flag"),
        ("search --max-hihg=3", 2, "did you mean --max-high"),
        ("search --low 1/27", 2, "did you mean --low.fraction"),
        ("search --data", 2, "expected one argument"),
        ("search --max-high=many", 2, "--max-high: Expected a whole number"),
        ("search --max-macs=60M", 2, "write 60e6"),
        ("search --name=../elsewhere", 2, "--run-dir takes a path"),
        ("search --name=..", 2, "--run-dir takes a path"),
        ("search --device=gpu", 2, "value from 'auto', 'cuda', 'cpu'"),
        ("search --low.kd-loss=magic", 2, "--low.kd-loss"),
        ("search --low.fraction=third", 2, "write 1/27"),
        ("search --low.fraction=3/2", 2, "at most 1"),
        ("search --low.fraction=1/0", 2, "divides by zero"),
        ("search --max-high=0", 2, "at least 1"),
        ("search --gpu-hours=-1", 2, "must be greater than 0"),
        ("search --target-accuracy=95", 2, "write 0.95"),
        ("search --momentum=9", 2, "below 1"),
        ("search --kd-weight=-1", 2, "at least 0"),
        ("search --seed=-1", 2, "at least 0"),
        ("search --method=magic", 2, "no method named 'magic'; choose from mfkd"),
        ("search --space=magic", 2, "no space named 'magic'; choose from"),
        ("search --space=nasbench201:depth=3", 2, "no option 'depth'; it has"),
        ("search --space=nowhere.py:SPACE", 2, "no file nowhere.py"),
        ("search --space=nasbench201:channels=100000", 2, "channels=100000; it must be 1 to 512"),
        ("search --space=nasbench201:cells=0", 2, "cells=0; it must be 1 to 50"),
        ("search --space=mobilenetv2:width=500", 2, "width=500.0; it must be greater than 0 and at most 10"),
        ("search --space=shufflenetv2:width=nan", 2, "width=nan; it must be greater than 0 and at most 10"),
        ("search --low.width=11", 2, "low.width is 11.0; it must be greater than 0 and at most 10"),
        ("search --data=", 3, "--data : no such file or folder"),
        ("search --name=\"mine\"", 2, "choose another name"),
        ("search --only=abc", 2, "'abc' is not an architecture"),
        ("search --only=1-2-3", 2, "architecture 1-2-3 has 3 choices, nasbench201 has 6"),
        ("search --min-macs=5e6 --max-macs=1e6", 2, "--min-macs 5e+06 is more than --max-macs 1e+06"),
        ("search --fidelity-study=nowhere", 2, "nowhere: no run folder; give that of a fidelity study"),
        ("search --space=mobilenetv2:width=wide", 2, "width='wide' is not a number"),
        ("eval photos --split=nothing", 2, "--split: Expected a value from 'valid', 'test', 'all'. Got value: nothing"),
        ("space show nasbench201 --resolution=0", 2, "--resolution is 0; it must be at least 1"),
        ("space sample nasbench201 --count=-1", 2, "--count is -1; it must be at least 1"),
        ("search --device=cpu --workers=99999", 2, "--workers 99999: this machine has"),
        ("search --device=cpu --workers=99999 --dry-run", 2, "--workers 99999: this machine has"),
        ("search --gpus=8", 2, "--gpus 8: no GPU is visible"),
        ("search --gpus=-1", 2, "cannot be negative"),
        ("search --gpus=0,1", 2, "no GPU is visible"),
        ("search --gpus=two", 2, "write auto, a count"),
        ("search --device=cuda", 3, "no GPU is visible"),
        ("search --device=cpu --gpus=2", 2, "contradict each other"),
        ("search --data=photos", 3, "no such file or folder"),
        ("search --data=nowhere.npz", 3, "no such file or folder"),
        ("search -c nowhere.yaml", 2, "does not exist"),
        ("config --method=mfdk", 2, "no method named 'mfdk'"),
        ("config --yaml=no/such/folder/x.yaml", 3, "cannot be written"),
        ("search --teacher=nowhere.safetensors", 2, "no teacher file nowhere.safetensors"),
        ("search --teacher=resnet50", 2, "torchvision:NAME"),
        ("search --teacher=nowhere.safetensors --dry-run", 2, "no teacher file nowhere.safetensors"),
        ("teacher --check=nowhere.safetensors", 2, "no teacher file nowhere.safetensors"),
        ("replay --table=nowhere.csv", 3, "no table nowhere.csv"),
        ("replay", 2, "required: table"),
        ("status nowhere", 2, "no run named 'nowhere'"),
        ("report nowhere", 2, "no run named 'nowhere'"),
        ("export nowhere", 2, "no run named 'nowhere'"),
        ("explain nowhere 1-2-3", 2, "no run named 'nowhere'"),
        ("report", 2, "report: the following arguments are required: RUN"),
        ("trials photos --status=bad", 2, "--status: Expected a value from 'all', 'failed'"),
        ("submit sge", 2, "submit: SCHEDULER: Expected a value from 'slurm'"),
        ("space nasbench201", 2, "space: ACTION: Expected a value from 'list'"),
        ("teacher --arch=resnet50", 2, "or give torchvision:NAME"),
    ],
)
def test_flags(ends: Ends, arguments: str, code: int, message: str) -> None:
    words = arguments.split()
    if words[:1] == ["search"] and "--data" not in arguments:
        words.append("--data=glyphs:144")
    ends(words, code, message)


@pytest.mark.parametrize("arguments", ["search --datta=photos", "config --max-hihg=3", "submit sge"])
def test_a_misspelt_setting_does_not_announce_the_demo(arguments: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(arguments.split()) == 2
    assert "demo" not in capsys.readouterr().err


def test_a_wrong_architecture_is_refused_before_a_run_folder_exists(ends: Ends, tmp_path: Path) -> None:
    ends(["train", "--data=glyphs:144", "--arch=1-2"], 2, "architecture 1-2 has 2 choices")
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"max_low: [1, 2\n", "not YAML"),
        (b"\xff\xfe\x00\x01", "cannot be read as text"),
        (b"", "holds no flags"),
        (b"- max_low\n- 3\n", "holds no flags"),
        (b"max_low: many\n", "--max-low: Expected a whole number"),
        (b"max_hihg: 3\n", "Option 'max_hihg' is not accepted; did you mean max_high"),
        (b"low:\n  fractoin: 1/27\n", "Option 'low.fractoin' is not accepted; did you mean low.fraction"),
        (b"low: 1/27\n", "low is a section"),
        (b"config: {}\nbudget: {}\n", "is the record of a run"),
    ],
)
def test_yaml_files(ends: Ends, tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / "my.yaml").write_bytes(content)
    ends(["search", "-c", "my.yaml"], 2, f"-c my.yaml: {message}" if b"many" not in content else message)


def images(root: Path, part: str, kind: str, count: int = 4) -> Path:
    folder = root / part / kind
    folder.mkdir(parents=True)
    for number in range(count):
        Image.new("RGB", (24, 24), (40 * number, 0, 0)).save(folder / f"{number}.png")
    return folder


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """Two classes, each with four training and four test images."""
    for part in ("train", "test"):
        for kind in ("cat", "dog"):
            images(tmp_path / "photos", part, kind)
    return tmp_path / "photos"


def test_an_unreadable_image_is_named(ends: Ends, photos: Path) -> None:
    (photos / "train" / "cat" / "9.png").write_bytes(b"no image")
    (photos / "test" / "dog" / "0.png").write_bytes(b"")
    ends(["search", *SMALL, f"--data={photos}"], 3, "cat/9.png: not an image, despite its name")


def test_an_empty_class_folder(ends: Ends, photos: Path) -> None:
    for part in ("train", "test"):
        (photos / part / "bird").mkdir()
    ends(["search", *SMALL, f"--data={photos}"], 3, "no image in bird; remove the empty folders")


def test_a_folder_of_images_without_classes(ends: Ends, photos: Path) -> None:
    ends(["search", *SMALL, f"--data={photos / 'train' / 'cat'}"], 3, "cat has no class folder; arrange the images as")


def test_one_class_only(ends: Ends, photos: Path) -> None:
    for part in ("train", "test"):
        shutil.rmtree(photos / part / "dog")
    ends(["search", *SMALL, f"--data={photos}"], 3, "one class only (cat)")


def test_a_batch_that_is_larger_than_the_data(ends: Ends, tiny_npz: Path) -> None:
    ends(
        ["search", *SMALL, f"--data={tiny_npz}", "--batch-size=500"], 2, "is more than the 96 training images; lower it"
    )


def test_constraints_that_no_architecture_meets(ends: Ends, tiny_npz: Path) -> None:
    ends(["search", *SMALL, f"--data={tiny_npz}", "--max-macs=1"], 2, "change the limits, the space or the resolution")


def test_images_too_small_for_a_teacher(ends: Ends, tiny_npz: Path) -> None:
    words = ["teacher", f"--data={tiny_npz}", "--arch=torchvision:resnet18", "--resolution=1", "--progress=none"]
    ends([*words, "--device=cpu", "--from-scratch"], 2, "use a larger --resolution")


def test_a_teacher_file_that_exists_already(ends: Ends, tiny_npz: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["teacher", f"--data={tiny_npz}", "--space=nasbench201:channels=4,cells=1", "--device=cpu", "-q"]
    assert cli.main([*words, "--teacher-epochs=1", "--batch-size=16", "--arch=0-0-0-1-0-0"]) == 0
    assert json.loads(capsys.readouterr().out)["epochs"] == 1
    ends([*words, "--teacher-epochs=1", "--arch=1-0-0-1-0-0"], 2, "trained for 1 epochs; remove it, or choose another")
    ends([*words, "--teacher-epochs=2", "--arch=0-0-0-1-0-0"], 2, "remove it, or choose another --out")
    ends([*words, "--out=teacher.pt"], 2, "a teacher is a .safetensors file")
    ends([*words, "--lr=-1"], 2, "--lr is -1.0; it must be greater than 0")


def test_a_file_that_is_not_a_teacher(ends: Ends, tiny_npz: Path, tmp_path: Path) -> None:
    (tmp_path / "t.safetensors").write_bytes(b"no weights at all")
    ends(["search", *SMALL, f"--data={tiny_npz}", "--teacher=t.safetensors"], 2, "is not a teacher file")
    save_file({"a": np.zeros(3)}, tmp_path / "t.safetensors")
    ends(["search", *SMALL, f"--data={tiny_npz}", "--teacher=t.safetensors"], 2, "is not a teacher file")


@pytest.fixture(scope="module")
def run(tiny_npz: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a small finished search."""
    folder = tmp_path_factory.mktemp("run") / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run_context, "open_fleet", lambda *_: Here())
        assert cli.main(["search", *SMALL, f"--data={tiny_npz}", f"--run-dir={folder}"]) == 0
    return folder


def again(run: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(run, tmp_path / "copy"))


def test_a_teacher_of_other_classes(ends: Ends, run: Path, photos: Path) -> None:
    teacher = run / "teacher" / "teacher.safetensors"
    ends(["search", *SMALL, f"--data={photos}", "--batch-size=4", f"--teacher={teacher}"], 2, "knows 3 classes")


def test_a_dry_run_with_a_teacher_of_other_classes_trains_nothing(
    ends: Ends, run: Path, photos: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from engine.training import run_tasks

    monkeypatch.setattr(run_tasks, "run_trials", None)
    teacher = run / "teacher" / "teacher.safetensors"
    words = ["search", *SMALL, f"--data={photos}", "--batch-size=4", f"--teacher={teacher}", "--dry-run"]
    ends(words, 2, "knows 3 classes")


def test_a_teacher_that_does_not_fit_into_memory(
    ends: Ends, tiny_npz: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from engine.training import make_teacher

    def build(*_: object) -> None:
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 360000000000 bytes.")

    monkeypatch.setattr(make_teacher.teachers, "build", build)
    ends(["search", *SMALL, f"--data={tiny_npz}"], 3, "does not fit into memory; use a smaller --space")


def test_a_teacher_whose_weights_are_not_numbers(ends: Ends, run: Path, tiny_npz: Path, tmp_path: Path) -> None:
    from safetensors import safe_open

    source = run / "teacher" / "teacher.safetensors"
    with safe_open(source, "np") as stored:
        card = stored.metadata()
    weights = {name: value * np.float32(np.nan) if value.dtype.kind == "f" else value
               for name, value in load_file(source).items()}  # fmt: skip
    save_file(weights, tmp_path / "nan.safetensors", card)
    ends(["search", *SMALL, f"--data={tiny_npz}", "--teacher=nan.safetensors"], 4, "diverged")


def test_a_learning_rate_that_no_network_survives(ends: Ends, tiny_npz: Path) -> None:
    ends(["search", *SMALL, f"--data={tiny_npz}", "--lr=1e30"], 4, "try a lower --lr")


SPACE = """
from engine.space import Choice, SearchSpace
def made(forward):
    def build(choices, classes, width):
        from torch import nn
        class Network(nn.Module):
            def __init__(self):
                super().__init__()
                self.head = nn.Linear(3, classes)
            def forward(self, images):
                return forward(self.head(images.mean((2, 3))), images)
        return Network()
    return SearchSpace("own", (Choice("a", (1, 2)), Choice("b", (1, 2))), build)
def broken(choices, classes, width):
    raise ValueError("no such block")
LOGITS = made(lambda logits, images: logits)
BARE = made(lambda logits, images: (logits, []))
FLAT = made(lambda logits, images: (logits, [logits]))
NARROW = made(lambda logits, images: (logits[:, :1], [images]))
RAISES = SearchSpace("own", (Choice("a", (1, 2)),), broken)
"""


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("LOGITS", "its forward must return (logits, [features])"),
        ("BARE", "features must be one or more tensors"),
        ("FLAT", "features must be one or more tensors"),
        ("NARROW", "logits are (2, 1); they must be (2, 3)"),
        ("RAISES", "raises ValueError: no such block"),
        ("NOTHING", "has no SearchSpace named 'NOTHING'"),
    ],
)
def test_a_space_that_breaks_the_contract(ends: Ends, tiny_npz: Path, tmp_path: Path, name: str, message: str) -> None:
    (tmp_path / "own.py").write_text(SPACE)
    ends(["search", *SMALL, f"--data={tiny_npz}", f"--space=own.py:{name}"], 2, message)


@pytest.mark.parametrize("code", ["import nosuchmodule\n", "SPACE = (\n", "raise SystemExit\n"])
def test_a_space_whose_file_does_not_load(ends: Ends, tmp_path: Path, code: str) -> None:
    (tmp_path / "own.py").write_text(code)
    ends(["search", *SMALL, "--data=glyphs:144", "--space=own.py:SPACE"], 2, "cannot load own.py")


def test_a_run_folder_that_cannot_be_created(ends: Ends, tiny_npz: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    for place in ("file", "file/run", "/proc/run"):
        ends(["search", *SMALL, f"--data={tiny_npz}", f"--run-dir={place}"], 3, "choose another folder (--run-dir")


def test_a_full_disk(ends: Ends, tiny_npz: Path, tmp_path: Path) -> None:
    """A file system of 64 kB: the teacher does not fit."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(disk)]
    if os.geteuid() != 0 or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("a small file system can be mounted by root only")
    try:
        ends(["search", *SMALL, f"--data={tiny_npz}", f"--run-dir={disk / 'run'}"], 3, "free space")
    finally:
        subprocess.run(["umount", "-l", str(disk)], check=True)


def test_two_searches_in_one_folder(ends: Ends, run: Path, tiny_npz: Path) -> None:
    with open(run / "journal.jsonl", "rb") as journal:
        fcntl.flock(journal, fcntl.LOCK_EX)
        ends(["search", *SMALL, f"--data={tiny_npz}", f"--run-dir={run}"], 2, "another search is running")


def test_other_settings_in_a_folder_that_holds_work(ends: Ends, run: Path, tiny_npz: Path) -> None:
    words = ["search", *SMALL, f"--data={tiny_npz}", f"--run-dir={run}"]
    ends([*words, "--lr=0.5"], 2, "lr: 0.1 there, 0.5 here")


def test_settings_of_a_call_that_failed_at_once_are_not_fixed(ends: Ends, tiny_npz: Path) -> None:
    """The first call has a wrong batch size; the second must not be refused for having another one."""
    words = ["search", *SMALL, f"--data={tiny_npz}", "--run-dir=run"]
    ends([*words, "--batch-size=500"], 2, "lower it")
    ends([*words, "--max-macs=1"], 2, "change the limits, the space or the resolution")


@pytest.mark.parametrize(
    ("file", "content", "code", "message"),
    [
        ("journal.jsonl", '{"journal":99}\n', 2, "use the version that wrote it"),
        ("journal.jsonl", '{"journal":1}\n{"asked":{"number":\n', 3, "line 2: not a line that this program wrote"),
        ("run.json", '{"schema": 99, "calls": []}', 2, "use the version that wrote it"),
        ("run.json", "{", 3, "cannot read"),
        ("config.yaml", "config: [", 3, "cannot read"),
        ("config.yaml", "a: 1", 3, "is not the configuration of a run"),
    ],
)
def test_a_run_folder_of_another_version_or_damaged(
    ends: Ends, run: Path, tiny_npz: Path, tmp_path: Path, file: str, content: str, code: int, message: str
) -> None:
    copy = again(run, tmp_path)
    (copy / file).write_text(content)
    ends(["search", *SMALL, f"--data={tiny_npz}", f"--run-dir={copy}"], code, message)


def test_a_package_that_is_missing(tmp_path: Path) -> None:
    """The usual first mistake: the environment is not active."""
    root = Path(cli.__file__).parent
    bare = [shutil.which("python3", path="/usr/bin:/usr/local/bin") or "", "-S", "-E"]
    if not bare[0]:
        pytest.skip("no Python beside that of the environment")
    done = subprocess.run([*bare, str(root / "cli.py"), "search"], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 3, done.stderr
    assert "make install" in done.stderr
    assert "Traceback" not in done.stderr
