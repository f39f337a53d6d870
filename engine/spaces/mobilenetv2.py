"""MobileNetV2 with a choice of depth and width per stage: 8**7 = 2,097,152 networks, the paper's first space.

The skeleton (expansions, strides, base widths) is that of Sandler et al., CVPR 2018, arXiv 1801.04381, table 2,
with a stem of stride 1 for small images. Each of the 7 stages has 1 to 4 blocks and one of two widths, as in
Trofimov et al., arXiv 2006.08341.
"""

from __future__ import annotations

from functools import partial
from itertools import pairwise, product
from typing import TYPE_CHECKING

import numpy as np

from engine.space import Choice, IntMatrix, SearchSpace, space_name
from engine.spaces.arithmetic import (
    COSTS,
    Cost,
    activations,
    chain_cost,
    check_width,
    conv_cost,
    layers,
    linear_cost,
    macs_and_params,
    rounded,
    strided,
    widths,
)
from engine.trial import UsageError

if TYPE_CHECKING:
    from torch import nn

# (expansion, base channels, stride) of each stage.
STAGES = ((1, 16, 1), (6, 24, 2), (6, 32, 2), (6, 64, 2), (6, 96, 1), (6, 160, 2), (6, 320, 1))
REPEATS = (1, 2, 3, 4)
# The published width, and half as much again: the median over the stages of the authors' 100 measured networks.
MULTIPLIERS = (1.0, 1.5)
STEM_CHANNELS = 32
LAST_CHANNELS = 1280
MULTIPLE = 8


def mobilenetv2(width: float = 1.0, stem_stride: int = 1) -> SearchSpace:
    """The space with all channels scaled by `width`; `stem_stride` is 1 for small images, 2 as published.

    Features: the last block of each resolution, at 1, 1/2, 1/4, 1/8 and 1/16 of the size after the stem.
    Raises UsageError for a width outside (0, MAX_WIDTH] and for another stride.
    """
    check_width("mobilenetv2", width)
    if stem_stride not in (1, 2):
        raise UsageError(f"mobilenetv2: stem_stride={stem_stride}; use 1 (images up to 64 px) or 2")
    choices: list[Choice] = []
    for number, channels in enumerate(stage_channels(width), start=1):
        choices += [Choice(f"stage{number}.repeats", REPEATS, ordinal=True)]
        choices += [Choice(f"stage{number}.channels", channels, ordinal=True)]
    counts = partial(_counts, width, stem_stride)
    return SearchSpace(
        name=space_name(mobilenetv2, width=width, stem_stride=stem_stride),
        choices=tuple(choices),
        build=partial(_build, width, stem_stride),
        cost=partial(macs_and_params, counts),
        activations=partial(activations, counts),
        layers=partial(layers, counts),
    )


def stage_channels(width: float) -> tuple[tuple[int, ...], ...]:
    """The channels of the two options of each stage at a width multiplier: multiples of 8, at least 8."""
    return tuple(widths([base * m for m in MULTIPLIERS], width, MULTIPLE) for _, base, _ in STAGES)


def _build(own_width: float, stem_stride: int, choices: tuple[int, ...], classes: int, width: float) -> nn.Module:
    from engine.networks.mobilenetv2 import network

    scale = own_width * width
    options = zip(STAGES, stage_channels(scale), choices[::2], choices[1::2], strict=True)
    stages = [(expansion, channels[w], REPEATS[r], stride) for (expansion, _, stride), channels, r, w in options]
    return network(rounded(STEM_CHANNELS * scale, MULTIPLE), stem_stride, stages, last_channels(scale), classes)


def last_channels(width: float) -> int:
    """Channels of the last 1x1 convolution."""
    return rounded(LAST_CHANNELS * width, MULTIPLE)


def _counts(
    own_width: float, stem_stride: int, choices: IntMatrix, classes: int, width: float, resolution: int, which: slice
) -> Cost:
    """The costs `which` (k, n) of architectures (n, 14)."""
    scale = own_width * width
    stem = rounded(STEM_CHANNELS * scale, MULTIPLE)
    channels = ((stem,), *stage_channels(scale))
    size = strided(resolution, stem_stride)
    total = conv_cost(3, stem, 3, size)
    tables = []
    for (expansion, _, stride), (before, after) in zip(STAGES, pairwise(channels), strict=True):
        table = np.empty((COSTS, len(before), len(REPEATS), len(after)))
        for (i, c_in), (r, repeats), (o, c_out) in product(enumerate(before), enumerate(REPEATS), enumerate(after)):
            first = block_cost(c_in, c_out, expansion, stride, size)
            rest = block_cost(c_out, c_out, expansion, 1, strided(size, stride))
            table[:, i, r, o] = first + (repeats - 1) * rest
        tables.append(table)
        size = strided(size, stride)
    last = last_channels(scale)
    total = total + linear_cost(last, classes)
    tables[-1] += np.stack([conv_cost(c, last, 1, size) for c in channels[-1]], axis=1)[:, None, None, :]
    return chain_cost(choices, tables, which) + total[which, None]


def block_cost(c_in: int, c_out: int, expansion: int, stride: int, size: int) -> Cost:
    """Cost (COSTS,) of an inverted residual block whose input is size x size pixels."""
    hidden, smaller = c_in * expansion, strided(size, stride)
    cost = conv_cost(hidden, hidden, 3, smaller, groups=hidden) + conv_cost(hidden, c_out, 1, smaller)
    return cost + conv_cost(c_in, hidden, 1, size) if expansion > 1 else cost
