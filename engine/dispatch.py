"""From trials to answers: grouped into cohorts, put to the fleet, journalled, handed back."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any

from engine.fleet import Fleet
from engine.journal import Journal
from engine.supervisor import WorkerDied
from engine.trial import Evaluation, Fidelity, Trial, evaluation_from_json, trial_to_json

Open = tuple[Trial, "Future[Evaluation]"]


@dataclass
class Dispatch:
    """Puts trials to a fleet in cohorts of up to `size`; those at the fidelity `alone` go by themselves.

    `task` is what every task holds, `known` the answers of the journal, which are not asked again. Each new answer is
    journalled, then shown to `received`, then handed to its future.
    """

    fleet: Fleet
    task: dict[str, Any]
    book: Journal
    known: dict[int, Evaluation]
    size: int
    alone: Fidelity
    received: Callable[[Evaluation], None]
    _waiting: list[Open] = field(default_factory=list)

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
        for group in groups:
            self._send(group)

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
        sent = self.fleet.submit("run_trials", {**self.task, "trials": trials})
        sent.add_done_callback(lambda done: self._take(group, done))

    def _take(self, group: Sequence[Open], done: Future[Any]) -> None:
        """Called by a thread of the fleet: an exception must reach the loop through the futures."""
        try:
            for (_, answer), evaluation in zip(group, self._answers(group, done), strict=True):
                self.book.answer(evaluation)
                self.received(evaluation)
                answer.set_result(evaluation)
        except WorkerDied:
            for alone in group:  # one of them kills its worker: the others shall not go with it
                self._send([alone])
        except Exception as error:
            for _, answer in group:
                if not answer.done():
                    answer.set_exception(error)

    @staticmethod
    def _answers(group: Sequence[Open], done: Future[Any]) -> list[Evaluation]:
        """A worker's results as evaluations; a trial that kills its workers is one, with the status "crashed"."""
        try:
            return [evaluation_from_json(result) for result in done.result()]
        except WorkerDied as error:
            if len(group) > 1:
                raise
            return [Evaluation(group[0][0], "crashed", error=str(error))]
