"""Which machines Parsl starts its pools of workers on, and where the workers reach the driver."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from engine.config import Resources
from engine.devices import Layout

if TYPE_CHECKING:
    from parsl.providers.base import ExecutionProvider

LOOPBACK = "127.0.0.1"


@dataclass(frozen=True)
class Site:
    """Where workers run: how pools are started (`provider`, with its launcher), and the driver's `address` for them."""

    provider: ExecutionProvider
    address: str = LOOPBACK


def local(resources: Resources) -> bool:
    """Whether workers run on this machine alone."""
    return True


def provider(resources: Resources, wanted: Layout, worker_init: str) -> Site:
    """The site that the resources ask for, with `wanted.nodes` pools at most, one a machine.

    `worker_init` are lines of shell that must come first in what the provider runs on a machine: the fleet's own
    environment. How many workers a pool has is the fleet's matter (`wanted.workers // wanted.nodes`).
    """
    from parsl.providers import LocalProvider

    return Site(LocalProvider(init_blocks=1, min_blocks=1, max_blocks=1, worker_init=worker_init))
