"""Closed-form losses and analytic gradients in plain PyTorch: the oracle of the tests and the CPU path.

Every loss is a pair of functions. `*_forward` returns the loss and what the gradient needs;
`*_backward` turns that and an upstream gradient into the student's gradient. The Triton kernels in
`kernels/_triton` have the same pairs with the same arguments. Nothing here waits for a value from a CUDA
device, mutates an input or needs autograd.

Shape suffixes: N batch, C classes, F channels (S the student's, T the teacher's), P positions (H * W).
"""
from __future__ import annotations

import functools
import itertools
import math
from typing import NamedTuple

import torch
from torch import Tensor

STANDARDIZE_EPS = 1e-7  # added to the standard deviation of logits (Sun et al., 2024)
PLAIN_ELEMENTS = 1 << 16  # the same for `ce_kd_plain`, which has fewer operations in float64
CHUNK_ELEMENTS = 1 << 15  # logits processed at once on the CPU: a few buffers of 256 KB in an L2 cache
LEAST_SUM = 1e-6  # of the exponentials of a row
LOG2_E = math.log2(math.e)
LEAST_SHORT = 1e-30  # a smaller float32 probability may have lost digits to underflow


class CEKDSpec(NamedTuple):
    """The options of a `ce_kd_loss` call; a term of weight 0 is skipped and its part reads 0."""

    temperature: float
    ce_weight: float
    kd_weight: float
    label_smoothing: float
    ignore_index: int
    variant: str  # "kd" | "dkd"
    dkd_alpha: float
    dkd_beta: float
    standardize: bool
    reduction: str  # "mean" | "sum" | "none"


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """float64 for float64; all shorter types accumulate in float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


# ---- cross entropy + knowledge distillation ------------------------------------------------------------


def ce_kd_forward(
    student_NC: Tensor,
    teacher_NC: Tensor,
    target: Tensor | None,
    target_b: Tensor | None,
    lam: Tensor | None,
    spec: CEKDSpec,
    with_grad: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Loss, parts (3,) = (loss, ce, kd), gradient (N, C) before 1/count, count of rows not ignored."""
    dtype = accumulation_dtype(student_NC.dtype)
    rows, classes = student_NC.shape
    kept = bad = None
    if target is not None and not target.is_floating_point():
        kept, bad = _check_labels(target, target_b, classes, spec.ignore_index)
        if kept is not None and bad is not None:
            target = target.masked_fill(~kept | bad, 0)
            target_b = None if target_b is None else target_b.masked_fill(~kept | bad, 0)
    # Terms per row, and the gradient in the accumulation type: KD writes it, CE adds to it.
    grad = student_NC.new_empty(student_NC.shape, dtype=dtype)
    ce = kd = None
    if spec.kd_weight:
        kd = _kd(student_NC, teacher_NC, target, spec, grad).to(dtype)
    else:
        grad.zero_()
    if spec.ce_weight and target is not None:
        ce = _ce(student_NC, target, target_b, lam, spec, grad)
    ce, kd = (grad.new_zeros(rows) if x is None else x for x in (ce, kd))
    grad = grad.to(student_NC.dtype)
    if kept is not None and bad is not None:
        # On a device, where checking would make the host wait, a row out of range is NaN; the CPU has raised an error.
        ce, kd = (x.masked_fill(bad, torch.nan).masked_fill(~kept, 0) for x in (ce, kd))
        grad = grad.masked_fill(bad[:, None], torch.nan).masked_fill(~kept[:, None], 0)
    grad = grad if with_grad else grad.new_empty(0)
    count = ce.new_full((), rows) if kept is None else kept.sum(dtype=dtype)
    loss = torch.mul(ce, spec.ce_weight).add_(kd, alpha=spec.kd_weight)
    parts = torch.stack((loss, ce, kd)).sum(1)
    if spec.reduction != "sum":
        parts.div_(count)
    return (loss if spec.reduction == "none" else parts[0].clone()), parts, grad, count


def ce_kd_backward(grad_NC: Tensor, upstream: Tensor, count: Tensor, reduction: str) -> Tensor:
    """The student's gradient: the stored one times the upstream gradient, over the count for "mean"."""
    scale = upstream / count.clamp_min(1) if reduction == "mean" else upstream
    return (grad_NC * (scale[:, None] if reduction == "none" else scale)).to(grad_NC.dtype)


