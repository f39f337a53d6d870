"""The CUDA path on a fake device (tests/fake_cuda.py): which operations run, not what they compute.

Each case runs in its own process, `python -m tests.test_fake_cuda CASE`, because the fake device alters the process.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from bench import count_kernels
from engine import selftest
from engine.config import Resources, SearchConfig
from engine.data.batches import Batch
from engine.data.dataset import Dataset, Split, fingerprint
from engine.data.loader import Batches, train_batches
from engine.data.resident import resident
from engine.latency.runtimes import Conditions
from engine.run_folder import RunFolder
from engine.spaces.load import load_space
from engine.training import evaluate as worker
from engine.training import graphs
from engine.training import teacher as teachers
from engine.training.context import WorkerContext
from engine.training.distill import FeatureKey
from engine.training.lean import LeanForward
from engine.training.student import Inputs, Student, precision, prepare, take_step
from engine.training.teacher_cache import CachedTeacher
from engine.training.train import Stopwatch, train
from engine.trial import Architecture, Fidelity, KDLoss, Trial
from tests.fake_cuda import fake_cuda, layout

ROOT = Path(__file__).resolve().parent.parent
CUDA = torch.device("cuda")
SMALL = "nasbench201:channels=16,cells=1"
LOSSES: tuple[KDLoss, ...] = ("none", "kd", "at", "nst", "kd+at")
CONFIG = SearchConfig(batch_size=64, lr=0.05)
STEPS = 3
NORM_KERNELS = {"statistics_kernel", "apply_kernel", "reduce_kernel", "gradient_kernel"}
MOST_KERNELS = {"mobilenetv2": 420, "shufflenetv2": 440, "nasbench201": 460}  # in a step of a median architecture


def noise(images: int = 64 * STEPS, classes: int = 100) -> Dataset:
    rng = np.random.default_rng(0)
    split = Split(np.arange(images) % classes, rng.integers(0, 256, (images, 32, 32, 3), dtype=np.uint8), None)
    return Dataset("noise", split, split, split, tuple(map(str, range(classes))), (0.5,) * 3, (0.25,) * 3, 32, True)


def feed(epochs: int = 1) -> Batches:
    data = noise()
    rows = np.arange(len(data.train))
    return train_batches(data.train, rows, data=data, batch_size=64, epochs=epochs, resolution=32, seed=0,
                         device="cuda", backend="resident")  # fmt: skip


def drawn(space: str, count: int) -> list[tuple[int, ...]]:
    rng = np.random.default_rng(0)
    return [tuple(int(rng.integers(r)) for r in load_space(space).radices) for _ in range(count)]


def student(space: str, choices: tuple[int, ...], teacher: nn.Module | None = None, loss: KDLoss = "none") -> Student:
    example = torch.zeros(2, 3, 32, 32, device=CUDA).contiguous(memory_format=torch.channels_last)
    return prepare(load_space(space).build(choices, 100, 1.0), teacher, CONFIG, loss, example, average=True)


def frozen_teacher() -> nn.Module:
    return teachers.freeze(load_space(SMALL).build((3,) * 6, 100, 1.0), CUDA)


def watch_layouts(students: list[Student], wrong: list[str]) -> None:
    """Records weights whose gradient has a different layout."""
    for one in students:
        for name, weight in one.network.named_parameters():

            def look(gradient: Tensor | None, name: str = name, wanted: tuple[int, ...] = layout(weight)) -> None:
                if gradient is not None and layout(gradient) != wanted:  # None if nothing depends on the layer
                    wrong.append(name)

            weight.register_hook(look)


def check_space(space: str) -> None:
    """Prepares, captures and steps students of a space with each loss."""
    for loss in LOSSES:
        count = 2 if loss == "none" else 1
        with fake_cuda() as device:
            network = None if loss == "none" else frozen_teacher()
            cohort = [student(space, choices, network, loss) for choices in drawn(space, count)]
            wrong: list[str] = []
            watch_layouts(cohort, wrong)
            train(cohort, network and CachedTeacher(network, 2**31), feed(), CONFIG, Stopwatch(), execution="graph")
            assert [(m.status, m.execution, m.error) for m in cohort] == [("ok", "graph", "")] * count, loss
            assert (device.captures, device.replays) == (count, count * STEPS), loss
            assert device.reads == count, "the host reads each loss once per epoch, and nothing else"
            captured = {name for name, while_capturing in device.launches if while_capturing}
            assert captured >= NORM_KERNELS
            assert bool(captured - NORM_KERNELS) == (loss != "none"), captured
            assert wrong == []
            for one in cohort:
                check_layouts(one)


def adamw() -> None:
    """A step of AdamW is captured, makes the host wait for nothing, and reads its learning rate from the device."""
    config = replace(CONFIG, optimizer="adamw", label_smoothing=0.1)
    with fake_cuda() as device:
        network, example = load_space(SMALL).build((3,) * 6, 100, 1.0), torch.zeros(2, 3, 32, 32, device=CUDA)
        one = prepare(network, None, config, "none", example, backbone=0.5)
        train([one], None, feed(), config, Stopwatch(), execution="graph")
        assert (one.status, one.execution) == ("ok", "graph"), (one.execution, one.error)
        assert (device.captures, device.replays, device.reads) == (1, STEPS, 1)
        for weight in network.parameters():
            assert {value.device.type for value in one.optimiser.state[weight].values()} == {"cuda"}
        other = prepare(load_space(SMALL).build((3,) * 6, 100, 1.0), None, config, "none", example, backbone=0.5)
        other.optimiser.load_state_dict(one.optimiser.state_dict())
        train([other], None, feed(), config, Stopwatch(), execution="graph")
        assert (other.status, other.execution) == ("ok", "graph"), other.error


def check_layouts(one: Student) -> None:
    """Weights of convolutions are channels_last, and momenta have the layout of their weights."""
    for weight in one.network.parameters():
        momentum = one.optimiser.state[weight]["momentum_buffer"]
        assert (momentum.device, layout(momentum)) == (weight.device, layout(weight))
        assert weight.dim() != 4 or weight.is_contiguous(memory_format=torch.channels_last)


def mobilenetv2() -> None:
    check_space("mobilenetv2")


def shufflenetv2() -> None:
    check_space("shufflenetv2")


def nasbench201() -> None:
    check_space("nasbench201:channels=16,cells=2")


def eager_steps() -> None:
    """An eager step never makes the host wait, in any precision."""
    for amp in ("auto", "float32"):
        with fake_cuda() as device:
            one = student("mobilenetv2", drawn("mobilenetv2", 1)[0])
            take_step(one, batch(precision(replace(CONFIG, amp_dtype=amp), CUDA)))
            torch.cuda.set_sync_debug_mode("error")
            take_step(one, batch(precision(replace(CONFIG, amp_dtype=amp), CUDA)))
            assert device.reads == 0


def batch(dtype: torch.dtype) -> Inputs:
    images = torch.zeros(64, 3, 32, 32, device=CUDA, dtype=dtype).contiguous(memory_format=torch.channels_last)
    return Inputs(images, torch.zeros(64, dtype=torch.int64, device=CUDA), None, torch.zeros((), device=CUDA))


class Asking(nn.Module):
    """Reads a number from the device in every forward pass."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, images: Tensor) -> Tensor:
        images.mean().item()
        result: Tensor = self.inner(images)
        return result


