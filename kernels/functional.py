"""The public losses: what they compute, what they accept, and what they reject.

Every loss returns a float32 scalar (float64 for float64 inputs), is once differentiable with respect to the
student, and expects a teacher that does not require grad. float32, bfloat16 and float16 inputs accumulate in
float32. CUDA tensors run Triton kernels, all others the closed-form reference. `backend="triton"` or
`"reference"` forces one.
"""
from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels import _dispatch, _ops, _tiles, reference

Features = Tensor | Sequence[Tensor]

REDUCTIONS = ("mean", "sum", "none")
VARIANTS = ("kd", "dkd")
MODES = ("mean", "paper", "batchmean")
METHODS = ("auto", "spatial", "channel")


def ce_kd_loss(
    student_logits: Tensor,
    teacher_logits: Tensor,
    target: Tensor | None = None,
    *,
    temperature: float = 4.0,
    ce_weight: float = 0.1,
    kd_weight: float = 0.9,
    label_smoothing: float = 0.0,
    ignore_index: int = -100,
    target_b: Tensor | None = None,
    lam: Tensor | float | None = None,
    variant: str = "kd",
    dkd_alpha: float = 1.0,
    dkd_beta: float = 8.0,
    standardize: bool = False,
    reduction: str = "mean",
    backend: str = "auto",
) -> Tensor:
    """Cross entropy plus knowledge distillation, loss and gradient in one pass over the logits.

        loss = ce_weight * CE(s, y) + kd_weight * T^2 * KL(softmax(t / T) || softmax(s / T))

    in nats. Each term is a mean over the rows that are not ignored (`reduction="mean"`), a sum, or one value per row
    (N,). KL keeps a relative error below 1e-6 at T = 32, where the usual float32 form has no correct digit, and is
    exactly 0 for equal logits. The kernels sum p_t (d + exp(-d) - 1) with d = log p_t - log p_s, where every addend is
    >= 0; the reference takes the difference of the logits in float64.

    Args:
        student_logits, teacher_logits: (N, C), floating point; the teacher's must not require grad.
        target: class indices (N,), probabilities (N, C), or None for KD only.
        temperature: T > 0, for both sides.
        ce_weight, kd_weight: weights of the terms; a term of weight 0 is skipped and its part reads 0.
        label_smoothing: in [0, 1): CE against (1 - e) y + e / C.
        ignore_index: rows with this target count in neither term (an ignored row needs no valid logits).
        target_b, lam: mixup: CE is lam * CE(target) + (1 - lam) * CE(target_b); lam a float or (N,).
        variant: "dkd" replaces KL by dkd_alpha * TCKD + dkd_beta * NCKD (needs class indices).
        standardize: KD on (x - mean) / (1e-7 + std) of each row's logits; CE still uses the raw logits.

    Sources: KD: Hinton et al., 2015 (arXiv 1503.02531), section 2. DKD: Zhao et al., 2022 (arXiv
    2203.08679), equation 7. Standardization: Sun et al., 2024 (arXiv 2403.01427), algorithm 1.
    Equals RepDistiller's gamma * CE + alpha * KD with ce_weight = gamma, kd_weight = alpha, and
    torchdistill's KDLoss(T, alpha) with ce_weight = alpha, kd_weight = 1 - alpha. Liger's distillation
    losses have no T^2: kd_weight = w / T^2. attention-transfer's alpha is kd_weight.

    A label out of range raises IndexError on the CPU. On CUDA it gives a NaN loss, because checking it would make the
    host wait for the device. If every row is ignored, the mean is NaN, as in PyTorch, and the gradient is 0.

    `ce_kd_loss_and_parts` also returns the unweighted parts.

    Raises:
        ValueError: shapes differ, or a temperature, smoothing, reduction or variant is invalid.
        TypeError: logits are not floating point, or targets are neither integers nor floating point.
        RuntimeError: the teacher requires grad.
        IndexError: a label is out of range, on the CPU.

    >>> loss = ce_kd_loss(student(x), teacher(x).detach(), y, temperature=4.0)  # doctest: +SKIP
    """
    return _ce_kd(
        student_logits, teacher_logits, target, target_b, lam,
        temperature, ce_weight, kd_weight, label_smoothing, ignore_index,
        variant, dkd_alpha, dkd_beta, standardize, reduction, backend,
    )[0]  # fmt: skip


def ce_kd_loss_and_parts(
    student_logits: Tensor, teacher_logits: Tensor, target: Tensor | None = None, **options: Any
) -> tuple[Tensor, Tensor]:
    """`ce_kd_loss` with the same `options`, and a detached tensor (3,) = (loss, ce, kd) with its unweighted parts."""
    given = inspect.signature(ce_kd_loss).bind(student_logits, teacher_logits, target, **options)
    given.apply_defaults()
    loss, parts = _ce_kd(**given.arguments)
    return loss, parts.detach() if isinstance(parts, Tensor) else torch.tensor(parts, dtype=torch.float32, device="cpu")


