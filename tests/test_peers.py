"""The comparison of searches in pretrained spaces with FastNAS, and the table of it."""

from __future__ import annotations

import importlib.util
import json
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, fx, nn

from bench.pretrained import compare, conclude, fastnas
from engine.config import Budget, SearchConfig, Slots, final_fidelity
from engine.data.batches import Batches
from engine.data.dataset import fingerprint, load
from engine.networks import count_cost
from engine.networks.anatomy import add_features, anatomy
from engine.networks.plain import plain
from engine.recipes import default_config
from engine.run_folder import RunFolder
from engine.search.journal import Journal
from engine.space import SearchSpace
from engine.spaces.load import load_space
from engine.training import teacher as teachers
from engine.training.inherit import recalibrate
from engine.trial import (
    EnvironmentUnusable,
    Evaluation,
    Fidelity,
    Trial,
    UsageError,
    hits_from_text,
    hits_to_text,
)

SPACE = "pretrained:torchvision:mobilenet_v2,min_side=0.5,min_width=0.7"
PIXELS = 32
HITS = hits_to_text([True] * 27 + [False] * 3)
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


@pytest.fixture
def searched(data: Path, space: SearchSpace, tmp_path: Path) -> Callable[..., RunFolder]:
    """Makes the folder of a finished search: its teacher is untrained, its evaluations are made up."""

    def make(name: str, max_macs: float, seed: int = 0) -> RunFolder:
        run, largest, found = RunFolder(tmp_path / name), space.at(space.size - 1), load(str(data), seed=seed)
        high, final = Fidelity("high", epochs=1, kd_loss="kd"), Fidelity("final", epochs=2, kd_loss="kd")
        recipe = replace(default_config(SearchConfig(space=SPACE)), batch_size=16, teacher_epochs=1)
        config = replace(recipe, data=str(data), seed=seed, max_macs=max_macs, high=high, final=final)
        run.path.mkdir()
        run.fix_config("search", config, Budget(), Slots(1, 1))
        low, last = (Trial(n, space.at(0), fid, seed) for n, fid in enumerate((config.low, final_fidelity(config))))
        evaluations = [
            Evaluation(low, "ok", 0.5, seconds=30.0),
            Evaluation(last, "ok", 0.9, macs=5, params=2, seconds=90.0, hits=HITS),
        ]
        with Journal(run.journal) as journal:
            for evaluation in evaluations:
                journal.ask([evaluation.trial], 0)
                journal.answer(evaluation)
        broken = {"name": "uniform width", "architecture": str(largest), "status": "oom", "error": "no memory"}
        lower = {"name": "lower resolution", "architecture": str(space.at(0)), "macs": 5, "test_accuracy": 0.9}
        result = {"evaluations": {"low": 1, "final": 1}, "final": lower, "baselines": [broken, lower]}
        run.result.write_text(json.dumps(result))
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
        torch.manual_seed(seed)
        teachers.save(run.teacher, space.build(largest.choices, 3, 1.0), card)
        return run

    return make


@pytest.fixture
def stub(monkeypatch: pytest.MonkeyPatch, space: SearchSpace) -> list[tuple[int, ...]]:
    """Stands in for Model Optimizer: halves the hidden channels of one stage, unless the cap is tiny. Returns the list
    of the sizes of images that it is called with."""
    calls: list[tuple[int, ...]] = []

    def search(network: fx.GraphModule, max_macs: float, train: tuple[Tensor, ...], valid: Any) -> Any:
        calls.append((train[0].shape[-1], valid[0].shape[-1], len(valid[0])))
        assert space.inherit is not None
        thin = [0 if choice.name == "width3" else len(choice.options) - 1 for choice in space.choices]
        return dict(space.inherit(network, tuple(thin)).state_dict()) if max_macs > 1000 else None

    monkeypatch.setattr(fastnas, "search", search)
    return calls


def rows_of(folder: Path, *runs: RunFolder) -> list[dict[str, Any]]:
    compare.main([*map(str, runs), "--out", str(folder)])
    return [json.loads(line) for line in (folder / compare.ROWS).read_text().splitlines()]


