"""The lean forward pass of students on a GPU: the same outputs, gradients and state as the network's own."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from engine.networks import conv_bn
from engine.training import lean as lean_module
from engine.training.lean import LeanForward, cast
from kernels.norm_act import batch_norm_act


class Scaled(nn.Conv2d):
    """Normalises its weight first, in float32, so that autocast must not convert the parameter itself."""

    def forward(self, x: Tensor) -> Tensor:
        assert self.weight.dtype == torch.float32
        return nn.functional.conv2d(x, self.weight / self.weight.norm(), self.bias, padding=1)


class Net(nn.Module):
    """An unused layer, a subclass, an activation shared by two places, and a norm without an activation."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        shared = nn.ReLU()
        self.one = conv_bn(3, 8, 3, activation=nn.ReLU6())
        self.two, self.three = (nn.Sequential(Scaled(8, 8, 3), nn.BatchNorm2d(8), shared) for _ in range(2))
        self.last, self.unused = conv_bn(8, 8, 3), nn.Linear(8, 8)
        self.head = nn.Linear(8, 5)

    def forward(self, images: Tensor) -> tuple[Tensor, list[Tensor]]:
        feature = self.last(self.three(self.two(self.one(images))))
        return self.head(feature.mean((2, 3))), [feature]


def trained(network: nn.Module, lean: bool, dtype: torch.dtype, layout: torch.memory_format) -> list[Tensor]:
    """Output, gradients and state after one forward and backward pass."""
    generator = torch.Generator().manual_seed(1)
    images = torch.randn(4, 3, 12, 12, generator=generator).to(dtype).contiguous(memory_format=layout)
    network = copy.deepcopy(network).to(memory_format=layout).train()
    forward = LeanForward(network) if lean else network
    with torch.autocast("cpu", dtype=dtype, enabled=dtype != torch.float32, cache_enabled=False):
        logits, _ = forward(images)
    logits.float().square().sum().backward()
    gradients = [p.grad for p in network.parameters() if p.grad is not None]
    assert all(p.grad is None for p in network.unused.parameters())  # type: ignore[union-attr]
    return [logits.detach(), *gradients, *network.state_dict().values()]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=str)
def test_a_lean_pass_equals_the_plain_pass_bit_for_bit(dtype: torch.dtype, layout: torch.memory_format) -> None:
    """On a CPU, PyTorch's own BatchNorm runs, and everything else is exact."""
    plain, lean = (trained(Net(), way, dtype, layout) for way in (False, True))
    assert len(plain) == len(lean)
    assert all(torch.equal(a, b) and a.dtype == b.dtype for a, b in zip(plain, lean, strict=True))


def test_a_lean_pass_with_the_fused_norm_agrees_to_rounding(monkeypatch: pytest.MonkeyPatch) -> None:
    """Replaces the modules' BatchNorm with the reference of our own operation."""
    calls: list[str] = []

    def watched(*given: Any, activation: str, **options: Any) -> Tensor:
        calls.append(activation)
        return batch_norm_act(*given, activation=activation, **options)

    monkeypatch.setattr(lean_module, "has_kernel", lambda x: True)
    monkeypatch.setattr(lean_module, "batch_norm_act", watched)
    plain, lean = (trained(Net(), way, torch.float32, torch.channels_last) for way in (False, True))
    for one, other in zip(lean, plain, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)
    assert calls == ["relu6", "none", "none", "none"], "a ReLU in two places is not fused"


def test_modules_are_restored_after_a_pass() -> None:
    network = Net()
    before = {name: id(value) for name, value in network.state_dict(keep_vars=True).items()}
    own = set(vars(network.one[1]))
    LeanForward(network)(torch.randn(4, 3, 12, 12).to(memory_format=torch.channels_last))
    with pytest.raises(RuntimeError):
        LeanForward(network)(torch.randn(4, 7, 12, 12))
    assert {name: id(value) for name, value in network.state_dict(keep_vars=True).items()} == before
    assert set(vars(network.one[1])) == own
    assert network.one[1].num_batches_tracked == 1


def test_a_hook_on_an_activation_sees_its_input_and_output() -> None:
    seen: list[Tensor] = []
    network = Net()
    network.one[2].register_forward_hook(lambda module, given, result: seen.extend((given[0], result)))
    LeanForward(network)(torch.randn(4, 3, 12, 12).to(memory_format=torch.channels_last))
    assert seen[0].min() < 0
    assert torch.equal(nn.functional.relu6(seen[0]), seen[1])


def test_casts_are_differentiable_and_unused_tensors_get_no_gradient() -> None:
    one, other = torch.randn(3, requires_grad=True), torch.randn(2, requires_grad=True)
    low, unused = cast([one, other], torch.bfloat16)
    assert torch.equal(low, one.bfloat16())
    (low * 3).sum().backward()
    assert torch.equal(one.grad, torch.full((3,), 3.0))  # type: ignore[arg-type]
    assert other.grad is None
    assert unused.dtype == torch.bfloat16