def falls_back() -> None:
    """A student whose step makes the host wait runs eagerly and reports why; another one keeps its graph."""
    with fake_cuda() as device:
        example = torch.zeros(2, 3, 32, 32, device=CUDA)
        asking = prepare(Asking(load_space(SMALL).build((3,) * 6, 100, 1.0)), None, CONFIG, "none", example)
        other = student(SMALL, (2,) * 6)
        train([asking, other], None, feed(epochs=7), CONFIG, Stopwatch())
        assert asking.status == other.status == "ok", asking.error
        assert asking.execution.startswith("eager: it waits for the device in each step")
        assert (other.execution, device.captures) == ("graph", 1)
        assert asking.forward is asking.network
        assert isinstance(other.forward, LeanForward)


def evaluate_with(folder: str, network: str, loss: KDLoss) -> None:
    """Evaluates two cohorts, from the teacher's file to accuracies; the second uses cached teacher outputs."""
    data, config = noise(), replace(CONFIG, low=Fidelity("low", epochs=1, kd_loss=loss), data_backend="resident")
    card = teachers.Card(network, data.classes, data.name, fingerprint(data), 32, data.mean, data.std, 0, 0.0, 0.0)
    path = Path(folder, "teacher.safetensors")
    teachers.save(path, teachers.build(network, 100, 32), card)
    with fake_cuda() as device, mock.patch.object(teachers, "load", built):
        context = WorkerContext(config, data, CUDA, RunFolder(Path(folder)))
        trials = [Trial(i, Architecture(c), config.low) for i, c in enumerate(drawn(config.space, 2))]
        for _ in range(2):
            answers = worker.evaluate(context, path, trials, Resources(execution="graph"))
            assert [(a.status, a.execution) for a in answers] == [("ok", "graph")] * 2, [a.error for a in answers]
        assert (device.captures, device.replays) == (4, 4 * STEPS)


