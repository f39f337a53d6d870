"""Distillation losses with closed-form references and fused Triton kernels; needs only PyTorch."""
from kernels.functional import (
    attention_transfer_loss,
    ce_kd_loss,
    ce_kd_loss_and_parts,
    hint_loss,
    nst_loss,
    similarity_loss,
)
from kernels.modules import (
    AttentionTransferLoss,
    CEKDLoss,
    HintLoss,
    NSTLoss,
    SimilarityLoss,
)

__all__ = [
    "AttentionTransferLoss",
    "CEKDLoss",
    "HintLoss",
    "NSTLoss",
    "SimilarityLoss",
    "attention_transfer_loss",
    "ce_kd_loss",
    "ce_kd_loss_and_parts",
    "hint_loss",
    "nst_loss",
    "similarity_loss",
]
