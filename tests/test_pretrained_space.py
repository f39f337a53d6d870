"""Spaces of networks cut out of a pretrained one: structure, cost, inherited weights."""

from __future__ import annotations

import copy
from collections import Counter

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from engine.config import Plan
from engine.networks import count_activations, count_cost, library
from engine.networks.cut import Cut, cut, importance, kept_channels
from engine.networks.plain import SamePad2d, downsampled, plain
from engine.networks.pretrained import template
from engine.search.methods.mfkd import mfkd
from engine.search.methods.opening import opening_size
from engine.space import SearchSpace, candidates
from engine.spaces.load import load_space
from engine.training.inherit import recalibrate
from engine.trial import Architecture, Evaluation, Fidelity, History, UsageError

timm = pytest.importorskip("timm", reason="the networks of timm need timm")
NETWORKS = [
    "torchvision:mobilenet_v2",
    "torchvision:mobilenet_v3_small",
    "torchvision:resnet18",
    "timm:tf_efficientnet_lite0",
    "timm:mobilenetv4_conv_small",
    "timm:efficientnet_b0",
    "timm:resnet26",
]
CLASSES, PIXELS = 5, 64


def space_of(network: str) -> SearchSpace:
    return load_space(f"pretrained:{network}")


def images(count: int = 2, pixels: int = PIXELS) -> Tensor:
    return torch.randn(count, 3, pixels, pixels, generator=torch.Generator().manual_seed(0))


def disturbed(network: nn.Module) -> nn.Module:
    """BatchNorm as after a training: with statistics, scales and shifts of its own."""
    generator = torch.Generator().manual_seed(1)
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            for value in (module.weight, module.bias, module.running_mean, module.running_var):
                assert value is not None
                value.data = torch.rand(value.shape, generator=generator) + 0.5
    return network


@pytest.mark.parametrize("name", NETWORKS)
def test_the_graph_of_a_library_network_computes_the_same(name: str) -> None:
    torch.manual_seed(0)
    made = disturbed(library.network(name, CLASSES)).eval()
    with torch.no_grad():
        expected = made(images())
        found = plain(copy.deepcopy(made)).eval()(images())
    torch.testing.assert_close(found, expected, rtol=0, atol=0)


@pytest.mark.parametrize("name", NETWORKS)
def test_costs_in_closed_form_are_those_that_torch_counts(name: str) -> None:
    space = space_of(name)
    for pixels in (PIXELS, 100):
        for architecture in [*space.sample(2, seed=pixels), space.at(space.size - 1), space.at(0)]:
            row = np.array([architecture.choices], dtype=np.int8)
            network = space.build(architecture.choices, CLASSES, 1.0)
            macs, params = space.cost(row, CLASSES, 1.0, pixels)  # type: ignore[misc]
            assert (macs[0], params[0]) == count_cost(network, pixels)
            assert space.activations is not None
            assert space.activations(row, CLASSES, 1.0, pixels)[0] == count_activations(network, pixels)


@pytest.mark.parametrize("name", ["torchvision:mobilenet_v2", "timm:resnet26"])
def test_an_inherited_member_has_the_structure_of_a_built_one(name: str) -> None:
    space = space_of(name)
    assert space.inherit is not None
    largest = space.build(space.at(space.size - 1).choices, CLASSES, 1.0)
    for architecture in space.sample(3, seed=0):
        own = space.build(architecture.choices, CLASSES, 1.0)
        own.load_state_dict(space.inherit(largest, architecture.choices).state_dict())
        logits, features = own(images())
        assert logits.shape == (2, CLASSES)
        assert features[-1].shape[2] < features[0].shape[2], "coarsest last"


def test_the_largest_member_inherits_everything() -> None:
    space = space_of("torchvision:mobilenet_v2")
    assert space.inherit is not None
    largest = space.at(space.size - 1).choices
    trained = disturbed(space.build(largest, CLASSES, 1.0)).eval()
    with torch.no_grad():
        expected, found = trained(images())[0], space.inherit(trained, largest).eval()(images())[0]
    torch.testing.assert_close(found, expected, rtol=0, atol=0)


