"""Channel counts and operation counts shared by the spaces: plain numbers, no torch.

MACs are multiply-accumulates of convolutions and of the classifier; normalisation, activations, pooling and
additions are not counted. `engine.networks.count_cost` uses the same convention, and the tests compare the two.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import numpy.typing as npt

from engine.trial import MAX_WIDTH, UsageError

# (MACs, parameters, activations) in float64, exact up to 2**53. Activations are convolutions' output values.
Cost = npt.NDArray[np.float64]
# (choices (n, d), classes, width, resolution) -> costs (3, n)
Counts = Callable[[npt.NDArray[np.int8], int, float, int], Cost]

MIN_CHANNELS = 8


def check_width(space: str, width: float) -> None:
    """Raises UsageError for a width multiplier that is not positive, or too large for any device."""
    if not 0 < width <= MAX_WIDTH:
        raise UsageError(
            f"{space}: width={width}; it must be greater than 0 and at most {MAX_WIDTH:g}; 1 is the published size"
        )


def conv_cost(c_in: int, c_out: int, kernel: int, size: int, groups: int = 1, norm: bool = True) -> Cost:
    """Cost (3,) of a convolution without bias whose output is size x size pixels, with its BatchNorm if `norm`."""
    weights = c_in // groups * c_out * kernel**2
    return np.array([weights * size**2, weights + 2 * c_out * norm, c_out * size**2], dtype=np.float64)


def linear_cost(c_in: int, c_out: int) -> Cost:
    """Cost (3,) of a linear layer with bias. The bias adds no MACs, and the outputs do not count as activations."""
    return np.array([c_in * c_out, c_in * c_out + c_out, 0], dtype=np.float64)


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


def chain_cost(choices: npt.NDArray[np.integer], tables: Sequence[npt.NDArray[np.float64]]) -> Cost:
    """Costs (3, n) of architectures (n, 2 * stages) that are sequences of stages.

    Columns 2i and 2i + 1 hold the depth and the width option of stage i. Its cost is tables[i][:, previous width,
    depth, width], since it depends on the other stages only through its input width (tables[0] has a single one).
    """
    total = np.zeros((3, len(choices)))
    previous = np.zeros(len(choices), dtype=np.intp)
    for stage, table in enumerate(tables):
        _, _, depths, options = table.shape
        row = (previous * depths + choices[:, 2 * stage]) * options + choices[:, 2 * stage + 1]
        total += table.reshape(3, -1)[:, row]
        previous = choices[:, 2 * stage + 1].astype(np.intp)
    return total


def macs_and_params(
    counts: Counts, choices: npt.NDArray[np.int8], classes: int, width: float, resolution: int
) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
    """MACs (n,) and parameters (n,), as `SearchSpace.cost` returns them."""
    macs, params, _ = counts(choices, classes, width, resolution)
    return macs, params


def activations(
    counts: Counts, choices: npt.NDArray[np.int8], classes: int, width: float, resolution: int
) -> npt.NDArray[np.float64]:
    """Activations (n,), as `SearchSpace.activations` returns them."""
    found: npt.NDArray[np.float64] = counts(choices, classes, width, resolution)[2]
    return found
