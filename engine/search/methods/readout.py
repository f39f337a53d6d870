"""Which readout of a low-fidelity training a search goes by: accuracy, cross entropy, or agreement with the teacher."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from engine.config import Plan
from engine.trial import READOUTS, Evaluation, Fidelity, History, mean_accuracies, mean_readouts
from surrogate.quality import kendall_tau

# Architectures that need both a low and a full result before another readout than accuracy may be chosen.
ENOUGH = 12


def by_best_readout(history: History, plan: Plan) -> History:
    """The history with the best readout of each low fidelity in the place of its accuracy.

    An opening is read by accuracy: nothing was trained there, let alone distilled.
    """
    best = {low: best_readout(history.answered, low, plan.high) for low in plan.lows}
    if set(best.values()) <= {"accuracy"}:
        return history
    answered = [replace(e, accuracy=e.readout(best.get(e.trial.fidelity, "accuracy")) or 0.0) for e in history.answered]
    return History(answered, history.pending)


def best_readout(answers: Sequence[Evaluation], low: Fidelity, high: Fidelity) -> str:
    """The readout of a low fidelity that has the highest Kendall's tau with full accuracy; at first, accuracy.

    Only readouts that all its evaluations have are compared: those of earlier versions have accuracy alone.
    """
    cheap = [e for e in answers if e.ok and e.trial.fidelity == low]
    measured = [name for name in READOUTS if all(e.readout(name) is not None for e in cheap)]
    full = mean_accuracies(e for e in answers if e.ok and e.trial.fidelity == high)
    both = [architecture for architecture in mean_accuracies(cheap) if architecture in full]
    if len(measured) == 1 or len(both) < ENOUGH:
        return "accuracy"

    def tau(name: str) -> float:
        own = mean_readouts(cheap, name)
        return kendall_tau([own[a] for a in both], [full[a] for a in both])

    return max(measured, key=tau)  # the first of equals, which is accuracy
