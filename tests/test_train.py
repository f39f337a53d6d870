from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from engine.config import Study
from engine.data.loader import Batches, eval_batches, train_batches
from engine.data.parts import Data, load
from engine.training import checkpoint
from engine.training.checkpoint import Progress
from engine.training.student import ProcessLost, Student, fatal, prepare, reseed, status_of
from engine.training.taught import Teacher
from engine.training.train import Stopwatch, accuracies, learning_rate, train
from engine.trial import EnvironmentUnusable, KDLoss

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


class Dropping(Net):
    """Draws random numbers in training."""

    def forward(self, images: Tensor) -> tuple[Tensor, list[Tensor]]:
        logits, features = super().forward(nn.functional.dropout(images, 0.2, self.training))
        return logits, features


class Skipping(Net):
    """Leaves a layer out of its first step, as LayerDrop and stochastic depth may."""

    steps = 0

    def forward(self, images: Tensor) -> tuple[Tensor, list[Tensor]]:
        first = self.one(images).relu()
        self.steps += self.training
        second = self.norm(self.two(first) if self.steps > 1 else first[:, :, ::2, ::2]).relu()
        return self.head(second.flatten(1)), [first, second]


class Exploding(Net):
    def forward(self, images: Tensor) -> tuple[Tensor, list[Tensor]]:
        logits, features = super().forward(images)
        return logits * torch.inf, features


class Raising(Net):
    error: Exception = RuntimeError("DefaultCPUAllocator: not enough memory: you tried to allocate 1 bytes")

    def forward(self, images: Tensor) -> tuple[Tensor, list[Tensor]]:
        if self.training:
            raise self.error
        return super().forward(images)


class Careless(Raising):
    error = IndexError("list index out of range")


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
    assert accuracies([member.network], valid)[0] > 0.9


@pytest.mark.parametrize("kd_loss", ["none", "kd+at", "kd+nst"])
def test_a_student_of_a_cohort_is_the_student_alone_bit_for_bit(data: Data, kd_loss: str) -> None:
    seeds = [(0, 8), (1, 4), (2, 16), (3, 8)]
    together = trained(data, [Net(seed, width) for seed, width in seeds], kd_loss)
    for (seed, width), member in zip(seeds, together, strict=True):
        (alone,) = trained(data, [Net(seed, width)], kd_loss)
        assert all(torch.equal(a, b) for a, b in zip(weights(alone), weights(member), strict=True))


def test_with_and_without_what_was_kept_of_the_teacher_a_student_is_the_same_bit_for_bit(data: Data) -> None:
    def cohort(shared: Teacher) -> list[Tensor]:
        cohort = [prepare(Net(seed), shared.network, STUDY, "kd+at", EXAMPLE) for seed in (0, 1)]
        train(cohort, shared, batches(data), STUDY, Stopwatch())
        return [value for member in cohort for value in weights(member)]

    without, keeping = cohort(Teacher(teacher())), Teacher(teacher(), budget=10**9)
    first, second = cohort(keeping), cohort(keeping)
    assert len(keeping.kept) == len(batches(data))
    assert all(torch.equal(a, b) and torch.equal(a, c) for a, b, c in zip(without, first, second, strict=True))


def test_layers_that_draw_random_numbers_do_not_see_who_is_beside_them(data: Data) -> None:
    def two(members: list[Student]) -> list[list[Tensor]]:
        train(members, None, batches(data), STUDY, Stopwatch())
        return [weights(member) for member in members]

    def student(number: int) -> Student:
        return prepare(Dropping(number), None, STUDY, "none", EXAMPLE, seed=number)

    together = two([student(0), student(1)])
    torch.rand(3)
    assert all(torch.equal(a, b) for a, b in zip(together[1], two([student(1)])[0], strict=True))
    other = prepare(Dropping(1), None, STUDY, "none", EXAMPLE, seed=2)
    assert not all(torch.equal(a, b) for a, b in zip(together[1], two([other])[0], strict=True))


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_what_a_layer_draws_on_the_host_depends_on_the_student_and_the_step(
    device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "default_generators", (torch.Generator(),))
    member = prepare(Net(0), None, STUDY, "none", EXAMPLE, seed=1)
    member.loss_sum = Mock(device=torch.device(device))

    def drawn(step: int) -> float:
        reseed(member, step)
        return torch.rand(()).item()

    assert drawn(0) == drawn(0) != drawn(1)