def built(path: Path) -> nn.Module:
    """A teacher without its weights: safetensors creates real storage, which fake tensors cannot have."""
    return teachers.build(teachers.read_card(path).network, 100, 32)


def evaluates_with_our_teacher() -> None:
    with tempfile.TemporaryDirectory() as folder:
        evaluate_with(folder, f"{SMALL}#3-3-3-3-3-3", "kd+at")


def evaluates_with_a_torchvision_teacher() -> None:
    with tempfile.TemporaryDirectory() as folder:
        evaluate_with(folder, "torchvision:resnet18", "kd+at")


def teacher_outputs_on_the_host() -> None:
    """Teacher outputs that may take more than an eighth of the device's memory are cached on the host."""
    with fake_cuda():
        keys = {FeatureKey(0, True), FeatureKey(1, False)}
        outputs_for = CachedTeacher(frozen_teacher(), 2**36).outputs_for(feed(), keys)
        images = batch(torch.bfloat16).images
        first, again = outputs_for(0, images), outputs_for(0, images)
        assert again.logits.device.type == "cuda"
        for key in first.features:
            assert layout(again.features[key]) == layout(first.features[key])


def resumes() -> None:
    """Restored momenta keep their device and layout, and a graph can read the restored learning rate."""
    with fake_cuda():
        first, other = (student(SMALL, (3,) * 6) for _ in range(2))
        train([first], None, feed(), CONFIG, Stopwatch(), execution="graph")
        other.optimiser.load_state_dict(first.optimiser.state_dict())
        check_layouts(other)
        train([other], None, feed(), CONFIG, Stopwatch(), execution="graph")
        assert (other.status, other.execution) == ("ok", "graph"), other.error


def mistakes_raise() -> None:
    """The fake device rejects what a GPU rejects."""
    with fake_cuda() as device:
        on, off = torch.ones(2, device=CUDA), torch.ones(2)
        with pytest.raises(RuntimeError, match="devices"):
            on + off
        with torch.cuda.graph(torch.cuda.CUDAGraph()):  # type: ignore[no-untyped-call]
            for wait in (on[0].item, lambda: off.to(CUDA), torch.cuda.synchronize, on.nonzero):
                with pytest.raises(RuntimeError, match="synchronizing"):
                    wait()
        assert (on.sum().item(), device.reads) == (0.0, 1)


