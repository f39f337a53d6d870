"""Measured latencies: of this machine, in a run folder, or of another device, in a file."""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from engine.run_folder import write_atomically
from engine.space import Candidates, SearchSpace, candidates
from engine.spaces.load import load_space
from engine.tasks import task_from_json, task_to_json
from engine.trial import Architecture, UsageError
from surrogate.sums import LEAST_POINTS


@dataclass(frozen=True)
class BuiltSpace:
    """The space that `spec` specifies, and what else its networks depend on."""

    spec: str
    classes: int
    width: float
    resolution: int

    @cached_property
    def space(self) -> SearchSpace:
        return load_space(self.spec)

    def members(self, architectures: list[Architecture]) -> Candidates:
        """The architectures with their costs, in another order and each once."""
        only = [self.space.check(architecture) for architecture in architectures]
        return candidates(self.space, self.classes, self.width, self.resolution, only=only)


@dataclass(frozen=True)
class LatencyTable:
    """Milliseconds of architectures, by name, on a device: `batch` images at a time, and the networks that they are of.

    `noise` is by what share the same network took longer in one round of measurements than in another.
    """

    milliseconds: dict[str, float]
    device: str = "this machine"
    runtime: str = ""
    threads: int = 1
    noise: float = 0.0
    space: str = ""
    classes: int = 0
    width: float = 1.0
    resolution: int = 0
    batch: int = 1

    def write(self, path: Path) -> None:
        write_atomically(path, json.dumps(task_to_json(self), indent=1) + "\n")

    def built_space(self) -> BuiltSpace:
        return BuiltSpace(self.space, self.classes, self.width, self.resolution)


def read_table(path: Path) -> LatencyTable:
    """The table in a file, or in the latencies.json that time_probes.py has written; UsageError if it is neither."""
    try:
        content: dict[str, Any] = json.loads(path.read_text())
        known = {name: value for name, value in content.items() if name in LatencyTable.__dataclass_fields__}
        table = task_from_json(LatencyTable, known)
        if not all(float(value) > 0 for value in table.milliseconds.values()):
            raise ValueError("a latency is not positive")
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise UsageError(
            f"{path} holds no latencies ({error}); give the latencies.json that time_probes.py wrote, or the FILE of: "
            "cli.py latency import"
        ) from error
    return table


def check_table(table: LatencyTable, path: Path, wanted: BuiltSpace, batch: int) -> None:
    """Raises UsageError if a table is not of the networks of a search, timed at its batch size, or holds too few."""
    there = (load_space(table.space).name, table.classes, table.width, table.resolution, table.batch)
    here = (wanted.space.name, wanted.classes, wanted.width, wanted.resolution, batch)
    names = ("space", "classes", "width", "resolution", "batch size")
    differ = [f"{n}: {a} there, {b} here" for n, a, b in zip(names, there, here, strict=True) if a != b]
    if differ:
        raise UsageError(
            f"--latency {path} is of other networks ({'; '.join(differ)}); export probes of these, time them on the "
            f"device and import its latencies: cli.py latency export-probes --space {wanted.spec} "
            f"--classes {wanted.classes} --width {wanted.width:g} --resolution {wanted.resolution} --batch {batch} "
            "--out DIR"
        )
    if len(table.milliseconds) < LEAST_POINTS:
        raise UsageError(f"--latency {path} has {len(table.milliseconds)} networks; it takes at least {LEAST_POINTS}")
