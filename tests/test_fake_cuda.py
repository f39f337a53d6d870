"""The CUDA path on a device that is not there (tests/fake_cuda.py): what runs, not what it computes.

Each case runs in a process of its own, `python -m tests.test_fake_cuda CASE`: the fake device changes the process.
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
from engine.config import Resources, Study
from engine.data.batches import Batch
from engine.data.loader import Batches, train_batches
from engine.data.parts import Data, Part, fingerprint
from engine.data.resident import resident
from engine.space import load_space
from engine.training import evaluate as worker
from engine.training import graphs
from engine.training import teacher as teachers
from engine.training.lean import LeanForward
from engine.training.student import Inputs, Student, precision, prepare, take_step
from engine.training.taught import Teacher
from engine.training.train import Stopwatch, train
from engine.training.workbench import Bench
from engine.trial import Architecture, Fidelity, KDLoss, Trial
from tests.fake_cuda import fake_cuda, layout

ROOT = Path(__file__).resolve().parent.parent
CUDA = torch.device("cuda")
SMALL = "nasbench201:channels=16,cells=1"
LOSSES: tuple[KDLoss, ...] = ("none", "kd", "at", "nst", "kd+at")
STUDY = Study(batch_size=64, lr=0.05)
STEPS = 3
NORM_KERNELS = {"statistics_kernel", "apply_kernel", "reduce_kernel", "gradient_kernel"}
MOST_KERNELS = {"mobilenetv2": 420, "shufflenetv2": 440, "nasbench201": 460}  # a step of a median member


def noise(images: int = 64 * STEPS, classes: int = 100) -> Data:
    rng = np.random.default_rng(0)
    part = Part(np.arange(images) % classes, rng.integers(0, 256, (images, 32, 32, 3), dtype=np.uint8), None)
    return Data("noise", part, part, part, tuple(map(str, range(classes))), (0.5,) * 3, (0.25,) * 3, 32, True)


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
    return prepare(load_space(space).build(choices, 100, 1.0), teacher, STUDY, loss, example, average=True)


def frozen_teacher() -> nn.Module:
    return teachers.freeze(load_space(SMALL).build((3,) * 6, 100, 1.0), CUDA)


def watch_layouts(members: list[Student], wrong: list[str]) -> None:
    """Notes each gradient that comes in another layout than its weight."""
    for member in members:
        for name, weight in member.network.named_parameters():

            def look(gradient: Tensor | None, name: str = name, wanted: tuple[int, ...] = layout(weight)) -> None:
                if gradient is not None and layout(gradient) != wanted:  # None where nothing depends on the layer
                    wrong.append(name)

            weight.register_hook(look)


def check_space(space: str) -> None:
    """Students of a space with each loss: preparation, capture and steps."""
    for loss in LOSSES:
        count = 2 if loss == "none" else 1
        with fake_cuda() as device:
            network = None if loss == "none" else frozen_teacher()
            cohort = [student(space, choices, network, loss) for choices in drawn(space, count)]
            wrong: list[str] = []
            watch_layouts(cohort, wrong)
            train(cohort, network and Teacher(network, 2**31), feed(), STUDY, Stopwatch(), execution="graph")
            assert [(m.status, m.execution, m.error) for m in cohort] == [("ok", "graph", "")] * count, loss
            assert (device.captures, device.replays) == (count, count * STEPS), loss
            assert device.reads == count, "the host reads each loss once an epoch, and nothing else"
            captured = {name for name, while_capturing in device.launches if while_capturing}
            assert captured >= NORM_KERNELS
            assert bool(captured - NORM_KERNELS) == (loss != "none"), captured
            assert wrong == []
            for member in cohort:
                check_layouts(member)


def check_layouts(member: Student) -> None:
    """Weights of convolutions are channels_last, and momenta lie as their weights do."""
    for weight in member.network.parameters():
        momentum = member.optimiser.state[weight]["momentum_buffer"]
        assert (momentum.device, layout(momentum)) == (weight.device, layout(weight))
        assert weight.dim() != 4 or weight.is_contiguous(memory_format=torch.channels_last)


def mobilenetv2() -> None:
    check_space("mobilenetv2")


def shufflenetv2() -> None:
    check_space("shufflenetv2")


def nasbench201() -> None:
    check_space("nasbench201:channels=16,cells=2")


def eager_steps() -> None:
    """A step that is launched kernel by kernel asks the device nothing, in any precision."""
    for amp in ("auto", "float32"):
        with fake_cuda() as device:
            member = student("mobilenetv2", drawn("mobilenetv2", 1)[0])
            take_step(member, batch(precision(replace(STUDY, amp_dtype=amp), CUDA)))
            torch.cuda.set_sync_debug_mode("error")
            take_step(member, batch(precision(replace(STUDY, amp_dtype=amp), CUDA)))
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
    """A student whose step waits for the device runs eagerly and says so; the one beside it keeps its graph."""
    with fake_cuda() as device:
        example = torch.zeros(2, 3, 32, 32, device=CUDA)
        asking = prepare(Asking(load_space(SMALL).build((3,) * 6, 100, 1.0)), None, STUDY, "none", example)
        other = student(SMALL, (2,) * 6)
        train([asking, other], None, feed(epochs=7), STUDY, Stopwatch())
        assert asking.status == other.status == "ok", asking.error
        assert asking.execution.startswith("eager: it waits for the device in each step")
        assert (other.execution, device.captures) == ("graph", 1)
        assert asking.forward is asking.network
        assert isinstance(other.forward, LeanForward)


def evaluate_with(folder: str, network: str, loss: KDLoss) -> None:
    """Two cohorts of trials, from the teacher's file to accuracies; the second one finds the lessons kept."""
    data, study = noise(), replace(STUDY, low=Fidelity("low", epochs=1, kd_loss=loss), data_backend="resident")
    card = teachers.Card(network, data.classes, data.name, fingerprint(data), 32, data.mean, data.std, 0, 0.0, 0.0)
    path = Path(folder, "teacher.safetensors")
    teachers.save(path, teachers.build(network, 100, 32), card)
    with fake_cuda() as device, mock.patch.object(teachers, "load", built):
        bench = Bench(study, data, CUDA, Path(folder))
        trials = [Trial(i, Architecture(c), study.low) for i, c in enumerate(drawn(study.space, 2))]
        for _ in range(2):
            answers = worker.evaluate(bench, str(path), trials, Resources(execution="graph"))
            assert [(a.status, a.execution) for a in answers] == [("ok", "graph")] * 2, [a.error for a in answers]
        assert (device.captures, device.replays) == (4, 4 * STEPS)