def _ce_kd(
    student_logits: Tensor,
    teacher_logits: Tensor,
    target: Tensor | None,
    target_b: Tensor | None,
    lam: Tensor | float | None,
    temperature: float,
    ce_weight: float,
    kd_weight: float,
    label_smoothing: float,
    ignore_index: int,
    variant: str,
    dkd_alpha: float,
    dkd_beta: float,
    standardize: bool,
    reduction: str,
    backend: str,
) -> tuple[Tensor, Any]:
    """See `ce_kd_loss`: the loss, and its parts as a tensor (3,) or three numbers."""
    _check_logits(student_logits, teacher_logits)
    if not temperature > 0:
        raise ValueError(f"temperature is {temperature}; it must be above 0")
    if not 0 <= label_smoothing < 1:
        raise ValueError(f"label_smoothing is {label_smoothing}; it must be in [0, 1)")
    _check_choice("reduction", reduction, REDUCTIONS)
    _check_choice("variant", variant, VARIANTS)
    target, target_b, share = _check_target(student_logits, target, target_b, lam)
    if (variant == "dkd" or standardize) and student_logits.shape[1] < 2:
        raise ValueError("variant='dkd' and standardize=True need 2 classes or more, these logits have 1")
    if variant == "dkd" and (target is None or target.is_floating_point() or target_b is not None):
        raise ValueError("variant='dkd' needs class indices as target and no target_b, because it treats the target "
                         "class separately; use variant='kd' with soft or mixed targets")  # fmt: skip
    backend = _dispatch.resolve(backend, student_logits.device)
    if backend == "triton" and not _tiles.has_ce_kd(student_logits, variant, standardize):
        backend = "reference"
    with_grad = student_logits.requires_grad and torch.is_grad_enabled()
    return _ops.ce_kd(
        student_logits, teacher_logits, target, target_b, share,
        float(temperature), float(ce_weight), float(kd_weight), float(label_smoothing), ignore_index,
        variant, float(dkd_alpha), float(dkd_beta), standardize, reduction, with_grad, backend,
    )  # fmt: skip


def attention_transfer_loss(
    student: Features,
    teacher: Features,
    *,
    p: float = 2.0,
    mode: str = "mean",
    eps: float = 1e-12,
    weights: Sequence[float] | None = None,
    backend: str = "auto",
) -> Tensor:
    """Distance between the student's and the teacher's attention maps, dimensionless.

        q = mean_c |F|^p,  a = q / max(||q||_2, eps) over positions,  u = a_s - a_t
        mode="mean": sum u^2 / (N H W)   "batchmean": sum u^2 / N   "paper": sum_n ||u_n||_2 / N

    Args:
        student, teacher: (N, C, H, W), or sequences of the same length; channel counts may differ. If the sizes
            differ, the larger map is average-pooled to the smaller before the power. The kernel does this without a
            copy if height and width have the same integer ratio.
        p: the power, >= 1.
        weights: one per pair, 1 by default; the result is the weighted sum over pairs.

    Source: Zagoruyko and Komodakis, 2017 (arXiv 1612.03928), equation 2, whose loss is "paper" with
    weight beta / 2; their code, RepDistiller and mdistiller compute "mean" with beta = 1000 per stage.
    A map whose norm is below eps is divided by eps, and its gradient is that of this division.
    Memory traffic, forward and backward: N H W (3 C_s + C_t) elements.

    Raises:
        ValueError: batch sizes differ, p < 1, or the mode is unknown.
        TypeError: features are not floating point.
        RuntimeError: the teacher requires grad.
    """
    if not p >= 1:
        raise ValueError(f"p is {p}; it must be 1 or above for the map to have a gradient")
    _check_choice("mode", mode, MODES)

    def one(s: Tensor, t: Tensor) -> Tensor:
        chosen = _dispatch.resolve(backend, s.device)
        if chosen == "triton" and not _tiles.has_attention(s, t):
            chosen = "reference"
        if s.shape[2:] != t.shape[2:] and not (chosen == "triton" and _tiles.pooling_ratio(s, t)):
            s, t = pooled(s, t)
        return _ops.attention(s, t, float(p), mode, eps, chosen)

    return _over_pairs(one, student, teacher, weights)


