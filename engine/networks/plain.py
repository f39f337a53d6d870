"""A library's network as a flat graph of plain torch modules, which can be cut and written down without the library."""

from __future__ import annotations

import math
from typing import Any

from torch import Tensor, fx, nn
from torch.nn import functional

CONTAINERS = (nn.Sequential, nn.ModuleList, nn.ModuleDict)
# Layers whose subclasses in libraries do the same, with something before or after: see `_parts`.
LAYERS = (nn.Conv2d, nn.BatchNorm2d, nn.Linear)


class Downsample(nn.Module):
    """Square images (N, 3, H, H) resized to a share of their side, in steps of 8 pixels; the whole share changes
    nothing."""

    def __init__(self, share: float = 1.0) -> None:
        super().__init__()
        self.share = share

    def extra_repr(self) -> str:
        return f"{self.share}"

    def forward(self, images: Tensor) -> Tensor:
        side = downsampled(images.shape[-1], self.share)
        if side == images.shape[-1]:
            return images
        return functional.interpolate(images, size=(side, side), mode="bilinear", antialias=True)


def downsampled(side: int, share: float) -> int:
    """Pixels of `side` at a share of it: a multiple of 8, at least 16, at most `side`."""
    return side if share == 1 else min(side, max(16, 8 * round(side * share / 8)))


class SamePad2d(nn.Module):
    """TensorFlow's padding: a convolution of this kernel, stride and dilation then halves sizes, rounded up."""

    def __init__(self, kernel: int, stride: int, dilation: int = 1) -> None:
        super().__init__()
        self.kernel, self.stride, self.dilation = kernel, stride, dilation

    def extra_repr(self) -> str:
        return f"{self.kernel}, {self.stride}, {self.dilation}"

    def forward(self, input_NCHW: Tensor) -> Tensor:
        height, width = (self._missing(size) for size in input_NCHW.shape[2:])
        return functional.pad(input_NCHW, (width // 2, width - width // 2, height // 2, height - height // 2))

    def _missing(self, size: int) -> int:
        return max(0, (math.ceil(size / self.stride) - 1) * self.stride + self.dilation * (self.kernel - 1) + 1 - size)


class _Tracer(fx.Tracer):
    """Enters everything but torch's own layers and the subclasses that `_parts` translates."""

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        own = type(m).__module__.startswith("torch.nn.") and not isinstance(m, CONTAINERS)
        return own or isinstance(m, LAYERS)


def plain(network: nn.Module) -> fx.GraphModule:
    """The same function of images as a graph whose modules are torch's layers, `Downsample` and `SamePad2d`.

    It has the weights of `network`, which changes: stochastic depth is removed. The nodes' metadata keep the names of
    the library's modules ("path"). Raises whatever tracing raises.
    """
    _remove_stochastic_depth(network)
    traced = _Tracer().trace(network.eval())
    graph, holder, new = fx.Graph(), nn.Module(), dict[fx.Node, Any]()
    for node in traced.nodes:
        if node.op == "placeholder" and new:
            new[node] = None  # an optional argument, like a mask
        elif node.op == "placeholder":
            holder.add_module("downsample", Downsample())
            new[node] = graph.call_module("downsample", (graph.placeholder("images"),))
        elif node.op == "call_module":
            value = new[node.args[0]]
            for suffix, part in _parts(network.get_submodule(str(node.target))):
                name = str(node.target).replace(".", "_") + suffix
                holder.add_module(name, part)
                value = graph.call_module(name, (value,))
                value.meta["path"] = str(node.target)
            new[node] = value
        else:
            if node.op == "get_attr":
                name = str(node.target).replace(".", "_")
                holder.register_parameter(name, network.get_parameter(str(node.target)))
                new[node] = graph.get_attr(name)
            else:
                new[node] = graph.node_copy(node, new.__getitem__)
            new[node].meta["path"] = next(reversed(node.meta.get("nn_module_stack") or {"": None}))
    for node in list(graph.nodes):
        if getattr(node.target, "__name__", "") == "_assert":
            graph.erase_node(node)
    return cleaned(fx.GraphModule(holder, graph, "Network"))


def cleaned(network: fx.GraphModule) -> fx.GraphModule:
    """The network without nodes and modules that its output does not depend on."""
    network.graph.eliminate_dead_code()
    network.delete_all_unused_submodules()
    network.recompile()
    return network


def _parts(layer: nn.Module) -> list[tuple[str, nn.Module]]:
    """A layer as plain ones in order, each with a suffix of its name."""
    if type(layer).__module__.startswith("torch.nn."):
        return [] if isinstance(layer, nn.Identity) else [("", layer)]
    if isinstance(layer, nn.Conv2d):
        return _convolution(layer)
    if isinstance(layer, nn.BatchNorm2d):
        norm = nn.BatchNorm2d(layer.num_features, layer.eps, layer.momentum)
        norm.load_state_dict(layer.state_dict(), strict=False)
        after = [("_" + name, getattr(layer, name, nn.Identity())) for name in ("drop", "act")]
        return [("", norm), *((name, one) for name, one in after if not isinstance(one, nn.Identity))]
    assert isinstance(layer, nn.Linear)
    linear = nn.Linear(layer.in_features, layer.out_features, layer.bias is not None)
    linear.load_state_dict(layer.state_dict())
    return [("", linear)]


def _convolution(layer: nn.Conv2d) -> list[tuple[str, nn.Module]]:
    """A library's convolution, which pads as TensorFlow does, as padding and a plain convolution."""
    (kernel, other), (stride, _), (dilation, _) = layer.kernel_size, layer.stride, layer.dilation
    if kernel != other or "same" not in type(layer).__name__.lower():
        raise NotImplementedError(f"a convolution of type {type(layer).__name__}")
    conv = nn.Conv2d(
        layer.in_channels, layer.out_channels, kernel, stride, 0, dilation, layer.groups, layer.bias is not None
    )
    conv.load_state_dict(layer.state_dict())
    return [("_pad", SamePad2d(kernel, stride, dilation)), ("", conv)]


def _remove_stochastic_depth(network: nn.Module) -> None:
    """Layers that skip blocks at random: in a short fine-tuning they only make it longer."""
    for module in list(network.modules()):
        for name, child in module.named_children():
            if type(child).__name__ in ("StochasticDepth", "DropPath"):
                setattr(module, name, nn.Identity())
