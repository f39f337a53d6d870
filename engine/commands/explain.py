"""`explain`: what is known of one architecture of a run, and why it was trained in full or was not."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from jsonargparse import ArgumentParser, Namespace

from engine.commands.flags import add_run_argument, command_parser

if TYPE_CHECKING:
    from engine.search.predictions import Prediction, RunPredictions
    from engine.trial import Architecture, Evaluation


def parser() -> ArgumentParser:
    """Flags of the command."""
    made = command_parser(
        "Every score that an architecture got, what the surrogate said of it, and why it was trained in full or not."
    )
    add_run_argument(made)
    made.usage = "%(prog)s RUN ARCHITECTURE [options]"
    made.add_argument("architecture", metavar="ARCHITECTURE", type=str, help="option indices joined by '-': 3-0-2")
    made.add_argument("--json", action="store_true", help="one JSON object instead of the text")
    return made


def run(values: Namespace) -> dict[str, Any] | None:
    from engine.search.predictions import load_predictions
    from engine.search.runs import open_run, with_answers
    from engine.spaces.load import load_space
    from engine.trial import Architecture

    opened = with_answers(open_run(values.run))
    architecture = load_space(opened.config.space).check(Architecture.parse(values.architecture))
    found = explain(load_predictions(opened, [architecture]), architecture)
    if values.json:
        return found
    print(text(found))
    return None


def explain(past: RunPredictions, architecture: Architecture) -> dict[str, Any]:
    """All that is known of an architecture, as plain values."""
    from engine.search.runs import row

    run, plan = past.run, past.run.plan
    scores = [e for e in run.answers if e.trial.architecture == architecture]
    asked = next((t for t in run.record.asked if t.architecture == architecture and t.fidelity == plan.high), None)
    then = now = None
    if run.kind == "search":
        now = past.predict(architecture)
        if asked and asked.number not in run.imported:
            then = past.predict(architecture, run.record.known[run.record.asked.index(asked)], asked.number)
    choices = zip(past.space.choices, architecture.choices, strict=True)
    return {
        "architecture": str(architecture),
        "choices": [f"{choice.name} = {choice.options[option]}" for choice, option in choices],
        "evaluations": [row(e) | {"place": place(past, e)} for e in scores],
        "said_when_asked": then and asdict(then),
        "said_at_the_end": now and asdict(now) | {"had_seen_its_full_score": any(_full(past, e) for e in scores)},
        "why": why(past, architecture, asked is not None, then, now, scores),
    }


def place(past: RunPredictions, evaluation: Evaluation) -> str | None:
    """Where a score stands among those of its fidelity; None for a failure."""
    if not evaluation.ok:
        return None
    rivals = past.run.at(evaluation.trial.fidelity)
    return f"{1 + sum(e.accuracy > evaluation.accuracy for e in rivals)} of {len(rivals)}"


def why(
    past: RunPredictions,
    architecture: Architecture,
    asked: bool,
    then: Prediction | None,
    now: Prediction | None,
    scores: list[Evaluation],
) -> list[str]:
    """Why it was trained in full, or was not, in sentences."""
    plan, config = past.run.plan, past.run.config
    if past.run.kind == "fidelity-study":
        return [
            "A study of low fidelities trains architectures that are spread over multiply-accumulates, and asks no "
            f"surrogate; this is {'one' if scores else 'none'} of them."
        ]
    reasons = []
    if len(past.candidates) < past.everything:
        reasons.append(f"Ranks are among {len(past.candidates):,} of the {past.everything:,} candidates, at random.")
    if not past.run.asks_surrogate:
        reasons.append(f"The method {config.method} does not ask the surrogate; what that says is for comparison.")
    if asked:
        if any(e.trial.number in past.run.imported and e.trial.fidelity == plan.high for e in scores):
            return [*reasons, f"It was not asked for: it came with the results of the study {config.fidelity_study}."]
        if then is not None:
            reasons.append(
                f"It was asked for in full: its upper bound was then {ordinal(then.rank)} of the {then.among:,} "
                f"candidates not yet asked for in full, by {then.low} low and {then.full} full scores."
            )
            reasons += [f"It was not trained: {e.error}." for e in scores if e.status == "too_slow"]
            if then.rank > 1 and past.run.asks_surrogate:
                reasons.append(
                    "Better ones were passed over because full trainings under way count as if measured, so that "
                    "workers do not train twins, or because the search saw fewer answers than the journal had by then."
                )
        return reasons
    if now is None:
        return [*reasons, absence(past, architecture)]
    if any(not e.ok for e in scores):
        reasons.append("Its evaluation failed, and a failed one is not asked for again.")
    if not scores:
        others = "other candidates promised more per second" if past.run.asks_surrogate else "the method took others"
        reasons.append(f"It was never evaluated: {others}.")
    used = sum(t.fidelity == plan.high for t in past.run.record.asked)
    reasons.append(
        f"It was not trained in full: at the end its upper bound is {ordinal(now.rank)} of the {now.among:,} "
        f"candidates not asked for in full, and {used} full trainings of at most {plan.max_high} have been asked for."
    )
    return reasons


def absence(past: RunPredictions, architecture: Architecture) -> str:
    """Why an architecture is no candidate: of the limits those that it does not keep."""
    from engine.search.setup import space_members

    config = past.run.config
    if config.only:
        return f"It was never proposed: the search was among --only {config.only}."
    same = past.space.canonical(architecture.choices) if past.space.canonical else architecture.choices
    if same != architecture.choices:
        twin = "-".join(map(str, same))
        return f"It was never proposed: it is the same network as {twin}, which stands for both; explain that one."
    own = space_members(past.space, config, past.run.data, [architecture])
    macs, params = float(own.macs[0]), float(own.params[0])
    outside = []
    if macs < config.min_macs:
        outside.append(f"{macs:,.0f} MACs are under --min-macs {config.min_macs:g}")
    if macs > config.max_macs:
        outside.append(f"{macs:,.0f} MACs are over --max-macs {config.max_macs:g}")
    if params > config.max_params:
        outside.append(f"{params:,.0f} parameters are over --max-params {config.max_params:g}")
    if architecture in past.slow:
        outside.append(f"what was measured says that it takes more than --max-latency-ms {config.max_latency_ms:g}")
    if outside:
        return f"It was never proposed: it does not fit the limits of the search ({'; '.join(outside)})."
    return (
        f"It was never proposed: of the {past.space.size:,} architectures of the space a random part was looked at, "
        "and it is not in that."
    )


def ordinal(number: int) -> str:
    """1st, 2nd, 3rd, 4th."""
    ending = {1: "st", 2: "nd", 3: "rd"}.get(number % 10, "th") if number % 100 not in (11, 12, 13) else "th"
    return f"{number:,}{ending}"


def text(found: dict[str, Any]) -> str:
    """The same for people."""
    lines = [found["architecture"], *(f"  {choice}" for choice in found["choices"]), ""]
    for one in found["evaluations"]:
        score = f"{one['accuracy']:.4f} ({one['place']})" if one["accuracy"] is not None else one["status"]
        judged = f"trial {one['number']}: {one['fidelity']} fidelity, seed {one['seed']}"
        lines.append(f"{judged}: {score}  {one['error']}".rstrip())
    lines += ["not evaluated"] * (not found["evaluations"])
    for key, when in (("said_when_asked", "when asked for"), ("said_at_the_end", "at the end")):
        said = found[key]
        if said:
            seen = ", fitted to its own full score too" if said.get("had_seen_its_full_score") else ""
            lines.append(
                f"surrogate {when}: {said['mean']:+.2f} +- {said['std']:.2f} normal scores, "
                f"{ordinal(said['rank'])} of {said['among']:,} ({said['low']} low and {said['full']} full scores{seen})"
            )
    return "\n".join([*lines, "", *found["why"]])


def _full(past: RunPredictions, evaluation: Evaluation) -> bool:
    return evaluation.ok and evaluation.trial.fidelity == past.run.plan.high
