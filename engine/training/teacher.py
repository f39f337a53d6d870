"""Teachers: building and loading their networks, their weights files, and the card in a weights file."""

from __future__ import annotations

import contextlib
import dataclasses
import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from engine.config import is_library_model
from engine.networks import library
from engine.networks.library import Statistics
from engine.spaces.load import from_file, load_space
from engine.training.student import place
from engine.training.weights import load_weights, save_weights
from engine.trial import Architecture, UsageError


@dataclass(frozen=True, slots=True)
class Card:
    """The description of a teacher in its weights file.

    `network` is the argument of `build`: SPACE#ARCHITECTURE, torchvision:NAME, timm:NAME or FILE.py:NAME. `accuracy`
    is on the validation split, 0..1; `mean` and `std` are the normalisation that the network was trained with. `losses`
    holds the mean loss of each epoch of its training, and `accuracies` the validation accuracy after it (None where it
    was not measured); () if the weights were trained elsewhere.
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
    accuracies: tuple[float | None, ...] = ()


class FeatureExtractor(nn.Module):
    """A classifier that returns only logits, made to return (logits, stage features) like the networks of the spaces.

    The features are the last map of each spatial size larger than 1x1, among the outputs of all modules. Hooks
    see them: networks with control flow, such as timm's with dynamic padding, cannot be traced.
    """

    def __init__(self, model: nn.Module, resolution: int) -> None:
        super().__init__()
        self.model = model
        shapes: dict[str, list[torch.Size]] = {}
        with _hooks({name: partial(_note_shape, shapes, name) for name, _ in model.named_modules() if name}, model):
            training, _ = model.training, model.eval()
            with torch.no_grad():
                model(torch.zeros(1, 3, resolution, resolution))
            model.train(training)
        # A module that is called several times has several outputs. A map with unequal last dimensions is (N, H, W, C),
        # as some networks have between layers: images are square.
        single = {name: seen[0] for name, seen in shapes.items() if len(seen) == 1}
        stages = {size[2:]: name for name, size in single.items() if len(size) == 4 and size[2] == size[3] > 1}
        # At most four stages, as in residual networks; full-size maps of the stem are left out.
        self.stages = sorted(stages.values(), key=list(single).index)[-4:]
        if not self.stages:
            raise UsageError(
                f"{type(model).__name__} has no feature maps at {resolution} pixels; use a larger --resolution or "
                "choose a convolutional teacher"
            )

    def forward(self, images: Tensor) -> tuple[Tensor, list[Tensor]]:
        found: dict[str, Tensor] = {}
        with _hooks({name: partial(found.__setitem__, name) for name in self.stages}, self.model):
            logits: Tensor = self.model(images)
        return logits, [found[name] for name in self.stages]


@contextlib.contextmanager
def _hooks(receivers: Mapping[str, Callable[[Any], None]], model: nn.Module) -> Iterator[None]:
    """Gives the outputs of submodules to the functions of their names, within the block."""

    def hook(receive: Callable[[Any], None]) -> Callable[..., None]:
        return lambda module, arguments, output: receive(output)

    handles = [model.get_submodule(name).register_forward_hook(hook(f)) for name, f in receivers.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _note_shape(shapes: dict[str, list[torch.Size]], name: str, output: Any) -> None:
    """Appends the shape of a tensor to those of its module, in the order of the last calls."""
    if isinstance(output, Tensor):
        shapes[name] = [*shapes.pop(name, []), output.shape]


class Renormalised(nn.Module):
    """A network whose training mean and std differ from those of its input."""

    scale: Tensor
    shift: Tensor

    def __init__(self, network: nn.Module, here: Statistics, there: Statistics) -> None:
        super().__init__()
        self.network = network
        (mean, std), (other_mean, other_std) = (map(torch.tensor, statistics) for statistics in (here, there))
        self.register_buffer("scale", (std / other_std).view(1, -1, 1, 1), persistent=False)
        self.register_buffer("shift", ((mean - other_mean) / other_std).view(1, -1, 1, 1), persistent=False)

    def forward(self, images: Tensor) -> tuple[Tensor, list[Tensor]]:
        output: tuple[Tensor, list[Tensor]] = self.network(images * self.scale + self.shift)
        return output


def renormalised(network: nn.Module, here: Statistics, there: Statistics) -> nn.Module:
    """The network for images normalised with the mean and std of `here`, if it was trained with those of `there`."""
    return network if here == there else Renormalised(network, here, there)


def build(
    network: str, classes: int, resolution: int, pretrained: bool = False, weights: Path | None = None
) -> nn.Module:
    """A network by name: SPACE#ARCHITECTURE, torchvision:NAME, timm:NAME, or FILE.py:NAME, a function of the number of
    classes in a user's file.

    Its weights are random, or those in the file `weights`. If `pretrained`, a library's network or the largest member
    of a pretrained space has its library's weights, or those in `weights`, which may be for other classes, and then
    gets a new classifier.

    Its forward returns (logits (N, classes), [stage features]). Raises UsageError for an unknown name or weights that
    do not fit, EnvironmentUnusable if pretrained weights or timm are not available.
    """
    if pretrained:
        model = _pretrained(network, classes, weights)
    else:
        model = _create(network, classes)
        if weights is not None:
            load_weights(weights, model)
    with torch.no_grad():
        training, _ = model.training, model.eval()
        output = _example_output(model, network, resolution)
        model.train(training)
    logits = output if isinstance(output, Tensor) else output[0]
    if logits.shape != (1, classes):
        raise UsageError(
            f"{network} gives {tuple(logits.shape)} for one image; the data has {classes} classes, so it must give "
            f"(1, {classes})"
        )
    return FeatureExtractor(model, resolution) if isinstance(output, Tensor) else model


def _example_output(model: nn.Module, network: str, resolution: int) -> Tensor | tuple[Tensor, list[Tensor]]:
    try:
        output = model(torch.zeros(1, 3, resolution, resolution))
    except Exception as error:
        raise UsageError(
            f"{network} fails on an image of {resolution} pixels ({_first_line(error)}); choose another --resolution "
            "or another teacher"
        ) from error
    if isinstance(output, Tensor):
        return output
    logits, features = output
    return logits, list(features)


def _pretrained(network: str, classes: int, weights: Path | None) -> nn.Module:
    """A library's network, or the largest member of a space, with pretrained weights."""
    if is_library_model(network):
        return library.network(network, classes, pretrained=True, weights=weights)
    start = load_space(network.partition("#")[0]).start if "#" in network else None
    if start is None:
        raise UsageError(f"{network} has no pretrained weights; train it from scratch, or import --weights FILE for it")
    return start(classes, weights)


