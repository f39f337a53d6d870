"""The one loop of a search. It runs on virtual workers, so that decisions do not depend on how fast real ones are."""

from __future__ import annotations

import bisect
import heapq
import itertools
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Protocol

from engine.fleet.drain import answer_of
from engine.trial import Evaluation, History, Trial

Propose = Callable[[History, int], list[Trial]]
Asked = Callable[[list[Trial], int], None]


@dataclass
class TimedHistory(History):
    """A history with its virtual clock: `now`, and `times[i]` at which `answered[i]` became visible (seconds)."""

    now: float = 0.0
    times: list[float] = field(default_factory=list)


class Evaluator(Protocol):
    """Where trials are evaluated."""

    def submit(self, trial: Trial) -> Future[Evaluation]:
        """The future evaluation of a trial, which may wait for the next `flush`."""
        ...

    def flush(self) -> None:
        """Sends off everything submitted so far."""
        ...


def _one(trial: Trial) -> int:
    return 1


@dataclass(frozen=True)
class VirtualWorkers:
    """`slots` in all, of which a trial takes `share(trial)` for `cost(trial)` virtual seconds.

    Nothing is asked before `at_least` slots are free, so that trials come in groups that are trained side by side.
    """

    slots: int
    cost: Callable[[Trial], float]
    share: Callable[[Trial], int] = _one
    at_least: int = 1


@dataclass(frozen=True)
class Recorded:
    """The trials that an earlier, killed run had asked, by number; `seen[i]` is the number of evaluations that were
    visible when trial i was asked (-1 if it came from a fidelity study)."""

    trials: Sequence[Trial] = ()
    seen: Sequence[int] = ()


def _no_journal(trials: list[Trial], seen: int) -> None:
    """Records nothing."""


def _never(history: History) -> bool:
    return False


def drive(
    propose: Propose,
    evaluator: Evaluator,
    workers: VirtualWorkers,
    recorded: Recorded = Recorded(),
    asked: Asked = _no_journal,
    stop: Callable[[History], bool] = _never,
) -> TimedHistory:
    """Runs a search until `propose` has nothing to ask and nothing is pending, or `stop(history)` holds.

    A trial given to a free virtual worker finishes at now + cost(trial), in virtual seconds. Evaluations become visible
    in the order of these times (ties by number), in whatever order the futures complete: the loop waits for the one
    that is next. The history is therefore a function of `propose`, `workers` and the evaluations alone.

    New trials are passed to `asked` with the number of evaluations visible at that moment. Recorded trials are submitted
    again (the evaluator answers from the journal what has been answered) but not passed to `asked`. Decisions that the
    record holds completely are not made again, since that would take as long as it did the first time. The last decision
    may be cut short, and trials from a fidelity study do not show where workers were left idle on purpose: there
    `propose` is called too, and if it disagrees with the record (say, because a library rounds differently), the record
    wins.

    Once `stop` holds, nothing more is asked and pending trials are waited for. Exceptions of a future or of `propose`,
    and KeyboardInterrupt, pass through.
    """
    history = TimedHistory()
    seen = recorded.seen or [-1] * len(recorded.trials)
    recorded = Recorded(recorded.trials, seen)
    running: list[tuple[float, int, Future[Evaluation]]] = []
    while True:
        free = workers.slots - sum(workers.share(trial) for trial in history.pending)
        if (free >= workers.at_least or not running) and not stop(history):
            decided = _decided(history, recorded)
            trials = _ask(propose, history, free, recorded, asked, workers.share) if decided is None else decided
            history.pending.extend(trials)
            for trial in trials:
                heapq.heappush(running, (history.now + workers.cost(trial), trial.number, evaluator.submit(trial)))
            evaluator.flush()
        if not running:
            return history
        history.now, number, future = heapq.heappop(running)
        evaluation = answer_of(future)
        history.pending = [trial for trial in history.pending if trial.number != number]
        history.answered.append(evaluation)
        history.times.append(history.now)


def _decided(history: TimedHistory, recorded: Recorded) -> list[Trial] | None:
    """The trials that the record shows were asked at exactly this point; None where the record does not say."""
    seen, now, number = recorded.seen, len(history.answered), history.asked
    first = seen[number] if number < len(seen) else -1
    if first < now or seen[-1] == now or (first > now and not history.pending):
        return None
    return list(recorded.trials[number : bisect.bisect_right(seen, now, lo=number)])


def _ask(
    propose: Propose,
    history: TimedHistory,
    free: int,
    recorded: Recorded,
    asked: Asked,
    share: Callable[[Trial], int],
) -> list[Trial]:
    """The next trials, as many as fit into `free` slots, recorded ones first."""
    busy, seen = bool(history.pending), recorded.seen
    proposed = propose(history, free)
    start, brought = history.asked, bisect.bisect_left(seen, 0)
    end = start + (len(proposed) if proposed or busy else free)
    if end >= brought:  # from here on the record says what had been asked by now; if all are idle, its next is due
        now = max([len(history.answered), *seen[start : start + (not busy)]])
        end = max(brought, bisect.bisect_right(seen, now))
    old = trials = list(recorded.trials[start:end])
    if start + len(old) >= len(recorded.trials):
        for known in (old[: max(0, brought - start)], old):
            if known != proposed[: len(known)]:  # then the rest must be proposed knowing what was asked instead
                left = free - sum(map(share, known))
                beside = History(history.answered, [*history.pending, *known])
                proposed = [*known, *(propose(beside, left) if left > 0 else [])]
        trials = proposed
    taken = list(itertools.accumulate(map(share, trials)))
    # A trial that needs more slots than there are runs alone; otherwise it would wait forever.
    fitting = max(bisect.bisect_right(taken, free), int(not busy))
    trials = trials[:fitting]
    if len(old) < len(trials):
        asked(trials[len(old) :], len(history.answered))
    return trials
