"""The time of a forward pass on this device."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import torch
from torch import nn

from engine.training.student import place

# The minimum of ROUNDS medians, so that short disturbances do not count.
ROUNDS, RUNS = 3, 10
ROUND_LIMIT_S = 0.5


def measure(network: nn.Module, resolution: int, batch: int, device: torch.device) -> float:
    """Milliseconds of a forward pass on `batch` images (3, resolution, resolution) in float32, in eager PyTorch. The
    network is moved to the device and set to evaluation mode.

    On the CPU it is the processor time of one thread, so torch must have been set to one thread. Other processes hardly
    affect it, and on an idle machine it equals the elapsed time.
    """
    network = place(network, device).eval()
    images = torch.zeros(batch, 3, resolution, resolution, device=device).to(memory_format=torch.channels_last)
    with torch.inference_mode():
        return least_median(lambda: network(images), device)


def least_median(once: Callable[[], object], device: torch.device) -> float:
    """Milliseconds of a call: the minimum of three medians of ten calls, or of fewer if they are slow."""
    for _ in range(2):
        once()
    return min(_median(once, device) for _ in range(ROUNDS))


def _median(once: Callable[[], object], device: torch.device) -> float:
    clock = time.perf_counter if device.type == "cuda" else time.thread_time
    times: list[float] = []
    while len(times) < RUNS and sum(times) < ROUND_LIMIT_S * 1000:
        _wait(device)
        start = clock()
        once()
        _wait(device)
        times.append((clock() - start) * 1000)
    return statistics.median(times)


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
