"""How long a network takes on the device at hand."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import torch
from torch import nn

from engine.training.student import place

# The least of ROUNDS medians: what runs beside it for a moment does not count.
ROUNDS, RUNS = 3, 10
ROUND_LIMIT_S = 0.5


def measure(network: nn.Module, resolution: int, batch: int, device: torch.device) -> float:
    """Milliseconds of a forward pass on `batch` images (3, resolution, resolution) in float32, by PyTorch as it is,
    without a compiler. The network is moved to the device and set to evaluation.

    On the CPU it is the processor time of one thread, so torch must have been set to one: what else runs there hardly
    counts, and on an idle machine it is the time that passes.
    """
    network = place(network, device).eval()
    images = torch.zeros(batch, 3, resolution, resolution, device=device).to(memory_format=torch.channels_last)
    with torch.inference_mode():
        return least_median(lambda: network(images), device)


def least_median(once: Callable[[], object], device: torch.device) -> float:
    """Milliseconds of a call: the least of three medians of ten, of fewer where it is slow."""
    for _ in range(2):
        once()
    return min(_median(once, device) for _ in range(ROUNDS))


def _median(once: Callable[[], object], device: torch.device) -> float:
    clock = time.perf_counter if device.type == "cuda" else time.thread_time
    taken: list[float] = []
    while len(taken) < RUNS and sum(taken) < ROUND_LIMIT_S * 1000:
        _wait(device)
        start = clock()
        once()
        _wait(device)
        taken.append((clock() - start) * 1000)
    return statistics.median(taken)


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
