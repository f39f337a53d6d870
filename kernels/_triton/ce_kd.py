"""Cross entropy + knowledge distillation: loss and gradient in one launch, and one scaling launch in the backward.

`tile_kernel` keeps a row in registers. `loop_kernel` reads a longer row twice, the second time from L1 or L2. The
first pass keeps running maxima and sums per thread and reduces them once, at the end of the row; the second writes the
gradient. The stored gradient still lacks the factors 1/count and upstream gradient. The backward multiplies by both on
the device, so nothing waits for the host and float16 entries do not flush to zero.
"""
# mypy: allow-untyped-defs
from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels import _tiles
from kernels._triton.common import divergence, exp2, is_last, ordered_sum, quotient, ticket
from kernels.reference import CEKDSpec

NO_TARGET, INDEX, MIXED, SOFT = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2), tl.constexpr(3)
STANDARDIZE_EPS = tl.constexpr(1e-7)
LOG2_E, LN_2 = tl.constexpr(math.log2(math.e)), tl.constexpr(math.log(2.0))


@triton.jit
def log_quotient(a, b):
    """log(a / b), exactly 0 where they are equal."""
    return tl.log(quotient(a, b))


@triton.jit
def _kl(s, t, inverse):
    """Rows of KL(t || s), gradient, p_s, the shift of log p_s - log p_t, log sum exp t; -inf masks a class."""
    unit = inverse * LOG2_E
    m_s, m_t = tl.max(s, 1), tl.max(t, 1)
    e_s, e_t = exp2((s - m_s[:, None]) * unit), exp2((t - m_t[:, None]) * unit)
    z_s, z_t = tl.sum(e_s, 1), tl.sum(e_t, 1)
    p_s, p_t = e_s * quotient(1.0, z_s)[:, None], e_t * quotient(1.0, z_t)[:, None]
    shift = (m_t - m_s) * inverse + log_quotient(z_t, z_s)
    addend, grad = divergence((s - t) * inverse + shift[:, None], p_s, p_t)
    return tl.sum(addend, 1), grad, p_s, shift, m_t * inverse + tl.log(z_t)


@triton.jit
def _ce_of(s_y, c_1, z):
    """-log p_y, from z = sum exp(s - c_1 ln 2): a small loss is not the sum of large terms."""
    return tl.log(z) - tl.fma(s_y, LOG2_E, -c_1) * LN_2


@triton.jit
def _log_sigmoid(x):
    return tl.minimum(x, 0.0) - tl.log(1.0 + tl.exp(-tl.abs(x)))


@triton.jit
def _dkd(s, t, is_y, inverse, alpha, beta):
    """alpha KL(target, rest) + beta KL(others), and the gradient, before T^2 and T."""
    others_s, others_t = tl.where(is_y, -float("inf"), s), tl.where(is_y, -float("inf"), t)
    nckd, grad, p_others, shift, log_rest = _kl(others_s, others_t, inverse)
    s_y, t_y = tl.sum(tl.where(is_y, s, 0.0), 1), tl.sum(tl.where(is_y, t, 0.0), 1)
    # Margins target - rest. If the logits are close, their difference is exact, and so is the KL.
    margin_t = t_y * inverse - log_rest
    gap = (s_y - t_y) * inverse + shift
    margin_s = margin_t + gap
    v_y = _log_sigmoid(margin_s) - _log_sigmoid(margin_t)
    b_s, b_t = tl.exp(_log_sigmoid(margin_s)), tl.exp(_log_sigmoid(margin_t))
    r_s, r_t = tl.exp(_log_sigmoid(-margin_s)), tl.exp(_log_sigmoid(-margin_t))
    addend_y, grad_y = divergence(v_y, b_s, b_t)
    addend_r, _ = divergence(v_y - gap, r_s, r_t)
    grad = tl.where(is_y, alpha * grad_y[:, None], beta * grad - (alpha * grad_y)[:, None] * p_others)
    return alpha * (addend_y + addend_r) + beta * nckd, grad


