"""What a fidelity study found, as JSON, as a table, as a CSV file and as a picture."""

from __future__ import annotations

import csv
import io
from collections.abc import Collection
from pathlib import Path
from typing import Any

from engine.search.fidelity_study.ranking import (
    LOW_BUDGET,
    Difference,
    Ranking,
    Statistic,
    StudyScores,
    difference,
    macs_alone,
    rank,
    repeatability,
)
from engine.trial import Evaluation, Fidelity

Json = dict[str, Any]

READOUT_FIGURES = ("n", "tau", "tau_stderr", "tau_interval", "spearman", "tau_given_macs", "stderr", "interval")


def summarise(scores: StudyScores, dropped: Collection[Fidelity] = ()) -> Json | None:
    """All figures of a study (docs/search.md); None if no fidelity was measured on three architectures."""
    rankings = [ranking for low in scores.lows if (ranking := rank(scores, low)) is not None]
    if not rankings:
        return None
    # A search that distils its full trainings has a teacher anyway, so its low fidelity should use it too.
    distilled = [r for r in rankings if scores.high.kd_loss == "none" or r.fidelity.kd_loss != "none"]
    best, reason = recommend(scores, distilled or rankings)
    return {
        "full": len(scores.architectures),
        "repeatability": repeatability(scores),
        "macs": statistic_to_json(macs_alone(scores)),
        "fidelities": [
            ranking_to_json(r) | {"readouts": by_readout(scores, r.fidelity), "dropped": r.fidelity in dropped}
            for r in rankings
        ],
        "distilled_less_undistilled": [difference_to_json(d) for d in against_undistilled(scores)],
        "recommended": best.fidelity.name,
        "reason": reason,
    }


def by_readout(scores: StudyScores, fidelity: Fidelity) -> Json:
    """How well the other readouts of a low fidelity rank, where it has them."""
    found = {name: rank(scores.read_by(name), fidelity) for name in scores.other_readouts}
    return {
        name: {key: value for key, value in ranking_to_json(ranking).items() if key in READOUT_FIGURES}
        for name, ranking in found.items()
        if ranking is not None
    }


def recommend(scores: StudyScores, rankings: list[Ranking]) -> tuple[Ranking, str]:
    """The fidelity of highest expected gain, and the reason in words."""
    ordered = sorted(rankings, key=lambda r: (r.expected_gain, r.given_macs.value), reverse=True)
    best, tau = ordered[0], ordered[0].given_macs
    reason = (
        f"tau given MACs is {tau.value:.2f} ± {tau.stderr:.2f} at {best.relative_cost:.3f} of the cost of a full "
        f"training; its best pick for the cost of {LOW_BUDGET:g} full trainings is expected to gain most"
    )
    if tau.value < 2 * tau.stderr:
        reason += "; within two standard errors it may say no more than MACs: study more architectures to be sure"
    if len(ordered) > 1:
        gap = difference(scores, best.fidelity, ordered[1].fidelity)
        if gap is not None and gap.value < 2 * gap.stderr:
            reason += f"; not surely better than {ordered[1].fidelity.name} ({gap.value:+.2f} ± {gap.stderr:.2f})"
    return best, reason


def against_undistilled(scores: StudyScores) -> list[Difference]:
    """Each distilled fidelity against fidelities without a teacher.

    These are all that use the same images at the same scale, and the cheapest that costs as much or up to twice that:
    it shows what the same money buys without a teacher.
    """
    plain = sorted((low for low in scores.lows if low.kd_loss == "none"), key=scores.relative_cost)
    gaps = []
    for low in scores.lows:
        if low.kd_loss == "none":
            continue
        scale = (low.fraction, low.width, low.resolution)
        same = [other for other in plain if (other.fraction, other.width, other.resolution) == scale]
        cost = max(scores.relative_cost(low), 1e-9)
        costlier = [other for other in plain if 1 <= scores.relative_cost(other) / cost <= 2]
        others = dict.fromkeys([*same, *costlier[:1]])
        gaps += [gap for other in others if (gap := difference(scores, low, other)) is not None]
    return gaps


def statistic_to_json(statistic: Statistic) -> Json:
    return {"tau": statistic.value, "stderr": statistic.stderr, "interval": [statistic.low, statistic.high]}


def ranking_to_json(ranking: Ranking) -> Json:
    """An entry of "fidelities"; `stderr` and `interval` belong to tau given MACs, `seconds` to one evaluation."""
    return {
        "name": ranking.fidelity.name,
        "n": ranking.n,
        "accuracy": ranking.accuracy,
        "tau": ranking.tau.value,
        "tau_stderr": ranking.tau.stderr,
        "tau_interval": [ranking.tau.low, ranking.tau.high],
        "spearman": ranking.spearman.value,
        "spearman_interval": [ranking.spearman.low, ranking.spearman.high],
        "tau_given_macs": ranking.given_macs.value,
        "stderr": ranking.given_macs.stderr,
        "interval": [ranking.given_macs.low, ranking.given_macs.high],
        "tau_top_fifth": ranking.top,
        "top_n": ranking.top_n,
        "seconds": ranking.seconds,
        "relative_cost": ranking.relative_cost,
        "cost_per_tau": ranking.cost_per_tau,
    }


