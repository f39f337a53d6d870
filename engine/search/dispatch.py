"""From trials to answers: grouped into cohorts, put to the fleet, journalled, handed back."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any

from engine.fleet.fleet import Fleet, TaskLost
from engine.fleet.supervisor import TimedOut, WorkerDied
from engine.search.journal import Journal
from engine.trial import Evaluation, Fidelity, Status, Trial, evaluation_from_json, trial_to_json

Open = tuple[Trial, "Future[Evaluation]"]
MAX_DEATHS = 2  # of workers under a trial, the second time alone: then it is the trial that kills them
MAX_ERROR = 3000  # characters kept of a worker's last words
STATUS: dict[type[Exception], Status] = {WorkerDied: "crashed", TimedOut: "timeout", TaskLost: "lost"}


@dataclass
class Dispatch:
    """Puts trials to a fleet in cohorts of up to `size`; those at the fidelity `alone` go by themselves.

    `task` is what every task holds, `known` the answers of the journal, which are not asked again. Each new answer is
    journalled, then shown to `received`, then handed to its future. A cohort whose worker dies, hangs for longer than
    `timeout_s` seconds for each of its trials (0: no limit), or is lost, goes again one by one.
    """

    fleet: Fleet
    task: dict[str, Any]
    book: Journal
    known: dict[int, Evaluation]
    size: int
    alone: Fidelity
    received: Callable[[Evaluation], None]
    timeout_s: float = 0.0
    _waiting: list[Open] = field(default_factory=list)
    _sent: list[Future[Evaluation]] = field(default_factory=list)
    _deaths: Counter[int] = field(default_factory=Counter)

    def submit(self, trial: Trial) -> Future[Evaluation]:
        """The future of a trial's answer; what is not known yet goes out with the next `flush`."""
        answer: Future[Evaluation] = Future()
        if trial.number in self.known:
            self.received(self.known[trial.number])
            answer.set_result(self.known[trial.number])
        else:
            self._waiting.append((trial, answer))
        return answer

    def flush(self) -> None:
        groups, self._waiting = list(self._groups()), []
        self._sent = self.open()
        for group in groups:
            self._sent += [answer for _, answer in group]
            self._send(group)

    def open(self) -> list[Future[Evaluation]]:
        """The answers that are still to come."""
        return [answer for answer in self._sent if not answer.done()]

    def _groups(self) -> Iterator[list[Open]]:
        """What can share a worker's batches: trials of one fidelity and one seed."""
        mates: dict[Any, list[Open]] = {}
        for trial, answer in self._waiting:
            apart = trial.number if trial.fidelity == self.alone else None
            mates.setdefault((trial.fidelity, trial.seed, apart), []).append((trial, answer))
        for group in mates.values():
            for start in range(0, len(group), self.size):
                yield group[start : start + self.size]

    def _send(self, group: Sequence[Open]) -> None:
        trials = [trial_to_json(trial) for trial, _ in group]
        task = {**self.task, "trials": trials, "timeout_s": self.timeout_s * len(group)}
        self.fleet.submit("run_trials", task).add_done_callback(lambda done: self._take(group, done))

    def _take(self, group: Sequence[Open], done: Future[Any]) -> None:
        """Called by a thread of the fleet: whatever is raised must reach the loop, which waits for the futures."""
        try:
            self._settle(group, done)
        except BaseException as error:  # SystemExit, too, would only end the thread
            for _, answer in group:
                if not answer.done():
                    answer.set_exception(error)

    def _settle(self, group: Sequence[Open], done: Future[Any]) -> None:
        try:
            evaluations = [evaluation_from_json(result) for result in done.result()]
        except (WorkerDied, TimedOut, TaskLost) as error:
            if self._once_more(group, error):
                for alone in group:  # one of them may be to blame: the others shall not go with it
                    self._send([alone])
                return
            evaluations = [Evaluation(group[0][0], STATUS[type(error)], error=str(error)[:MAX_ERROR])]
        for (_, answer), evaluation in zip(group, evaluations, strict=True):
            self.book.answer(evaluation)
            self.received(evaluation)
            answer.set_result(evaluation)

    def _once_more(self, group: Sequence[Open], error: Exception) -> bool:
        if isinstance(error, WorkerDied):
            self._deaths.update(trial.number for trial, _ in group)
            return len(group) > 1 or self._deaths[group[0][0].number] < MAX_DEATHS
        return len(group) > 1