def _create(network: str, classes: int) -> nn.Module:
    """The network with random weights, as its library, space or file makes it."""
    if "#" in network:
        spec, _, architecture = network.partition("#")
        space = load_space(spec)
        return space.build(space.check(Architecture.parse(architecture)).choices, classes, 1.0)
    if is_library_model(network):
        return library.network(network, classes)
    path, _, name = network.rpartition(":")
    made = from_file(Path(path), name)
    model = made(classes) if callable(made) and not isinstance(made, nn.Module) else made
    if not isinstance(model, nn.Module):
        raise UsageError(
            f"{path} has no function '{name}' that takes the number of classes and returns a torch.nn.Module"
        )
    return model


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".splitlines()[0][:300]


def save(path: Path, network: nn.Module, card: Card) -> None:
    """Writes weights and card as one safetensors file, atomically."""
    save_weights(path, network, {"card": json.dumps(dataclasses.asdict(card))})


def read_card(path: Path) -> Card:
    """The card in a weights file; UsageError if the file has none."""
    if not path.is_file():
        raise UsageError(f"no teacher file {path}; make one with: cli.py teacher --data ... --out {path}")
    try:
        with safe_open(path, "pt") as stored:
            metadata = stored.metadata() or {}
        values: dict[str, Any] = json.loads(metadata["card"])
        fields: dict[str, Any] = {key: tuple(v) if isinstance(v, list) else v for key, v in values.items()}
        return Card(**fields)
    except (SafetensorError, KeyError, TypeError, ValueError) as error:
        raise UsageError(f"{path} is not a teacher file ({error}); make one with: cli.py teacher --data ...") from error


def load(path: Path) -> nn.Module:
    """The network of a weights file, as `build` makes it, with its weights."""
    card = read_card(path)
    network = build(card.network, len(card.classes), card.resolution)
    weights = {}
    with safe_open(path, "pt") as stored:
        for name in stored.keys():  # noqa: SIM118 (safe_open is not a mapping)
            weights[name] = stored.get_tensor(name)
    network.load_state_dict(weights)
    return network


def freeze(network: nn.Module, device: torch.device) -> nn.Module:
    """A teacher ready for use: on the device, channels_last, in evaluation mode, without gradients."""
    return place(network, device).eval().requires_grad_(False)


def check_fits(card: Card, classes: tuple[str, ...]) -> None:
    """Raises UsageError unless a teacher's classes are those of the data, in the same order."""
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
