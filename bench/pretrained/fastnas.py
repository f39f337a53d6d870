"""FastNAS of NVIDIA Model Optimizer (`modelopt.torch.prune`) on the uncut network of a pretrained space.

It prunes output channels: for each layer it measures what every width alone costs in validation accuracy, after
BatchNorm calibration and without training, and then cuts all layers as far as the same loss allows. It changes neither
the input size nor the number of blocks.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, fx, nn

from engine.networks.anatomy import shapes_of
from engine.networks.plain import Downsample, SamePad2d, cleaned
from engine.training.inherit import recalibrate
from engine.trial import EnvironmentUnusable

Labelled = tuple[Tensor, Tensor]  # images (N, 3, R, R), labels (N,)
SCORED_AT_ONCE = 256


def search(
    network: fx.GraphModule, max_macs: float, train: tuple[Tensor, ...], valid: Labelled
) -> dict[str, Tensor] | None:
    """The weights of the subnet of a trained network that FastNAS finds within `max_macs`, for `rebuilt`.

    BatchNorm is calibrated on `train`, batches (N, 3, R, R) of the size that the network shall see, as in a search of
    ours; candidates are scored on `valid`. None if it finds nothing: the smallest subnet has more MACs, or only cuts of
    the most sensitive layer to its smallest width would do, which its bisection never reaches. Raises
    EnvironmentUnusable without Model Optimizer.
    """
    prune, (images, labels) = _prune(), valid

    def score(candidate: nn.Module) -> float:
        recalibrate(candidate, train)  # Model Optimizer's own calibration does the same, on no less than 50 batches
        return accuracy(candidate, images, labels)

    try:
        found, state = prune(
            fixed_size(network, images.shape[-1]),
            mode="fastnas",
            constraints={"flops": 2 * max_macs},  # it counts a multiply-accumulate as two
            dummy_input=images[:1],
            config={"score_func": score, "verbose": False},
        )
    except ValueError as error:
        if "NOT all constraints can be satisfied" in str(error):
            return None
        raise
    return dict(found.state_dict()) if state["best"]["is_satisfied"] else None


def _prune() -> Any:
    try:
        import torchprofile.profile
        from modelopt.torch.prune import prune
    except ImportError as error:
        raise EnvironmentUnusable(f"FastNAS is not installed ({error}): pip install 'mfkd[peers]'") from error
    if not hasattr(torchprofile.profile, "handlers"):
        raise EnvironmentUnusable("FastNAS counts FLOPs with torchprofile 0.0.4: pip install torchprofile==0.0.4")
    return prune


@torch.no_grad()
def accuracy(model: nn.Module, images: Tensor, labels: Tensor) -> float:
    """Accuracy (0..1) of a network that returns logits only."""
    found = torch.cat([model(some).argmax(1) for some in images.split(SCORED_AT_ONCE)])
    return float((found == labels).double().mean())


def fixed_size(network: fx.GraphModule, side: int) -> fx.GraphModule:
    """A copy for images of one size that returns logits only, in layers of torch that Model Optimizer can trace."""
    model = copy.deepcopy(network).to(memory_format=torch.contiguous_format).eval()
    model.set_submodule("downsample", nn.Identity())
    shapes = shapes_of(model, side)
    for node in model.graph.nodes:
        if node.op == "call_module" and isinstance(model.get_submodule(str(node.target)), SamePad2d):
            added = shapes[node.name][-1] - shapes[node.args[0].name][-1]  # images are square
            before, after = added // 2, added - added // 2
            model.set_submodule(str(node.target), nn.ZeroPad2d((before, after, before, after)))
    output = next(node for node in model.graph.nodes if node.op == "output")
    output.args = (output.args[0][0],)
    return cleaned(model)


def rebuilt(network: fx.GraphModule, weights: dict[str, Tensor], share: float) -> fx.GraphModule:
    """A copy of the uncut network with the weights of a subnet and their widths, whose input is resized to a share of
    its side. It returns (logits, features), as all networks of the space."""
    model = copy.deepcopy(network).to(memory_format=torch.contiguous_format)
    model.set_submodule("downsample", Downsample(share))
    for name, layer in model.named_modules():
        if f"{name}.weight" not in weights:
            continue
        for key in [key for key, _ in layer.named_parameters()]:
            setattr(layer, key, nn.Parameter(weights[f"{name}.{key}"].clone()))
        for key in [key for key, _ in layer.named_buffers()]:
            setattr(layer, key, weights[f"{name}.{key}"].clone())
        _describe(layer)
    return model


def _describe(layer: nn.Module) -> None:
    """Makes the attributes of a layer agree with its weights."""
    assert isinstance(layer.weight, Tensor)
    made, *read = layer.weight.shape
    if isinstance(layer, nn.Conv2d):
        if layer.groups > 1:
            layer.groups = made * layer.groups // layer.out_channels
        layer.out_channels, layer.in_channels = made, read[0] * layer.groups
    elif isinstance(layer, nn.Linear):
        layer.out_features, layer.in_features = made, read[0]
    elif isinstance(layer, nn.BatchNorm2d):
        layer.num_features = made


def widths(network: nn.Module) -> str:
    """Output channels of the convolutions with a free number of them, in order: what FastNAS has chosen."""
    free = [layer for layer in network.modules() if isinstance(layer, nn.Conv2d) and layer.groups == 1]
    return "-".join(str(layer.out_channels) for layer in free)
