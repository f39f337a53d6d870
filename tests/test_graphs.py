"""Students side by side on a GPU. Decisions and restored state are tested on any machine, the rest on a GPU only."""

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
from engine.training.distill import FeatureKey, TeacherOutput
from engine.training.graphs import capture_failure, find_host_sync, has_room, reason_for_eager, run_and_restore
from engine.training.student import Inputs, ProcessLost, Student, apply_ema, fatal, prepare, take_step, update_ema
from engine.training.teacher_cache import CachedTeacher
from engine.training.train import Stopwatch, train

CONFIG = SearchConfig(batch_size=16, lr=0.05)


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


class Reading(Net):
    """Reads a number back from the device in every forward pass, which no graph can record."""

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
    return prepare(network or Net(seed), teacher, CONFIG, kd_loss, example)  # type: ignore[arg-type]


def state(student: Student) -> list[Tensor]:
    return [tensor.clone() for tensor in student.state()]


def equal(one: list[Tensor], other: list[Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


@pytest.mark.parametrize("before", [0, 2], ids=["fresh", "resumed"])
def test_trial_steps_leave_no_trace(before: int) -> None:
    """Warm-up changes weights, momentum and the statistics of BatchNorm; all are restored."""
    tried, plain = ready(), ready()
    for student in (tried, plain):
        for step in range(before):
            take_step(student, inputs(seed=step))
    addresses = [tensor.data_ptr() for tensor in tried.network.state_dict().values()]
    run_and_restore(tried, lambda: [take_step(tried, inputs(seed=9)) for _ in range(3)] and None)
    assert addresses == [tensor.data_ptr() for tensor in tried.network.state_dict().values()]
    for student in (tried, plain):
        for step in range(3):
            take_step(student, inputs(seed=step))
    assert equal(state(tried), state(plain))


def test_trial_steps_that_raise_leave_no_trace() -> None:
    student = ready()
    before = state(student)

    def half() -> None:
        take_step(student, inputs())
        raise RuntimeError("no more memory")

    with pytest.raises(RuntimeError, match="no more memory"):
        run_and_restore(student, half)
    assert equal(before, state(student))


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
def test_a_graph_is_used_if_possible_and_worthwhile(execution: str, device: str, steps: int, reason: str) -> None:
    said = reason_for_eager(execution, torch.device(device), steps)  # type: ignore[arg-type]
    assert said.startswith(reason)
    assert bool(said) == bool(reason)


@pytest.fixture
def modes(monkeypatch: pytest.MonkeyPatch) -> list[int | str]:
    """The synchronisation debug modes that were set, starting with the initial one."""
    set_modes: list[int | str] = [1]
    monkeypatch.setattr(torch.cuda, "get_sync_debug_mode", lambda: set_modes[-1])
    monkeypatch.setattr(torch.cuda, "set_sync_debug_mode", set_modes.append)
    return set_modes


def test_a_step_that_waits_for_the_device_is_detected_before_the_capture(modes: list[int | str]) -> None:
    def synchronises() -> None:
        if modes[-1] == "error":
            raise RuntimeError("called a synchronizing CUDA operation")

    reason = "it waits for the device in each step (called a synchronizing CUDA operation)"
    assert find_host_sync(synchronises) == reason
    assert find_host_sync(lambda: None) == ""
    assert modes == [1, "error", 1, "error", 1]


def test_other_errors_of_a_step_are_raised(modes: list[int | str]) -> None:
    def fails() -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    with pytest.raises(torch.OutOfMemoryError):
        find_host_sync(fails)
    assert modes == [1, "error", 1]


def broken_capture(cause: Exception) -> RuntimeError:
    """What torch raises when ending a broken capture fails too."""
    error = torch.AcceleratorError("CUDA error: operation failed due to a previous error during capture")
    error.__context__ = cause
    return error


def test_a_failed_capture_has_a_reason_or_ends_the_process(monkeypatch: pytest.MonkeyPatch) -> None:
    error = broken_capture(RuntimeError("not permitted when stream is capturing"))
    monkeypatch.setattr(graphs, "CAPTURE_FAILURE_IS_FATAL", False)
    assert capture_failure(error) == "RuntimeError: not permitted when stream is capturing"
    monkeypatch.setattr(graphs, "CAPTURE_FAILURE_IS_FATAL", True)
    with pytest.raises(ProcessLost, match="cannot go on .* not permitted when stream is capturing") as lost:
        capture_failure(error)
    assert fatal(lost.value)


@pytest.mark.parametrize("stays", [True, False], ids=["old", "new"])
def test_running_out_of_memory_in_a_capture_is_recognised(stays: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(graphs, "CAPTURE_FAILURE_IS_FATAL", stays)
    out = torch.OutOfMemoryError("CUDA out of memory")
    with pytest.raises(torch.OutOfMemoryError):
        capture_failure(out)
    with pytest.raises(ProcessLost if stays else torch.OutOfMemoryError):
        capture_failure(broken_capture(out))


def test_a_student_is_admitted_if_the_largest_so_far_would_fit() -> None:
    assert has_room(0, [])
    assert has_room(1100, [1000, 10])
    assert not has_room(1099, [10, 1000])


def test_static_inputs_stay_where_they_are() -> None:
    def output() -> TeacherOutput:
        return TeacherOutput(torch.randn(16, 3), {FeatureKey(1, True): torch.randn(16, 1, 4, 4)})

    first, second = inputs(seed=0), inputs(seed=1)
    first.teacher_output = output()
    second.teacher_output, second.rate = output(), 0.25
    static = first.static_copy()
    assert static.teacher_output is not None
    tensors = [static.images, static.labels, *static.teacher_output.tensors]
    addresses = [tensor.data_ptr() for tensor in tensors]
    static.copy_from(second)
    assert addresses == [tensor.data_ptr() for tensor in tensors]
    assert equal(tensors, [second.images, second.labels, *second.teacher_output.tensors])
    assert static.rate == torch.tensor(0.25)
    assert static.images.is_contiguous(memory_format=torch.channels_last)


def test_the_running_average_follows_the_step_with_a_growing_weight() -> None:
    """The weight of the old average grows to the decay."""
    student = replace(ready(), average=None)
    student.live = [v for v in student.network.state_dict().values() if v.is_floating_point()]
    student.average = [v.clone() for v in student.live]
    start = student.average[0].clone()
    take_step(student, inputs())
    live = next(iter(student.network.state_dict().values())).clone()
    update_ema(student, 0, 0.999)
    torch.testing.assert_close(student.average[0], start + 0.9 * (live - start))
    update_ema(student, 10**6, 0.75)
    torch.testing.assert_close(student.average[0], start + (0.9 + 0.1 * 0.25) * (live - start))
    apply_ema(student)
    assert torch.equal(next(iter(student.network.state_dict().values())), student.average[0])


# ---- on a device ---------------------------------------------------------------------------------------


CUDA = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")


def batches(epochs: int = 4, device: str = "cuda") -> Batches:
    rng = np.random.default_rng(0)
    labels = np.arange(160) % 3
    images = rng.integers(0, 120, (160, 16, 16, 3), dtype=np.uint8)
    for image, label in zip(images, labels, strict=True):
        image[5 * label : 5 * label + 4] += 120
    split = Split(labels, images, None)
    data = Dataset("bars", split, split, split, ("a", "b", "c"), (0.5,) * 3, (0.25,) * 3, 16, False)
    return train_batches(split, np.arange(160), data=data, batch_size=16, epochs=epochs, resolution=16, seed=0,
                         device=device, backend="resident")  # fmt: skip


def trained(networks: list[nn.Module], execution: str, kd_loss: str = "kd+at", budget: int = 0) -> list[Student]:
    torch.manual_seed(99)
    teacher = Net(99).cuda().to(memory_format=torch.channels_last).eval().requires_grad_(False)
    cohort = [ready(device="cuda", teacher=teacher, network=network, kd_loss=kd_loss) for network in networks]
    train(cohort, CachedTeacher(teacher, budget), batches(), CONFIG, Stopwatch(), execution=execution)  # type: ignore[arg-type]
    torch.cuda.synchronize()
    return cohort


def weights(student: Student) -> Tensor:
    return torch.cat([value.float().flatten() for value in student.network.state_dict().values()])


@pytest.mark.gpu
@CUDA
@pytest.mark.parametrize("kd_loss", ["kd", "kd+at", "kd+nst", "hint", "similarity"])
def test_a_graph_trains_like_eager_steps(kd_loss: str) -> None:
    graphed, eager = (trained([Net(i) for i in range(4)], how, kd_loss) for how in ("graph", "eager"))
    assert [student.execution for student in graphed] == ["graph"] * 4, graphed[0].error
    assert [student.execution for student in eager] == ["eager: asked for"] * 4
    for one, other in zip(graphed, eager, strict=True):
        assert one.status == other.status == "ok", (one.error, other.error)
        torch.testing.assert_close(weights(one), weights(other), rtol=0.05, atol=0.02)
        assert one.loss_sum.item() == pytest.approx(other.loss_sum.item(), rel=0.02)


@pytest.mark.parametrize(
    ("device", "execution"), [("cpu", "auto"), pytest.param("cuda", "graph", marks=[pytest.mark.gpu, CUDA])]
)
def test_a_killed_full_training_resumes_to_the_same_result(device: str, execution: Execution, tmp_path: Path) -> None:
    config, path = replace(CONFIG, ema_decay=0.9), tmp_path / "state.pt"
    teacher = Net(99).to(device).eval().requires_grad_(False)
    feed = batches(device=device)

    def student(seed: int) -> Student:
        return prepare(Net(seed), teacher, config, "kd+at", torch.zeros(2, 3, 16, 16, device=device), average=True)

    def die_after_two(epochs: int) -> None:
        if epochs == 2:
            checkpoint.save(path, killed, Progress(epochs))
            raise KeyboardInterrupt

    whole, killed, resumed = student(0), student(0), student(7)
    train([whole], CachedTeacher(teacher), feed, config, Stopwatch(), None, execution)
    with pytest.raises(KeyboardInterrupt):
        train([killed], CachedTeacher(teacher), feed, config, Stopwatch(), die_after_two, execution)
    assert checkpoint.restore(path, resumed) == Progress(2)
    train([resumed], CachedTeacher(teacher), replace(feed, first_epoch=2), config, Stopwatch(), None, execution)
    assert (resumed.status, resumed.execution) == ("ok", "graph" if device == "cuda" else "eager"), resumed.error
    near = {"rtol": 0.05, "atol": 0.02} if device == "cuda" else {"rtol": 0.0, "atol": 0.0}
    assert whole.average is not None
    assert resumed.average is not None
    for one, other in zip([*whole.state(), *whole.average], [*resumed.state(), *resumed.average], strict=True):
        torch.testing.assert_close(one, other, **near)


@pytest.mark.gpu
@CUDA
def test_a_graph_reads_the_learning_rate_of_each_step() -> None:
    """A rate recorded in the graph would stay that of the first step."""
    (student,) = trained([Net(0)], "graph")
    rate = student.optimiser.param_groups[0]["lr"]
    assert isinstance(rate, Tensor)
    assert rate.item() < 0.01


@pytest.mark.gpu
@CUDA
def test_a_student_that_cannot_be_captured_is_trained_eagerly_beside_the_others() -> None:
    reading, good, dropping = trained([Reading(0), Net(1), Net(2, drop=0.5)], "auto")
    assert (reading.status, good.status, dropping.status) == ("ok", "ok", "ok"), reading.error
    assert reading.execution.startswith("eager: it waits for the device in each step")
    assert good.execution == "graph"
    assert dropping.execution == "eager: its layers draw random numbers"
    assert torch.cuda.get_sync_debug_mode() == 0
    (strict, other) = trained([Reading(0), Net(1)], "graph")
    assert (strict.status, other.status) == ("error", "ok")
    torch.testing.assert_close(weights(good), weights(other), rtol=0.05, atol=0.02)


@pytest.mark.gpu
@CUDA
def test_a_cohort_on_streams_equals_students_trained_alone() -> None:
    together = trained([Net(i) for i in range(4)], "graph")
    for seed, student in enumerate(together):
        (alone,) = trained([Net(seed)], "graph")
        torch.testing.assert_close(weights(student), weights(alone), rtol=0.05, atol=0.02)


@pytest.mark.gpu
@CUDA
@pytest.mark.parametrize("budget", [10**8, 64 * 2**30], ids=["device", "host"])
def test_cached_teacher_outputs_are_the_same_on_a_device(budget: int, monkeypatch: pytest.MonkeyPatch) -> None:
    if budget > 10**9:
        monkeypatch.setattr("engine.training.teacher_cache.DEVICE_SHARE", 1e-9)
    torch.manual_seed(99)
    teacher = Net(99).cuda().eval().requires_grad_(False)
    cached_teacher = CachedTeacher(teacher, budget)
    images = torch.randn(16, 3, 16, 16, device="cuda")
    outputs_for = cached_teacher.outputs_for(batches(), {FeatureKey(0, True), FeatureKey(1, False)})
    first, again = outputs_for(0, images), outputs_for(0, torch.zeros_like(images))
    assert cached_teacher.bytes > 0
    cached = next(iter(cached_teacher.cache.values()))
    assert cached.logits.device.type == ("cpu" if budget > 10**9 else "cuda")
    assert first.features.keys() == again.features.keys()
    assert all(torch.equal(one, other) for one, other in zip(first.tensors, again.tensors, strict=True))


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
def test_memory_is_freed() -> None:
    def reserved() -> int:
        trained([Net(i) for i in range(4)], "graph")
        gc.collect()
        torch._C._cuda_clearCublasWorkspaces()  # large compared with a leak
        torch.cuda.empty_cache()
        return torch.cuda.memory_reserved()

    # torch hands out 32 streams in turn; each allocates its buffers on first use.
    readings = [reserved() for _ in range(32 // 4 + 5)]
    assert readings[-1] <= 1.03 * readings[7]


@pytest.mark.gpu
@CUDA
def test_a_student_without_room_is_left_for_another_cohort(monkeypatch: pytest.MonkeyPatch) -> None:
    free = iter([10**9, 10**9 - 10**6, 10**5, 10**5])
    monkeypatch.setattr("engine.training.graphs._free_memory", lambda device: next(free))
    first, second = trained([Net(0), Net(1)], "graph")
    assert (first.status, second.status) == ("ok", "oom")
    assert "100,000 bytes free beside 1 students" in second.error