def ce_kd_plain(
    student_NC: Tensor, teacher_NC: Tensor, target: Tensor | None, spec: CEKDSpec
) -> tuple[Tensor, tuple[float, float, float], Tensor, float] | None:
    """Loss, parts, gradient and the gradient's scale, on a CPU; None if the call needs `ce_kd_forward`.

    The fast path for the usual call: class indices, float32 or shorter, both terms, plain KL, a mean or a sum.
    """
    rows, classes = student_NC.shape
    if spec.variant != "kd" or spec.standardize or spec.label_smoothing or spec.reduction == "none" or not rows:
        return None
    if not (spec.ce_weight and spec.kd_weight) or target is None or target.is_floating_point():
        return None
    if 0 <= spec.ignore_index < classes or student_NC.dtype == torch.float64 or student_NC.device.type != "cpu":
        return None
    share = 1 / rows if spec.reduction == "mean" else 1.0
    index, grad = target.unsqueeze(1), torch.empty(rows, classes, dtype=torch.float32, device="cpu")
    step = max(1, PLAIN_ELEMENTS // classes)
    ce = kd = 0.0
    for start in range(0, rows, step):
        s, t, y, g = student_NC, teacher_NC, index, grad
        if step < rows:
            s, t, y, g = (x[start : start + step] for x in (s, t, y, g))
        sums = _plain_rows(s, t, y, g, spec)
        if sums is None:
            return None
        ce, kd = ce + sums[0], kd + sums[1]
    ce, kd = ce * share, max(kd, 0.0) * share * spec.temperature**2
    loss = spec.ce_weight * ce + spec.kd_weight * kd
    scale = spec.temperature * spec.kd_weight * share
    return torch.scalar_tensor(loss, dtype=torch.float32), (loss, ce, kd), grad.to(student_NC.dtype), scale


def _plain_rows(
    s_NC: Tensor, t_NC: Tensor, index_N1: Tensor, grad_NC: Tensor, spec: CEKDSpec
) -> tuple[float, float] | None:
    """Sums over rows of CE and of KL; writes the gradient over T kd_weight. None if this is not accurate.

    With d = (t - s) / T, p_t = p_s exp(d) / Z and KL = sum_c p_t d - log Z. A float32 p_s is good enough: it is a
    distribution, 1e-7 from the true one. Only d and exp(d) must be exact, because most digits of the sum cancel.
    Uses powers of 2, which PyTorch computes in half the time of an exponential.
    """
    s = s_NC.float()
    unit = LOG2_E / spec.temperature
    p = torch.mul(s, _pair(LOG2_E, unit)).exp2_()
    z = p.sum(2, keepdim=True)
    p.div_(z)
    # Fails on underflow, overflow, a masked class or NaN. If both hold, no exponential is below 1e-36.
    if not (float(p.amin()) > LEAST_SHORT and float(z.amin()) > LEAST_SUM):
        return None
    p_ce, p_kd = p.unbind()
    try:
        ce = p_ce.gather(1, index_N1).log_().sum()
    except RuntimeError:  # a label that is out of range or ignored
        return None
    p_s = p_kd.double()
    d = t_NC.to(torch.float64, copy=True).sub_(s).mul_(unit)
    p_t = torch.exp2(d).mul_(p_s)
    z_t = p_t.sum(1, keepdim=True)
    ratio = p_s.sum(1, keepdim=True).div_(z_t)
    # Strictly, the gradient is this over the sum of p_s, which is 1 to float32's last digit.
    grad_NC.copy_(p_s.addcmul_(p_t, ratio, value=-1))
    kl = float(d.mul_(p_t).sum(1, keepdim=True).div_(z_t).add_(ratio.log2_()).sum()) / LOG2_E
    if not math.isfinite(kl):  # exp(d) overflows, or a class of the teacher is masked
        return None
    weight = spec.ce_weight / (spec.temperature * spec.kd_weight)
    grad_NC.add_(p_ce, alpha=weight).scatter_(1, index_N1, -weight, reduce="add")
    return -float(ce), kl


@functools.lru_cache(maxsize=16)
def _pair(first: float, second: float) -> Tensor:
    return torch.tensor((first, second), dtype=torch.float32, device="cpu").view(2, 1, 1)


def _check_labels(
    a: Tensor, b: Tensor | None, classes: int, ignore: int
) -> tuple[Tensor | None, Tensor | None]:
    """Rows that are not ignored and rows out of range; (None, None) if the CPU finds all in range."""
    if a.device.type == "cpu":
        extremes = [x for labels in (a, b) if labels is not None and labels.numel() for x in labels.aminmax()]
        if all(0 <= int(x) < classes for x in extremes) and not 0 <= ignore < classes:
            return None, None
    kept, bad = a != ignore, (a < 0) | (a >= classes)
    if b is not None:
        kept, bad = kept & (b != ignore), bad | (b < 0) | (b >= classes)
    bad = bad & kept
    if a.device.type == "cpu" and bool(bad.any()):
        row = int(bad.nonzero()[0])
        label = int(a[row]) if b is None or not 0 <= int(a[row]) < classes else int(b[row])
        raise IndexError(
            f"target[{row}] is {label}, out of range for {classes} classes; use 0..{classes - 1}, "
            f"or ignore_index ({ignore}) to leave a row out"
        )
    return kept, bad


def _chunk_rows(matrix: Tensor) -> int:
    """How many rows stay in a CPU's cache during a dozen operations; all rows on other devices."""
    rows, columns = matrix.shape
    return max(1, CHUNK_ELEMENTS // columns) if matrix.device.type == "cpu" else max(rows, 1)


def _ce(
    student_NC: Tensor, a: Tensor, b: Tensor | None, lam: Tensor | None, spec: CEKDSpec, grad_NC: Tensor
) -> Tensor:
    """Cross entropy per row; adds ce_weight times its gradient softmax(s) - q to `grad_NC`."""
    q = a.to(grad_NC.dtype) if a.is_floating_point() else None
    smoothing, classes = spec.label_smoothing, student_NC.shape[1]
    if q is not None and smoothing:
        q = q * (1 - smoothing) + smoothing / classes
    step, tops = _chunk_rows(student_NC), []
    total = itertools.repeat(None) if q is None else q.sum(1, keepdim=True).split(step)
    for s, grad, share in zip(student_NC.split(step), grad_NC.split(step), total, strict=False):
        p = torch.softmax(s, 1, dtype=grad.dtype)
        # -log p_c = top - s_c with top = log sum exp. A softmax peaks at 1 / its sum, which saves a second exponential.
        tops.append(s.amax(1).to(grad.dtype).sub_(p.amax(1).log_()))
        if share is not None:
            p.mul_(share)  # for targets that do not sum to one
        grad.add_(p, alpha=spec.ce_weight)
    top = _joined(tops)
    if q is not None:
        # 0 * inf is 0 here, as everywhere in these losses: a masked class costs nothing.
        grad_NC.sub_(q, alpha=spec.ce_weight)
        return (top[:, None] - student_NC).mul_(q).masked_fill_(q == 0, 0).sum(1)
    index, certain = a.unsqueeze(1), 1 - smoothing
    loss = top - student_NC.gather(1, index).squeeze(1)
    if b is None or lam is None:
        grad_NC.scatter_(1, index, -spec.ce_weight * certain, reduce="add")
    else:
        index_b, share = b.unsqueeze(1), lam.to(top.dtype)
        loss.lerp_(top - student_NC.gather(1, index_b).squeeze(1), 1 - share)
        weight = (-spec.ce_weight * certain * share).unsqueeze(1)
        grad_NC.scatter_add_(1, index, weight)
        grad_NC.scatter_add_(1, index_b, (-spec.ce_weight * certain) - weight)
    if smoothing:
        loss.mul_(certain).add_(top - student_NC.mean(1, dtype=top.dtype), alpha=smoothing)
        grad_NC.sub_(spec.ce_weight * smoothing / classes)
    return loss


def _joined(rows: list[Tensor]) -> Tensor:
    """Concatenates chunks of rows; an empty batch is one chunk."""
    return rows[0] if len(rows) == 1 else torch.cat(rows)


def _kd(student_NC: Tensor, teacher_NC: Tensor, label: Tensor | None, spec: CEKDSpec, grad_NC: Tensor) -> Tensor:
    """T^2 KL(p_t || p_s) or DKD per row; writes kd_weight times its gradient to `grad_NC`.

    Computed in float64 for any input: at T = 32 the log-probabilities of both sides agree in most digits, and their
    float32 difference keeps few (it is up to 68 % off).
    """
    step, rows = _chunk_rows(student_NC), []
    labels = itertools.repeat(None) if label is None else label.split(step)
    chunks = (x.split(step) for x in (student_NC, teacher_NC, grad_NC))
    for s, t, grad, y in zip(*chunks, labels, strict=False):
        rows.append(_kd_rows(s, t, y, spec, grad))
    return _joined(rows).mul_(spec.temperature**2)


def _kd_rows(
    student_NC: Tensor, teacher_NC: Tensor, label: Tensor | None, spec: CEKDSpec, grad_NC: Tensor
) -> Tensor:
    s, t = student_NC.double(), teacher_NC.double()
    if spec.standardize:
        s, sigma = _standardized(s)
        t, _ = _standardized(t)
    s_T, t_T = s * (1 / spec.temperature), t * (1 / spec.temperature)  # a division costs three products
    if spec.variant == "dkd" and label is not None:
        loss, grad = _dkd(s_T, t_T, label, spec)
    else:
        loss, grad = _kl(s_T, t_T)
    if spec.standardize:
        # dz_i/dx_j = (delta_ij - 1/C) / (sigma + eps) - z_i z_j / ((C - 1) sigma)
        along = (grad * s).sum(1, keepdim=True) / ((s.shape[1] - 1) * sigma.clamp_min(1e-30))
        grad = (grad - grad.mean(1, keepdim=True)) / (sigma + STANDARDIZE_EPS) - s * along
    torch.mul(grad, spec.temperature * spec.kd_weight, out=grad_NC)
    return loss


def _standardized(x_NC: Tensor) -> tuple[Tensor, Tensor]:
    sigma = x_NC.std(1, keepdim=True)
    return (x_NC - x_NC.mean(1, keepdim=True)) / (sigma + STANDARDIZE_EPS), sigma


def _kl(s_NC: Tensor, t_NC: Tensor) -> tuple[Tensor, Tensor]:
    """KL(softmax t || softmax s) per row of float64 logits, and its gradient softmax s - softmax t.

    sum_c p_t (t - s) - (log sum exp t - log sum exp s), whose parts cancel at high T: in float64 1e-9 of it
    is left at T = 32, in float32 nothing is. Only rounding can make it negative, so it is clamped at 0. The
    kernels, which compute in float32, sum a series instead, whose terms are all >= 0.
    """
    p_s, p_t = torch.softmax(s_NC, 1), torch.softmax(t_NC, 1)
    # A softmax peaks at 1 / sum exp(x - max x), which saves a second pass.
    ratio = p_s.amax(1).div_(p_t.amax(1)).log_()
    shift = t_NC.amax(1).sub_(s_NC.amax(1)).add_(ratio)
    d = torch.sub(t_NC, s_NC)
    kl = torch.mul(p_t, d).sum(1).sub_(shift)
    if kl.device.type != "cpu" or not math.isfinite(kl.sum()):
        # Either a masked class, where p_t = 0 and the term is 0 for any d, or a true infinity or NaN, which stays.
        kl = (p_t * d.masked_fill(p_t == 0, 0)).sum(1).sub_(shift)
    return kl.clamp_min_(0), p_s.sub_(p_t)


def _dkd(s_NC: Tensor, t_NC: Tensor, label: Tensor, spec: CEKDSpec) -> tuple[Tensor, Tensor]:
    """alpha KL of (target, rest) + beta KL among the others (Zhao et al., 2022, eq. 7), over T^2.

    The rest's share is exp(lse_rest - lse), never 1 - p_y, so the loss of a confident student is finite.
    """
    y = label[:, None]
    log_y, log_rest, others = [], [], []
    for z in (s_NC, t_NC):
        others.append(z.scatter(1, y, -torch.inf))
        lse = z.logsumexp(1, keepdim=True)
        log_y.append(z.gather(1, y) - lse)
        log_rest.append(others[-1].logsumexp(1, keepdim=True) - lse)
    pair_s, pair_t = (torch.cat(pair, 1) for pair in zip(log_y, log_rest, strict=True))
    tckd, grad_pair = _kl(pair_s, pair_t)
    nckd, grad = _kl(others[0], others[1])
    grad.mul_(spec.dkd_beta).addcmul_(torch.softmax(others[0], 1), grad_pair[:, 1:], value=spec.dkd_alpha)
    grad.scatter_(1, y, spec.dkd_alpha * grad_pair[:, :1])
    return spec.dkd_alpha * tckd + spec.dkd_beta * nckd, grad


# ---- attention transfer --------------------------------------------------------------------------------


def attention_forward(
    student: Tensor, teacher: Tensor, p: float, mode: str, eps: float
) -> tuple[Tensor, Tensor]:
    """Loss and coef (N, H, W) with d loss / d student = coef * (p / F) |f|^(p - 1) sign f."""
    q_s, q_t = _power_map(student, p), _power_map(teacher, p)
    norm_s = torch.linalg.vector_norm(q_s, dim=1, keepdim=True)
    norm_t = torch.linalg.vector_norm(q_t, dim=1, keepdim=True).clamp_min(eps)
    a_s = q_s / norm_s.clamp_min(eps)
    u = a_s - q_t / norm_t
    samples, positions = u.shape
    if mode == "paper":
        distance = torch.linalg.vector_norm(u, dim=1, keepdim=True)
        loss = distance.sum() / samples
        scale = torch.where(distance > 0, 1 / (samples * distance), 0.0)
    else:
        weight = 1 / (samples * positions) if mode == "mean" else 1 / samples
        loss, scale = u.square().sum() * weight, 2 * weight
    # If the norm is clamped, the map is linear in q, and there is nothing to project out.
    along = (a_s * u).sum(1, keepdim=True) * (norm_s > eps)
    coef = (u - a_s * along) * (scale / norm_s.clamp_min(eps))
    return loss, coef.view(samples, *student.shape[2:])


def attention_backward(student: Tensor, coef_NHW: Tensor, upstream: Tensor, p: float) -> Tensor:
    """The student's gradient, in the student's dtype and memory format."""
    factor = (coef_NHW * (upstream * (p / student.shape[1]))).unsqueeze(1)
    if p == 2:
        return (student * factor).to(student.dtype)
    if p == 1:
        return (student.sign() * factor).to(student.dtype)
    slope = student.to(coef_NHW.dtype)
    return (slope.abs().pow(p - 1) * slope.sign() * factor).to(student.dtype)


def _power_map(feature_NFHW: Tensor, p: float) -> Tensor:
    """mean over channels of |f|^p, (N, P)."""
    f = feature_NFHW.to(accumulation_dtype(feature_NFHW.dtype))
    if p == 2 and f.stride(1) == 1:
        q = torch.linalg.vector_norm(f, dim=1).square_().div_(f.shape[1])  # fast on contiguous channels only
    else:
        q = (f.square() if p == 2 else f.abs() if p == 1 else f.abs().pow_(p)).mean(1)
    return q.flatten(1)


# ---- neuron selectivity transfer -----------------------------------------------------------------------


def nst_method(method: str, student: Tensor, teacher: Tensor, teacher_term: bool) -> str:
    """ "spatial" (P x P Grams) or "channel" (three F x F Grams): the one with fewer products."""
    if method != "auto":
        return method
    s, t, positions = student.shape[1], teacher.shape[1], student[0, 0].numel()
    constant = t * t if teacher_term else 0  # torch 2.11 cannot multiply a symbolic size by a bool
    return "spatial" if positions * (s + t) <= s * s + s * t + constant else "channel"


def nst_forward(
    student: Tensor, teacher: Tensor, method: str, teacher_term: bool, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Loss, and two matrices per sample that the gradient needs.

    spatial: the Gram difference (N, P, P) and the reciprocal norms (N, S, 1);
    channel: W_ss (N, S, S) and W_st (N, S, T) with d loss / d F_s = W_ss F_s + W_st F_t.
    """
    f_s, f_t = _rows(student), _rows(teacher)
    forward = _nst_spatial if method == "spatial" else _nst_channel
    with torch.autocast(student.device.type, enabled=False):
        return forward(f_s, f_t, teacher_term, eps)


def nst_backward(
    student: Tensor, teacher: Tensor, first: Tensor, second: Tensor, upstream: Tensor, method: str, eps: float
) -> Tensor:
    """The student's gradient, (N, S, H, W) in the student's dtype and memory format."""
    f_s = _rows(student)
    with torch.autocast(student.device.type, enabled=False):
        if method == "channel":
            grad = torch.bmm(first, f_s).baddbmm_(second, _rows(teacher)).mul_(upstream)
        else:
            samples, channels, _ = f_s.shape
            a = f_s * second
            grad = torch.baddbmm(a, a, first, beta=0, alpha=4 / (samples * channels))
            along = (a * grad).sum(2, keepdim=True) * (second * eps < 1 - 1e-6)
            grad = grad.addcmul_(a, along, value=-1).mul_(second * upstream)
    grad = grad.view(student.shape)
    return grad.to(student.dtype) if student.is_contiguous() else torch.empty_like(student).copy_(grad)


def _rows(feature_NFHW: Tensor) -> Tensor:
    return feature_NFHW.flatten(2).to(accumulation_dtype(feature_NFHW.dtype))


def _nst_spatial(f_s: Tensor, f_t: Tensor, teacher_term: bool, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """1/N sum_n || A^T A / S - B^T B / T ||^2 with A, B the features, each channel of length 1."""
    r_s, r_t = (1 / torch.linalg.vector_norm(f, dim=2, keepdim=True).clamp_min(eps) for f in (f_s, f_t))
    a, b = f_s * r_s, f_t * r_t
    gram_t = torch.bmm(b.mT, b).div_(b.shape[1])
    difference = torch.bmm(a.mT, a).div_(a.shape[1]).sub_(gram_t)  # exactly 0 for equal features
    loss = difference.square().sum()
    if not teacher_term:
        loss = loss - gram_t.square().sum()
    return loss / a.shape[0], difference, r_s


def _nst_channel(f_s: Tensor, f_t: Tensor, teacher_term: bool, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """1/N sum_n ||A A^T||^2/S^2 + ||B B^T||^2/T^2 - 2 ||A B^T||^2/(S T), from Grams of the raw features.

    The norms are the Grams' diagonals, so the features are read once and never copied. The squares are
    added up in float64, since the three terms nearly cancel for a good student.
    """
    samples, s, t = f_s.shape[0], f_s.shape[1], f_t.shape[1]
    ss, st = torch.bmm(f_s, f_s.mT), torch.bmm(f_s, f_t.mT)
    norm_s = ss.diagonal(dim1=1, dim2=2).sqrt()
    r_s = 1 / norm_s.clamp_min(eps)
    if teacher_term:
        tt = torch.bmm(f_t, f_t.mT)
        r_t = 1 / tt.diagonal(dim1=1, dim2=2).sqrt().clamp_min(eps)
        tt.mul_(r_t[:, :, None]).mul_(r_t[:, None, :])
        constant = tt.square().sum(dtype=torch.float64) / t**2
    else:
        r_t = 1 / torch.linalg.vector_norm(f_t, dim=2).clamp_min(eps)
        constant = st.new_zeros(())
    ss.mul_(r_s[:, :, None]).mul_(r_s[:, None, :])
    st.mul_(r_s[:, :, None]).mul_(r_t[:, None, :])
    ss_square, st_square = ss.square(), st.square()
    own, cross = ss_square.sum(2, dtype=torch.float64), st_square.sum(2, dtype=torch.float64)
    loss = own.sum() / s**2 - 2 / (s * t) * cross.sum() + constant
    loss = (loss / samples).to(f_s.dtype)
    # dA = 4/N (ss A / S^2 - st B / (S T)); <a_i, dA_i> is the same with squares; then through the norms.
    along = (own / s**2 - cross / (s * t)).to(f_s.dtype) * (norm_s > eps)
    w_ss = ss.mul_(r_s[:, :, None]).mul_(r_s[:, None, :]).mul_(4 / (samples * s**2))
    w_ss.diagonal(dim1=1, dim2=2).sub_(along * r_s.square() * (4 / samples))
    w_st = st.mul_(r_s[:, :, None]).mul_(r_t[:, None, :]).mul_(-4 / (samples * s * t))
    return loss, w_ss, w_st
