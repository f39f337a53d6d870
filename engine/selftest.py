"""Self-tests of a worker's foundations: kernels, CUDA graphs, data loader. `python -m engine.selftest NAME DEVICE`.

`doctor` runs each in its own process, since a broken library may crash it. The last line of stdout is the result; a
failed test exits with a code other than 0 and a traceback on stderr.
"""

from __future__ import annotations

import os
import sys
import tempfile
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from engine.config import Execution, SearchConfig
from engine.data.dataset import Dataset, Split, load
from engine.data.loader import Backend, Batches, eval_batches, train_batches
from engine.spaces.load import load_space
from engine.training.student import prepare
from engine.training.train import Stopwatch, train
from kernels import attention_transfer_loss, ce_kd_loss, nst_loss

Loss = Callable[[Tensor, Tensor], Tensor]
LOSS_TOLERANCE = 0.05  # relative: bfloat16 rounds differently in another order, and later steps build on that
TOLERANCE = 1e-4  # relative, of float32 losses and of gradients against their largest entry


def kernels(device: str) -> str:
    """Compares the losses with their textbook formulas, and the Triton kernels with the reference losses."""
    torch.manual_seed(0)
    labels = torch.randint(10, (8,), device=device)

    def ce_kd(student: Tensor, teacher: Tensor, backend: str) -> Tensor:
        return ce_kd_loss(student, teacher, labels, temperature=4.0, ce_weight=1.0, kd_weight=1.0, backend=backend)

    def textbook_ce_kd(student: Tensor, teacher: Tensor) -> Tensor:
        soft = F.kl_div(F.log_softmax(student / 4, 1), F.softmax(teacher / 4, 1), reduction="batchmean")
        return F.cross_entropy(student, labels) + 16 * soft

    cases: list[tuple[str, tuple[int, ...], Callable[..., Tensor], Loss]] = [
        ("ce_kd", (8, 10), ce_kd, textbook_ce_kd),
        ("attention", (2, 6, 8, 8), attention_transfer_loss, _textbook_attention),
        ("nst", (2, 6, 8, 8), nst_loss, _textbook_nst),
    ]
    compiled = device != "cpu" or os.environ.get("TRITON_INTERPRET") == "1"
    for name, shape, loss, textbook in cases:
        student, teacher = torch.randn(shape, device=device), torch.randn(shape, device=device)
        reference = _with_gradient(partial(loss, backend="reference"), student, teacher)
        _compare(f"{name}: reference against the textbook", reference, _with_gradient(textbook, student, teacher))
        if compiled:
            kernel = _with_gradient(partial(loss, backend="triton"), student, teacher)
            _compare(f"{name}: Triton against the reference", kernel, reference)
    how = "not run" if not compiled else "interpreted" if device == "cpu" else "compiled"
    return f"{', '.join(case[0] for case in cases)}: reference agrees with the textbook; Triton kernels {how}"


def graphs(device: str) -> str:
    """Trains a student with its steps as CUDA graphs, and again with the same steps launched one by one."""
    data = load("glyphs:144")

    def trained(execution: Execution) -> float:
        torch.manual_seed(0)
        network = load_space("mobilenetv2").build((0,) * 14, len(data.classes), 1.0)
        example = torch.zeros(2, 3, data.resolution, data.resolution, device=device)
        config = SearchConfig(batch_size=16, lr=0.01)
        student = prepare(network, None, config, "none", example)
        train([student], None, _batches(data, device, "resident", 4), config, Stopwatch(), execution=execution)
        if student.status != "ok" or not student.execution.startswith(execution):
            raise RuntimeError(f"a student cannot train as {execution}: {student.error or student.execution}")
        return student.loss_sum.item()

    graph, eager = trained("graph"), trained("eager")
    if not abs(graph - eager) <= LOSS_TOLERANCE * eager:
        raise RuntimeError(f"the losses of a training add up to {graph:.3f} as graphs and to {eager:.3f} eagerly")
    return "a student trains as one CUDA graph per step, to the losses of eager steps"


