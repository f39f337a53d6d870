"""The comparison of a search in a pretrained space with its peers: same cap, same last training, one row for each."""

from __future__ import annotations

import importlib.util
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, fx, nn

from bench.pretrained import compare, conclude, fastnas
from engine.config import Budget, SearchConfig, Slots
from engine.data.dataset import fingerprint, load
from engine.networks import count_cost
from engine.networks.anatomy import add_features, anatomy
from engine.networks.plain import plain
from engine.run_folder import RunFolder
from engine.search.journal import Journal
from engine.space import SearchSpace
from engine.spaces.load import load_space
from engine.training import teacher as teachers
from engine.training.inherit import recalibrate
from engine.trial import Architecture, EnvironmentUnusable, Evaluation, Trial, UsageError

SPACE = "pretrained:torchvision:mobilenet_v2,min_side=0.5,min_width=0.7"
PIXELS = 32
modelopt = importlib.util.find_spec("modelopt") is not None


class Tiny(nn.Module):
    """Two inverted residual blocks."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 32, 3, 2, 1, bias=False), nn.BatchNorm2d(32), nn.ReLU())
        self.blocks = nn.ModuleList([self.block() for _ in range(2)])
        self.head = nn.Linear(32, 3)

    def block(self) -> nn.Sequential:
        layers = [nn.Conv2d(32, 96, 1, bias=False), nn.BatchNorm2d(96), nn.ReLU()]
        layers += [nn.Conv2d(96, 96, 3, 1, 1, groups=96, bias=False), nn.BatchNorm2d(96), nn.ReLU()]
        return nn.Sequential(*layers, nn.Conv2d(96, 32, 1, bias=False), nn.BatchNorm2d(32))

    def forward(self, images: Tensor) -> Tensor:
        value = self.stem(images)
        for block in self.blocks:
            value = value + block(value)
        return self.head(value.mean((2, 3)))


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three classes that differ in colour: 60 images to train, 30 to test."""
    rng = np.random.default_rng(0)

    def draw(count: int) -> tuple[np.ndarray, np.ndarray]:
        labels = np.arange(count) % 3
        found = rng.integers(0, 160, (count, PIXELS, PIXELS, 3), dtype=np.uint8)
        for image, label in zip(found, labels, strict=True):
            image[..., label] += 90
        return found, labels

    (x_train, y_train), (x_test, y_test) = draw(60), draw(30)
    path = tmp_path_factory.mktemp("data") / "colours.npz"
    np.savez(path, x_train=x_train, y_train=y_train, x_test=x_test, y_test=y_test)
    return path


@pytest.fixture(scope="module")
def space() -> SearchSpace:
    return load_space(SPACE)


