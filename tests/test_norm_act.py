"""BatchNorm with its activation: the reference against PyTorch's modules, the kernels against the reference.

The kernels run in Triton's interpreter, in a child process with TRITON_INTERPRET=1, and compiled on CUDA. Fresh memory
is NaN, so that an element that no kernel wrote shows up.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn

from kernels.norm_act import ACTIVATIONS, batch_norm_act

INTERPRETING = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cuda" if torch.cuda.is_available() and not INTERPRETING else "cpu"
FP32, BF16 = torch.float32, torch.bfloat16
# For results, running statistics and gradients, relative to their largest entry.
TOLERANCE = {FP32: 2e-5, BF16: 1.6e-2}


@pytest.fixture(autouse=True)
def _poisoned() -> Iterator[None]:
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


def inputs(shape: tuple[int, ...], dtype: torch.dtype, offset: float = 0.0) -> list[Tensor]:
    """x, running mean and variance, weight, bias, upstream gradient; x in channels_last."""
    generator = torch.Generator().manual_seed(0)

    def draw(*size: int) -> Tensor:
        return torch.randn(size, generator=generator)

    x, channels = 3 * draw(*shape) + offset, shape[1]
    parameters = [draw(channels), draw(channels).abs() + 0.5, draw(channels) + 1, draw(channels) + 1]
    x, grad = (t.to(DEVICE, dtype).contiguous(memory_format=torch.channels_last) for t in (x, draw(*shape)))
    return [x, *(p.to(DEVICE) for p in parameters), grad]


def run(given: list[Tensor], training: bool, activation: str, backend: str) -> list[Tensor]:
    """y, running statistics, gradients of x, weight and bias."""
    x, mean, var, weight, bias, grad = (t.detach().clone(memory_format=torch.preserve_format) for t in given)
    leaves = [t.requires_grad_() for t in (x, weight, bias)]
    y = batch_norm_act(x, mean, var, weight, bias, training=training, momentum=0.3, activation=activation,
                       backend=backend)  # fmt: skip
    return [y.detach(), mean, var, *torch.autograd.grad(y, leaves, grad)]


def wide(given: list[Tensor]) -> list[Tensor]:
    return [t.double() for t in given]


def assert_close(got: list[Tensor], wanted: list[Tensor], tolerance: float) -> None:
    for name, one, other in zip(("y", "mean", "var", "dx", "dweight", "dbias"), got, wanted, strict=True):
        error = (one.double() - other).abs().max() / other.abs().max().clamp(min=1e-3)
        assert error <= tolerance, f"{name} is off by {error:.1e}"


@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_the_reference_matches_pytorchs_modules(activation: str, training: bool) -> None:
    given = wide(inputs((8, 40, 6, 5), FP32))
    x, mean, var, weight, bias, grad = (t.clone() for t in given)
    leaves = [t.requires_grad_() for t in (x, weight, bias)]
    act = {"none": nn.Identity(), "relu": nn.ReLU(), "relu6": nn.ReLU6()}[activation]
    y = act(nn.functional.batch_norm(x, mean, var, weight, bias, training, 0.3))
    wanted = [y.detach(), mean, var, *torch.autograd.grad(y, leaves, grad)]
    assert_close(run(given, training, activation, "reference"), wanted, 1e-12)


def test_invalid_inputs_are_rejected() -> None:
    x, mean, var, weight, bias, _ = inputs((1, 3, 1, 1), FP32)
    with pytest.raises(ValueError, match="more than one value"):
        batch_norm_act(x, mean, var, weight, bias, training=True)
    with pytest.raises(ValueError, match="use one of none, relu, relu6"):
        batch_norm_act(x, mean, var, weight, bias, training=False, activation="gelu")
    with pytest.raises(ValueError, match=r"it must be \(N, C, H, W\)"):
        batch_norm_act(x[0], mean, var, weight, bias, training=False)


@pytest.mark.skipif(INTERPRETING, reason="the child runs only the kernels")
@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
def test_compiled_code_calls_the_operator(training: bool) -> None:
    given = inputs((4, 8, 5, 5), FP32)
    mean, var, weight, bias = given[1:5]

    def norm(x: Tensor, mean: Tensor, var: Tensor) -> Tensor:
        return batch_norm_act(x, mean, var, weight, bias, training=training, activation="relu6", backend="reference")

    compiled = torch.compile(norm, fullgraph=True, backend="aot_eager")
    results = []
    for call in (norm, compiled):
        x, running = given[0].clone().requires_grad_(), (mean.clone(), var.clone())
        y = call(x, *running)
        results.append([y, *running, *torch.autograd.grad(y, x, given[5])])
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other)


if INTERPRETING or DEVICE == "cuda":

    @pytest.mark.parametrize(
        ("shape", "dtype", "activation", "training"),
        [
            ((3, 5, 2, 2), FP32, "relu6", True),
            ((5, 40, 5, 3), FP32, "none", True),
            ((5, 40, 5, 3), BF16, "relu6", True),
            ((5, 40, 5, 3), BF16, "relu", False),
            ((2, 300, 3, 3), FP32, "relu", True),
            ((2, 300, 3, 3), FP32, "relu6", False),
        ],
        ids=str,
    )
    @pytest.mark.gpu
    def test_kernel(shape: tuple[int, ...], dtype: torch.dtype, activation: str, training: bool) -> None:
        given = inputs(shape, dtype)
        wanted = run(wide(given), training, activation, "reference")
        got = run(given, training, activation, "triton")
        assert got[0].is_contiguous(memory_format=torch.channels_last)
        assert_close(got, wanted, TOLERANCE[dtype])

    @pytest.mark.gpu
    def test_kernel_with_a_large_mean() -> None:
        """At 1,000 times the deviation, a sum of squares in float32 would lose the variance."""
        given = inputs((5, 40, 5, 3), FP32, offset=3000.0)
        assert_close(run(given, True, "relu", "triton"), run(wide(given), True, "relu", "reference"), 2e-3)

    @pytest.mark.gpu
    def test_kernel_keeps_nan_in_its_channel() -> None:
        given = inputs((3, 5, 7, 7), FP32)
        given[0][0, 2, 0, 0] = torch.nan
        y = run(given, True, "relu6", "triton")[0]
        assert y[:, 2].isnan().all()
        assert not y[:, [0, 1, 3, 4]].isnan().any()


if not INTERPRETING:

    def test_kernels_in_the_interpreter() -> None:
        command = [sys.executable, "-m", "pytest", "-q", "-x", "--no-header", "-p", "no:cacheprovider",
                   "-p", "no:xdist", "-k", "kernel", __file__]  # fmt: skip
        environment = {k: v for k, v in os.environ.items() if not k.startswith("PYTEST_")}
        environment |= {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
        child = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
        assert child.returncode == 0, f"the interpreting child says:\n{child.stdout[-6000:]}{child.stderr[-2000:]}"
        assert " passed" in child.stdout
