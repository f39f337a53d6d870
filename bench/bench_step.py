"""What a distillation term costs a whole training step: teacher forward, student forward, loss, backward, SGD.

    pytest bench/bench_step.py --benchmark-json=step.json

Each term is timed against the softmax-temperature term alone (`peer`), in turns in the same run, on synthetic batches.
`extra_info`: ratio (times as fast as the peer; 0.95 is 5 % slower), images_per_s. CPU sizes, and those of CUDA where
there is a device. There the lessons are kept from the warm-up on, as in a search's later cohorts, and the captures of
graphs are not counted.
"""

from __future__ import annotations

import time
from statistics import median
from typing import Any

import numpy as np
import pytest
import torch

from engine.config import SearchConfig
from engine.data.dataset import Dataset, Split
from engine.data.loader import Batches, train_batches
from engine.spaces.load import load_space
from engine.training.student import Student, place, prepare
from engine.training.teacher_cache import CachedTeacher
from engine.training.train import Stopwatch, train
from engine.trial import KDLoss

ROUNDS, CLASSES, RESOLUTION = 5, 100, 32
KEPT_BYTES = 2**33  # NST's lessons of all steps on CUDA are 6 GB; over an eighth of the memory they go to the host
CUDA = pytest.param("cuda", 128, 400, 16, marks=[pytest.mark.gpu, pytest.mark.skipif(
    not torch.cuda.is_available(), reason="no CUDA device")], id="cuda-128")  # fmt: skip
SIZES = [pytest.param("cpu", 32, 6, 8, id="cpu-32"), CUDA]


def batches(device: str, batch_size: int, steps: int) -> Batches:
    labels = np.arange(batch_size * steps) % CLASSES
    part = Split(labels, np.zeros((len(labels), RESOLUTION, RESOLUTION, 3), np.uint8), None)
    data = Dataset(
        "synthetic", part, part, part, tuple(map(str, range(CLASSES))), (0.5,) * 3, (0.25,) * 3, RESOLUTION, False
    )
    return train_batches(
        part, np.arange(len(labels)), data=data, batch_size=batch_size, epochs=1, resolution=RESOLUTION, seed=0,
        device=device, backend="synthetic",
    )  # fmt: skip


def seconds(member: Student, teacher: CachedTeacher, feed: Batches, config: SearchConfig) -> float:
    """Of a training; without the capture on CUDA, at both ends of which the device has nothing to do."""
    cuda, watch = feed.device.type == "cuda", Stopwatch()
    if cuda:
        torch.cuda.synchronize()
    start = time.perf_counter()
    train([member], teacher, feed, config, watch)
    if cuda:
        torch.cuda.synchronize()
    return time.perf_counter() - start - (watch.seconds["capture"] if cuda else 0.0)


@pytest.mark.parametrize("kd_loss", ["at", "nst", "kd+at", "kd+nst"])
@pytest.mark.parametrize(("device", "batch_size", "steps", "channels"), SIZES)
def test_step(benchmark: Any, device: str, batch_size: int, steps: int, channels: int, kd_loss: KDLoss) -> None:
    config = SearchConfig(batch_size=batch_size, lr=0.01)
    space = load_space(f"nasbench201:channels={channels},cells=2")
    feed = batches(device, batch_size, steps)
    torch.manual_seed(0)
    network = place(space.build((3,) * 6, CLASSES, 2.0), feed.device).eval().requires_grad_(False)
    teacher = CachedTeacher(network, KEPT_BYTES if device == "cuda" else 0)
    example = torch.zeros(2, 3, RESOLUTION, RESOLUTION, device=feed.device)
    ours, peer = (
        prepare(space.build((3, 1, 2, 4, 3, 1), CLASSES, 1.0), network, config, loss, example)
        for loss in (kd_loss, "kd")  # type: ignore[arg-type]
    )
    for member in (ours, peer):
        seconds(member, teacher, feed, config)  # warm-up: compilation of the kernels, cuDNN's choice, allocation
    times = [(seconds(ours, teacher, feed, config), seconds(peer, teacher, feed, config)) for _ in range(ROUNDS)]
    assert ours.status == peer.status == "ok", (ours.error, peer.error)
    benchmark.extra_info |= {
        "peer": "kd",
        "ratio": round(median(theirs / mine for mine, theirs in times), 3),
        "images_per_s": round(batch_size * steps / median(mine for mine, _ in times)),
    }
    benchmark.pedantic(seconds, args=(ours, teacher, feed, config), rounds=1)
