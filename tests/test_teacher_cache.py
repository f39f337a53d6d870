"""What the teacher said is kept: the same lessons, fewer questions, no more bytes than allowed."""

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
from engine.training.distill import Objective, teacher_output
from engine.training.teacher_cache import CachedTeacher

TAPS = {(0, True), (1, False)}


class Counted(nn.Module):
    """A teacher that counts how often it is asked."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.one, self.two, self.head = nn.Conv2d(3, 4, 3, 2, 1), nn.Conv2d(4, 6, 3, 2, 1), nn.Linear(6, 3)
        self.asked = 0

    def forward(self, images: Tensor) -> tuple[Tensor, list[Tensor]]:
        self.asked += 1
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


def train_batches(teacher: CachedTeacher, batches: Batches, feature_keys: set[tuple[int, bool]] = TAPS) -> list[list[Tensor]]:
    outputs_for = teacher.outputs_for(batches, feature_keys)
    first = batches.first_epoch * batches.steps_per_epoch
    answers = [outputs_for(step, batch.images) for step, batch in enumerate(batches, first)]
    return [[logits, *features.values()] for logits, features in answers]


def same(one: list[list[Tensor]], other: list[list[Tensor]]) -> bool:
    return all(torch.equal(a, b) for x, y in zip(one, other, strict=True) for a, b in zip(x, y, strict=True))


def test_a_second_cohort_hears_the_same_without_asking(batches: Batches) -> None:
    network = Counted()
    teacher = CachedTeacher(network, budget=10**9)
    fresh = train_batches(CachedTeacher(Counted()), batches)
    assert same(train_batches(teacher, batches), fresh)
    assert network.asked == 8
    assert same(train_batches(teacher, batches), fresh)
    assert network.asked == 8
    assert teacher.bytes == sum(tensor.nbytes for answer in fresh for tensor in answer)


@pytest.mark.parametrize(
    "changed", [{"seed": 1}, {"batch_size": 32}, {"resolution": 8}, {"indices": np.arange(1, 65)}], ids=str
)
def test_other_batches_are_other_questions(batches: Batches, changed: dict[str, object]) -> None:
    network = Counted()
    teacher = CachedTeacher(network, budget=10**9)
    train_batches(teacher, batches)
    network.asked = 0
    other = replace(batches, **changed)  # type: ignore[arg-type]
    train_batches(teacher, other)
    assert network.asked == len(other)


def test_a_resumed_training_asks_for_the_same_steps(batches: Batches) -> None:
    network = Counted()
    teacher = CachedTeacher(network, budget=10**9)
    whole = train_batches(teacher, batches)
    assert same(train_batches(teacher, replace(batches, first_epoch=1)), whole[4:])
    assert network.asked == 8


def test_beyond_the_budget_what_came_first_is_kept(batches: Batches) -> None:
    """A search asks for the same steps again and again: who keeps the latest has none of them when asked."""
    network = Counted()
    one = sum(tensor.nbytes for tensor in train_batches(CachedTeacher(Counted()), batches)[0])
    teacher = CachedTeacher(network, budget=5 * one)
    fresh = train_batches(teacher, batches)
    assert teacher.bytes == 5 * one
    network.asked = 0
    assert same(train_batches(teacher, batches), fresh)
    assert network.asked == 3


def test_a_lesson_takes_the_place_of_a_larger_one_and_never_of_another(batches: Batches) -> None:
    """Losses of a study in turn: the first one's large lessons do not keep the small ones of all others away."""
    network, small, large = Counted(), {(0, True)}, {(0, False), (1, False)}
    one_small, one_large = (
        sum(tensor.nbytes for tensor in train_batches(CachedTeacher(Counted()), batches, feature_keys)[0]) for feature_keys in (small, large)
    )
    teacher = CachedTeacher(network, budget=4 * one_large)
    train_batches(teacher, batches, large)
    assert teacher.bytes == 4 * one_large
    fresh = train_batches(teacher, batches, small)
    held = set(teacher.kept)
    network.asked = 0
    assert same(train_batches(teacher, batches, small), fresh)
    assert network.asked == 0
    train_batches(teacher, batches, large)
    assert (network.asked, set(teacher.kept)) == (8 - (len(held) - 8), held)
    assert teacher.bytes == 8 * one_small + (len(held) - 8) * one_large <= teacher.budget


def test_a_budget_of_nothing_keeps_nothing(batches: Batches) -> None:
    teacher = CachedTeacher(Counted())
    train_batches(teacher, batches)
    assert teacher.kept == {}


def test_an_attention_map_teaches_what_the_features_teach() -> None:
    torch.manual_seed(0)
    student = (torch.randn(4, 3), [torch.randn(4, 8, 8, 8)])
    teacher = (torch.randn(4, 3), [torch.randn(4, 16, 8, 8)])
    objective = Objective(SearchConfig(), "at", student, teacher)
    assert objective.feature_keys == [(0, True)]
    by_map = objective(student, teacher_output(teacher, objective.feature_keys), torch.tensor([0, 1, 2, 0]))
    objective.feature_keys = [(0, False)]
    by_features = objective(student, teacher_output(teacher, objective.feature_keys), torch.tensor([0, 1, 2, 0]))
    torch.testing.assert_close(by_map, by_features, rtol=1e-5, atol=0)
