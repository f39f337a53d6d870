"""Every kernel against the float64 reference: in Triton's interpreter on a CPU, compiled on CUDA.

A process either interprets or compiles, which is decided before Triton is imported. Without TRITON_INTERPRET=1
this file runs itself in a child process that sets it, once per loss. On a machine with CUDA the same tests also
run in this process, on the device, marked `gpu`. Fresh memory is NaN throughout, so an element that no kernel
wrote shows up. The interpreter computes exp, division and square root as inexactly as a GPU (`gpu_arithmetic`).
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import kernels

INTERPRETING = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cuda" if torch.cuda.is_available() and not INTERPRETING else "cpu"
HERE = INTERPRETING or DEVICE == "cuda"
FP32, BF16, FP16 = torch.float32, torch.bfloat16, torch.float16
NHWC, NCHW = torch.channels_last, torch.contiguous_format
LOSSES = ("ce_kd", "attention", "nst")

# Relative error of the loss, and of the gradient against its largest entry.
TOLERANCE = {FP32: (2e-6, 5e-6), FP16: (1e-5, 2e-3), BF16: (1e-5, 8e-3)}
# A single row: a few exponentials, each 2 ulp off, times T^2 = 16, and no other rows to average with.
ROW_TOLERANCE = {FP32: (8e-6, 5e-6)}
# NST on tensor cores: operands of the Grams are rounded to the features' type.
NST_TOLERANCE = {FP32: (5e-6, 1e-5), FP16: (1e-3, 5e-3), BF16: (1e-3, 2e-2)}
FLOOR = 1e-7  # for a gradient that is 0 in exact arithmetic


def kernel_test(function: Any) -> Any:
    """Collects the test only where kernels can run: in the interpreting child, or on a CUDA device."""
    function.__test__ = HERE
    return pytest.mark.gpu(function) if DEVICE == "cuda" else function


def _off_by(ulps: float, result: Any) -> Any:
    """The float32 numbers shifted by up to `ulps`; equal numbers are always shifted by the same amount."""
    if result.dtype != np.float32:
        return result
    mixed = np.ascontiguousarray(result).view(np.uint32).astype(np.uint64) * np.uint64(2654435761) >> np.uint64(13)
    share = (mixed & np.uint64(0xFFFF)).astype(np.float64) / 32767.5 - 1
    return (result.astype(np.float64) * (1 + share.reshape(result.shape) * ulps * 2.0**-23)).astype(np.float32)


def _rounded_to_bf16(x: Any) -> Any:
    """Bits of the nearest bfloat16, ties to even."""
    bits = np.ascontiguousarray(x, dtype=np.float32).view(np.uint32).reshape(x.shape)
    nearest = (bits + np.uint32(0x7FFF) + (bits >> np.uint32(16) & np.uint32(1))) >> np.uint32(16)
    return np.where(np.isnan(x), np.uint32(0x7FC0), nearest).astype(np.uint16)


def gpu_arithmetic() -> None:
    """Gives the interpreter the errors of ex2, div.full, sqrt and rsqrt.approx, and round-to-nearest bfloat16."""
    from triton import language as tl
    from triton.runtime.interpreter import InterpreterBuilder as Builder
    from triton.runtime.interpreter import TensorHandle

    def exp2(x: Any) -> Any:
        return np.where(x == 0, np.exp2(x), _off_by(2, np.exp2(x))).astype(x.dtype)

    def exp(x: Any) -> Any:
        return exp2((x * np.log2(np.e).astype(x.dtype)).astype(x.dtype))

    def truncate(self: Any, source: Any, target: Any) -> Any:
        if (source.dtype.scalar, target.scalar) != (tl.float32, tl.bfloat16):
            return self.cast_impl(source, target)
        return TensorHandle(_rounded_to_bf16(source.data), tl.bfloat16)

    Builder.create_exp2 = lambda self, x: self.unary_op(x, exp2)
    Builder.create_exp = lambda self, x: self.unary_op(x, exp)
    Builder.create_rsqrt = lambda self, x: self.unary_op(x, lambda y: _off_by(1, (1 / np.sqrt(y)).astype(y.dtype)))
    Builder.create_sqrt = lambda self, x: self.unary_op(x, lambda y: _off_by(1, np.sqrt(y)))
    Builder.create_fdiv = lambda self, x, y: self.binary_op(x, y, lambda a, b: _off_by(2, np.divide(a, b)))
    Builder.create_fp_trunc = truncate


if INTERPRETING:
    gpu_arithmetic()
else:

    @pytest.mark.parametrize("loss", LOSSES)
    def test_kernels_in_the_interpreter(loss: str) -> None:
        pytest.importorskip("triton")
        command = [sys.executable, "-m", "pytest", "-q", "-x", "--no-header", "-p", "no:cacheprovider",
                   "-p", "no:xdist", "-p", "no:randomly", "-k", loss, __file__]  # fmt: skip
        environment = {k: v for k, v in os.environ.items() if not k.startswith("PYTEST_")}
        environment |= {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
        child = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
        assert child.returncode == 0, f"the interpreting child says:\n{child.stdout[-6000:]}{child.stderr[-2000:]}"
        assert " passed" in child.stdout


# numpy's, on the infinities that a kernel computes in branches it does not select.
pytestmark = pytest.mark.filterwarnings("ignore:.* encountered in:RuntimeWarning")


@pytest.fixture(autouse=HERE)
def _poisoned() -> Iterator[None]:
    """Memory from torch.empty and similar functions is NaN."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    assert torch.empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)


