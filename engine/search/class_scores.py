"""How good a network is at each class: accuracies with their uncertainty, and what is taken for what."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence
from contextlib import suppress
from typing import Any

from engine.run_folder import RunFolder, write_atomically
from engine.search.comparison import standard_error
from engine.trial import Evaluation

Json = dict[str, Any]
Z95 = 1.96  # standard deviations of a normal distribution on either side that hold 95 % of it
# What the table of `eval` shows: every class if there are at most SHOWN, else the WORST of them; the whole confusion
# matrix if it has at most SQUARE classes, else the most frequent confusions.
SHOWN, WORST, SQUARE = 30, 15, 12
# Characters of a class name: at most, at most where it is given for another, and at least in the matrix.
NAME, TAKEN, CELL = 20, 14, 6
CORNER = "true / given"  # of the matrix


def class_scores(classes: Sequence[str], confusion: list[list[int]]) -> Json:
    """The scores that a confusion matrix (rows: true classes, columns: predicted ones) holds, as plain values.

    `accuracy` is over all images, with its binomial `standard_error`. A class has its number of `images`, how many are
    `right`, its `accuracy` (recall) with a 95 % interval, and its `precision` (None if no image is given the class).
    """
    images = sum(map(sum, confusion))
    accuracy = sum(confusion[place][place] for place in range(len(classes))) / images
    rows = []
    for place, name in enumerate(classes):
        right, total = confusion[place][place], sum(confusion[place])
        given = sum(row[place] for row in confusion)
        rows.append(
            {
                "name": name,
                "images": total,
                "right": right,
                "accuracy": right / total if total else None,
                "interval": wilson(right, total),
                "precision": right / given if given else None,
            }
        )
    error = standard_error(accuracy, images)
    return {"accuracy": accuracy, "standard_error": error, "images": images, "classes": rows, "confusion": confusion}


def wilson(right: int, images: int) -> tuple[float, float]:
    """The 95 % score interval of a proportion (Wilson, 1927): unlike the binomial error, not of width 0 if all are
    right; (0, 1) without images."""
    if not images:
        return 0.0, 1.0
    share, weight = right / images, Z95**2 / images
    middle = (share + weight / 2) / (1 + weight)
    half = Z95 * math.sqrt(share * (1 - share) / images + weight / (4 * images)) / (1 + weight)
    return max(0.0, middle - half), min(1.0, middle + half)


def confusions(scores: Json) -> list[tuple[int, str, str]]:
    """(count, true class, predicted class) for each pair of classes that were confused, the most frequent first."""
    names = [row["name"] for row in scores["classes"]]
    pairs = [
        (count, names[true], names[given])
        for true, row in enumerate(scores["confusion"])
        for given, count in enumerate(row)
        if count and true != given
    ]
    return sorted(pairs, key=lambda pair: -pair[0])


def save(folder: RunFolder, evaluation: Evaluation, split: str, scores: Json) -> None:
    """Records the scores of a training's weights on a split of the run's own data."""
    content = _stored(folder) | {split: {**_identity(evaluation), **scores}}
    write_atomically(folder.class_scores, json.dumps(content) + "\n")


def load(folder: RunFolder, evaluation: Evaluation, split: str) -> Json | None:
    """The recorded scores of a training's weights on a split; None if there are none."""
    found: Json | None = _stored(folder).get(split)
    same = found is not None and _identity(evaluation).items() <= found.items()
    return found if same else None


def _stored(folder: RunFolder) -> Json:
    with suppress(OSError, ValueError):
        content: Json = json.loads(folder.class_scores.read_text())
        return content
    return {}  # none yet, or a damaged file: `eval` writes it again


def _identity(evaluation: Evaluation) -> Json:
    trial = evaluation.trial
    return {"architecture": str(trial.architecture), "training": trial.key, "fidelity": trial.fidelity.name}


def table(scores: Json, width: int = 80) -> Iterator[str]:
    """The scores as lines of at most `width` characters, for a few classes or a thousand."""
    rows = sorted((row for row in scores["classes"] if row["images"]), key=lambda row: row["accuracy"])
    shown = rows if len(rows) <= SHOWN else rows[:WORST]
    column = min(NAME, max(len(CORNER), *(len(row["name"]) for row in rows)))
    mistakes = confusions(scores)
    yield f"{'class':<{column}}  right, %  95 % interval  {'images':>14}  taken for"
    for row in shown:
        low, high = row["interval"]
        line = f"{_cut(row['name'], column)}  {100 * row['accuracy']:8.1f}  {100 * low:4.1f} to {100 * high:5.1f}  "
        line += f"{row['right']:>5,} of {row['images']:>5,}  "
        taken = [f"{_short(given, TAKEN)} ({count:,})" for count, true, given in mistakes if true == row["name"]]
        yield (line + _joined(taken, width - len(line))).rstrip()
    if len(shown) < len(rows):
        rest = [row["accuracy"] for row in rows[len(shown) :]]
        yield f"and {len(rest):,} more classes, {100 * rest[0]:.1f} to {100 * rest[-1]:.1f} %"
    yield ""
    fits = len(rows) <= SQUARE and column + (CELL + 1) * len(rows) <= width
    yield from _matrix(scores, column, (width - column) // len(rows) - 1) if fits else _most_confused(mistakes)


def _joined(words: Sequence[str], width: int) -> str:
    """As many of the words as fit, with commas between them."""
    text = ""
    for word in words:
        longer = f"{text}, {word}" if text else word
        if len(longer) > width:
            break
        text = longer
    return text


def _matrix(scores: Json, column: int, room: int) -> Iterator[str]:
    names = [row["name"] for row in scores["classes"]]
    cell = min(room, max(CELL, *map(len, names)), NAME)
    yield _cut(CORNER, column) + "".join(f" {_short(name, cell):>{cell}}" for name in names)
    for name, row in zip(names, scores["confusion"], strict=True):
        yield _cut(name, column) + "".join(f" {count or '.':>{cell}}" for count in row)


def _most_confused(mistakes: Sequence[tuple[int, str, str]]) -> Iterator[str]:
    yield "most frequent confusions:" if mistakes else "no image is given a wrong class"
    for count, true, given in mistakes[:10]:
        yield f"  {_short(true, NAME)} taken for {_short(given, NAME)}: {count:,}"


def _cut(name: str, length: int) -> str:
    """A name in a column of that many characters."""
    return f"{_short(name, length):<{length}}"


def _short(name: str, length: int) -> str:
    return name if len(name) <= length else name[: length - 1] + "\N{HORIZONTAL ELLIPSIS}"