def test_channels_that_do_not_vary_are_cut_first() -> None:
    """BatchNorm absorbs a constant, so a channel with scale 0 is worth nothing, whatever its shift."""
    whole = template("torchvision:mobilenet_v2", CLASSES)
    stage = next(index for index, stage in enumerate(whole.stages) if stage[0].groups)
    group = whole.stages[stage][0].groups[0]
    trained = copy.deepcopy(whole.network)
    norm = next(m for n in reversed(group.tied) if isinstance(m := trained.get_submodule(n), nn.BatchNorm2d))
    dead = torch.arange(0, group.channels, 2)
    norm.weight.data[dead], norm.bias.data[dead] = 0.0, 3.0
    assert (importance(trained, group)[dead] < 1e-6 * importance(trained, group)[1]).all()
    widths = [0.5 if index == stage else 1.0 for index in range(len(whole.stages))]
    smaller = cut(trained, whole.stages, Cut(1.0, tuple(widths), tuple(map(len, whole.stages))))
    left = smaller.get_submodule(next(n for n in group.tied if trained.get_submodule(n) is norm))
    assert isinstance(left, nn.BatchNorm2d)
    assert left.num_features == kept_channels(group.channels, 0.5)
    assert (left.weight.data == 1).all()


def test_removed_blocks_leave_the_residual_stream() -> None:
    """A network whose last blocks add nothing computes the same without them."""
    whole = template("timm:resnet26", CLASSES)
    trained = copy.deepcopy(whole.network).eval()
    nodes = {node.name: node for node in trained.graph.nodes}
    for block in whole.stages[2][1:]:
        last = [n for n in block.layers if isinstance(trained.get_submodule(n), nn.BatchNorm2d)]
        into_sum = {str(a.target) for u in nodes[block.source].users for a in u.all_input_nodes}
        for name in set(last) & into_sum:
            norm = trained.get_submodule(name)
            assert isinstance(norm, nn.BatchNorm2d)
            norm.weight.data.zero_()
            norm.bias.data.zero_()
    repeats = [1 if index == 2 else len(stage) for index, stage in enumerate(whole.stages)]
    smaller = cut(trained, whole.stages, Cut(1.0, (1.0,) * len(repeats), tuple(repeats))).eval()
    assert count_cost(smaller, PIXELS)[0] < count_cost(trained, PIXELS)[0]
    with torch.no_grad():
        torch.testing.assert_close(smaller(images())[0], trained(images())[0], rtol=1e-5, atol=1e-5)


def test_a_smaller_input_is_resized_by_the_network() -> None:
    space = space_of("torchvision:resnet18")
    assert space.choices[0].name == "side"
    smallest = (0, *(radix - 1 for radix in space.radices[1:]))
    seen: list[int] = []
    network = space.build(smallest, CLASSES, 1.0)
    network.get_submodule("downsample").register_forward_hook(lambda *call: seen.append(call[2].shape[-1]))
    network(images(pixels=112))
    assert seen == [40]
    assert [downsampled(side, 1.0) for side in (30, 32, 224)] == [30, 32, 224]
    assert downsampled(32, 0.36) == 16


def test_padding_is_that_of_tensorflow() -> None:
    """Sizes are halved rounding up, and the odd pixel of padding is on the right."""
    conv = nn.Sequential(SamePad2d(3, 2), nn.Conv2d(1, 1, 3, 2, bias=False))
    assert [conv(torch.zeros(1, 1, n, n)).shape[-1] for n in (7, 8, 9)] == [4, 4, 5]
    assert SamePad2d(3, 2)(torch.ones(1, 1, 8, 8))[0, 0, 0].tolist() == [1.0] * 8 + [0.0]


