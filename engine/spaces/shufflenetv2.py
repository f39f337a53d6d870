"""ShuffleNetV2 with a choice of depth and width per stage: (3 * 4)**3 = 1,728 networks, the paper's second space.

The units are those of Ma et al., ECCV 2018, arXiv 1807.11164. Each of the 3 stages has 2, 4 or 8 units (4, 8 and 4
are published) and the width of that stage in one of the four published sizes (0.5x, 1x, 1.5x, 2x). The stem keeps
the resolution: one 3x3 convolution of stride 1 and no pooling, for small images.
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

if TYPE_CHECKING:
    from torch import nn

# Channels of each stage in the four published sizes, and its possible numbers of units.
STAGES = ((48, 116, 176, 244), (96, 232, 352, 488), (192, 464, 704, 976))
UNITS = (2, 4, 8)
STEM_CHANNELS = 24
LAST_CHANNELS = 1024
# A unit splits its channels into halves; multiples of 4 keep the published counts.
MULTIPLE = 4


def shufflenetv2(width: float = 1.0) -> SearchSpace:
    """The space with all channels scaled by `width`.

    Features: the output of each stage, at 1/2, 1/4 and 1/8 of the input size. Raises UsageError for a width
    outside (0, MAX_WIDTH].
    """
    check_width("shufflenetv2", width)
    choices: list[Choice] = []
    for number, channels in enumerate(stage_channels(width), start=1):
        choices += [Choice(f"stage{number}.units", UNITS, ordinal=True)]
        choices += [Choice(f"stage{number}.channels", channels, ordinal=True)]
    counts = partial(_counts, width)
    return SearchSpace(
        name=space_name(shufflenetv2, width=width),
        choices=tuple(choices),
        build=partial(_build, width),
        cost=partial(macs_and_params, counts),
        activations=partial(activations, counts),
        layers=partial(layers, counts),
    )


def stage_channels(width: float) -> tuple[tuple[int, ...], ...]:
    """The channels of the four options of each stage at a width multiplier: multiples of 4, at least 8."""
    return tuple(widths(bases, width, MULTIPLE) for bases in STAGES)


def _build(own_width: float, choices: tuple[int, ...], classes: int, width: float) -> nn.Module:
    from engine.networks.shufflenetv2 import network

    scale = own_width * width
    options = zip(stage_channels(scale), choices[::2], choices[1::2], strict=True)
    stages = [(channels[w], UNITS[u]) for channels, u, w in options]
    return network(rounded(STEM_CHANNELS * scale, MULTIPLE), stages, rounded(LAST_CHANNELS * scale, MULTIPLE), classes)


def _counts(own_width: float, choices: IntMatrix, classes: int, width: float, resolution: int, which: slice) -> Cost:
    """The costs `which` (k, n) of architectures (n, 6)."""
    scale = own_width * width
    stem, last = rounded(STEM_CHANNELS * scale, MULTIPLE), rounded(LAST_CHANNELS * scale, MULTIPLE)
    channels = ((stem,), *stage_channels(scale))
    size = resolution
    total = conv_cost(3, stem, 3, size) + linear_cost(last, classes)
    tables = []
    for before, after in pairwise(channels):
        table = np.empty((COSTS, len(before), len(UNITS), len(after)))
        for (i, c_in), (u, units), (o, c_out) in product(enumerate(before), enumerate(UNITS), enumerate(after)):
            table[:, i, u, o] = down_cost(c_in, c_out, size) + (units - 1) * unit_cost(c_out, strided(size))
        tables.append(table)
        size = strided(size)
    tables[-1] += np.stack([conv_cost(c, last, 1, size) for c in channels[-1]], axis=1)[:, None, None, :]
    return chain_cost(choices, tables, which) + total[which, None]


def unit_cost(channels: int, size: int) -> Cost:
    """Cost (COSTS,) of a unit of stride 1, which passes one half of its channels through unchanged."""
    half = channels // 2
    return 2 * conv_cost(half, half, 1, size) + conv_cost(half, half, 3, size, groups=half)


def down_cost(c_in: int, c_out: int, size: int) -> Cost:
    """Cost (COSTS,) of a unit of stride 2 whose input is size x size pixels."""
    half, smaller = c_out // 2, strided(size)
    left = conv_cost(c_in, c_in, 3, smaller, groups=c_in) + conv_cost(c_in, half, 1, smaller)
    right = conv_cost(half, half, 3, smaller, groups=half) + conv_cost(half, half, 1, smaller)
    return left + right + conv_cost(c_in, half, 1, size)