def difference_to_json(gap: Difference) -> Json:
    return {
        "name": gap.better.name,
        "against": gap.than.name,
        "n": gap.n,
        "tau_given_macs": gap.value,
        "stderr": gap.stderr,
    }


def table(result: Json) -> list[str]:
    """The result for people, a line for each fidelity."""
    head = f"{'fidelity':<28}{'n':>3}  {'score':>5}  {'tau':>5} {'95 %':>14}  {'spearman':>8}  {'tau | MACs':>13}"
    lines = [head + f"  {'top':>5}  {'seconds':>8}  {'relative cost':>13}  {'cost/tau':>8}"]
    for row in result["fidelities"]:
        top = "" if row["tau_top_fifth"] is None else f"{row['tau_top_fifth']:.2f}"
        per_tau = "" if row["cost_per_tau"] is None else f"{row['cost_per_tau']:.3f}"
        lines.append(
            _figures(row["name"], f"{row['accuracy']:.3f}", row)
            + f"  {top:>5}  {row['seconds']:>8.1f}  {row['relative_cost']:>13.3f}  {per_tau:>8}"
            + ("  dropped" if row["dropped"] else "")
        )
        lines += [_figures(f"  by {name.replace('_', ' ')}", "", own) for name, own in row["readouts"].items()]
    lines.append(f"{'MACs alone':<28}{result['full']:>3}  {'':>5}  {result['macs']['tau']:>5.2f}")
    if result["repeatability"] is not None:
        lines.append(f"{'full, another seed':<28}{result['full']:>3}  {'':>5}  {result['repeatability']:>5.2f}")
    for gap in result["distilled_less_undistilled"]:
        value, error = gap["tau_given_macs"], gap["stderr"]
        lines.append(f"{gap['name']} minus {gap['against']}: tau given MACs {value:+.2f} ± {error:.2f}")
    return [*lines, f"recommended: {result['recommended']}: {result['reason']}"]


def _figures(name: str, score: str, row: Json) -> str:
    """The columns of a line that belong to a ranking."""
    low, high = row["tau_interval"]
    return (
        f"{name:<28}{row['n']:>3}  {score:>5}  {row['tau']:>5.2f} {f'{low:.2f} to {high:.2f}':>14}  "
        f"{row['spearman']:>8.2f}  {row['tau_given_macs']:>5.2f} ± {row['stderr']:>5.2f}"
    )


def evaluations_csv(answers: list[Evaluation]) -> str:
    """Every evaluation as it was measured, a row each, in the order of the virtual clock."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    head = ["architecture", "fidelity", "seed", "status", "accuracy", "seconds", "macs", "params"]
    writer.writerow([*head, "cross_entropy", "agreement"])
    for e in answers:
        row = [e.trial.architecture, e.trial.fidelity.name, e.trial.seed, e.status]
        others = ["" if value is None else f"{value:.6f}" for value in (e.cross_entropy, e.agreement)]
        writer.writerow([*row, f"{e.accuracy:.6f}", f"{e.seconds:.3f}", e.macs, e.params, *others])
    return text.getvalue()


def draw(path: Path, result: Json) -> None:
    """Draws tau and tau given MACs of each fidelity with 95 % intervals, and MACs alone and a second seed as lines."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return  # matplotlib is an extra; the JSON has the same figures
    rows = result["fidelities"][::-1]
    figure = Figure(figsize=(8, 1.4 + 0.35 * len(rows)), layout="constrained")
    axes = figure.subplots()
    for key, bounds, shift, label in (
        ("tau", "tau_interval", 0.12, "tau with full accuracy"),
        ("tau_given_macs", "interval", -0.12, "tau given MACs"),
    ):
        values = [row[key] for row in rows]
        ends = [(row[key] - row[bounds][0], row[bounds][1] - row[key]) for row in rows]
        errors = [[max(0.0, end) for end in side] for side in zip(*ends, strict=True)]
        places = [place + shift for place in range(len(rows))]
        axes.errorbar(values, places, xerr=errors, fmt="o", markersize=4, capsize=2, linewidth=1, label=label)
    axes.axvline(result["macs"]["tau"], color="black", linestyle=":", linewidth=1, label="tau of MACs alone")
    if result["repeatability"] is not None:
        axes.axvline(result["repeatability"], color="black", linestyle="--", linewidth=1, label="full, another seed")
    axes.axvline(0, color="grey", linewidth=0.5)
    axes.set_yticks(range(len(rows)), [f"{row['name']}  ({row['relative_cost']:.3f})" for row in rows])
    axes.set(xlabel=f"Kendall's tau, {result['full']} architectures, 95 % intervals (in brackets: relative cost)")
    figure.legend(loc="outside upper center", ncols=4, fontsize="small", frameon=False)
    figure.savefig(path, dpi=110)
