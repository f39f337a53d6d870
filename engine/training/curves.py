"""Validation accuracy during a training, for the curves of a log."""

from __future__ import annotations

import time
from contextlib import ExitStack
from dataclasses import dataclass, field

from engine.training.context import WorkerContext
from engine.training.observe import Observer
from engine.training.student import Student, averaged
from engine.trial import Fidelity

SHARE = 0.05  # of the time of a training that measuring its curve may take


@dataclass
class Curves:
    """Completes the curves of students with their validation accuracy, after as many epochs as SHARE pays for.

    The first epoch is measured in any case. A training that includes the validation images has no accuracies.
    """

    context: WorkerContext
    students: list[Student]
    fidelity: Fidelity
    observer: Observer | None
    _began: float = field(default_factory=time.monotonic)
    _spent: float = 0.0

    def after_epoch(self) -> None:
        """Measures, if it is time; shows the curve of a training alone to the observer."""
        students = [student for student in self.students if student.status == "ok"]
        start = time.monotonic()
        if self.context.curves and not self.fidelity.with_valid and self._spent <= SHARE * (start - self._began):
            self._measure(students)
            self._spent += time.monotonic() - start
        if self.observer is not None and len(self.students) == 1 and students:
            self.observer.show_curve(tuple(students[0].curve))

    def _measure(self, students: list[Student]) -> None:
        with ExitStack() as stack:
            for student in students:
                stack.enter_context(averaged(student))
            found = self.context.score([student.network for student in students], self.fidelity)
        for student, readout in zip(students, found, strict=True):
            if not isinstance(readout, Exception):  # it would fail at the end too, and is reported there
                student.curve[-1] = (student.curve[-1][0], readout.accuracy)