def draw(*shape: int, seed: int = 0, dtype: torch.dtype = FP32, scale: float = 1.0) -> Tensor:
    x = torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * scale
    return x.to(DEVICE, dtype)


def labels(rows: int, classes: int) -> Tensor:
    return torch.randint(0, classes, (rows,), generator=torch.Generator().manual_seed(9)).to(DEVICE)


def gradient(loss: Callable[..., Any], student: Tensor, teacher: Tensor, backend: str) -> tuple[Tensor, Tensor]:
    """Loss and student's gradient for an upstream gradient of 1.7, alternating by row for a loss per row."""
    leaf = student.detach().requires_grad_()
    value = loss(leaf, teacher, backend)
    upstream = torch.full_like(value, 1.7)
    if value.dim():
        upstream[::2] *= -1
    (grad,) = torch.autograd.grad(value, leaf, upstream)
    assert grad.dtype == student.dtype
    assert grad.shape == student.shape
    return value.detach().double(), grad.double()


def check(
    loss: Callable[..., Any], student: Tensor, teacher: Tensor, tolerance: Any, rounding: float = 0.0
) -> None:
    """Kernel against the float64 reference on the same numbers; `rounding` is absolute."""
    value, grad = gradient(loss, student, teacher, "triton")
    wanted, wanted_grad = gradient(loss, student.double(), teacher.double(), "reference")
    error, most = tolerance[student.dtype]
    torch.testing.assert_close(value, wanted, rtol=error, atol=FLOOR * error + rounding, equal_nan=True)
    scale = wanted_grad[wanted_grad.isfinite()].abs().max().item() if wanted_grad.isfinite().any() else 0.0
    torch.testing.assert_close(grad, wanted_grad, rtol=0, atol=most * scale + FLOOR + rounding, equal_nan=True)


# ---- cross entropy + knowledge distillation --------------------------------------------------------------


@kernel_test
@pytest.mark.parametrize(("classes", "rows"), [(1, 7), (2, 1), (3, 7), (10, 128), (100, 7), (1000, 7), (1023, 3),
                                               (8192, 1), (21841, 2)])  # fmt: skip
@pytest.mark.parametrize("kind", ["hard", "none", "soft", "mixed"])
def test_ce_kd_by_size_and_target(classes: int, rows: int, kind: str) -> None:
    y, soft = labels(rows, classes), torch.softmax(draw(rows, classes, seed=3), 1)
    y[1::3] = -100
    options: dict[str, dict[str, Any]] = {
        "hard": {"target": y},
        "none": {"temperature": 32.0, "reduction": "sum"},
        "soft": {"target": soft, "label_smoothing": 0.1},
        "mixed": {"target": y, "target_b": labels(rows, classes), "lam": 0.3, "reduction": "none",
                  "label_smoothing": 0.1},
    }  # fmt: skip
    chosen = options[kind]
    check(lambda s, t, b: kernels.ce_kd_loss(s, t, backend=b, **chosen), draw(rows, classes),
          draw(rows, classes, seed=1), ROW_TOLERANCE if kind == "mixed" else TOLERANCE)  # fmt: skip


