"""The loop of a search. It runs on virtual workers, so that decisions do not depend on the speed of real ones."""

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
    """A history on the virtual clock: it is `now`, and `answered[i]` became visible at `times[i]` (virtual seconds)."""

    now: float = 0.0
    times: list[float] = field(default_factory=list)


class Evaluator(Protocol):
    """Where trials are evaluated."""

    def submit(self, trial: Trial) -> Future[Evaluation]:
        """The future evaluation of a trial, which may wait for the next `flush` to start."""
        ...

    def flush(self) -> None:
        """Starts everything submitted so far."""
        ...


def _one(trial: Trial) -> int:
    return 1


@dataclass(frozen=True)
class VirtualWorkers:
    """`slots` in all; a trial takes `share(trial)` of them for `cost(trial)` virtual seconds.

    The method is asked only once `at_least` slots are free, so that trials come in groups to train side by side.
    """

    slots: int
    cost: Callable[[Trial], float]
    share: Callable[[Trial], int] = _one
    at_least: int = 1


@dataclass(frozen=True)
class Recorded:
    """The trials asked by earlier calls, in order of their numbers. `seen[i]` evaluations were visible when trial i was
    asked (-1: unknown, as for trials imported from a fidelity study)."""

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
    """Runs a search until `propose` has nothing to ask and nothing is pending, or `stop(history)` is true.

    A trial that starts on a free virtual worker finishes at now + cost(trial), in virtual seconds. Evaluations become
    visible in the order of these times (ties by number), not in the order in which the futures complete: the loop
    waits for the next one. So the history is a function of `propose`, `workers` and the evaluations alone.

    New trials are passed to `asked` with the number of evaluations visible at that moment. Recorded trials are
    submitted again (the evaluator takes known evaluations from the journal) but not passed to `asked`. Decisions that
    the record holds completely are not made again, since that would take as long as the first time. But the record may
    have cut the last decision short, and imported trials do not show where workers were left idle on purpose. There
    `propose` is called too, and if it disagrees with the record (say, because a library rounds differently), the record
    wins.

    Once `stop` is true, nothing more is asked, and the loop waits for pending trials. Exceptions of a future or of
    `propose`, and KeyboardInterrupt, pass through.
    """
    history = TimedHistory()
    recorded = Recorded(recorded.trials, recorded.seen or [-1] * len(recorded.trials))
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
    """The trials that were asked at exactly this point according to the record; None if it does not tell."""
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
    """The next trials that fit into `free` slots, recorded ones first."""
    proposed = propose(history, free)
    old = trials = _recorded_next(history, recorded, len(proposed), free)
    if history.asked + len(old) >= len(recorded.trials):
        imported = old[: max(0, _imported(recorded) - history.asked)]
        for known in (imported, old):
            if known != proposed[: len(known)]:  # propose the rest again, given what was asked instead
                left = free - sum(map(share, known))
                beside = History(history.answered, [*history.pending, *known])
                proposed = [*known, *(propose(beside, left) if left > 0 else [])]
        trials = proposed
    trials = _fitting(trials, free, share, alone=not history.pending)
    if len(old) < len(trials):
        asked(trials[len(old) :], len(history.answered))
    return trials


def _imported(recorded: Recorded) -> int:
    """The number of recorded trials that came from a fidelity study."""
    return bisect.bisect_left(recorded.seen, 0)


def _recorded_next(history: TimedHistory, recorded: Recorded, proposed: int, free: int) -> list[Trial]:
    """The recorded trials to submit now, given that the method has proposed `proposed` trials."""
    busy, seen = bool(history.pending), recorded.seen
    start, imported = history.asked, _imported(recorded)
    end = start + (proposed if proposed or busy else free)
    if end >= imported:  # from here on the record tells what was asked by now; if all are idle, its next trial is due
        now = max([len(history.answered), *seen[start : start + (not busy)]])
        end = max(imported, bisect.bisect_right(seen, now))
    return list(recorded.trials[start:end])


def _fitting(trials: list[Trial], free: int, share: Callable[[Trial], int], alone: bool) -> list[Trial]:
    """The first trials that fit into `free` slots. If it would run `alone`, the first always fits: it would otherwise
    wait forever."""
    taken = list(itertools.accumulate(map(share, trials)))
    return trials[: max(bisect.bisect_right(taken, free), int(alone))]
