"""Cuts members out of a plain network: fewer blocks a stage, fewer hidden channels, smaller input; and what they cost.

C channels, H W size in pixels.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, fx, nn

from engine.networks.anatomy import Block, Group, Stage, shapes_of
from engine.networks.plain import cleaned

FloatArray = npt.NDArray[np.float64]
STEP = 8  # kept channels are multiples of this, which suits vector units


@dataclass(frozen=True)
class Cut:
    """What is left of a network: the share of the input's side, and for each stage the share of the hidden channels and
    the number of blocks."""

    side: float
    widths: tuple[float, ...]
    repeats: tuple[int, ...]


def kept_channels(channels: int, width: float) -> int:
    """How many of a group's channels a width keeps."""
    return channels if width == 1 else min(channels, max(STEP, STEP * round(channels * width / STEP)))


def cut(network: nn.Module, stages: Sequence[Stage], what: Cut) -> fx.GraphModule:
    """A copy of a network without the last blocks of its stages and the least important hidden channels.

    Removed blocks add nothing to the residual stream; for the importance of a channel see `importance`.
    """
    assert isinstance(network, fx.GraphModule)
    smaller = copy.deepcopy(network)
    smaller.get_submodule("downsample").share = what.side  # type: ignore[assignment]
    nodes = {node.name: node for node in smaller.graph.nodes}
    for stage, width, repeats in zip(stages, what.widths, what.repeats, strict=True):
        for block in stage[:repeats]:
            for group in block.groups:
                _narrow(smaller, group, kept_channels(group.channels, width))
        if repeats < len(stage):
            nodes[stage[-1].output].replace_all_uses_with(nodes[stage[repeats].source])
    return cleaned(smaller)


def _narrow(network: fx.GraphModule, group: Group, kept: int) -> None:
    if kept == group.channels:
        return
    keep = importance(network, group).topk(kept).indices.sort().values
    for name in group.producers:
        _select(network.get_submodule(name), keep, "out")
    for name in group.tied:
        _select(network.get_submodule(name), keep, "tied")
    for name in group.consumers:
        _select(network.get_submodule(name), keep, "in")


def importance(network: fx.GraphModule, group: Group) -> Tensor:
    """How much each channel (C,) of a group changes what is computed from it: the variance of its activation, times the
    squared norm of the weights that read it.

    The next BatchNorm absorbs a constant, so only the variance counts. It follows from the BatchNorm before the
    activation, whose output has mean beta and standard deviation gamma; a ReLU of a normal variable stands for every
    activation. On cuts of a fine-tuned EfficientNet-Lite0 this kept far more accuracy than norms of weights or scales
    (docs/pretrained.md).
    """
    read = torch.zeros(group.channels)
    for name in group.consumers:
        read += network.get_parameter(f"{name}.weight").detach().float().square().sum(dim=(0, 2, 3)).cpu()
    norms = [layer for name in group.tied if isinstance(layer := network.get_submodule(name), nn.BatchNorm2d)]
    if not norms or not norms[-1].affine:
        return read
    mean, std = norms[-1].bias.detach().float().cpu(), norms[-1].weight.detach().float().abs().cpu() + 1e-6
    normal = torch.distributions.Normal(0.0, 1.0)
    above, density = normal.cdf(mean / std), torch.exp(normal.log_prob(mean / std))
    first = mean * above + std * density
    second = (mean**2 + std**2) * above + mean * std * density
    return read * (second - first**2).clamp_min(0)


