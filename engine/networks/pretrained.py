"""A library's network as the largest member of a space of cuts: its graph, its stages, and what its cuts cost."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from torch import fx, nn

from engine.networks import library
from engine.networks.anatomy import REFERENCE, Stage, add_features, anatomy, has_blocks
from engine.networks.cost import count_cost
from engine.networks.cut import Cut, FloatArray, costs, cut
from engine.networks.plain import plain
from engine.trial import UsageError

CAN_BE_CUT = (
    "networks of inverted residual, MBConv, basic or bottleneck blocks can: EfficientNet, MobileNet V2 to V4, MnasNet, "
    "ResNet and their like"
)


@dataclass(frozen=True, eq=False)
class Template:
    """A network, uncut, and its stages. Its forward returns (logits, [the last feature of each size])."""

    network: fx.GraphModule
    stages: tuple[Stage, ...]


@lru_cache(maxsize=2)
def template(name: str, classes: int) -> Template:
    """The network torchvision:NAME or timm:NAME with random weights; UsageError if it cannot be cut."""
    made = _traced(name, library.network(name, classes))
    count = len(made.stages)
    whole, smallest = Cut(1.0, (1.0,) * count, tuple(map(len, made.stages))), Cut(1.0, (0.5,) * count, (1,) * count)
    for what in (whole, smallest):
        if _closed_form(name, made, what) != count_cost(cut(made.network, made.stages, what), REFERENCE):
            raise UsageError(f"{name} cannot be cut: some of its operations are not convolutions; {CAN_BE_CUT}")
    return made


def _closed_form(name: str, made: Template, what: Cut) -> tuple[int, int]:
    """(MACs, parameters) of a cut at REFERENCE pixels, by `costs`."""
    outside, tables = cut_costs(name, made, (REFERENCE,), [(width,) for width in what.widths])
    stages = [table[:, 0, 0, blocks - 1] for table, blocks in zip(tables, what.repeats, strict=True)]
    macs, params, _ = sum(stages, outside[:, 0])
    return int(macs), int(params)


def start(name: str, classes: int, weights: Path | None) -> fx.GraphModule:
    """The uncut network with the weights of its library, or those in a file, and a classifier for `classes`."""
    return _traced(name, library.network(name, classes, pretrained=weights is None, weights=weights)).network


def _traced(name: str, made: nn.Module) -> Template:
    stages: tuple[Stage, ...] = ()
    try:
        if has_blocks(made):
            network = plain(made)
            stages = anatomy(network, made)
    except Exception as error:  # a library's network may do anything
        reason = f"{type(error).__name__}: {error}".splitlines()[0][:200]
        raise UsageError(f"{name} cannot be cut, because it cannot be traced ({reason}); {CAN_BE_CUT}") from error
    if not any(len(stage) > 1 or stage[0].groups for stage in stages):
        raise UsageError(f"{name} cannot be cut: it has no residual blocks of convolutions; {CAN_BE_CUT}")
    add_features(network, stages)
    return Template(network, stages)


def cut_costs(
    name: str, whole: Template, sides: tuple[int, ...], widths: Sequence[Sequence[float]]
) -> tuple[FloatArray, list[FloatArray]]:
    """`costs` of a template; UsageError for images that are too small for it."""
    try:
        return costs(whole.network, whole.stages, sides, widths)
    except RuntimeError as error:
        raise UsageError(f"{name} cannot take images of {min(sides)} pixels; give a larger --resolution") from error


def untrained(whole: Template, what: Cut) -> fx.GraphModule:
    """A cut with new weights, drawn from torch's default generator by each layer's own rule."""
    network = cut(whole.network, whole.stages, what)
    for module in network.modules():
        if isinstance(module, nn.Conv2d | nn.BatchNorm2d | nn.Linear):
            module.reset_parameters()
    return network