def captures_come_before_the_loader() -> None:
    """A loader's threads may call CUDA at any time, which can break a capture."""

    def seen(batches: Batches) -> Iterator[Batch]:
        begun.append(device.captures)
        yield from resident(batches)

    begun: list[int] = []
    with fake_cuda() as device:
        train([student(SMALL, (3,) * 6)], None, replace(feed(), source=seen), CONFIG, Stopwatch(), execution="graph")
    assert begun == [1]


def students_wait_only_for_their_inputs() -> None:
    """A student's stream never waits for another student's. The loader's stream waits for the step SLOTS steps back."""
    with fake_cuda() as device:
        cohort = [student(SMALL, (3,) * 6) for _ in range(2)]
        train(cohort, None, feed(epochs=2), CONFIG, Stopwatch(), execution="graph")
        default = torch.cuda.default_stream().cuda_stream
        streams = {waiting for waiting, _ in device.waits} - {default}
        assert len(streams) == 2
        assert {waited for waiting, waited in device.waits if waiting in streams} == {default}
        joins = 2 * 2 + 2  # both students at the end of both epochs, and at the end of the training
        slots = 2 * (2 * STEPS - graphs.SLOTS)
        assert sum(waiting == default for waiting, _ in device.waits) == joins + slots


def the_doctors_graph_test() -> None:
    with fake_cuda() as device:
        assert selftest.graphs("cuda") == "a student trains as one CUDA graph per step, to the losses of eager steps"
        assert device.captures == 1
        says = pytest.raises(RuntimeError, match="a student cannot train as graph: no graph: it waits")
        with mock.patch.object(graphs, "find_host_sync", return_value="it waits"), says:
            selftest.graphs("cuda")


def kernels_of_a_step() -> None:
    """The number of kernels bounds the speed of small steps."""
    for space, most in MOST_KERNELS.items():
        found = count_kernels.step(space, count_kernels.median_architecture(space))
        assert len(found) <= most, (space, len(found))


def latency_is_that_of_a_graph() -> None:
    """Each round captures the network once and replays it; one that waits for the device is called as it is."""

    class Waits(nn.Module):
        calls = 0

        def forward(self, images: Tensor) -> tuple[Tensor, list[Tensor]]:
            self.calls += 1
            device.refuse_waiting("a value is read")
            return images, []

    with fake_cuda() as device:
        conditions = Conditions("torch", 32, 8, CUDA)
        call = conditions.ready(lambda: load_space(SMALL).build((3,) * 6, 10, 1.0))()
        assert (call(), call()) == (1.0, 1.0)  # the clock of the fake device
        assert (device.captures, device.replays, device.reads) == (1, 2, 0)
        waits = Waits()
        call = conditions.ready(lambda: waits)()
        before = waits.calls
        call()
        assert waits.calls == before + 1
        assert device.replays == 2


CASES = [mobilenetv2, shufflenetv2, nasbench201, adamw, eager_steps, falls_back, evaluates_with_our_teacher,
         evaluates_with_a_torchvision_teacher, teacher_outputs_on_the_host, resumes, captures_come_before_the_loader,
         students_wait_only_for_their_inputs, the_doctors_graph_test, kernels_of_a_step, mistakes_raise,
         latency_is_that_of_a_graph]  # fmt: skip


@pytest.mark.parametrize("case", [case.__name__ for case in CASES])
def test_on_a_fake_device(case: str) -> None:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    child = subprocess.run([sys.executable, "-W", "ignore", "-m", "tests.test_fake_cuda", case], cwd=ROOT,
                           env=environment, capture_output=True, text=True, timeout=300)  # fmt: skip
    assert child.stdout.endswith("passed\n"), child.stderr[-3000:]


if __name__ == "__main__":
    {case.__name__: case for case in CASES}[sys.argv[1]]()
    print("passed", flush=True)
    os._exit(0)  # state left by fake tensors can break the interpreter's normal exit
