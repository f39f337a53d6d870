"""Chooses the implementation of a call: Triton on CUDA, the closed-form reference elsewhere."""
from __future__ import annotations

import functools
import importlib.util
import os
import warnings
from contextvars import ContextVar

import torch

BACKENDS = ("auto", "triton", "reference")
# Looked up at import: torch.compile cannot trace the lookup in torch 2.11.
TRITON = importlib.util.find_spec("triton") is not None
# Whether the call comes from compiled code. Nothing that such a call allocates may outlive it: with
# mode="reduce-overhead" its memory belongs to a CUDA graph.
COMPILED: ContextVar[bool] = ContextVar("compiled", default=False)


def interpreting() -> bool:
    """Whether Triton interprets its kernels, on CPU tensors; Triton decides this at import."""
    return os.environ.get("TRITON_INTERPRET", "0") == "1"


def resolve(backend: str, device: torch.device) -> str:
    """ "triton" or "reference" for tensors on this device."""
    if backend not in BACKENDS:
        raise ValueError(f"backend is {backend!r}; use one of {', '.join(BACKENDS)}")
    if backend == "triton":
        if not has_triton():
            raise RuntimeError("backend='triton' needs Triton: pip install triton, or use backend='reference'")
        if device.type != "cuda" and not interpreting():
            raise RuntimeError(
                f"backend='triton' needs CUDA tensors, these are on {device}: move them, use "
                "backend='auto', or set TRITON_INTERPRET=1 before Python starts"
            )
        return "triton"
    if backend == "auto" and device.type == "cuda" and has_triton():
        return "triton"
    return "reference"


def has_triton() -> bool:
    """Whether Triton is installed; warns once if it is not."""
    if not TRITON and not torch.compiler.is_compiling():
        _warn()
    return TRITON


@functools.cache
def _warn() -> None:
    warnings.warn(
        "Triton is not installed: the distillation losses use their PyTorch reference on every device",
        RuntimeWarning,
        stacklevel=3,
    )
