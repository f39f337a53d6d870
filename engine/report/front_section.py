"""The front in the report: a chart whose points can be chosen, a budget, and what is known of the chosen network.

The chart holds the traces of every cost; each says in its `meta` which cost it is for, and front.js shows those of one.
A point's `customdata` is the index of its network in `front_data`.
"""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from dataclasses import dataclass, field
from html import escape
from pathlib import Path
from typing import Any

from engine.report.architecture_drawing import draw
from engine.report.chart import BEST, FULL, SOFT, Chart, Json, axis, label, line, percent, points
from engine.report.final_trainings import FINISHED, label_places, trained_rows
from engine.search.comparison import with_error
from engine.search.front import COSTS, FrontMember, clearly_better, front, in_unit
from engine.search.runs import Run
from engine.space import SearchSpace
from engine.spaces.load import load_space
from engine.trial import Architecture

NAME, TITLE = "front", "Accuracy against size: choose a network"
NONE_YET = "No full-fidelity evaluation has succeeded yet."
# How a cost is named on a button, and in a sentence after "times the".
SHORT = {"macs": "MACs", "params": "parameters", "latency_ms": "latency"}
HEIGHT = 400


@dataclass(frozen=True)
class Shown:
    """A network as the section shows it: accuracies in percent, costs as in the run, and texts.

    `member` is None for a final training, whose accuracy is on the test images.
    """

    title: str
    architecture: Architecture | None
    accuracy: float
    error: float
    costs: dict[str, float]
    facts: dict[str, str]
    how: str
    note: str = ""
    member: FrontMember | None = field(default=None, repr=False)


def front_chart(run: Run) -> Chart:
    """Accuracy against each known cost, with the front."""
    if not run.trained:
        return Chart(NAME, TITLE, NONE_YET, wide=True)
    shown = networks(run)
    data = [trace | {"meta": cost} for cost in known_costs(run) for trace in _traces(run, shown, cost)]
    finals = any(network.member is None for network in shown)
    layout = {
        "xaxis": axis(COSTS[run.front_cost][0], rangemode="tozero"),
        "yaxis": axis("accuracy, %" if finals else "validation accuracy, %"),
        "showlegend": False,
        "hovermode": "closest",
        "margin": {"l": 52, "r": 14, "t": 12, "b": 44},
    }
    return Chart(NAME, TITLE, _caption(run, finals), data, layout, wide=True, height=HEIGHT)


def known_costs(run: Run) -> list[str]:
    """The costs that at least one network trained in full has."""
    return [cost for cost in COSTS if any(member.cost(cost) is not None for member in run.trained)]


def _caption(run: Run, finals: bool) -> str:
    star = "open star: the winner, as searched" if finals else "star: the winner" if run.result else "star: best so far"
    caption = (
        "Accuracies on the validation images, after the trainings of the search. The line joins the networks of the "
        f"front, with one standard error each way: no other one beats them in both. The {star}. " + _why_another(run)
    )
    if finals:
        caption += (
            "The marks with names are the finished winner and what it is compared with: accuracies on the test images, "
            "after the final training."
        )
    return caption.rstrip()


def _why_another(run: Run) -> str:
    """Why the winner is another network than the most accurate one, if it is; one sentence."""
    highest = max(run.trained, key=lambda member: member.valid_accuracy)
    if run.result is None or run.best is None or run.best.trial.architecture == highest.architecture:
        return ""
    return (
        f"The winner is not the highest dot, {highest.architecture}: the best of several noisy scores is partly luck, "
        "so the search averages each score with the surrogate's prediction from all others. "
    )


def networks(run: Run) -> list[Shown]:
    """Every network trained in full, then those with a final training."""
    winner = run.best.trial.architecture if run.best else None
    searched = "winner, as searched" if trained_rows(run) else "winner" if run.result else "best so far"
    return [
        *(_searched(one, searched if one.architecture == winner else "trained in full") for one in run.trained),
        *(_finished(row) for row in trained_rows(run)),
    ]


def _searched(member: FrontMember, title: str) -> Shown:
    costs = {cost: value for cost in COSTS if (value := member.cost(cost)) is not None}
    facts = {"validation accuracy, %": with_error(member.valid_accuracy, member.valid_standard_error)}
    how = f"{member.judged}."
    if member.test_accuracy is not None and member.test_standard_error is not None:
        facts["test accuracy, finished, %"] = with_error(member.test_accuracy, member.test_standard_error)
        how += " " + _how_finished(member.final_epochs, member.test_images, "Then trained once more, for")
    return Shown(
        title,
        member.architecture,
        percent(member.valid_accuracy),
        percent(member.valid_standard_error),
        costs,
        facts | _sizes(costs),
        how,
        member=member,
    )