def built(path: Path) -> nn.Module:
    """The teacher of a file without its weights: safetensors makes storage of its own, which no fake tensor has."""
    return teachers.build(teachers.read_card(path).network, 100, 32)


def evaluates_with_our_teacher() -> None:
    with tempfile.TemporaryDirectory() as folder:
        evaluate_with(folder, f"{SMALL}#3-3-3-3-3-3", "kd+at")


def evaluates_with_a_librarys_teacher() -> None:
    with tempfile.TemporaryDirectory() as folder:
        evaluate_with(folder, "torchvision:resnet18", "kd+at")


def lessons_on_the_host() -> None:
    """Lessons that may take more than an eighth of the device's memory are kept on the host, and come back."""
    with fake_cuda():
        course = Teacher(frozen_teacher(), 2**36).course(feed(), {(0, True), (1, False)})
        images = batch(torch.bfloat16).images
        first, again = course(0, images), course(0, images)
        assert again[0].device.type == "cuda"
        for tap in first[1]:
            assert layout(again[1][tap]) == layout(first[1][tap])


def resumes() -> None:
    """Momenta that were loaded keep device and layout, and the learning rate is again one a graph can read."""
    with fake_cuda():
        one, other = (student(SMALL, (3,) * 6) for _ in range(2))
        train([one], None, feed(), STUDY, Stopwatch(), execution="graph")
        other.optimiser.load_state_dict(one.optimiser.state_dict())
        check_layouts(other)
        train([other], None, feed(), STUDY, Stopwatch(), execution="graph")
        assert (other.status, other.execution) == ("ok", "graph"), other.error


def mistakes_raise() -> None:
    """The device itself: it refuses what a GPU refuses."""
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
        train([student(SMALL, (3,) * 6)], None, replace(feed(), source=seen), STUDY, Stopwatch(), execution="graph")
    assert begun == [1]


def students_wait_for_their_inputs_alone() -> None:
    """No student's stream waits for another's, and the loader's waits for a step that is SLOTS back."""
    with fake_cuda() as device:
        cohort = [student(SMALL, (3,) * 6) for _ in range(2)]
        train(cohort, None, feed(epochs=2), STUDY, Stopwatch(), execution="graph")
        default = torch.cuda.default_stream().cuda_stream
        lanes = {waiting for waiting, _ in device.waits} - {default}
        assert len(lanes) == 2
        assert {waited for waiting, waited in device.waits if waiting in lanes} == {default}
        joins = 2 * 2 + 2  # both students at the end of both epochs, and when their lanes close
        slots = 2 * (2 * STEPS - graphs.SLOTS)
        assert sum(waiting == default for waiting, _ in device.waits) == joins + slots


def the_doctors_graph_test() -> None:
    with fake_cuda() as device:
        assert selftest.graphs("cuda") == "a student trains as one CUDA graph a step, to the losses of eager steps"
        assert device.captures == 1
        says = pytest.raises(RuntimeError, match="a student cannot train as graph: no graph: it waits")
        with mock.patch.object(graphs, "waits_for_device", return_value="it waits"), says:
            selftest.graphs("cuda")


def kernels_of_a_step() -> None:
    """Their number bounds the speed of small steps."""
    for space, most in MOST_KERNELS.items():
        found = count_kernels.step(space, count_kernels.member(space))
        assert len(found) <= most, (space, len(found))


CASES = [mobilenetv2, shufflenetv2, nasbench201, eager_steps, falls_back, evaluates_with_our_teacher,
         evaluates_with_a_librarys_teacher, lessons_on_the_host, resumes, captures_come_before_the_loader,
         students_wait_for_their_inputs_alone, the_doctors_graph_test, kernels_of_a_step, mistakes_raise]  # fmt: skip


@pytest.mark.parametrize("case", [case.__name__ for case in CASES])
def test_on_a_fake_device(case: str) -> None:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    child = subprocess.run([sys.executable, "-W", "ignore", "-m", "tests.test_fake_cuda", case], cwd=ROOT,
                           env=environment, capture_output=True, text=True, timeout=300)  # fmt: skip
    assert child.stdout.endswith("passed\n"), child.stderr[-3000:]


if __name__ == "__main__":
    {case.__name__: case for case in CASES}[sys.argv[1]]()
    print("passed", flush=True)
    os._exit(0)  # what fake tensors leave behind can break the interpreter's own exit
