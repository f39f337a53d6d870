from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from engine.training import teacher
from engine.trial import UsageError

SPACE = "nasbench201:channels=4,cells=1"


def card(network: str, classes: tuple[str, ...] = ("a", "b")) -> teacher.Card:
    return teacher.Card(network, classes, "d", "f", 32, (0.5,) * 3, (0.2,) * 3, 1, 0.5, 1.0)


@pytest.mark.parametrize("network", [f"{SPACE}#3-1-0-2-4-3", "torchvision:resnet18"])
def test_a_saved_teacher_gives_the_same_answers(network: str, tmp_path: Path) -> None:
    built = teacher.build(network, classes=2, resolution=32)
    teacher.save(tmp_path / "t.safetensors", built, card(network))
    loaded = teacher.freeze(teacher.load(tmp_path / "t.safetensors"), torch.device("cpu"))
    images = torch.randn(2, 3, 32, 32)
    logits, features = loaded(images)
    expected, _ = built.eval()(images)
    torch.testing.assert_close(logits, expected)
    assert teacher.read_card(tmp_path / "t.safetensors") == card(network)
    assert not any(p.requires_grad for p in loaded.parameters())
    assert [f.shape[-1] for f in features] == sorted((f.shape[-1] for f in features), reverse=True)


def test_the_features_of_a_torchvision_network_are_the_last_maps_of_each_size() -> None:
    network = teacher.build("torchvision:resnet18", classes=7, resolution=64)
    logits, features = network(torch.randn(2, 3, 64, 64))
    assert logits.shape == (2, 7)
    assert [tuple(f.shape[1:]) for f in features] == [(64, 16, 16), (128, 8, 8), (256, 4, 4), (512, 2, 2)]


@pytest.mark.parametrize(
    ("network", "message"),
    [
        ("torchvision:resnet19", "no classification model 'resnet19'"),
        (f"{SPACE}#3-1", "has 2 choices"),
        ("no#1", "no space"),
    ],
)
def test_a_network_that_does_not_exist_is_refused(network: str, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        teacher.build(network, classes=2, resolution=32)


def test_classes_must_be_those_of_the_data() -> None:
    teacher.check_fits(card("n"), ("a", "b"))
    with pytest.raises(UsageError, match="knows 2 classes, the data has 3"):
        teacher.check_fits(card("n"), ("a", "b", "c"))
    with pytest.raises(UsageError, match="class 1 is 'b', the data's is 'c'"):
        teacher.check_fits(card("n"), ("a", "c"))


def test_a_file_that_is_not_a_teacher_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no teacher file"):
        teacher.read_card(tmp_path / "none.safetensors")
    (tmp_path / "text.safetensors").write_text("hello")
    with pytest.raises(UsageError, match="is not a teacher file"):
        teacher.read_card(tmp_path / "text.safetensors")
    save_file({"w": torch.zeros(1)}, tmp_path / "bare.safetensors")
    with pytest.raises(UsageError, match="is not a teacher file"):
        teacher.read_card(tmp_path / "bare.safetensors")
