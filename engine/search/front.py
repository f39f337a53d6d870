"""The front of a run: of the networks trained in full, those that no other one beats in both accuracy and cost."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from statistics import mean
from typing import Any

from engine.run_folder import RunFolder
from engine.search.comparison import CLEAR, images_in, standard_error, standard_error_of_mean
from engine.trial import Architecture, Evaluation, Fidelity

Json = dict[str, Any]

# Fields of a FrontMember that a front may trade accuracy for, with their unit and its size.
COSTS: dict[str, tuple[str, float]] = {
    "macs": ("million MACs", 1e6),
    "params": ("million parameters", 1e6),
    "latency_ms": ("ms", 1.0),
}


@dataclass(frozen=True)
class FrontMember:
    """A network that was trained in full, what it costs, and how its accuracy was judged.

    Accuracies are fractions of 1. `valid_accuracy` is the mean of trainings with the `seeds`, each of `epochs`, on
    `valid_images` images; `weights` are those of the best of these trainings. If the network had a final training too,
    `test_accuracy` is that of `final_weights`, after `final_epochs`, on `test_images` images. `latency_ms` is known in
    a search with a limit on it.

    `within_error_of` is the cheapest member of the front that is not clearly less accurate than this one (by two
    standard errors of the difference): if the error is allowed for, that one may beat this one in both. None if there
    is no such member.
    """

    architecture: Architecture
    valid_accuracy: float
    valid_standard_error: float
    macs: int
    params: int
    latency_ms: float | None
    epochs: int
    seeds: tuple[int, ...]
    valid_images: int
    weights: Path
    test_accuracy: float | None = None
    test_standard_error: float | None = None
    test_images: int | None = None
    final_epochs: int | None = None
    final_weights: Path | None = None
    within_error_of: Architecture | None = None

    def cost(self, name: str) -> float | None:
        """One of COSTS, in MACs, parameters or milliseconds; None if it is not known."""
        value: float | None = getattr(self, name)
        return value

    @property
    def judged(self) -> str:
        """How the validation accuracy was measured, for people."""
        seeds = ", ".join(map(str, self.seeds))
        with_seeds = f"with seed {seeds}" if len(self.seeds) == 1 else f"with the seeds {seeds} (their mean)"
        return f"Trained for {self.epochs} epochs {with_seeds}; scored on {self.valid_images:,} validation images"


def in_unit(value: float, cost: str) -> str:
    """A cost in its unit (COSTS), with three significant digits or more, for people: 0.143, 8.49, 4,122."""
    scaled = value / COSTS[cost][1]
    return f"{scaled:,.0f}" if scaled >= 99.95 else f"{scaled:.3g}"


def cost_axis(objectives: str) -> str:
    """The cost, one of COSTS, that a search with these objectives trades accuracy for; MACs for accuracy alone."""
    named = objectives.split(",")[1:]
    name = {"latency": "latency_ms"}.get(named[0], named[0]) if named else "macs"
    return name if name in COSTS else "macs"


def trained_in_full(
    answers: Iterable[Evaluation],
    high: Fidelity,
    valid_images: int,
    folder: RunFolder,
    latencies: Mapping[Architecture, float] | None = None,
) -> list[FrontMember]:
    """Every network with a successful training at the full fidelity `high`, in order of its first one.

    `latencies` are milliseconds that are known from elsewhere, for networks that were not timed when they were trained.
    """
    full: dict[Architecture, list[Evaluation]] = {}
    finals: dict[Architecture, Evaluation] = {}
    for e in sorted(answers, key=lambda e: e.trial.number):  # not in order of arrival, which a resumed run may change
        if e.ok and e.trial.fidelity == high:
            full.setdefault(e.trial.architecture, []).append(e)
        elif e.ok and e.trial.fidelity.with_valid:
            finals[e.trial.architecture] = e
    members = [_member(found, finals.get(one), valid_images, folder) for one, found in full.items()]
    return [
        replace(member, latency_ms=(latencies or {}).get(member.architecture)) if member.latency_ms is None else member
        for member in members
    ]


def _member(found: Sequence[Evaluation], final: Evaluation | None, images: int, folder: RunFolder) -> FrontMember:
    best = max(found, key=lambda e: e.accuracy)
    accuracies = [e.accuracy for e in found]
    times = [e.costs["latency_ms"] for e in found if "latency_ms" in e.costs]
    member = FrontMember(
        architecture=best.trial.architecture,
        valid_accuracy=mean(accuracies),
        valid_standard_error=standard_error_of_mean(accuracies, images),
        macs=best.macs,
        params=best.params,
        latency_ms=round(mean(times), 3) if times else None,
        epochs=best.trial.fidelity.epochs,
        seeds=tuple(e.trial.seed for e in found),
        valid_images=images,
        weights=folder.weights(best.trial),
    )
    if final is None:
        return member
    return replace(
        member,
        test_accuracy=final.accuracy,
        test_standard_error=standard_error(final.accuracy, images_in(final.hits)),
        test_images=images_in(final.hits),
        final_epochs=final.trial.fidelity.epochs,
        final_weights=folder.weights(final.trial),
    )


def front(trained: Sequence[FrontMember], cost: str) -> list[FrontMember]:
    """The networks that no other one beats in both validation accuracy and a cost (one of COSTS), cheapest first.

    Of networks that are equal in both, the first counts. Those whose cost is not known are left out.
    """
    known = [(member.cost(cost) or 0.0, -member.valid_accuracy, member) for member in trained if member.cost(cost)]
    kept: list[FrontMember] = []
    for _, _, member in sorted(known, key=lambda entry: entry[:2]):
        if kept and member.valid_accuracy <= kept[-1].valid_accuracy:
            continue
        rival = next((other for other in kept if not clearly_better(member, other)), None)
        kept.append(replace(member, within_error_of=rival.architecture if rival else None))
    return kept


def clearly_better(one: FrontMember, other: FrontMember) -> bool:
    """Whether the validation accuracy of the first is above that of the other by more than the error of the difference.

    The runs do not record which validation images a network got right, so the error is that of independent accuracies:
    it is larger than the paired one.
    """
    error = (one.valid_standard_error**2 + other.valid_standard_error**2) ** 0.5
    return one.valid_accuracy - other.valid_accuracy > CLEAR * error


def member_row(member: FrontMember) -> Json:
    """A member as plain values, for JSON and CSV."""
    return {item.name: _plain(getattr(member, item.name)) for item in fields(member)}


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else str(value) if isinstance(value, Architecture | Path) else value
