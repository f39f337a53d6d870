"""What the surrogate said of an architecture, at the end and at any moment before: from the journal alone.

A prediction is made anew from the answers that the journal held at that moment, so that none has seen its own outcome.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from engine.search import ground
from engine.search.journal import History
from engine.search.policies.estimate import Estimate, Use, estimate
from engine.search.policies.known import find_rows, scores
from engine.search.policies.mfkd import BETA
from engine.search.progress import Display
from engine.search.runs import Run
from engine.search.speed import fast_enough
from engine.space import Candidates, SearchSpace, load_space
from engine.trial import Architecture, Evaluation, UsageError

# Estimates are for so many candidates, drawn at random, and those that were asked: millions take seconds each.
SAMPLE = 20_000
# Each takes a fit.
FORETOLD = 100


@dataclass(frozen=True)
class Opinion:
    """What the surrogate made of a candidate: mean and standard deviation of its full score, in normal scores (0 is
    the middle of the candidates, 1 a standard deviation above it), measurement noise included.

    `rank` is its place by upper bound among the `among` candidates that had not been asked for in full; `low` and
    `full` count the scores that this rests on.
    """

    mean: float
    std: float
    rank: int
    among: int
    low: int
    full: int


@dataclass(frozen=True)
class Hindsight:
    """A run with its candidates; `everything` counts them, `candidates` are all of these or a sample. `slow` are those
    of the architectures asked about that only the limit on latency has left out."""

    run: Run
    space: SearchSpace
    candidates: Candidates
    everything: int
    slow: frozenset[Architecture] = frozenset()

    @cached_property
    def at_the_end(self) -> Estimate:
        return self.estimate(self.run.answers)

    def estimate(self, answers: Sequence[Evaluation]) -> Estimate:
        """The surrogate fitted to these answers."""
        plan, history = self.run.plan, History(list(answers), [])
        lows = [scores(self.candidates, history, low) for low in plan.lows]
        return estimate(self.candidates, lows, scores(self.candidates, history, plan.high), plan.seed, Use())

    def opinion(
        self, architecture: Architecture, known: int | None = None, number: int | None = None
    ) -> Opinion | None:
        """What was said of an architecture after the first `known` answers, when `number` trials had been asked; by
        default at the end. None where it is no candidate."""
        row = self.candidates.row(architecture)
        if row is None:
            return None
        answers = self.run.answers[:known]
        fitted = self.at_the_end if known is None else self.estimate(answers)
        free = np.ones(len(self.candidates), dtype=bool)
        free[self._asked_in_full(number)] = False
        free[row] = True
        bound = fitted.mean + BETA * np.sqrt(fitted.variance)
        full = [e.ok for e in answers if e.trial.fidelity == self.run.plan.high]
        low = [e.ok for e in answers if e.trial.fidelity in self.run.plan.lows]
        return Opinion(
            mean=float(fitted.mean[row]),
            std=float(np.sqrt(fitted.variance[row] + fitted.noise)),
            rank=1 + int((bound[free] > bound[row]).sum()),
            among=int(free.sum()),
            low=sum(low),
            full=sum(full),
        )

    def foretold(self) -> dict[int, Opinion]:
        """What the surrogate said when full-fidelity trials were asked, by their number; repeats and what a study
        brought are left out, and of more than FORETOLD only so many are looked at, evenly spread."""
        if self.run.kind == "fidelity":
            return {}
        first: dict[Architecture, tuple[int, int]] = {}
        for trial, known in zip(self.run.record.asked, self.run.record.known, strict=True):
            if trial.fidelity == self.run.plan.high:
                first.setdefault(trial.architecture, (known, trial.number))
        adopted = self.run.adopted
        own = [(architecture, when) for architecture, when in first.items() if when[1] not in adopted]
        some = own[:: math.ceil(len(own) / FORETOLD) or 1]
        said = {number: self.opinion(architecture, known, number) for architecture, (known, number) in some}
        return {number: opinion for number, opinion in said.items() if opinion is not None}

    def _asked_in_full(self, number: int | None) -> list[int]:
        asked = [t.architecture for t in self.run.record.asked[:number] if t.fidelity == self.run.plan.high]
        return [int(row) for row in find_rows(self.candidates, asked) if row >= 0]


def look_back(run: Run, about: Sequence[Architecture] = ()) -> Hindsight:
    """The run with the candidates that its search had, those of `about` in any sample of them. Raises UsageError where
    run.json does not say what data."""
    if "data" not in run.facts:
        raise UsageError(
            f"{run.folder / 'run.json'} does not say how many classes the data has: another version wrote it, or the "
            "search was stopped before it began; call it once more (the same command continues it)"
        )
    space = load_space(run.study.space)
    _, fit = ground.fitting(space, run.study, run.facts["data"], Display("none"))
    inside = [architecture for architecture in about if fit.row(architecture) is not None]
    if run.study.max_latency_ms < math.inf:
        fit, _ = fast_enough(fit, run.study.max_latency_ms, run.folder / "latency.json", True, 0, _measured_already)
    keep = np.random.default_rng(0).permutation(len(fit)) < SAMPLE
    wanted = find_rows(fit, [*(trial.architecture for trial in run.record.asked), *about])
    keep[wanted[wanted >= 0]] = True
    slow = frozenset(architecture for architecture in inside if fit.row(architecture) is None)
    return Hindsight(run, space, fit.where(keep), len(fit), slow)


def _measured_already(sample: Sequence[Architecture]) -> list[float]:
    raise AssertionError("a search that has begun has its latencies in a file")