@triton.jit
def _standardized(x, m_class, C: tl.constexpr):
    mean = tl.sum(tl.where(m_class, x, 0.0), 1) * (1.0 / C)
    centred = tl.where(m_class, x - mean[:, None], 0.0)
    sigma = tl.sqrt_rn(tl.sum(centred * centred, 1) * (1.0 / (C - 1)))
    return centred * quotient(1.0, sigma + STANDARDIZE_EPS)[:, None], sigma


@triton.jit
def _labels(y_ptr, y_b_ptr, i_row, m_row, ignore_index, C: tl.constexpr, TARGET: tl.constexpr):
    """Class indices a and b, rows that are not ignored, rows whose label is out of range."""
    y = tl.load(y_ptr + i_row)
    y_b = y
    kept = m_row & (y != ignore_index)
    bad = (y < 0) | (y >= C)
    if TARGET == MIXED:
        y_b = tl.load(y_b_ptr + i_row)
        kept = kept & (y_b != ignore_index)
        bad = bad | (y_b < 0) | (y_b >= C)
    return y, y_b, kept, bad


@triton.jit
def _reduce(
    ce, kd, kept,  # sums of this program
    partial_ptr, loss_ptr, parts_ptr, count_ptr, ticket_ptr, ce_weight, kd_weight,
    PARTIALS: tl.constexpr, MEAN: tl.constexpr, BY_ROW: tl.constexpr,
):  # fmt: skip
    """The last program adds up the sums of all: loss, parts (3,), count."""
    program, programs = tl.program_id(0), tl.num_programs(0)
    tl.store(partial_ptr + program, ce)
    tl.store(partial_ptr + PARTIALS + program, kd)
    tl.store(partial_ptr + 2 * PARTIALS + program, kept)
    if is_last(ticket_ptr, programs):
        ce = ordered_sum(partial_ptr, programs, PARTIALS)
        kd = ordered_sum(partial_ptr + PARTIALS, programs, PARTIALS)
        count = ordered_sum(partial_ptr + 2 * PARTIALS, programs, PARTIALS)
        if MEAN:
            ce, kd = ce / count, kd / count
        loss = ce_weight * ce + kd_weight * kd
        if not BY_ROW:
            tl.store(loss_ptr, loss)
        tl.store(parts_ptr, loss)
        tl.store(parts_ptr + 1, ce)
        tl.store(parts_ptr + 2, kd)
        tl.store(count_ptr, count)


