"""Training-free scores: their formulas on hand-computed cases, and networks that do not have some of them."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from bench.real_size.study import drawn, open_study, read_window
from engine.data.dataset import load
from engine.networks import Staged, conv_bn, pooled_classifier
from engine.space import Choice, SearchSpace
from engine.spaces.load import load_space
from engine.tasks import PROXIES
from engine.training import proxies
from engine.training.proxies import Codes, ProxyBatch, Relations, make_batch, relations, score_architectures
from engine.trial import Architecture
from surrogate.quality import kendall_tau

CELLS = "nasbench201:channels=4,cells=1"
CPU = torch.device("cpu")


def a_network(classes: int = 3) -> nn.Module:
    stem = conv_bn(3, 4, 3, activation=nn.ReLU())
    return Staged(stem, [conv_bn(4, 8, 3, 2, activation=nn.ReLU())], pooled_classifier(8, classes))


class Counted(nn.Module):
    """Counts its forward passes."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.network, self.asked = a_network().eval().requires_grad_(False), 0

    def forward(self, images: Tensor) -> tuple[Tensor, list[Tensor]]:
        self.asked += 1
        output: tuple[Tensor, list[Tensor]] = self.network(images)
        return output


class Functional(nn.Module):
    """A network whose activation is a function, not a module."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm, self.head = nn.Conv2d(3, 8, 3, 2, 1), nn.BatchNorm2d(8), nn.Linear(8, 3)

    def forward(self, images: Tensor) -> tuple[Tensor, list[Tensor]]:
        feature = torch.relu(self.norm(self.conv(images)))
        return self.head(feature.mean((2, 3))), [feature]


class Exploding(Functional):
    def forward(self, images: Tensor) -> tuple[Tensor, list[Tensor]]:
        logits, features = super().forward(images)
        return logits * math.inf, [features[0] * math.inf]


class Constant(Functional):
    def forward(self, images: Tensor) -> tuple[Tensor, list[Tensor]]:
        return super().forward(torch.zeros_like(images))


class Broken(Functional):
    def forward(self, images: Tensor) -> tuple[Tensor, list[Tensor]]:
        raise ValueError("no such shape")


def own_space(*made: Callable[[], nn.Module]) -> SearchSpace:
    choice = Choice("network", tuple(range(len(made))))
    return SearchSpace("own", (choice,), lambda choices, classes, width: made[choices[0]]())


@pytest.fixture(scope="module")
def batch(tiny_npz: Path) -> ProxyBatch:
    return make_batch(load(str(tiny_npz)), 0, CPU, Counted(), backend="resident")


def test_scores_depend_only_on_seed_and_architecture(batch: ProxyBatch) -> None:
    space, (first, second) = load_space(CELLS), (Architecture((3,) * 6), Architecture((1, 2, 3, 3, 2, 1)))
    together = score_architectures(space, [first, second], batch, 3, 1.0, seed=0)
    torch.rand(7)
    (alone,) = score_architectures(space, [second], batch, 3, 1.0, seed=0)
    assert alone.scores == together[1].scores
    assert set(alone.scores) == set(PROXIES)
    assert alone.missing == {}
    assert together[0].scores != together[1].scores
    (other,) = score_architectures(space, [second], batch, 3, 1.0, seed=1)
    assert all(other.scores[name] != alone.scores[name] for name in PROXIES)


def test_the_batch_depends_on_the_seed_and_runs_the_teacher_once(tiny_npz: Path) -> None:
    data, teacher = load(str(tiny_npz)), Counted()
    made = [make_batch(data, seed, CPU, teacher, backend="resident") for seed in (0, 0, 1)]
    assert torch.equal(made[0].images, made[1].images)
    assert torch.equal(made[0].noise, made[1].noise)
    assert not torch.equal(made[0].images, made[2].images)
    assert not torch.equal(made[0].noise, made[2].noise)
    assert made[0].images.shape == (proxies.IMAGES, 3, 16, 16)
    assert made[0].noise.shape == (proxies.NOISE_IMAGES, 3, 16, 16)
    assert teacher.asked == 3
    score_architectures(load_space(CELLS), load_space(CELLS).sample(2, 0), made[0], 3, 1.0, seed=0)
    assert teacher.asked == 3


def test_every_loader_gives_the_same_batch(tiny_npz: Path) -> None:
    data = load(str(tiny_npz))
    one, other = (make_batch(data, 0, CPU, backend=backend) for backend in ("dali", "resident"))
    assert torch.equal(one.labels, other.labels)
    torch.testing.assert_close(one.images, other.images, atol=1e-3, rtol=1e-3)


def test_another_resolution(tiny_npz: Path) -> None:
    made = make_batch(load(str(tiny_npz)), 0, CPU, resolution=8, backend="resident")
    assert made.images.shape[2:] == made.noise.shape[2:] == (8, 8)


def test_results_are_json(batch: ProxyBatch) -> None:
    (found,) = score_architectures(load_space(CELLS), [Architecture((3,) * 6)], batch, 3, 1.0, seed=0)
    assert found.seconds > 0
    again = json.loads(json.dumps(asdict(found)))
    assert again["scores"] == found.scores
    assert tuple(again["choices"]) == found.choices


@pytest.mark.parametrize("spec", ["mobilenetv2:width=0.1", "shufflenetv2:width=0.1"])
def test_every_built_in_space_has_every_score(spec: str, tiny_npz: Path) -> None:
    """Their heads have a convolution after the last stage, so classifier weights do not belong to stage channels."""
    made = make_batch(load(str(tiny_npz)), 0, CPU, Counted(), resolution=32, backend="resident")
    space = load_space(spec)
    (found,) = score_architectures(space, space.sample(1, seed=0), made, 3, 1.0, seed=0)
    assert (set(found.scores), found.missing) == (set(PROXIES), {})


# Networks without a score


def test_a_functional_relu_only_removes_naswot(batch: ProxyBatch) -> None:
    (found,) = score_architectures(own_space(Functional), [Architecture((0,))], batch, 3, 1.0, seed=0)
    assert set(found.scores) == set(PROXIES) - {"naswot"}
    assert "no ReLU module" in found.missing["naswot"]


def test_without_a_teacher_there_is_no_diswot(tiny_npz: Path) -> None:
    made = make_batch(load(str(tiny_npz)), 0, CPU, backend="resident")
    (found,) = score_architectures(own_space(a_network), [Architecture((0,))], made, 3, 1.0, seed=0)
    assert set(found.missing) == {"diswot"}
    assert "teacher" in found.missing["diswot"]


def test_failing_networks_have_reasons_and_do_not_stop_the_others(batch: ProxyBatch) -> None:
    space = own_space(Broken, Exploding, Constant, a_network)
    cohort = [Architecture((i,)) for i in range(4)]
    broken, exploding, constant, good = score_architectures(space, cohort, batch, 3, 1.0, seed=0)
    for bad in (broken, exploding):
        assert bad.scores == {}
        assert set(bad.missing) == set(PROXIES)
    assert "no such shape" in broken.missing["expressivity"]
    assert "nan" in exploding.missing["jacobian_covariance"]
    for name in ("diswot", "jacobian_covariance"):
        assert "does not depend on the images" in constant.missing[name]
    assert set(good.scores) == set(PROXIES)


# The formulas


def test_naswot_is_the_log_determinant_of_the_kernel_of_codes() -> None:
    codes = torch.tensor([[1.0, 1.0, 0.0], [1.0, 0.0, 0.0]])  # they agree in two of three units
    expected = math.log(np.linalg.det([[3.0, 2.0], [2.0, 3.0]]))
    assert proxies.naswot(Codes(codes @ codes.T, 3)) == pytest.approx(expected)


def test_naswot_sees_the_input_of_every_relu_call_even_in_place() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.relu = nn.ReLU(inplace=True)

        def forward(self, images: Tensor) -> Tensor:
            return self.relu(self.relu(images) - 1)

    images = torch.tensor([[2.0, -1.0], [0.5, 3.0]]).reshape(2, 1, 1, 2)
    network = Twice()
    with proxies._relu_codes(network) as found:
        network(images.clone())
    codes = torch.tensor([[1.0, 0.0, 1.0, 0.0], [1.0, 1.0, 0.0, 1.0]])  # of the images, then of relu(images) - 1
    assert found.active is not None
    assert found.active.tolist() == (codes @ codes.T).tolist()
    assert found.units == 4
    before = found.active.clone()
    network(images)
    assert torch.equal(found.active, before), "a hook was left behind"


def test_jacobian_covariance_is_largest_where_gradients_differ() -> None:
    rows = torch.tensor([[1.0, -1.0, 0.0, 0.0], [0.0, 0.0, 1.0, -1.0]])  # uncorrelated: both eigenvalues are 1
    floor = 1e-5
    assert proxies.jacobian_covariance(rows) == pytest.approx(-2 * (math.log(1 + floor) + 1 / (1 + floor)))
    alike = torch.stack([rows[0], rows[0] + 0.1 * rows[1]])
    assert proxies.jacobian_covariance(alike) < proxies.jacobian_covariance(rows)
    assert math.isnan(proxies.jacobian_covariance(torch.ones(2, 4)))


def test_activation_maps_of_a_pooled_linear_classifier_use_its_weights() -> None:
    torch.manual_seed(0)
    head = nn.Linear(5, 3)
    features, labels = torch.randn(4, 5, 2, 2, requires_grad=True), torch.tensor([0, 2, 1, 1])
    found = relations(head(features.mean((2, 3))), features, labels)
    maps = torch.einsum("nc,nchw->nhw", head.weight[labels], features).flatten(1)
    maps = maps / maps.norm(dim=1, keepdim=True)
    torch.testing.assert_close(found.maps, maps @ maps.T)
    rows = features.flatten(1) / features.flatten(1).norm(dim=1, keepdim=True)
    torch.testing.assert_close(found.features, rows @ rows.T)


def test_diswot_is_the_distance_to_the_teacher_and_0_at_the_teacher() -> None:
    teacher = Relations(torch.eye(2), torch.ones(2, 2))
    student = Relations(torch.tensor([[1.0, 0.5], [0.5, 1.0]]), torch.tensor([[1.0, 0.0], [0.0, 1.0]]))
    assert proxies.diswot(teacher, teacher) == 0
    assert proxies.diswot(student, teacher) == pytest.approx(-math.sqrt(2 * 0.5**2) - math.sqrt(2))


def test_expressivity_is_the_entropy_of_the_spectrum_of_each_stage() -> None:
    values = torch.randn(1000, generator=torch.Generator().manual_seed(0))
    one = torch.stack([values, 2 * values], dim=0).reshape(1, 2, 10, 100)  # one direction: no entropy
    assert proxies.expressivity([one]) == pytest.approx(0, abs=1e-4)
    white = torch.tensor([[1.0, -1.0, 1.0, -1.0], [1.0, 1.0, -1.0, -1.0]]).reshape(1, 2, 2, 2)
    assert proxies.expressivity([white]) == pytest.approx(math.log(2))
    assert proxies.expressivity([one, white]) == pytest.approx(math.log(2), abs=1e-4)
    assert math.isnan(proxies.expressivity([torch.ones(2, 3, 4, 4)]))


# At real size


def test_they_rank_benchmark_cells_of_equal_cost(shared_data: Path, tmp_path: Path) -> None:
    """24 cells of 43 to 47 million MACs against their accuracy after 200 epochs, with the published teacher."""
    window = read_window(shared_data)
    cells = drawn(window, 24)
    context, teacher = open_study(tmp_path, shared_data)
    made = make_batch(context.data, 0, CPU, teacher.network, backend="resident")
    architectures = [Architecture(tuple(map(int, cell))) for cell in cells]
    found = score_architectures(load_space("nasbench201"), architectures, made, 10, 1.0, seed=0)
    truth = [window[cell]["test_e200"] for cell in cells]
    for name in PROXIES:
        assert kendall_tau([one.scores[name] for one in found], truth) > 0.2, name
