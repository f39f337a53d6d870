"""Every exported format gives the logits of the checkpoint, in a process without our code too."""

from __future__ import annotations

import hashlib
import json
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import numpy as np
import onnxruntime
import pytest
import torch
from PIL import Image

from engine.data.dataset import Dataset, Split
from engine.data.loader import eval_batches
from engine.export import formats
from engine.export.card import with_onnx
from engine.run_folder import RunFolder
from engine.spaces.load import load_space
from engine.tasks import ExportTask, Normalisation, task_to_json
from engine.training.weights import load_weights, save_weights
from engine.trial import Architecture, EngineError, Fidelity, Trial, UsageError

SPACES = {
    "nasbench201:channels=4,cells=1": "4-3-2-1-3-0",
    "mobilenetv2:width=0.1": "0-1-1-0-0-1-0-0-0-0-0-0-0-1",
    "shufflenetv2:width=0.1": "0-0-0-1-0-2",
    "examples/my_space.py:SPACE": "1-0-0-0-1-1-0-0-2",
    "pretrained:torchvision:mobilenet_v3_small": "7-1-1-1-1-0-1-3-0",
    "pretrained:torchvision:resnet18": "7-2-1-1-0-2-1-3-0",
}
CLASSES = ("a", "b", "c", "d", 'e "quoted"')


def task_of(run: Path, spec: str, architecture: str) -> ExportTask:
    """The export of a network whose running statistics have seen some images."""
    space, trial = load_space(spec), Trial(0, Architecture.parse(architecture), Fidelity("high"))
    torch.manual_seed(0)
    network = space.build(trial.architecture.choices, len(CLASSES), 1.0)
    with torch.no_grad():
        for _ in range(20):
            network(torch.randn(8, 3, 16, 16))
    save_weights(RunFolder(run).weights(trial), network)
    return ExportTask(
        run_dir=run,
        trial=trial,
        space=spec,
        teacher=run / "none",
        out=run / "out",
        normalisation=Normalisation(CLASSES, (0.4, 0.5, 0.6), (0.2, 0.25, 0.3)),
        resolution=16,
        device="cpu",
        card={
            "title": f"{spec} {architecture}",
            "data": "photos",
            "images": "5,000 train, 1,000 valid; passed over 1: a|b.psd (not read; convert it to JPEG)",
            "valid_accuracy": 0.9125,
            "test_accuracy": None,
            "search_test_accuracy": None,
            "search_training": "",
            "training": "60 epochs",
            "distillation": "none",
            "files": False,
            "run": "photos",
            "command": "cli.py search",
            "trained_with": {"torch": "2.15.0"},
            "trained_on": "cpu",
        },
    )


def run_export(task: ExportTask) -> dict[str, Any]:
    return formats.run_export(json.loads(json.dumps(task_to_json(task))))


def logits(task: ExportTask, images: torch.Tensor) -> torch.Tensor:
    network = load_space(task.space).build(task.trial.architecture.choices, len(CLASSES), 1.0)
    load_weights(RunFolder(task.run_dir).weights(task.trial), network)
    with torch.no_grad():
        answer: torch.Tensor = network.eval()(images)[0]
    return answer


ALONE = """
import sys, torch
sys.path.insert(0, sys.argv[1])
from model import ARCHITECTURE, CLASSES, Model, load, preprocess
pixels = torch.load("pixels.pt", weights_only=True)
torch.save(load()(preprocess(pixels)).detach(), "logits.pt")
Model()(preprocess(pixels)).sum().backward()  # can be trained further
assert not {"engine", "safetensors", "torchvision"} & set(sys.modules), sys.modules.keys()
"""