@kernel_test
@pytest.mark.parametrize(("classes", "dtype", "temperature"), [(4097, FP32, 3.0), (8198, BF16, 4.0), (8199, BF16, 4.0)])
def test_ce_kd_long_rows_of_every_alignment(classes: int, dtype: torch.dtype, temperature: float) -> None:
    """Rows of odd length start anywhere in a 16-byte vector, possibly at different offsets in each matrix."""
    y = labels(9, classes)
    y[:4] = torch.tensor([0, 1, classes - 1, classes - 2])  # the classes outside the whole vectors
    s, t = draw(9, classes, dtype=dtype, scale=2), draw(9, classes + 3, seed=1, dtype=dtype, scale=2)
    for teacher in (t[:, :classes].contiguous(), t[:, 2:-1]):
        check(lambda a, b, k: kernels.ce_kd_loss(a, b, y, temperature=temperature, backend=k), s, teacher, TOLERANCE)


@kernel_test
@pytest.mark.parametrize("dtype", [BF16, FP16], ids=["bf16", "fp16"])
@pytest.mark.parametrize("classes", [10, 1023, 21841])
def test_ce_kd_in_short_types(dtype: torch.dtype, classes: int) -> None:
    y = labels(3, classes)
    check(lambda s, t, b: kernels.ce_kd_loss(s, t, y, backend=b), draw(3, classes, dtype=dtype, scale=3),
          draw(3, classes, seed=1, dtype=dtype, scale=3), TOLERANCE)  # fmt: skip


@kernel_test
@pytest.mark.parametrize("classes", [2, 10, 1000])
@pytest.mark.parametrize("options", [{"variant": "dkd"}, {"standardize": True},
                                     {"variant": "dkd", "standardize": True}],
                         ids=["dkd", "standardized", "both"])  # fmt: skip
def test_ce_kd_variants(classes: int, options: dict[str, Any]) -> None:
    y = labels(7, classes)
    y[2] = -100
    s, t = draw(7, classes, scale=2), draw(7, classes, seed=1, scale=2)
    if classes == 2 and "standardize" in options:
        s, t = s * torch.tensor([[1.0, 0.5]], device=DEVICE), t  # z-scores of 2 logits are constant: gradient 0
    check(lambda a, b, k: kernels.ce_kd_loss(a, b, y, backend=k, **options), s, t, TOLERANCE)


@kernel_test
@pytest.mark.parametrize("apart", [1.0, 0.1, 0.01])
@pytest.mark.parametrize("classes", [100, 8200])
def test_ce_kd_stays_accurate_at_temperature_32(apart: float, classes: int) -> None:
    t = draw(16, classes, scale=3)
    s = t + draw(16, classes, seed=1, scale=apart)
    ours = kernels.ce_kd_loss(s, t, temperature=32.0, kd_weight=1.0, backend="triton")
    truth = kernels.ce_kd_loss(s.double(), t.double(), temperature=32.0, kd_weight=1.0, backend="reference")
    assert abs(ours.item() / truth.item() - 1) <= 1e-6


@kernel_test
def test_ce_kd_of_equal_logits_is_exactly_0() -> None:
    for classes in (100, 8200):
        s = draw(3, classes)
        value, grad = gradient(lambda a, t, b: kernels.ce_kd_loss(a, t, temperature=32.0, backend=b), s, s, "triton")
        assert value == 0
        assert grad.abs().max() == 0


@kernel_test
@pytest.mark.parametrize("classes", [9, 8200])
def test_ce_kd_of_masked_and_nan_logits(classes: int) -> None:
    s, t, y = draw(4, classes), draw(4, classes, seed=1), labels(4, classes - 1)
    s[:, -1] = t[:, -1] = -torch.inf
    check(lambda a, b, k: kernels.ce_kd_loss(a, b, y, backend=k), s, t, TOLERANCE)
    t[1, 3] = -torch.inf  # only the teacher excludes a class: finite
    check(lambda a, b, k: kernels.ce_kd_loss(a, b, y, backend=k), s, t, TOLERANCE)
    s[2, 0] = torch.nan
    check(lambda a, b, k: kernels.ce_kd_loss(a, b, y, backend=k, reduction="none"), s, t, TOLERANCE)
    y[2] = -100  # NaN in an ignored row has no effect
    check(lambda a, b, k: kernels.ce_kd_loss(a, b, y, backend=k), s, t, TOLERANCE)
    y[:] = -100
    value, grad = gradient(lambda a, b, k: kernels.ce_kd_loss(a, b, y, backend=k), s, t, "triton")
    assert value.isnan()
    assert grad.abs().max() == 0


