"""Students side by side on a GPU: what is decided and put back, on any machine; the rest where there is one."""

from __future__ import annotations

import gc
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from engine.config import Execution, SearchConfig
from engine.data.dataset import Dataset, Split
from engine.data.loader import Batches, train_batches
from engine.spaces.load import load_space
from engine.training import checkpoint, graphs
from engine.training.checkpoint import Progress
from engine.training.graphs import has_room, reason_for_eager, waits_for_device, why_not_recorded, without_trace
from engine.training.student import Inputs, ProcessLost, Student, fatal, prepare, take_step
from engine.training.teacher_cache import CachedTeacher
from engine.training.train import Stopwatch, train

STUDY = SearchConfig(batch_size=16, lr=0.05)


class Net(nn.Module):
    def __init__(self, seed: int, drop: float = 0.0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.one, self.two = nn.Conv2d(3, 8, 3, 2, 1), nn.Conv2d(8, 8, 3, 2, 1)
        self.norm, self.head, self.drop = nn.BatchNorm2d(8), nn.Linear(128, 3), nn.Dropout(drop)

    def forward(self, images: Tensor) -> tuple[Tensor, list[Tensor]]:
        first = self.one(images).relu()
        second = self.norm(self.two(first)).relu()
        return self.head(self.drop(second.flatten(1))), [first, second]


class Asking(Net):
    """Asks the device for a number in every forward pass, which no graph can record."""

    def forward(self, images: Tensor) -> tuple[Tensor, list[Tensor]]:
        if images.mean().item() > 1e9:
            raise AssertionError
        return super().forward(images)


def inputs(device: str = "cpu", seed: int = 0) -> Inputs:
    generator = torch.Generator().manual_seed(seed)
    images = torch.randn(16, 3, 16, 16, generator=generator).to(device).contiguous(memory_format=torch.channels_last)
    return Inputs(images, (torch.arange(16) % 3).to(device), None, 0.05)


def ready(seed: int = 0, device: str = "cpu", teacher: nn.Module | None = None, network: nn.Module | None = None,
          kd_loss: str = "none") -> Student:  # fmt: skip
    example = torch.zeros(2, 3, 16, 16, device=device)
    return prepare(network or Net(seed), teacher, STUDY, kd_loss, example)  # type: ignore[arg-type]


def state(member: Student) -> list[Tensor]:
    return [tensor.clone() for tensor in member.state()]


def equal(one: list[Tensor], other: list[Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


@pytest.mark.parametrize("before", [0, 2], ids=["fresh", "resumed"])
def test_steps_that_are_put_back_leave_no_trace(before: int) -> None:
    """Warm-up advances weights, momentum and the statistics of BatchNorm: the training after it must not know."""
    tried, plain = ready(), ready()
    for member in (tried, plain):
        for step in range(before):
            take_step(member, inputs(seed=step))
    where = [tensor.data_ptr() for tensor in tried.network.state_dict().values()]
    without_trace(tried, lambda: [take_step(tried, inputs(seed=9)) for _ in range(3)] and None)
    assert where == [tensor.data_ptr() for tensor in tried.network.state_dict().values()]
    for member in (tried, plain):
        for step in range(3):
            take_step(member, inputs(seed=step))
    assert equal(state(tried), state(plain))


def test_steps_that_raise_are_put_back_too() -> None:
    member = ready()
    before = state(member)

    def half() -> None:
        take_step(member, inputs())
        raise RuntimeError("no more memory")

    with pytest.raises(RuntimeError, match="no more memory"):
        without_trace(member, half)
    assert equal(before, state(member))


@pytest.mark.parametrize(
    ("execution", "device", "steps", "reason"),
    [
        ("auto", "cpu", 1000, "no CUDA device"),
        ("graph", "cpu", 1000, "no CUDA device"),
        ("eager", "cuda", 1000, "asked for"),
        ("auto", "cuda", 19, "19 steps do not pay"),
        ("auto", "cuda", 20, ""),
        ("graph", "cuda", 1, ""),
    ],
)
def test_a_graph_is_made_where_it_can_be_and_pays(execution: str, device: str, steps: int, reason: str) -> None:
    said = reason_for_eager(execution, torch.device(device), steps)  # type: ignore[arg-type]
    assert said.startswith(reason)
    assert bool(said) == bool(reason)


@pytest.fixture
def modes(monkeypatch: pytest.MonkeyPatch) -> list[int | str]:
    """What PyTorch was told of steps that wait for the device, beginning with what holds."""
    told: list[int | str] = [1]
    monkeypatch.setattr(torch.cuda, "get_sync_debug_mode", lambda: told[-1])
    monkeypatch.setattr(torch.cuda, "set_sync_debug_mode", told.append)
    return told


def test_a_step_that_waits_for_the_device_is_found_before_the_capture(modes: list[int | str]) -> None:
    def asks() -> None:
        if modes[-1] == "error":
            raise RuntimeError("called a synchronizing CUDA operation")

    assert waits_for_device(asks) == "it waits for the device in each step (called a synchronizing CUDA operation)"
    assert waits_for_device(lambda: None) == ""
    assert modes == [1, "error", 1, "error", 1]


def test_a_step_that_fails_otherwise_is_no_reason_for_eager_steps(modes: list[int | str]) -> None:
    def fails() -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    with pytest.raises(torch.OutOfMemoryError):
        waits_for_device(fails)
    assert modes == [1, "error", 1]


def broken_capture(cause: Exception) -> RuntimeError:
    """As torch has it where ending the capture raises once more."""
    error = torch.AcceleratorError("CUDA error: operation failed due to a previous error during capture")
    error.__context__ = cause
    return error


def test_a_failed_capture_is_a_reason_or_the_end_of_the_process(monkeypatch: pytest.MonkeyPatch) -> None:
    error = broken_capture(RuntimeError("not permitted when stream is capturing"))
    monkeypatch.setattr(graphs, "FAILURES_STAY", False)
    assert why_not_recorded(error) == "RuntimeError: not permitted when stream is capturing"
    monkeypatch.setattr(graphs, "FAILURES_STAY", True)
    with pytest.raises(ProcessLost, match="cannot go on .* not permitted when stream is capturing") as lost:
        why_not_recorded(error)
    assert fatal(lost.value)


@pytest.mark.parametrize("stays", [True, False], ids=["old", "new"])
def test_memory_that_runs_out_in_a_capture_is_said_to_have(stays: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(graphs, "FAILURES_STAY", stays)
    out = torch.OutOfMemoryError("CUDA out of memory")
    with pytest.raises(torch.OutOfMemoryError):
        why_not_recorded(out)
    with pytest.raises(ProcessLost if stays else torch.OutOfMemoryError):
        why_not_recorded(broken_capture(out))


def test_a_student_is_let_in_where_the_largest_so_far_would_fit() -> None:
    assert has_room(0, [])
    assert has_room(1100, [1000, 10])
    assert not has_room(1099, [10, 1000])


def test_held_inputs_stay_where_they_are() -> None:
    first, second = inputs(seed=0), inputs(seed=1)
    first.taught = (torch.randn(16, 3), {(1, True): torch.randn(16, 1, 4, 4)})
    second.taught, second.rate = (torch.randn(16, 3), {(1, True): torch.randn(16, 1, 4, 4)}), 0.25
    held = first.held()
    assert held.taught is not None
    tensors = [held.images, held.labels, held.taught[0], held.taught[1][1, True]]
    where = [tensor.data_ptr() for tensor in tensors]
    held.take(second)
    assert where == [tensor.data_ptr() for tensor in tensors]
    assert equal(tensors, [second.images, second.labels, second.taught[0], second.taught[1][1, True]])
    assert held.rate == torch.tensor(0.25)
    assert held.images.is_contiguous(memory_format=torch.channels_last)


# ---- on a device ---------------------------------------------------------------------------------------


CUDA = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")


def batches(epochs: int = 4, device: str = "cuda") -> Batches:
    rng = np.random.default_rng(0)
    labels = np.arange(160) % 3
    images = rng.integers(0, 120, (160, 16, 16, 3), dtype=np.uint8)
    for image, label in zip(images, labels, strict=True):
        image[5 * label : 5 * label + 4] += 120
    part = Split(labels, images, None)
    data = Dataset("bars", part, part, part, ("a", "b", "c"), (0.5,) * 3, (0.25,) * 3, 16, False)
    return train_batches(part, np.arange(160), data=data, batch_size=16, epochs=epochs, resolution=16, seed=0,
                         device=device, backend="resident")  # fmt: skip


def trained(networks: list[nn.Module], execution: str, kd_loss: str = "kd+at", budget: int = 0) -> list[Student]:
    torch.manual_seed(99)
    taught = Net(99).cuda().to(memory_format=torch.channels_last).eval().requires_grad_(False)
    cohort = [ready(device="cuda", teacher=taught, network=network, kd_loss=kd_loss) for network in networks]
    teacher = CachedTeacher(taught, budget)
    train(cohort, teacher, batches(), STUDY, Stopwatch(), execution=execution)  # type: ignore[arg-type]
    torch.cuda.synchronize()
    return cohort


def weights(member: Student) -> Tensor:
    return torch.cat([value.float().flatten() for value in member.network.state_dict().values()])


@pytest.mark.gpu
@CUDA
@pytest.mark.parametrize("kd_loss", ["kd", "kd+at", "kd+nst", "hint", "similarity"])
def test_a_graph_trains_like_eager_steps(kd_loss: str) -> None:
    graphed, eager = (trained([Net(i) for i in range(4)], how, kd_loss) for how in ("graph", "eager"))
    assert [member.execution for member in graphed] == ["graph"] * 4, graphed[0].error
    assert [member.execution for member in eager] == ["eager: asked for"] * 4
    for one, other in zip(graphed, eager, strict=True):
        assert one.status == other.status == "ok", (one.error, other.error)
        torch.testing.assert_close(weights(one), weights(other), rtol=0.05, atol=0.02)
        assert one.loss_sum.item() == pytest.approx(other.loss_sum.item(), rel=0.02)


@pytest.mark.parametrize(
    ("device", "execution"), [("cpu", "auto"), pytest.param("cuda", "graph", marks=[pytest.mark.gpu, CUDA])]
)
def test_a_full_training_that_was_killed_goes_on_to_the_same_end(
    device: str, execution: Execution, tmp_path: Path
) -> None:
    config, path = replace(STUDY, ema_decay=0.9), tmp_path / "state.pt"
    taught = Net(99).to(device).eval().requires_grad_(False)
    feed = batches(device=device)

    def student(seed: int) -> Student:
        return prepare(Net(seed), taught, config, "kd+at", torch.zeros(2, 3, 16, 16, device=device), average=True)

    def die_after_two(epochs: int) -> None:
        if epochs == 2:
            checkpoint.save(path, killed, Progress(epochs))
            raise KeyboardInterrupt

    whole, killed, resumed = student(0), student(0), student(7)
    train([whole], CachedTeacher(taught), feed, config, Stopwatch(), None, execution)
    with pytest.raises(KeyboardInterrupt):
        train([killed], CachedTeacher(taught), feed, config, Stopwatch(), die_after_two, execution)
    assert checkpoint.restore(path, resumed) == Progress(2)
    train([resumed], CachedTeacher(taught), replace(feed, first_epoch=2), config, Stopwatch(), None, execution)
    assert (resumed.status, resumed.execution) == ("ok", "graph" if device == "cuda" else "eager"), resumed.error
    near = {"rtol": 0.05, "atol": 0.02} if device == "cuda" else {"rtol": 0.0, "atol": 0.0}
    assert whole.average is not None
    assert resumed.average is not None
    for one, other in zip([*whole.state(), *whole.average], [*resumed.state(), *resumed.average], strict=True):
        torch.testing.assert_close(one, other, **near)


@pytest.mark.gpu
@CUDA
def test_a_graph_reads_the_learning_rate_of_each_step() -> None:
    """Baked in, the rate of the first step would hold to the end."""
    (member,) = trained([Net(0)], "graph")
    rate = member.optimiser.param_groups[0]["lr"]
    assert isinstance(rate, Tensor)
    assert rate.item() < 0.01


@pytest.mark.gpu
@CUDA
def test_who_cannot_be_captured_is_trained_eagerly_beside_the_others() -> None:
    asking, good, dropping = trained([Asking(0), Net(1), Net(2, drop=0.5)], "auto")
    assert (asking.status, good.status, dropping.status) == ("ok", "ok", "ok"), asking.error
    assert asking.execution.startswith("eager: it waits for the device in each step")
    assert good.execution == "graph"
    assert dropping.execution == "eager: its layers draw random numbers"
    assert torch.cuda.get_sync_debug_mode() == 0
    (strict, other) = trained([Asking(0), Net(1)], "graph")
    assert (strict.status, other.status) == ("error", "ok")
    torch.testing.assert_close(weights(good), weights(other), rtol=0.05, atol=0.02)


@pytest.mark.gpu
@CUDA
def test_a_cohort_on_streams_gives_what_each_gives_alone() -> None:
    together = trained([Net(i) for i in range(4)], "graph")
    for seed, member in enumerate(together):
        (alone,) = trained([Net(seed)], "graph")
        torch.testing.assert_close(weights(member), weights(alone), rtol=0.05, atol=0.02)


@pytest.mark.gpu
@CUDA
@pytest.mark.parametrize("budget", [10**8, 64 * 2**30], ids=["device", "host"])
def test_a_kept_lesson_teaches_the_same_on_a_device(budget: int, monkeypatch: pytest.MonkeyPatch) -> None:
    if budget > 10**9:
        monkeypatch.setattr("engine.training.teacher_cache.DEVICE_SHARE", 1e-9)
    torch.manual_seed(99)
    taught = Net(99).cuda().eval().requires_grad_(False)
    teacher = CachedTeacher(taught, budget)
    images = torch.randn(16, 3, 16, 16, device="cuda")
    outputs_for = teacher.outputs_for(batches(), {(0, True), (1, False)})
    first, again = outputs_for(0, images), outputs_for(0, torch.zeros_like(images))
    assert teacher.bytes > 0
    kept = next(iter(teacher.kept.values()))
    assert kept[0].device.type == ("cpu" if budget > 10**9 else "cuda")
    assert torch.equal(first[0], again[0])
    assert all(torch.equal(first[1][key], again[1][key]) for key in first[1])


@pytest.mark.gpu
@CUDA
@pytest.mark.parametrize("spec", ["nasbench201:channels=4,cells=1", "mobilenetv2:width=0.1", "shufflenetv2:width=0.1"])
def test_features_are_in_channels_last_on_a_device(spec: str) -> None:
    space = load_space(spec)
    choices = tuple(min(radix - 1, 3) for radix in space.radices)
    network = space.build(choices, 10, 1.0).cuda().to(memory_format=torch.channels_last)
    images = torch.randn(4, 3, 16, 16, device="cuda").to(memory_format=torch.channels_last)
    _, features = network(images)
    assert all(feature.is_contiguous(memory_format=torch.channels_last) for feature in features)


@pytest.mark.gpu
@CUDA
def test_memory_is_given_back() -> None:
    def reserved() -> int:
        trained([Net(i) for i in range(4)], "graph")
        gc.collect()
        torch._C._cuda_clearCublasWorkspaces()  # much beside what is looked for
        torch.cuda.empty_cache()
        return torch.cuda.memory_reserved()

    # torch hands out 32 streams in turn, and what is kept for a stream comes with its first use.
    readings = [reserved() for _ in range(32 // 4 + 5)]
    assert readings[-1] <= 1.03 * readings[7]


@pytest.mark.gpu
@CUDA
def test_who_finds_no_room_is_left_for_another_cohort(monkeypatch: pytest.MonkeyPatch) -> None:
    free = iter([10**9, 10**9 - 10**6, 10**5, 10**5])
    monkeypatch.setattr("engine.training.graphs._free_memory", lambda device: next(free))
    first, second = trained([Net(0), Net(1)], "graph")
    assert (first.status, second.status) == ("ok", "oom")
    assert "100,000 bytes free beside 1 students" in second.error


def test_the_average_of_a_cohort_is_each_ones_own() -> None:
    """A running average is moved after the step, by a weight that grows to the decay."""
    from engine.training.student import apply_ema, update_ema

    member = replace(ready(), average=None)
    member.live = [v for v in member.network.state_dict().values() if v.is_floating_point()]
    member.average = [v.clone() for v in member.live]
    start = member.average[0].clone()
    take_step(member, inputs())
    live = next(iter(member.network.state_dict().values())).clone()
    update_ema(member, 0, 0.999)
    torch.testing.assert_close(member.average[0], start + 0.9 * (live - start))
    update_ema(member, 10**6, 0.75)
    torch.testing.assert_close(member.average[0], start + (0.9 + 0.1 * 0.25) * (live - start))
    apply_ema(member)
    assert torch.equal(next(iter(member.network.state_dict().values())), member.average[0])
