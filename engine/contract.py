"""What a network owes the engine: logits and stage features of the right shapes. Said before anything is trained."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from engine.space import load_space
from engine.trial import Architecture, UsageError


def check_space(spec: str, classes: int, width: float, resolution: int, kd_losses: set[str]) -> None:
    """Builds the first and the last member of a space and runs them; UsageError says what is wrong with either."""
    space = load_space(spec)
    for architecture in (space.at(0), space.at(len(space) - 1)):
        _check_member(spec, architecture, classes, width, resolution, kd_losses)


def _check_member(
    spec: str, architecture: Architecture, classes: int, width: float, resolution: int, kd_losses: set[str]
) -> None:
    def refuse(what: str) -> UsageError:
        return UsageError(f"--space {spec}, architecture {architecture}: {what}")

    try:
        network = load_space(spec).build(architecture.choices, classes, width)
    except Exception as error:
        raise refuse(f"build raised {type(error).__name__}: {error}") from error
    if not isinstance(network, nn.Module):
        raise refuse(f"build returned {type(network).__name__}; it must return an nn.Module")
    try:
        with torch.no_grad():
            output = network.eval()(torch.zeros(2, 3, resolution, resolution))
    except Exception as error:
        why = f"{type(error).__name__}: {error}"
        raise refuse(f"forward of images (2, 3, {resolution}, {resolution}) raised {why}") from error
    wanted = f"it must return (logits (N, {classes}), [features (N, C, H, W)])"
    if not isinstance(output, tuple) or len(output) != 2:
        raise refuse(f"forward returned {type(output).__name__}; {wanted}")
    logits, features = output
    if not isinstance(logits, Tensor) or logits.shape != (2, classes):
        raise refuse(f"forward returned logits {_shape(logits)} for 2 images; {wanted}")
    if not isinstance(features, list | tuple) or any(not isinstance(f, Tensor) or f.dim() != 4 for f in features):
        found = ", ".join(map(_shape, features)) if isinstance(features, list | tuple) else _shape(features)
        raise refuse(f"forward returned features {found}; {wanted}")
    needing = sorted(kd_losses - {"none", "kd"})
    if needing and not features:
        raise refuse(f"forward returns no features, which the loss {needing[0]} needs; add them, or take kd-loss kd")


def _shape(value: object) -> str:
    return str(tuple(value.shape)) if isinstance(value, Tensor) else type(value).__name__
