"""The cells of NAS-Bench-201 (Dong and Yang, ICLR 2020, arXiv 2001.00326): 5 operations on 6 edges, 15,625 cells.

The skeleton is the benchmark's: a 3x3 stem, three stages of cells at C, 2C and 4C channels with a residual block
of stride 2 before the second and the third, then BN-ReLU, global average pooling and a linear classifier.
"""

from __future__ import annotations

import re
from functools import cache, partial
from itertools import product
from typing import TYPE_CHECKING

import numpy as np

from engine.space import Choice, IntMatrix, SearchSpace, space_name
from engine.spaces.arithmetic import (
    COSTS,
    MIN_CHANNELS,
    Cost,
    activations,
    conv_cost,
    layers,
    linear_cost,
    macs_and_params,
    pool_cost,
    strided,
)
from engine.trial import Architecture, UsageError

if TYPE_CHECKING:
    from torch import nn

# In the order of the benchmark; an edge is (target node, source node), node 0 is the cell's input, 3 its output.
OPERATIONS = ("none", "skip_connect", "nor_conv_1x1", "nor_conv_3x3", "avg_pool_3x3")
EDGES = ((1, 0), (2, 0), (2, 1), (3, 0), (3, 1), (3, 2))
STAGES = 3
MAX_CHANNELS, MAX_CELLS = 512, 50  # a network with as many has 2e9 parameters in each cell

NONE, SKIP, CONV_1X1, CONV_3X3, AVG_POOL = range(len(OPERATIONS))
ZERO = "#"


def nasbench201(channels: int = 16, cells: int = 5) -> SearchSpace:
    """The space with `channels` in its first stage and `cells` in each of its three stages.

    The defaults are the benchmark's. Features: the output of each stage, at 1, 1/2 and 1/4 of the input size.
    Raises UsageError for values below 1, and for more than any device holds.
    """
    for name, value, most in (("channels", channels, MAX_CHANNELS), ("cells", cells, MAX_CELLS)):
        if not 1 <= value <= most:
            raise UsageError(f"nasbench201: {name}={value}; it must be 1 to {most}; the benchmark has 16 and 5")
    counts = partial(_counts, channels, cells)
    return SearchSpace(
        name=space_name(nasbench201, channels=channels, cells=cells),
        choices=tuple(Choice(f"{target}<-{source}", OPERATIONS) for target, source in EDGES),
        build=partial(_build, channels, cells),
        cost=partial(macs_and_params, counts),
        activations=partial(activations, counts),
        layers=partial(layers, counts),
        canonical=canonical,
    )


def stage_channels(channels: int, width: float) -> tuple[int, ...]:
    """Channels of the three stages at a width multiplier: integers, at least 8 unless `channels` is smaller."""
    first = max(min(MIN_CHANNELS, channels), round(channels * width))
    return tuple(first * 2**stage for stage in range(STAGES))


def _build(channels: int, cells: int, choices: tuple[int, ...], classes: int, width: float) -> nn.Module:
    from engine.networks.nasbench201 import network

    operations = tuple(OPERATIONS[choice] for choice in choices)
    return network(operations, EDGES, stage_channels(channels, width), cells, classes)


def _counts(
    channels: int, cells: int, choices: IntMatrix, classes: int, width: float, resolution: int, which: slice
) -> Cost:
    """The costs `which` (k, n) of cells (n, 6): those of the skeleton, and of every operation of a cell, used or not.

    The benchmark counts the same, plus the additions of the classifier's bias: `classes` more MACs.
    """
    counts = {kernel: np.count_nonzero(choices == op, axis=1) for kernel, op in ((1, CONV_1X1), (3, CONV_3X3))}
    on_zeros = _pools_of_zeros(choices)
    pools = np.count_nonzero(choices == AVG_POOL, axis=1) - on_zeros
    size, previous = resolution, 3
    total = np.zeros((COSTS, len(choices)))
    for stage, c in enumerate(stage_channels(channels, width)):
        if stage == 0:
            total += conv_cost(previous, c, 3, size)[:, None]
        else:
            size = strided(size)
            reduction = conv_cost(previous, c, 3, size) + conv_cost(c, c, 3, size)
            total += (reduction + conv_cost(previous, c, 1, size, norm=False))[:, None]
        for kernel, count in counts.items():
            total += cells * conv_cost(c, c, kernel, size)[:, None] * count
        total += cells * (pool_cost(c, size)[:, None] * pools + pool_cost(c, size, True)[:, None] * on_zeros)
        previous = c
    total += linear_cost(previous, classes)[:, None]
    total[1] += 2 * previous  # the last BatchNorm
    return total[which]


