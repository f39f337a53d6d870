"""Tables of recorded results in the project's own format; published ones are converted (`published.py`).

The format is a CSV file (`.csv` or `.csv.gz`) with a row per architecture and these columns:

- `choice:NAME`, one per decision. If all its values are numbers, the choice is ordinal; otherwise they are operations.
- `valid:FIDELITY`, `seconds:FIDELITY`: validation accuracy (0..1) and the cost of measuring it, in seconds. The full
  fidelity is called `full`; all others are low ones, in the order of the columns. An empty cell is a failed evaluation.
- `test:full`: test accuracy (0..1), by which methods are compared; they never see it.
- `macs`, `params` (optional): multiply-accumulates and parameters of the architecture.
- `proxy:NAME`, `latency:NAME` (optional): what is known of an architecture before any training, at no cost: a score of
  the untrained network, or its latency on a device. An empty cell is an unknown value.
- `class` (optional): rows of one class are identical networks, and the first of them stands for all.

Scores and latencies may come in tables of their own, with the same choices; `load` joins them.
"""

from __future__ import annotations

import csv
import gzip
import io
import zlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from engine.search.replay.published import FULL, Row, convert
from engine.space import LATENCY, PROXY, Candidates, Choice, SearchSpace
from engine.trial import EnvironmentUnusable, UsageError

Array = npt.NDArray[np.float64]
KNOWN = (PROXY, LATENCY)  # columns of what is known without training
MAX_OPTIONS = np.iinfo(np.int16).max  # of one choice: their indices are int16


@dataclass(frozen=True)
class Table:
    """Recorded results of n architectures.

    `valid` (accuracies) and `seconds` (n,) are by fidelity name, `test` (n,) are accuracies of the full one. Accuracies
    are 0..1, or nan if the evaluation failed.
    """

    name: str
    candidates: Candidates
    valid: dict[str, Array]
    seconds: dict[str, Array]
    test: Array

    @property
    def lows(self) -> tuple[str, ...]:
        """The names of the low fidelities."""
        return tuple(name for name in self.valid if name != FULL)

    def where(self, keep: npt.NDArray[np.bool_]) -> Table:
        """The rows that `keep` (n,) marks."""
        valid = {name: values[keep] for name, values in self.valid.items()}
        seconds = {name: values[keep] for name, values in self.seconds.items()}
        return Table(self.name, self.candidates.where(keep), valid, seconds, self.test[keep])


def load(path: Path, joined: Sequence[Path] = ()) -> Table:
    """The table in a file, in the project's format or one that `convert` knows, with the columns of the `joined` ones.

    Raises EnvironmentUnusable if there is no such file, UsageError if its content fits no format.
    """
    rows = _read(path)
    for other in joined:
        try:
            rows = join(rows, _read(other))
        except ValueError as error:
            raise UsageError(f"{other} does not fit {path}: {error}") from error
    try:
        return _parse(path.name.split(".")[0], rows)
    except (KeyError, ValueError, TypeError) as error:
        raise UsageError(f"{path} is not a table of results: {error}; columns: see docs/search.md") from error


def _read(path: Path) -> list[Row]:
    """The rows of a file in the project's format."""
    if not path.is_file():
        raise EnvironmentUnusable(f"no table {path}; give a .csv or .csv.gz file (columns: see docs/search.md)")
    try:
        data = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
        rows = list(csv.DictReader(io.StringIO(data.decode(), newline="")))
    except (OSError, EOFError, zlib.error, UnicodeDecodeError) as error:
        raise UsageError(f"cannot read {path} as a table ({error}); give a .csv or .csv.gz file") from error
    if not rows:
        raise UsageError(f"{path} has no rows")
    try:
        return convert(rows)
    except KeyError as error:
        raise UsageError(f"{path} is not a table of results: it has no column {error}") from error
    except (ValueError, TypeError) as error:
        raise UsageError(f"{path} is not a table of results: {error}; columns: see docs/search.md") from error


def join(rows: list[Row], others: list[Row]) -> list[Row]:
    """The rows, each with the columns `proxy:NAME` and `latency:NAME` of the other row that has the same choices.

    Raises ValueError if the others have no such column, other choices, or none of the architectures.
    """
    choices = [column for column in rows[0] if column.startswith("choice:")]
    columns = [column for column in others[0] if column.startswith(KNOWN)]
    if not columns:
        raise ValueError("it has no column proxy:NAME or latency:NAME")
    lacking = [column for column in choices if column not in others[0]]
    if lacking:
        raise ValueError(f"it has no column {', '.join(lacking)}")
    by_choices = {tuple(row[c] for c in choices): {column: row[column] for column in columns} for row in others}
    unknown = dict.fromkeys(columns, "")
    found = [by_choices.get(tuple(row[c] for c in choices), unknown) for row in rows]
    if all(known is unknown for known in found):
        raise ValueError("they have no architecture in common")
    return [row | known for row, known in zip(rows, found, strict=True)]


