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

from engine.config import SearchConfig
from engine.data.dataset import Dataset, load
from engine.data.loader import Batches, eval_batches, train_batches
from engine.training import checkpoint
from engine.training.checkpoint import Progress
from engine.training.student import ProcessLost, Student, fatal, prepare, reseed, status_of
from engine.training.teacher_cache import CachedTeacher
from engine.training.train import Readout, Stopwatch, classify, learning_rate, read_out, train
from engine.trial import EnvironmentUnusable, KDLoss

CONFIG = SearchConfig(batch_size=16, lr=0.05)
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
    """Draws random numbers during training."""

    def forward(self, images: Tensor) -> tuple[Tensor, list[Tensor]]:
        logits, features = super().forward(nn.functional.dropout(images, 0.2, self.training))
        return logits, features


class Skipping(Net):
    """Skips a layer in its first step, as LayerDrop and stochastic depth may."""

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
def data(tiny_npz: Path) -> Dataset:
    return load(str(tiny_npz))


def batches(data: Dataset, epochs: int = 2) -> Batches:
    indices = np.arange(len(data.train.labels))
    return train_batches(
        data.train, indices, data=data, batch_size=16, epochs=epochs, resolution=16, seed=0, backend="resident"
    )


def make_teacher() -> nn.Module:
    return Net(99, width=12).eval().requires_grad_(False)


def trained(data: Dataset, networks: list[nn.Module], kd_loss: str = "kd+at", epochs: int = 2) -> list[Student]:
    teacher = make_teacher() if kd_loss != "none" else None
    cohort = [prepare(network, teacher, CONFIG, kd_loss, EXAMPLE) for network in networks]  # type: ignore[arg-type]
    train(cohort, teacher and CachedTeacher(teacher), batches(data, epochs), CONFIG, Stopwatch())
    return cohort


def weights(student: Student) -> list[Tensor]:
    return [value.clone() for value in student.network.state_dict().values()]


def test_a_student_learns(data: Dataset) -> None:
    (student,) = trained(data, [Net(0)], "none", epochs=12)
    valid = eval_batches(data.valid, data=data, batch_size=64, resolution=16, backend="resident")
    assert read_out([student.network], valid)[0].accuracy > 0.9


def test_a_pass_over_a_split_reads_accuracy_cross_entropy_and_agreement(data: Dataset) -> None:
    """As computed on the whole split at once; the last of its batches is short."""
    networks, teacher = [Net(0).eval(), Net(1).eval()], make_teacher()
    batched, whole = (
        eval_batches(data.valid, data=data, batch_size=size, resolution=16, backend="resident") for size in (7, 1000)
    )
    assert len(data.valid) % 7
    classes = classify(teacher, batched)
    (batch,) = whole
    with torch.no_grad():
        assert torch.equal(classes, teacher(batch.images)[0].argmax(1))
        for network, found in zip(networks, read_out(networks, batched, classes), strict=True):
            logits = network(batch.images)[0]
            assert isinstance(found, Readout)
            assert found.hits.tolist() == (logits.argmax(1) == batch.labels).tolist()
            assert found.accuracy == found.hits.mean()
            assert found.cross_entropy == pytest.approx(nn.functional.cross_entropy(logits, batch.labels).item())
            assert found.agreement == (logits.argmax(1) == classes).double().mean().item()
    (alone,) = read_out(networks[:1], batched)
    assert isinstance(alone, Readout)
    assert alone.agreement is None


def test_a_network_that_raises_does_not_keep_others_from_being_scored(data: Dataset) -> None:
    valid = eval_batches(data.valid, data=data, batch_size=7, resolution=16, backend="resident")
    (good,) = read_out([Net(0)], valid)
    broken = nn.Linear(3, 3)
    found = read_out([broken, Net(0)], valid)
    assert isinstance(found[0], RuntimeError)
    assert isinstance(found[1], Readout)
    assert isinstance(good, Readout)
    assert (found[1].hits == good.hits).all()
    assert found[1].cross_entropy == good.cross_entropy


@pytest.mark.parametrize("kd_loss", ["none", "kd+at", "kd+nst"])
def test_a_student_of_a_cohort_equals_the_student_trained_alone_bit_for_bit(data: Dataset, kd_loss: str) -> None:
    seeds = [(0, 8), (1, 4), (2, 16), (3, 8)]
    together = trained(data, [Net(seed, width) for seed, width in seeds], kd_loss)
    for (seed, width), student in zip(seeds, together, strict=True):
        (alone,) = trained(data, [Net(seed, width)], kd_loss)
        assert all(torch.equal(a, b) for a, b in zip(weights(alone), weights(student), strict=True))


