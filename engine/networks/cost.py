"""Operations and parameters of any network, counted on the meta device, without computing or copying anything."""

from __future__ import annotations

import copy
from itertools import chain

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode


def count_cost(network: nn.Module, resolution: int) -> tuple[int, int]:
    """(MACs, parameters) of `network` on one image (1, 3, resolution, resolution).

    MACs are half the FLOPs of torch's FlopCounterMode, which counts convolutions and matrix products; normalisation,
    activations, pooling, additions and biases are not counted. The network may be on any device and in either mode; it
    is not changed, because only a meta copy runs.
    """
    on_meta = meta_copy(network).eval()
    image = torch.empty(1, 3, resolution, resolution, device="meta")
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        on_meta(image)
    return counter.get_total_flops() // 2, sum(parameter.numel() for parameter in network.parameters())


def meta_copy(network: nn.Module) -> nn.Module:
    """A copy of a network whose parameters and buffers are on the meta device; shared ones stay shared."""
    copies: dict[int, torch.Tensor] = {}
    for tensor in chain(network.parameters(), network.buffers()):
        meta = tensor.detach().to("meta")
        copies[id(tensor)] = nn.Parameter(meta, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else meta
    return copy.deepcopy(network, memo=copies)