def test_a_layer_that_is_first_taken_in_a_later_step_learns_too(data: Data) -> None:
    (member,) = trained(data, [Skipping(0)])
    assert (member.status, member.error) == ("ok", "")
    assert not torch.equal(member.network.two.weight, Skipping(0).two.weight)


def test_bfloat16_on_a_cpu_trains_as_well(data: Data) -> None:
    study = replace(STUDY, amp_dtype="bfloat16")
    taught = Teacher(teacher())
    member = prepare(Net(0), taught.network, study, "kd+at", EXAMPLE)
    seen: list[torch.dtype] = []
    member.network.head.register_forward_hook(lambda *call: seen.append(call[2].dtype))
    train([member], taught, batches(data, epochs=12), study, Stopwatch())
    valid = eval_batches(data.valid, data=data, batch_size=64, resolution=16, backend="resident")
    assert set(seen) == {torch.bfloat16}
    seen.clear()
    assert accuracies([member.network], valid)[0] > 0.9
    assert set(seen) == {torch.float32}, "scored in full precision"
    assert member.network.head.weight.dtype == torch.float32


def test_the_running_average_is_scored_and_kept(data: Data) -> None:
    study = replace(STUDY, ema_decay=0.9)
    plain, averaged = (prepare(Net(0), None, study, "none", EXAMPLE, average=kept) for kept in (False, True))
    for member in (plain, averaged):
        train([member], None, batches(data), study, Stopwatch())
    assert averaged.average is not None
    assert plain.loss_sum == averaged.loss_sum  # the training itself is the same
    assert not torch.equal(plain.network.head.weight, averaged.network.head.weight)
    assert any(torch.equal(averaged.network.head.weight, value) for value in averaged.average)


def test_a_compiled_student_learns_and_keeps_its_names(data: Data, monkeypatch: pytest.MonkeyPatch) -> None:
    # Traced and differentiated as by default; the default's half minute of C++ compilation is left out.
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="aot_eager"))
    plain, compiled = (prepare(Net(0), None, STUDY, "none", EXAMPLE, compiled=made) for made in (False, True))
    for member in (plain, compiled):
        train([member], None, batches(data), STUDY, Stopwatch())
    assert compiled.status == "ok", compiled.error
    assert compiled.forward is not compiled.network
    assert list(compiled.network.state_dict()) == list(plain.network.state_dict())
    assert compiled.loss_sum.item() == pytest.approx(plain.loss_sum.item(), rel=1e-3)


def test_who_fails_leaves_and_the_others_go_on(data: Data) -> None:
    good, exploding, raising, careless = trained(data, [Net(0), Exploding(1), Raising(2), Careless(3)])
    (alone,) = trained(data, [Net(0)])
    assert (good.status, exploding.status, raising.status, careless.status) == ("ok", "diverged", "oom", "error")
    assert "not enough memory" in raising.error
    assert "IndexError: list index" in careless.error
    assert all(torch.equal(a, b) for a, b in zip(weights(alone), weights(good), strict=True))


@pytest.mark.parametrize(
    ("kd_loss", "network", "average"), [("none", Net, False), ("hint", Net, False), ("none", Dropping, True)]
)
def test_resumed_after_any_epoch_it_is_the_training_that_was_never_broken(
    data: Data, tmp_path: Path, kd_loss: KDLoss, network: type[Net], average: bool
) -> None:
    taught, study = teacher(), replace(STUDY, ema_decay=0.9)
    whole = prepare(network(0), taught, study, kd_loss, EXAMPLE, average=average)
    path = tmp_path / "state.pt"

    def keep(epochs: int) -> None:
        checkpoint.save(tmp_path / f"{epochs}.pt", whole, Progress(epochs))

    train([whole], Teacher(taught), batches(data, epochs=3), study, Stopwatch(), keep)
    for epochs in (1, 2, 3):
        (tmp_path / f"{epochs}.pt").rename(path)
        member = prepare(network(7), taught, study, kd_loss, EXAMPLE, average=average)
        assert checkpoint.restore(path, member) == Progress(epochs)
        train([member], Teacher(taught), replace(batches(data, epochs=3), first_epoch=epochs), study, Stopwatch())
        assert all(torch.equal(a, b) for a, b in zip(weights(whole), weights(member), strict=True))