def _pools_of_zeros(choices: IntMatrix) -> IntMatrix:
    """How many poolings (n,) of each cell read a node without inputs."""
    empty = {node: np.ones(len(choices), dtype=bool) for node in (1, 2)}
    for place, (target, _) in enumerate(EDGES):
        if target in empty:
            empty[target] &= choices[:, place] == NONE
    zeros = [empty[s] & (choices[:, at] == AVG_POOL) for at, (_, s) in enumerate(EDGES) if s in empty]
    return np.sum(zeros, axis=0, dtype=np.int8)


def canonical(choices: tuple[int, ...]) -> tuple[int, ...]:
    """The representative of all cells isomorphic to this one: the member with the fewest operations to compute.

    Isomorphism is defined as in the benchmark (`to_unique_str` of its code, zeros considered): a skip equals its
    source, a zero stays zero through any operation, and the order of a sum does not matter. 6,466 of 15,625 remain.
    """
    return _representatives()[choices]


@cache
def _representatives() -> dict[tuple[int, ...], tuple[int, ...]]:
    cells = list(product(range(len(OPERATIONS)), repeat=len(EDGES)))
    expressions = {cell: _expression(cell) for cell in cells}
    # Some members have convolutions that do not reach the output; the cheapest has none.
    cheapest: dict[str, tuple[int, ...]] = {}
    for cell in sorted(cells, key=_work):
        cheapest.setdefault(expressions[cell], cell)
    return {cell: cheapest[expression] for cell, expression in expressions.items()}


def _work(cell: tuple[int, ...]) -> tuple[int, int]:
    """The sort key in a class: multiplications per pixel and channel, then the number of operations other than none."""
    return 9 * cell.count(CONV_3X3) + cell.count(CONV_1X1), len(cell) - cell.count(NONE)


def _expression(cell: tuple[int, ...]) -> str:
    """What a cell computes, as text. Sums have no brackets, as in the benchmark, whose classes depend on that."""
    nodes = {0: "x"}
    for node in (1, 2, 3):
        terms = []
        for (target, source), op in zip(EDGES, cell, strict=True):
            if target != node:
                continue
            if op == NONE or nodes[source] == ZERO:
                terms.append(ZERO)
            else:
                terms.append(nodes[source] if op == SKIP else f"({nodes[source]})@{OPERATIONS[op]}")
        nodes[node] = "+".join(sorted(terms))
    return nodes[3]


def to_string(architecture: Architecture) -> str:
    """The benchmark's name of a cell, like |none~0|+|skip_connect~0|none~1|+|none~0|none~1|nor_conv_3x3~2|."""
    nodes: dict[int, str] = {}
    for (target, source), op in zip(EDGES, architecture.choices, strict=True):
        nodes[target] = nodes.get(target, "|") + f"{OPERATIONS[op]}~{source}|"
    return "+".join(nodes.values())


def from_string(text: str) -> Architecture:
    """The inverse of `to_string`; raises UsageError for anything else."""
    names = re.findall(r"\|?([a-z0-9_]+)~\d", text)
    if len(names) == len(EDGES) and set(names) <= set(OPERATIONS):
        architecture = Architecture(tuple(OPERATIONS.index(name) for name in names))
        if to_string(architecture) == text:
            return architecture
    example = to_string(Architecture((CONV_3X3,) * len(EDGES)))
    raise UsageError(f"'{text}' is not a NAS-Bench-201 cell; write it like {example} with {', '.join(OPERATIONS)}")