def _select(layer: nn.Module, keep: Tensor, side: str) -> None:
    """Keeps the channels `keep` of a layer's output ("out"), input ("in"), or of both ("tied")."""
    axis = 1 if side == "in" else 0
    for name, value in [*layer.named_parameters(), *layer.named_buffers()]:
        if value.ndim and (axis == 0 or value.ndim > 1):
            chosen = value.detach().index_select(axis, keep.to(value.device)).clone()
            kind = value.requires_grad
            setattr(layer, name, nn.Parameter(chosen, kind) if isinstance(value, nn.Parameter) else chosen)
    count = len(keep)
    if isinstance(layer, nn.BatchNorm2d):
        layer.num_features = count
        return
    assert isinstance(layer, nn.Conv2d)
    if side != "in":
        layer.out_channels = count
    if side != "out":
        layer.in_channels = count
    if side == "tied":
        layer.groups = count


def costs(
    network: fx.GraphModule, stages: Sequence[Stage], sides: Sequence[int], widths: Sequence[Sequence[float]]
) -> tuple[FloatArray, list[FloatArray]]:
    """What the cuts of a network cost: (MACs, parameters, activations) of everything outside the blocks (3, R), and of
    each stage (3, R, W, B), for R input sides in pixels, W widths of the stage and 1 to B of its blocks.

    The cost of a cut is their sum, since cutting a stage changes no other one.
    """
    sizes = [shapes_of(network, side) for side in sides]
    made_by = {str(node.target): node.name for node in network.graph.nodes if node.op in ("call_module", "get_attr")}
    modules = dict(network.named_modules())
    in_blocks = {name for stage in stages for block in stage for name in block.layers}

    def cost(name: str, kept: dict[str, tuple[int, int]]) -> FloatArray:
        layer = modules[name] if name in modules else network.get_parameter(name)
        areas = [shapes[made_by[name]][2:].numel() for shapes in sizes]
        return np.stack([_layer_cost(layer, area, kept.get(name, (0, 0))) for area in areas], axis=1)

    zero = np.zeros((3, len(sides)))
    outside = sum((cost(name, {}) for name in made_by if name not in in_blocks), zero)
    tables = []
    for stage, options in zip(stages, widths, strict=True):
        columns = []
        for width in options:
            blocks = [sum((cost(name, _kept(block, width)) for name in block.layers), zero) for block in stage]
            columns.append(np.cumsum(blocks, axis=0))  # (B, 3, R)
        tables.append(np.stack(columns).transpose(2, 3, 0, 1))
    return outside, tables


def _kept(block: Block, width: float) -> dict[str, tuple[int, int]]:
    """(read, made) channels of the layers of a block at a width: 0 where they are not cut."""
    kept: dict[str, tuple[int, int]] = {}
    for group in block.groups:
        count = kept_channels(group.channels, width)
        for names, own in ((group.producers, (0, count)), (group.tied, (count, count)), (group.consumers, (count, 0))):
            for name in names:
                read, made = kept.get(name, (0, 0))
                kept[name] = (own[0] or read, own[1] or made)
    return kept


def _layer_cost(layer: nn.Module | nn.Parameter, area: int, kept: tuple[int, int]) -> FloatArray:
    """(MACs, parameters, activations) (3,) of a layer, or a parameter of its own, whose output has `area` positions.

    `kept` are the channels that it reads and makes, 0 where they are not cut.
    """
    read, made = kept
    if isinstance(layer, nn.Conv2d):
        read, made = read or layer.in_channels, made or layer.out_channels
        depthwise = layer.groups == layer.in_channels == layer.out_channels
        weights = made * (1 if depthwise else read // layer.groups) * math.prod(layer.kernel_size)
        bias = made if layer.bias is not None else 0
        return np.array([weights * area, weights + bias, made * area], dtype=np.float64)
    if isinstance(layer, nn.Linear):
        weights = layer.in_features * layer.out_features
        return np.array([weights, weights + (layer.out_features if layer.bias is not None else 0), 0.0])
    if isinstance(layer, nn.BatchNorm2d):
        return np.array([0.0, 2.0 * (made or layer.num_features) * layer.affine, 0.0])
    parameters = layer.parameters() if isinstance(layer, nn.Module) else [layer]
    return np.array([0.0, float(sum(value.numel() for value in parameters)), 0.0])