def test_a_state_that_cannot_be_read_counts_as_none(tmp_path: Path) -> None:
    member = prepare(Net(0), None, STUDY, "none", EXAMPLE)
    before = weights(member)
    assert checkpoint.restore(tmp_path / "none.pt", member) == Progress()
    (tmp_path / "bad.pt").write_bytes(b"not a checkpoint")
    assert checkpoint.restore(tmp_path / "bad.pt", member) == Progress()
    checkpoint.save(tmp_path / "wide.pt", prepare(Net(0, width=16), None, STUDY, "none", EXAMPLE), Progress(3))
    assert checkpoint.restore(tmp_path / "wide.pt", member) == Progress()
    assert all(torch.equal(a, b) for a, b in zip(before, weights(member), strict=True))


def test_a_state_that_cannot_be_read_now_is_left_for_later(tmp_path: Path) -> None:
    member = prepare(Net(0), None, STUDY, "none", EXAMPLE)
    path = tmp_path / "state.pt"
    path.symlink_to("/proc/self/mem")  # reading its first bytes is an error of input and output
    with pytest.raises(EnvironmentUnusable, match="state.pt cannot be read now .*; repeat the command"):
        checkpoint.restore(path, member)
    assert path.is_symlink()


def test_memory_that_runs_out_does_not_cost_a_state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    member, path = prepare(Net(0), None, STUDY, "none", EXAMPLE), tmp_path / "state.pt"
    checkpoint.save(path, member, Progress(1))
    with monkeypatch.context() as patched:
        patched.setattr(torch, "load", Mock(side_effect=RuntimeError("DefaultCPUAllocator: not enough memory")))
        with pytest.raises(RuntimeError, match="not enough memory"):
            checkpoint.restore(path, member)
    assert checkpoint.restore(path, member) == Progress(1)


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


@pytest.mark.parametrize(
    ("error", "status", "lost"),
    [
        (torch.AcceleratorError("CUDA error: out of memory\nSearch for `cudaErrorMemoryAllocation'"), "oom", False),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"), "oom", False),
        (RuntimeError("Triton Error [CUDA]: out of memory"), "oom", False),
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"), "oom", False),
        (torch.AcceleratorError("CUDA error: an illegal memory access was encountered"), "error", True),
        (ProcessLost("torch 2.11.0 cannot go on after a capture that failed: out of memory"), "oom", True),
        (RuntimeError("shapes"), "error", False),
    ],
    ids=lambda value: str(value)[:40],
)
def test_a_device_without_memory_is_not_a_lost_device(error: Exception, status: str, lost: bool) -> None:
    assert status_of(error) == status
    assert fatal(error) == lost


def test_a_ninth_compiled_network_is_compiled_too(monkeypatch: pytest.MonkeyPatch) -> None:
    """All run one forward, and torch.compile stops after 8 for one code; beside each other, and one after another."""
    compiled: list[int] = []

    def backend(graph: torch.fx.GraphModule, _: list[Tensor]) -> Callable[..., object]:
        compiled.append(len(compiled))
        return graph.forward

    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=backend))
    before = torch._dynamo.config.recompile_limit

    def ready(number: int) -> Student:
        return prepare(Net(0, width=4 + number), None, STUDY, "none", EXAMPLE, compiled=True)

    # Not by monkeypatch, which deletes the setting at the end: it looks for the old value in the module's dictionary.
    with torch._dynamo.config.patch(recompile_limit=8):
        for member in [ready(number) for number in range(9)]:
            member.forward(EXAMPLE)
        assert len(compiled) == 9
        ready(9).forward(EXAMPLE)
    assert torch._dynamo.config.recompile_limit == before, "other tests of this process compile too"
    kept = torch._C._dynamo.eval_frame._debug_get_cache_entry_list(Net.forward.__code__)
    assert (len(compiled), len(kept)) == (10, 1), "what earlier cohorts compiled is kept"
