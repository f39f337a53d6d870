"""What the surrogate predicted for an architecture, now and at any earlier moment, from the journal alone.

A prediction is recomputed from the evaluations that the journal held at that moment, so it has not seen its outcome.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np

from engine.config import needs_latency
from engine.search.latency.limit import fast_enough, networks_of
from engine.search.latency.model import looked_up
from engine.search.latency.table import read_table
from engine.search.methods.estimate import Estimate, SurrogateInputs, Weight, estimate, learned_weights
from engine.search.methods.mfkd import BETA
from engine.search.methods.readout import by_best_readout
from engine.search.methods.scores import find_rows, scores
from engine.search.progress import Display
from engine.search.proxies import with_trends
from engine.search.runs import Run
from engine.search.setup import find_candidates
from engine.space import Candidates, SearchSpace
from engine.spaces.load import load_space
from engine.trial import Architecture, Evaluation, History

# Predictions cover this many candidates at random and those that were asked for; millions would take seconds.
SAMPLE = 20_000
# At most this many predictions at ask time, since each takes a fit.
MAX_AT_ASK_TIME = 100


@dataclass(frozen=True)
class Prediction:
    """The surrogate's prediction for a candidate: mean and standard deviation of its full score, including measurement
    noise, in normal scores (0 is the middle of the candidates, 1 is one standard deviation above it).

    `rank` is its rank by upper bound among the `among` candidates not yet asked for in full; `low` and `full` count the
    scores that the surrogate was fitted to.
    """

    mean: float
    std: float
    rank: int
    among: int
    low: int
    full: int


@dataclass(frozen=True)
class RunPredictions:
    """The predictions of a run. It had `everything` candidates; `candidates` holds all of them or a sample.

    `slow` holds the architectures asked about that only the latency limit excludes: milliseconds, whether measured.
    """

    run: Run
    space: SearchSpace
    candidates: Candidates
    everything: int
    slow: Mapping[Architecture, tuple[float, bool]] = field(default_factory=dict)

    @cached_property
    def at_the_end(self) -> Estimate:
        return self.estimate(self.run.answers)

    def estimate(self, answers: Sequence[Evaluation]) -> Estimate:
        """The surrogate fitted to these evaluations."""
        plan = self.run.plan
        history = by_best_readout(History(list(answers), []), plan)
        lows = [scores(self.candidates, history, low) for low in plan.below_full]
        full = scores(self.candidates, history, plan.high)
        return estimate(self.candidates, lows, full, plan.seed, SurrogateInputs())

    def weights(self) -> list[Weight]:
        """What the last fit has learned to trust; nothing before there is a full result, or in a fidelity study."""
        plan = self.run.plan
        if self.run.kind == "fidelity-study" or not len(self.at_the_end.y):
            return []
        names = [low.name for low in plan.lows] if len(plan.lows) > 1 else ["low fidelity"]
        names += [fidelity.name for fidelity in plan.below_full[len(plan.lows) :]]
        return learned_weights(self.at_the_end, names)

    def predict(
        self, architecture: Architecture, known: int | None = None, number: int | None = None
    ) -> Prediction | None:
        """The prediction for an architecture after the first `known` evaluations, when `number` trials had been asked.

        By default, after all of them. None if the architecture is not a candidate.
        """
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
        return Prediction(
            mean=float(fitted.mean[row]),
            std=float(np.sqrt(fitted.variance[row] + fitted.noise)),
            rank=1 + int((bound[free] > bound[row]).sum()),
            among=int(free.sum()),
            low=sum(low),
            full=sum(full),
        )

    def at_ask_time(self) -> dict[int, Prediction]:
        """The predictions for full-fidelity trials at the moment when these were asked, by trial number.

        Repeats and trials imported from a fidelity study are left out. Of more than MAX_AT_ASK_TIME trials, an evenly
        spaced selection is used.
        """
        if self.run.kind == "fidelity-study":
            return {}
        first: dict[Architecture, tuple[int, int]] = {}
        for trial, known in zip(self.run.record.asked, self.run.record.known, strict=True):
            if trial.fidelity == self.run.plan.high:
                first.setdefault(trial.architecture, (known, trial.number))
        imported = self.run.imported
        own = [(architecture, when) for architecture, when in first.items() if when[1] not in imported]
        some = own[:: math.ceil(len(own) / MAX_AT_ASK_TIME) or 1]
        found = {number: self.predict(architecture, known, number) for architecture, (known, number) in some}
        return {number: prediction for number, prediction in found.items() if prediction is not None}

    def _asked_in_full(self, number: int | None) -> list[int]:
        asked = [t.architecture for t in self.run.record.asked[:number] if t.fidelity == self.run.plan.high]
        return [int(row) for row in find_rows(self.candidates, asked) if row >= 0]


def load_predictions(run: Run, about: Sequence[Architecture] = ()) -> RunPredictions:
    """The predictions of a run, over the candidates that its search had; a sample always includes those in `about`."""
    space = load_space(run.config.space)
    _, fit = find_candidates(space, run.config, run.data, Display("none"))
    inside = [architecture for architecture in about if fit.row(architecture) is not None]
    slow: dict[Architecture, tuple[float, bool]] = {}
    if needs_latency(run.config):
        networks, table = networks_of(run.config, run.data), read_table(run.folder.latencies)
        fit, _ = fast_enough(fit, networks, table, run.config.max_latency_ms)
        slow = looked_up(networks, table, [architecture for architecture in inside if fit.row(architecture) is None])
    fit = with_trends(fit, run.proxies)
    keep = np.random.default_rng(0).permutation(len(fit)) < SAMPLE
    wanted = find_rows(fit, [*(trial.architecture for trial in run.record.asked), *about])
    keep[wanted[wanted >= 0]] = True
    return RunPredictions(run, space, fit.where(keep), len(fit), slow)
