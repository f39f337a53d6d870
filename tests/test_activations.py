"""Activation counts: the closed form of the built-in spaces against the actual outputs of their convolutions."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from engine.networks import count_activations
from engine.space import SearchSpace
from engine.spaces.load import load_space

SPECS = ["nasbench201", "nasbench201:channels=8,cells=2", "mobilenetv2", "mobilenetv2:stem_stride=2", "shufflenetv2"]


class Functional(nn.Module):
    """Has a functional convolution, and a convolution module that is used twice."""

    def __init__(self) -> None:
        super().__init__()
        self.kernel = nn.Parameter(torch.zeros(4, 3, 3, 3))
        self.again = nn.Conv2d(4, 4, 1)
        self.head = nn.Linear(4, 10)

    def forward(self, images: Tensor) -> tuple[Tensor, list[Tensor]]:
        value = nn.functional.conv2d(images, self.kernel, stride=2, padding=1)
        value = self.again(self.again(value))
        return self.head(value.mean((2, 3))), [value]


@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.parametrize(("width", "resolution"), [(1.0, 32), (0.5, 17)])
def test_the_closed_form_counts_the_outputs_of_the_convolutions(spec: str, width: float, resolution: int) -> None:
    space = load_space(spec)
    assert space.activations is not None
    sample = [architecture.choices for architecture in space.sample(4, seed=0)]
    counted = []
    for choices in sample:
        with torch.device("meta"):
            counted.append(count_activations(space.build(choices, 10, width), resolution))
    closed = space.activations(np.array(sample, dtype=np.int8), 10, width, resolution)
    assert closed.tolist() == counted
    assert len(set(counted)) > 1


def test_functional_and_repeated_convolutions_count_and_the_classifier_does_not() -> None:
    network = Functional()
    assert count_activations(network, 6) == 3 * 4 * 3 * 3
    assert network.training
    assert network.kernel.device.type == "cpu"


def test_a_custom_space_needs_no_closed_form() -> None:
    assert SearchSpace("own", (), lambda choices, classes, width: Functional()).activations is None