@kernel_test
@pytest.mark.parametrize("classes", [9, 8200])
@pytest.mark.parametrize("weights", [(0.1, 0.9), (0.0, 1.0)], ids=str)
def test_ce_kd_of_a_label_out_of_range_is_nan(classes: int, weights: tuple[float, float]) -> None:
    y = labels(3, classes)
    y[1] = classes
    ce, kd = weights

    def loss(s: Tensor, t: Tensor, backend: str) -> Any:
        return kernels.ce_kd_loss(s, t, y, ce_weight=ce, kd_weight=kd, reduction="none", backend=backend)

    value, grad = gradient(loss, draw(3, classes), draw(3, classes, seed=1), "triton")
    assert value.isnan().tolist() == [False, True, False]
    assert grad.isnan().any(1).tolist() == [False, True, False]


@kernel_test
def test_ce_kd_of_strided_logits() -> None:
    y = labels(5, 100)
    wide_s, wide_t = draw(10, 128), draw(10, 104, seed=1)
    for s, t in (
        (wide_s[:5, :100], wide_t[5:, 3:103]),
        (wide_s[::2, 8:108], wide_t[:5, :100]),
        (draw(100, 5).t(), draw(1, 100).expand(5, 100)),
    ):
        check(lambda a, b, k: kernels.ce_kd_loss(a, b, y, backend=k), s, t, TOLERANCE)
        check(lambda a, b, k: kernels.ce_kd_loss(a, b, y, reduction="none", backend=k), s, t, TOLERANCE)


@kernel_test
def test_ce_kd_parts_and_empty_batches() -> None:
    s, t, y = draw(7, 10), draw(7, 10, seed=1), labels(7, 10)
    ours, wanted = (kernels.ce_kd_loss_and_parts(s, t, y, backend=b)[1] for b in ("triton", "reference"))
    torch.testing.assert_close(ours, wanted)
    assert kernels.ce_kd_loss(s[:0], t[:0], y[:0], backend="triton").isnan()
    assert kernels.ce_kd_loss(s[:0], t[:0], y[:0], reduction="sum", backend="triton") == 0


# ---- attention transfer ----------------------------------------------------------------------------------

PAIRS = [
    ((1, 5, 1, 1), (1, 7, 1, 1)), ((7, 8, 7, 7), (7, 12, 7, 7)), ((3, 40, 8, 8), (3, 24, 8, 8)),
    ((2, 6, 14, 14), (2, 4, 14, 14)), ((1, 3, 32, 32), (1, 5, 32, 32)), ((33, 1, 1, 3), (33, 2, 1, 3)),
]  # fmt: skip


@kernel_test
@pytest.mark.parametrize(("shape_s", "shape_t"), PAIRS, ids=str)
@pytest.mark.parametrize(("p", "mode", "layout"), [(2.0, "mean", NHWC), (1.0, "paper", NCHW), (2.5, "batchmean", NHWC),
                                                   (4.0, "mean", NCHW)])  # fmt: skip
def test_attention_by_size(shape_s: Any, shape_t: Any, p: float, mode: str, layout: torch.memory_format) -> None:
    s, t = draw(*shape_s).to(memory_format=layout), draw(*shape_t, seed=1)
    rounding = 2.5e-7 if mode == "paper" else 0.0  # a distance of unit maps, not squared: 2 ulp of 1
    check(lambda a, b, k: kernels.attention_transfer_loss(a, b, p=p, mode=mode, backend=k), s, t, TOLERANCE, rounding)


@kernel_test
@pytest.mark.parametrize("sizes", [((16, 12), (8, 6)), ((8, 6), (16, 12)), ((40, 36), (20, 18)), ((9, 9), (3, 3)),
                                   ((7, 7), (4, 4)), ((8, 4), (4, 8))], ids=str)  # fmt: skip