def test_the_teacher_cache_does_not_change_a_student_bit_for_bit(data: Dataset) -> None:
    def cohort(shared: CachedTeacher) -> list[Tensor]:
        cohort = [prepare(Net(seed), shared.network, CONFIG, "kd+at", EXAMPLE) for seed in (0, 1)]
        train(cohort, shared, batches(data), CONFIG, Stopwatch())
        return [value for student in cohort for value in weights(student)]

    without, caching = cohort(CachedTeacher(make_teacher())), CachedTeacher(make_teacher(), budget=10**9)
    first, second = cohort(caching), cohort(caching)
    assert len(caching.cache) == len(batches(data))
    assert all(torch.equal(a, b) and torch.equal(a, c) for a, b, c in zip(without, first, second, strict=True))


def test_random_layers_are_independent_of_the_other_students(data: Dataset) -> None:
    def train_all(students: list[Student]) -> list[list[Tensor]]:
        train(students, None, batches(data), CONFIG, Stopwatch())
        return [weights(student) for student in students]

    def dropping(number: int) -> Student:
        return prepare(Dropping(number), None, CONFIG, "none", EXAMPLE, seed=number)

    together = train_all([dropping(0), dropping(1)])
    torch.rand(3)
    assert all(torch.equal(a, b) for a, b in zip(together[1], train_all([dropping(1)])[0], strict=True))
    other = prepare(Dropping(1), None, CONFIG, "none", EXAMPLE, seed=2)
    assert not all(torch.equal(a, b) for a, b in zip(together[1], train_all([other])[0], strict=True))


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_random_numbers_on_the_host_depend_on_the_student_and_the_step(
    device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "default_generators", (torch.Generator(),))
    student = prepare(Net(0), None, CONFIG, "none", EXAMPLE, seed=1)
    student.loss_sum = Mock(device=torch.device(device))

    def drawn(step: int) -> float:
        reseed(student, step)
        return torch.rand(()).item()

    assert drawn(0) == drawn(0) != drawn(1)


def test_a_layer_first_used_in_a_later_step_is_trained(data: Dataset) -> None:
    (student,) = trained(data, [Skipping(0)])
    assert (student.status, student.error) == ("ok", "")
    assert not torch.equal(student.network.two.weight, Skipping(0).two.weight)


def test_bfloat16_training_works_on_a_cpu(data: Dataset) -> None:
    config = replace(CONFIG, amp_dtype="bfloat16")
    cached = CachedTeacher(make_teacher())
    student = prepare(Net(0), cached.network, config, "kd+at", EXAMPLE)
    seen: list[torch.dtype] = []
    student.network.head.register_forward_hook(lambda *call: seen.append(call[2].dtype))
    train([student], cached, batches(data, epochs=12), config, Stopwatch())
    valid = eval_batches(data.valid, data=data, batch_size=64, resolution=16, backend="resident")
    assert set(seen) == {torch.bfloat16}
    seen.clear()
    assert read_out([student.network], valid)[0].accuracy > 0.9
    assert set(seen) == {torch.float32}, "scored in full precision"
    assert student.network.head.weight.dtype == torch.float32


def test_the_running_average_is_scored_and_saved(data: Dataset) -> None:
    config = replace(CONFIG, ema_decay=0.9)
    plain, averaged = (prepare(Net(0), None, config, "none", EXAMPLE, average=average) for average in (False, True))
    for student in (plain, averaged):
        train([student], None, batches(data), config, Stopwatch())
    assert averaged.average is not None
    assert plain.loss_sum == averaged.loss_sum  # the training itself is the same
    assert not torch.equal(plain.network.head.weight, averaged.network.head.weight)
    assert any(torch.equal(averaged.network.head.weight, value) for value in averaged.average)


def test_a_compiled_student_learns_and_keeps_its_names(data: Dataset, monkeypatch: pytest.MonkeyPatch) -> None:
    # Traced and differentiated as by default; the default's half minute of C++ compilation is left out.
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="aot_eager"))
    plain, compiled = (prepare(Net(0), None, CONFIG, "none", EXAMPLE, compiled=on) for on in (False, True))
    for student in (plain, compiled):
        train([student], None, batches(data), CONFIG, Stopwatch())
    assert compiled.status == "ok", compiled.error
    assert compiled.forward is not compiled.network
    assert list(compiled.network.state_dict()) == list(plain.network.state_dict())
    assert compiled.loss_sum.item() == pytest.approx(plain.loss_sum.item(), rel=1e-3)


def test_a_student_that_fails_is_dropped_and_the_others_go_on(data: Dataset) -> None:
    good, exploding, raising, careless = trained(data, [Net(0), Exploding(1), Raising(2), Careless(3)])
    (alone,) = trained(data, [Net(0)])
    assert (good.status, exploding.status, raising.status, careless.status) == ("ok", "diverged", "oom", "error")
    assert "not enough memory" in raising.error
    assert "IndexError: list index" in careless.error
    assert all(torch.equal(a, b) for a, b in zip(weights(alone), weights(good), strict=True))


