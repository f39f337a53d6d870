"""Search spaces: named choices, their encoding as arrays, and the candidates that a method chooses from."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from engine.trial import Architecture, UsageError

if TYPE_CHECKING:
    from torch import nn

IntMatrix = npt.NDArray[np.int8]
FloatArray = npt.NDArray[np.float64]


# How the names of trends of candidates begin: scores of untrained networks, and latencies on a device.
PROXY, LATENCY = "proxy:", "latency:"


@dataclass(frozen=True)
class Choice:
    """One choice of a space. `ordinal`: its options are ordered (depth, width); else they are operations."""

    name: str
    options: tuple[str | int | float, ...]
    ordinal: bool = False


@dataclass(frozen=True)
class SearchSpace:
    """Named choices, and how to build the networks that they describe.

    build(choices, classes, width) returns an nn.Module whose forward takes images (N, 3, H, W) and returns
    (logits (N, classes), [stage features (N, C_i, H_i, W_i)], coarsest last).
    cost(choices (n, d), classes, width, resolution) returns (macs (n,), params (n,)) in closed form. Without it (None)
    both are counted on built networks, which is slow, so a random pool represents the space.
    activations, with the arguments of cost, returns the number of outputs (n,) of all convolutions. It may be None too,
    and is then counted (engine.networks.activations). layers, with the same arguments, returns sums (n, f) over the
    layers of each network, like the MACs of its depthwise convolutions, which a prediction of its latency weighs; None
    leaves that to MACs, parameters and the encoding.
    canonical(choices) maps all members of a class of identical networks to one of them.

    A space whose members are cut from one pretrained network has three more. start(classes, weights) returns the
    largest member with the weights of its library, or those in a file, and a new classifier. inherit(network, choices)
    cuts a member out of the trained largest one; it has the structure of `build`. `families` holds obvious ways to make
    the largest member smaller, each as option indices (n, d); a search is compared with the best of each.

    A space of more than `pool` members (0: as many as memory holds) is represented by that many, drawn at random, its
    families and its largest member.
    """

    name: str
    choices: tuple[Choice, ...]
    build: Callable[[tuple[int, ...], int, float], nn.Module]
    cost: Callable[[IntMatrix, int, float, int], tuple[FloatArray, FloatArray]] | None = None
    canonical: Callable[[tuple[int, ...]], tuple[int, ...]] | None = None
    activations: Callable[[IntMatrix, int, float, int], FloatArray] | None = None
    layers: Callable[[IntMatrix, int, float, int], FloatArray] | None = None
    start: Callable[[int, Path | None], nn.Module] | None = None
    inherit: Callable[[nn.Module, tuple[int, ...]], nn.Module] | None = None
    families: Mapping[str, IntMatrix] = field(default_factory=dict)
    pool: int = 0

    @cached_property
    def radices(self) -> tuple[int, ...]:
        return tuple(len(choice.options) for choice in self.choices)

    @cached_property
    def ordinal(self) -> tuple[bool, ...]:
        """Whether the options of each choice are ordered."""
        return tuple(choice.ordinal for choice in self.choices)

    @property
    def size(self) -> int:
        """The number of architectures, which may exceed 2**63, the most that `len` can return."""
        return math.prod(self.radices)

    def check(self, architecture: Architecture) -> Architecture:
        """Returns the architecture if it belongs to the space; else raises UsageError with the reason."""
        if len(architecture.choices) != len(self.choices):
            count = len(architecture.choices)
            raise UsageError(f"architecture {architecture} has {count} choices, {self.name} has {len(self.choices)}")
        for value, choice in zip(architecture.choices, self.choices, strict=True):
            if not 0 <= value < len(choice.options):
                raise UsageError(
                    f"architecture {architecture}: {choice.name} is {value}; it must be 0 to {len(choice.options) - 1}"
                )
        return architecture

    def index(self, architecture: Architecture) -> int:
        """Mixed-radix number of an architecture, first choice most significant."""
        number = 0
        for value, radix in zip(self.check(architecture).choices, self.radices, strict=True):
            number = number * radix + value
        return number

    def at(self, index: int) -> Architecture:
        """The architecture of a number: the inverse of `index`."""
        if not 0 <= index < self.size:
            raise UsageError(f"index {index} is outside {self.name}, which has {self.size} architectures")
        values = []
        for radix in reversed(self.radices):
            index, value = divmod(index, radix)
            values.append(value)
        return Architecture(tuple(reversed(values)))

    def sample(self, count: int, seed: int) -> list[Architecture]:
        """`count` architectures drawn uniformly, with replacement."""
        rng = np.random.default_rng(seed)
        return [Architecture(tuple(int(rng.integers(radix)) for radix in self.radices)) for _ in range(count)]

    def all(self) -> IntMatrix:
        """Every architecture as a row of option indices (size, d), in the order of `index`."""
        grid = np.indices(self.radices, dtype=np.int8)
        return np.ascontiguousarray(grid.reshape(len(self.radices), -1).T)

    def encode(self, choices: npt.NDArray[np.integer[Any]]) -> npt.NDArray[np.float32]:
        """Features (n, f) of architectures (n, d): an ordinal choice is one column scaled to 0..1, a choice among
        operations is one-hot, and operations that several choices share are counted (all scaled to 0..1)."""
        columns: list[npt.NDArray[np.float32]] = []
        counts: dict[str, npt.NDArray[np.float32]] = {}
        for position, choice in enumerate(self.choices):
            values = choices[:, position]
            if choice.ordinal:
                columns.append((values / max(len(choice.options) - 1, 1)).astype(np.float32))
                continue
            for option, name in enumerate(choice.options):
                hot = (values == option).astype(np.float32)
                columns.append(hot)
                counts[str(name)] = counts[str(name)] + hot if str(name) in counts else hot.copy()
        columns += [count / np.float32(len(self.choices)) for count in counts.values()]
        return np.stack(columns, axis=1)


@dataclass(frozen=True)
class Candidates:
    """What a method may propose: option indices (n, d), features (n, f), MACs and parameters (n,).

    Rows are members of a whole space, those that meet the limits, or those in a table of recorded results. `trends` are
    further quantities (n,) that may go with accuracy, by name, known before any training: training-free scores,
    latencies; nan where unknown. `ordinal` (d,) tells which choices have ordered options; () if none has.
    """

    choices: npt.NDArray[Any]
    features: npt.NDArray[np.float32]
    macs: FloatArray
    params: FloatArray
    trends: dict[str, FloatArray] = field(default_factory=dict)
    ordinal: tuple[bool, ...] = ()

    def __len__(self) -> int:
        return len(self.choices)

    def architecture(self, row: int) -> Architecture:
        return Architecture(tuple(int(value) for value in self.choices[row]))

    def where(self, keep: npt.NDArray[np.bool_]) -> Candidates:
        """The rows for which `keep` (n,) is true."""
        trends = {name: values[keep] for name, values in self.trends.items()}
        arrays = (self.choices[keep], self.features[keep], self.macs[keep], self.params[keep])
        return Candidates(*arrays, trends, self.ordinal)

    def cost(self, name: str) -> FloatArray:
        """A cost (n,) by its name: macs, params, DEVICE_latency, or latency for the only latency that is known.

        Raises UsageError for any other name.
        """
        latencies = {key.removeprefix(LATENCY): of for key, of in self.trends.items() if key.startswith(LATENCY)}
        known = {"macs": self.macs, "params": self.params}
        known |= {f"{device}_latency": of for device, of in latencies.items()}
        if len(latencies) == 1:
            known["latency"] = next(iter(latencies.values()))
        if name not in known:
            hint = "" if latencies else "; no latency of these networks is known"
            raise UsageError(f"no cost named '{name}'; choose from {', '.join(known)}{hint}")
        return known[name]

    def spread_by(self, cost: str, count: int, rng: np.random.Generator) -> npt.NDArray[np.int64]:
        """`count` rows, one drawn at random from each of as many equal slices of the order by cost, cheapest first."""
        order = np.argsort(self.cost(cost), kind="stable")
        edges = np.linspace(0, len(order), count + 1).astype(np.int64)
        picks = [int(rng.integers(a, b)) for a, b in pairwise(edges)]
        return np.asarray(order[picks], dtype=np.int64)

    def spread_by_macs(self, count: int, rng: np.random.Generator) -> npt.NDArray[np.int64]:
        """`spread_by` MACs."""
        return self.spread_by("macs", count, rng)

    @cached_property
    def _found(self) -> dict[Architecture, int | None]:
        return {}

    def row(self, architecture: Architecture) -> int | None:
        """The row of an architecture, None if it is not a candidate. Cached, since a search asks often."""
        if architecture not in self._found:
            rows = np.flatnonzero((self.choices == np.asarray(architecture.choices)).all(axis=1))
            self._found[architecture] = int(rows[0]) if len(rows) else None
        return self._found[architecture]


# A larger space is represented by this many random members. Without a closed form for the cost, each has to be built
# and counted; with one, the features of all must fit into memory.
POOL_WITHOUT_COST, POOL = 512, 2**22


def candidates(
    space: SearchSpace,
    classes: int,
    width: float,
    resolution: int,
    seed: int = 0,
    only: Sequence[Architecture] = (),
) -> Candidates:
    """The members of a space with their MACs and parameters, one of each class of identical networks.

    If `only` names any, just those. A large space is represented by a random sample, see `SearchSpace.pool`; without a
    closed form for the cost, by POOL_WITHOUT_COST members.
    """
    choices = np.unique(np.array([a.choices for a in only], dtype=np.int8), axis=0) if only else _members(space, seed)
    if space.cost is not None:
        macs, params = space.cost(choices, classes, width, resolution)
    else:
        from torch import device  # only here: with a closed form, no torch is needed

        with device("meta"):
            counted = [_counted(space, tuple(row), classes, width, resolution) for row in choices.tolist()]
        macs, params = (np.array(column, dtype=np.float64) for column in zip(*counted, strict=True))
    return Candidates(choices, space.encode(choices), macs, params, ordinal=space.ordinal)


def _members(space: SearchSpace, seed: int) -> IntMatrix:
    """Option indices (n, d) of one member of each class of identical networks, in the order of `index`."""
    pool = POOL_WITHOUT_COST if space.cost is None else space.pool or POOL
    if space.size <= pool:
        choices = space.all()
    else:
        rng = np.random.default_rng(seed)
        drawn = [rng.integers(radix, size=pool, dtype=np.int8) for radix in space.radices]
        largest = [np.array([space.radices], dtype=np.int8) - 1] if space.start is not None else []
        rows = [np.stack(drawn, axis=1), *space.families.values(), *largest]
        choices = np.unique(np.concatenate(rows), axis=0)
    if space.canonical is None:
        return choices
    return np.array(sorted({space.canonical(tuple(row)) for row in choices.tolist()}), dtype=np.int8)


def _counted(space: SearchSpace, row: tuple[int, ...], classes: int, width: float, resolution: int) -> tuple[int, int]:
    from engine.networks import count_cost

    try:
        return count_cost(space.build(row, classes, width), resolution)
    except Exception as error:
        why = f"{type(error).__name__}: {error}"
        raise UsageError(f"space {space.name}: {Architecture(row)} cannot be built and counted: {why}") from error


def space_name(make: Callable[..., SearchSpace], **options: int | float) -> str:
    """The specification from which `load_space` makes this space: `NAME`, or `NAME:option=value,...` with the options
    that differ from their defaults."""
    parameters = inspect.signature(make).parameters
    given = [f"{key}={value}" for key, value in options.items() if value != parameters[key].default]
    return ":".join([make.__name__, *([",".join(given)] if given else [])])
