"""The closed-form losses: against the formulas of published code, gradcheck, edge cases, errors."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import kernels
from kernels import _dispatch, _ops, functional

F64 = torch.float64
# Of the largest gradient entry, by input type.
TOLERANCE = {torch.float64: 1e-12, torch.float32: 5e-6, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}


def draw(*shape: int, seed: int = 0, dtype: torch.dtype = F64, scale: float = 1.0) -> Tensor:
    return (torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=F64) * scale).to(dtype)


def labels(rows: int, classes: int, seed: int = 9) -> Tensor:
    return torch.randint(0, classes, (rows,), generator=torch.Generator().manual_seed(seed))


def with_gradient(loss: Callable[[Tensor], Tensor], student: Tensor, upstream: float = 1.0) -> tuple[Tensor, Tensor]:
    leaf = student.detach().clone(memory_format=torch.preserve_format).requires_grad_()
    value = loss(leaf)
    (gradient,) = torch.autograd.grad(value, leaf, torch.full_like(value, upstream))
    return value.detach().double(), gradient.double()


def assert_same(ours: Callable[[Tensor], Tensor], theirs: Callable[[Tensor], Tensor], student: Tensor) -> None:
    for got, wanted in zip(with_gradient(ours, student, 1.7), with_gradient(theirs, student, 1.7), strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-10, atol=1e-13)


# ---- the formulas of published code, rewritten ---------------------------------------------------------


def repdistiller_kd(s: Tensor, t: Tensor, temperature: float) -> Tensor:
    log_p, p = F.log_softmax(s / temperature, 1), F.softmax(t / temperature, 1)
    return F.kl_div(log_p, p, reduction="sum") * temperature**2 / s.shape[0]


def repdistiller_at(s: Tensor, t: Tensor, p: float) -> Tensor:
    def attention(f: Tensor) -> Tensor:
        return F.normalize(f.abs().pow(p).mean(1).flatten(1))

    if s.shape[2] > t.shape[2]:
        s = F.adaptive_avg_pool2d(s, t.shape[2:])
    elif s.shape[2] < t.shape[2]:
        t = F.adaptive_avg_pool2d(t, s.shape[2:])
    return (attention(s) - attention(t)).pow(2).mean()


def repdistiller_nst(s: Tensor, t: Tensor, full: bool = True) -> Tensor:
    def kernel(a: Tensor, b: Tensor) -> Tensor:
        return (a.unsqueeze(2) * b.unsqueeze(1)).sum(-1).pow(2)

    s, t = (F.normalize(f.flatten(2), dim=2) for f in (s, t))
    loss = kernel(s, s).mean() - 2 * kernel(s, t).mean()
    return loss + kernel(t, t).mean() if full else loss


def repdistiller_similarity(s: Tensor, t: Tensor) -> Tensor:
    def gram(f: Tensor) -> Tensor:
        rows = f.reshape(f.shape[0], -1)
        return F.normalize(rows @ rows.t())

    return (gram(t) - gram(s)).pow(2).sum() / s.shape[0] ** 2


def mdistiller_dkd(s: Tensor, t: Tensor, y: Tensor, alpha: float, beta: float, temperature: float) -> Tensor:
    mask = F.one_hot(y, s.shape[1]).to(s.dtype)
    p_s, p_t = F.softmax(s / temperature, 1), F.softmax(t / temperature, 1)
    b_s, b_t = (torch.stack(((p * mask).sum(1), (p * (1 - mask)).sum(1)), 1) for p in (p_s, p_t))
    tckd = F.kl_div(b_s.log(), b_t, reduction="sum") * temperature**2 / len(y)
    rest_s = F.log_softmax(s / temperature - 1000 * mask, 1)
    rest_t = F.softmax(t / temperature - 1000 * mask, 1)
    nckd = F.kl_div(rest_s, rest_t, reduction="sum") * temperature**2 / len(y)
    return alpha * tckd + beta * nckd


@pytest.mark.parametrize("classes", [2, 3, 10, 100])
@pytest.mark.parametrize("temperature", [1.0, 4.0, 32.0])
def test_ce_kd_is_repdistillers_sum(classes: int, temperature: float) -> None:
    s, t, y = draw(7, classes), draw(7, classes, seed=1), labels(7, classes)
    assert_same(
        lambda x: kernels.ce_kd_loss(x, t, y, temperature=temperature, ce_weight=0.3, kd_weight=0.8),
        lambda x: 0.3 * F.cross_entropy(x, y) + 0.8 * repdistiller_kd(x, t, temperature),
        s,
    )


def test_torchdistills_alpha_weights_the_cross_entropy() -> None:
    s, t, y = draw(7, 10), draw(7, 10, seed=1), labels(7, 10)
    assert_same(
        lambda x: kernels.ce_kd_loss(x, t, y, temperature=4.0, ce_weight=0.2, kd_weight=0.8),
        lambda x: 0.2 * F.cross_entropy(x, y)
        + 0.8 * 16 * F.kl_div(F.log_softmax(x / 4, 1), F.softmax(t / 4, 1), reduction="batchmean"),
        s,
    )


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_cross_entropy_is_pytorchs(reduction: str, smoothing: float) -> None:
    s, y = draw(7, 10), labels(7, 10)
    y[2] = -100
    options: dict[str, Any] = {"ce_weight": 1.0, "kd_weight": 0.0, "label_smoothing": smoothing, "reduction": reduction}
    theirs: dict[str, Any] = {"label_smoothing": smoothing, "reduction": reduction}
    assert_same(lambda x: kernels.ce_kd_loss(x, x.detach(), y, **options), lambda x: F.cross_entropy(x, y, **theirs), s)
    q = torch.softmax(draw(7, 10, seed=3), 1)
    assert_same(lambda x: kernels.ce_kd_loss(x, x.detach(), q, **options), lambda x: F.cross_entropy(x, q, **theirs), s)


def test_a_mixup_share_on_the_host_moves_to_the_logits_device() -> None:
    logits, y = torch.zeros(7, 3, device="meta"), torch.zeros(7, dtype=torch.long, device="meta")
    for lam in (torch.tensor(0.3), torch.full((7,), 0.3, dtype=torch.float64)):
        _, _, share = functional._check_target(logits, y, y, lam)
        assert (share.device.type, share.dtype, share.shape) == ("meta", torch.float32, (7,))


@pytest.mark.parametrize("lam", [0.3, torch.linspace(0, 1, 7)], ids=["float", "by row"])
def test_mixup_is_the_mix_of_two_cross_entropies(lam: Any) -> None:
    s, a, b = draw(7, 10), labels(7, 10), labels(7, 10, seed=4)

    def mixed(x: Tensor) -> Tensor:
        one, two = (F.cross_entropy(x, y, reduction="none", label_smoothing=0.1) for y in (a, b))
        return (lam * one + (1 - lam) * two).mean()

    options: dict[str, Any] = {"ce_weight": 1.0, "kd_weight": 0.0, "label_smoothing": 0.1}
    ours = with_gradient(lambda x: kernels.ce_kd_loss(x, x.detach(), a, target_b=b, lam=lam, **options), s)
    for got, wanted in zip(ours, with_gradient(mixed, s), strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-6, atol=1e-8)  # lam is kept in float32


@pytest.mark.parametrize("standardize", [False, True])
def test_dkd_is_mdistillers(standardize: bool) -> None:
    s, t, y = draw(7, 10, scale=2), draw(7, 10, seed=1, scale=2), labels(7, 10)

    def logits(x: Tensor) -> Tensor:
        return (x - x.mean(1, keepdim=True)) / (1e-7 + x.std(1, keepdim=True)) if standardize else x

    assert_same(
        lambda x: kernels.ce_kd_loss(x, t, y, variant="dkd", ce_weight=1.0, kd_weight=1.0, standardize=standardize),
        lambda x: F.cross_entropy(x, y) + mdistiller_dkd(logits(x), logits(t), y, 1.0, 8.0, 4.0),
        s,
    )


def test_standardized_kd_is_the_formula_on_z_scores() -> None:
    s, t = draw(7, 10), draw(7, 10, seed=1)

    def z(x: Tensor) -> Tensor:
        return (x - x.mean(1, keepdim=True)) / (1e-7 + x.std(1, keepdim=True))

    assert_same(
        lambda x: kernels.ce_kd_loss(x, t, temperature=2.0, kd_weight=9.0, standardize=True),
        lambda x: 9 * repdistiller_kd(z(x), z(t), 2.0),
        s,
    )


@pytest.mark.parametrize("p", [1.0, 2.0, 2.5, 4.0])
@pytest.mark.parametrize("sizes", [((6, 6), (6, 6)), ((8, 8), (4, 4)), ((4, 4), (8, 8)), ((7, 7), (4, 4))], ids=str)
def test_attention_transfer_is_repdistillers(p: float, sizes: Any) -> None:
    s, t = draw(3, 4, *sizes[0]), draw(3, 5, *sizes[1], seed=1)
    assert_same(lambda f: kernels.attention_transfer_loss(f, t, p=p), lambda f: repdistiller_at(f, t, p), s)


def test_attention_modes_share_one_distance() -> None:
    s, t = draw(3, 4, 5, 6), draw(3, 5, 5, 6, seed=1)
    a_s, a_t = (F.normalize(f.square().mean(1).flatten(1)) for f in (s, t))
    by_sample = (a_s - a_t).norm(dim=1)  # torchdistill's mode "paper" averages it over the batch
    torch.testing.assert_close(kernels.attention_transfer_loss(s, t, mode="paper"), by_sample.mean())
    torch.testing.assert_close(kernels.attention_transfer_loss(s, t, mode="batchmean"), by_sample.square().mean())


@pytest.mark.parametrize("method", ["spatial", "channel", "auto"])
@pytest.mark.parametrize("full", [True, False])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=["NCHW", "NHWC"])
def test_nst_is_repdistillers(method: str, full: bool, layout: torch.memory_format) -> None:
    s, t = (f.to(memory_format=layout) for f in (draw(3, 4, 5, 6), draw(3, 7, 5, 6, seed=1)))
    assert_same(
        lambda f: kernels.nst_loss(f, t, method=method, teacher_term=full), lambda f: repdistiller_nst(f, t, full), s
    )


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=["NCHW", "NHWC"])
def test_similarity_is_repdistillers(layout: torch.memory_format) -> None:
    s, t = (f.to(memory_format=layout) for f in (draw(5, 4, 3, 3), draw(5, 6, 2, 2, seed=1)))
    assert_same(lambda f: kernels.similarity_loss(f, t), lambda f: repdistiller_similarity(f, t), s)


def test_hint_is_the_mean_square() -> None:
    s, t = draw(5, 4, 3, 3), draw(5, 4, 3, 3, seed=1)
    assert_same(lambda f: kernels.hint_loss(f, t), lambda f: (f - t).square().mean(), s)


def test_lists_of_features_are_weighted_sums() -> None:
    pairs = [(draw(2, 3, 4, 4, seed=i), draw(2, 5, 4, 4, seed=i + 7)) for i in range(3)]
    students, teachers = zip(*pairs, strict=True)
    for loss in (kernels.attention_transfer_loss, kernels.nst_loss, kernels.similarity_loss):
        total = sum(w * loss(s, t) for w, (s, t) in zip((1.0, 0.5, 2.0), pairs, strict=True))
        torch.testing.assert_close(loss(students, teachers, weights=(1.0, 0.5, 2.0)), total)


# ---- gradients -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [{}, {"temperature": 32.0}, {"variant": "dkd"}, {"standardize": True}, {"variant": "dkd", "standardize": True},
     {"label_smoothing": 0.1, "reduction": "sum"}, {"reduction": "none"}, {"ce_weight": 0.0}, {"kd_weight": 0.0}],
    ids=str,
)  # fmt: skip
def test_gradcheck_ce_kd(options: dict[str, Any]) -> None:
    t, y = draw(5, 7, seed=1), labels(5, 7)
    y[1] = -100
    assert torch.autograd.gradcheck(lambda s: kernels.ce_kd_loss(s, t, y, **options), draw(5, 7).requires_grad_())


@pytest.mark.parametrize("p", [1.0, 2.0, 2.5, 4.0])
@pytest.mark.parametrize("mode", ["mean", "paper", "batchmean"])
def test_gradcheck_attention(p: float, mode: str) -> None:
    t = draw(2, 5, 3, 4, seed=1)
    student = draw(2, 4, 3, 4).requires_grad_()
    assert torch.autograd.gradcheck(lambda s: kernels.attention_transfer_loss(s, t, p=p, mode=mode), student)


@pytest.mark.parametrize("method", ["spatial", "channel"])
@pytest.mark.parametrize("eps", [1e-12, 3.0], ids=["unclamped", "some channels below eps"])
def test_gradcheck_nst(method: str, eps: float) -> None:
    t, student = draw(2, 5, 3, 4, seed=1), draw(2, 4, 3, 4).requires_grad_()
    norms = student.detach().flatten(2).norm(dim=2)
    assert eps < 1 or bool((norms < eps).any() & (norms > eps).any())
    assert torch.autograd.gradcheck(lambda s: kernels.nst_loss(s, t, method=method, eps=eps), student)


def test_backward_may_run_twice_and_be_scaled() -> None:
    s, t = draw(4, 6).requires_grad_(), draw(4, 6, seed=1)
    loss = kernels.ce_kd_loss(s, t)
    once, twice = (torch.autograd.grad(loss, s, torch.tensor(k, dtype=F64), retain_graph=True)[0] for k in (1.0, -3.0))
    torch.testing.assert_close(twice, -3 * once, rtol=1e-14, atol=0)
    assert not loss.detach().requires_grad
    with torch.no_grad():
        assert kernels.ce_kd_loss(s, t) == loss


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=lambda d: str(d)[6:])
def test_a_second_derivative_is_rejected(dtype: torch.dtype) -> None:
    s, t = draw(4, 6, dtype=dtype).requires_grad_(), draw(4, 6, seed=1, dtype=dtype)
    loss = kernels.ce_kd_loss(s, t, labels(4, 6))
    (gradient,) = torch.autograd.grad(loss, s, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable|does not require grad"):
        gradient.sum().backward()


# ---- accuracy --------------------------------------------------------------------------------------------


def true_kl(s: Tensor, t: Tensor, temperature: float) -> np.longdouble:
    """T^2 KL in extended precision."""
    s_, t_ = (x.double().numpy().astype(np.longdouble) / np.longdouble(temperature) for x in (s, t))
    log_s, log_t = (x - np.log(np.exp(x).sum(1, keepdims=True)) for x in (s_, t_))
    return (np.exp(log_t) * (log_t - log_s)).sum(1).mean() * np.longdouble(temperature) ** 2


@pytest.mark.parametrize("apart", [1.0, 0.1, 0.01])
@pytest.mark.parametrize("temperature", [1.0, 3.0, 4.0, 32.0])
def test_kl_stays_accurate_in_float32(apart: float, temperature: float) -> None:
    t = draw(64, 100, dtype=torch.float32, scale=3)
    s = t + draw(64, 100, seed=1, dtype=torch.float32, scale=apart)
    truth = true_kl(s, t, temperature)
    ours = kernels.ce_kd_loss(s, t, temperature=temperature, kd_weight=1.0, backend="reference")
    assert abs(ours.item() / truth - 1) <= 1e-6
    if temperature == 32 and apart == 0.01:
        assert abs(repdistiller_kd(s, t, 32.0).item() / truth - 1) > 1e-3  # the usual form is this far off


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=lambda d: str(d)[6:])
@pytest.mark.parametrize(
    ("change", "fast"),
    [
        (lambda s, t, y: None, True),
        (lambda s, t, y: s.add_(6) + t.sub_(8), True),
        (lambda s, t, y: t.mul_(40), True),
        (lambda s, t, y: s.mul_(30), False),  # the student's probabilities underflow
        (lambda s, t, y: s.add_(200), False),  # its exponentials overflow
        (lambda s, t, y: s.sub_(30), False),  # all of them are small
        (lambda s, t, y: (s[:, 3].fill_(-torch.inf), t[:, 3].fill_(-torch.inf)), False),
        (lambda s, t, y: t[:, 3].fill_(-torch.inf), False),
        (lambda s, t, y: t[2, 3].fill_(5e4), False),
        (lambda s, t, y: y[4].fill_(-100), False),
    ],
    ids=["plain", "shifted", "certain teacher", "underflow", "overflow", "small", "masked", "teacher masks", "far",
         "ignored"],
)  # fmt: skip
def test_the_fast_path_agrees_with_float64(change: Any, fast: bool, dtype: torch.dtype, reduction: str) -> None:
    y = labels(40, 20) % 3
    s, t = (draw(40, 20, seed=i, dtype=dtype, scale=2) for i in (0, 1))
    change(s, t, y)
    spec = kernels.reference.CEKDSpec(3.0, 0.2, 0.8, 0.0, -100, "kd", 1.0, 8.0, False, reduction)
    assert (kernels.reference.ce_kd_plain(s, t, y, spec) is not None) == fast

    def loss(x: Tensor) -> Tensor:
        options: dict[str, Any] = {"temperature": 3.0, "ce_weight": 0.2, "kd_weight": 0.8, "reduction": reduction}
        return kernels.ce_kd_loss(x, t.to(x.dtype), y, **options)

    value, gradient = with_gradient(loss, s)
    wanted, wanted_gradient = with_gradient(loss, s.double())
    torch.testing.assert_close(value, wanted, rtol=1e-6, atol=0)
    assert (gradient - wanted_gradient).abs().max() <= TOLERANCE[dtype] * wanted_gradient.abs().max()


def test_equal_logits_and_features_cost_exactly_nothing() -> None:
    s, f = draw(7, 100, dtype=torch.float32), draw(3, 6, 5, 5, dtype=torch.float32)
    for value, gradient in (
        with_gradient(lambda x: kernels.ce_kd_loss(x, s, temperature=32.0), s),
        with_gradient(lambda x: kernels.attention_transfer_loss(x, f), f),
        with_gradient(lambda x: kernels.attention_transfer_loss(x, f, mode="paper"), f),
        with_gradient(lambda x: kernels.nst_loss(x, f, method="spatial"), f),
    ):
        assert value == 0
        assert gradient.abs().max() <= 1e-9


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=lambda d: str(d)[6:])
@pytest.mark.parametrize("name", ["ce_kd", "attention", "nst spatial", "nst channel"])
def test_short_types_accumulate_in_float32(dtype: torch.dtype, name: str) -> None:
    y = labels(7, 20)
    s, t = (draw(7, 20, seed=i, dtype=dtype) for i in (0, 1))
    f, g = (draw(3, 6, 4, 4, seed=i, dtype=dtype) for i in (0, 1))
    losses: dict[str, tuple[Callable[..., Any], Tensor, Tensor]] = {
        "ce_kd": (lambda a, b: kernels.ce_kd_loss(a, b, y), s, t),
        "attention": (kernels.attention_transfer_loss, f, g),
        "nst spatial": (lambda a, b: kernels.nst_loss(a, b, method="spatial"), f, g),
        "nst channel": (lambda a, b: kernels.nst_loss(a, b, method="channel"), f, g),
    }
    loss, student, teacher = losses[name]
    value, gradient = with_gradient(lambda x: loss(x, teacher), student)
    wanted, wanted_gradient = with_gradient(lambda x: loss(x, teacher.double()), student.double())
    assert abs(value / wanted - 1) <= TOLERANCE[torch.float32]
    assert (gradient - wanted_gradient).abs().max() <= TOLERANCE[dtype] * wanted_gradient.abs().max()


def test_long_batches_give_the_same_result_in_chunks() -> None:
    s, t, y = draw(100, 700), draw(100, 700, seed=1), labels(100, 700)
    assert s.numel() > 2 * _ops.reference.CHUNK_ELEMENTS
    assert_same(
        lambda x: kernels.ce_kd_loss(x, t, y),
        lambda x: 0.1 * F.cross_entropy(x, y) + 0.9 * repdistiller_kd(x, t, 4.0),
        s,
    )


# ---- edges -----------------------------------------------------------------------------------------------


def test_a_class_masked_on_both_sides_has_no_effect() -> None:
    s, t, y = draw(5, 8), draw(5, 8, seed=1), labels(5, 7)
    wide_s, wide_t = (torch.cat((x, torch.full((5, 1), -torch.inf, dtype=F64)), 1) for x in (s, t))
    value, gradient = with_gradient(lambda x: kernels.ce_kd_loss(x, wide_t, y), wide_s)
    wanted, wanted_gradient = with_gradient(lambda x: kernels.ce_kd_loss(x, t, y), s)
    torch.testing.assert_close(value, wanted)
    torch.testing.assert_close(gradient, F.pad(wanted_gradient, (0, 1)))


def test_a_class_the_student_excludes_costs_infinity_and_nan_stays_nan() -> None:
    s, t = draw(3, 4), draw(3, 4, seed=1)
    s[1, 2] = -torch.inf
    assert kernels.ce_kd_loss(s, t) == torch.inf
    s[1, 2] = torch.nan
    assert kernels.ce_kd_loss(s, t, reduction="none").isnan().tolist() == [False, True, False]
    f = draw(2, 3, 4, 4)
    f[0, 0, 0, 0] = torch.nan
    for loss in (kernels.attention_transfer_loss, kernels.nst_loss, kernels.similarity_loss):
        assert loss(f, draw(2, 3, 4, 4, seed=1)).isnan()


def test_far_logits_are_finite() -> None:
    s, t = torch.tensor([[3000.0, 0.0]]), torch.tensor([[0.0, 3000.0]])
    value, gradient = with_gradient(lambda x: kernels.ce_kd_loss(x, t, temperature=1.0, kd_weight=1.0), s)
    assert value == 3000
    assert gradient.tolist() == [[1.0, -1.0]]


def test_ignored_rows_need_no_valid_logits_and_do_not_change_the_mean() -> None:
    s, t, y = draw(5, 4), draw(5, 4, seed=1), labels(5, 4)
    kept = torch.tensor([0, 2, 4])
    wanted, wanted_gradient = with_gradient(lambda x: kernels.ce_kd_loss(x, t[kept], y[kept]), s[kept])
    y[[1, 3]] = -100
    s[1] = torch.nan
    value, gradient = with_gradient(lambda x: kernels.ce_kd_loss(x, t, y), s)
    torch.testing.assert_close(value, wanted)
    torch.testing.assert_close(gradient[kept], wanted_gradient)
    assert gradient[[1, 3]].abs().max() == 0
    y[:] = -100
    value, gradient = with_gradient(lambda x: kernels.ce_kd_loss(x, t, y), s)
    assert value.isnan()
    assert gradient.abs().max() == 0


def test_parts_are_the_unweighted_terms() -> None:
    s, t, y = draw(5, 4).requires_grad_(), draw(5, 4, seed=1), labels(5, 4)
    loss, parts = kernels.ce_kd_loss_and_parts(s, t, y, ce_weight=0.25, kd_weight=2.0)
    wanted = [loss.item(), F.cross_entropy(s, y).item(), repdistiller_kd(s, t, 4.0).item()]
    assert parts.tolist() == pytest.approx(wanted, rel=1e-12)
    assert not parts.requires_grad
    assert kernels.ce_kd_loss_and_parts(s, t, y, ce_weight=0.0)[1][1] == 0


def test_a_dead_sample_gets_a_finite_gradient() -> None:
    f = draw(2, 3, 4, 4)
    f[1] = 0
    for loss in (kernels.attention_transfer_loss, kernels.nst_loss):
        value, gradient = with_gradient(lambda x, loss=loss: loss(x, draw(2, 3, 4, 4, seed=1)), f)
        assert value.isfinite()
        assert gradient.isfinite().all()


def test_empty_batches_follow_pytorch() -> None:
    assert kernels.ce_kd_loss(draw(0, 4), draw(0, 4)).isnan()
    assert kernels.ce_kd_loss(draw(0, 4), draw(0, 4), reduction="sum") == 0
    assert kernels.ce_kd_loss(draw(0, 4), draw(0, 4), reduction="none").shape == (0,)


@given(st.integers(1, 5), st.integers(1, 30), st.floats(0.5, 40), st.integers(0, 2**31), st.floats(1e-3, 30))
@settings(max_examples=40, deadline=None)
def test_kd_is_nonnegative_and_invariant_to_shifts(n: int, c: int, temperature: float, seed: int, scale: float) -> None:
    s, t = draw(n, c, seed=seed, scale=scale), draw(n, c, seed=seed + 1, scale=scale)
    rows = kernels.ce_kd_loss(s, t, temperature=temperature, reduction="none")
    assert (rows >= 0).all()
    shifted = kernels.ce_kd_loss(s + 3, t - 5, temperature=temperature, reduction="none")
    torch.testing.assert_close(shifted, rows, rtol=1e-6, atol=1e-10)


@given(st.integers(1, 4), st.integers(1, 9), st.integers(1, 9), st.integers(1, 6), st.integers(0, 2**31))
@settings(max_examples=40, deadline=None)
def test_nst_has_the_same_value_by_either_gram(n: int, s: int, t: int, size: int, seed: int) -> None:
    f, g = draw(n, s, size, size, seed=seed), draw(n, t, size, size, seed=seed + 1)
    spatial, channel = (kernels.nst_loss(f, g, method=m) for m in ("spatial", "channel"))
    torch.testing.assert_close(spatial, channel, rtol=1e-8, atol=1e-12)
    assert spatial >= 0
    order = torch.randperm(s, generator=torch.Generator().manual_seed(seed))
    lengths = torch.rand(n, s, 1, 1, generator=torch.Generator().manual_seed(seed), dtype=F64) + 0.1
    torch.testing.assert_close(kernels.nst_loss(f[:, order] * lengths, g), spatial, rtol=1e-8, atol=1e-12)


@given(st.integers(1, 4), st.integers(1, 9), st.integers(1, 6), st.floats(0.01, 100), st.integers(0, 2**31))
@settings(max_examples=40, deadline=None)
def test_attention_is_invariant_to_scale_and_channel_order(n: int, c: int, size: int, scale: float, seed: int) -> None:
    f, g = draw(n, c, size, size, seed=seed), draw(n, 3, size, size, seed=seed + 1)
    order = torch.randperm(c, generator=torch.Generator().manual_seed(seed))
    torch.testing.assert_close(
        kernels.attention_transfer_loss(f[:, order] * scale, g), kernels.attention_transfer_loss(f, g)
    )


# ---- errors ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("call", "error", "says"),
    [
        (lambda s, t, y: kernels.ce_kd_loss(s, t[:, :3], y), ValueError, "has 3 classes, student_logits 4"),
        (lambda s, t, y: kernels.ce_kd_loss(s, t[:2], y), ValueError, "teacher_logits has 2 rows, student_logits 5"),
        (lambda s, t, y: kernels.ce_kd_loss(s[0], t[0], y), ValueError, r"must be \(N, C\)"),
        (lambda s, t, y: kernels.ce_kd_loss(s, t, y, temperature=0), ValueError, "temperature is 0; it must be"),
        (lambda s, t, y: kernels.ce_kd_loss(s, t, y, temperature=float("nan")), ValueError, "temperature is nan"),
        (lambda s, t, y: kernels.ce_kd_loss(s, t, y, label_smoothing=1.0), ValueError, r"it must be in \[0, 1\)"),
        (lambda s, t, y: kernels.ce_kd_loss(s, t, y, reduction="avg"), ValueError, "use one of mean, sum, none"),
        (lambda s, t, y: kernels.ce_kd_loss(s, t, y, variant="dist"), ValueError, "use one of kd, dkd"),
        (lambda s, t, y: kernels.ce_kd_loss(s, t, y, backend="cuda"), ValueError, "use one of auto, triton, reference"),
        (lambda s, t, y: kernels.ce_kd_loss(s, t, y[:2]), ValueError, r"target has shape \(2,\).*must be \(5,\)"),
        (lambda s, t, y: kernels.ce_kd_loss(s, t, y + 4), IndexError, "out of range for 4 classes; use 0..3"),
        (lambda s, t, y: kernels.ce_kd_loss(s, t, y, target_b=y - 9, lam=0.5), IndexError, "is -.*out of range"),
        (lambda s, t, y: kernels.ce_kd_loss(s, t, y, target_b=y), ValueError, "give all three"),
        (lambda s, t, y: kernels.ce_kd_loss(s, t, y, target_b=y, lam=torch.rand(2)), ValueError, "one share per row"),
        (lambda s, t, y: kernels.ce_kd_loss(s, t, s.softmax(1), target_b=y, lam=0.5), ValueError, "mix probabilities"),
        (lambda s, t, y: kernels.ce_kd_loss(s, t, y > 1), TypeError, "give class indices"),
        (lambda s, t, y: kernels.ce_kd_loss(s, t, variant="dkd"), ValueError, "needs class indices"),
        (lambda s, t, y: kernels.ce_kd_loss(s[:, :1], t[:, :1], standardize=True), ValueError, "2 classes or more"),
        (lambda s, t, y: kernels.ce_kd_loss(s.long(), t, y), TypeError, "student_logits is torch.int64; convert it"),
        (lambda s, t, y: kernels.ce_kd_loss(s, t.requires_grad_(), y), RuntimeError, "detach it"),
        (lambda s, t, y: kernels.ce_kd_loss(s, t.to("meta"), y), ValueError, "teacher_logits on meta: move one"),
    ],
)  # fmt: skip
def test_wrong_logits_say_what_to_do(call: Callable[..., Tensor], error: type[Exception], says: str) -> None:
    with pytest.raises(error, match=says):
        call(draw(5, 4), draw(5, 4, seed=1), labels(5, 4))


@pytest.mark.parametrize("loss", [kernels.attention_transfer_loss, kernels.nst_loss, kernels.similarity_loss])
@pytest.mark.parametrize(
    ("change", "error", "says"),
    [
        (lambda s, t: (s[:1], t), ValueError, r"student has 1 samples, teacher 2: shapes \(1, 3, 4, 4\)"),
        (lambda s, t: (s.int(), t), TypeError, "student is torch.int32; convert it"),
        (lambda s, t: (s, t.requires_grad_()), RuntimeError, "detach it"),
        (lambda s, t: ([s, s], [t]), ValueError, "student has 2 features, teacher 1"),
        (lambda s, t: ([], []), ValueError, "1 or more"),
    ],
)
def test_wrong_features_say_what_to_do(loss: Any, change: Any, error: type[Exception], says: str) -> None:
    student, teacher = change(draw(2, 3, 4, 4), draw(2, 3, 4, 4, seed=1))
    with pytest.raises(error, match=says):
        loss(student, teacher)


def test_wrong_options_say_what_to_do() -> None:
    f, g = draw(2, 3, 4, 4), draw(2, 3, 4, 4, seed=1)
    for call, says in (
        (lambda: kernels.attention_transfer_loss(f, g, p=0.5), "p is 0.5; it must be 1 or above"),
        (lambda: kernels.attention_transfer_loss(f, g, mode="code"), "use one of mean, paper, batchmean"),
        (lambda: kernels.attention_transfer_loss(f[0], g[0]), r"it must be \(N, C, H, W\)"),
        (lambda: kernels.nst_loss(f, g, method="gram"), "use one of auto, spatial, channel"),
        (lambda: kernels.nst_loss([f, f], [g, g], weights=[1.0]), "weights has 1 numbers for 2 pairs"),
        (lambda: kernels.hint_loss(f, g[:, :2]), "use HintLoss, which learns a regressor"),
    ):
        with pytest.raises(ValueError, match=says):
            call()


# ---- backends, modules, compiled code --------------------------------------------------------------------


def test_triton_on_the_cpu_is_rejected_with_alternatives(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(RuntimeError, match="needs CUDA tensors, these are on cpu.*TRITON_INTERPRET=1"):
        kernels.ce_kd_loss(draw(2, 3), draw(2, 3), backend="triton")
    assert kernels.ce_kd_loss(draw(2, 3), draw(2, 3), backend="reference") == 0


def test_missing_triton_warns_once_and_falls_back(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_dispatch, "TRITON", False)
    _dispatch._warn.cache_clear()
    with pytest.warns(RuntimeWarning, match="Triton is not installed"):
        assert _dispatch.resolve("auto", torch.device("cuda")) == "reference"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert _dispatch.resolve("auto", torch.device("cuda")) == "reference"
    with pytest.raises(RuntimeError, match="pip install triton"):
        _dispatch.resolve("triton", torch.device("cuda"))


def test_modules_are_the_functions_with_their_options() -> None:
    s, t, y = draw(5, 4), draw(5, 4, seed=1), labels(5, 4)
    f, g = draw(2, 3, 4, 4), draw(2, 3, 4, 4, seed=1)
    module = kernels.CEKDLoss(temperature=2.0, kd_weight=0.5)
    assert module(s, t, y) == kernels.ce_kd_loss(s, t, y, temperature=2.0, kd_weight=0.5)
    assert "temperature=2.0, ce_weight=0.1, kd_weight=0.5" in repr(module)
    assert module(s, t, y, y.flip(0), 0.3) == kernels.ce_kd_loss(
        s, t, y, temperature=2.0, kd_weight=0.5, target_b=y.flip(0), lam=0.3
    )
    assert kernels.AttentionTransferLoss(p=4.0)(f, g) == kernels.attention_transfer_loss(f, g, p=4.0)
    assert kernels.NSTLoss(teacher_term=False)(f, g) == kernels.nst_loss(f, g, teacher_term=False)
    assert kernels.SimilarityLoss()(f, g) == kernels.similarity_loss(f, g)
    with pytest.raises(TypeError, match="CEKDLoss has no option temp; it has temperature, "):
        kernels.CEKDLoss(temp=2.0)
    with pytest.raises(TypeError, match="lam changes with the batch"):
        kernels.CEKDLoss(lam=0.5)


def test_hint_module_learns_its_regressor() -> None:
    hint = kernels.HintLoss(3, 5)
    student, teacher = draw(2, 3, 8, 8, dtype=torch.float32), draw(2, 5, 4, 4, dtype=torch.float32)
    pooled = F.adaptive_avg_pool2d(student, 4)
    torch.testing.assert_close(hint(student, teacher), F.mse_loss(hint.regressor(pooled), teacher))
    hint(student, teacher).backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in hint.parameters())


def test_autocast_does_not_lower_the_precision_of_the_products() -> None:
    f, g = draw(3, 6, 4, 4, dtype=torch.float32), draw(3, 6, 4, 4, seed=1, dtype=torch.float32)
    for loss in (kernels.attention_transfer_loss, kernels.nst_loss, kernels.similarity_loss):
        def mixed(x: Tensor, loss: Any = loss) -> Tensor:
            with torch.autocast("cpu", dtype=torch.bfloat16):
                return loss(x, g)

        wanted = with_gradient(lambda x, loss=loss: loss(x, g), f)
        assert all(map(torch.equal, with_gradient(mixed, f), wanted))


@pytest.mark.parametrize("name", ["ce_kd", "attention", "nst"])
def test_compiled_whole_without_a_graph_break(name: str) -> None:
    s, t = (draw(5, 4, seed=i, dtype=torch.float32) for i in (0, 1))
    f, g = (draw(2, 3, 4, 4, seed=i, dtype=torch.float32) for i in (0, 1))
    losses: dict[str, tuple[Callable[..., Any], Tensor, Tensor]] = {
        "ce_kd": (kernels.ce_kd_loss, s, t),
        "attention": (kernels.attention_transfer_loss, f, g),
        "nst": (kernels.nst_loss, f, g),
    }
    loss, student, teacher = losses[name]
    compiled = torch.compile(lambda x: 2 * loss(x, teacher), fullgraph=True, backend="aot_eager")
    for got, wanted in zip(
        with_gradient(compiled, student, 1.7), with_gradient(lambda x: 2 * loss(x, teacher), student, 1.7), strict=True
    ):
        torch.testing.assert_close(got, wanted, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("teacher_term", [True, False])
def test_nst_chooses_its_gram_from_symbolic_sizes(teacher_term: bool) -> None:
    """Code compiled for any size: PyTorch 2.11 cannot multiply a symbolic size by a bool."""
    f, g = (draw(2, c, 4, 4, dtype=torch.float32) for c in (3, 5))
    loss = lambda s, t: kernels.nst_loss(s, t, teacher_term=teacher_term)  # noqa: E731
    compiled = torch.compile(loss, fullgraph=True, dynamic=True, backend="aot_eager")
    torch.testing.assert_close(compiled(f, g), loss(f, g))


def test_operators_keep_pytorchs_contract() -> None:
    s, t = draw(5, 4, dtype=torch.float32).requires_grad_(), draw(5, 4, seed=1, dtype=torch.float32)
    f, g = draw(2, 3, 4, 4, dtype=torch.float32).requires_grad_(), draw(2, 5, 4, 4, seed=1, dtype=torch.float32)
    numbers = (4.0, 0.1, 0.9, 0.0, -100, "kd", 1.0, 8.0, False, "mean", True, "reference")
    tests = ("test_schema", "test_autograd_registration", "test_faketensor")
    torch.library.opcheck(_ops.ce_kd_op, (s, t, labels(5, 4), None, None, *numbers), test_utils=tests)
    torch.library.opcheck(_ops.attention_op, (f, g, 2.0, "mean", 1e-12, "reference"), test_utils=tests)
    for method in ("spatial", "channel"):
        torch.library.opcheck(_ops.nst_op, (f, g, method, True, 1e-12, "reference"), test_utils=tests)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=["NCHW", "NHWC"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=lambda d: str(d)[6:])
def test_operators_return_the_strides_that_their_fakes_promise(dtype: torch.dtype, layout: torch.memory_format) -> None:
    """Compiled code reads an operator's output with the strides of its fake."""
    f, g = (draw(2, 3, 4, 5, seed=i, dtype=dtype).to(memory_format=layout) for i in (0, 1))
    upstream, eps, tests = torch.tensor(1.7), 1e-12, ("test_schema", "test_faketensor")
    torch.library.opcheck(_ops.attention_op, (f, g, 2.0, "mean", eps, "reference"), test_utils=tests)
    _, coef = kernels.reference.attention_forward(f, g, 2.0, "mean", eps)
    torch.library.opcheck(_ops.attention_backward_op, (f, coef, upstream, 2.0, "reference"), test_utils=tests)
    for method in ("spatial", "channel"):
        torch.library.opcheck(_ops.nst_op, (f, g, method, True, eps, "reference"), test_utils=tests)
        _, one, two = kernels.reference.nst_forward(f, g, method, True, eps)
        inputs = (f, g, one, two, upstream, method, eps, "reference")
        torch.library.opcheck(_ops.nst_backward_op, inputs, test_utils=tests)