@triton.jit(do_not_specialize=["rows", "ignore_index"])
def tile_kernel(
    s_ptr,  # [rows, C] student
    t_ptr,  # [rows, C] teacher
    y_ptr,  # [rows] int64, or [rows, C] probabilities
    y_b_ptr,  # [rows] int64, mixup
    lam_ptr,  # [rows] float32, mixup
    grad_ptr,  # [rows, C] out
    loss_ptr,  # [] or [rows] out
    parts_ptr,  # [3] out
    count_ptr,  # [] out
    partial_ptr,  # [3, PARTIALS] scratch
    ticket_ptr,  # [1] zero before and after
    rows, ignore_index, temperature, ce_weight, kd_weight, smoothing, alpha, beta,
    C: tl.constexpr, S_STRIDE: tl.constexpr, T_STRIDE: tl.constexpr, G_STRIDE: tl.constexpr,
    TARGET: tl.constexpr, CE: tl.constexpr, KD: tl.constexpr, SMOOTH: tl.constexpr, DKD: tl.constexpr,
    STANDARDIZE: tl.constexpr, GRAD: tl.constexpr, MEAN: tl.constexpr, BY_ROW: tl.constexpr,
    ROWS: tl.constexpr, BLOCK: tl.constexpr, PARTIALS: tl.constexpr,
):  # fmt: skip
    """ROWS whole rows per program, in registers; C and the strides are constants, for vector loads."""
    i_row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    m_row = i_row < rows
    i_row = tl.minimum(i_row, rows - 1)  # rows past the end repeat the last one and are not counted
    i_class = tl.arange(0, BLOCK)
    m_class = (i_class < C)[None, :]
    o_class = i_row[:, None]
    s = tl.load(s_ptr + o_class * S_STRIDE + i_class[None, :], mask=m_class, other=-float("inf")).to(tl.float32)
    ce, kd = tl.zeros((ROWS,), tl.float32), tl.zeros((ROWS,), tl.float32)
    grad = tl.zeros((ROWS, BLOCK), tl.float32)
    kept = m_row
    is_y = m_class & (i_class < 0)[None, :]
    if (TARGET == INDEX) | (TARGET == MIXED):
        y, y_b, kept, bad = _labels(y_ptr, y_b_ptr, i_row, m_row, ignore_index, C, TARGET)
        is_y = i_class[None, :] == y[:, None]
    if CE:
        top = tl.max(s, 1)
        e = exp2((s - top[:, None]) * LOG2_E)
        z = tl.sum(e, 1)
        lse = top + tl.log(z)
        share = quotient(1.0, z)
        if TARGET == SOFT:
            q = tl.load(y_ptr + o_class * C + i_class[None, :], mask=m_class, other=0.0).to(tl.float32)
            if SMOOTH:
                q = tl.where(m_class, q * (1.0 - smoothing) + smoothing * (1.0 / C), 0.0)
            ce = tl.sum(tl.where(q == 0.0, 0.0, q * (lse[:, None] - s)), 1)
            grad = e * (tl.sum(q, 1) * share)[:, None] - q
        else:
            q = tl.where(is_y, 1.0, 0.0)
            ce = tl.log(z) + (top - tl.sum(tl.where(is_y, s, 0.0), 1))
            if TARGET == MIXED:
                lam = tl.load(lam_ptr + i_row)
                is_b = i_class[None, :] == y_b[:, None]
                q = q * lam[:, None] + tl.where(is_b, 1.0 - lam[:, None], 0.0)
                ce = lam * ce + (1.0 - lam) * (tl.log(z) + (top - tl.sum(tl.where(is_b, s, 0.0), 1)))
            if SMOOTH:
                mean = tl.sum(tl.where(m_class, s, 0.0), 1) * (1.0 / C)
                ce = (1.0 - smoothing) * ce + smoothing * (lse - mean)
                q = q * (1.0 - smoothing) + smoothing * (1.0 / C)
            grad = e * share[:, None] - q
        grad = grad * ce_weight
    if KD:
        t = tl.load(t_ptr + o_class * T_STRIDE + i_class[None, :], mask=m_class, other=-float("inf")).to(tl.float32)
        inverse = quotient(1.0, temperature)
        sigma = tl.zeros((ROWS,), tl.float32)
        if STANDARDIZE:
            s, sigma = _standardized(s, m_class, C)
            t, _ = _standardized(t, m_class, C)
            s, t = tl.where(m_class, s, -float("inf")), tl.where(m_class, t, -float("inf"))
        if DKD:
            kd, grad_kd = _dkd(s, t, is_y, inverse, alpha, beta)
        else:
            kd, grad_kd, _, _, _ = _kl(s, t, inverse)
        kd, grad_kd = kd * (temperature * temperature), grad_kd * (temperature * kd_weight)
        if STANDARDIZE:
            s = tl.where(m_class, s, 0.0)
            grad_kd = tl.where(m_class, grad_kd, 0.0)
            along = tl.sum(grad_kd * s, 1) / ((C - 1) * tl.maximum(sigma, 1e-30))
            grad_kd = grad_kd - (tl.sum(grad_kd, 1) * (1.0 / C))[:, None]
            grad_kd = grad_kd * quotient(1.0, sigma + STANDARDIZE_EPS)[:, None]
            grad_kd = grad_kd - s * along[:, None]
        grad += grad_kd
    if (TARGET == INDEX) | (TARGET == MIXED):
        ce, kd = tl.where(bad, float("nan"), ce), tl.where(bad, float("nan"), kd)
        grad = tl.where(kept[:, None], tl.where(bad[:, None], float("nan"), grad), 0.0)
    ce, kd = tl.where(kept, ce, 0.0), tl.where(kept, kd, 0.0)
    if GRAD:
        o_grad = o_class * G_STRIDE + i_class[None, :]
        tl.store(grad_ptr + o_grad, grad.to(grad_ptr.dtype.element_ty), mask=m_class & m_row[:, None])
    if BY_ROW:
        tl.store(loss_ptr + i_row, ce_weight * ce + kd_weight * kd, mask=m_row)
    _reduce(
        tl.sum(ce, 0), tl.sum(kd, 0), tl.sum(kept.to(tl.float32), 0),
        partial_ptr, loss_ptr, parts_ptr, count_ptr, ticket_ptr, ce_weight, kd_weight,
        PARTIALS, MEAN, BY_ROW,
    )  # fmt: skip