def test_a_run_brings_its_own_rows_and_fastnas_is_added(
    searched: Callable[..., RunFolder], stub: list[tuple[int, ...]], tmp_path: Path, space: SearchSpace
) -> None:
    rows = rows_of(tmp_path / "out", searched("run", 4e6, seed=3))
    found = {row["name"]: row for row in rows}
    assert list(found) == [compare.TEACHER, compare.OURS, "lower resolution", compare.FASTNAS, compare.FASTNAS_SMALLER]
    assert {(row["max_macs"], row["seed"]) for row in rows} == {(4e6, 3)}
    ours = found[compare.OURS]
    assert (ours["network"], ours["macs"], ours["hits"]) == (str(space.at(0)), 5, HITS)
    assert ours["seconds"] == 30.0, "without the last trainings"
    assert all(len(hits_from_text(row["hits"])) == 30 for row in rows)
    whole = space.build(space.at(space.size - 1).choices, 3, 1.0)
    assert (found[compare.TEACHER]["macs"], found[compare.TEACHER]["params"]) == count_cost(whole, PIXELS)
    small = found[compare.FASTNAS_SMALLER]
    assert small["macs"] < found[compare.FASTNAS]["macs"] < found[compare.TEACHER]["macs"]
    assert small["network"].startswith("side 0.86, 32-")
    assert stub == [(32, 32, 12), (24, 24, 12)], "a fifth of the training images is for validation"


def test_the_subnet_is_trained_to_the_end_as_the_winner_was(
    searched: Callable[..., RunFolder], stub: list[tuple[int, ...]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trained = []

    def note(cohort: Any, teacher: Any, batches: Batches, *rest: Any) -> None:
        trained.append((batches.epochs, batches.seed, len(batches.split), teacher is not None))

    monkeypatch.setattr(compare, "train", note)
    rows_of(tmp_path / "out", searched("run", 4e6, seed=3))
    assert trained == [(2, 3, 60, True)] * 2, "on training and validation images, distilled"


def test_a_comparison_resumes_and_grows(
    searched: Callable[..., RunFolder], stub: list[tuple[int, ...]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(compare, "finish", lambda case, network: None)
    first, second, out = searched("first", 4e6), searched("second", 4e6, seed=1), tmp_path / "out"
    rows = rows_of(out, first)
    (out / compare.ROWS).write_text("".join(json.dumps(row) + "\n" for row in rows[:-1]))
    again = rows_of(out, first, second)
    assert again[: len(rows)] == rows
    assert [row["seed"] for row in again] == [0] * 5 + [1] * 5
    assert len(stub) == 4, "no subnet is searched for twice"


def test_what_fastnas_cannot_find_has_no_row(
    searched: Callable[..., RunFolder], stub: list[tuple[int, ...]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = rows_of(tmp_path / "out", searched("run", 1000.0))
    assert [row["name"] for row in rows] == [compare.TEACHER, compare.OURS, "lower resolution"]
    assert "FastNAS finds no network of at most 1000 MACs" in capsys.readouterr().out


def test_a_run_without_a_finished_winner_is_refused(searched: Callable[..., RunFolder], tmp_path: Path) -> None:
    run = searched("run", 4e6)
    run.result.write_text(json.dumps(json.loads(run.result.read_text()) | {"final": None}))
    with pytest.raises(UsageError, match="no finished winner; run its search again with --final-training always"):
        rows_of(tmp_path / "out", run)


# ---- FastNAS -------------------------------------------------------------


def tiny() -> fx.GraphModule:
    torch.manual_seed(0)
    library = Tiny()
    network = plain(library)
    add_features(network, anatomy(network, library))
    return network


def test_a_network_for_images_of_one_size_computes_the_same(space: SearchSpace) -> None:
    pytest.importorskip("timm", reason="the network is timm's")
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
    found = fastnas.rebuilt(network, dict(member.state_dict()), 0.5).eval()
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
    about = {"max_macs": 2e6, "macs": 1.5e6, "seconds": 60.0}
    lines = [
        {"name": name, "seed": seed, **about, "hits": hits_to_text(digit == "1" for digit in text)}
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
