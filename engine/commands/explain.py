"""`explain`: what a run knows about one architecture, and why it was or was not trained in full."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from jsonargparse import ArgumentParser, Namespace

from engine.commands.flags import add_run_argument, command_parser

if TYPE_CHECKING:
    from engine.search.predictions import Prediction, RunPredictions
    from engine.search.runs import Run
    from engine.trial import Architecture, Evaluation


@dataclass(frozen=True)
class Known:
    """What a run knows about one architecture: whether it was asked for in full, its evaluations, and the surrogate's
    predictions for it when it was asked for and at the end."""

    architecture: Architecture
    asked: bool
    evaluations: list[Evaluation]
    when_asked: Prediction | None
    at_the_end: Prediction | None


def parser() -> ArgumentParser:
    """Flags of the command."""
    parser = command_parser(
        "Show every score of an architecture, what the surrogate predicted for it, and why it was or was not trained "
        "in full."
    )
    add_run_argument(parser)
    parser.usage = "%(prog)s RUN ARCHITECTURE [options]"
    parser.add_argument(
        "architecture", metavar="ARCHITECTURE", type=str, help="option indices joined by '-', like 3-0-2, or winner"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of text")
    return parser


def run(values: Namespace) -> dict[str, Any] | None:
    from engine.search.one_architecture import select_evaluation
    from engine.search.predictions import load_predictions
    from engine.search.runs import open_run, with_answers
    from engine.spaces.load import load_space
    from engine.trial import Architecture

    opened = with_answers(open_run(values.run))
    if values.architecture == "winner":
        architecture = select_evaluation(opened, None).trial.architecture
    else:
        architecture = load_space(opened.config.space).check(Architecture.parse(values.architecture))
    explanation = explain(load_predictions(opened, [architecture]), architecture)
    if values.json:
        return explanation
    print(explanation_text(explanation))
    return None


def explain(past: RunPredictions, architecture: Architecture) -> dict[str, Any]:
    """Everything that a run knows about an architecture, as plain values."""
    from engine.search.runs import row

    known = known_of(past, architecture)
    fitted = any(e.ok and e.trial.fidelity == past.run.plan.high for e in known.evaluations)
    choices = zip(past.space.choices, architecture.choices, strict=True)
    return {
        "architecture": str(architecture),
        "choices": [f"{choice.name} = {choice.options[option]}" for choice, option in choices],
        "evaluations": [row(e) | {"place": place(past, e)} for e in known.evaluations],
        "training_free_scores": training_free(past.run, architecture),
        "predicted_when_asked": known.when_asked and asdict(known.when_asked),
        "predicted_at_the_end": known.at_the_end and asdict(known.at_the_end) | {"fitted_to_its_full_score": fitted},
        "why": why(past, known),
        "weights": [asdict(weight) for weight in past.weights()],
    }


def training_free(run: Run, architecture: Architecture) -> dict[str, Any] | None:
    """The training-free scores of an architecture with their ranks, and the reasons for missing ones; None if it was
    not scored."""
    from engine.search.proxies import ranks

    known = run.proxies.get(architecture)
    if known is None:
        return None
    own = ranks(run.proxies)[architecture]
    among = {name: sum(name in other.scores for other in run.proxies.values()) for name in own}
    scores = {name: {"score": known.scores[name], "place": f"{own[name]} of {among[name]:,}"} for name in own}
    return {"scores": scores, "missing": known.missing, "standing": run.standing.get(architecture)}


def known_of(past: RunPredictions, architecture: Architecture) -> Known:
    run, high = past.run, past.run.plan.high
    evaluations = [e for e in run.answers if e.trial.architecture == architecture]
    asked = next((t for t in run.record.asked if t.architecture == architecture and t.fidelity == high), None)
    when_asked = at_the_end = None
    if run.kind == "search":
        at_the_end = past.predict(architecture)
        if asked and asked.number not in run.imported:
            when_asked = past.predict(architecture, run.record.known[run.record.asked.index(asked)], asked.number)
    return Known(architecture, asked is not None, evaluations, when_asked, at_the_end)


def place(past: RunPredictions, evaluation: Evaluation) -> str | None:
    """The rank of a score among those of its fidelity; None for a failure."""
    if not evaluation.ok:
        return None
    others = past.run.at(evaluation.trial.fidelity)
    return f"{1 + sum(e.accuracy > evaluation.accuracy for e in others)} of {len(others)}"


def why(past: RunPredictions, known: Known) -> list[str]:
    """Why an architecture was or was not trained in full, in sentences."""
    if past.run.kind == "fidelity-study":
        return [
            "A fidelity study trains architectures spread evenly over multiply-accumulates and asks no surrogate; "
            f"this is {'' if known.evaluations else 'not '}one of them."
        ]
    reasons = []
    if len(past.candidates) < past.everything:
        reasons.append(
            f"Ranks are among {len(past.candidates):,} of the {past.everything:,} candidates, drawn at random."
        )
    if not past.run.asks_surrogate:
        reasons.append(
            f"The method {past.run.config.method} does not ask the surrogate; its predictions are shown for comparison."
        )
    return reasons + (why_asked(past, known) if known.asked else why_not_asked(past, known))


def why_asked(past: RunPredictions, known: Known) -> list[str]:
    """Why a full training of an architecture was asked for."""
    run, then = past.run, known.when_asked
    if any(e.trial.number in run.imported and e.trial.fidelity == run.plan.high for e in known.evaluations):
        return [f"It was not asked for: it was imported from the fidelity study {run.config.fidelity_study}."]
    if then is None:
        return []
    reasons = [
        f"It was promoted to full training: its upper bound then ranked {ordinal(then.rank)} among the {then.among:,} "
        f"candidates not yet asked for in full, given {then.low} low and {then.full} full scores."
    ]
    reasons += [f"It was not trained: {e.error}." for e in known.evaluations if e.status == "too_slow"]
    if then.rank > 1 and run.asks_surrogate:
        reasons.append(
            "Candidates with a higher bound were passed over: running full trainings count as if they were measured, "
            "so that workers do not train near-identical networks, or the search had seen fewer answers than the "
            "journal held."
        )
    return reasons


def why_not_asked(past: RunPredictions, known: Known) -> list[str]:
    """Why no full training of an architecture was asked for."""
    run, end = past.run, known.at_the_end
    if end is None:
        return [why_no_candidate(past, known.architecture)]
    reasons = []
    if any(not e.ok for e in known.evaluations):
        reasons.append("Its evaluation failed, and failed evaluations are not repeated.")
    if not known.evaluations:
        others = "other candidates promised more per second" if run.asks_surrogate else "the method chose others"
        reasons.append(f"It was never evaluated: {others}.")
    used = sum(t.fidelity == run.plan.high for t in run.record.asked)
    reasons.append(
        f"It was not trained in full: at the end its upper bound ranks {ordinal(end.rank)} among the {end.among:,} "
        f"candidates not asked for in full, and {used} of at most {run.plan.max_high} full trainings were asked for."
    )
    return reasons


def why_no_candidate(past: RunPredictions, architecture: Architecture) -> str:
    """Why the search could not propose an architecture, in one sentence."""
    config = past.run.config
    if config.only:
        return f"It was never proposed: --only restricts the search to {config.only}."
    same = past.space.canonical(architecture.choices) if past.space.canonical else architecture.choices
    if same != architecture.choices:
        twin = "-".join(map(str, same))
        return f"It was never proposed: it is the same network as {twin}, which represents both; explain that one."
    unmet = unmet_limits(past, architecture)
    if unmet:
        return f"It was never proposed: it does not meet the limits of the search ({'; '.join(unmet)})."
    return (
        f"It was never proposed: the search considered a random sample of the {past.space.size:,} architectures in the "
        "space, and this one is not in it."
    )


def unmet_limits(past: RunPredictions, architecture: Architecture) -> list[str]:
    """The limits of the search that an architecture exceeds."""
    from engine.search.setup import space_members

    config = past.run.config
    own = space_members(past.space, config, past.run.data, [architecture])
    macs, params = float(own.macs[0]), float(own.params[0])
    unmet = []
    if macs < config.min_macs:
        unmet.append(f"{macs:,.0f} MACs are below --min-macs {config.min_macs:g}")
    if macs > config.max_macs:
        unmet.append(f"{macs:,.0f} MACs exceed --max-macs {config.max_macs:g}")
    if params > config.max_params:
        unmet.append(f"{params:,.0f} parameters exceed --max-params {config.max_params:g}")
    if architecture in past.slow:
        milliseconds, measured = past.slow[architecture]
        how = "measured" if measured else "predicted, with a margin,"
        unmet.append(f"its {how} {milliseconds:.3g} ms exceed --max-latency-ms {config.max_latency_ms:g}")
    return unmet


def ordinal(number: int) -> str:
    """1st, 2nd, 3rd, 4th."""
    ending = {1: "st", 2: "nd", 3: "rd"}.get(number % 10, "th") if number % 100 not in (11, 12, 13) else "th"
    return f"{number:,}{ending}"


def explanation_text(explanation: dict[str, Any]) -> str:
    """The explanation for people."""
    lines = [explanation["architecture"], *(f"  {choice}" for choice in explanation["choices"]), ""]
    for one in explanation["evaluations"]:
        score = f"{one['accuracy']:.4f} ({one['place']})" if one["accuracy"] is not None else one["status"]
        trial = f"trial {one['number']}: {one['fidelity']} fidelity, seed {one['seed']}"
        score += f", cross entropy {one['cross_entropy']:.3f}" if one["cross_entropy"] is not None else ""
        score += f", agreement with the teacher {one['agreement']:.4f}" if one["agreement"] is not None else ""
        lines.append(f"{trial}: {score}  {one['error']}".rstrip())
    lines += ["not evaluated"] * (not explanation["evaluations"])
    untrained = explanation["training_free_scores"]
    if untrained:
        lines += [f"untrained: {name} {one['score']:.4g} ({one['place']})" for name, one in untrained["scores"].items()]
        lines += [f"untrained: no {name}: {why}" for name, why in untrained["missing"].items()]
    for key, when in (("predicted_when_asked", "when asked for"), ("predicted_at_the_end", "at the end")):
        said = explanation[key]
        if said:
            fitted = ", its own full score included" if said.get("fitted_to_its_full_score") else ""
            lines.append(
                f"surrogate {when}: {said['mean']:+.2f} ± {said['std']:.2f} normal scores, ranked "
                f"{ordinal(said['rank'])} of {said['among']:,} ({said['low']} low and {said['full']} full "
                f"scores{fitted})"
            )
    return "\n".join([*lines, "", *explanation["why"], *weights_text(explanation["weights"])])


def weights_text(weights: list[dict[str, Any]]) -> list[str]:
    """What the run has learned to trust, as a table for people."""
    if not weights:
        return []
    width = max(len(weight["name"]) for weight in weights)
    head = ["", "What this run has learned to trust (weight in full accuracy, both in standard deviations):"]
    return head + [
        f"  {weight['name']:{width}}  {weight['mean']:+.2f} ± {weight['std']:.2f}"
        + (f"  says something with probability {weight['included']:.2f}" if weight["included"] < 1 else "")
        for weight in weights
    ]
