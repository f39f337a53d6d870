"""Weights that the members of a pretrained space inherit from its largest member, their teacher."""

from __future__ import annotations

from functools import lru_cache

import numpy as np
import torch
from torch import Tensor, nn

from engine.data.loader import eval_batches
from engine.spaces.load import load_space
from engine.training.context import WorkerContext
from engine.training.student import autocast, place, precision
from engine.trial import Architecture

# Images that BatchNorm's statistics are measured on, and how many at a time.
IMAGES, BATCH = 128, 64


def inherited(context: WorkerContext, architecture: Architecture, teacher: nn.Module) -> nn.Module:
    """A member of the space with weights cut out of the trained largest one, ready to be scored or trained.

    Its BatchNorm layers are recalibrated, because channels and blocks are missing.
    """
    inherit = load_space(context.config.space).inherit
    assert inherit is not None
    network = place(inherit(teacher, architecture.choices), context.device).requires_grad_(True)
    recalibrate(network, calibration(context))
    return network


@lru_cache(maxsize=1)
def calibration(context: WorkerContext) -> tuple[Tensor, ...]:
    """Batches (N, 3, R, R) of training images as they are scored, without augmentation; the same for all members."""
    train = context.data.train
    rows = np.sort(np.random.default_rng([context.config.seed, 0xBA7C]).permutation(len(train))[:IMAGES])
    batches = eval_batches(
        train.select(rows),
        data=context.data,
        batch_size=min(BATCH, len(rows)),
        resolution=context.data.resolution,
        device=str(context.device),
        backend=context.config.data_backend,
        threads=context.threads,
    )
    dtype = precision(context.config, context.device)
    return tuple(batch.images.to(dtype, copy=True) for batch in batches)  # the loader may reuse a batch's memory


@torch.no_grad()
def recalibrate(network: nn.Module, batches: tuple[Tensor, ...]) -> None:
    """Replaces the running statistics of all BatchNorm layers by their average over batches."""
    norms = [module for module in network.modules() if isinstance(module, nn.BatchNorm2d)]
    momenta = [norm.momentum for norm in norms]
    network.eval()
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None  # the average over all batches
        norm.train()
    for images in batches:
        with autocast(images):
            network(images)
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum
    network.eval()