@triton.jit
def _values(ptr, index, mask, other, MASKED: tl.constexpr):
    """A block of a row in float32; unmasked loads need no registers preset to `other`."""
    if MASKED:
        return tl.load(ptr + index, mask=mask, other=other).to(tl.float32)
    return tl.load(ptr + index).to(tl.float32)


@triton.jit
def _scan(
    s_ptr, t_ptr, q_ptr, index, mask, m_s, m_t, z_1, z_s, z_t, sum_s, sum_q, sum_qs, unit, smoothing,
    C: tl.constexpr, TARGET: tl.constexpr, CE: tl.constexpr, KD: tl.constexpr, SMOOTH: tl.constexpr,
    FOURTH: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """One block [VECTORS, VEC] of the first pass: running maxima and sums of exponentials per vector."""
    s = _values(s_ptr, index, mask, -float("inf"), MASKED)
    new = tl.maximum(m_s, tl.max(s, 1))
    base = tl.where(new == -float("inf"), 0.0, new)
    if KD:
        e, decay = exp2(tl.fma(s, unit, -(base * unit)[:, None])), exp2(m_s * unit - base * unit)
        z_s = z_s * decay + tl.sum(e, 1)
        t = _values(t_ptr, index, mask, -float("inf"), MASKED)
        new_t = tl.maximum(m_t, tl.max(t, 1))
        base_t = tl.where(new_t == -float("inf"), 0.0, new_t)
        e_t = exp2(tl.fma(t, unit, -(base_t * unit)[:, None]))
        z_t = z_t * exp2(m_t * unit - base_t * unit) + tl.sum(e_t, 1)
        m_t = new_t
    if CE:
        if FOURTH:
            e, decay = e * e, decay * decay
            e, decay = e * e, decay * decay
        else:
            e = exp2(tl.fma(s, LOG2_E, -(base * LOG2_E)[:, None]))
            decay = exp2(m_s * LOG2_E - base * LOG2_E)
        z_1 = z_1 * decay + tl.sum(e, 1)
        if SMOOTH:
            sum_s += tl.sum(tl.where(mask, s, 0.0) if MASKED else s, 1)
        if TARGET == SOFT:
            q = _values(q_ptr, index, mask, 0.0, MASKED)
            if SMOOTH:
                q = q * (1.0 - smoothing) + smoothing * (1.0 / C)
                q = tl.where(mask, q, 0.0) if MASKED else q
            sum_q += tl.sum(q, 1)
            sum_qs += tl.sum(tl.where(q == 0.0, 0.0, q * s), 1)
    return new, m_t, z_1, z_s, z_t, sum_s, sum_q, sum_qs


@triton.jit
def _emit(
    s_ptr, t_ptr, q_ptr, grad_ptr, index, mask, y, y_b, lam, c_1, c_s, c_t, share_1, r_s, r_t, shift, kept, kd,
    inverse, unit, smoothing, ce_weight,
    C: tl.constexpr, TARGET: tl.constexpr, CE: tl.constexpr, KD: tl.constexpr, SMOOTH: tl.constexpr,
    FOURTH: tl.constexpr, GRAD: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """One block of the second pass: stores its gradient and adds to the KL of each vector.

    y and y_b are relative to the first class of each vector; r_s and r_t hold the factor T kd_weight.
    """
    s = _values(s_ptr, index, mask, -float("inf"), MASKED)
    grad = tl.zeros(index.shape, tl.float32)
    if KD:
        t = _values(t_ptr, index, mask, -float("inf"), MASKED)
        e = exp2(tl.fma(s, unit, -c_s))
        addend, grad = divergence((s - t) * inverse + shift, e * r_s, exp2(tl.fma(t, unit, -c_t)) * r_t)
        kd += tl.sum(addend, 1)
    if CE:
        if FOURTH:
            e = e * e
            e = e * e
        else:
            e = exp2(tl.fma(s, LOG2_E, -c_1))
        i_vec = tl.arange(0, index.shape[1])[None, :]
        if TARGET == SOFT:
            q = _values(q_ptr, index, mask, 0.0, MASKED)
        elif TARGET == MIXED:
            q = tl.where(i_vec == y[:, None], lam, 0.0) + tl.where(i_vec == y_b[:, None], 1.0 - lam, 0.0)
        else:
            q = tl.where(i_vec == y[:, None], 1.0, 0.0)
        if SMOOTH:
            q = q * (1.0 - smoothing) + smoothing * (1.0 / C)
        grad += e * share_1 - q * ce_weight
    if GRAD:
        grad = tl.where(kept, grad, 0.0).to(grad_ptr.dtype.element_ty)
        if MASKED:
            tl.store(grad_ptr + index, grad, mask=mask)
        else:
            tl.store(grad_ptr + index, grad)
    return kd


@triton.jit
def _row(ptr, i_row, head, STRIDE: tl.constexpr, S_STRIDE: tl.constexpr, VEC: tl.constexpr):
    """Start of the row's vectors, written so that the compiler sees any 16-byte alignment."""
    offset = i_row * STRIDE + head
    if STRIDE % VEC == S_STRIDE % VEC:
        offset = offset // VEC * VEC
    return ptr + offset


@triton.jit(do_not_specialize=["rows", "ignore_index"])
def loop_kernel(
    s_ptr,  # [rows, C] student
    t_ptr,  # [rows, C] teacher
    y_ptr,  # [rows] int64, or [rows, C] probabilities
    y_b_ptr,  # [rows] int64, mixup
    lam_ptr,  # [rows] float32, mixup
    grad_ptr,  # [rows, C] out
    loss_ptr,  # [] or [rows] out
    parts_ptr,  # [3] out
    count_ptr,  # [] out
    partial_ptr,  # [3, PARTIALS] scratch
    ticket_ptr,  # [1] zero before and after
    rows, ignore_index, temperature, ce_weight, kd_weight, smoothing,
    C: tl.constexpr, S_STRIDE: tl.constexpr, T_STRIDE: tl.constexpr, G_STRIDE: tl.constexpr,
    TARGET: tl.constexpr, CE: tl.constexpr, KD: tl.constexpr, SMOOTH: tl.constexpr, FOURTH: tl.constexpr,
    GRAD: tl.constexpr, MEAN: tl.constexpr, BY_ROW: tl.constexpr,
    VECTORS: tl.constexpr, VEC: tl.constexpr, PARTIALS: tl.constexpr,
):  # fmt: skip
    """One row per program: vectors from the first aligned class on, then the classes before and after them.

    A row of odd length may start anywhere in a vector. `head` classes come before the first whole vector, so
    that the vectors of all three matrices are aligned if their strides agree; at most VEC - 1 follow the last.
    """
    i_row = tl.program_id(0).to(tl.int64)
    ALIGNED: tl.constexpr = S_STRIDE % VEC == 0
    head = 0 if ALIGNED else (VEC - i_row * S_STRIDE % VEC) % VEC
    s_row, t_row = _row(s_ptr, i_row, head, S_STRIDE, S_STRIDE, VEC), _row(t_ptr, i_row, head, T_STRIDE, S_STRIDE, VEC)
    g_row = _row(grad_ptr, i_row, head, G_STRIDE, S_STRIDE, VEC)
    q_row = _row(y_ptr, i_row, head, C, S_STRIDE, VEC) if TARGET == SOFT else y_ptr
    BLOCK: tl.constexpr = VECTORS * VEC
    FULL: tl.constexpr = (C if ALIGNED else C - VEC + 1) // BLOCK * BLOCK
    i_vector = tl.arange(0, VECTORS)
    index = i_vector[:, None] * VEC + tl.arange(0, VEC)[None, :]
    left = C - head - FULL  # classes past the unmasked blocks, at most BLOCK + VEC - 1
    whole = tl.minimum(left // VEC, VECTORS)
    m_tail = (i_vector < whole)[:, None]
    edge = tl.where(i_vector < head, i_vector - head, FULL + whole * VEC + i_vector - VEC)[:, None]
    m_edge = ((i_vector < head) | ((i_vector >= VEC) & (i_vector < VEC + left - whole * VEC)))[:, None]
    EDGE: tl.constexpr = not ALIGNED or C % VEC != 0

    inverse = quotient(1.0, temperature)
    unit = inverse * LOG2_E
    m_s, m_t = tl.full((VECTORS,), -float("inf"), tl.float32), tl.full((VECTORS,), -float("inf"), tl.float32)
    zero = tl.zeros((VECTORS,), tl.float32)
    z_1, z_s, z_t, sum_s, sum_q, sum_qs = zero, zero, zero, zero, zero, zero
    for start in range(0, FULL, BLOCK):
        m_s, m_t, z_1, z_s, z_t, sum_s, sum_q, sum_qs = _scan(
            s_row, t_row, q_row, start + index, None, m_s, m_t, z_1, z_s, z_t, sum_s, sum_q, sum_qs, unit, smoothing,
            C, TARGET, CE, KD, SMOOTH, FOURTH, False,
        )  # fmt: skip
    if FULL < C:
        m_s, m_t, z_1, z_s, z_t, sum_s, sum_q, sum_qs = _scan(
            s_row, t_row, q_row, FULL + index, m_tail, m_s, m_t, z_1, z_s, z_t, sum_s, sum_q, sum_qs, unit, smoothing,
            C, TARGET, CE, KD, SMOOTH, FOURTH, True,
        )  # fmt: skip
    if EDGE:
        m_s, m_t, z_1, z_s, z_t, sum_s, sum_q, sum_qs = _scan(
            s_row, t_row, q_row, edge, m_edge, m_s, m_t, z_1, z_s, z_t, sum_s, sum_q, sum_qs, unit, smoothing,
            C, TARGET, CE, KD, SMOOTH, FOURTH, True,
        )  # fmt: skip
    top_s, top_t = tl.max(m_s, 0), tl.max(m_t, 0)
    top_s, top_t = tl.where(top_s == -float("inf"), 0.0, top_s), tl.where(top_t == -float("inf"), 0.0, top_t)
    c_1, c_s, c_t = top_s * LOG2_E, top_s * unit, top_t * unit

    y, y_b, lam, ce = i_row * 0 - 1, i_row * 0 - 1, 1.0, 0.0
    kept, bad = i_row >= 0, i_row < 0
    if (TARGET == INDEX) | (TARGET == MIXED):
        y, y_b, kept, bad = _labels(y_ptr, y_b_ptr, i_row, i_row < rows, ignore_index, C, TARGET)
        if TARGET == MIXED:
            lam = tl.load(lam_ptr + i_row)
    # A label out of range makes its row's gradient NaN, like its loss.
    w_ce, w_kd = tl.where(bad, float("nan"), ce_weight), tl.where(bad, float("nan"), kd_weight * temperature)
    share_1, r_s, r_t, shift = 0.0, 0.0, 0.0, 0.0
    if CE:
        if FOURTH:
            c_1 = 4.0 * c_s
        z = tl.sum(z_1 * exp2(m_s * LOG2_E - top_s * LOG2_E), 0)
        lse = c_1 * LN_2 + tl.log(z)
        share_1 = quotient(1.0, z)
        if TARGET == SOFT:
            total = tl.sum(sum_q, 0)
            ce = total * lse - tl.sum(sum_qs, 0)
            share_1 = share_1 * total
        else:
            inside = kept & (bad == 0)
            s_y = tl.load(s_row + (y - head), mask=inside, other=0.0).to(tl.float32)
            ce = _ce_of(s_y, c_1, z)
            if TARGET == MIXED:
                s_y = tl.load(s_row + (y_b - head), mask=inside, other=0.0).to(tl.float32)
                ce = lam * ce + (1.0 - lam) * _ce_of(s_y, c_1, z)
            if SMOOTH:
                ce = (1.0 - smoothing) * ce + smoothing * (lse - tl.sum(sum_s, 0) * (1.0 / C))
        share_1 = share_1 * w_ce
    if KD:
        z_s, z_t = tl.sum(z_s * exp2(m_s * unit - c_s), 0), tl.sum(z_t * exp2(m_t * unit - c_t), 0)
        r_s, r_t = quotient(w_kd, z_s), quotient(w_kd, z_t)
        shift = (c_t - c_s) * LN_2 + log_quotient(z_t, z_s)

    y, y_b = (y - head).to(tl.int32), (y_b - head).to(tl.int32)
    kd = zero
    for start in range(0, FULL, BLOCK):
        kd = _emit(
            s_row, t_row, q_row, g_row, start + index, None, y - start - i_vector * VEC, y_b - start - i_vector * VEC,
            lam, c_1, c_s, c_t, share_1, r_s, r_t, shift, kept, kd, inverse, unit, smoothing, w_ce,
            C, TARGET, CE, KD, SMOOTH, FOURTH, GRAD, False,
        )  # fmt: skip
    if FULL < C:
        kd = _emit(
            s_row, t_row, q_row, g_row, FULL + index, m_tail, y - FULL - i_vector * VEC, y_b - FULL - i_vector * VEC,
            lam, c_1, c_s, c_t, share_1, r_s, r_t, shift, kept, kd, inverse, unit, smoothing, w_ce,
            C, TARGET, CE, KD, SMOOTH, FOURTH, GRAD, True,
        )  # fmt: skip
    if EDGE:
        i_edge = tl.reshape(edge, (VECTORS,))
        kd = _emit(
            s_row, t_row, q_row, g_row, edge, m_edge, y - i_edge, y_b - i_edge, lam,
            c_1, c_s, c_t, share_1, r_s, r_t, shift, kept, kd, inverse, unit, smoothing, w_ce,
            C, TARGET, CE, KD, SMOOTH, FOURTH, GRAD, True,
        )  # fmt: skip
    kd_row = tl.sum(kd, 0) * (temperature / kd_weight)
    ce, kd_row = tl.where(bad, float("nan"), ce), tl.where(bad, float("nan"), kd_row)
    ce, kd_row = tl.where(kept, ce, 0.0), tl.where(kept, kd_row, 0.0)
    if BY_ROW:
        tl.store(loss_ptr + i_row, ce_weight * ce + kd_weight * kd_row)
    _reduce(
        ce, kd_row, kept.to(tl.float32),
        partial_ptr, loss_ptr, parts_ptr, count_ptr, ticket_ptr, ce_weight, kd_weight,
        PARTIALS, MEAN, BY_ROW,
    )  # fmt: skip


@triton.jit
def scale_kernel(
    grad_ptr,  # [numel] as stored by the forward
    out_ptr,  # [numel]
    upstream_ptr,  # [] or [rows]
    count_ptr,  # []
    numel, upstream_stride,
    STRIDE: tl.constexpr, MEAN: tl.constexpr, BY_ROW: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """out = grad * upstream / count, over the buffer with its padding."""
    index = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = index < numel
    if BY_ROW:
        scale = tl.load(upstream_ptr + index // STRIDE * upstream_stride, mask=mask, other=0.0).to(tl.float32)
    else:
        scale = tl.load(upstream_ptr).to(tl.float32)
    if MEAN:
        scale = scale / tl.maximum(tl.load(count_ptr), 1.0)
    if (tl.program_id(0).to(tl.int64) + 1) * BLOCK <= numel:  # a mask would split the vectors, unless 16 divides numel
        out = tl.load(grad_ptr + index).to(tl.float32) * scale
        tl.store(out_ptr + index, out.to(out_ptr.dtype.element_ty))
    else:
        out = tl.load(grad_ptr + index, mask=mask, other=0.0).to(tl.float32) * scale
        tl.store(out_ptr + index, out.to(out_ptr.dtype.element_ty), mask=mask)


def ce_kd_forward(
    student: Tensor,
    teacher: Tensor,
    target: Tensor | None,
    target_b: Tensor | None,
    lam: Tensor | None,
    spec: CEKDSpec,
    with_grad: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`reference.ce_kd_forward` in one launch."""
    rows, classes = student.shape
    grad = _tiles.gradient_buffer(student) if with_grad else student.new_empty(0)
    by_row = spec.reduction == "none"
    loss = student.new_empty((rows,) if by_row else (), dtype=torch.float32)
    parts, count = loss.new_empty(3), loss.new_empty(())
    if rows == 0:
        nothing = 0.0 if spec.reduction == "sum" else torch.nan
        return loss.fill_(nothing), parts.fill_(nothing), grad, count.zero_()
    student, teacher = (x if x.stride(1) == 1 else x.contiguous() for x in (student, teacher))
    tile = _tiles.ce_kd_tile(rows, classes, student.element_size(), _tiles.plain_kd(spec.variant, spec.standardize))
    soft = target is not None and target.is_floating_point()
    if target is not None:
        target = target.contiguous()  # an expanded or strided target is small: copy it
    mode = 0 if target is None else 3 if soft else 1 if target_b is None else 2
    pointers = (
        student, teacher, student if target is None else target,
        student if target_b is None else target_b.contiguous(), student if lam is None else lam.contiguous(),
        grad, loss, parts, count, loss.new_empty((3, tile["PARTIALS"])), ticket(student.device),
    )  # fmt: skip
    numbers = (rows, spec.ignore_index, spec.temperature, spec.ce_weight, spec.kd_weight, spec.label_smoothing)
    constants = {
        "C": classes, "S_STRIDE": _row_stride(student), "T_STRIDE": _row_stride(teacher),
        "G_STRIDE": _row_stride(grad) if with_grad else classes,
        "TARGET": mode, "CE": spec.ce_weight != 0 and mode != 0, "KD": spec.kd_weight != 0,
        "SMOOTH": spec.label_smoothing != 0, "GRAD": with_grad, "MEAN": spec.reduction != "sum", "BY_ROW": by_row,
    }  # fmt: skip
    with torch.cuda.device_of(student):
        if "VECTORS" in tile:
            constants["FOURTH"] = spec.temperature == 4.0 and constants["CE"] and constants["KD"]
            loop_kernel[(rows,)](*pointers, *numbers, **constants, **tile)
        else:
            variant = {"DKD": spec.variant == "dkd", "STANDARDIZE": spec.standardize}
            grid = (triton.cdiv(rows, tile["ROWS"]),)
            tile_kernel[grid](*pointers, *numbers, spec.dkd_alpha, spec.dkd_beta, **constants, **variant, **tile)
    return loss, parts, grad, count


def ce_kd_backward(grad: Tensor, upstream: Tensor, count: Tensor, reduction: str) -> Tensor:
    """`reference.ce_kd_backward` in one launch."""
    out = torch.empty_strided(grad.shape, grad.stride(), dtype=grad.dtype, device=grad.device)
    if grad.numel() == 0:
        return out
    by_row = reduction == "none"
    numel = (grad.shape[0] - 1) * grad.stride(0) + grad.shape[1]
    with torch.cuda.device_of(grad):
        scale_kernel[(triton.cdiv(numel, _tiles.SCALE_BLOCK),)](
            grad, out, upstream, count, numel, upstream.stride(0) if by_row else 0,
            STRIDE=_row_stride(grad), MEAN=reduction == "mean", BY_ROW=by_row, BLOCK=_tiles.SCALE_BLOCK,
            **_tiles.FUSION,
        )  # fmt: skip
    return out


def _row_stride(matrix: Tensor) -> int:
    return matrix.stride(0) if matrix.shape[0] > 1 else matrix.shape[1]
