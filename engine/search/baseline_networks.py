"""The networks that a search's winner is compared with: those that one would choose without a search."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from engine.search.methods.scores import find_rows
from engine.space import Candidates, SearchSpace
from engine.trial import Architecture

LARGEST, WITHIN = "largest network", "largest within the limits"


@dataclass(frozen=True)
class Baseline:
    """A network to compare the winner with; `within`: it meets the limits of the search, as the winner does."""

    name: str
    architecture: Architecture
    within: bool


def baseline_networks(space: SearchSpace, candidates: Candidates, largest: Architecture) -> list[Baseline]:
    """The baselines of a search, in the order of their worth as a comparison.

    In a space of networks cut from a pretrained one: of each family, the member with most multiply-accumulates that
    meets the limits. In other spaces: the candidate with most, and the largest member of the space; one baseline if
    they are the same.
    """
    families = family_members(space, candidates)
    if families:
        return [Baseline(name, candidates.architecture(row), within=True) for name, row in families.items()]
    within = candidates.architecture(int(candidates.macs.argmax()))
    if within == largest:
        return [Baseline(LARGEST, largest, within=True)]
    return [Baseline(WITHIN, within, within=True), Baseline(LARGEST, largest, within=False)]


def family_members(space: SearchSpace, candidates: Candidates) -> dict[str, int]:
    """The row of the candidate with most multiply-accumulates of each family; families without a candidate are left
    out."""
    best: dict[str, int] = {}
    for name, members in space.families.items():
        choices = [tuple(row) for row in members.tolist()]
        same = [space.canonical(one) for one in choices] if space.canonical else choices
        rows = find_rows(candidates, [Architecture(one) for one in same])
        rows = rows[rows >= 0]
        if len(rows):
            best[name] = int(rows[np.argmax(candidates.macs[rows])])
    return best
