from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from engine import checkpoint
from engine.config import Study
from engine.data import Data, load
from engine.loader import Batches, eval_batches, train_batches
from engine.student import Student, prepare, status_of
from engine.taught import Teacher
from engine.train import Stopwatch, accuracy, learning_rate, train

STUDY = Study(batch_size=16, lr=0.05)
EXAMPLE = torch.zeros(2, 3, 16, 16)


class Net(nn.Module):
    """A student small enough for a test: two stages."""

    def __init__(self, seed: int, width: int = 8) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.one, self.two = nn.Conv2d(3, width, 3, 2, 1), nn.Conv2d(width, width, 3, 2, 1)
        self.norm, self.head = nn.BatchNorm2d(width), nn.Linear(width * 16, 3)

    def forward(self, images: Tensor) -> tuple[Tensor, list[Tensor]]:
        first = self.one(images).relu()
        second = self.norm(self.two(first)).relu()
        return self.head(second.flatten(1)), [first, second]


class Exploding(Net):
    def forward(self, images: Tensor) -> tuple[Tensor, list[Tensor]]:
        logits, features = super().forward(images)
        return logits * torch.inf, features


class Raising(Net):
    def forward(self, images: Tensor) -> tuple[Tensor, list[Tensor]]:
        if self.training:
            raise RuntimeError("DefaultCPUAllocator: not enough memory: you tried to allocate 1 bytes")
        return super().forward(images)


@pytest.fixture(scope="module")
def data(tiny_npz: Path) -> Data:
    return load(str(tiny_npz))


def batches(data: Data, epochs: int = 2) -> Batches:
    indices = np.arange(len(data.train.labels))
    return train_batches(
        data.train, indices, data=data, batch_size=16, epochs=epochs, resolution=16, seed=0, backend="resident"
    )


def teacher() -> nn.Module:
    return Net(99, width=12).eval().requires_grad_(False)


def trained(data: Data, networks: list[nn.Module], kd_loss: str = "kd+at", epochs: int = 2) -> list[Student]:
    taught = teacher() if kd_loss != "none" else None
    cohort = [prepare(network, taught, STUDY, kd_loss, EXAMPLE) for network in networks]  # type: ignore[arg-type]
    train(cohort, taught and Teacher(taught), batches(data, epochs), STUDY, Stopwatch())
    return cohort


def weights(member: Student) -> list[Tensor]:
    return [value.clone() for value in member.network.state_dict().values()]


def test_a_student_learns(data: Data) -> None:
    (member,) = trained(data, [Net(0)], "none", epochs=12)
    valid = eval_batches(data.valid, data=data, batch_size=64, resolution=16, backend="resident")
    assert accuracy(member.network, valid, torch.float32) > 0.9


@pytest.mark.parametrize("kd_loss", ["none", "kd+at", "kd+nst"])
def test_a_student_of_a_cohort_is_the_student_alone_bit_for_bit(data: Data, kd_loss: str) -> None:
    seeds = [(0, 8), (1, 4), (2, 16), (3, 8)]
    together = trained(data, [Net(seed, width) for seed, width in seeds], kd_loss)
    for (seed, width), member in zip(seeds, together, strict=True):
        (alone,) = trained(data, [Net(seed, width)], kd_loss)
        assert all(torch.equal(a, b) for a, b in zip(weights(alone), weights(member), strict=True))


def test_who_fails_leaves_and_the_others_go_on(data: Data) -> None:
    good, exploding, raising = trained(data, [Net(0), Exploding(1), Raising(2)])
    (alone,) = trained(data, [Net(0)])
    assert (good.status, exploding.status, raising.status) == ("ok", "diverged", "oom")
    assert "not enough memory" in raising.error
    assert all(torch.equal(a, b) for a, b in zip(weights(alone), weights(good), strict=True))


@pytest.mark.parametrize("kd_loss", ["none", "hint"])
def test_resumed_after_any_epoch_it_is_the_training_that_was_never_broken(
    data: Data, tmp_path: Path, kd_loss: str
) -> None:
    taught = teacher()
    whole = prepare(Net(0), taught, STUDY, kd_loss, EXAMPLE)  # type: ignore[arg-type]
    path = tmp_path / "state.pt"

    def keep(epochs: int) -> None:
        checkpoint.save(tmp_path / f"{epochs}.pt", whole, epochs)

    train([whole], Teacher(taught), batches(data, epochs=3), STUDY, Stopwatch(), keep)
    for epochs in (1, 2):
        (tmp_path / f"{epochs}.pt").rename(path)
        member = prepare(Net(7), taught, STUDY, kd_loss, EXAMPLE)  # type: ignore[arg-type]
        assert checkpoint.restore(path, member) == epochs
        train([member], Teacher(taught), replace(batches(data, epochs=3), first_epoch=epochs), STUDY, Stopwatch())
        assert all(torch.equal(a, b) for a, b in zip(weights(whole), weights(member), strict=True))


def test_a_state_that_cannot_be_read_counts_as_none(tmp_path: Path) -> None:
    member = prepare(Net(0), None, STUDY, "none", EXAMPLE)
    before = weights(member)
    assert checkpoint.restore(tmp_path / "none.pt", member) == 0
    (tmp_path / "bad.pt").write_bytes(b"not a checkpoint")
    assert checkpoint.restore(tmp_path / "bad.pt", member) == 0
    checkpoint.save(tmp_path / "wide.pt", prepare(Net(0, width=16), None, STUDY, "none", EXAMPLE), 3)
    assert checkpoint.restore(tmp_path / "wide.pt", member) == 0
    assert all(torch.equal(a, b) for a, b in zip(before, weights(member), strict=True))


def test_the_teacher_stays_as_it_is(data: Data) -> None:
    taught = teacher()
    before = [value.clone() for value in taught.state_dict().values()]
    train([prepare(Net(0), taught, STUDY, "kd+at", EXAMPLE)], Teacher(taught), batches(data), STUDY, Stopwatch())
    assert all(torch.equal(a, b) for a, b in zip(before, taught.state_dict().values(), strict=True))


def test_the_hint_loss_learns_its_regressor(data: Data) -> None:
    (member,) = trained(data, [Net(0)], "hint", epochs=1)
    fresh = prepare(Net(0), teacher(), STUDY, "hint", EXAMPLE)
    learnt, untouched = (list(m.objective.parameters()) for m in (member, fresh))
    assert len(learnt) == 2
    assert not torch.equal(learnt[0], untouched[0])


def test_the_learning_rate_warms_up_and_ends_near_zero() -> None:
    rates = [learning_rate(0.1, step, 100) for step in range(100)]
    assert rates[0] == pytest.approx(0.02)
    assert max(rates) == pytest.approx(0.1)
    assert rates[-1] < 0.001
    assert learning_rate(0.1, 0, 1) == pytest.approx(0.1)


def test_decay_is_for_matrices_only() -> None:
    member = prepare(Net(0), None, replace(STUDY, weight_decay=0.1), "none", EXAMPLE)
    for group in member.optimiser.param_groups:
        assert all((p.ndim > 1) == (group["weight_decay"] > 0) for p in group["params"])


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (MemoryError(), "oom"),
        (torch.OutOfMemoryError("CUDA out of memory"), "oom"),
        (RuntimeError("DefaultCPUAllocator: not enough memory"), "oom"),
        (RuntimeError("shapes"), "error"),
    ],
)
def test_what_ran_out_is_told_from_what_broke(error: Exception, status: str) -> None:
    assert status_of(error) == status
