"""What of a plain network can be cut: its stages, their residual blocks, and the hidden channels within each block."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx, nn

from engine.networks.cost import meta_copy
from engine.networks.plain import CONTAINERS

# Operations of which each output channel depends on the same input channel only.
ACTIVATIONS = {"relu", "relu6", "silu", "gelu", "hardswish", "sigmoid", "hardsigmoid"}
CHANNELWISE = {"add", "iadd", "mul", "imul", "mean", "adaptive_avg_pool2d", "avg_pool2d", "max_pool2d", "dropout"}
CHANNELWISE_LAYERS = (nn.BatchNorm2d, nn.AvgPool2d, nn.MaxPool2d, nn.AdaptiveAvgPool2d, nn.Dropout, nn.Dropout2d)
STAGES_READ = 4  # features that losses may read, as in residual networks
REFERENCE = 224  # pixels at which networks are looked at


@dataclass(frozen=True)
class Group:
    """Hidden channels of a block, which are removed together.

    They come from the convolutions `producers`, pass the layers `tied` (BatchNorm, depthwise convolutions) and are read
    by the convolutions `consumers`; all are names of modules.
    """

    channels: int
    producers: tuple[str, ...]
    tied: tuple[str, ...]
    consumers: tuple[str, ...]


@dataclass(frozen=True)
class Block:
    """A part of the network between two nodes. `removable`: its output has the channels and size of its input, to which
    it adds something. `layers` are the names of its modules and of
    parameters outside of modules."""

    source: str
    output: str
    removable: bool
    groups: tuple[Group, ...]
    layers: frozenset[str]


Stage = tuple[Block, ...]


def anatomy(network: fx.GraphModule, library: nn.Module) -> tuple[Stage, ...]:
    """The stages of a network that `plain` made of `library`: () if it has no blocks.

    All blocks of a stage but its first are removable.
    """
    shapes, channels = shapes_of(network, REFERENCE), _Channels(network)
    stages: list[list[Block]] = []
    for path in _block_paths(library):
        block = _block(network, path, channels, shapes)
        if block is None:
            continue
        if not stages or not block.removable or stages[-1][-1].output != block.source:
            stages.append([])
        stages[-1].append(block)
    return tuple(map(tuple, stages))


def has_blocks(library: nn.Module) -> bool:
    """Whether a network may have blocks that can be cut: modules of several convolutions."""
    return next(_block_paths(library), None) is not None


def shapes_of(network: fx.GraphModule, resolution: int) -> dict[str, torch.Size]:
    """The shape of every tensor in the graph, by name of its node, for one image."""
    shapes: dict[str, torch.Size] = {}

    class Recorder(fx.Interpreter):
        def run_node(self, n: fx.Node) -> Any:
            value = super().run_node(n)
            if isinstance(value, torch.Tensor):
                shapes[n.name] = value.shape
            return value

    with torch.no_grad():
        Recorder(meta_copy(network).eval()).run(torch.empty(1, 3, resolution, resolution, device="meta"))
    return shapes


def add_features(network: fx.GraphModule, stages: tuple[Stage, ...]) -> None:
    """Makes a network return (logits, [the output of the last block of each size])."""
    shapes = shapes_of(network, REFERENCE)
    nodes = {node.name: node for node in network.graph.nodes}
    by_size = {shapes[stage[-1].output][2:]: nodes[stage[-1].output] for stage in stages}
    features = list(by_size.values())[-STAGES_READ:]
    for feature in features:
        for user in feature.users:  # nothing may change what a loss reads
            if user.op == "call_module" and hasattr(layer := network.get_submodule(str(user.target)), "inplace"):
                setattr(layer, "inplace", False)  # noqa: B010 (of a type that mypy cannot know)
    output = next(node for node in network.graph.nodes if node.op == "output")
    output.args = ((output.args[0], features),)
    network.recompile()


def _block_paths(library: nn.Module) -> Iterator[str]:
    """Names of the modules that hold at least two convolutions and are not mere sequences of such modules."""

    def visit(module: nn.Module, path: str) -> Iterator[str]:
        for name, child in module.named_children():
            inside = f"{path}.{name}".lstrip(".")
            if _convolutions(child) < 2:
                continue
            parts = [_convolutions(part) for part in child.children() if _convolutions(part)]
            sequence = isinstance(child, CONTAINERS) or len(parts) > 1
            # A container of several convolutions beside single ones holds the stem, too.
            if sequence and (min(parts) > 1 or (isinstance(child, CONTAINERS) and max(parts) > 1)):
                yield from visit(child, inside)
            else:
                yield inside

    return visit(library, "")


def _convolutions(module: nn.Module) -> int:
    return sum(isinstance(one, nn.Conv2d) for one in module.modules())


def _block(network: fx.GraphModule, path: str, channels: _Channels, shapes: dict[str, torch.Size]) -> Block | None:
    """The block of a library's module; None unless it has one input and one output."""
    nodes = [n for n in network.graph.nodes if (n.meta.get("path", "") + ".").startswith(path + ".")]
    inside = set(nodes)
    sources = {arg for node in nodes for arg in node.all_input_nodes if arg not in inside and arg.op != "get_attr"}
    outputs = {node for node in nodes if any(user not in inside for user in node.users)}
    if len(sources) != 1 or len(outputs) != 1:
        return None
    (source,), (output,) = sources, outputs
    layers = frozenset(str(node.target) for node in nodes if node.op in ("call_module", "get_attr"))
    removable = channels.of(source) == channels.of(output) and shapes[source.name] == shapes[output.name]
    return Block(source.name, output.name, removable, tuple(channels.hidden(inside, shapes)), layers)


