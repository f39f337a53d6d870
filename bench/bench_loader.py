"""Images per CPU-second of the loader's backends, each timed alternately with its peer in the same run.

    pytest bench/bench_loader.py --benchmark-json=loader.json

`extra_info` holds images_per_cpu_s, peer (its name), peer_images_per_cpu_s and ratio. CPU-seconds of the whole process,
not wall time: on a shared machine they repeat within a tenth or so. Set OMP_NUM_THREADS=1.
"""

from __future__ import annotations

import tarfile
import time
from collections.abc import Callable, Iterable
from itertools import chain, repeat
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader
from torch.utils.data import Dataset as TorchDataset
from torchvision.transforms import v2

from engine.data.dataset import Dataset, Split
from engine.data.loader import train_batches

ROUNDS = 3
EPOCHS = {"arrays": 2, "files": 6}  # building a pipeline, some 0.2 s, is part of each run
CALTECH = Path(__file__).parents[2] / "shared" / "data" / "caltech101_500.tar"
MEAN, STD = (0.507, 0.487, 0.441), (0.267, 0.256, 0.276)
Run = Callable[[], Iterable[Tensor]]


class Peer(TorchDataset[Tensor]):
    """A usual training script: one image at a time through torchvision's v2 transforms."""

    def __init__(self, items: Any, transform: Callable[[Any], Tensor]) -> None:
        self.items, self.transform = items, transform

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, i: int) -> Tensor:
        return self.transform(self.items[i])


def open_rgb(path: str) -> Image.Image:
    return Image.open(path).convert("RGB")


@pytest.fixture(scope="module")
def cifar_like() -> Dataset:
    """10,000 smooth images of CIFAR's size."""
    rng = np.random.default_rng(0)
    small = torch.from_numpy(rng.random((10_000, 3, 5, 5), np.float32) * 255)
    images = torch.nn.functional.interpolate(small, (32, 32), mode="bilinear").byte().permute(0, 2, 3, 1)
    split = Split(rng.integers(0, 100, 10_000), np.ascontiguousarray(images.numpy()), None)
    return Dataset("cifar-like", split, split, split, tuple(map(str, range(100))), MEAN, STD, 32, flip=True)