@pytest.mark.parametrize("layout", [NHWC, NCHW], ids=["NHWC", "NCHW"])
def test_attention_of_different_sizes(sizes: Any, layout: torch.memory_format) -> None:
    s, t = draw(2, 6, *sizes[0]).to(memory_format=layout), draw(2, 4, *sizes[1], seed=1).to(memory_format=layout)
    for p in (2.0, 3.0):
        check(lambda a, b, k, p=p: kernels.attention_transfer_loss(a, b, p=p, backend=k), s, t, TOLERANCE)


@kernel_test
@pytest.mark.parametrize("dtype", [BF16, FP16], ids=["bf16", "fp16"])
@pytest.mark.parametrize("size", [7, 20])
def test_attention_in_short_types(dtype: torch.dtype, size: int) -> None:
    s, t = draw(2, 24, size, size, dtype=dtype), draw(2, 8, size, size, seed=1, dtype=dtype)
    check(lambda a, b, k: kernels.attention_transfer_loss(a, b, backend=k), s, t, TOLERANCE)
    big = (1000 * s).to(FP16)  # its square overflows float16
    assert kernels.attention_transfer_loss(big, t.to(FP16), backend="triton").isfinite()


@kernel_test
@pytest.mark.parametrize("size", [4, 20])
def test_attention_of_dead_nan_and_sliced_features(size: int) -> None:
    s, t = draw(4, 6, size, size + 2)[..., 1:-1], draw(8, 6, size, size, seed=1)[::2]
    check(lambda a, b, k: kernels.attention_transfer_loss(a, b, backend=k), s, t, TOLERANCE)
    s = s.clone()
    s[1] = 0
    for mode in ("mean", "paper"):
        check(lambda a, b, k, m=mode: kernels.attention_transfer_loss(a, b, mode=m, backend=k), s, t, TOLERANCE)
    check(lambda a, b, k: kernels.attention_transfer_loss(a, b, eps=1e3, backend=k), s, t, TOLERANCE)
    s[2, 0, 0, 0] = torch.nan
    value, grad = gradient(lambda a, b, k: kernels.attention_transfer_loss(a, b, backend=k), s, t, "triton")
    assert value.isnan()
    assert grad.flatten(1).isnan().any(1).tolist() == [False, False, True, False]


@kernel_test
@pytest.mark.parametrize(("height", "width", "ratio"), [(5, 7, 1), (20, 18, 1), (3, 4, 2)])
def test_attention_of_transposed_maps(height: int, width: int, ratio: int) -> None:
    s = draw(2, 6, ratio * width, ratio * height).transpose(2, 3)
    t = draw(2, 4, width, height, seed=1).transpose(2, 3)
    check(lambda a, b, k: kernels.attention_transfer_loss(a, b, backend=k), s, t, TOLERANCE)


@kernel_test
@pytest.mark.parametrize("layout", [NHWC, NCHW], ids=["NHWC", "NCHW"])
def test_attention_of_samples_too_large_for_one_program(layout: torch.memory_format) -> None:
    """Few positions, many channels: blocks of positions span samples, and channels take several blocks."""
    s, t = (draw(3, c, 7, 7, seed=c).to(memory_format=layout) for c in (24, 1100))
    for student, teacher in ((s, t), (t, s)):
        check(lambda a, b, k: kernels.attention_transfer_loss(a, b, backend=k), student, teacher, TOLERANCE)


@kernel_test
def test_attention_of_equal_features_is_exactly_0() -> None:
    for size in (4, 20):
        f = draw(2, 6, size, size)
        for mode in ("mean", "paper", "batchmean"):
            value, grad = gradient(
                lambda a, b, k, m=mode: kernels.attention_transfer_loss(a, b, mode=m, backend=k), f, f, "triton"
            )
            assert value == 0
            assert grad.abs().max() == 0


# ---- neuron selectivity transfer -------------------------------------------------------------------------


