"""The one loop of a search: virtual workers, so that decisions do not depend on how fast real ones are."""

from __future__ import annotations

import bisect
import heapq
import itertools
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field

from engine.fleet.drain import answer_of
from engine.search.journal import History
from engine.trial import Evaluation, Trial

Propose = Callable[[History, int], list[Trial]]


@dataclass
class Timeline(History):
    """A history with its virtual clock: `now`, and `times[i]` at which `answered[i]` became visible (seconds)."""

    now: float = 0.0
    times: list[float] = field(default_factory=list)


def _ignore(trials: list[Trial], seen: int) -> None:
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
    asked: Callable[[list[Trial], int], None] = _ignore,
    stop: Callable[[History], bool] = _never,
    shares: Callable[[Trial], int] = _one,
    at_least: int = 1,
    flush: Callable[[], None] = _nothing,
    seen: Sequence[int] = (),
) -> Timeline:
    """Runs a search on `slots` virtual workers until `propose` has nothing to ask and nothing is pending, or `stop`.

    A trial put to a free virtual worker finishes at now + cost(trial), in virtual seconds. Answers become visible
    in the order of these times (ties by number), whatever order the futures complete in: the loop waits for the
    one whose turn it is. So the history is a function of `propose`, `cost` and the answers alone.

    What is asked is handed to `asked` with the number of answers that were visible then. `recorded` are the trials
    that an earlier, killed run had asked, by number, and `seen` those numbers of answers; they are submitted again
    (the caller answers from its journal what has been answered) but not handed to `asked`. Decisions that the record
    shows whole are not made again, which would take as long as it did then. The last of it may be cut short, and
    trials without `seen` (-1: a study brought them) do not show where workers were left idle on purpose: there
    `propose` is asked too, and where it disagrees with the record (a library that rounds otherwise), the record wins.

    Trials that are trained side by side: one takes `shares(trial)` of the slots, and nothing is asked before
    `at_least` slots are free, so that trials come in groups; `flush` is called after each group, before waiting.

    Once `stop(history)` holds nothing more is asked; pending trials are waited for. An exception of a future, of
    `propose`, or KeyboardInterrupt leaves through here.
    """
    history = Timeline()
    seen = seen or [-1] * len(recorded)
    running: list[tuple[float, int, Future[Evaluation]]] = []
    while True:
        free = slots - sum(shares(trial) for trial in history.pending)
        if (free >= at_least or not running) and not stop(history):
            decided = _decided(history, recorded, seen)
            trials = _ask(propose, history, free, recorded, seen, asked, shares) if decided is None else decided
            history.pending.extend(trials)
            for trial in trials:
                heapq.heappush(running, (history.now + cost(trial), trial.number, submit(trial)))
            flush()
        if not running:
            return history
        history.now, number, future = heapq.heappop(running)
        evaluation = answer_of(future)
        history.pending = [trial for trial in history.pending if trial.number != number]
        history.answered.append(evaluation)
        history.times.append(history.now)


def _decided(history: Timeline, recorded: Sequence[Trial], seen: Sequence[int]) -> list[Trial] | None:
    """What the record shows to have been asked at this point, and only at this point; None where it does not say."""
    now, number = len(history.answered), history.asked
    first = seen[number] if number < len(seen) else -1
    if first < now or seen[-1] == now or (first > now and not history.pending):
        return None
    return list(recorded[number : bisect.bisect_right(seen, now, lo=number)])


def _ask(
    propose: Propose,
    history: Timeline,
    free: int,
    recorded: Sequence[Trial],
    seen: Sequence[int],
    asked: Callable[[list[Trial], int], None],
    shares: Callable[[Trial], int],
) -> list[Trial]:
    """The next trials, as many as fit into `free`, recorded ones first."""
    busy = bool(history.pending)
    proposed = propose(history, free)
    start, brought = history.asked, bisect.bisect_left(seen, 0)
    end = start + (len(proposed) if proposed or busy else free)
    if end >= brought:  # from there on the record says what was asked by now; with nobody at work, its next is due
        now = max([len(history.answered), *seen[start : start + (not busy)]])
        end = max(brought, bisect.bisect_right(seen, now))
    old = trials = list(recorded[start:end])
    if start + len(old) >= len(recorded):
        for known in (old[: max(0, brought - start)], old):
            if known != proposed[: len(known)]:  # then what is proposed next must know of what was asked instead
                left = free - sum(map(shares, known))
                beside = History(history.answered, [*history.pending, *known])
                proposed = [*known, *(propose(beside, left) if left > 0 else [])]
        trials = proposed
    taken = list(itertools.accumulate(map(shares, trials)))
    # One that needs more than there is goes alone: else it would wait for ever.
    fitting = max(bisect.bisect_right(taken, free), int(not busy))
    trials = trials[:fitting]
    if len(old) < len(trials):
        asked(trials[len(old) :], len(history.answered))
    return trials
