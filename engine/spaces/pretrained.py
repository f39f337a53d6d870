"""Networks cut from one pretrained network: smaller input, fewer hidden channels, fewer blocks, inherited weights.

Every member starts from the weights of the largest one, fine-tuned on the data, so that short trainings go far. The
residual streams keep their channels, because cutting them costs most accuracy.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from engine.space import Choice, FloatArray, IntMatrix, SearchSpace
from engine.trial import UsageError

if TYPE_CHECKING:
    from torch import nn

    from engine.networks.cut import Cut

# Options, as shares: of the side of the images, and of the hidden channels of a stage.
SIDES = (0.36, 0.43, 0.5, 0.57, 0.64, 0.71, 0.86, 1.0)
WIDTHS = (0.4, 0.55, 0.7, 0.85, 1.0)
POOL = 2**16


@dataclass(frozen=True)
class Layout:
    """The options of a space: sides, and for each stage of the network its widths and how many blocks it has."""

    sides: tuple[float, ...]
    widths: tuple[tuple[float, ...], ...]
    blocks: tuple[int, ...]

    def choices(self) -> tuple[Choice, ...]:
        """The sides, then widths and blocks of each stage; options are in ascending order, single ones left out."""
        found = [Choice("side", self.sides, ordinal=True)]
        for stage, (widths, blocks) in enumerate(zip(self.widths, self.blocks, strict=True), 1):
            found.append(Choice(f"width{stage}", widths, ordinal=True))
            found.append(Choice(f"blocks{stage}", tuple(range(1, blocks + 1)), ordinal=True))
        return tuple(choice for choice in found if len(choice.options) > 1)

    def expand(self, choices: IntMatrix) -> IntMatrix:
        """Option indices (n, 1 + 2 stages) of every choice, those with a single option included."""
        counts = [len(self.sides)]
        for widths, blocks in zip(self.widths, self.blocks, strict=True):
            counts += [len(widths), blocks]
        whole = np.zeros((len(choices), len(counts)), dtype=np.int8)
        whole[:, np.array(counts) > 1] = choices
        return whole

    def cut(self, choices: Sequence[int]) -> Cut:
        """What an architecture leaves of the network."""
        from engine.networks.cut import Cut

        side, *rest = self.expand(np.array([choices], dtype=np.int8))[0].tolist()
        widths = tuple(own[index] for own, index in zip(self.widths, rest[::2], strict=True))
        return Cut(self.sides[side], widths, tuple(index + 1 for index in rest[1::2]))

    def families(self) -> dict[str, IntMatrix]:
        """Lower input resolutions alone, and one width for all stages, at any resolution."""
        choices = self.choices()
        largest = [len(choice.options) - 1 for choice in choices]
        sides = range(len(self.sides)) if choices[0].name == "side" else ()
        lower = [[side, *largest[1:]] for side in sides[:-1]]
        uniform = []
        for side, width in product(sides or (0,), sorted({w for own in self.widths for w in own if w < 1})):
            row = [side if choice.name == "side" else top for choice, top in zip(choices, largest, strict=True)]
            for place, choice in enumerate(choices):
                if choice.name.startswith("width"):
                    row[place] = int(np.abs(np.array(choice.options, dtype=float) - width).argmin())
            uniform.append(row)
        named = {"lower resolution": lower, "uniform width": uniform}
        return {name: np.unique(np.array(rows, dtype=np.int8), axis=0) for name, rows in named.items() if rows}


def pretrained(network: str, min_side: float = SIDES[0], min_width: float = WIDTHS[0]) -> SearchSpace:
    """The space of the cuts of `network`, torchvision:NAME or timm:NAME.

    Choices: the share of the side of the images that the network sees, at least `min_side`; for each stage the share of
    its hidden channels, at least `min_width`, and the number of its blocks. Raises UsageError for a network that cannot
    be cut.
    """
    options = {"min_side": (min_side, SIDES[0]), "min_width": (min_width, WIDTHS[0])}
    for name, (value, _) in options.items():
        if not 0 < value <= 1:
            raise UsageError(f"space pretrained: {name} is {value}; it is a share, over 0 and at most 1")
    layout = _layout(network, min_side, min_width)
    given = [f"{name}={value}" for name, (value, default) in options.items() if value != default]
    return SearchSpace(
        name=",".join([f"pretrained:{network}", *given]),
        choices=layout.choices(),
        build=partial(_build, network, layout),
        cost=partial(_cost, network, layout),
        activations=partial(_activations, network, layout),
        start=partial(_start, network),
        inherit=partial(_inherit, network, layout),
        families=layout.families(),
        pool=POOL,
    )


@lru_cache(maxsize=8)
def _layout(network: str, min_side: float, min_width: float) -> Layout:
    from engine.networks.cut import kept_channels
    from engine.networks.pretrained import template

    sides = tuple(side for side in SIDES if side >= min_side)
    widths, blocks = [], []
    for stage in template(network, 2).stages:
        groups = [group.channels for block in stage for group in block.groups]
        # Of widths that leave the same channels, one is enough.
        kept = {tuple(kept_channels(c, width) for c in groups): width for width in WIDTHS if width >= min_width}
        widths.append(tuple(kept.values()))
        blocks.append(len(stage))
    return Layout(sides, tuple(widths), tuple(blocks))


def _check_width(network: str, width: float) -> None:
    if width != 1:
        raise UsageError(f"pretrained:{network} has no width multiplier, its choices are widths; leave out --low.width")


def _build(network: str, layout: Layout, choices: tuple[int, ...], classes: int, width: float) -> nn.Module:
    from engine.networks.pretrained import template, untrained

    _check_width(network, width)
    return untrained(template(network, classes), layout.cut(choices))


def _start(network: str, classes: int, weights: Path | None) -> nn.Module:
    from engine.networks.pretrained import start

    return start(network, classes, weights)


def _inherit(network: str, layout: Layout, trained: nn.Module, choices: tuple[int, ...]) -> nn.Module:
    from engine.networks.cut import cut
    from engine.networks.pretrained import template

    return cut(trained, template(network, 2).stages, layout.cut(choices))


def _cost(
    network: str, layout: Layout, choices: IntMatrix, classes: int, width: float, resolution: int
) -> tuple[FloatArray, FloatArray]:
    macs, params, _ = _counts(network, layout, choices, classes, width, resolution)
    return macs, params


def _activations(
    network: str, layout: Layout, choices: IntMatrix, classes: int, width: float, resolution: int
) -> FloatArray:
    found: FloatArray = _counts(network, layout, choices, classes, width, resolution)[2]
    return found


def _counts(
    network: str, layout: Layout, choices: IntMatrix, classes: int, width: float, resolution: int
) -> FloatArray:
    """(MACs, parameters, activations) (3, n)."""
    _check_width(network, width)
    outside, tables = _tables(network, layout, classes, resolution)
    side, *rest = layout.expand(choices).astype(np.intp).T
    total = outside[:, side]
    for table, widths, blocks in zip(tables, rest[::2], rest[1::2], strict=True):
        total = total + table[:, side, widths, blocks]
    return total


@lru_cache(maxsize=4)
def _tables(network: str, layout: Layout, classes: int, resolution: int) -> tuple[FloatArray, list[FloatArray]]:
    from engine.networks.plain import downsampled
    from engine.networks.pretrained import cut_costs, template

    sides = tuple(downsampled(resolution, side) for side in layout.sides)
    return cut_costs(network, template(network, classes), sides, layout.widths)