@pytest.mark.parametrize(
    ("kd_loss", "network", "average"), [("none", Net, False), ("hint", Net, False), ("none", Dropping, True)]
)
def test_a_training_resumed_after_any_epoch_equals_the_uninterrupted_one(
    data: Dataset, tmp_path: Path, kd_loss: KDLoss, network: type[Net], average: bool
) -> None:
    teacher, config = make_teacher(), replace(CONFIG, ema_decay=0.9)
    whole = prepare(network(0), teacher, config, kd_loss, EXAMPLE, average=average)
    path = tmp_path / "state.pt"

    def save(epochs: int) -> None:
        checkpoint.save(tmp_path / f"{epochs}.pt", whole, Progress(epochs))

    train([whole], CachedTeacher(teacher), batches(data, epochs=3), config, Stopwatch(), save)
    for epochs in (1, 2, 3):
        (tmp_path / f"{epochs}.pt").rename(path)
        student = prepare(network(7), teacher, config, kd_loss, EXAMPLE, average=average)
        assert checkpoint.restore(path, student) == Progress(epochs)
        rest = replace(batches(data, epochs=3), first_epoch=epochs)
        train([student], CachedTeacher(teacher), rest, config, Stopwatch())
        assert all(torch.equal(a, b) for a, b in zip(weights(whole), weights(student), strict=True))


def test_a_training_by_adamw_resumes_bit_for_bit(data: Dataset, tmp_path: Path) -> None:
    config = replace(CONFIG, optimizer="adamw", lr=0.01, weight_decay=0.05, label_smoothing=0.1, warmup_fraction=0.3)
    whole, path = prepare(Net(0), None, config, "none", EXAMPLE, backbone=0.5), tmp_path / "state.pt"

    def save(epochs: int) -> None:
        if epochs == 1:
            checkpoint.save(path, whole, Progress(epochs))

    train([whole], None, batches(data, epochs=3), config, Stopwatch(), save)
    student = prepare(Net(7), None, config, "none", EXAMPLE, backbone=0.5)
    assert checkpoint.restore(path, student) == Progress(1)
    train([student], None, replace(batches(data, epochs=3), first_epoch=1), config, Stopwatch())
    assert all(torch.equal(a, b) for a, b in zip(whole.state(), student.state(), strict=True))


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_the_state_of_an_optimiser_exists_before_its_first_step(data: Dataset, optimizer: str) -> None:
    """A graph restores it after trial steps: what a first step created would be missed."""
    student = prepare(Net(0), None, replace(CONFIG, optimizer=optimizer), "none", EXAMPLE)  # type: ignore[arg-type]
    before = len(student.state())
    train([student], None, batches(data, epochs=1), CONFIG, Stopwatch())
    assert len(student.state()) == before


def test_layers_before_the_classifier_may_learn_more_slowly(data: Dataset) -> None:
    """By AdamW, whose steps are proportional to the learning rate."""
    config, moved = replace(CONFIG, optimizer="adamw", lr=1e-3, weight_decay=0.0), {}
    for backbone in (1.0, 0.1):
        student = prepare(Net(0), None, config, "none", EXAMPLE, backbone=backbone)
        before = {name: value.detach().clone() for name, value in student.network.named_parameters()}
        train([student], None, batches(data, epochs=1), config, Stopwatch())
        moved[backbone] = {name: (value - before[name]).abs().mean().item()
                           for name, value in student.network.named_parameters()}  # fmt: skip
    ratios = {name: moved[0.1][name] / moved[1.0][name] for name in moved[1.0]}
    *backbone_layers, last = [name for name in ratios if name.endswith("weight")]
    assert ratios[last] > 0.8
    assert all(ratios[name] < 0.3 for name in backbone_layers)


def test_an_invalid_state_file_is_ignored(tmp_path: Path) -> None:
    student = prepare(Net(0), None, CONFIG, "none", EXAMPLE)
    before = weights(student)
    assert checkpoint.restore(tmp_path / "none.pt", student) == Progress()
    (tmp_path / "bad.pt").write_bytes(b"not a checkpoint")
    assert checkpoint.restore(tmp_path / "bad.pt", student) == Progress()
    checkpoint.save(tmp_path / "wide.pt", prepare(Net(0, width=16), None, CONFIG, "none", EXAMPLE), Progress(3))
    assert checkpoint.restore(tmp_path / "wide.pt", student) == Progress()
    assert all(torch.equal(a, b) for a, b in zip(before, weights(student), strict=True))