@pytest.fixture(scope="module", params=["synthetic, 500 x 375", "Caltech-101"])
def jpegs(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    """192 JPEG files: synthetic ones of 50 kB, or photographs of about 300 x 200 if available."""
    folder = tmp_path_factory.mktemp("jpegs")
    paths = synthetic_jpegs(folder) if request.param.startswith("synthetic") else photographs(folder)
    split = Split(np.arange(192) % 10, None, tuple(map(str, paths[:192])))
    return Dataset(request.param, split, split, split, tuple("abcdefghij"), MEAN, STD, 224, flip=True)


def synthetic_jpegs(folder: Path) -> list[Path]:
    """Smooth shapes with noise, JPEG quality 90."""
    rng = np.random.default_rng(0)
    paths = [folder / f"{i}.jpg" for i in range(192)]
    for path in paths:
        size = (int(rng.integers(450, 550)), int(rng.integers(330, 420)))
        shapes = Image.fromarray(rng.integers(0, 256, (12, 16, 3), dtype=np.uint8))
        grain = rng.normal(0, 6, (size[1], size[0], 3))
        pixels = (np.asarray(shapes.resize(size, Image.Resampling.BICUBIC)) + grain).clip(0, 255).astype(np.uint8)
        Image.fromarray(pixels).save(path, quality=90)
    return paths


def photographs(folder: Path) -> list[Path]:
    if not CALTECH.exists():
        pytest.skip(f"no ../shared/data/{CALTECH.name} beside the checkout")
    with tarfile.open(CALTECH) as tar:
        tar.extractall(folder, filter="data")
    return sorted(folder.rglob("*.jpg"))


def ours(data: Dataset, batch_size: int, backend: str) -> Run:
    """A run is some epochs, including building the pipeline."""
    epochs = EPOCHS["files" if data.train.files else "arrays"]
    batches = train_batches(
        data.train, np.arange(len(data.train)), data=data, batch_size=batch_size, epochs=epochs, resolution=0, seed=0,
        backend=backend,  # type: ignore[arg-type]
    )  # fmt: skip
    return lambda: (batch.images for batch in batches)


def epochs_of(loader: DataLoader[Tensor], kind: str) -> Run:
    return lambda: chain.from_iterable(repeat(loader, EPOCHS[kind]))


def compared(benchmark: Any, run: Run, peer: Run, name: str, shape: tuple[int, ...]) -> None:
    """Checks that both give equivalent images, then times them alternately; median over the rounds."""
    check(run, peer, shape)
    seconds: dict[str, list[float]] = {"ours": [], "peer": []}
    images = dict.fromkeys(seconds, 0)

    def consume(which: str, batches: Run) -> None:
        start = time.process_time()
        images[which] = sum(len(batch) for batch in batches())
        seconds[which].append(time.process_time() - start)

    benchmark.pedantic(consume, args=("ours", run), setup=lambda: consume("peer", peer), rounds=ROUNDS)
    speed = {which: images[which] / median(seconds[which]) for which in seconds}
    benchmark.extra_info.update(
        images_per_cpu_s=round(speed["ours"]),
        peer=name,
        peer_images_per_cpu_s=round(speed["peer"]),
        ratio=round(speed["ours"] / speed["peer"], 2),
        threads=torch.get_num_threads(),
    )


def check(run: Run, peer: Run, shape: tuple[int, ...]) -> None:
    """Both give float32 batches of `shape` with the same statistics, as the augmentation has the same distribution."""
    one, other = (torch.cat(list(batches())) for batches in (run, peer))
    assert one.dtype == other.dtype == torch.float32
    assert one.shape[1:] == other.shape[1:] == shape
    assert len(one) == len(other)
    torch.testing.assert_close(one.mean((0, 2, 3)), other.mean((0, 2, 3)), atol=0.05, rtol=0)
    torch.testing.assert_close(one.std((0, 2, 3)), other.std((0, 2, 3)), atol=0.05, rtol=0)


@pytest.mark.benchmark(group="loader: arrays, 32 px, batch 256")
@pytest.mark.parametrize("backend", ["dali", "resident"])
def test_arrays(benchmark: Any, cifar_like: Dataset, backend: str) -> None:
    transform = v2.Compose(
        [
            v2.RandomCrop(32, padding=4),
            v2.RandomHorizontalFlip(),
            v2.ToDtype(torch.float32, scale=True),
            v2.Normalize(MEAN, STD),
        ]
    )
    assert cifar_like.train.images is not None
    planes = torch.from_numpy(cifar_like.train.images).permute(0, 3, 1, 2).contiguous()
    loader = DataLoader(Peer(planes, transform), 256, shuffle=True, drop_last=True)
    name = "torch DataLoader + v2 on tensors, in process"
    compared(
        benchmark,
        ours(cifar_like, 256, backend),
        epochs_of(loader, "arrays"),
        name,
        (3, 32, 32),
    )


@pytest.mark.benchmark(group="loader: JPEG files, 224 px, batch 64")
def test_jpegs(benchmark: Any, jpegs: Dataset) -> None:
    transform = v2.Compose(
        [
            open_rgb,
            v2.RandomResizedCrop(224, antialias=True),
            v2.RandomHorizontalFlip(),
            v2.ToImage(),
            v2.ToDtype(torch.float32, scale=True),
            v2.Normalize(MEAN, STD),
        ]
    )
    loader = DataLoader(Peer(jpegs.train.files, transform), 64, shuffle=True, drop_last=True)
    name = "torch DataLoader + Pillow + v2, in process"
    compared(benchmark, ours(jpegs, 64, "dali"), epochs_of(loader, "files"), name, (3, 224, 224))
