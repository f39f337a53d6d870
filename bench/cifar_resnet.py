"""The residual networks of CIFAR as a space of depths: the usual teachers of small images (`FILE.py:space`).

He et al., 2016 (arXiv 1512.03385), section 4.2: three stages of 16, 32 and 64 channels, shortcuts without parameters
(their option A). Depth 6 n + 2; ResNet-56 has 127 million multiply-accumulates at 32 pixels.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from engine.networks import Staged, he_init, pooled_classifier
from engine.space import Choice, SearchSpace

DEPTHS = (20, 32, 44, 56, 110)


class Block(nn.Module):
    def __init__(self, c_in: int, c_out: int) -> None:
        super().__init__()
        self.stride, self.added = 1 + (c_out > c_in), c_out - c_in
        self.conv1, self.bn1 = nn.Conv2d(c_in, c_out, 3, self.stride, 1, bias=False), nn.BatchNorm2d(c_out)
        self.conv2, self.bn2 = nn.Conv2d(c_out, c_out, 3, padding=1, bias=False), nn.BatchNorm2d(c_out)

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn2(self.conv2(nn.functional.relu(self.bn1(self.conv1(x)))))
        if self.added:
            x = x[:, :, :: self.stride, :: self.stride]
            x = nn.functional.pad(x, (0, 0, 0, 0, self.added // 2, self.added // 2))
        return nn.functional.relu(x + y)


def _build(choices: tuple[int, ...], classes: int, width: float) -> nn.Module:
    blocks = (DEPTHS[choices[0]] - 2) // 6
    channels = [16, 32, 64]
    stem = nn.Sequential(nn.Conv2d(3, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16), nn.ReLU())
    stages: list[Any] = [
        nn.Sequential(*(Block(before if i == 0 else c, c) for i in range(blocks)))
        for before, c in zip([16, *channels], channels, strict=False)
    ]
    network = Staged(stem, stages, pooled_classifier(64, classes))
    he_init(network)
    return network


space = SearchSpace("cifar_resnet", (Choice("depth", DEPTHS, ordinal=True),), _build)
