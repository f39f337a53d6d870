"""The context of a run: settings, search space, run folder, workers, display."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

from engine.config import Budget, Resources, RunSettings, SearchConfig
from engine.fleet.devices import Layout
from engine.fleet.drain import Drain
from engine.fleet.fleet import Fleet, open_fleet, result
from engine.run_folder import RunFolder
from engine.search.activity import watching
from engine.search.progress import Display
from engine.space import SearchSpace
from engine.spaces.load import load_space
from engine.tasks import Task, WorkerSettings


@dataclass(frozen=True)
class RunContext:
    """Passed as a whole to the functions that work on a run. `drain` knows whether to stop."""

    config: SearchConfig
    budget: Budget
    resources: Resources
    space: SearchSpace
    folder: RunFolder
    fleet: Fleet
    display: Display
    drain: Drain
    started: float  # when the call began (time.monotonic)
    curves: bool = False  # whether trainings measure their validation accuracy by epoch, for a log

    @property
    def worker(self) -> WorkerSettings:
        """What every task of this run contains."""
        return WorkerSettings(self.config, self.folder.path, self.fleet.device, self.resources, self.curves)

    def answer(self, task: Task) -> Any:
        """The answer to a single task, as plain JSON values. Raises what the task raised."""
        return result(self.fleet, task)


@contextmanager
def open_context(
    settings: RunSettings, folder: RunFolder, layout: Layout, display: Display, drain: Drain | None = None
) -> Iterator[RunContext]:
    """A run context with running workers, which are killed when the block ends."""
    config, resources = settings.config, settings.resources
    space = load_space(config.space)
    drain = drain or Drain(resources.grace_s, None)
    fleet = open_fleet(resources, layout, folder.logs)
    try:
        drain.on_drain(fleet.drain)
        with watching(folder, display.show_activities):
            yield RunContext(config, settings.budget, resources, space, folder, fleet, display, drain, settings.started)
    finally:
        drain.cancel_alarm()
        fleet.close()


def one_worker(layout: Layout) -> Layout:
    """The layout of a single worker with the same kind of device."""
    return replace(layout, workers=1, nodes=1)
