"""Predicts the latency of networks from those measured: a sum over what their layers do, corrected by trees."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from engine.search.latency.table import BuiltSpace, LatencyTable
from engine.search.methods.scores import find_rows
from engine.space import Candidates
from engine.trial import Architecture
from surrogate.sums import LEAST_POINTS, Accuracy, Sums, accuracy, fit_sums, spread_out

Array = npt.NDArray[np.float64]

PROBES = 40
POOL = 4096  # candidates that half of the probes are chosen among
CHUNK = 65_536  # candidates predicted at once, to bound the memory


@dataclass(frozen=True)
class LatencyModel:
    """A fitted prediction of the latency of a space's networks, and its accuracy on networks left out of the fit."""

    networks: BuiltSpace
    sums: Sums
    accuracy: Accuracy

    def predict(self, members: Candidates) -> Array:
        """Milliseconds (n,)."""
        found = np.empty(len(members))
        for start in range(0, len(members), CHUNK):
            rows = slice(start, start + CHUNK)
            parts = parts_of(self.networks, members, rows)
            found[rows] = self.sums.predict(parts, members.features[rows])
        return found


def fit_model(networks: BuiltSpace, table: LatencyTable) -> LatencyModel:
    """The model of the measurements in a table, of which it needs surrogate.sums.LEAST_POINTS."""
    members = networks.members([Architecture.parse(name) for name in table.milliseconds])
    measured = np.array([table.milliseconds[str(members.architecture(row))] for row in range(len(members))])
    sums = fit_sums(parts_of(networks, members, slice(None)), members.features, measured, seed=0)
    return LatencyModel(networks, sums, accuracy(sums.left_out, measured))


def parts_of(networks: BuiltSpace, members: Candidates, rows: slice) -> Array:
    """What the time of each network adds up from (n, k): a constant, and what its layers do by kind. If the space does
    not say that, MACs, parameters and the options stand for it."""
    space, choices = networks.space, members.choices[rows]
    constant = np.ones((len(choices), 1))
    if space.layers is None:
        return np.column_stack([constant, members.macs[rows], members.params[rows], members.features[rows]])
    layers = space.layers(choices, networks.classes, networks.width, networks.resolution)
    return np.concatenate([constant, layers], axis=1)


def choose_probes(networks: BuiltSpace, members: Candidates, count: int, seed: int) -> list[Architecture]:
    """Networks to measure: half are told apart best by what their layers do, the others spread evenly over MACs."""
    rng = np.random.default_rng(seed)
    if len(members) <= count:
        return [members.architecture(row) for row in range(len(members))]
    pool = np.sort(rng.permutation(len(members))[:POOL])
    among = members.where(np.isin(np.arange(len(members)), pool))
    first = pool[spread_out(parts_of(networks, among, slice(None)), count // 2)]
    others = members.where(~np.isin(np.arange(len(members)), first))
    spread = others.spread_by_macs(count - len(first), rng)
    return [*map(members.architecture, first), *map(others.architecture, spread)]


@dataclass(frozen=True)
class Latencies:
    """Milliseconds of candidates (n,), which were `measured`, and the model of the others, if there are any."""

    milliseconds: Array
    measured: npt.NDArray[np.bool_]
    model: LatencyModel | None

    @property
    def margin(self) -> float:
        """The factor by which predictions are taken to be too low: 95 of 100 left-out ones were within it."""
        return self.model.accuracy.factor if self.model else 1.0

    def within(self, limit: float) -> npt.NDArray[np.bool_]:
        """True (n,) where a candidate takes at most `limit` milliseconds: as measured, or as predicted with margin."""
        return self.milliseconds * np.where(self.measured, 1.0, self.margin) <= limit


def estimate(networks: BuiltSpace, members: Candidates, table: LatencyTable) -> Latencies:
    """The latency of every member, as measured if the table has it."""
    names = list(table.milliseconds)
    at = find_rows(members, [Architecture.parse(name) for name in names])
    taken = np.array([table.milliseconds[name] for name in names])
    measured = np.zeros(len(members), dtype=bool)
    measured[at[at >= 0]] = True
    model = None if measured.all() else fit_model(networks, table)
    milliseconds = np.empty(len(members)) if model is None else model.predict(members)
    milliseconds[at[at >= 0]] = taken[at >= 0]
    return Latencies(milliseconds, measured, model)


def looked_up(
    networks: BuiltSpace, table: LatencyTable, architectures: list[Architecture]
) -> dict[Architecture, tuple[float, bool]]:
    """Milliseconds of architectures, candidates or not, and whether these were measured. From too few measurements
    nothing is predicted."""
    if len(table.milliseconds) < LEAST_POINTS:
        architectures = [one for one in architectures if str(one) in table.milliseconds]
    if not architectures:
        return {}
    members = networks.members(architectures)
    found = estimate(networks, members, table)
    pairs = zip(found.milliseconds.tolist(), found.measured.tolist(), strict=True)
    return {members.architecture(row): pair for row, pair in enumerate(pairs)}
