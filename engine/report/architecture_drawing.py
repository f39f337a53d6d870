"""Draws an architecture, in a style that depends on the names of its space's choices.

- `TARGET<-SOURCE` (as in NAS-Bench-201): a graph of nodes, its edges labelled with their operations.
- `STAGE.repeats` (or units, blocks, layers, depth) with `STAGE.channels` (or width): stages of blocks.
- any other names: a list of the choices with their options, the selected ones marked.
"""

from __future__ import annotations

import math
import re
from html import escape

from engine.space import SearchSpace
from engine.trial import Architecture

COUNTS = ("repeats", "units", "blocks", "layers", "depth")
WIDTHS = ("channels", "width")
# Width of the viewBox: about that of a phone, so that text keeps its size there.
WIDTH = 360.0


def draw(space: SearchSpace, architecture: Architecture) -> str:
    """The drawing as HTML; the page sets its colours."""
    taken = {choice.name: choice.options[i] for choice, i in zip(space.choices, architecture.choices, strict=True)}
    if len(taken) == len(space.choices):
        edges = [re.fullmatch(r"(\d+)<-(\d+)", name) for name in taken]
        if all(edges):
            return _graph([(int(m[1]), int(m[2])) for m in edges if m], list(map(str, taken.values())))
        stages = _stages(taken)
        if stages:
            return _blocks(stages)
    return _options(space, architecture)


def _graph(edges: list[tuple[int, int]], operations: list[str]) -> str:
    """Nodes in a row and an arc per edge, above the row if its source is even and below if odd."""
    last = max(target for target, _ in edges)
    step = (WIDTH - 48) / max(last, 1)
    x = [24 + step * node for node in range(last + 1)]
    above, below = (max((_rise(t, s) for t, s in edges if s % 2 == side), default=0.0) for side in (0, 1))
    y = 26 + above
    parts = [_edge(t, s, op, x, y) for (t, s), op in zip(edges, operations, strict=True)]
    for node, at in enumerate(x):
        parts.append(f'<circle class="node" cx="{at:.0f}" cy="{y:.0f}" r="13"/>')
        label = "in" if node == 0 else "out" if node == last else str(node)
        parts.append(f'<text class="node-label" x="{at:.0f}" y="{y + 4:.0f}">{label}</text>')
    return _svg(parts, y + below + 28, "the cell as a graph")


def _rise(target: int, source: int) -> float:
    """How far an arc rises from the row of nodes."""
    return 44.0 * (target - source - 1)


def _edge(target: int, source: int, operation: str, x: list[float], y: float) -> str:
    side = -1 if source % 2 == 0 else 1
    rise = side * _rise(target, source)
    middle = (x[source] + x[target]) / 2
    kind = "none" if operation == "none" else "skip" if operation.startswith("skip") else "op"
    path = f"M {x[source]:.0f} {y:.0f} Q {middle:.0f} {y + 2 * rise:.0f} {x[target]:.0f} {y:.0f}"
    words = operation.removeprefix("nor_").replace("_", " ")
    return (
        f'<g class="edge {kind}"><title>{target}&lt;-{source}: {escape(operation)}</title><path d="{path}"/>'
        f'<text x="{middle:.0f}" y="{y + rise + (15 if rise > 0 else -7):.0f}">{escape(words)}</text></g>'
    )


def _stages(taken: dict[str, str | int | float]) -> list[tuple[str, int, float]]:
    """Name, blocks and channels of each stage; [] if the names do not describe stages."""
    stages: dict[str, dict[str, float]] = {}
    for name, option in taken.items():
        stage, _, what = name.rpartition(".")
        kind = "count" if what in COUNTS else "width" if what in WIDTHS else None
        if not stage or kind is None or isinstance(option, str):
            return []
        stages.setdefault(stage, {})[kind] = float(option)
    if any(len(parts) != 2 for parts in stages.values()):
        return []
    return [(name, round(parts["count"]), parts["width"]) for name, parts in stages.items()]


def _blocks(stages: list[tuple[str, int, float]]) -> str:
    """A column of blocks per stage, their width growing with the logarithm of the channels."""
    column = WIDTH / len(stages)
    deepest = max(count for _, count, _ in stages)
    widest, narrowest = (pick(math.log(max(width, 1)) for _, _, width in stages) for pick in (max, min))
    base, parts = 26 + 20 * deepest, []
    for place, (name, count, channels) in enumerate(stages):
        share = (math.log(max(channels, 1)) - narrowest) / (widest - narrowest) if widest > narrowest else 1.0
        wide = (0.35 + 0.55 * share) * column
        middle = column * (place + 0.5)
        parts.append(f'<g class="stage"><title>{escape(name)}: {count} blocks of {channels:g} channels</title>')
        for block in range(count):
            top = base - 20 * (block + 1)
            parts.append(f'<rect x="{middle - wide / 2:.1f}" y="{top}" width="{wide:.1f}" height="16" rx="3"/>')
        parts.append(f'<text x="{middle:.1f}" y="{base - 20 * count - 7}">&times;{count}</text>')
        parts.append(f'<text x="{middle:.1f}" y="{base + 16}">{channels:g}</text></g>')
    note = "blocks (&times;) and channels of each stage"
    parts.append(f'<text class="note" x="{WIDTH / 2:.0f}" y="{base + 36}">{note}</text>')
    return _svg(parts, base + 44, "the stages of the network as blocks")


def _options(space: SearchSpace, architecture: Architecture) -> str:
    rows = []
    for choice, taken in zip(space.choices, architecture.choices, strict=True):
        pills = "".join(
            f'<span class="pill{" taken" if i == taken else ""}">{escape(str(option))}</span>'
            for i, option in enumerate(choice.options)
        )
        rows.append(f"<li><span>{escape(choice.name)}</span> {pills}</li>")
    return f'<ol class="choices">{"".join(rows)}</ol>'


def _svg(parts: list[str], height: float, label: str) -> str:
    return (
        f'<svg class="drawing" viewBox="0 0 {WIDTH:.0f} {height:.0f}" role="img" aria-label="{label}">'
        f"{''.join(parts)}</svg>"
    )
