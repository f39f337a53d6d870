"""ShuffleNetV2 (Ma et al., ECCV 2018, arXiv 1807.11164) with given stages.

N batch, C channels, H W size in pixels.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from engine.networks.staged import Staged, conv_bn, he_init, pooled_classifier


def network(stem: int, stages: list[tuple[int, int]], last: int, classes: int) -> Staged:
    """A network of stages (channels, units), each of which halves the size in its first unit."""
    levels = []
    c_in = stem
    for c_out, units in stages:
        levels.append(nn.Sequential(DownUnit(c_in, c_out), *(Unit(c_out) for _ in range(units - 1))))
        c_in = c_out
    head = conv_bn(c_in, last, 1, activation=nn.ReLU(inplace=True))
    staged = Staged(
        conv_bn(3, stem, 3, activation=nn.ReLU(inplace=True)),
        levels,
        nn.Sequential(head, *pooled_classifier(last, classes)),
    )
    he_init(staged)
    return staged


class Unit(nn.Module):
    """Channel split, three convolutions on one half, channel shuffle; (N, C, H, W) in and out, C even."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.body = branch(channels // 2, channels // 2, 1)

    def forward(self, input_NCHW: Tensor) -> Tensor:
        identity, processed = input_NCHW.chunk(2, dim=1)
        return shuffle(identity, self.body(processed))


class DownUnit(nn.Module):
    """Two branches of stride 2 on the whole input, each with half of the output channels, then the shuffle."""

    def __init__(self, c_in: int, c_out: int) -> None:
        super().__init__()
        half = c_out // 2
        depthwise = conv_bn(c_in, c_in, 3, stride=2, groups=c_in)
        self.left = nn.Sequential(depthwise, conv_bn(c_in, half, 1, activation=nn.ReLU(inplace=True)))
        self.right = branch(c_in, half, 2)

    def forward(self, input_NCHW: Tensor) -> Tensor:
        return shuffle(self.left(input_NCHW), self.right(input_NCHW))


def branch(c_in: int, c_out: int, stride: int) -> nn.Sequential:
    """1x1, 3x3 depthwise without activation, 1x1."""
    return nn.Sequential(
        conv_bn(c_in, c_out, 1, activation=nn.ReLU(inplace=True)),
        conv_bn(c_out, c_out, 3, stride, groups=c_out),
        conv_bn(c_out, c_out, 1, activation=nn.ReLU(inplace=True)),
    )


def shuffle(a_NCHW: Tensor, b_NCHW: Tensor) -> Tensor:
    """Channels a0 b0 a1 b1 ...: concatenation, then the channel shuffle of two groups.

    One copy, made in channels_last. The usual view, transpose and reshape would not keep that layout, nor on a GPU
    would torch.channel_shuffle, whose kernel is for the CPU only: each unit would convert between two layouts.
    """
    a_NHWC, b_NHWC = (half.permute(0, 2, 3, 1) for half in (a_NCHW, b_NCHW))
    return torch.stack([a_NHWC, b_NHWC], dim=-1).flatten(3).permute(0, 3, 1, 2)
