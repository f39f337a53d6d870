"""What to try next: a dict of methods, each a pure function of the history, and the final recommendation."""

from __future__ import annotations

from collections.abc import Callable

from engine.config import Plan
from engine.journal import History
from engine.policies.known import ask, generator, scores, unasked
from engine.policies.mfkd import mfkd
from engine.space import Candidates
from engine.trial import Evaluation, Trial, UsageError

Method = Callable[[Candidates, History, Plan, int], list[Trial]]


def random(candidates: Candidates, history: History, plan: Plan, slots: int) -> list[Trial]:
    """Full fidelity, uniformly at random, without replacement."""
    high = scores(candidates, history, plan.high)
    free = unasked(candidates, high.asked).nonzero()[0]
    count = min(slots, plan.max_high - high.trials, len(free))
    rows = generator(history, plan).choice(free, size=max(count, 0), replace=False)
    return ask(candidates, history, plan, rows, plan.high)


METHODS: dict[str, Method] = {"mfkd": mfkd, "random": random}
ABLATIONS: dict[str, Method] = {}


def propose(candidates: Candidates, history: History, plan: Plan, slots: int) -> list[Trial]:
    """At most `slots` new trials of plan.method, numbered on from history.asked; none: wait for answers, or done.

    Raises UsageError for an unknown method.
    """
    if plan.method not in METHODS:
        raise UsageError(f"no method '{plan.method}'; there are {', '.join(METHODS)}")
    return METHODS[plan.method](candidates, history, plan, slots)


def winner(candidates: Candidates, history: History, plan: Plan) -> Evaluation | None:
    """The full-fidelity answer to recommend, None where none succeeded."""
    full = [e for e in history.answered if e.ok and e.trial.fidelity == plan.high]
    return max(full, key=lambda e: e.accuracy, default=None)
