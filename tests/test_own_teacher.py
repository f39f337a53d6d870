"""Imported teachers: from a file or a library, with the normalisation that they were trained with."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from engine.config import SearchConfig
from engine.networks.library import Statistics
from engine.tasks import TeacherTask, WorkerSettings, task_to_json
from engine.training import teacher
from engine.training.run_tasks import run_teacher
from engine.training.weights import load_weights, save_weights
from engine.trial import UsageError

IMAGENET = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def test_a_published_teacher_has_its_published_accuracy(tmp_path: Path, shared_data: Path) -> None:
    """The example of docs/training.md: ResNet-20 for CIFAR-10 as a user's own module, 92.5 % on these test images."""
    packed, plain = shared_data / "cifar10_small.npz", tmp_path / "small.npz"
    subprocess.run([sys.executable, str(shared_data / "unpack.py"), str(packed), str(plain)], check=True)
    images = np.load(plain)
    train = {"x_train": images["x_test"], "y_train": images["y_test"]}
    np.savez(tmp_path / "c10.npz", **train, x_test=images["x_test"][:50], y_test=images["y_test"][:50])
    weights = np.load(shared_data / "teacher_c10_resnet20.npz")
    torch.save({name: torch.from_numpy(weights[name]) for name in weights.files}, tmp_path / "resnet20.pt")
    config = SearchConfig(data=str(tmp_path / "c10.npz"), data_backend="resident", valid_fraction=0.5)
    task = TeacherTask(
        WorkerSettings(config, tmp_path, "cpu"),
        network="examples/my_teacher.py:resnet20",
        path=tmp_path / "t.safetensors",
        origin="import",
        weights=tmp_path / "resnet20.pt",
        mean=IMAGENET[0],
        std=IMAGENET[1],
    )
    assert run_teacher(task_to_json(task))["accuracy"] == pytest.approx(0.925, abs=0.02)
    card = teacher.read_card(tmp_path / "t.safetensors")
    assert (card.mean, card.std) == IMAGENET
    assert card.epochs == 0
    _, features = teacher.load(tmp_path / "t.safetensors")(torch.zeros(1, 3, 32, 32))
    assert [tuple(f.shape[1:]) for f in features] == [(16, 32, 32), (32, 16, 16), (64, 8, 8)]


def test_a_teacher_sees_images_normalised_as_in_its_training() -> None:
    pixels = torch.rand(2, 3, 32, 32)
    here, there = ((0.1, 0.2, 0.3), (0.5, 0.6, 0.7)), IMAGENET
    network = teacher.build("torchvision:resnet18", 5, 32).eval()

    def normalised(statistics: Statistics) -> torch.Tensor:
        mean, std = (torch.tensor(values).view(1, 3, 1, 1) for values in statistics)
        return (pixels - mean) / std

    with torch.no_grad():
        logits, features = teacher.renormalised(network, here, there)(normalised(here))
        expected, _ = network(normalised(there))
    torch.testing.assert_close(logits, expected, atol=1e-4, rtol=1e-4)
    assert len(features) == 4
    assert teacher.renormalised(network, here, here) is network


OWN = """
from torch import nn

class Own(nn.Module):
    def __init__(self, classes):
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 4, 3, 2, 1), nn.Conv2d(4, 8, 3, 2, 1)
        self.head = nn.Linear(8, classes)

    def forward(self, images):
        a = self.first(images)
        b = self.second(a)
        logits = self.head(b.mean((2, 3)))
        return {returned}

class Branching(Own):
    def forward(self, images):
        a = self.first(images)
        return self.head(self.second(a).mean((2, 3)))  if a.sum() > 0 else self.head(self.second(a).amax((2, 3)))

class Permuting(Own):
    def forward(self, images):
        a = self.first(images).permute(0, 2, 3, 1).contiguous()
        return self.head(self.second(a.permute(0, 3, 1, 2)).mean((2, 3)))

def fixed(classes):
    return Own(7)

nothing = 3
"""


