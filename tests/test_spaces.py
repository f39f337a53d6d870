"""The spaces compared with independent sources: torch's counter, torchvision, the benchmark's table, algebra."""

from __future__ import annotations

import csv
import gzip
import subprocess
import sys
import tracemalloc
from itertools import combinations, pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torchvision
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from engine import space as space_module
from engine.networks import Staged, conv_bn, count_cost, pooled_classifier
from engine.networks.nasbench201 import Cell, Reduction
from engine.networks.shufflenetv2 import DownUnit, Unit, shuffle
from engine.space import Choice, SearchSpace, candidates
from engine.spaces import SPACES, mobilenetv2, nasbench201, shufflenetv2
from engine.spaces.arithmetic import rounded, strided, widths
from engine.spaces.load import load_space
from engine.trial import Architecture, UsageError

ROOT = Path(__file__).parents[1]
TABLE = ROOT.parent / "shared" / "data" / "nasbench201_cifar100.csv.gz"
EXAMPLE = f"{ROOT / 'examples' / 'my_space.py'}:SPACE"

SPECS = ("nasbench201", "nasbench201:channels=5,cells=1", "mobilenetv2", "mobilenetv2:width=0.25,stem_stride=2")
SPECS += ("shufflenetv2", "shufflenetv2:width=0.3")
SMALL = ("nasbench201:channels=4,cells=1", "mobilenetv2:width=0.1", "shufflenetv2:width=0.1", EXAMPLE)
few = settings(deadline=None, derandomize=True, max_examples=12)


def architectures(space: SearchSpace) -> st.SearchStrategy[Architecture]:
    return st.tuples(*(st.integers(0, radix - 1) for radix in space.radices)).map(Architecture)


def matrix(*rows: tuple[int, ...]) -> np.ndarray:
    return np.array(rows, dtype=np.int8)


def all_cells() -> np.ndarray:
    return nasbench201.nasbench201().all()


@pytest.fixture(scope="module")
def table() -> list[dict[str, str]]:
    if not TABLE.is_file():
        pytest.skip(f"no {TABLE.name} beside the repository: the benchmark's own numbers are not compared")
    with gzip.open(TABLE, "rt") as file:
        return list(csv.DictReader(file))


# Every space


