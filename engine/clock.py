"""The one loop of a search: virtual workers, so that decisions do not depend on how fast real ones are."""

from __future__ import annotations

import bisect
import heapq
import itertools
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field

from engine.journal import History
from engine.trial import Evaluation, Trial

Propose = Callable[[History, int], list[Trial]]


@dataclass
class Timeline(History):
    """A history with its virtual clock: `now`, and `times[i]` at which `answered[i]` became visible (seconds)."""

    now: float = 0.0
    times: list[float] = field(default_factory=list)


def _ignore(trials: list[Trial]) -> None:
    """Nobody keeps a journal."""


def _never(history: History) -> bool:
    return False


def _one(trial: Trial) -> int:
    return 1


def _nothing() -> None:
    """Trials are on their way as soon as they are submitted."""


def drive(
    propose: Propose,
    slots: int,
    submit: Callable[[Trial], Future[Evaluation]],
    cost: Callable[[Trial], float],
    recorded: Sequence[Trial] = (),
    asked: Callable[[list[Trial]], None] = _ignore,
    stop: Callable[[History], bool] = _never,
    shares: Callable[[Trial], int] = _one,
    at_least: int = 1,
    flush: Callable[[], None] = _nothing,
) -> Timeline:
    """Runs a search on `slots` virtual workers until `propose` has nothing to ask and nothing is pending, or `stop`.

    A trial put to a free virtual worker finishes at now + cost(trial), in virtual seconds. Answers become visible
    in the order of these times (ties by number), whatever order the futures complete in: the loop waits for the
    one whose turn it is. So the history is a function of `propose`, `cost` and the answers alone.

    `recorded` are the trials that an earlier, killed run had asked, by number; they are submitted again (the
    caller answers from its journal what has been answered) but not handed to `asked`. `propose` is asked for them
    too: it may have left workers idle on purpose, and only it knows when. Where it disagrees with the record (a
    library that rounds otherwise), the record wins.

    Trials that are trained side by side: one takes `shares(trial)` of the slots, and nothing is asked before
    `at_least` slots are free, so that trials come in groups; `flush` is called after each group, before waiting.

    Once `stop(history)` holds nothing more is asked; pending trials are waited for. An exception of a future, of
    `propose`, or KeyboardInterrupt leaves through here.
    """
    history = Timeline()
    running: list[tuple[float, int, Future[Evaluation]]] = []
    while True:
        free = slots - sum(shares(trial) for trial in history.pending)
        if (free >= at_least or not running) and not stop(history):
            for trial in _ask(propose, history, free, recorded, asked, shares):
                heapq.heappush(running, (history.now + cost(trial), trial.number, submit(trial)))
            flush()
        if not running:
            return history
        history.now, number, future = heapq.heappop(running)
        evaluation = future.result()
        history.pending = [trial for trial in history.pending if trial.number != number]
        history.answered.append(evaluation)
        history.times.append(history.now)


def _ask(
    propose: Propose,
    history: Timeline,
    free: int,
    recorded: Sequence[Trial],
    asked: Callable[[list[Trial]], None],
    shares: Callable[[Trial], int],
) -> list[Trial]:
    """The next trials, as many as fit into `free`, recorded ones first; they are pending in `history` afterwards."""
    busy = bool(history.pending)
    proposed = propose(history, free)
    old = recorded[history.asked : history.asked + (len(proposed) if proposed or busy else free)]
    trials = [*old, *proposed[len(old) :]]
    taken = list(itertools.accumulate(map(shares, trials)))
    # One that needs more than there is goes alone: else it would wait for ever.
    fitting = max(bisect.bisect_right(taken, free), int(not busy))
    trials = trials[:fitting]
    if len(old) < len(trials):
        asked(trials[len(old) :])
    history.pending.extend(trials)
    return trials
