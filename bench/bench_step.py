"""What a distillation term costs a whole training step: teacher forward, student forward, loss, backward, SGD.

    pytest bench/bench_step.py --benchmark-json=step.json

Each term is timed alternately with the softmax-temperature term alone (`peer`), in the same run, on synthetic batches.
`extra_info`: ratio (times as fast as the peer; 0.95 is 5 % slower), images_per_s. CPU sizes, and CUDA sizes if there is
a device. There the teacher's outputs are cached by the warm-up, as for a search's later cohorts, and graph captures are
not counted.
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
CACHE_BYTES = 2**33  # NST's teacher outputs of all steps are 6 GB; over an eighth of GPU memory they go to the host
CUDA = pytest.param("cuda", 128, 400, 16, marks=[pytest.mark.gpu, pytest.mark.skipif(
    not torch.cuda.is_available(), reason="no CUDA device")], id="cuda-128")  # fmt: skip
SIZES = [pytest.param("cpu", 32, 6, 8, id="cpu-32"), CUDA]


def batches(device: str, batch_size: int, steps: int) -> Batches:
    labels = np.arange(batch_size * steps) % CLASSES
    split = Split(labels, np.zeros((len(labels), RESOLUTION, RESOLUTION, 3), np.uint8), None)
    data = Dataset(
        "synthetic", split, split, split, tuple(map(str, range(CLASSES))), (0.5,) * 3, (0.25,) * 3, RESOLUTION, False
    )
    return train_batches(
        split, np.arange(len(labels)), data=data, batch_size=batch_size, epochs=1, resolution=RESOLUTION, seed=0,
        device=device, backend="synthetic",
    )  # fmt: skip


def seconds(student: Student, teacher: CachedTeacher, feed: Batches, config: SearchConfig) -> float:
    """Seconds of a training, without the capture on CUDA, before and after which the device is idle."""
    cuda, watch = feed.device.type == "cuda", Stopwatch()
    if cuda:
        torch.cuda.synchronize()
    start = time.perf_counter()
    train([student], teacher, feed, config, watch)
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
    teacher = CachedTeacher(network, CACHE_BYTES if device == "cuda" else 0)
    example = torch.zeros(2, 3, RESOLUTION, RESOLUTION, device=feed.device)
    ours, peer = (
        prepare(space.build((3, 1, 2, 4, 3, 1), CLASSES, 1.0), network, config, loss, example)
        for loss in (kd_loss, "kd")  # type: ignore[arg-type]
    )
    for student in (ours, peer):
        seconds(student, teacher, feed, config)  # warm-up: kernel compilation, cuDNN's choice of algorithms, allocation
    times = [(seconds(ours, teacher, feed, config), seconds(peer, teacher, feed, config)) for _ in range(ROUNDS)]
    assert ours.status == peer.status == "ok", (ours.error, peer.error)
    benchmark.extra_info |= {
        "peer": "kd",
        "ratio": round(median(theirs / mine for mine, theirs in times), 3),
        "images_per_s": round(batch_size * steps / median(mine for mine, _ in times)),
    }
    benchmark.pedantic(seconds, args=(ours, teacher, feed, config), rounds=1)
