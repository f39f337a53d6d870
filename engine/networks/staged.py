"""The structure of every student: a stem, stages whose outputs are the features, and a head that gives logits."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn


class Staged(nn.Module):
    """forward(images (N, 3, H, W)) returns (logits (N, classes), [stage outputs (N, C_i, H_i, W_i)], coarsest last).

    A feature is the output of a stage as the next stage reads it. Nothing may modify it later, so the first layer of
    each stage and of the head must not be in-place.
    """

    def __init__(self, stem: nn.Module, stages: Sequence[nn.Module], head: nn.Module) -> None:
        super().__init__()
        self.stem = stem
        self.stages = nn.ModuleList(stages)
        self.head = head

    def forward(self, images: Tensor) -> tuple[Tensor, list[Tensor]]:
        value = self.stem(images)
        features = []
        for stage in self.stages:
            value = stage(value)
            features.append(value)
        return self.head(value), features


def conv_bn(
    c_in: int, c_out: int, kernel: int, stride: int = 1, groups: int = 1, activation: nn.Module | None = None
) -> nn.Sequential:
    """Convolution without bias, padded so that size / stride rounds up, BatchNorm, then `activation` if given."""
    conv = nn.Conv2d(c_in, c_out, kernel, stride, padding=kernel // 2, groups=groups, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(c_out), *([activation] if activation else []))


def pooled_classifier(channels: int, classes: int) -> nn.Sequential:
    """Global average pooling and a linear layer: (N, channels, H, W) of any size to (N, classes)."""
    return nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, classes))


def he_init(network: nn.Module) -> None:
    """Normal weights of variance 2 / fan-out for convolutions (He et al. 2015, eq. 14), as torchvision's networks.

    Torch counts all channels in the fan-out of a depthwise convolution, which therefore starts small. Fan-in,
    which is correct there, was 5 points worse in short trainings (docs/spaces.md).
    """
    for module in network.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
