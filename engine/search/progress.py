"""The progress of a search on stderr: bars on a terminal, plain lines elsewhere, or nothing."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Literal

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

from engine.search.activity import NAMES, by_phase, sentence
from engine.search.log import Log
from engine.tasks import Activity
from engine.trial import Evaluation

EVERY_S = 20.0  # between lines while nothing else is said

Style = Literal["auto", "bar", "lines", "none"]


class TolerantConsole(Console):
    """Prints while it can. A search must not stop because nobody can read its progress."""

    def _check_buffer(self) -> None:
        try:
            super()._check_buffer()
        except OSError:  # the terminal is gone or the disk is full: this text is lost, later text may not be
            del self._buffer[:]

    def on_broken_pipe(self) -> None:
        """The reader is gone for good. Other writes to stderr, and Python's flush at exit, must not fail."""
        self.quiet = True
        os.dup2(os.open(os.devnull, os.O_WRONLY), self.file.fileno())


class Display(AbstractContextManager["Display"]):
    """Shows phases and evaluations in one of three styles; `auto` means bars if stderr is a terminal, else lines."""

    def __init__(self, style: Style) -> None:
        self._console = TolerantConsole(stderr=True, highlight=False, soft_wrap=True)
        self._style = ("bar" if sys.stderr.isatty() else "lines") if style == "auto" else style
        self._start = time.monotonic()
        self.log = Log()  # told of each evaluation too
        self._best = 0.0
        self._said = 0.0  # when a line was last printed
        self._tasks: dict[str, TaskID] = {}
        self._counts: dict[str, int] = {}
        self._bars = Progress(
            TextColumn("{task.description:>14}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[note]}"),
            TimeRemainingColumn(),
            console=self._console,
            disable=self._style != "bar",
        )

    def __enter__(self) -> Display:
        self._bars.start()
        return self

    def __exit__(self, *details: object) -> None:
        self._bars.stop()

    def say(self, text: str) -> None:
        """Prints a line about what happens now."""
        self._said = time.monotonic()
        if self._style != "none":
            seconds = time.monotonic() - self._start
            self._console.print(f"[{seconds:7.1f} s] {text}", markup=False)

    def print(self, text: str) -> None:
        """Prints text of several lines, like a table, as it is."""
        if self._style != "none":
            self._console.print(text, markup=False)

    @property
    def width(self) -> int:
        """Characters in a line of the console."""
        return self._console.width

    def expect(self, phase: str, total: int) -> None:
        """A bar for a phase of `total` evaluations, starting at 0: an earlier study may have had one of that name."""
        self._counts.pop(phase, None)
        self._said = time.monotonic()
        if phase in self._tasks:
            self._bars.reset(self._tasks[phase], total=total, note="")
        else:
            self._tasks[phase] = self._bars.add_task(phase, total=total, note="")

    def advance(self, phase: str, done: int) -> None:
        """Moves the bar of a phase; without bars, a line says so every `EVERY_S` seconds."""
        if phase in self._tasks:
            self._bars.update(self._tasks[phase], completed=done)
        now = time.monotonic()
        if self._style == "lines" and now - self._said >= EVERY_S:
            self.say(f"{phase}: {done:,} of {self._bars.tasks[self._tasks[phase]].total:,.0f}")

    def show_activities(self, activities: Sequence[Activity]) -> None:
        """Shows and logs what workers are doing now: in the bars' notes, or after EVERY_S without another line."""
        self.log.running(activities)
        silent = time.monotonic() - self._said >= EVERY_S
        for phase, those in by_phase(activities).items():
            if self._style == "lines" and silent:
                self.say(f"{NAMES.get(phase, phase)}: {sentence(those)}")
            elif phase == "teacher":
                self._show_teacher(those[0])
            elif phase in self._tasks:
                self._bars.update(self._tasks[phase], note=sentence(those))

    def _show_teacher(self, activity: Activity) -> None:
        """The bar of the teacher, which counts epochs."""
        if activity.phase not in self._tasks:
            self.expect(activity.phase, activity.epochs)
        note = sentence([activity])
        self._bars.update(self._tasks[activity.phase], total=activity.epochs, completed=activity.epoch, note=note)

    def show(self, evaluation: Evaluation, full: bool) -> None:
        """Shows and logs a new evaluation; `full` ones count towards the best so far."""
        self.log.evaluated(evaluation)
        phase = evaluation.trial.fidelity.name
        if full and evaluation.ok:
            self._best = max(self._best, evaluation.accuracy)
        rate = evaluation.costs.get("images_per_s", 0.0)
        speed = f"{rate:,.0f} images/s" if rate else ""  # a network that only inherits its weights is not trained
        best = f"best {self._best:.4f}" if self._best else ""
        self._counts[phase] = self._counts.get(phase, 0) + 1
        if phase in self._tasks:
            bar = self._bars.tasks[self._tasks[phase]]
            total = max(bar.total or 0, self._counts[phase])
            self._bars.update(bar.id, completed=self._counts[phase], total=total, note=f"{best} {speed}".strip())
        if self._style == "lines":
            accuracy = f"{'test ' if evaluation.trial.fidelity.with_valid else ''}{evaluation.accuracy:.4f}"
            result = accuracy if evaluation.ok else f"{evaluation.status}: {evaluation.error}"
            self.say(
                f"{phase} {self._counts[phase]:>3}  {evaluation.trial.architecture}  {result}  "
                f"{evaluation.seconds:.1f} s  {speed}  {best}".rstrip()
            )
        elif not evaluation.ok:
            self.say(f"{phase} {evaluation.trial.architecture} {evaluation.status}: {evaluation.error}")
