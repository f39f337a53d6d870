"""The built-in search spaces by name. No torch here: `engine.networks` has it, imported when a network is built."""

from __future__ import annotations

from collections.abc import Callable

from engine.space import SearchSpace
from engine.spaces import nasbench201

SPACES: dict[str, Callable[..., SearchSpace]] = {
    "nasbench201": nasbench201.nasbench201,
}
