"""What the workers of a run are doing now, as they say in files of the run folder; shown while the driver waits."""

from __future__ import annotations

import json
import shutil
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress

from engine.run_folder import RunFolder
from engine.tasks import Activity, task_from_json

POLL_S = 2.0
SILENT_S = 60.0  # a worker that has said nothing for longer is shown with the time since
NAMES = {"inherited": "inherited weights", "high": "full"}  # of phases, for people


def read_activities(folder: RunFolder) -> list[Activity]:
    """What each busy worker has last said, by its name."""
    found = []
    for path in sorted(folder.activities.glob("*.json")):
        with suppress(OSError, ValueError, TypeError):  # gone in the meantime, or from another version
            found.append(task_from_json(Activity, json.loads(path.read_text())))
    return found


@contextmanager
def watching(folder: RunFolder, show: Callable[[list[Activity]], None]) -> Iterator[None]:
    """Shows what the workers are doing every `POLL_S` seconds, from a thread, until the block ends."""
    with suppress(OSError):  # a full disk ends the run elsewhere, with a message
        shutil.rmtree(folder.activities, ignore_errors=True)  # of workers that were killed
        folder.activities.mkdir(parents=True)
    ended = threading.Event()

    def watch() -> None:
        while not ended.wait(POLL_S):
            found = read_activities(folder)
            if found:
                show(found)

    thread = threading.Thread(target=watch, name="activities", daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()
        shutil.rmtree(folder.activities, ignore_errors=True)


def by_phase(activities: Sequence[Activity]) -> dict[str, list[Activity]]:
    """Activities by the phase of the run that they belong to."""
    phases: dict[str, list[Activity]] = {}
    for activity in activities:
        phases.setdefault(activity.phase, []).append(activity)
    return phases


def sentence(activities: Sequence[Activity]) -> str:
    """What some workers in one phase are doing, in a line: networks, epoch, loss, speed, time left."""
    networks = sum(len(activity.networks) for activity in activities)
    parts = [f"{networks} networks"] if networks > 1 else list(activities[0].networks)
    trained = [activity for activity in activities if activity.epochs]
    if trained:
        present = [min(activity.epoch + 1, activity.epochs) for activity in trained]
        parts.append(f"epoch {_range(present, 'd')} of {trained[0].epochs}")
    losses = [activity.loss for activity in trained if activity.loss is not None]
    if losses:
        parts.append(f"loss {_range(losses, '.3f')}")
    speed = sum(activity.images_per_s for activity in trained)
    if speed:
        parts.append(f"{speed:,.0f} images/s")
    left = [activity.seconds_left for activity in trained if activity.seconds_left is not None]
    if left:
        parts.append(f"{duration(min(left))} left" if len(trained) == 1 else f"the next done in {duration(min(left))}")
    silent = time.time() - max(activity.at for activity in activities)
    if silent > SILENT_S:
        parts.append(f"last heard of {duration(silent)} ago")
    return ", ".join(parts or ["starting"])


def _range(values: Sequence[float], form: str) -> str:
    low, high = f"{min(values):{form}}", f"{max(values):{form}}"
    return low if low == high else f"{low} to {high}"


def duration(seconds: float) -> str:
    """A duration for people: 42 s, 3 min 20 s, 5 h 12 min."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60} min"