def test_a_state_file_behind_an_io_error_is_not_deleted(tmp_path: Path) -> None:
    student = prepare(Net(0), None, CONFIG, "none", EXAMPLE)
    path = tmp_path / "state.pt"
    path.symlink_to("/proc/self/mem")  # reading its first bytes is an I/O error
    with pytest.raises(EnvironmentUnusable, match="cannot read .*state.pt .*; run the command again"):
        checkpoint.restore(path, student)
    assert path.is_symlink()


def test_a_state_file_survives_running_out_of_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    student, path = prepare(Net(0), None, CONFIG, "none", EXAMPLE), tmp_path / "state.pt"
    checkpoint.save(path, student, Progress(1))
    with monkeypatch.context() as patched:
        patched.setattr(torch, "load", Mock(side_effect=RuntimeError("DefaultCPUAllocator: not enough memory")))
        with pytest.raises(RuntimeError, match="not enough memory"):
            checkpoint.restore(path, student)
    assert checkpoint.restore(path, student) == Progress(1)


def test_training_does_not_change_the_teacher(data: Dataset) -> None:
    teacher = make_teacher()
    before = [value.clone() for value in teacher.state_dict().values()]
    student = prepare(Net(0), teacher, CONFIG, "kd+at", EXAMPLE)
    train([student], CachedTeacher(teacher), batches(data), CONFIG, Stopwatch())
    assert all(torch.equal(a, b) for a, b in zip(before, teacher.state_dict().values(), strict=True))


def test_the_hint_loss_trains_its_regressor(data: Dataset) -> None:
    (student,) = trained(data, [Net(0)], "hint", epochs=1)
    fresh = prepare(Net(0), make_teacher(), CONFIG, "hint", EXAMPLE)
    learnt, untouched = (list(one.objective.parameters()) for one in (student, fresh))
    assert len(learnt) == 2
    assert not torch.equal(learnt[0], untouched[0])


def test_the_learning_rate_warms_up_and_ends_near_zero() -> None:
    rates = [learning_rate(0.1, step, 100) for step in range(100)]
    assert rates[0] == pytest.approx(0.02)
    assert max(rates) == pytest.approx(0.1)
    assert rates[-1] < 0.001
    assert learning_rate(0.1, 0, 1) == pytest.approx(0.1)
    assert learning_rate(0.1, 9, 100, 0.2) == pytest.approx(0.05)


def test_only_matrices_have_weight_decay() -> None:
    student = prepare(Net(0), None, replace(CONFIG, weight_decay=0.1), "none", EXAMPLE)
    for group in student.optimiser.param_groups:
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
def test_out_of_memory_is_told_apart_from_other_errors(error: Exception, status: str) -> None:
    assert status_of(error) == status


@pytest.mark.parametrize(
    ("error", "status", "lost"),
    [
        (torch.AcceleratorError("CUDA error: out of memory\nSearch for `cudaErrorMemoryAllocation'"), "oom", False),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"), "oom", False),
        (RuntimeError("Triton Error [CUDA]: out of memory"), "oom", False),
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"), "oom", False),
        (torch.AcceleratorError("CUDA error: an illegal memory access was encountered"), "error", True),
        (ProcessLost("torch 2.11.0 cannot go on after a failed capture: out of memory"), "oom", True),
        (RuntimeError("shapes"), "error", False),
    ],
    ids=lambda value: str(value)[:40],
)
def test_a_device_without_memory_is_not_a_lost_device(error: Exception, status: str, lost: bool) -> None:
    assert status_of(error) == status
    assert fatal(error) == lost


def test_more_than_eight_networks_can_be_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    """They share the code of one forward, and torch.compile stops after 8 compilations of one code."""
    compiled: list[int] = []

    def backend(graph: torch.fx.GraphModule, _: list[Tensor]) -> Callable[..., object]:
        compiled.append(len(compiled))
        return graph.forward

    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=backend))
    before = torch._dynamo.config.recompile_limit

    def ready(number: int) -> Student:
        return prepare(Net(0, width=4 + number), None, CONFIG, "none", EXAMPLE, compiled=True)

    # Not by monkeypatch, which deletes the setting at the end: it looks for the old value in the module's dictionary.
    with torch._dynamo.config.patch(recompile_limit=8):
        for student in [ready(number) for number in range(9)]:
            student.forward(EXAMPLE)
        assert len(compiled) == 9
        ready(9).forward(EXAMPLE)
    assert torch._dynamo.config.recompile_limit == before, "other tests of this process compile too"
    cached = torch._C._dynamo.eval_frame._debug_get_cache_entry_list(Net.forward.__code__)
    assert (len(compiled), len(cached)) == (10, 1), "compilations of earlier cohorts are not discarded"