@pytest.fixture(scope="module")
def teacher(data: Path, space: SearchSpace, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The uncut network, untrained, in a weights file."""
    torch.manual_seed(0)
    largest, found = space.at(space.size - 1), load(str(data))
    path = tmp_path_factory.mktemp("teacher") / "teacher.safetensors"
    card = teachers.Card(
        network=f"{SPACE}#{largest}",
        classes=found.classes,
        data=str(data),
        fingerprint=fingerprint(found),
        resolution=PIXELS,
        mean=found.mean,
        std=found.std,
        epochs=1,
        accuracy=0.5,
        seconds=1.0,
    )
    teachers.save(path, space.build(largest.choices, 3, 1.0), card)
    return path


@pytest.fixture
def compared(data: Path, teacher: Path, tmp_path: Path) -> Callable[..., list[dict[str, Any]]]:
    """Runs a comparison with further arguments, in a folder of its own; returns all rows."""

    def run(*arguments: str) -> list[dict[str, Any]]:
        common = ["--data", str(data), "--resolution", str(PIXELS), "--teacher", str(teacher), "--epochs", "1"]
        compare.main([*common, *arguments, "--out", str(tmp_path / "out")])
        return [json.loads(line) for line in (tmp_path / "out" / compare.ROWS).read_text().splitlines()]

    return run


def macs(space: SearchSpace, choices: tuple[int, ...]) -> float:
    assert space.cost is not None
    return float(space.cost(np.array([choices], dtype=np.int8), 3, 1.0, PIXELS)[0][0])


def searched(folder: Path, seed: int, architecture: object) -> str:
    """The run folder of a finished search, as far as a comparison reads it."""
    run, config = RunFolder(folder), SearchConfig(space=SPACE, seed=seed)
    folder.mkdir()
    run.fix_config("search", config, Budget(), Slots(1, 1))
    trial = Trial(0, Architecture.parse(str(architecture)), config.low)
    with Journal(run.journal) as journal:
        journal.ask([trial], 0)
        journal.answer(Evaluation(trial, "ok", 0.5, seconds=30.0))
    run.result.write_text(json.dumps({"winner": {"architecture": str(architecture)}}))
    return str(folder)


def test_every_contender_within_the_cap_gets_a_row(
    compared: Callable[..., list[dict[str, Any]]], space: SearchSpace, tmp_path: Path
) -> None:
    smallest = space.at(0)
    run, cap = searched(tmp_path / "run", 5, smallest), 0.7 * macs(space, space.at(space.size - 1).choices)
    only = ("--only", compare.TEACHER, compare.OURS, *space.families)
    rows = compared("--max-macs", str(cap), "--run", run, *only)
    assert [row["name"] for row in rows] == [compare.TEACHER, compare.OURS, *space.families]
    assert {row["seed"] for row in rows} == {5}
    found = {row["name"]: row for row in rows}
    assert (found[compare.OURS]["network"], found[compare.OURS]["search_seconds"]) == (str(smallest), 30.0)
    assert found[compare.TEACHER]["epochs"] == 0
    for name, row in found.items():
        assert row["test_accuracy"] == row["hits"].count("1") / 30
        assert (row["macs"] <= cap) == (name != compare.TEACHER)
        if name in space.families:
            choices = Architecture.parse(row["network"]).choices
            assert choices in map(tuple, space.families[name].tolist())
            assert row["macs"] == macs(space, choices)


def test_a_comparison_resumes_and_grows(
    compared: Callable[..., list[dict[str, Any]]], space: SearchSpace, monkeypatch: pytest.MonkeyPatch
) -> None:
    cap = str(0.9 * macs(space, space.at(space.size - 1).choices))
    first = compared("--max-macs", cap, "--only", "uniform width")
    rows = compared("--max-macs", cap, "--only", "uniform width", "--seeds", "0", "1")
    assert rows[0] == first[0], "nothing is trained twice"
    assert [row["seed"] for row in rows] == [0, 1]
    monkeypatch.setattr(compare, "finish", lambda *_: pytest.fail("there is nothing left to train"))
    assert compared("--max-macs", cap, "--only", "uniform width", "--seeds", "1", "0") == rows
    assert compared("--max-macs", "1000", "--only", "uniform width") == rows, "no member is that small"
    with pytest.raises(UsageError, match="rows of another teacher or last training"):
        compared("--max-macs", cap, "--epochs", "2")


def test_the_subnet_of_fastnas_is_searched_for_once(
    compared: Callable[..., list[dict[str, Any]]], space: SearchSpace, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Model Optimizer itself is stood in for: half of the hidden channels of one stage, on images of a smaller size."""
    searches = []

    def half(network: fx.GraphModule, max_macs: float, train: tuple[Tensor, ...], valid: Any) -> dict[str, Tensor]:
        searches.append((valid[0].shape[-1], train[0].shape[-1], len(valid[0])))
        assert space.inherit is not None
        thin = [0 if choice.name == "width3" else len(choice.options) - 1 for choice in space.choices]
        return dict(space.inherit(network, tuple(thin)).state_dict())

    monkeypatch.setattr(fastnas, "search", half)
    cap = str(0.5 * macs(space, space.at(space.size - 1).choices))
    only = ("--max-macs", cap, "--only", "FastNAS on smaller images", "--seeds")
    rows = compared(*only, "0")
    compare.find.cache_clear()  # as in another process
    rows = compared(*only, "0", "1")
    assert searches == [(24, 24, 12)], "0.86 of 32 pixels, in steps of 8; a fifth of the images is for validation"
    assert [row["seed"] for row in rows] == [0, 1]
    assert rows[0]["network"].startswith("side 0.86, 32-")
    assert rows[0]["macs"] < macs(space, space.at(space.size - 1).choices)


def test_what_does_not_fit_together_is_refused(
    compared: Callable[..., list[dict[str, Any]]], space: SearchSpace, tmp_path: Path
) -> None:
    run = searched(tmp_path / "run", 0, space.at(space.size - 1))
    with pytest.raises(UsageError, match="its winner is not in .* within 1000 MACs"):
        compared("--max-macs", "1000", "--run", run, "--only", compare.OURS)
    with pytest.raises(UsageError, match="searches of different seeds"):
        compared("--max-macs", "1e9", "--run", run, run)
    with pytest.raises(UsageError, match="was not fine-tuned on .* at this --resolution"):
        compared("--max-macs", "1e9", "--resolution", "64")


# ---- FastNAS -------------------------------------------------------------


def tiny() -> fx.GraphModule:
    torch.manual_seed(0)
    library = Tiny()
    network = plain(library)
    add_features(network, anatomy(network, library))
    return network


def test_a_network_for_images_of_one_size_computes_the_same(space: SearchSpace) -> None:
    padded = load_space("pretrained:timm:tf_efficientnet_lite0")  # it pads by the size of its input
    for made in (space, padded):
        network = made.build(made.at(made.size - 1).choices, 3, 1.0).eval()
        images = torch.randn(2, 3, 48, 48)
        with torch.no_grad():
            torch.testing.assert_close(fastnas.fixed_size(network, 48)(images), network(images)[0], rtol=0, atol=0)


def test_a_rebuilt_subnet_is_the_network_that_its_weights_are_from(space: SearchSpace) -> None:
    assert space.inherit is not None
    largest = space.at(space.size - 1).choices
    network = space.build(largest, 3, 1.0)
    thin = tuple(0 if c.name.startswith(("width", "side")) else v for c, v in zip(space.choices, largest, strict=True))
    member = space.inherit(network, thin).eval()
    found = fastnas.rebuilt(network, dict(member.state_dict()), 0.71).eval()
    images = torch.randn(2, 3, PIXELS, PIXELS)
    with torch.no_grad():
        for one, other in zip(found(images)[1], member(images)[1], strict=True):
            torch.testing.assert_close(one, other, rtol=0, atol=0)
    assert count_cost(found, PIXELS) == count_cost(member, PIXELS)


@pytest.mark.skipif(not modelopt, reason="NVIDIA Model Optimizer is not installed (pip install 'mfkd[peers]')")
def test_fastnas_finds_a_subnet_within_the_cap() -> None:
    network, images = tiny(), torch.randn(24, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    batches = images[:12], images[12:]
    recalibrate(network, batches)
    with torch.no_grad():
        network.get_parameter("head.bias").sub_(network(images)[0].mean(0))  # so that all classes occur
        labels = network(images)[0].argmax(1)
    before = {name: value.clone() for name, value in network.state_dict().items()}
    whole = count_cost(network, 16)[0]
    weights = fastnas.search(network, 0.7 * whole, batches, (images, labels))
    assert weights is not None
    found = fastnas.rebuilt(network, weights, 1.0)
    assert count_cost(found, 16)[0] <= 0.7 * whole
    assert set(map(int, fastnas.widths(found).split("-"))) <= {32, 64, 96}
    logits, features = found.train()(images)
    assert (logits.shape, features[-1].shape) == ((24, 3), (24, 32, 8, 8))
    for name, value in network.state_dict().items():
        assert torch.equal(value, before[name]), "the network itself is left as it is"
    smallest = 55296 + 2 * 32 * (32 + 9 + 32) * 64  # the stem and two blocks of 32 hidden channels, at 8 x 8 pixels
    for cap in (0.5 * smallest, 1.01 * smallest):
        assert fastnas.search(network, cap, batches, (images, labels)) is None


def test_without_model_optimizer_fastnas_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "modelopt.torch.prune", None)
    with pytest.raises(EnvironmentUnusable, match=r"pip install"):
        fastnas.search(tiny(), 1e6, (), (torch.zeros(1, 3, 16, 16), torch.zeros(1)))


# ---- the table -----------------------------------------------------------


def test_the_table_compares_on_the_same_seeds_and_images(tmp_path: Path) -> None:
    """Of four images and two seeds, our search has 3 and 4 right, the peer 2 and 2, a third seed aside."""
    hits = {
        compare.OURS: {0: "1110", 1: "1111"},
        "FastNAS": {0: "1100", 1: "1100", 2: "0000"},
        compare.TEACHER: {0: "1111", 1: "1111"},
    }
    lines = [
        {"name": name, "max_macs": 2e6, "seed": seed, "macs": 1.5e6, "search_seconds": 60.0, "hits": text}
        for name, seeds in hits.items()
        for seed, text in seeds.items()
    ]
    (tmp_path / compare.ROWS).write_text("".join(json.dumps(line) + "\n" for line in lines))
    conclude.main([str(tmp_path)])
    page = (tmp_path / "peers.md").read_text()
    assert "## At most 2.0 million MACs" in page
    # By image, the mean difference over seeds is 0, 0, 1, 1/2: mean 3/8, standard error 0.4787 / 2. By seed: 1/4, 1/2.
    assert "| FastNAS | 1.5 | 3 | 60 | 33.3 ± 19.2 | +37.5 ± 23.9, 12.5 |" in page
    assert page.index(f"| {compare.TEACHER}") < page.index(f"| {compare.OURS} |") < page.index("| FastNAS")
    assert (tmp_path / "peers.png").stat().st_size > 10_000