def arrays(device: str) -> str:
    """Compares DALI's batches of arrays with those of the resident backend."""
    data = load("glyphs:144")
    backends: tuple[Backend, Backend] = ("dali", "resident")
    ours, other = (next(iter(_batches(data, device, backend))).images.float() for backend in backends)
    error = (ours - other).abs().max().item()
    if error > (1e-4 if device == "cpu" else 1e-2):
        raise RuntimeError(f"DALI's pixels differ from the resident backend's by {error:.1e}")
    return "arrays are read correctly"


def loader(device: str) -> str:
    """Compares DALI's batches of arrays, see `arrays`, and of JPEG files with their grey levels."""
    arrays(device)
    data = load("glyphs:144")
    with tempfile.TemporaryDirectory() as folder:
        files = tuple(str(Path(folder) / f"{level}.jpg") for level in (50, 200))
        for file, level in zip(files, (50, 200), strict=True):
            Image.new("RGB", (40, 30), (level, level, level)).save(file)
        split = Split(np.arange(2), None, files)
        plain = replace(data, mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0))
        batch = next(iter(eval_batches(split, data=plain, batch_size=2, resolution=16, device=device)))
        levels = [round(255 * image.float().mean().item()) for image in batch.images]
    if any(abs(level - true) > 2 for level, true in zip(levels, (50, 200), strict=True)):
        raise RuntimeError(f"JPEG files of the grey levels 50 and 200 were read as {levels}")
    return "arrays and JPEG files are read correctly; the cache can be written"


def device(name: str) -> str:
    """Runs a computation on a GPU, and returns its name, memory and compute capability."""
    torch.ones(8, device=name).sum().item()  # makes the driver do work, not only report a name
    major, minor = torch.cuda.get_device_capability(name)
    memory = torch.cuda.get_device_properties(name).total_memory / 2**30
    return f"{torch.cuda.get_device_name(name)}, {memory:.0f} GiB, compute capability {major}.{minor}"


TESTS = {"device": device, "kernels": kernels, "graphs": graphs, "loader": loader}


def _batches(data: Dataset, device: str, backend: Backend, epochs: int = 1) -> Batches:
    return train_batches(
        data.train,
        np.arange(len(data.train)),
        data=data,
        batch_size=16,
        epochs=epochs,
        resolution=data.resolution,
        seed=0,
        device=device,
        backend=backend,
    )


def _textbook_attention(student: Tensor, teacher: Tensor) -> Tensor:
    maps = [F.normalize(feature.square().mean(1).flatten(1)) for feature in (student, teacher)]
    return (maps[0] - maps[1]).square().mean()


def _textbook_nst(student: Tensor, teacher: Tensor) -> Tensor:
    a, b = (F.normalize(feature.flatten(2), dim=2) for feature in (student, teacher))

    def kernel(x: Tensor, y: Tensor) -> Tensor:
        return (x @ y.mT).square().mean((1, 2))

    return (kernel(a, a) + kernel(b, b) - 2 * kernel(a, b)).mean()


def _with_gradient(loss: Loss, student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
    leaf = student.clone().requires_grad_()
    value = loss(leaf, teacher)
    (gradient,) = torch.autograd.grad(value, leaf)
    return value.detach(), gradient


def _compare(what: str, got: tuple[Tensor, Tensor], wanted: tuple[Tensor, Tensor]) -> None:
    for name, one, other in zip(("loss", "gradient"), got, wanted, strict=True):
        error = ((one - other).abs().max() / other.abs().max()).item()
        if not error <= TOLERANCE:
            raise RuntimeError(f"{what}: the {name} is off by {error:.1e} of its size")


if __name__ == "__main__":
    test, where = sys.argv[1:]
    print(TESTS[test](where))
