"""The trials of a fidelity study: the same architectures at full fidelity and at several low ones."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from engine.config import Plan
from engine.search.fidelity_study.ranking import StudyScores, clearly_worse
from engine.search.methods.scores import IdentityKey
from engine.space import Candidates
from engine.trial import READOUTS, Architecture, Evaluation, Fidelity, History, Trial

# Architectures that are asked at every fidelity before the next ones, so that early scores are of all fidelities.
BLOCK = 4


@dataclass(frozen=True)
class FidelityStudy:
    """What a study compares: the fidelities `lows` (() stands for some that suit the full one) with the full one, over
    this many `architectures`.

    Each is trained `repeats` times in full and `low_repeats` times at each low fidelity, with different seeds. `drop`:
    stop asking a low fidelity once it is clearly worse than another.
    """

    lows: tuple[Fidelity, ...]
    architectures: int = 16
    repeats: int = 1
    low_repeats: int = 1
    drop: bool = True


def propose_study(
    candidates: Candidates, history: History, plan: Plan, slots: int, study: FidelityStudy
) -> list[Trial]:
    """At most `slots` of the trials that the study still lacks, block by block.

    It depends on the history alone, so that a study can later be extended by architectures, seeds or fidelities.
    """
    seen = [*(e.trial for e in history.answered), *history.pending]
    asked = {(trial.architecture, trial.fidelity, trial.seed) for trial in seen}
    dropped = clearly_worse(study_scores(candidates, history, plan, study)) if study.drop else set()
    wanted = _wanted(study_architectures(candidates, study.architectures, plan.seed), plan, study)
    missing = (trial for trial in wanted if trial not in asked and trial[1] not in dropped)
    return [Trial(history.asked + place, *trial) for place, trial in enumerate(itertools.islice(missing, slots))]


def _wanted(
    architectures: Sequence[Architecture], plan: Plan, study: FidelityStudy
) -> Iterator[tuple[Architecture, Fidelity, int]]:
    """Architecture, fidelity and seed of every trial of the study, in the order in which they are asked."""
    for start in range(0, len(architectures), BLOCK):
        block = architectures[start : start + BLOCK]
        # Long trainings first: at the end, short ones fill the free workers.
        for fidelity, times in [(plan.high, study.repeats), *((low, study.low_repeats) for low in study.lows)]:
            for repeat in range(times):
                for architecture in block:
                    yield architecture, fidelity, plan.seed + repeat


def study_architectures(candidates: Candidates, count: int, seed: int) -> list[Architecture]:
    """`count` architectures spread evenly over the ranks by MACs; a smaller count gives the first of the same list."""
    return [candidates.architecture(row) for row in _spread_by_macs(IdentityKey(candidates), count, seed)]


@lru_cache(maxsize=2)
def _spread_by_macs(key: IdentityKey, count: int, seed: int) -> tuple[int, ...]:
    """Rows whose ranks by MACs follow a randomly shifted van der Corput sequence; ties in MACs are shuffled."""
    macs = key.value.macs
    rng = np.random.default_rng(seed)
    shift = rng.random()
    order = np.lexsort((rng.random(len(macs)), macs))
    rows: dict[int, None] = {}
    for place in itertools.count():
        if len(rows) >= min(count, len(macs)):
            return tuple(rows)
        reversed_bits = sum(((place >> bit) & 1) / 2 ** (bit + 1) for bit in range(place.bit_length()))
        rows.setdefault(int(order[int((reversed_bits + shift) % 1.0 * len(order))]))
    raise AssertionError("unreachable")


def study_scores(candidates: Candidates, history: History, plan: Plan, study: FidelityStudy) -> StudyScores:
    """The scores of the study's architectures that have been trained in full at least once."""
    table: dict[tuple[Fidelity, Architecture], list[Evaluation]] = {}
    for evaluation in history.answered:
        if evaluation.ok:
            table.setdefault((evaluation.trial.fidelity, evaluation.trial.architecture), []).append(evaluation)
    rows = _spread_by_macs(IdentityKey(candidates), study.architectures, plan.seed)
    trained = {row: a for row in rows if (plan.high, a := candidates.architecture(row)) in table}
    answers = {f: [table.get((f, a), []) for a in trained.values()] for f in (plan.high, *study.lows)}

    def read(name: str) -> dict[Fidelity, list[list[float]]]:
        return {
            f: [[value for e in own if (value := e.readout(name)) is not None] for own in column]
            for f, column in answers.items()
        }

    return StudyScores(
        architectures=list(trained.values()),
        macs=candidates.macs[list(trained)],
        high=plan.high,
        accuracies=read("accuracy"),
        seconds={
            f: [sum(e.seconds for e in own) / max(1, len(own)) for own in column] for f, column in answers.items()
        },
        other_readouts={name: read(name) for name in READOUTS if name != "accuracy"},
    )
