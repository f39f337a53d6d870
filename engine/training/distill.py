"""The loss that a student minimises: the terms that a fidelity names, with the weights of the configuration."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from engine.config import SearchConfig
from engine.trial import KDLoss
from kernels import HintLoss, attention_transfer_loss, ce_kd_loss, nst_loss, similarity_loss

# What a student or teacher returns: logits (N, classes) and stage features [(N, C_i, H_i, W_i)], coarsest last.
Output = tuple[Tensor, Sequence[Tensor]]


class FeatureKey(NamedTuple):
    """A teacher's stage that a loss reads: the whole feature, or only its attention map."""

    stage: int
    attention: bool


class TeacherOutput(NamedTuple):
    """What students learn from in a step: the teacher's logits (N, classes), and the features that the losses read."""

    logits: Tensor
    features: Mapping[FeatureKey, Tensor]

    def map(self, change: Callable[[Tensor], Tensor]) -> TeacherOutput:
        """The same output with every tensor changed."""
        return TeacherOutput(change(self.logits), {key: change(value) for key, value in self.features.items()})

    @property
    def tensors(self) -> list[Tensor]:
        return [self.logits, *self.features.values()]


def pair(student: Sequence[torch.Size], teacher: Sequence[torch.Size]) -> list[tuple[int, int]]:
    """Which stage of the student learns from which of the teacher: (student index, teacher index), finest first.

    Shapes are (N, C, H, W). Stages are paired by spatial size; if several have the same size, the last one counts.
    If student and teacher share no size, their coarsest stages are paired, and the losses pool the larger map.
    """
    last_student = {tuple(shape[2:]): index for index, shape in enumerate(student)}
    last_teacher = {tuple(shape[2:]): index for index, shape in enumerate(teacher)}
    shared = [(last_student[size], last_teacher[size]) for size in last_student if size in last_teacher]
    return sorted(shared) or [(len(student) - 1, len(teacher) - 1)]


def teacher_output(teacher: Output, feature_keys: Collection[FeatureKey]) -> TeacherOutput:
    """What the losses read of a teacher's output: features (N, C, H, W), or their attention maps (N, 1, H, W) in fp32.

    The map is sqrt(mean over channels of F^2), which has the same attention as F. Computing it once per cohort, not
    once per student, saves time, and it is small enough to cache.
    """
    logits, features = teacher
    return TeacherOutput(logits, {key: _read(features, key) for key in sorted(feature_keys)})


def _read(features: Sequence[Tensor], key: FeatureKey) -> Tensor:
    feature = features[key.stage]
    if not key.attention:
        return feature
    return torch.linalg.vector_norm(feature, dim=1, keepdim=True, dtype=torch.float32) / feature.shape[1] ** 0.5


class Objective(nn.Module):
    """The loss of a fidelity. It is a module because the hint loss trains a 1x1 convolution along with the student.

    `feature_keys` lists the teacher features that `forward` reads.
    """

    def __init__(self, config: SearchConfig, kd_loss: KDLoss, student: Output, teacher: Output | None) -> None:
        """`student` and `teacher` are outputs for one example batch; only their shapes are used."""
        super().__init__()
        self.config = config
        self.terms = frozenset(kd_loss.split("+")) - {"none"}
        self.pairs: list[tuple[int, int]] = []
        self.feature_keys: list[FeatureKey] = []
        self.hint: HintLoss | None = None
        if self.terms:
            if teacher is None:
                raise ValueError(f"the loss {kd_loss} needs a teacher's outputs")
            self.pairs = pair([f.shape for f in student[1]], [f.shape for f in teacher[1]])
        if "hint" in self.terms and teacher is not None:
            # FitNets guides a middle layer (arXiv 1412.6550, section 2.2).
            self.pairs = [self.pairs[len(self.pairs) // 2]]
            ((mine, theirs),) = self.pairs
            self.hint = HintLoss(student[1][mine].shape[1], teacher[1][theirs].shape[1])
        if self.terms <= {"kd"} or teacher is None:
            self.pairs = []
        elif "similarity" in self.terms:
            self.pairs = self.pairs[-1:]
        for mine, theirs in self.pairs:
            # Maps of different sizes are pooled before their attention is taken, so the loss needs the features.
            same_size = teacher is not None and student[1][mine].shape[2:] == teacher[1][theirs].shape[2:]
            self.feature_keys.append(FeatureKey(theirs, "at" in self.terms and same_size))

    def forward(self, student: Output, teacher: TeacherOutput | None, labels: Tensor) -> Tensor:
        """The weighted sum of the terms, a scalar in fp32. `teacher` may be None if no term needs it."""
        config, (logits, features) = self.config, student
        if teacher is None or not self.terms:
            return nn.functional.cross_entropy(logits.float(), labels, label_smoothing=config.label_smoothing)
        loss = ce_kd_loss(
            logits,
            teacher.logits,
            labels,
            temperature=config.kd_temperature,
            ce_weight=config.ce_weight,
            kd_weight=config.kd_weight if "kd" in self.terms else 0.0,
            label_smoothing=config.label_smoothing,
        )
        mine, theirs = [features[s] for s, _ in self.pairs], [teacher.features[key] for key in self.feature_keys]
        if "at" in self.terms:
            loss = loss + config.at_weight * attention_transfer_loss(mine, theirs)
        if "nst" in self.terms:
            loss = loss + config.nst_weight * nst_loss(mine, theirs)
        if self.hint is not None:
            # In fp32: its convolution is outside the mixed precision of the networks.
            loss = loss + config.hint_weight * self.hint(mine[0].float(), theirs[0].float())
        if "similarity" in self.terms:
            loss = loss + config.similarity_weight * similarity_loss(mine[-1], theirs[-1])
        return loss
