"""Turns trials into evaluations: groups them into cohorts, sends these to the fleet, journals the results."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from engine.config import is_full
from engine.fleet.fleet import Fleet, TaskLost, submit
from engine.fleet.supervisor import TimedOut, WorkerDied
from engine.search.journal import Journal
from engine.tasks import TrialsTask, WorkerSettings
from engine.trial import Evaluation, Status, Trial, evaluation_from_json

OpenTrial = tuple[Trial, "Future[Evaluation]"]
MAX_DEATHS = 2  # a trial is given up when its worker dies this often, the last time while it runs alone
MAX_ERROR = 3000  # characters kept of a worker's error message
STATUS: dict[type[Exception], Status] = {WorkerDied: "crashed", TimedOut: "timeout", TaskLost: "lost"}


@dataclass(frozen=True)
class Cohorts:
    """How trials are grouped into tasks: up to `size` together, but full trainings one by one.

    `teacher` is the teacher's weights file, `timeout_s` the time limit per trial in seconds (0: none); a final training
    gets more, as it is longer than a full one.
    """

    worker: WorkerSettings
    teacher: Path
    size: int
    timeout_s: float = 0.0

    def task(self, trials: Sequence[Trial]) -> TrialsTask:
        fidelity, high = trials[0].fidelity, self.worker.config.high
        longer = fidelity.cost() / high.cost() if fidelity.with_valid else 1.0
        return TrialsTask(self.worker, tuple(trials), self.teacher, self.timeout_s * len(trials) * longer)

    def split(self, waiting: Sequence[OpenTrial]) -> Iterator[list[OpenTrial]]:
        """Groups of trials that can share the batches of a worker: one fidelity, one seed."""
        mates: dict[Any, list[OpenTrial]] = {}
        for trial, answer in waiting:
            apart = trial.number if is_full(self.worker.config, trial.fidelity) else None
            mates.setdefault((trial.fidelity, trial.seed, apart), []).append((trial, answer))
        for group in mates.values():
            for start in range(0, len(group), self.size):
                yield group[start : start + self.size]


@dataclass
class Dispatcher:
    """Sends trials to a fleet in cohorts.

    Trials whose evaluation is `known` from the journal are not sent. A new evaluation is journalled, then passed to
    `received`, then to its future. If the worker of a cohort dies, is lost or exceeds the time limit, the trials of the
    cohort are sent again one by one.
    """

    fleet: Fleet
    cohorts: Cohorts
    journal: Journal
    known: dict[int, Evaluation]
    received: Callable[[Evaluation], None]
    _waiting: list[OpenTrial] = field(default_factory=list)
    _sent: list[Future[Evaluation]] = field(default_factory=list)
    _deaths: Counter[int] = field(default_factory=Counter)

    def submit(self, trial: Trial) -> Future[Evaluation]:
        """The future evaluation of a trial, which is sent with the next `flush` if it is not known."""
        answer: Future[Evaluation] = Future()
        if trial.number in self.known:
            self.received(self.known[trial.number])
            answer.set_result(self.known[trial.number])
        else:
            self._waiting.append((trial, answer))
        return answer

    def flush(self) -> None:
        """Sends the trials submitted since the last call."""
        groups, self._waiting = list(self.cohorts.split(self._waiting)), []
        self._sent = self.open()
        for group in groups:
            self._sent += [answer for _, answer in group]
            self._send(group)

    def open(self) -> list[Future[Evaluation]]:
        """The evaluations that have not arrived."""
        return [answer for answer in self._sent if not answer.done()]

    def _send(self, group: Sequence[OpenTrial]) -> None:
        task = self.cohorts.task([trial for trial, _ in group])
        submit(self.fleet, task).add_done_callback(lambda done: self._take(group, done))

    def _take(self, group: Sequence[OpenTrial], done: Future[Any]) -> None:
        """Runs in a thread of the fleet. Any exception must reach the loop, which waits for the futures."""
        try:
            self._settle(group, done)
        except BaseException as error:  # even SystemExit would only end the thread
            for _, answer in group:
                if not answer.done():
                    answer.set_exception(error)

    def _settle(self, group: Sequence[OpenTrial], done: Future[Any]) -> None:
        try:
            evaluations = [evaluation_from_json(entry) for entry in done.result()]
        except (WorkerDied, TimedOut, TaskLost) as error:
            if self._retry(group, error):
                for single in group:  # one of them may be the cause and must not fail the others
                    self._send([single])
                return
            evaluations = [Evaluation(group[0][0], STATUS[type(error)], error=str(error)[:MAX_ERROR])]
        for (_, answer), evaluation in zip(group, evaluations, strict=True):
            self.journal.answer(evaluation)
            self.received(evaluation)
            answer.set_result(evaluation)

    def _retry(self, group: Sequence[OpenTrial], error: Exception) -> bool:
        if isinstance(error, WorkerDied):
            self._deaths.update(trial.number for trial, _ in group)
            return len(group) > 1 or self._deaths[group[0][0].number] < MAX_DEATHS
        return len(group) > 1
