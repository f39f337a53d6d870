"""The losses as `nn.Module`s, for code that builds its criterion once. `repr` shows every option."""
from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from kernels import functional


class _Configured(nn.Module):
    """Keeps keyword arguments, and checks their names when it is built, not at the first batch."""

    def __init__(self, loss: Any, options: dict[str, Any]) -> None:
        super().__init__()
        accepted = loss.__kwdefaults__
        unknown = sorted(set(options) - set(accepted))
        if unknown:
            raise TypeError(f"{type(self).__name__} has no option {', '.join(unknown)}; "
                            f"it has {', '.join(accepted)}")  # fmt: skip
        self.options = {**accepted, **options}

    def extra_repr(self) -> str:
        return ", ".join(f"{name}={value!r}" for name, value in self.options.items())


class CEKDLoss(_Configured):
    """`ce_kd_loss` with fixed keyword options; target_b and lam come with each batch."""

    def __init__(self, **options: Any) -> None:
        super().__init__(functional.ce_kd_loss, options)
        for by_batch in ("target_b", "lam"):
            if self.options.pop(by_batch) is not None:
                raise TypeError(f"{by_batch} changes with the batch: pass it to the call")

    def forward(
        self,
        student_logits: Tensor,
        teacher_logits: Tensor,
        target: Tensor | None = None,
        target_b: Tensor | None = None,
        lam: Tensor | float | None = None,
    ) -> Tensor | tuple[Tensor, Tensor]:
        return functional.ce_kd_loss(
            student_logits, teacher_logits, target, target_b=target_b, lam=lam, **self.options
        )


class AttentionTransferLoss(_Configured):
    """`attention_transfer_loss` with fixed keyword options."""

    def __init__(self, **options: Any) -> None:
        super().__init__(functional.attention_transfer_loss, options)

    def forward(self, student: functional.Features, teacher: functional.Features) -> Tensor:
        return functional.attention_transfer_loss(student, teacher, **self.options)


class NSTLoss(_Configured):
    """`nst_loss` with fixed keyword options."""

    def __init__(self, **options: Any) -> None:
        super().__init__(functional.nst_loss, options)

    def forward(self, student: functional.Features, teacher: functional.Features) -> Tensor:
        return functional.nst_loss(student, teacher, **self.options)


class SimilarityLoss(nn.Module):
    """`similarity_loss`."""

    def forward(self, student: functional.Features, teacher: functional.Features) -> Tensor:
        return functional.similarity_loss(student, teacher)


class HintLoss(nn.Module):
    """`hint_loss` after a learnt 1x1 convolution from the student's channels to the teacher's.

    Pass its parameters to the optimizer. If the maps differ in size, the larger is average-pooled to the
    smaller (Romero et al., 2015, arXiv 1412.6550, section 2.2).
    """

    def __init__(self, student_channels: int, teacher_channels: int) -> None:
        super().__init__()
        self.regressor = nn.Conv2d(student_channels, teacher_channels, 1)

    def forward(self, student: Tensor, teacher: Tensor) -> Tensor:
        student, teacher = functional.pooled(student, teacher)
        return functional.hint_loss(self.regressor(student), teacher)