class _Channels:
    """Which nodes of a graph have the same channels: found by union of the nodes between which channels pass."""

    def __init__(self, network: fx.GraphModule) -> None:
        self.network = network
        self.parent: dict[Any, Any] = {}
        self.fixed: set[Any] = set()
        for node in network.graph.nodes:
            self._add(node)

    def of(self, node: Any) -> Any:
        """The representative of a node's group."""
        self.parent.setdefault(node, node)
        while self.parent[node] != node:
            self.parent[node] = self.parent[self.parent[node]]
            node = self.parent[node]
        return node

    def layer(self, node: fx.Node) -> nn.Module | None:
        return self.network.get_submodule(str(node.target)) if node.op == "call_module" else None

    def _add(self, node: fx.Node) -> None:
        layer, inputs = self.layer(node), node.all_input_nodes
        name = getattr(node.target, "__name__", str(node.target))
        if isinstance(layer, nn.Conv2d) and layer.groups == 1:
            return
        tied = isinstance(layer, CHANNELWISE_LAYERS) or (layer is not None and not list(layer.parameters()))
        depthwise = isinstance(layer, nn.Conv2d) and layer.groups == layer.in_channels == layer.out_channels
        if tied or depthwise or (layer is None and name.strip("_") in CHANNELWISE | ACTIVATIONS):
            for other in inputs:
                self.parent[self.of(other)] = self.of(node)
            if isinstance(layer, nn.Flatten):
                self.fixed.add(node)
        else:  # a classifier, a grouped convolution, anything unknown: what it reads and gives stays whole
            self.fixed |= {node, *inputs}

    def hidden(self, inside: set[fx.Node], shapes: dict[str, torch.Size]) -> Iterator[Group]:
        """The groups that begin and end among the nodes `inside` of a block, but for those of squeezed 1x1 maps."""
        members: dict[Any, list[fx.Node]] = defaultdict(list)
        for node in self.network.graph.nodes:
            members[self.of(node)].append(node)
        fixed = {self.of(node) for node in self.fixed}
        for key in dict.fromkeys(self.of(node) for node in inside):
            nodes = members[key]
            users = [user for node in nodes for user in node.users]
            squeezed = all(shapes[node.name][2:].numel() == 1 for node in nodes if node.name in shapes)
            if key in fixed or squeezed or not inside.issuperset([*nodes, *users]):
                continue
            yield self._group(nodes, users)

    def _group(self, nodes: list[fx.Node], users: list[fx.Node]) -> Group:
        layers = {str(node.target): self.layer(node) for node in nodes if node.op == "call_module"}
        made = tuple(n for n, one in layers.items() if isinstance(one, nn.Conv2d) and one.groups == 1)
        tied = tuple(n for n, one in layers.items() if isinstance(one, nn.Conv2d | nn.BatchNorm2d) and n not in made)
        read = dict.fromkeys(str(u.target) for u in users if u not in set(nodes) and u.op == "call_module")
        first = self.network.get_submodule(made[0])
        assert isinstance(first, nn.Conv2d)
        return Group(first.out_channels, made, tied, tuple(read))
