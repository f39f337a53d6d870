"""What only a GPU can show: graph capture, no host synchronisation, streams, determinism, autocast.

`test_kernels_triton.py` tests the numerics, on a GPU if there is one.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

import kernels

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device: nothing in this file was checked"),
]
LOSSES = ("ce_kd", "ce_kd long", "attention", "attention large", "nst spatial", "nst channel", "nst batched")


def case(name: str, seed: int = 0) -> tuple[Callable[[Tensor], Tensor], Tensor]:
    """(loss of the student, student) in bfloat16 on the device."""
    generator = torch.Generator("cuda").manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        x = torch.randn(shape, generator=generator, device="cuda", dtype=torch.bfloat16)
        return x.to(memory_format=torch.channels_last) if len(shape) == 4 else x

    if name.startswith("ce_kd"):
        classes = 21841 if name.endswith("long") else 100
        s, t = draw(128, classes), draw(128, classes)
        y = torch.randint(0, classes, (128,), generator=generator, device="cuda")
        return lambda x: kernels.ce_kd_loss(x, t, y, backend="triton"), s
    if name.startswith("attention"):
        size = 32 if name.endswith("large") else 8
        s, t = draw(64, 24, size, size), draw(64, 40, size, size)
        return lambda x: kernels.attention_transfer_loss(x, t, backend="triton"), s
    channels, size = {"spatial": (160, 8), "channel": (24, 32), "batched": (160, 14)}[name.split()[1]]
    s, t = draw(64, channels, size, size), draw(64, channels, size, size)
    return lambda x: kernels.nst_loss(x, t), s


def step(loss: Callable[[Tensor], Tensor], student: Tensor) -> tuple[Tensor, Tensor]:
    leaf = student.detach().requires_grad_()
    value = loss(leaf)
    (gradient,) = torch.autograd.grad(value * 3, leaf)
    return value.detach(), gradient


@pytest.mark.parametrize("name", LOSSES)
def test_step_never_waits_for_the_device(name: str) -> None:
    loss, student = case(name)
    step(loss, student)  # compiles
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        step(loss, student)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("name", LOSSES)
def test_two_runs_agree_in_every_bit(name: str) -> None:
    loss, student = case(name)
    for got, wanted in zip(step(loss, student), step(loss, student), strict=True):
        assert torch.equal(got, wanted)


@pytest.mark.parametrize("name", LOSSES)
def test_a_captured_graph_replays_on_new_numbers(name: str) -> None:
    loss, student = case(name)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            step(loss, student)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step(loss, student)
    for seed in (5, 6):
        student.copy_(case(name, seed)[1])
        graph.replay()
        wanted = step(loss, student)
        for got, want in zip(captured, wanted, strict=True):
            assert torch.equal(got, want)


@pytest.mark.parametrize("name", LOSSES)
def test_streams_do_not_share_their_counters(name: str) -> None:
    loss, student = case(name)
    wanted = step(loss, student)
    streams = [torch.cuda.Stream() for _ in range(3)]
    results = []
    torch.cuda.synchronize()
    for _ in range(5):
        for stream in streams:
            with torch.cuda.stream(stream):
                results.append(step(loss, student))
    torch.cuda.synchronize()
    assert all(torch.equal(got, want) for result in results for got, want in zip(result, wanted, strict=True))


@pytest.mark.parametrize("name", LOSSES)
def test_compiled_whole_is_the_eager_step(name: str) -> None:
    loss, student = case(name)
    compiled = torch.compile(loss, fullgraph=True)
    for got, wanted in zip(step(compiled, student), step(loss, student), strict=True):
        torch.testing.assert_close(got, wanted)


@pytest.mark.parametrize("name", ["ce_kd", "attention", "nst channel"])
def test_compiled_into_cuda_graphs_is_the_eager_step(name: str) -> None:
    """CUDA graphs own the memory that their kernels allocate, and reject a kernel that keeps some of it."""
    loss, student = case(name)
    compiled = torch.compile(loss, fullgraph=True, mode="reduce-overhead")
    for _ in range(4):  # compiled, warmed up, recorded, replayed
        torch.compiler.cudagraph_mark_step_begin()
        for got, wanted in zip(step(compiled, student), step(loss, student), strict=True):
            torch.testing.assert_close(got, wanted)


def test_autocast_and_a_gradient_scaler_reach_the_reference() -> None:
    """float16 logits of a large batch, scaled by GradScaler: no gradient is flushed to zero early."""
    generator = torch.Generator("cuda").manual_seed(0)
    linear = torch.nn.Linear(64, 1000, device="cuda")
    x = torch.randn(1024, 64, generator=generator, device="cuda")
    t = torch.randn(1024, 1000, generator=generator, device="cuda")
    y = torch.randint(0, 1000, (1024,), generator=generator, device="cuda")
    gradients = []
    for backend in ("triton", "reference"):
        scaler = torch.amp.GradScaler("cuda", init_scale=2.0**14)
        linear.zero_grad()
        with torch.autocast("cuda", dtype=torch.float16):
            logits = linear(x)
            assert logits.dtype == torch.float16
            loss = kernels.ce_kd_loss(logits, t, y, backend=backend)
        scaler.scale(loss).backward()
        gradients.append(linear.weight.grad.double() / scaler.get_scale())
    scale = gradients[1].abs().max()
    assert (gradients[0] - gradients[1]).abs().max() <= 2e-3 * scale


def test_autocast_leaves_nst_in_its_own_types() -> None:
    loss, student = case("nst batched")
    wanted = step(loss, student)
    with torch.autocast("cuda", dtype=torch.bfloat16):
        value = loss(student)
    assert torch.equal(value, wanted[0])


def test_more_than_two_to_the_31_elements() -> None:
    rows, classes = 100_000, 21848
    if torch.cuda.mem_get_info()[0] < 24 * 2**30:
        pytest.skip("needs 24 GiB of free device memory")
    s = torch.zeros(rows, classes, device="cuda", dtype=torch.bfloat16)
    t = torch.zeros(rows, classes, device="cuda", dtype=torch.bfloat16)
    assert s.numel() > 2**31
    s[-1, -1] = 8.0
    s.requires_grad_()
    loss = kernels.ce_kd_loss(s, t, temperature=1.0, kd_weight=1.0, reduction="none", backend="triton")
    (gradient,) = torch.autograd.grad(loss.sum(), s)
    wanted = kernels.ce_kd_loss(s[-2:].double(), t[-2:].double(), temperature=1.0, kd_weight=1.0, reduction="none")
    torch.testing.assert_close(loss[-2:].double(), wanted.detach(), rtol=1e-5, atol=1e-7)
    assert gradient[-2].abs().max() == 0
    assert gradient[-1, -1] > 0


def test_a_second_device() -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two CUDA devices")
    s, t = torch.randn(7, 10, device="cuda:1"), torch.randn(7, 10, device="cuda:1")
    torch.testing.assert_close(
        kernels.ce_kd_loss(s, t, backend="triton"), kernels.ce_kd_loss(s, t, backend="reference")
    )