def _finished(row: Json) -> Shown:
    """A network that was trained to the end, from its row of result.json; that of a teacher names no architecture."""
    costs = {cost: float(row[cost]) for cost in COSTS if row.get(cost)}
    facts = {"test accuracy, %": with_error(row["test_accuracy"], row["test_standard_error"])}
    note = ""
    if "difference" in row:
        gain = with_error(row["difference"], row["difference_standard_error"], sign="+")
        note = f"The finished winner's accuracy minus this one's is {gain} points, paired over the test images."
    name = row.get("architecture")
    return Shown(
        row["name"],
        Architecture.parse(name) if name else None,
        percent(row["test_accuracy"]),
        percent(row["test_standard_error"]),
        costs,
        facts | _sizes(costs),
        _how_finished(row["epochs"], row["test_images"], "Trained for"),
        note,
    )


def _how_finished(epochs: int | None, images: int | None, start: str) -> str:
    return f"{start} {epochs} epochs, on training and validation images; scored on {images or 0:,} test images."


def _sizes(costs: dict[str, float]) -> Json:
    names = {"macs": "million MACs", "params": "million parameters", "latency_ms": "latency, ms"}
    return {names[cost]: in_unit(value, cost) for cost, value in costs.items()}


def _traces(run: Run, shown: Sequence[Shown], cost: str) -> list[Json]:
    """The front as a line, then the networks of the search, those on the front, the winner and the final trainings."""
    unit, size = COSTS[cost]
    places = [i for i, network in enumerate(shown) if cost in network.costs]
    members = front([network.member for network in shown if network.member], cost)
    order = {member.architecture: place for place, member in enumerate(members)}

    def rank(place: int) -> int | None:
        member = shown[place].member
        return order.get(member.architecture) if member else None

    on_front = sorted((i for i in places if rank(i) is not None), key=lambda i: rank(i) or 0)
    winner = [i for i in places if shown[i].member and shown[i].title != "trained in full"]
    plain = [i for i in places if shown[i].member and i not in on_front and i not in winner]
    finals = [i for i in places if not shown[i].member]

    def marks(group: Sequence[int], name: str, colour: Any, **more: Any) -> Json:
        hover = "%{text}<br>%{y:.2f} %, %{x:.4g} " + unit + "<extra></extra>"
        x, y = [shown[i].costs[cost] / size for i in group], [shown[i].accuracy for i in group]
        names = [_hover_name(run, shown[i]) for i in group]
        return points(x, y, names, name, colour, hovertemplate=hover, customdata=list(group), **more)

    def bars(group: Sequence[int]) -> Json:
        return {"array": [shown[i].error for i in group], "color": SOFT, "thickness": 1, "width": 3}

    edge_x, edge_y = [shown[i].costs[cost] / size for i in on_front], [shown[i].accuracy for i in on_front]
    traces = [
        line(edge_x, edge_y, "front", BEST, line={"shape": "hv"}),
        marks(plain, "full", FULL),
        marks(on_front, "on the front", BEST, marker={"size": 11}, error_y=bars(on_front)),
        marks(winner, "winner", BEST, marker={"symbol": "star-open" if trained_rows(run) else "star", "size": 17}),
    ]
    ends = max(shown[i].costs[cost] for i in places) / size, min(shown[i].accuracy for i in places)
    return traces + ([_final_marks(marks(finals, "final", FULL, error_y=bars(finals)), shown, ends)] if finals else [])


def _final_marks(trace: Json, shown: Sequence[Shown], ends: tuple[float, float]) -> Json:
    """The trace of the final trainings with the names of the networks, the finished winner as a star."""
    names = [shown[i].title for i in trace["customdata"]]
    won = [name == FINISHED for name in names]
    marker = {
        "symbol": ["star" if one else "diamond" for one in won],
        "color": [BEST if one else FULL for one in won],
        "size": 14,
    }
    return trace | {
        "mode": "markers+text",
        "marker": trace["marker"] | marker,
        "text": names,
        "textposition": label_places(names, trace["x"], trace["y"], ends),
        "textfont": {"size": 11},
    }


def _hover_name(run: Run, network: Shown) -> str:
    name = label(run, network.architecture) if network.architecture else f"<b>{escape(network.title)}</b>"
    return name if network.title == "trained in full" or not network.architecture else f"{name}<br>{network.title}"


