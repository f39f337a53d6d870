"""What to try next: the methods by name, and the function that asks the one that a plan names."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from functools import partial
from importlib.util import find_spec

from engine.config import Plan
from engine.search.methods import baselines
from engine.search.methods.estimate import SurrogateInputs
from engine.search.methods.mfkd import MfkdOptions, mfkd
from engine.search.methods.nsga2 import nsga2
from engine.search.methods.optuna_samplers import optuna_search
from engine.search.methods.readout import by_best_readout
from engine.search.methods.recommend import winner
from engine.space import PROXY, Candidates
from engine.trial import History, Trial, UsageError, not_installed
from surrogate.xgb import SurrogateParts

__all__ = [
    "ABLATIONS",
    "BASELINES",
    "METHODS",
    "OPTUNA",
    "USE_TRENDS",
    "find_method",
    "is_installed",
    "lacks",
    "propose",
    "winner",
]

# Candidates, what is known, the plan, and the number of free slots -> the trials to ask now.
Method = Callable[[Candidates, History, Plan, int], list[Trial]]

BASELINES: dict[str, Method] = {
    "mfkd1": baselines.mfkd1,
    "mfkd2": baselines.mfkd2,
    "cokriging": baselines.cokriging,
    "gp": baselines.gp,
    "random": baselines.random,
    "evolution": baselines.evolution,
    "halving": baselines.halving,
    "asha": baselines.asha,
    "macs": baselines.macs_only,
    "bore": baselines.bore_search,
    "proxies": baselines.proxies_only,
    "naswot": baselines.naswot,
    "nsga2": nsga2,
    "optuna-tpe": partial(optuna_search, sampler="TPESampler"),
    "optuna-gp": partial(optuna_search, sampler="GPSampler"),
}
METHODS: dict[str, Method] = {"mfkd": mfkd, **BASELINES}

# Methods that read `Candidates.trends`.
USE_TRENDS = ("mfkd", "proxies", "naswot")

# Methods of a library that is an extra.
OPTUNA = ("optuna-tpe", "optuna-gp")

# Methods that cannot do without a low fidelity.
NEED_LOW = ("mfkd1", "mfkd2", "cokriging", "halving", "asha")

# mfkd with one part taken out, for docs/results/replay.md; `replay` takes them by name.
ABLATIONS: dict[str, Method] = {
    "mfkd:no-low": partial(mfkd, options=MfkdOptions(inputs=SurrogateInputs(low=False))),
    "mfkd:no-macs": partial(mfkd, options=MfkdOptions(inputs=SurrogateInputs(macs=False))),
    "mfkd:no-trends": partial(mfkd, options=MfkdOptions(inputs=SurrogateInputs(trends=False))),
    "mfkd:trees-only": partial(mfkd, options=MfkdOptions(inputs=SurrogateInputs(parts=SurrogateParts(linear=False)))),
    "mfkd:linear-only": partial(mfkd, options=MfkdOptions(inputs=SurrogateInputs(parts=SurrogateParts(trees=False)))),
    "mfkd:greedy": partial(mfkd, options=MfkdOptions(beta=0.0)),
    "mfkd:gate": partial(mfkd, options=MfkdOptions(gate=True)),
    "mfkd:unguided": partial(mfkd, options=MfkdOptions(guided=False)),
}


def find_method(name: str) -> Method:
    """The method or ablation of that name.

    Raises UsageError for an unknown one, EnvironmentUnusable for one whose library is not installed.
    """
    method = METHODS.get(name) or ABLATIONS.get(name)
    if method is None:
        raise UsageError(f"no method named '{name}'; choose from {', '.join(METHODS)}")
    if not is_installed(name):
        raise not_installed(f"the method {name} needs Optuna", "optuna")
    return method


def is_installed(name: str) -> bool:
    """Whether the library that a method needs, if any, is installed."""
    return name not in OPTUNA or find_spec("optuna") is not None


def lacks(name: str, lows: Sequence[str], trends: Collection[str]) -> str:
    """What that method needs and there is not, in words; empty if it has all it needs.

    `lows` are the low fidelities, `trends` the names of `Candidates.trends`.
    """
    if name in NEED_LOW and not lows:
        return "low fidelity"
    if name == "naswot" and not set(baselines.NASWOT) & set(trends):
        return f"column {baselines.NASWOT[0]}"
    if name == "proxies" and not any(trend.startswith(PROXY) for trend in trends):
        return f"column {PROXY}NAME"
    return ""


def propose(candidates: Candidates, history: History, plan: Plan, slots: int) -> list[Trial]:
    """At most `slots` new trials of plan.method, numbered from history.asked.

    An empty list means: wait for pending trials or, if there are none, the search is done. Raises UsageError for an
    unknown method. The method sees the best readout of the low fidelities.
    """
    method = find_method(plan.method)
    return method(candidates, by_best_readout(history, plan), plan, slots) if slots > 0 else []
