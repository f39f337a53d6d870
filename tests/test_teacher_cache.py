"""The cache of a teacher's outputs: the same outputs, fewer forward passes, no more bytes than allowed."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from engine.config import SearchConfig
from engine.data.dataset import Dataset, load
from engine.data.loader import Batches, train_batches
from engine.training.distill import FeatureKey, Objective, teacher_output
from engine.training.teacher_cache import CachedTeacher

KEYS = {FeatureKey(0, True), FeatureKey(1, False)}


class Counted(nn.Module):
    """A teacher that counts its forward passes."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.one, self.two, self.head = nn.Conv2d(3, 4, 3, 2, 1), nn.Conv2d(4, 6, 3, 2, 1), nn.Linear(6, 3)
        self.passes = 0

    def forward(self, images: Tensor) -> tuple[Tensor, list[Tensor]]:
        self.passes += 1
        first = self.one(images).relu()
        second = self.two(first)
        return self.head(second.mean((2, 3))), [first, second]


@pytest.fixture
def batches(tiny_npz: Path) -> Batches:
    data: Dataset = load(str(tiny_npz))
    indices = np.arange(64)
    return train_batches(
        data.train, indices, data=data, batch_size=16, epochs=2, resolution=16, seed=0, backend="resident"
    )


def outputs(teacher: CachedTeacher, batches: Batches, feature_keys: set[FeatureKey] = KEYS) -> list[list[Tensor]]:
    output_at = teacher.outputs_for(batches, feature_keys)
    first = batches.first_epoch * batches.steps_per_epoch
    return [output_at(step, batch.images).tensors for step, batch in enumerate(batches, first)]


def same(one: list[list[Tensor]], other: list[list[Tensor]]) -> bool:
    return all(torch.equal(a, b) for x, y in zip(one, other, strict=True) for a, b in zip(x, y, strict=True))


def test_a_second_cohort_gets_the_same_outputs_from_the_cache(batches: Batches) -> None:
    network = Counted()
    teacher = CachedTeacher(network, budget=10**9)
    fresh = outputs(CachedTeacher(Counted()), batches)
    assert same(outputs(teacher, batches), fresh)
    assert network.passes == 8
    assert same(outputs(teacher, batches), fresh)
    assert network.passes == 8
    assert teacher.bytes == sum(tensor.nbytes for answer in fresh for tensor in answer)


@pytest.mark.parametrize(
    "changed", [{"seed": 1}, {"batch_size": 32}, {"resolution": 8}, {"indices": np.arange(1, 65)}], ids=str
)
def test_other_batches_are_computed_again(batches: Batches, changed: dict[str, object]) -> None:
    network = Counted()
    teacher = CachedTeacher(network, budget=10**9)
    outputs(teacher, batches)
    network.passes = 0
    other = replace(batches, **changed)  # type: ignore[arg-type]
    outputs(teacher, other)
    assert network.passes == len(other)


def test_a_resumed_training_finds_its_steps_in_the_cache(batches: Batches) -> None:
    network = Counted()
    teacher = CachedTeacher(network, budget=10**9)
    whole = outputs(teacher, batches)
    assert same(outputs(teacher, replace(batches, first_epoch=1)), whole[4:])
    assert network.passes == 8


def test_beyond_the_budget_the_first_outputs_are_kept(batches: Batches) -> None:
    """A search repeats the same steps: a cache of the latest would never hold the next one."""
    network = Counted()
    one = sum(tensor.nbytes for tensor in outputs(CachedTeacher(Counted()), batches)[0])
    teacher = CachedTeacher(network, budget=5 * one)
    fresh = outputs(teacher, batches)
    assert teacher.bytes == 5 * one
    network.passes = 0
    assert same(outputs(teacher, batches), fresh)
    assert network.passes == 3


def test_an_output_replaces_a_larger_one_only(batches: Batches) -> None:
    """With several losses in turn, the large outputs of the first do not keep out the small ones of the others."""
    network, small, large = Counted(), {FeatureKey(0, True)}, {FeatureKey(0, False), FeatureKey(1, False)}
    one_small, one_large = (
        sum(tensor.nbytes for tensor in outputs(CachedTeacher(Counted()), batches, keys)[0]) for keys in (small, large)
    )
    teacher = CachedTeacher(network, budget=4 * one_large)
    outputs(teacher, batches, large)
    assert teacher.bytes == 4 * one_large
    fresh = outputs(teacher, batches, small)
    cached = set(teacher.cache)
    network.passes = 0
    assert same(outputs(teacher, batches, small), fresh)
    assert network.passes == 0
    outputs(teacher, batches, large)
    assert (network.passes, set(teacher.cache)) == (8 - (len(cached) - 8), cached)
    assert teacher.bytes == 8 * one_small + (len(cached) - 8) * one_large <= teacher.budget


def test_without_a_budget_nothing_is_cached(batches: Batches) -> None:
    teacher = CachedTeacher(Counted())
    outputs(teacher, batches)
    assert teacher.cache == {}


def test_the_loss_on_attention_maps_equals_the_loss_on_features() -> None:
    torch.manual_seed(0)
    student = (torch.randn(4, 3), [torch.randn(4, 8, 8, 8)])
    teacher = (torch.randn(4, 3), [torch.randn(4, 16, 8, 8)])
    objective = Objective(SearchConfig(), "at", student, teacher)
    assert objective.feature_keys == [(0, True)]
    by_map = objective(student, teacher_output(teacher, objective.feature_keys), torch.tensor([0, 1, 2, 0]))
    objective.feature_keys = [FeatureKey(0, False)]
    by_features = objective(student, teacher_output(teacher, objective.feature_keys), torch.tensor([0, 1, 2, 0]))
    torch.testing.assert_close(by_map, by_features, rtol=1e-5, atol=0)