def standing(member: FrontMember, members: Sequence[FrontMember], cost: str) -> str:
    """Where a network stands towards the front `members` of a cost, in a sentence."""
    own, by = member.cost(cost) or 0.0, {one.architecture: one for one in members}

    def times(other: FrontMember) -> str:
        return f"{(other.cost(cost) or 0.0) / own:.2f} times the {SHORT[cost]}" if own else f"no more {SHORT[cost]}"

    on_front = by.get(member.architecture)
    if on_front is None:
        better = [m for m in members if (m.cost(cost) or 0.0) <= own and m.valid_accuracy >= member.valid_accuracy]
        best = max(better, key=lambda m: m.valid_accuracy)
        clear = "clearly" if clearly_better(best, member) else "within the error"
        gain = percent(best.valid_accuracy - member.valid_accuracy)
        return f"Not on the front: {best.architecture} is {gain:.2f} points better ({clear}), at {times(best)}."
    if on_front.within_error_of is None:
        return "On the front, and clearly more accurate than every cheaper member of it." if (
            members[0].architecture != member.architecture
        ) else "On the front: its cheapest member."
    rival = by[on_front.within_error_of]
    gain = percent(member.valid_accuracy - rival.valid_accuracy)
    return (
        f"On the front, but within the error of {rival.architecture}, at {times(rival)}: the difference of {gain:.2f} "
        "points is less than two of its standard errors."
    )


def front_data(run: Run) -> Json | None:
    """What front.js needs; None if no network has been trained in full."""
    if not run.trained:
        return None
    shown, space = networks(run), load_space(run.config.space)
    won = run.best.trial.architecture if run.best else None
    return {
        "cost": run.front_cost if run.front else "macs",
        "chosen": next(i for i, one in enumerate(shown) if one.architecture == won),
        "costs": {cost: _axis_data(shown, cost) for cost in known_costs(run)},
        "networks": [_network_data(run, space, network) for network in shown],
    }


def _axis_data(shown: Sequence[Shown], cost: str) -> Json:
    """The front of a cost as indices of networks, the values of all on its axis, and where each one stands."""
    unit, size = COSTS[cost]
    members = front([network.member for network in shown if network.member], cost)
    place = {network.member.architecture: i for i, network in enumerate(shown) if network.member}
    return {
        "unit": unit,
        "front": [place[member.architecture] for member in members],
        "x": [network.costs[cost] / size if cost in network.costs else None for network in shown],
        "standing": [
            standing(network.member, members, cost) if network.member and cost in network.costs else ""
            for network in shown
        ],
    }


def _network_data(run: Run, space: SearchSpace, network: Shown) -> Json:
    named = network.architecture
    return {
        "title": network.title,
        "architecture": str(named) if named else "",
        "accuracy": network.accuracy,
        "error": network.error,
        "facts": list(network.facts.items()),
        "how": network.how,
        "note": network.note,
        "drawing": draw(space, named) if named else "",
        "command": export_command(run, named) if named else "",
    }


def export_command(run: Run, architecture: Architecture) -> str:
    """The command that exports a network of a run, with the program that the run was started with."""
    started = run.facts.get("calls", [{"command": [""]}])[-1]["command"][0]
    program = ["mfkd"] if Path(started).name == "mfkd" else ["python", "cli.py"]
    return shlex.join([*program, "export", str(run.folder), "--arch", str(architecture)])


def figure(run: Run, chart: Chart) -> str:
    """The section as HTML; front.js fills it."""
    buttons = "".join(
        f'<label><input type="radio" name="cost" value="{cost}"><span>{SHORT[cost]}</span></label>'
        for cost in known_costs(run)
    )
    return (
        f'<figure class="card wide front"><h2>{escape(chart.title)}</h2><div class="chooser">'
        f'<fieldset class="costs"><legend>against</legend>{buttons}</fieldset>'
        f'<div class="chart" id="{chart.name}" style="min-height:{chart.height}px"></div>'
        '<div class="budget"><label for="budget">Budget</label><input type="range" id="budget" min="0" max="200">'
        '<output id="budget-text" for="budget"></output></div></div>'
        '<section class="network" id="network" aria-live="polite" aria-label="the chosen network"></section>'
        '<table class="members"><caption>The front</caption><thead></thead><tbody></tbody></table>'
        f"<figcaption>{escape(chart.caption)}</figcaption></figure>"
    )
