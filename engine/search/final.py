"""The end of a search: its winner is trained once more, for long, and so are the networks that it is compared with.

These trainings are trials in the journal like any other, but they include the validation images and are scored on the
test split, so no decision of the search sees them (`Record.searched`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from engine.config import When, final_fidelity
from engine.search.baseline_networks import Baseline, baseline_networks
from engine.search.comparison import difference, images_in, standard_error, verdict
from engine.search.journal import Journal, Record, read_journal
from engine.search.run import evaluate_at_once, used_up
from engine.search.setup import OVERHEAD_MACS, SearchSetup
from engine.tasks import TestTask
from engine.trial import Architecture, Evaluation, Fidelity, History, Trial, failed

Json = dict[str, Any]
TEACHER = "the pretrained network, fine-tuned"


@dataclass(frozen=True)
class Wanted:
    """What to train at `fidelity`; `left_out` says why the winner is not trained, or if it is, no baseline."""

    fidelity: Fidelity
    winner: Architecture | None = None
    baselines: Sequence[Baseline] = ()
    left_out: str = ""

    @property
    def architectures(self) -> list[Architecture]:
        """Each architecture once, the winner first."""
        named = [self.winner, *(one.architecture for one in self.baselines)]
        return list(dict.fromkeys(one for one in named if one is not None))


@dataclass(frozen=True)
class FinalTrainings:
    """The evaluations at the final fidelity, by architecture, and all that the journal holds."""

    wanted: Wanted
    found: dict[Architecture, Evaluation] = field(default_factory=dict)
    everything: Sequence[Evaluation] = ()


def train_finals(setup: SearchSetup, history: History, best: Evaluation, journal: Journal) -> FinalTrainings:
    """Trains the winner, whose evaluation in the search is `best`, and the baselines at the final fidelity, as far as
    the settings and the budget allow.

    What the journal holds is not trained again, failures included.
    """
    record = read_journal(journal.path)
    wanted = choose(setup, history, best, record)
    trials = final_trials(setup, record, wanted)
    known = {trial.number for trial in record.asked}
    journal.ask([trial for trial in trials if trial.number not in known], len(history.answered))
    if trials:
        display = setup.context.display
        names = ", ".join(f"{one.architecture} ({one.name})" for one in wanted.baselines)
        display.say(f"final training: the winner {wanted.winner}" + (f"; baselines: {names}" if names else ""))
        if setup.teacher is not None and wanted.fidelity.kd_loss == "none":
            display.say("final training: not distilled, since the teacher is not clearly better than the winner")
        display.expect(wanted.fidelity.name, len(trials))
    answers = evaluate_at_once(setup, journal, trials)
    everything = [e for e in read_journal(journal.path).answers.values() if e.trial.fidelity.with_valid]
    return FinalTrainings(wanted, {e.trial.architecture: e for e in answers}, everything)


def fidelity_for(setup: SearchSetup, best: Evaluation) -> Fidelity:
    """The final fidelity of a search, distilled only from a teacher that is better than the winner was in the search.

    Better on the validation images, by more than a standard error. A long training overtakes a weaker teacher and is
    then held back by it. In a pretrained space the teacher is the winner uncut, so the
    winner cannot overtake it.
    """
    fidelity, teacher = final_fidelity(setup.context.config), setup.teacher
    error = standard_error(best.accuracy, setup.facts.images["valid"])
    uncut = setup.context.space.inherit is not None
    if teacher is not None and (uncut or teacher.accuracy > best.accuracy + error):
        return fidelity
    return replace(fidelity, kd_loss="none", weights=())


def choose(setup: SearchSetup, history: History, best: Evaluation, record: Record) -> Wanted:
    """What to train, given what the search has cost.

    Costs are expected ones (`SearchSetup.cost`), so that a resumed run chooses the same. What the journal `record`
    holds already is never left out for its cost.
    """
    context, budget, fidelity = setup.context, setup.context.budget, fidelity_for(setup, best)
    if budget.final_training == "never":
        return Wanted(fidelity)
    winner = best.trial.architecture
    asked = {trial.architecture for trial in record.asked if trial.fidelity == fidelity}
    over, most = used_up(context, sum(e.seconds for e in record.answers.values())), searching_cost(setup, history)
    costs: dict[Architecture, float] = {}

    def fits(architecture: Architecture, when: When) -> bool:
        cost = setup.cost(Trial(0, architecture, fidelity))
        cheap = when == "always" or sum(costs.values()) + cost <= most
        if architecture in asked or architecture in costs or (cheap and not over):
            costs[architecture] = cost
            return True
        return False

    if not fits(winner, budget.final_training):
        why_not = "the winner was not trained to the end, " + _why_not(over, "--final-training")
        return Wanted(fidelity, left_out=why_not)
    if budget.baselines == "never":
        return Wanted(fidelity, winner, left_out="no baseline was trained (--no-baselines)")
    if len(setup.candidates) == 1:
        return Wanted(fidelity, winner, left_out="there was only one candidate")
    baselines = baseline_networks(context.space, setup.candidates, setup.largest.architecture(0))
    kept = [one for one in baselines if fits(one.architecture, budget.baselines)]
    return Wanted(fidelity, winner, kept, "no baseline was trained, " + _why_not(over, "--baselines"))


def _why_not(over: str, flag: str) -> str:
    if over:
        return f"because {over} was used up; raise it and run the same command again"
    return f"because that would have cost more than the search did; {flag} always does it anyway"


def searching_cost(setup: SearchSetup, history: History) -> float:
    """Expected cost of the search, that of its own teacher included, in the unit of `SearchSetup.cost`."""
    config, cost = setup.context.config, sum(setup.cost(e.trial) for e in history.answered)
    if setup.teacher is not None and config.teacher == "auto":
        cost += setup.teacher.epochs * (float(setup.largest.macs[0]) + OVERHEAD_MACS)
    return cost


def final_trials(setup: SearchSetup, record: Record, wanted: Wanted) -> list[Trial]:
    """A trial at the final fidelity for each architecture: that of the journal, if it has one."""
    fidelity, seed, architectures = wanted.fidelity, setup.plan.seed, wanted.architectures
    known = {trial.architecture: trial for trial in record.asked if (trial.fidelity, trial.seed) == (fidelity, seed)}
    new = [architecture for architecture in architectures if architecture not in known]
    numbers = {architecture: len(record.asked) + place for place, architecture in enumerate(new)}
    return [known.get(one) or Trial(numbers[one], one, fidelity, seed) for one in architectures]


def final_rows(setup: SearchSetup, trained: FinalTrainings) -> Json:
    """The part of result.json about the final trainings: `final`, `baselines` and `verdict`."""
    wanted = trained.wanted
    winner = trained.found.get(wanted.winner) if wanted.winner else None
    if winner is None or not winner.ok:
        why = f"its last training failed ({winner.status}: {winner.error})" if winner else wanted.left_out
        said = f"Whether the search was worth it is not known: {why}." if why else ""  # nobody asked
        return {"final": None, "baselines": [], "verdict": said}
    final = _row(setup, winner)
    rows = [_baseline_row(one, winner, trained.found[one.architecture], setup) for one in wanted.baselines]
    if setup.context.space.families and setup.teacher is not None and setup.context.budget.baselines != "never":
        rows.append(_teacher_row(setup, winner))
    classes = len(setup.facts.classes)
    return {"final": final, "baselines": rows, "verdict": verdict(final, rows, wanted.left_out, classes)}


def _row(setup: SearchSetup, evaluation: Evaluation) -> Json:
    trial = evaluation.trial
    return {
        "architecture": str(trial.architecture),
        "test_accuracy": evaluation.accuracy,
        "test_standard_error": standard_error(evaluation.accuracy, images_in(evaluation.hits)),
        "test_images": images_in(evaluation.hits),
        "macs": evaluation.macs,
        "params": evaluation.params,
        "epochs": trial.fidelity.epochs,
        "kd_loss": trial.fidelity.kd_loss,
        "weights": str(setup.context.folder.weights(trial)),
    }


def _baseline_row(baseline: Baseline, winner: Evaluation, evaluation: Evaluation, setup: SearchSetup) -> Json:
    start = {"name": baseline.name, "within_limits": baseline.within}
    if failed(evaluation.status):
        status = {"status": evaluation.status, "error": evaluation.error}
        return {**start, "architecture": str(baseline.architecture), **status}
    return {**start, **_row(setup, evaluation), **_compared(winner.hits, evaluation.hits)}


def _teacher_row(setup: SearchSetup, winner: Evaluation) -> Json:
    """The teacher of a space of cut networks: what there is without any cut."""
    context, teacher = setup.context, setup.teacher
    assert teacher is not None
    tested = context.answer(TestTask(context.worker, None, teacher.path))
    whole = teacher.network == f"{context.config.space}#{setup.largest.architecture(0)}"
    return {
        "name": TEACHER,
        "within_limits": False,
        "network": teacher.network,
        "test_accuracy": tested["test_accuracy"],
        "test_standard_error": standard_error(tested["test_accuracy"], images_in(tested["hits"])),
        "test_images": images_in(tested["hits"]),
        "macs": int(setup.largest.macs[0]) if whole else None,
        "params": int(setup.largest.params[0]) if whole else None,
        "epochs": teacher.epochs,
        "weights": tested["weights"],
        **_compared(winner.hits, tested["hits"]),
    }


def _compared(winner: str, other: str) -> Json:
    gain, error = difference(winner, other)
    return {"difference": gain, "difference_standard_error": error}