@pytest.mark.parametrize(
    ("network", "reason"),
    [
        ("timm:vit_tiny_patch16_224", "no residual blocks of convolutions"),
        ("timm:mobilenetv4_hybrid_medium", "not convolutions"),
        ("timm:nothing_like_it", "no model"),
        ("torchvision:nothing", "no classification model"),
    ],
)
def test_what_cannot_be_cut_is_refused_by_name(network: str, reason: str) -> None:
    with pytest.raises(UsageError, match=reason) as refusal:
        space_of(network)
    assert network.split(":")[1] in str(refusal.value)


@pytest.mark.parametrize(
    "spec",
    ["pretrained:", "pretrained:resnet18", "pretrained:torchvision:vgg11_bn,min_width=2", "pretrained:timm:x,y=1"],
)
def test_wrong_specifications_are_usage_errors(spec: str) -> None:
    with pytest.raises(UsageError):
        load_space(spec)


def test_options_are_part_of_the_name_and_restrict_the_choices() -> None:
    space = load_space("pretrained:torchvision:resnet18,min_width=0.7,min_side=0.5")
    assert space.name == "pretrained:torchvision:resnet18,min_side=0.5,min_width=0.7"
    assert {choice.name: choice.options[0] for choice in space.choices}["width1"] == 0.7
    assert space.choices[0].options[0] == 0.5


def test_candidates_hold_the_families_and_the_largest_member() -> None:
    space = space_of("timm:tf_efficientnet_lite0")
    pool = candidates(space, CLASSES, 1.0, 112)
    assert len(pool) < space.size
    largest = Architecture(tuple(radix - 1 for radix in space.radices))
    assert pool.row(largest) == int(pool.macs.argmax())
    for rows in space.families.values():
        assert all(pool.row(Architecture(tuple(row))) is not None for row in rows.tolist())
    lower = space.families["lower resolution"]
    assert (lower[:, 1:] == np.array(space.radices[1:]) - 1).all()


def test_recalibration_averages_over_all_images() -> None:
    network = nn.Sequential(nn.Conv2d(3, 4, 1, bias=False), nn.BatchNorm2d(4, momentum=0.1), nn.Dropout(0.5)).train()
    first, second = images(8), 3 * images(8)
    recalibrate(network, (first, second))
    with torch.no_grad():
        mean = (network[0](first).mean((0, 2, 3)) + network[0](second).mean((0, 2, 3))) / 2
    norm = network[1]
    assert isinstance(norm, nn.BatchNorm2d)
    torch.testing.assert_close(norm.running_mean, mean)
    assert norm.momentum == 0.1
    assert not network.training


def test_a_search_opens_with_scores_of_inherited_weights() -> None:
    """It scores many candidates, ever better ones, before it trains any, and trains the named ones in full first."""
    space = load_space("pretrained:torchvision:resnet18,min_side=0.5")
    pool = candidates(space, CLASSES, 1.0, PIXELS)
    best = pool.features.sum(axis=1) - 0.5 * pool.features[:, 3]  # not MACs alone
    first = pool.architecture(7)
    opening = Fidelity("inherited", epochs=0)
    low, high = Fidelity("low", epochs=2, kd_loss="kd"), Fidelity("high", epochs=8)
    plan = Plan((low,), high, max_low=12, max_high=4, opening=opening, first=(first,), cohort=4)
    history, kinds = History(), Counter[str]()
    while trials := mfkd(pool, history, plan, 8):
        for trial in trials:
            kinds[trial.fidelity.name] += 1
            row = pool.row(trial.architecture)
            history.answered.append(Evaluation(trial, "ok", float(best[row]) / 20, seconds=trial.fidelity.cost()))
        if kinds["low"] == len(trials) and trials[0].fidelity == low:
            assert kinds["inherited"] == opening_size(pool, plan)
    scored = [float(best[pool.row(e.trial.architecture)]) for e in history.answered if e.trial.fidelity == opening]
    half = len(scored) // 2
    assert np.mean(scored[half:]) > np.mean(scored[:half])
    full = [e.trial.architecture for e in history.answered if e.trial.fidelity == high]
    assert full[0] == first
    assert max(float(best[pool.row(one)]) for one in full) > np.quantile(best, 0.99)
