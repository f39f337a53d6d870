"""A space whose members start from pretrained weights: those in a file, else weights that a seed gives."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn

from engine.networks import Staged, conv_bn, pooled_classifier
from engine.networks.state_dict import load_except_classifier, read_state_dict
from engine.space import Choice, SearchSpace

WIDTHS = (4, 8, 16)


def build(choices: tuple[int, ...], classes: int, width: float) -> nn.Module:
    channels = WIDTHS[choices[0]]
    stages = [conv_bn(channels, 16, 3, stride=2, activation=nn.ReLU())]
    return Staged(conv_bn(3, channels, 3, activation=nn.ReLU()), stages, pooled_classifier(16, classes))


def start(classes: int, weights: Path | None) -> nn.Module:
    torch.manual_seed(1)
    network = build((len(WIDTHS) - 1,), classes, 1.0)
    if weights is not None:
        last = list(network.state_dict())[-2:]
        load_except_classifier(network, read_state_dict(weights), last, str(weights))
    return network


SPACE = SearchSpace("starting", (Choice("width", WIDTHS, ordinal=True),), build, start=start)
