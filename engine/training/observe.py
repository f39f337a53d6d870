"""What a training says of itself while it runs, in a small file that the driver and `status` read."""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path

from engine.data.batches import Batches
from engine.run_folder import RunFolder, write_atomically
from engine.tasks import Activity, task_to_json
from engine.trial import Curve, Trial

# Seconds between two reports, and before the first with numbers. A report takes half a millisecond, and on a GPU it
# waits for the steps under way: together less than 0.5 % of a training.
EVERY_S, FIRST_S = 5.0, 1.0


@dataclass
class Observer:
    """Reports the progress of one training, or of a cohort side by side, to the file `path`."""

    path: Path
    activity: Activity
    _started: float = field(default_factory=time.monotonic)
    _next: float = 0.0
    _first_step: int = 0
    _steps: int = 0
    _images: int = 0  # of a step, counted for each student

    def begin(self, batches: Batches, students: int) -> None:
        """The training begins, or resumes."""
        self._started = time.monotonic()
        self._next = self._started + FIRST_S
        self._first_step = batches.first_epoch * batches.steps_per_epoch
        self._steps = batches.epochs * batches.steps_per_epoch
        self._images = batches.batch_size * students
        self._write(replace(self.activity, epoch=batches.first_epoch, epochs=batches.epochs))

    def due(self) -> bool:
        """Whether it is time for a report; cheap enough to be asked at every step."""
        return time.monotonic() >= self._next

    def tell(self, step: int, loss: float) -> None:
        """Reports that `step` steps are done, and their recent mean loss."""
        seconds, done = time.monotonic() - self._started, step - self._first_step
        epochs = self.activity.epochs
        self._write(
            replace(
                self.activity,
                epoch=step * epochs // self._steps,
                loss=loss if math.isfinite(loss) else None,
                images_per_s=done * self._images / seconds,
                seconds_left=(self._steps - step) * seconds / done,
            )
        )
        self._next = time.monotonic() + EVERY_S

    def show_curve(self, curve: Curve) -> None:
        """The curve that the next report shows."""
        self.activity = replace(self.activity, curve=curve)

    def _write(self, activity: Activity) -> None:
        """Nobody must wait for a report, so what cannot be written is left out."""
        self.activity = replace(activity, at=time.time())
        with suppress(OSError):
            write_atomically(self.path, json.dumps(task_to_json(self.activity)))


@contextmanager
def observed(folder: RunFolder, phase: str, trials: Sequence[Trial] = ()) -> Iterator[Observer | None]:
    """An observer of what a worker does within the block; None outside a worker, or where the driver does not look."""
    worker = os.environ.get("MFKD_WORKER")
    if worker is None or not folder.activities.is_dir():
        yield None
        return
    path = folder.activity(worker)
    numbers, networks = (tuple(t.number for t in trials), tuple(str(t.architecture) for t in trials))
    observer = Observer(path, Activity(worker, phase, numbers, networks))
    observer._write(observer.activity)
    try:
        yield observer
    finally:
        with suppress(OSError):
            path.unlink(missing_ok=True)
