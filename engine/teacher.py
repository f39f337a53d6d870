"""Teachers: networks to train or load, their weights on disk, and what a weights file says of itself."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from engine.space import load_space
from engine.student import place
from engine.trial import Architecture, EnvironmentUnusable, UsageError
from engine.weights import save_weights

TORCHVISION = "torchvision:"


@dataclass(frozen=True, slots=True)
class Card:
    """What a weights file says of itself.

    `network` is what `build` takes: SPACE#ARCHITECTURE or torchvision:NAME. `accuracy` is on the validation part,
    0..1; `mean` and `std` are the normalisation that the network was trained with. `losses` are the means over each
    epoch of its training; () where the weights were made elsewhere.
    """

    network: str
    classes: tuple[str, ...]
    data: str
    fingerprint: str
    resolution: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    epochs: int
    accuracy: float
    seconds: float
    losses: tuple[float, ...] = ()


class Tapped(nn.Module):
    """A torchvision classifier that returns (logits, stage features), like the networks of the spaces.

    The stages are the last map of each spatial size larger than 1x1 (by torchvision's feature extraction).
    """

    def __init__(self, model: nn.Module, resolution: int) -> None:
        super().__init__()
        from torchvision.models.feature_extraction import create_feature_extractor, get_graph_node_names

        names = get_graph_node_names(model)[1]
        probe = create_feature_extractor(model, {name: name for name in names[1:]}).eval()
        with torch.no_grad():
            shapes = {
                name: tuple(value.shape)
                for name, value in probe(torch.zeros(1, 3, resolution, resolution)).items()
                if isinstance(value, Tensor)
            }
        stages = {shape[2:]: name for name, shape in shapes.items() if len(shape) == 4 and min(shape[2:]) > 1}
        # The stem's full-size maps are no stage; four at most, as residual networks have.
        self.stages = list(stages.values())[-4:]
        if not self.stages:
            raise UsageError(
                f"{type(model).__name__} has no feature maps at {resolution} pixels; give it larger images or "
                "choose a convolutional teacher"
            )
        self.extract = create_feature_extractor(model, [*self.stages, names[-1]])
        self.head = names[-1]

    def forward(self, images: Tensor) -> tuple[Tensor, list[Tensor]]:
        out = self.extract(images)
        return out[self.head], [out[name] for name in self.stages]


def build(network: str, classes: int, resolution: int, pretrained: bool = False) -> nn.Module:
    """A network by name: SPACE#ARCHITECTURE, or torchvision:NAME (with torchvision's own weights if `pretrained`).

    Its forward returns (logits (N, classes), [stage features]). Raises UsageError for a name that does not exist,
    EnvironmentUnusable where pretrained weights cannot be had.
    """
    if not network.startswith(TORCHVISION):
        spec, _, architecture = network.partition("#")
        space = load_space(spec)
        return space.build(space.check(Architecture.parse(architecture)).choices, classes, 1.0)
    from torchvision import models

    name = network.removeprefix(TORCHVISION)
    known = models.list_models(module=models)
    if name not in known:
        raise UsageError(f"torchvision has no classification model '{name}'; it has {', '.join(known)}")
    if not pretrained:
        return Tapped(models.get_model(name, weights=None, num_classes=classes), resolution)
    weights = models.get_model_weights(name).DEFAULT
    if len(weights.meta["categories"]) != classes:
        raise UsageError(
            f"torchvision's weights of {name} know {len(weights.meta['categories'])} classes, the data has {classes}; "
            f"train it on your data first: cli.py teacher --arch {network} --data ..., then --teacher FILE"
        )
    try:
        return Tapped(models.get_model(name, weights=weights), resolution)
    except OSError as error:
        raise EnvironmentUnusable(
            f"the weights of {name} could not be downloaded ({error}); put them into torch's cache, or train a teacher"
        ) from error


def save(path: Path, network: nn.Module, card: Card) -> None:
    """Writes weights and card as one safetensors file, aside first, so that a reader never sees half of it."""
    save_weights(path, network, {"card": json.dumps(dataclasses.asdict(card))})


def read_card(path: Path) -> Card:
    """What the weights file says of itself; UsageError where it is not one of ours."""
    if not path.is_file():
        raise UsageError(f"no teacher file {path}; make one with: cli.py teacher --data ... --out {path}")
    try:
        with safe_open(path, "pt") as stored:
            metadata = stored.metadata() or {}
        values: dict[str, Any] = json.loads(metadata["card"])
        fields: dict[str, Any] = {key: tuple(v) if isinstance(v, list) else v for key, v in values.items()}
        return Card(**fields)
    except (SafetensorError, KeyError, TypeError, ValueError) as error:
        raise UsageError(
            f"{path} is no teacher of this program ({error}); make one with: cli.py teacher --data ..."
        ) from error


def load(path: Path) -> nn.Module:
    """The network of a weights file, as `build` makes it, with its weights."""
    card = read_card(path)
    network = build(card.network, len(card.classes), card.resolution)
    weights = {}
    with safe_open(path, "pt") as stored:
        for name in stored.keys():  # noqa: SIM118 (safe_open is no mapping)
            weights[name] = stored.get_tensor(name)
    network.load_state_dict(weights)
    return network


def freeze(network: nn.Module, device: torch.device) -> nn.Module:
    """A teacher ready to be asked: on the device, channels_last, in evaluation mode, without gradients."""
    return place(network, device).eval().requires_grad_(False)


def check_fits(card: Card, classes: tuple[str, ...]) -> None:
    """Raises UsageError where a teacher's classes are not those of the data, in the same order."""
    if len(card.classes) != len(classes):
        raise UsageError(
            f"the teacher knows {len(card.classes)} classes, the data has {len(classes)}; "
            "train one on this data: cli.py teacher --data ..."
        )
    if card.classes != classes:
        place = next(i for i, (a, b) in enumerate(zip(card.classes, classes, strict=True)) if a != b)
        raise UsageError(
            f"the teacher's class {place} is '{card.classes[place]}', the data's is '{classes[place]}'; "
            "the order of the classes must be the same"
        )
