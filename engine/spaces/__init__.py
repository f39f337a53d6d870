"""The built-in search spaces by name. They import torch (`engine.networks`) only when a network is built."""

from __future__ import annotations

from collections.abc import Callable

from engine.space import SearchSpace
from engine.spaces import mobilenetv2, nasbench201, pretrained, shufflenetv2

SPACES: dict[str, Callable[..., SearchSpace]] = {
    "mobilenetv2": mobilenetv2.mobilenetv2,
    "nasbench201": nasbench201.nasbench201,
    "pretrained": pretrained.pretrained,
    "shufflenetv2": shufflenetv2.shufflenetv2,
}