def dump(rows: list[Row], path: Path) -> None:
    """Writes converted rows as `.csv` or `.csv.gz`: the same bytes for the same rows."""
    text = io.StringIO()
    writer = csv.DictWriter(text, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    data = text.getvalue().encode()
    path.write_bytes(gzip.compress(data, mtime=0) if path.suffix == ".gz" else data)


def _parse(name: str, rows: list[Row]) -> Table:
    columns = list(dict.fromkeys(column for row in rows for column in row))
    fidelities = [column[6:] for column in columns if column.startswith("valid:")]
    for column in (f"valid:{FULL}", f"test:{FULL}", *(f"seconds:{fidelity}" for fidelity in fidelities)):
        if column not in columns:
            raise ValueError(f"it has no column '{column}'")
    rows = _first_of_each_class(rows)
    candidates = _candidates(name, rows, columns)
    valid = {fidelity: _numbers(rows, f"valid:{fidelity}") for fidelity in fidelities}
    seconds = {fidelity: _numbers(rows, f"seconds:{fidelity}") for fidelity in fidelities}
    test = _numbers(rows, f"test:{FULL}")
    for column, values in (*((f"valid:{f}", values) for f, values in valid.items()), (f"test:{FULL}", test)):
        if np.isnan(values).all():
            raise ValueError(f"no row has a value in '{column}'")
        if np.nanmin(values) < 0 or np.nanmax(values) > 1:
            raise ValueError(f"accuracies in '{column}' are not within 0..1")
    untested = np.flatnonzero(~np.isnan(valid[FULL]) & np.isnan(test))
    if len(untested):
        raise ValueError(f"architecture {untested[0] + 1} has 'valid:{FULL}' but no 'test:{FULL}'")
    return Table(name, candidates, valid, seconds, test)


def _candidates(name: str, rows: list[Row], columns: list[str]) -> Candidates:
    choices, encoded = _choices(rows)
    different, counts = np.unique(encoded, axis=0, return_counts=True)
    if len(different) < len(rows):  # it would be undefined which of them a trial means
        twin = [c.options[option] for c, option in zip(choices, different[counts.argmax()], strict=True)]
        raise ValueError(f"two rows have the same choices, {twin}; average them, or give them the same `class`")
    costs = {c: _numbers(rows, c) if c in columns else np.ones(len(rows)) for c in ("macs", "params")}
    if np.isnan(list(costs.values())).any():
        raise ValueError("a row has no macs or no params; fill them in, or leave out the column")
    trends = {c: _numbers(rows, c) for c in columns if c.startswith(KNOWN)}
    space = SearchSpace(name, choices, _no_network)
    return Candidates(encoded, space.encode(encoded), costs["macs"], costs["params"], trends, space.ordinal)


def _first_of_each_class(rows: list[Row]) -> list[Row]:
    """The first row of each class. What is known without training is known of all of them if it is of one."""
    first: dict[Any, Row] = {}
    for i, row in enumerate(rows):
        one = first.setdefault(row.get("class") or (i,), dict(row))
        for column in (c for c in row if c.startswith(KNOWN) and not one.get(c)):
            one[column] = row[column]
    return list(first.values())


def _choices(rows: list[Row]) -> tuple[tuple[Choice, ...], npt.NDArray[np.int16]]:
    """The choices that the columns describe, and the option indices of the rows (n, d)."""
    found, columns = [], []
    for column in (c for c in rows[0] if c.startswith("choice:")):
        values = [row[column] for row in rows]
        ordinal = all(_is_number(value) for value in values)
        options = sorted(set(values), key=(lambda v: (float(v), v)) if ordinal else None)
        if len(options) > MAX_OPTIONS:
            raise ValueError(f"{column} has {len(options)} options; at most {MAX_OPTIONS} are possible")
        place = {option: i for i, option in enumerate(options)}
        columns.append([place[value] for value in values])
        found.append(Choice(column[7:], tuple(map(float, options)) if ordinal else tuple(options), ordinal))
    return tuple(found), np.ascontiguousarray(np.array(columns, dtype=np.int16).T)


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def _numbers(rows: Iterable[Row], column: str) -> Array:
    """The values of a column, nan where a row has none."""
    return np.array([float(row[column]) if row.get(column) else np.nan for row in rows])


def _no_network(choices: tuple[int, ...], classes: int, width: float) -> Any:
    raise UsageError("a table of results describes no networks that could be built")