def own(tmp_path: Path, returned: str = "logits") -> str:
    (tmp_path / "own.py").write_text(OWN.format(returned=returned))
    return f"{tmp_path / 'own.py'}:Own"


@pytest.mark.parametrize("returned", ["logits", "(logits, [a, b])"])
def test_stages_are_found_or_given(returned: str, tmp_path: Path) -> None:
    _, features = teacher.build(own(tmp_path, returned), 5, 16)(torch.zeros(2, 3, 16, 16))
    assert [tuple(f.shape[1:]) for f in features] == [(4, 8, 8), (8, 4, 4)]


def test_stages_are_found_in_networks_that_cannot_be_traced(tmp_path: Path) -> None:
    """As timm's with dynamic padding, which compute with the size of their input."""
    _, features = teacher.build(own(tmp_path).replace(":Own", ":Branching"), 5, 16)(torch.zeros(2, 3, 16, 16))
    assert [tuple(f.shape[1:]) for f in features] == [(4, 8, 8), (8, 4, 4)]


def test_maps_with_channels_last_are_not_stages(tmp_path: Path) -> None:
    """As in ConvNeXt between its convolutions."""
    _, features = teacher.build(own(tmp_path).replace(":Own", ":Permuting"), 5, 16)(torch.zeros(2, 3, 16, 16))
    assert [tuple(f.shape[1:]) for f in features] == [(4, 8, 8), (8, 4, 4)]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("fixed", r"gives \(1, 7\) for one image; the data has 5 classes"),
        ("nothing", "has no function 'nothing' that takes the number of classes and returns a torch.nn.Module"),
        ("absent", "has no function 'absent' that takes"),
    ],
)
def test_an_unusable_teacher_is_refused_with_the_reason(name: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=message):
        teacher.build(own(tmp_path).replace(":Own", f":{name}"), 5, 16)


def test_weights_of_another_network_are_refused(tmp_path: Path) -> None:
    torch.save({"first.weight": torch.zeros(3)}, tmp_path / "w.pt")
    with pytest.raises(UsageError, match="does not hold weights of this network"):
        teacher.build(own(tmp_path), 5, 16, weights=tmp_path / "w.pt")

    class Evil:
        def __reduce__(self) -> tuple[object, tuple[str]]:
            return print, ("never",)

    torch.save({"first.weight": Evil()}, tmp_path / "w.pt")
    with pytest.raises(UsageError, match="does not hold weights"):
        teacher.build(own(tmp_path), 5, 16, weights=tmp_path / "w.pt")
    (tmp_path / "w.pt").write_bytes(b"")
    with pytest.raises(UsageError, match="does not hold weights"):
        teacher.build(own(tmp_path), 5, 16, weights=tmp_path / "w.pt")
    with pytest.raises(UsageError, match="no weights file"):
        teacher.build(own(tmp_path), 5, 16, weights=tmp_path / "none.pt")


def test_tied_weights_are_saved_and_loaded(tmp_path: Path) -> None:
    network = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Linear(4, 4))
    network[1].weight = network[0].weight
    save_weights(tmp_path / "w.safetensors", network)
    other = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Linear(4, 4))
    load_weights(tmp_path / "w.safetensors", other)
    assert torch.equal(other[1].weight, network[0].weight)


def test_a_teacher_of_timm() -> None:
    pytest.importorskip("timm", reason="timm is an optional extra: pip install -e '.[timm]'")
    logits, features = teacher.build("timm:resnet10t", 5, 64)(torch.zeros(2, 3, 64, 64))
    assert logits.shape == (2, 5)
    assert [f.shape[-1] for f in features] == [16, 8, 4, 2]
    with pytest.raises(UsageError, match="timm has no model 'resnet10'; similar names:"):
        teacher.build("timm:resnet10", 5, 64)
