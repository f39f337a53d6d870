"""Channel counts and operation counts shared by the spaces: plain numbers, no torch.

MACs are multiply-accumulates of convolutions and of the classifier; normalisation, activations, pooling and
additions are not counted. `engine.networks.count_cost` uses the same convention, and the tests compare the two.
What layers do, from which latency is predicted, is counted by kind of layer.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal

import numpy as np
import numpy.typing as npt

from engine.trial import MAX_WIDTH, UsageError

# MACs, parameters and activations, then the MEASURES of each kind of layer; in float64, exact up to 2**53. Activations
# are convolutions' output values. A constant pooling pools zeros, which runtimes do not notice: onnxruntime takes ten
# times as long for it, since it keeps only the outputs of convolutions in the layout that its pooling is fast in.
Cost = npt.NDArray[np.float64]
Kind = Literal["convolution", "pointwise", "depthwise", "pooling", "constant pooling"]
KINDS: tuple[Kind, ...] = ("convolution", "pointwise", "depthwise", "pooling", "constant pooling")
MEASURES = ("layers", "MACs", "values read and written", "weights")
COSTS = 3 + len(KINDS) * len(MEASURES)
MACS_AND_PARAMS, ACTIVATIONS, LAYERS = slice(0, 2), slice(2, 3), slice(3, COSTS)
# (choices (n, d), classes, width, resolution, which costs) -> those costs (k, n)
Counts = Callable[[npt.NDArray[np.int8], int, float, int, slice], Cost]

MIN_CHANNELS = 8


def check_width(space: str, width: float) -> None:
    """Raises UsageError for a width multiplier that is not positive, or too large for any device."""
    if not 0 < width <= MAX_WIDTH:
        raise UsageError(
            f"{space}: width={width}; it must be greater than 0 and at most {MAX_WIDTH:g}; 1 is the published size"
        )


def conv_cost(c_in: int, c_out: int, kernel: int, size: int, groups: int = 1, norm: bool = True) -> Cost:
    """Cost (COSTS,) of a convolution without bias whose output is size x size pixels, with its BatchNorm if `norm`."""
    weights = c_in // groups * c_out * kernel**2
    kind: Kind = "depthwise" if groups > 1 else "pointwise" if kernel == 1 else "convolution"
    cost = layer_cost(kind, weights * size**2, (c_in + c_out) * size**2, weights)
    cost[:3] = weights * size**2, weights + 2 * c_out * norm, c_out * size**2
    return cost


def layer_cost(kind: Kind, macs: float, values: float, weights: float) -> Cost:
    """Cost (COSTS,) of a layer of which nothing is counted but what the layers of its kind do."""
    cost = np.zeros(COSTS)
    start = 3 + KINDS.index(kind) * len(MEASURES)
    cost[start : start + len(MEASURES)] = 1, macs, values, weights
    return cost


def pool_cost(channels: int, size: int, constant: bool = False) -> Cost:
    """Cost (COSTS,) of a pooling of stride 1 over size x size pixels."""
    return layer_cost("constant pooling" if constant else "pooling", 0, 2 * channels * size**2, 0)


def linear_cost(c_in: int, c_out: int) -> Cost:
    """Cost (COSTS,) of a linear layer with bias. The bias adds no MACs, and the outputs do not count as activations."""
    cost = layer_cost("pointwise", c_in * c_out, c_in + c_out, c_in * c_out)
    cost[:3] = c_in * c_out, c_in * c_out + c_out, 0
    return cost


def strided(size: int, stride: int = 2) -> int:
    """Output size, in pixels, of a padded 3x3 convolution: odd sizes round up, 1 stays 1."""
    return -(-size // stride)


def rounded(channels: float, multiple: int) -> int:
    """The nearest multiple, at least 8 and at most a tenth below `channels`, as in MobileNetV2's code."""
    nearest = max(MIN_CHANNELS, int(channels + multiple / 2) // multiple * multiple)
    return nearest if nearest >= 0.9 * channels else nearest + multiple


def widths(bases: Sequence[float], width: float, multiple: int) -> tuple[int, ...]:
    """Channel counts of the options of one choice at a width multiplier, rounded and strictly increasing.

    If a small multiplier rounds two neighbours to the same count, the wider one gets one more multiple, so that two
    options never give the same network.
    """
    counts: list[int] = []
    for base in bases:
        channels = rounded(base * width, multiple)
        counts.append(max(channels, counts[-1] + multiple) if counts else channels)
    return tuple(counts)


def chain_cost(choices: npt.NDArray[np.integer], tables: Sequence[npt.NDArray[np.float64]], which: slice) -> Cost:
    """The costs `which` (k, n) of architectures (n, 2 * stages) that are sequences of stages.

    Columns 2i and 2i + 1 hold the depth and the width option of stage i. Its cost is tables[i][:, previous width,
    depth, width], since it depends on the other stages only through its input width (tables[0] has a single one).
    """
    total = np.zeros((len(range(COSTS)[which]), len(choices)))
    previous = np.zeros(len(choices), dtype=np.intp)
    for stage, table in enumerate(tables):
        _, _, depths, options = table.shape
        row = (previous * depths + choices[:, 2 * stage]) * options + choices[:, 2 * stage + 1]
        total += table.reshape(COSTS, -1)[which][:, row]
        previous = choices[:, 2 * stage + 1].astype(np.intp)
    return total


def macs_and_params(
    counts: Counts, choices: npt.NDArray[np.int8], classes: int, width: float, resolution: int
) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
    """MACs (n,) and parameters (n,), as `SearchSpace.cost` returns them."""
    macs, params = counts(choices, classes, width, resolution, MACS_AND_PARAMS)
    return macs, params


def activations(
    counts: Counts, choices: npt.NDArray[np.int8], classes: int, width: float, resolution: int
) -> npt.NDArray[np.float64]:
    """Activations (n,), as `SearchSpace.activations` returns them."""
    found: npt.NDArray[np.float64] = counts(choices, classes, width, resolution, ACTIVATIONS)[0]
    return found


def layers(
    counts: Counts, choices: npt.NDArray[np.int8], classes: int, width: float, resolution: int
) -> npt.NDArray[np.float64]:
    """What the layers of each kind do (n, f), as `SearchSpace.layers` returns it."""
    return counts(choices, classes, width, resolution, LAYERS).T