def nst_loss(
    student: Features,
    teacher: Features,
    *,
    method: str = "auto",
    teacher_term: bool = True,
    eps: float = 1e-12,
    weights: Sequence[float] | None = None,
    backend: str = "auto",
) -> Tensor:
    """Neuron selectivity transfer: the squared MMD with k(x, y) = (x . y)^2 between channels, dimensionless.

        mean_ij (a_i . a_j)^2 + mean_ij (b_i . b_j)^2 - 2 mean_ij (a_i . b_j)^2,  averaged over samples,

    with a_i, b_j the student's and the teacher's channels over H W, each of length 1. It equals
    1/N sum_n || A^T A / C_s - B^T B / C_t ||_F^2, so it is computed through H W x H W Grams
    (`method="spatial"`) or C x C Grams ("channel"), whichever takes fewer products ("auto"). The
    N x C_s x C_t x H W product of the usual code is never formed.

    Args:
        student, teacher: (N, C, H, W), or sequences of the same length; channel counts may differ. If the sizes
            differ, the larger map is first average-pooled to the smaller, which makes a copy.
        teacher_term: False omits the teacher's constant (second) term. The gradient is the same, there is less
            work, and the loss may be negative.
        eps: the smallest norm a channel is divided by.
        weights: one per pair, 1 by default; the result is the weighted sum over pairs.

    Source: Huang and Wang, 2017 (arXiv 1707.01219), equation 8 with the polynomial kernel d = 2, c = 0.
    RepDistiller's and mdistiller's NSTLoss with beta = 50 is ours with weight 50, summed over stages.

    Raises:
        ValueError: batch sizes differ, or the method is unknown.
        TypeError: features are not floating point.
        RuntimeError: the teacher requires grad.
    """
    _check_choice("method", method, METHODS)

    def one(s: Tensor, t: Tensor) -> Tensor:
        if s.shape[2:] != t.shape[2:]:
            s, t = pooled(s, t)
        how = reference.nst_method(method, s, t, teacher_term)
        chosen = _dispatch.resolve(backend, s.device)
        if chosen == "triton" and not _tiles.has_nst(s, t, how):
            chosen = "reference"
        return _ops.nst(s, t, how, teacher_term, eps, chosen)

    return _over_pairs(one, student, teacher, weights)


def hint_loss(student: Features, teacher: Features, *, weights: Sequence[float] | None = None) -> Tensor:
    """mean (s - t)^2 over all elements: FitNets' hint after the regressor (`HintLoss` has one).

    Args: student, teacher: of the same shape, or sequences of the same length; weights: one per pair, 1 by default.
    Source: Romero et al., 2015 (arXiv 1412.6550), equation 3, whose sum over elements is a mean here and
    in RepDistiller (beta = 100).

    Raises: ValueError if shapes differ; TypeError and RuntimeError as the other losses.
    """

    def one(s: Tensor, t: Tensor) -> Tensor:
        if s.shape != t.shape:
            raise ValueError(f"student has shape {tuple(s.shape)}, teacher {tuple(t.shape)}: a hint compares "
                             "element by element; use HintLoss, which learns a regressor")  # fmt: skip
        dtype = reference.accumulation_dtype(s.dtype)
        return F.mse_loss(s.to(dtype), t.to(dtype))

    return _over_pairs(one, student, teacher, weights)


def similarity_loss(
    student: Features, teacher: Features, *, weights: Sequence[float] | None = None
) -> Tensor:
    """Similarity-preserving distillation: sum (G_s - G_t)^2 / N^2, G the row-normalised N x N Gram.

    Args: student, teacher: (N, ...), one sample per row, other sizes may differ; or sequences of the same length.
    Source: Tung and Mori, 2019 (arXiv 1907.09682), equations 1 to 4; RepDistiller's Similarity with
    beta = 3000 on the last stage, torchdistill's SPKDLoss with reduction="batchmean".

    Raises: ValueError if batch sizes differ; TypeError and RuntimeError as the other losses.
    """

    def gram(feature: Tensor) -> Tensor:
        rows = feature.reshape(feature.shape[0], -1).to(reference.accumulation_dtype(feature.dtype))
        return F.normalize(rows @ rows.mT, dim=1)

    def one(s: Tensor, t: Tensor) -> Tensor:
        with torch.autocast(s.device.type, enabled=False):
            return (gram(s) - gram(t)).square().sum() / s.shape[0] ** 2

    return _over_pairs(one, student, teacher, weights, spatial=False)


def _over_pairs(
    loss: Callable[[Tensor, Tensor], Tensor],
    student: Features,
    teacher: Features,
    weights: Sequence[float] | None,
    spatial: bool = True,
) -> Tensor:
    students = [student] if isinstance(student, Tensor) else list(student)
    teachers = [teacher] if isinstance(teacher, Tensor) else list(teacher)
    if not students or len(students) != len(teachers):
        raise ValueError(f"student has {len(students)} features, teacher {len(teachers)}: "
                         "give the same number of each, 1 or more")  # fmt: skip
    if weights is not None and len(weights) != len(students):
        raise ValueError(f"weights has {len(weights)} numbers for {len(students)} pairs of features")
    terms = []
    for s, t in zip(students, teachers, strict=True):
        _check_features(s, t, spatial)
        terms.append(loss(s, t))
    if weights is not None:
        terms = [weight * term for weight, term in zip(weights, terms, strict=True)]
    total = terms[0]
    for term in terms[1:]:
        total = total + term
    return total


