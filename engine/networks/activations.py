"""Activation counts of any network, taken on the meta device like its cost."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from engine.networks.cost import meta_copy


class ConvolutionOutputs(TorchDispatchMode):
    """Counts the output values of all convolutions that run within the block, as modules or functions."""

    def __init__(self) -> None:
        super().__init__()
        self.values = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        if func is torch.ops.aten.convolution.default:
            self.values += out.numel()
        return out


def count_activations(network: nn.Module, resolution: int) -> int:
    """Number of output values of all convolutions of `network` for one image (1, 3, resolution, resolution).

    This is the sum of C x H x W over convolutions (Radosavovic et al. 2020, arXiv 2003.13678). The network does not
    change: only a meta-device copy of it runs.
    """
    skeleton = meta_copy(network).eval()
    with torch.no_grad(), ConvolutionOutputs() as outputs:
        skeleton(torch.empty(1, 3, resolution, resolution, device="meta"))
    return outputs.values
