"""The samplers of Optuna as search methods: full trials alone, through the library's ask-and-tell interface.

Optuna draws from all combinations of the options, but not all of them are candidates: a table may lack some, a cap may
exclude them, others are networks that are identical to a candidate. So the nearest candidate that has not been asked
takes the place of a suggestion, and it is what the study is told of. Optuna's own means against a cap, constraints that
are learned from trials, would spend trainings on networks that are known to be too large.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from engine.config import Plan
from engine.search.methods.scores import Array, ask, generator, scores, unasked
from engine.space import Candidates
from engine.trial import History, Trial

if TYPE_CHECKING:
    from optuna import Study
    from optuna.distributions import BaseDistribution

Distributions = dict[str, "BaseDistribution"]


def optuna_search(candidates: Candidates, history: History, plan: Plan, slots: int, sampler: str) -> list[Trial]:
    """Full trials that a sampler of that name suggests, with its default settings: TPESampler or GPSampler.

    The study is made again from the history for each suggestion, so that what follows depends on nothing else. Failed
    trials are not told.
    """
    import optuna

    optuna.logging.set_verbosity(optuna.logging.WARNING)  # it announces every study
    high, rng = scores(candidates, history, plan.high), generator(history, plan)
    free, space = unasked(candidates, high.asked), _distributions(candidates)
    rows: list[int] = []
    for _ in range(min(slots, plan.max_high - high.trials, int(free.sum()))):
        seed = int(rng.integers(2**32))
        study = optuna.create_study(direction="maximize", sampler=getattr(optuna.samplers, sampler)(seed=seed))
        _tell(study, space, candidates.choices[high.rows], high.values)
        _tell(study, space, candidates.choices[np.append(high.pending, rows).astype(np.int64)], None)
        suggestion = study.ask(space).params
        distance = np.where(free, distances(candidates, [suggestion[name] for name in space]), np.inf)
        rows.append(int(rng.choice(np.flatnonzero(distance == distance.min()))))
        free[rows[-1]] = False
    return ask(candidates, history, plan, rows, plan.high)


def _distributions(candidates: Candidates) -> Distributions:
    """A distribution of option indices for each choice: integers if its options are ordered, else categories."""
    from optuna.distributions import CategoricalDistribution, IntDistribution

    most = candidates.choices.max(axis=0).tolist()
    return {
        f"choice{place}": IntDistribution(0, last) if ordered else CategoricalDistribution(range(last + 1))
        for place, (last, ordered) in enumerate(zip(most, _ordered(candidates), strict=True))
    }


def _ordered(candidates: Candidates) -> tuple[bool, ...]:
    return candidates.ordinal or (False,) * candidates.choices.shape[1]


def _tell(study: Study, space: Distributions, choices: npt.NDArray[np.integer], values: Array | None) -> None:
    """Adds trials of architectures, choices (k, d), to a study: finished ones with their values (k,), or running."""
    from optuna.trial import TrialState, create_trial

    for place, line in enumerate(choices.tolist()):
        params = dict(zip(space, line, strict=True))
        state, value = (TrialState.RUNNING, None) if values is None else (TrialState.COMPLETE, float(values[place]))
        study.add_trial(create_trial(state=state, value=value, params=params, distributions=space))


def distances(candidates: Candidates, suggestion: Sequence[int]) -> Array:
    """How far each candidate (n,) is from option indices (d,): the sum over its choices of the difference in places,
    from 0 to 1, if the options are ordered, else of whether they differ."""
    total = np.zeros(len(candidates))
    for place, (option, ordered) in enumerate(zip(suggestion, _ordered(candidates), strict=True)):
        own = candidates.choices[:, place].astype(np.int64)
        total += np.abs(own - option) / max(int(own.max()), 1) if ordered else own != option
    return total