def pooled(student: Tensor, teacher: Tensor) -> tuple[Tensor, ...]:
    """Both features at the smaller height and width, by average pooling."""
    size = (min(student.shape[2], teacher.shape[2]), min(student.shape[3], teacher.shape[3]))
    return tuple(f if f.shape[2:] == size else F.adaptive_avg_pool2d(f, size) for f in (student, teacher))


def _check_choice(name: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ValueError(f"{name} is {value!r}; use one of {', '.join(choices)}")


def _check_floating(name: str, tensor: Tensor) -> None:
    if not tensor.is_floating_point():
        raise TypeError(f"{name} is {tensor.dtype}; convert it to float32, bfloat16 or float16")


def _check_teacher(name: str, tensor: Tensor) -> None:
    if tensor.requires_grad:
        raise RuntimeError(f"{name} requires grad, but no distillation loss trains it: detach it, or run "
                           "the teacher under torch.no_grad()")  # fmt: skip


def _check_features(student: Tensor, teacher: Tensor, spatial: bool) -> None:
    for name, feature in (("student", student), ("teacher", teacher)):
        _check_floating(name, feature)
        if spatial and feature.dim() != 4:
            raise ValueError(f"{name} has shape {tuple(feature.shape)}; it must be (N, C, H, W)")
    if student.shape[0] != teacher.shape[0]:
        raise ValueError(f"student has {student.shape[0]} samples, teacher {teacher.shape[0]}: "
                         f"shapes {tuple(student.shape)} and {tuple(teacher.shape)}")  # fmt: skip
    if student.device != teacher.device:
        raise ValueError(f"student is on {student.device}, teacher on {teacher.device}: move one")
    _check_teacher("teacher", teacher)


def _check_logits(student: Tensor, teacher: Tensor) -> None:
    alike = student.shape == teacher.shape and student.dtype == teacher.dtype and student.device == teacher.device
    if alike and student.dim() == 2 and student.shape[1] and student.is_floating_point() and not teacher.requires_grad:
        return  # a shortcut for the usual case, in half the time
    for name, logits in (("student_logits", student), ("teacher_logits", teacher)):
        _check_floating(name, logits)
        if logits.dim() != 2 or logits.shape[1] == 0:
            raise ValueError(f"{name} has shape {tuple(logits.shape)}; it must be (N, C) with C >= 1")
    for axis, what in ((0, "rows"), (1, "classes")):
        if student.shape[axis] != teacher.shape[axis]:
            raise ValueError(f"teacher_logits has {teacher.shape[axis]} {what}, student_logits "
                             f"{student.shape[axis]}: both must be one shape (N, C)")  # fmt: skip
    if student.device != teacher.device:
        raise ValueError(f"student_logits is on {student.device}, teacher_logits on {teacher.device}: move one")
    _check_teacher("teacher_logits", teacher)


def _check_target(
    logits: Tensor, target: Tensor | None, target_b: Tensor | None, lam: Tensor | float | None
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    if (target_b is None) != (lam is None) or (target_b is not None and target is None):
        raise ValueError("mixup needs target, target_b and lam: give all three, or only target")
    rows = logits.shape[:1]
    for name, labels in (("target", target), ("target_b", target_b)):
        if labels is None:
            continue
        soft = labels.is_floating_point()
        if soft and target_b is not None:
            raise ValueError("mixup mixes class indices; mix probabilities before the call and give only target")
        if labels.dtype == torch.bool or labels.is_complex():
            raise TypeError(f"{name} is {labels.dtype}; give class indices (int64) or probabilities (float)")
        wanted = logits.shape if soft else rows
        if labels.shape != wanted:
            raise ValueError(f"{name} has shape {tuple(labels.shape)}; with logits of shape "
                             f"{tuple(logits.shape)} it must be {tuple(wanted)}")  # fmt: skip
        if labels.device != logits.device:
            raise ValueError(f"{name} is on {labels.device}, the logits on {logits.device}: move one")
    if target is not None and not target.is_floating_point():
        target = target.long()
    if lam is None or target_b is None:
        return target, None, None
    if not isinstance(lam, Tensor):
        lam = torch.full(rows, float(lam), device=logits.device)
    if lam.dim() == 0:
        lam = lam.expand(rows)
    if lam.shape != rows:
        raise ValueError(f"lam has shape {tuple(lam.shape)}; give a float or one share per row {tuple(rows)}")
    return target, target_b.long(), lam.to(logits.device, torch.float32)