@pytest.mark.parametrize("spec", SPACES)
def test_every_format_gives_the_logits_of_the_checkpoint(spec: str, tmp_path: Path) -> None:
    task = task_of(tmp_path, spec, SPACES[spec])
    report = run_export(task)
    out = Path(report["folder"])
    assert {path.name for path in out.iterdir()} == {
        "README.md", "export.json", "model.onnx", "model.pt2", "model.py", "weights.safetensors",
    }  # fmt: skip
    assert set(report["differences"]) == {"model.py", "model.pt2", "model.onnx"}
    assert max(report["differences"].values()) <= 1e-4
    record = json.loads((out / "export.json").read_text())
    checkpoint = RunFolder(tmp_path).weights(task.trial).read_bytes()
    assert record["weights_sha256"] == hashlib.sha256(checkpoint).hexdigest()
    assert record["latency_ms"] == report["latency_ms"]
    assert {*record["files"], "export.json"} == {path.name for path in out.iterdir()}
    pixels = torch.randint(0, 256, (4, 3, 16, 16), generator=torch.Generator().manual_seed(1))
    mean, std = (torch.tensor(v).view(1, 3, 1, 1) for v in (task.normalisation.mean, task.normalisation.std))
    images = (pixels / 255 - mean) / std
    truth = logits(task, images)
    assert truth.std() > 1e-3  # it depends on the image
    elsewhere = formats._import(out / "model.py").preprocess(pixels.to("meta"))
    assert elsewhere.device.type == "meta"  # where the pixels are, as on a GPU
    session = onnxruntime.InferenceSession(out / "model.onnx", providers=["CPUExecutionProvider"])
    facts = {key: json.loads(text) for key, text in session.get_modelmeta().custom_metadata_map.items()}
    assert facts == {
        "classes": list(CLASSES), "resolution": 16, "mean": [0.4, 0.5, 0.6], "std": [0.2, 0.25, 0.3],
        "shorter_side": None,
    }  # fmt: skip
    for batch in (1, 4):
        (found,) = session.run(["logits"], {"images": images[:batch].numpy()})
        np.testing.assert_allclose(found, truth[:batch], atol=1e-4)
    if (
        "mobilenet" not in spec and "shuffle" not in spec
    ):  # a process takes seconds, and model.py is made in the same way
        torch.save(pixels, tmp_path / "pixels.pt")
        subprocess.run([sys.executable, "-I", "-c", ALONE, str(out)], check=True, cwd=tmp_path)
        torch.testing.assert_close(torch.load(tmp_path / "logits.pt", weights_only=True), truth, atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    ("files", "shape"),
    [(False, (32, 32)), (False, (19, 19)), (True, (32, 32)), (True, (60, 45)), (True, (45, 60)), (True, (61, 33))],
)
def test_the_card_prepares_an_image_for_onnxruntime_as_the_loader_does(
    files: bool, shape: tuple[int, int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    row, column = np.indices(shape) / max(shape)
    edge = np.where(row > column, 255, 0)  # where resizing filters differ most
    pixels = np.stack([row * 255, column * 255, edge], axis=2).astype(np.uint8)
    for name in ("image.png", "image.jpg"):
        Image.fromarray(pixels).save(tmp_path / name, format="PNG")
    images, paths = (None, (str(tmp_path / "image.png"),)) if files else (pixels[None], None)
    split = Split(np.zeros(1, np.int64), images, paths)
    mean, std = (0.4, 0.5, 0.6), (0.2, 0.25, 0.3)
    data = Dataset("one", split, split, split, ("a",), mean, std, 28, False)
    (batch,) = eval_batches(split, data=data, batch_size=1, resolution=28)

    session = Mock(**{"run.return_value": [np.zeros((1, 1))]})
    facts = {"classes": ["a"], "mean": mean, "std": std}
    session.get_modelmeta().custom_metadata_map = {name: json.dumps(value) for name, value in facts.items()}
    monkeypatch.setattr(onnxruntime, "InferenceSession", Mock(return_value=session))
    monkeypatch.chdir(tmp_path)
    exec(with_onnx(28, files).strip().removeprefix("```python").removesuffix("```"), {})
    (found,) = (call.args[1]["images"] for call in session.run.call_args_list)
    grey = 255 * np.array(std).reshape(3, 1, 1) * (found - batch.images.numpy())
    assert np.abs(grey).mean((0, 2, 3)).max() < 0.5  # a pixel is 4 to 14 grey values; another filter differs by over 1


OWN = """
import numpy as np
from engine.space import Choice, SearchSpace

def build(choices, classes, width):
    from torch import nn
    from engine.networks import Staged, conv_bn, pooled_classifier
    channels = int(np.array([8, 16])[choices[0]])
    return Staged(nn.Identity(), [conv_bn(3, channels, 3, 2)], pooled_classifier(channels, classes))

SPACE = SearchSpace("own", (Choice("channels", (8, 16)),), build)
"""


@pytest.fixture
def own(tmp_path: Path) -> ExportTask:
    """The export of a tiny network of a user's space whose file needs numpy."""
    (tmp_path / "own.py").write_text(OWN)
    return task_of(tmp_path, f"{tmp_path / 'own.py'}:SPACE", "1")


def test_a_space_that_needs_more_than_torch_is_exported_without_model_py(own: ExportTask) -> None:
    older = own.out
    older.mkdir()
    for name in ("README.md", "model.py", "weights.safetensors"):
        (older / name).write_text("of an earlier export")
    report = run_export(own)
    assert report["no_model_py"] == "own.py imports numpy"
    assert {path.name for path in own.out.iterdir()} == {
        "README.md", "export.json", "model.onnx", "model.pt2", "weights.safetensors",
    }  # fmt: skip
    card = (own.out / "README.md").read_text()
    assert "no `model.py`: own.py imports numpy" in card
    facts = (
        "91.25 %", "not measured", "5,000 train, 1,000 valid; passed over 1: a\\|b.psd", "0.4, 0.5, 0.6", 'e "quoted"',
        f"{report['macs']:,}",
    )
    for text in facts:
        assert text in card, text


def test_an_export_replaces_only_an_earlier_export(
    own: ExportTask, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It refuses the working directory, an export with notes in it, a user's file, and what a link leads to."""
    here, export_with_notes, link = tmp_path / "here", tmp_path / "phone", tmp_path / "link"
    for folder in (here, export_with_notes):
        folder.mkdir()
        for name in ("README.md", "weights.safetensors"):
            (folder / name).write_text("of an earlier export")
    (export_with_notes / "notes.txt").write_text("mine")
    link.symlink_to(export_with_notes)
    monkeypatch.chdir(here)
    before = sorted(tmp_path.rglob("*"))
    for out, message in (
        (here, f"you are in {here}; give --out a folder that is new, empty, or an earlier export"),
        (tmp_path, f"you are in {tmp_path}; give --out a folder"),
        (export_with_notes, "holds notes.txt, which would be lost; give --out a folder"),
        (link, f"{export_with_notes} holds notes.txt, which would be lost; give --out a folder"),
        (export_with_notes / "notes.txt", "notes.txt is a file; give --out a folder"),
    ):
        with pytest.raises(UsageError, match=re.escape(message)):
            run_export(replace(own, out=out))
    assert sorted(tmp_path.rglob("*")) == before


def test_a_format_with_other_logits_is_an_error_and_leaves_no_files(
    own: ExportTask, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = formats.to_onnx

    def wrong(program: Any, task: Any, path: Path) -> Any:
        network = load_space(own.space).build((1,), len(CLASSES), 1.0)
        return real(formats.exported(formats.Logits(network).eval(), task.resolution), task, path)

    monkeypatch.setattr(formats, "to_onnx", wrong)
    with pytest.raises(EngineError, match=r"model.onnx differs from the checkpoint of 1 by"):
        run_export(own)
    assert not own.out.exists()
    assert not list(own.run_dir.glob(".*"))


def test_a_network_that_cannot_be_exported_is_refused_with_the_reason(tmp_path: Path) -> None:
    task = task_of(tmp_path, "nasbench201:channels=4,cells=1", "4-3-2-1-3-0")
    with pytest.raises(UsageError, match="does not hold weights of this network"):
        run_export(replace(task, space="nasbench201:channels=8,cells=1"))

    class Branching(torch.nn.Module):
        def forward(self, images: torch.Tensor) -> torch.Tensor:
            return images.mean((2, 3)) if images.sum() > 0 else images.amax((2, 3))

    with pytest.raises(UsageError, match="torch.export cannot trace this network"):
        formats.exported(Branching(), 16)  # type: ignore[arg-type]