def test_importing_the_spaces_does_not_import_torch() -> None:
    """Only the one that is cut out of a network needs it."""
    code = (
        "import sys, engine.spaces as s; [make() for name, make in s.SPACES.items() if name != 'pretrained']; "
        "sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0


@pytest.mark.parametrize("spec", SPECS)
def test_a_name_makes_the_space_again(spec: str) -> None:
    assert load_space(spec).name == spec


@pytest.mark.parametrize(("name", "size"), [("nasbench201", 5**6), ("mobilenetv2", 8**7), ("shufflenetv2", 12**3)])
def test_sizes(name: str, size: int) -> None:
    assert SPACES[name]().size == size


@pytest.mark.parametrize("spec", SPECS)
@given(data=st.data())
@few
def test_index_and_encoding(spec: str, data: st.DataObject) -> None:
    space = load_space(spec)
    one, other = data.draw(architectures(space)), data.draw(architectures(space))
    assert space.at(space.index(one)) == one
    features = space.encode(matrix(one.choices, other.choices))
    assert features.dtype == np.float32
    assert features.min() >= 0
    assert features.max() <= 1
    assert np.array_equal(features[0], features[1]) == (one == other)


@pytest.mark.parametrize("spec", SPECS)
@given(data=st.data(), width=st.floats(0.1, 2), resolution=st.integers(1, 224), classes=st.sampled_from([1, 10, 100]))
@settings(few, max_examples=5)
def test_cost_is_what_torch_counts(spec: str, data: st.DataObject, width: float, resolution: int, classes: int) -> None:
    space = load_space(spec)
    architecture = data.draw(architectures(space))
    with torch.device("meta"):
        network = space.build(architecture.choices, classes, width)
    macs, params = space.cost(matrix(architecture.choices), classes, width, resolution)
    assert (macs[0], params[0]) == count_cost(network, resolution)


@pytest.mark.parametrize(
    ("spec", "sizes"),
    [
        ("nasbench201:channels=4,cells=1", [1, 2, 4]),
        ("mobilenetv2:width=0.1", [1, 2, 4, 8, 16]),
        ("mobilenetv2:width=0.1,stem_stride=2", [2, 4, 8, 16, 32]),
        ("shufflenetv2:width=0.1", [2, 4, 8]),
        (EXAMPLE, [1, 2, 4]),
    ],
)
@pytest.mark.parametrize("resolution", [16, 17, 32, 224])
def test_features_halve_and_are_what_the_docs_say(spec: str, sizes: list[int], resolution: int) -> None:
    space = load_space(spec)
    with torch.device("meta"):
        network = space.build(space.sample(1, resolution)[0].choices, 7, 1.0).eval()
        logits, features = network(torch.empty(2, 3, resolution, resolution))
    assert logits.shape == (2, 7)
    assert [tuple(f.shape[2:]) for f in features] == [(-(-resolution // s),) * 2 for s in sizes]


def test_features_of_any_two_spaces_match_in_size() -> None:
    sizes = {}
    for spec in SMALL:
        space = load_space(spec)
        features = space.build(space.at(0).choices, 10, 1.0).eval()(torch.zeros(2, 3, 32, 32))[1]
        sizes[spec] = {f.shape[-1] for f in features}
    for one, other in combinations(SMALL, 2):
        assert len(sizes[one] & sizes[other]) >= 2, (one, other)


@pytest.mark.parametrize("spec", SMALL)
def test_a_training_step_with_features(spec: str) -> None:
    """Features are returned as each stage left them, in channels_last; logits and features train every parameter."""
    space = load_space(spec)
    choices = tuple(min(radix - 1, 3) for radix in space.radices)
    network = space.build(choices, 10, 1.0).to(memory_format=torch.channels_last)
    left = []
    for stage in network.stages:
        stage.register_forward_hook(lambda module, inputs, output: left.append(output.detach().clone()))
    images = torch.randn(4, 3, 16, 16).to(memory_format=torch.channels_last)
    logits, features = network(images)
    (logits.square().mean() + sum(f.square().mean() for f in features)).backward()
    for feature, copy in zip(features, left, strict=True):
        assert torch.equal(feature, copy)
        assert feature.is_contiguous(memory_format=torch.channels_last)
    for name, parameter in network.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name
        assert parameter.grad.count_nonzero() > 0, name


@pytest.mark.parametrize("spec", SMALL)
def test_evaluation_does_not_depend_on_the_batch(spec: str) -> None:
    torch.manual_seed(0)
    space = load_space(spec)
    network = space.build(space.at(space.size - 2).choices, 10, 1.0).eval().double()
    images = torch.randn(2, 3, 32, 32, dtype=torch.float64)
    with torch.no_grad():
        both, one = network(images)[0], network(images[:1])[0]
    assert both.isfinite().all()
    torch.testing.assert_close(both[:1], one)
    assert not torch.equal(both[0], both[1])


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("nasbench201:channels=0", "channels=0; it must be 1 to 512"),
        ("nasbench201:cells=-1", "cells=-1; it must be 1 to 50"),
        ("mobilenetv2:width=0", "must be greater than 0"),
        ("mobilenetv2:stem_stride=3", "use 1 .* or 2"),
        ("shufflenetv2:width=-1", "must be greater than 0"),
    ],
)
def test_impossible_options_are_refused(spec: str, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        load_space(spec)


# Channel arithmetic


@given(st.lists(st.integers(1, 1000), min_size=1, max_size=5).map(sorted), st.floats(0.01, 4), st.sampled_from([4, 8]))
@few
def test_options_stay_distinct_at_any_width(bases: list[int], width: float, multiple: int) -> None:
    channels = widths(bases, width, multiple)
    assert all(c % multiple == 0 and c >= 8 for c in channels)
    assert all(a < b for a, b in pairwise(channels))
    assert channels[0] == rounded(bases[0] * width, multiple) >= 0.9 * bases[0] * width


@pytest.mark.parametrize(
    ("channels", "multiple", "expected"),
    [(36, 8, 40), (4, 8, 8), (0.1, 4, 8), (11, 8, 16), (116, 4, 116), (29, 4, 28), (1280 * 0.25, 8, 320)],
)
def test_rounding(channels: float, multiple: int, expected: int) -> None:
    """To the nearest multiple, but 11 to 16: 8 would be more than a tenth below."""
    assert rounded(channels, multiple) == expected


@pytest.mark.parametrize(
    ("channels", "width", "expected"),
    [(16, 1.0, (16, 32, 64)), (16, 1.3, (21, 42, 84)), (16, 0.25, (8, 16, 32)), (4, 0.25, (4, 8, 16))],
)
def test_nasbench201_channels(channels: int, width: float, expected: tuple[int, ...]) -> None:
    assert nasbench201.stage_channels(channels, width) == expected


@given(st.integers(1, 300), st.sampled_from([1, 2]), st.sampled_from([1, 3, 5]))
@few
def test_sizes_round_up_as_convolutions_do(size: int, stride: int, kernel: int) -> None:
    with torch.device("meta"):
        assert conv_bn(1, 1, kernel, stride).eval()(torch.empty(1, 1, size, size)).shape[-1] == strided(size, stride)


# NAS-Bench-201


def test_cost_and_parameters_are_the_benchmarks(table: list[dict[str, str]]) -> None:
    """Its MACs count the additions of the classifier's bias, 100 of them, which torch's counter does not."""
    cells = matrix(*(tuple(map(int, row["ops"])) for row in table))
    macs, params = nasbench201.nasbench201().cost(cells, 100, 1.0, 32)
    assert len(table) == 5**6
    assert np.array_equal(macs + 100, [int(row["macs"]) for row in table])
    assert np.array_equal(params, [int(row["params"]) for row in table])


def test_isomorphism_classes_are_the_benchmarks(table: list[dict[str, str]]) -> None:
    pairs = {(nasbench201.canonical(tuple(map(int, row["ops"]))), row["iso"]) for row in table}
    assert len(pairs) == len({ours for ours, _ in pairs}) == len({theirs for _, theirs in pairs}) == 6466


def test_cell_strings_are_the_benchmarks(table: list[dict[str, str]]) -> None:
    for row in table:
        architecture = Architecture(tuple(map(int, row["ops"])))
        assert nasbench201.to_string(architecture) == row["arch"]
        assert nasbench201.from_string(row["arch"]) == architecture


@pytest.mark.parametrize(
    "text",
    [
        "",
        "3-3-3-3-3-3",
        "|none~0|+|none~0|none~1|+|none~0|none~1|",
        "|none~0|+|none~0|none~1|+|none~0|none~1|conv_7x7~2|",
        "|none~0|+|none~0|none~0|+|none~0|none~1|none~2|",
        "|none~0|+|none~0|none~1|+|none~0|none~1|none~2| ",
    ],
)
def test_other_text_is_refused_as_a_cell(text: str) -> None:
    with pytest.raises(UsageError, match=r"write it like \|nor_conv_3x3~0\|\+"):
        nasbench201.from_string(text)


def values(cells: np.ndarray) -> np.ndarray:
    """What cells (n, 6) compute on numbers, every operation being some odd function: (n, points)."""
    functions = (lambda x: 0 * x, lambda x: x, lambda x: np.sin(3 * x), lambda x: np.tanh(2 * x), lambda x: x**3 - x)
    nodes = np.zeros((4, len(cells), 5))
    nodes[0] = np.linspace(0.3, 0.9, 5)
    for (target, source), column in zip(nasbench201.EDGES, cells.T, strict=True):
        nodes[target] += np.choose(column[:, None], [f(nodes[source]) for f in functions])
    return nodes[3]


def test_isomorphic_cells_compute_the_same_and_the_cheapest_represents_them() -> None:
    cells = all_cells()
    chosen = matrix(*(nasbench201.canonical(tuple(row)) for row in cells.tolist()))
    assert len(np.unique(chosen, axis=0)) == 6466
    assert np.array_equal(chosen, [nasbench201.canonical(tuple(row)) for row in chosen.tolist()])
    np.testing.assert_allclose(values(chosen), values(cells), atol=1e-12)
    space = nasbench201.nasbench201()
    for ours, theirs in zip(space.cost(chosen, 10, 1.0, 32), space.cost(cells, 10, 1.0, 32), strict=True):
        assert (ours <= theirs).all()


def test_candidates_are_one_of_each_class() -> None:
    pool = candidates(nasbench201.nasbench201(), 10, 1.0, 32)
    assert len(pool) == 6466
    assert pool.row(Architecture((0,) * 6)) is not None


@pytest.mark.parametrize(
    ("cell", "why"),
    [
        ((0, 0, 0, 0, 0, 0), "no edge at all"),
        ((3, 0, 0, 0, 0, 0), "a convolution that leads nowhere"),
        ((0, 0, 3, 0, 2, 3), "convolutions of zero"),
        ((0, 0, 4, 0, 4, 1), "a pool of zero"),
        ((3, 3, 0, 0, 0, 0), "the output node is not reached"),
    ],
)
def test_a_cell_that_ignores_its_input_still_trains(cell: tuple[int, ...], why: str) -> None:
    network = nasbench201.nasbench201(channels=4, cells=1).build(cell, 10, 1.0)
    optimiser = torch.optim.SGD(network.parameters(), lr=0.1, momentum=0.9)
    for _ in range(2):
        logits, features = network(torch.randn(4, 3, 8, 8))
        loss = nn.functional.cross_entropy(logits, torch.arange(4)) + sum(f.square().mean() for f in features)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    assert logits.isfinite().all(), why
    assert network.head[-1].bias.grad.count_nonzero() == 10
    assert all(p.grad.isfinite().all() for p in network.parameters() if p.grad is not None)
    one, other = network.eval()(torch.randn(2, 3, 8, 8))[0]
    assert torch.equal(one, other)


def test_blocks_are_the_benchmarks() -> None:
    """ReLU, convolution, BatchNorm; the residual block adds a pooled 1x1 shortcut and has no ReLU after the sum."""
    torch.manual_seed(0)
    image = torch.randn(2, 4, 7, 7)
    block = Reduction(4, 8).eval()
    conv1, norm1, conv2, norm2, shortcut = (m for m in block.modules() if isinstance(m, (nn.Conv2d, nn.BatchNorm2d)))
    for norm in (norm1, norm2):
        nn.init.normal_(norm.running_mean)
    inner = norm1(nn.functional.conv2d(image.relu(), conv1.weight, stride=2, padding=1))
    body = norm2(nn.functional.conv2d(inner.relu(), conv2.weight, padding=1))
    share = nn.functional.avg_pool2d(nn.functional.pad(torch.ones(2, 4, 7, 7), (0, 1, 0, 1)), 2)
    pooled = nn.functional.avg_pool2d(nn.functional.pad(image, (0, 1, 0, 1)), 2) / share
    torch.testing.assert_close(block(image), body + nn.functional.conv2d(pooled, shortcut.weight))


def test_cells_sum_into_nodes() -> None:
    image = torch.rand(2, 4, 5, 5)
    names = {"s": "skip_connect", "0": "none", "p": "avg_pool_3x3"}

    def output(cell: str) -> torch.Tensor:
        return Cell(tuple(names[letter] for letter in cell), nasbench201.EDGES, 4)(image)

    torch.testing.assert_close(output("ssssss"), 4 * image)  # node 1 is x, 2 is 2x, 3 is x + x + 2x
    torch.testing.assert_close(output("s0s00s"), image)
    torch.testing.assert_close(output("0s0s0s"), 2 * image)
    pooled = output("000p00")
    torch.testing.assert_close(pooled[..., 0, 0], image[..., :2, :2].mean((2, 3)))  # padding is not averaged in
    torch.testing.assert_close(pooled[..., 2, 2], image[..., 1:4, 1:4].mean((2, 3)))


# MobileNetV2 and ShuffleNetV2


def assert_same_function(ours: nn.Module, theirs: nn.Module) -> None:
    """With their weights, layer by layer in order, and random statistics of the norms, the logits are theirs."""
    for module in theirs.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.running_mean, std=0.1)
            nn.init.uniform_(module.running_var, 0.01, 1)
    ours.load_state_dict(dict(zip(ours.state_dict(), theirs.state_dict().values(), strict=True)))
    images = torch.randn(2, 3, 48, 48, dtype=torch.float64)
    with torch.no_grad():
        expected = theirs.double().eval()(images)
        torch.testing.assert_close(ours.double().eval()(images)[0], expected)
    assert not torch.allclose(expected[0], expected[1])


def test_the_published_mobilenetv2_is_a_member() -> None:
    space = mobilenetv2.mobilenetv2(stem_stride=2)
    choices = tuple(value for repeats in (1, 2, 3, 4, 3, 3, 1) for value in (repeats - 1, 0))
    macs, params = space.cost(matrix(choices), 1000, 1.0, 224)
    assert (macs[0], params[0]) == (300_774_272, 3_504_872)
    assert_same_function(space.build(choices, 1000, 1.0), torchvision.models.mobilenet_v2())


@pytest.mark.parametrize(("option", "published"), list(enumerate(["x0_5", "x1_0", "x1_5"])))
def test_the_published_shufflenetv2_are_members(option: int, published: str) -> None:
    """Except for the stride 2 of their stem and the pooling after it, which we leave out."""
    theirs = getattr(torchvision.models, f"shufflenet_v2_{published}")()
    theirs.conv1[0].stride, theirs.maxpool = (1, 1), nn.Identity()
    choices = (1, option, 2, option, 1, option)
    assert_same_function(shufflenetv2.shufflenetv2().build(choices, 1000, 1.0), theirs)


def test_depthwise_networks_start_as_he_et_al() -> None:
    network = mobilenetv2.mobilenetv2().build((3, 1) * 7, 10, 1.0)
    for conv in (module for module in network.modules() if isinstance(module, nn.Conv2d)):
        if conv.weight.numel() > 10_000:
            fan_out = conv.out_channels * conv.kernel_size[0] ** 2
            assert conv.weight.std().item() == pytest.approx((2 / fan_out) ** 0.5, rel=0.05)


def test_units_split_and_shuffle() -> None:
    a, b = torch.tensor([1.0, 2, 3]).view(1, 3, 1, 1), torch.tensor([4.0, 5, 6]).view(1, 3, 1, 1)
    assert shuffle(a, b).flatten().tolist() == [1, 4, 2, 5, 3, 6]
    half = torch.empty(2, 4, 5, 5, device="meta").to(memory_format=torch.channels_last)  # as any device but a CPU
    assert shuffle(half, half).is_contiguous(memory_format=torch.channels_last)
    image = torch.rand(2, 8, 6, 6)
    output = Unit(8)(image)
    assert torch.equal(output[:, ::2], image[:, :4])
    assert DownUnit(8, 20)(image).shape == (2, 20, 3, 3)


def test_the_cost_of_all_of_mobilenetv2_takes_half_a_gigabyte() -> None:
    space = mobilenetv2.mobilenetv2()
    tracemalloc.start()
    choices = space.all()
    macs, params = space.cost(choices, 100, 1.0, 32)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 500e6
    rows = np.random.default_rng(0).integers(space.size, size=100)
    again = space.cost(choices[rows], 100, 1.0, 32)
    assert np.array_equal([macs[rows], params[rows]], again)
    assert macs.argmin() == params.argmin() == 0
    assert macs.argmax() == params.argmax() == space.size - 1


# Counting


class Net(nn.Module):
    """A convolution used twice, one used never, and a classifier."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 3, padding=1)
        self.norm = nn.BatchNorm2d(3)
        self.idle = nn.Conv2d(3, 5, 1)
        self.same = self.conv
        self.head = pooled_classifier(3, 4)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.head(self.same(self.norm(self.conv(images))))


def test_count_cost_agrees_with_a_count_by_hand_and_leaves_the_network_alone() -> None:
    network = Net().train()
    network.idle.eval()
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    places = [tensor.data_ptr() for tensor in network.state_dict().values()]
    assert count_cost(network, 1)[0] == 2 * 3 * 3 * 9 + 3 * 4  # one value a channel: only evaluation can do it
    macs, params = count_cost(network, 6)
    assert macs == 2 * 3 * 3 * 9 * 36 + 3 * 4
    assert params == (3 * 3 * 9 + 3) + 2 * 3 + (3 * 5 + 5) + (3 * 4 + 4)
    assert places == [tensor.data_ptr() for tensor in network.state_dict().values()]
    assert all(torch.equal(tensor, before[name]) for name, tensor in network.state_dict().items())
    assert network.norm.training
    assert not network.idle.training
    assert network(torch.rand(2, 3, 6, 6)).device.type == "cpu"


def test_a_network_is_counted_on_any_device() -> None:
    space = load_space(SMALL[0])
    with torch.device("meta"):
        on_meta = space.build((3,) * 6, 10, 1.0)
    assert count_cost(on_meta, 32) == count_cost(space.build((3,) * 6, 10, 1.0), 32)


# A user's own


def test_the_example_is_a_space(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(space_module, "POOL_WITHOUT_COST", 6)
    space = load_space(EXAMPLE)
    assert space.size == 24**3
    pool = candidates(space, 10, 1.0, 32)
    assert 1 < len(pool) <= 6
    for row in range(len(pool)):
        network = space.build(pool.architecture(row).choices, 10, 1.0)
        assert sum(p.numel() for p in network.parameters()) == pool.params[row]
    assert len(Path(EXAMPLE.rpartition(":")[0]).read_text().splitlines()) <= 36


def _count(choices: np.ndarray, classes: int, width: float, resolution: int) -> tuple[np.ndarray, np.ndarray]:
    total = 1.0 + choices.sum(axis=1)
    return total, total


@pytest.mark.parametrize("cost", [None, _count])
def test_a_space_of_any_size_has_candidates(cost: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """A pool of random members represents more than 64 bits can count."""
    monkeypatch.setattr(space_module, "POOL_WITHOUT_COST", 20)
    monkeypatch.setattr(space_module, "POOL", 20)
    monkeypatch.setattr(space_module, "_counted", lambda space, row, *_: (sum(row) + 1, 1))
    huge = SearchSpace("huge", tuple(Choice(f"c{i}", tuple(range(8))) for i in range(40)), no_network, cost)
    assert huge.size == 8**40
    assert len(candidates(huge, 10, 1.0, 32)) == 20
    some = [huge.at(8**39), huge.at(5), huge.at(8**39)]
    assert len(candidates(huge, 10, 1.0, 32, only=some)) == 2, "an architecture named twice is one candidate"


@pytest.mark.parametrize("cost", [None, _count])
def test_a_space_no_larger_than_its_pool_is_used_completely(cost: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(space_module, "_counted", lambda space, row, *_: (sum(row) + 1, 1))
    choices = tuple(Choice(f"c{i}", (1, 2, 3)) for i in range(5))
    assert len(candidates(SearchSpace("plain", choices, no_network, cost), 10, 1.0, 32)) == 3**5
    twins = SearchSpace("twins", choices, no_network, cost, canonical=lambda row: tuple(sorted(row)))
    found = candidates(twins, 10, 1.0, 32)
    assert len(found) == 21  # multisets of 5 out of 3
    assert all(tuple(row) == tuple(sorted(row)) for row in found.choices.tolist())


def no_network(choices: tuple[int, ...], classes: int, width: float) -> nn.Module:
    raise AssertionError("no network should be built")


def test_a_file_with_a_dataclass_of_its_own_can_be_loaded(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(
        "from __future__ import annotations\nfrom dataclasses import dataclass\n"
        "from engine.space import Choice, SearchSpace\n\n"
        "@dataclass\nclass Block:\n    size: int\n\n"
        "SPACE = SearchSpace('mine', (Choice('size', (1, 2)),), lambda *_: Block(1))\n"
    )
    assert load_space(f"{tmp_path / 'mine.py'}:SPACE").size == 2


def test_a_space_of_any_choices_may_be_built_from_the_shared_parts() -> None:
    def build(choices: tuple[int, ...], classes: int, width: float) -> nn.Module:
        return Staged(nn.Identity(), [conv_bn(3, 8, (1, 3)[choices[0]])], pooled_classifier(8, classes))

    space = SearchSpace("one", (Choice("kernel", (1, 3)),), build)
    pool = candidates(space, 2, 1.0, 4)
    assert pool.macs.tolist() == [3 * 8 * 16 + 16, 3 * 8 * 9 * 16 + 16]
