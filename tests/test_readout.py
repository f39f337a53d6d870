"""Which readout of low-fidelity trainings a search goes by, and that accuracy alone names the winner."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest

from engine.config import Plan
from engine.search.methods import propose
from engine.search.methods.readout import ENOUGH, best_readout, by_best_readout
from engine.space import Candidates
from engine.trial import Architecture, Evaluation, Fidelity, History, Trial

LOW, HIGH = Fidelity("low", epochs=1, kd_loss="kd"), Fidelity("high", epochs=20)
PLAN = Plan((LOW,), HIGH)


def answers(pairs: int, best: str = "agreement", noise: float = 1.0) -> list[Evaluation]:
    """Low and full results of as many architectures; one readout ranks them as full training does, others less well."""
    rng = np.random.default_rng(0)
    found = []
    for i in range(pairs):
        quality = i / pairs
        low = {name: 0.3 + 0.3 * (quality if name == best else quality + noise * rng.normal()) for name in ("a", "c")}
        if best == "agreement":
            low = {"accuracy": low["a"], "agreement": 0.3 + 0.3 * quality, "cross_entropy": 3 - low["c"]}
        elif best == "cross_entropy":
            low = {"accuracy": low["a"], "agreement": low["c"], "cross_entropy": 3 - quality}
        else:
            low = {"accuracy": 0.3 + 0.3 * quality, "agreement": low["a"], "cross_entropy": 3 - low["c"]}
        architecture = Architecture((i,))
        found.append(Evaluation(Trial(2 * i, architecture, LOW), "ok", **low))
        found.append(Evaluation(Trial(2 * i + 1, architecture, HIGH), "ok", 0.5 + 0.4 * quality))
    return found


@pytest.mark.parametrize("best", ["accuracy", "cross_entropy", "agreement"])
def test_the_readout_that_ranks_best_is_chosen(best: str) -> None:
    assert best_readout(answers(ENOUGH, best), LOW, HIGH) == best


def test_accuracy_counts_until_there_is_evidence_and_among_equals() -> None:
    assert best_readout([], LOW, HIGH) == "accuracy"
    assert best_readout(answers(ENOUGH - 1), LOW, HIGH) == "accuracy"
    failed = [replace(e, status="oom") if e.trial.number == 1 else e for e in answers(ENOUGH)]
    assert best_readout(failed, LOW, HIGH) == "accuracy"
    assert best_readout(answers(ENOUGH, noise=0.0), LOW, HIGH) == "accuracy"


def test_a_readout_that_some_evaluations_lack_is_not_compared() -> None:
    """A search may start with evaluations of a study by an earlier version."""
    found = answers(ENOUGH)
    found[0] = replace(found[0], agreement=None)
    assert best_readout(found, LOW, HIGH) in ("accuracy", "cross_entropy")
    plain = [replace(e, agreement=None, cross_entropy=None) for e in found]
    assert best_readout(plain, LOW, HIGH) == "accuracy"
    history = History(plain)
    assert by_best_readout(history, PLAN) is history


def test_methods_see_the_best_readout_of_low_results_and_the_accuracy_of_full_ones() -> None:
    found = answers(ENOUGH)
    seen: list[History] = []

    def method(candidates: Candidates, history: History, plan: Plan, slots: int) -> list[Trial]:
        seen.append(history)
        return []

    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(propose.METHODS, "mfkd", method)
        propose.propose(Candidates(*map(np.array, ([[0]], [[0]], [1.0], [1.0]))), History(found), PLAN, 1)
    (history,) = seen
    for before, after in zip(found, history.answered, strict=True):
        assert after.accuracy == (before.agreement if before.trial.fidelity == LOW else before.accuracy)


def test_an_opening_is_read_by_accuracy() -> None:
    """Whatever its evaluations, which trained nothing, say beside it."""
    opening = Fidelity("inherited", epochs=0)
    opened = [
        replace(e, trial=replace(e.trial, fidelity=opening)) if e.trial.fidelity == LOW else e for e in answers(ENOUGH)
    ]
    history = by_best_readout(History(opened + answers(ENOUGH)), replace(PLAN, opening=opening))
    assert [e.accuracy for e in history.answered[: len(opened)]] == [e.accuracy for e in opened]
    low = [e for e in history.answered if e.trial.fidelity == LOW]
    assert [e.accuracy for e in low] == [e.agreement for e in low]


def test_cross_entropy_is_read_as_the_mean_probability_of_the_true_class() -> None:
    evaluation = Evaluation(Trial(0, Architecture((0,)), LOW), "ok", 0.5, cross_entropy=math.log(4))
    assert evaluation.readout("cross_entropy") == pytest.approx(0.25)
    assert (evaluation.readout("accuracy"), evaluation.readout("agreement")) == (0.5, None)


def test_accuracy_alone_names_the_winner() -> None:
    """Full results that differ in nothing but the other readouts have the same winner."""
    count = 3 * ENOUGH
    choices = np.arange(count)[:, None]
    space = Candidates(choices, choices.astype(np.float32) / count, 1e6 + choices[:, 0], np.ones(count))
    found = answers(count)
    fooled = [
        replace(e, agreement=float(e.trial.number == 1), cross_entropy=9.0) if e.trial.fidelity == HIGH else e
        for e in found
    ]
    one, other = (propose.winner(space, History(each), PLAN) for each in (found, fooled))
    assert one is not None
    assert other is not None
    assert one.trial == other.trial
    assert one.accuracy == max(e.accuracy for e in found if e.trial.fidelity == HIGH)
