"""Closed-form losses and analytic gradients in plain PyTorch: the oracle of the tests and the CPU path.

Every loss is a pair of functions. `*_forward` returns the loss and what the gradient needs;
`*_backward` turns that and an upstream gradient into the student's gradient. The Triton kernels in
`kernels/_triton` have the same pairs with the same arguments. Nothing here asks the host for a value on a
CUDA device, mutates an input or needs autograd.

Shape suffixes: N batch, C classes, F channels (S the student's, T the teacher's), P positions (H * W).
"""
from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

STANDARDIZE_EPS = 1e-7  # added to the standard deviation of logits (Sun et al., 2024)
CHUNK_ELEMENTS = 1 << 15  # float64 logits handled at once on the CPU: some buffers of 256 KB, an L2 cache
SERIES_BELOW = 2.0**-10  # |d| under which d + exp(-d) - 1 is summed as a series


class CEKDSpec(NamedTuple):
    """The numbers of one `ce_kd_loss` call; a term of weight 0 is skipped and its part reads 0."""

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
    """float64 stays, everything shorter accumulates in float32."""
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
    valid = bad = None
    if target is not None and not target.is_floating_point():
        valid, bad = _check_labels(target, target_b, classes, spec.ignore_index)
        target = target.masked_fill(~valid | bad, 0)
        target_b = None if target_b is None else target_b.masked_fill(~valid | bad, 0)
    grad = torch.empty_like(student_NC) if with_grad else student_NC.new_empty(0)
    terms = torch.zeros(2, rows, dtype=dtype, device=student_NC.device)
    step = max(1, CHUNK_ELEMENTS // classes) if student_NC.device.type == "cpu" else max(rows, 1)
    for start in range(0, rows, step):
        part = slice(start, start + step)
        a, b, share = (None if x is None else x[part] for x in (target, target_b, lam))
        student, teacher = student_NC[part], teacher_NC[part]
        grad_kd = grad_ce = None
        if spec.kd_weight:
            kd, grad_kd = _kd_rows(student, teacher, a, spec)
            terms[1, part] = kd
        if spec.ce_weight and a is not None:
            ce, grad_ce = _ce_rows(student.to(dtype), a, b, share, spec.label_smoothing)
            terms[0, part] = ce
        if with_grad:
            grad[part] = _weighted(grad_ce, grad_kd, spec)
    if valid is not None and bad is not None:
        # A row out of range is NaN on a device that must not be asked; the CPU raised above.
        terms = terms.masked_fill(bad, torch.nan).masked_fill(~valid, 0)
        if with_grad:
            grad = grad.masked_fill_(bad[:, None], torch.nan).masked_fill_(~valid[:, None], 0)
    ones = torch.ones(rows, dtype=dtype, device=student_NC.device)
    count = (ones if valid is None else valid.to(dtype)).sum()
    loss_N = spec.ce_weight * terms[0] + spec.kd_weight * terms[1]
    sums = torch.stack((loss_N.sum(), terms[0].sum(), terms[1].sum()))
    parts = sums / count if spec.reduction != "sum" else sums
    return (loss_N if spec.reduction == "none" else parts[0].clone()), parts, grad, count


def ce_kd_backward(grad_NC: Tensor, upstream: Tensor, count: Tensor, reduction: str) -> Tensor:
    """The student's gradient: the stored one times the upstream gradient, over the count for "mean"."""
    scale = upstream / count.clamp_min(1) if reduction == "mean" else upstream
    return (grad_NC * (scale[:, None] if reduction == "none" else scale)).to(grad_NC.dtype)


def _check_labels(a: Tensor, b: Tensor | None, classes: int, ignore: int) -> tuple[Tensor, Tensor]:
    valid = a != ignore
    bad = (a < 0) | (a >= classes)
    if b is not None:
        valid = valid & (b != ignore)
        bad = bad | (b < 0) | (b >= classes)
    bad = bad & valid
    if a.device.type == "cpu" and bool(bad.any()):
        row = int(bad.nonzero()[0])
        raise IndexError(
            f"target[{row}] = {int(a[row])} is out of range for {classes} classes; "
            f"use 0..{classes - 1}, or ignore_index={ignore} for a row to leave out"
        )
    return valid, bad


def _weighted(grad_ce: Tensor | None, grad_kd: Tensor | None, spec: CEKDSpec) -> Tensor | float:
    if grad_kd is not None:
        grad_kd = grad_kd.mul_(spec.kd_weight)
    if grad_ce is None:
        return 0.0 if grad_kd is None else grad_kd
    grad_ce = grad_ce.mul_(spec.ce_weight)
    return grad_ce if grad_kd is None else grad_ce.add_(grad_kd)


def _ce_rows(
    student_NC: Tensor, a: Tensor, b: Tensor | None, lam: Tensor | None, smoothing: float
) -> tuple[Tensor, Tensor]:
    log_p = torch.log_softmax(student_NC, 1)
    grad = log_p.exp()
    if a.is_floating_point():
        q = a.to(log_p.dtype)
        if smoothing:
            q = q * (1 - smoothing) + smoothing / q.shape[1]
        # 0 * -inf is 0 here, as everywhere in these losses: a masked class costs nothing. The gradient
        # keeps sum(q) for targets that do not sum to one.
        loss = -torch.where(q == 0, 0.0, q * log_p).sum(1)
        return loss, grad.mul_(q.sum(1, keepdim=True)).sub_(q)
    pairs = [(a, None)] if b is None or lam is None else [(a, lam), (b, 1 - lam)]
    loss = torch.zeros_like(log_p[:, 0])
    for label, share in pairs:
        nll = -log_p.gather(1, label[:, None])
        weight = torch.full_like(nll, 1 - smoothing)
        weight = weight if share is None else weight * share[:, None].to(nll.dtype)
        loss = loss + (weight * nll).squeeze(1)
        grad.scatter_add_(1, label[:, None], -weight)
    if smoothing:
        loss = loss - smoothing * log_p.mean(1)
        grad.sub_(smoothing / log_p.shape[1])
    return loss, grad


def _kd_rows(
    student_NC: Tensor, teacher_NC: Tensor, label: Tensor | None, spec: CEKDSpec
) -> tuple[Tensor, Tensor]:
    """T^2 KL(p_t || p_s) or DKD by row, and its gradient by the student's logits.

    In float64 whatever comes in: at T = 32 the teacher's and the student's log-probabilities agree to
    many digits, and their float32 difference has few left (up to 68 % off).
    """
    s, t = student_NC.double(), teacher_NC.double()
    if spec.standardize:
        s, sigma = _standardized(s)
        t, _ = _standardized(t)
    inverse = 1.0 / spec.temperature
    s_T, t_T = s * inverse, t * inverse
    if spec.variant == "dkd" and label is not None:
        loss, grad = _dkd(s_T, t_T, label, spec)
    else:
        loss, grad = _kl(s_T, t_T)
    loss, grad = loss * spec.temperature**2, grad.mul_(spec.temperature)
    if spec.standardize:
        # dz_i/dx_j = (delta_ij - 1/C) / (sigma + eps) - z_i z_j / ((C - 1) sigma)
        along = (grad * s).sum(1, keepdim=True) / ((s.shape[1] - 1) * sigma.clamp_min(1e-30))
        grad = (grad - grad.mean(1, keepdim=True)) / (sigma + STANDARDIZE_EPS) - s * along
    return loss, grad


def _standardized(x_NC: Tensor) -> tuple[Tensor, Tensor]:
    sigma = x_NC.std(1, keepdim=True)
    return (x_NC - x_NC.mean(1, keepdim=True)) / (sigma + STANDARDIZE_EPS), sigma


def _log_normalized(z_NC: Tensor) -> tuple[Tensor, Tensor]:
    """log softmax and softmax with one exponential; overwrites z_NC."""
    z_NC.sub_(z_NC.amax(1, keepdim=True))
    p = z_NC.exp()
    total = p.sum(1, keepdim=True)
    return z_NC.sub_(total.log()), p.div_(total)


def _kl(s_NC: Tensor, t_NC: Tensor) -> tuple[Tensor, Tensor]:
    """KL(softmax t || softmax s) by row and softmax s - softmax t; overwrites both arguments.

    Every addend of sum_c p_t (d + exp(-d) - 1), d = log p_t - log p_s, is >= 0: equal logits give
    exactly 0. The field's sum_c p_t d is the same sum, since sum_c (p_s - p_t) = 0.
    """
    log_s, p_s = _log_normalized(s_NC)
    log_t, p_t = _log_normalized(t_NC)
    d = log_t.sub_(log_s).masked_fill_(p_t == 0, 0)  # p_t = 0: the addend is p_s, also for d = nan
    grad = p_s.sub_(p_t)
    small = d.clamp(-SERIES_BELOW, SERIES_BELOW)
    series = small * small * (0.5 - small * (1 / 6 - small * (1 / 24 - small / 120)))
    addend = torch.where(d == small, p_t * series, torch.addcmul(grad, p_t, d))
    return addend.sum(1), grad


def _dkd(s_NC: Tensor, t_NC: Tensor, label: Tensor, spec: CEKDSpec) -> tuple[Tensor, Tensor]:
    """alpha KL of (target, rest) + beta KL among the others (Zhao et al., 2022, eq. 7), over T^2.

    The rest's share is exp(lse_rest - lse), never 1 - p_y, so a certain student costs a finite loss.
    """
    y = label[:, None]
    log_y, log_rest = [], []
    for z in (s_NC, t_NC):
        lse = z.logsumexp(1, keepdim=True)
        log_y.append(z.gather(1, y) - lse)
        log_rest.append(z.scatter(1, y, -torch.inf).logsumexp(1, keepdim=True) - lse)
    tckd, grad_pair = _kl(*(torch.cat(pair, 1) for pair in zip(log_y, log_rest, strict=True)))
    other_s = s_NC.scatter(1, y, -torch.inf)
    share_s = torch.softmax(other_s, 1)
    nckd, grad = _kl(other_s, t_NC.scatter(1, y, -torch.inf))
    grad.mul_(spec.dkd_beta).addcmul_(share_s, grad_pair[:, 1:], value=spec.dkd_alpha)
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
    # Where the norm is clamped the map is linear in q: nothing to project out.
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
    """mean over channels of |f|^p, (N, P), in one pass over the feature."""
    dtype = accumulation_dtype(feature_NFHW.dtype)
    norm = torch.linalg.vector_norm(feature_NFHW, p, dim=1, dtype=dtype)
    return (norm if p == 1 else norm.pow(p)).div_(feature_NFHW.shape[1]).flatten(1)


# ---- neuron selectivity transfer -----------------------------------------------------------------------


def nst_method(method: str, student: Tensor, teacher: Tensor, teacher_term: bool) -> str:
    """ "spatial" (P x P Grams) or "channel" (three F x F Grams): the one that multiplies less."""
    if method != "auto":
        return method
    s, t, positions = student.shape[1], teacher.shape[1], student[0, 0].numel()
    return "spatial" if positions * (s + t) <= s * s + s * t + t * t * teacher_term else "channel"


def nst_forward(
    student: Tensor, teacher: Tensor, method: str, teacher_term: bool, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Loss and two matrices a sample that the gradient needs.

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
    """The student's gradient, (N, S, H, W) in the student's dtype."""
    f_s = _rows(student)
    with torch.autocast(student.device.type, enabled=False):
        if method == "channel":
            grad = torch.bmm(first, f_s).baddbmm_(second, _rows(teacher)).mul_(upstream)
        else:
            samples, channels, _ = f_s.shape
            a = f_s * second
            grad = torch.baddbmm(a, a, first, beta=0, alpha=4 / (samples * channels))
            along = (a * grad).sum(2, keepdim=True) * (second < 1 / eps)
            grad = grad.addcmul_(a, along, value=-1).mul_(second * upstream)
    return grad.view(student.shape).to(student.dtype)


def _rows(feature_NFHW: Tensor) -> Tensor:
    return feature_NFHW.flatten(2).to(accumulation_dtype(feature_NFHW.dtype))


def _nst_spatial(f_s: Tensor, f_t: Tensor, teacher_term: bool, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """1/N sum_n || A^T A / S - B^T B / T ||^2 with A, B the features, each channel of length 1."""
    r_s, r_t = (1 / torch.linalg.vector_norm(f, dim=2, keepdim=True).clamp_min(eps) for f in (f_s, f_t))
    a, b = f_s * r_s, f_t * r_t
    gram_t = torch.bmm(b.mT, b)
    difference = torch.baddbmm(gram_t, a.mT, a, beta=-1 / b.shape[1], alpha=1 / a.shape[1])
    loss = difference.square().sum()
    if not teacher_term:
        loss = loss - gram_t.square().sum() / b.shape[1] ** 2
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