@kernel_test
@pytest.mark.parametrize(
    ("shape_s", "shape_t", "method"),
    [((7, 5, 1, 1), (7, 7, 1, 1), "spatial"), ((2, 24, 7, 7), (2, 40, 7, 7), "spatial"),
     ((2, 24, 7, 7), (2, 40, 7, 7), "channel"), ((1, 160, 8, 8), (1, 96, 8, 8), "spatial"),
     ((1, 24, 32, 32), (1, 24, 32, 32), "channel"), ((2, 64, 14, 14), (2, 33, 14, 14), "channel"),
     ((33, 3, 2, 2), (33, 4, 2, 2), "auto")],
    ids=str,
)  # fmt: skip
@pytest.mark.parametrize("layout", [NHWC, NCHW], ids=["NHWC", "NCHW"])
def test_nst_by_size(shape_s: Any, shape_t: Any, method: str, layout: torch.memory_format) -> None:
    s, t = draw(*shape_s).to(memory_format=layout), draw(*shape_t, seed=1)
    for term in (True, False):
        check(lambda a, b, k, term=term: kernels.nst_loss(a, b, method=method, teacher_term=term, backend=k), s, t,
              NST_TOLERANCE)  # fmt: skip


@kernel_test
@pytest.mark.parametrize("dtype", [BF16, FP16], ids=["bf16", "fp16"])
@pytest.mark.parametrize(("method", "channels"), [("spatial", 96), ("channel", 100)])
def test_nst_in_short_types(dtype: torch.dtype, method: str, channels: int) -> None:
    s, t = draw(2, 48, 6, 6, dtype=dtype), draw(2, channels, 6, 6, seed=1, dtype=dtype)
    check(lambda a, b, k: kernels.nst_loss(a, b, method=method, backend=k), s, t, NST_TOLERANCE)


@kernel_test
@pytest.mark.parametrize("method", ["spatial", "channel"])
def test_nst_of_dead_clamped_nan_and_sliced_features(method: str) -> None:
    s, t = draw(3, 6, 5, 7)[..., 1:-1], draw(3, 9, 5, 5, seed=1)
    check(lambda a, b, k: kernels.nst_loss(a, b, method=method, backend=k), s, t, NST_TOLERANCE)
    s = s.clone()
    s[1, 2] = 0
    check(lambda a, b, k: kernels.nst_loss(a, b, method=method, backend=k), s, t, NST_TOLERANCE)
    check(lambda a, b, k: kernels.nst_loss(a, b, method=method, eps=5.0, backend=k), s, t, NST_TOLERANCE)
    s[2, 0, 0, 0] = torch.nan
    value, grad = gradient(lambda a, b, k: kernels.nst_loss(a, b, method=method, backend=k), s, t, "triton")
    assert value.isnan()
    assert grad.flatten(1).isnan().any(1).tolist() == [False, False, True]


@kernel_test
@pytest.mark.parametrize("method", ["spatial", "channel"])
def test_nst_of_transposed_maps(method: str) -> None:
    s, t = draw(2, 6, 5, 7).transpose(2, 3), draw(2, 9, 5, 7, seed=1).transpose(2, 3)
    check(lambda a, b, k: kernels.nst_loss(a, b, method=method, backend=k), s, t, NST_TOLERANCE)


@kernel_test
def test_nst_of_equal_features_is_exactly_0() -> None:
    """With the Gram of positions, whether one program or several share a sample."""
    for channels in (6, 200):
        f = draw(2, channels, 5, 5)
        loss = lambda a, b, k: kernels.nst_loss(a, b, method="spatial", backend=k)  # noqa: E731
        value, grad = gradient(loss, f, f, "triton")
        assert value == 0
        assert grad.abs().max() == 0


@kernel_test
@pytest.mark.parametrize(("method", "shape"), [("spatial", (2, 700, 4, 4)), ("channel", (2, 24, 20, 20))], ids=str)
def test_nst_of_a_sample_shared_by_programs_is_deterministic(method: str, shape: Any) -> None:
    s, t = draw(*shape, seed=1), draw(*shape, seed=2)
    check(lambda a, b, k: kernels.nst_loss(a, b, method=method, backend=k), s, t, NST_TOLERANCE)
    again = [gradient(lambda a, b, k: kernels.nst_loss(a, b, method=method, backend=k), s, t, "triton") for _ in "ab"]
    assert all(map(torch.equal, *again))


@kernel_test
def test_nst_beyond_one_tile_uses_batched_products() -> None:
    s, t = draw(1, 70, 14, 14), draw(1, 90, 14, 14, seed=1)
    for method in ("spatial", "channel"):
        check(lambda a, b, k, m=method: kernels.nst_loss(a, b, method=m, backend=k), s, t, NST_TOLERANCE)
