"""Tables of recorded results: the project's own format, and converters for two published ones.

The format is a CSV file (`.csv` or `.csv.gz`) with a row per architecture and these columns:

- `choice:NAME`, one per decision. If all its values are numbers, the choice is ordinal; otherwise they are operations.
- `valid:FIDELITY`, `seconds:FIDELITY`: validation accuracy (0..1) and the cost of measuring it, in seconds. The full
  fidelity is called `full`; all others are low ones, in the order of the columns. An empty cell is a failed evaluation.
- `test:full`: test accuracy (0..1), by which methods are compared; they never see it.
- `macs`, `params` (optional): multiply-accumulates and parameters of the architecture.
- `class` (optional): rows of one class are identical networks, and the first of them stands for all.
"""

from __future__ import annotations

import csv
import gzip
import io
import zlib
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from engine.space import Candidates, Choice, SearchSpace
from engine.trial import EnvironmentUnusable, UsageError

Array = npt.NDArray[np.float64]
Row = dict[str, str]
FULL = "full"

NASBENCH_OPS = ("none", "skip_connect", "nor_conv_1x1", "nor_conv_3x3", "avg_pool_3x3")
NASBENCH_EDGES = ("1<-0", "2<-0", "2<-1", "3<-0", "3<-1", "3<-2")


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


def load(path: Path) -> Table:
    """The table in a file, in the project's format or one of the two that `convert` knows.

    Raises EnvironmentUnusable if there is no such file, UsageError if its content fits no format.
    """
    if not path.is_file():
        raise EnvironmentUnusable(f"no table {path}; give a .csv or .csv.gz file (columns: see docs/surrogate.md)")
    try:
        data = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
        rows = list(csv.DictReader(io.StringIO(data.decode(), newline="")))
    except (OSError, EOFError, zlib.error, UnicodeDecodeError) as error:
        raise UsageError(f"cannot read {path} as a table ({error}); give a .csv or .csv.gz file") from error
    if not rows:
        raise UsageError(f"{path} has no rows")
    try:
        return _parse(path.name.split(".")[0], convert(rows))
    except (KeyError, ValueError, TypeError) as error:
        raise UsageError(f"{path} is not a table of results: {error}; columns: see docs/surrogate.md") from error


def convert(rows: list[Row]) -> list[Row]:
    """Rows in the project's format, from any of the three formats, which are recognised by their columns.

    Raises ValueError for other columns.
    """
    columns = set(rows[0])
    if {"ops", "val_e200", "test_e200"} <= columns:
        return from_nasbench201(rows)
    if {"encoding", "kd", "train_divisor"} <= columns:
        return from_mfkd(rows)
    if f"valid:{FULL}" in columns and any(column.startswith("choice:") for column in columns):
        return rows
    raise ValueError(f"the columns {', '.join(sorted(columns))} match no known format")


def dump(rows: list[Row], path: Path) -> None:
    """Writes converted rows as `.csv` or `.csv.gz`: the same bytes for the same rows."""
    text = io.StringIO()
    writer = csv.DictWriter(text, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    data = text.getvalue().encode()
    path.write_bytes(gzip.compress(data, mtime=0) if path.suffix == ".gz" else data)


def from_nasbench201(rows: list[Row]) -> list[Row]:
    """Converts NAS-Bench-201: a row per cell: `ops` (a digit per edge), `val_eN`, `test_eN`, `seconds_eN`, `iso`."""
    epochs = sorted({int(c[5:]) for c in rows[0] if c.startswith("val_e")})
    out = []
    for row in rows:
        new = {f"choice:{edge}": NASBENCH_OPS[int(op)] for edge, op in zip(NASBENCH_EDGES, row["ops"], strict=True)}
        new |= {"macs": row["macs"], "params": row["params"], "class": row.get("iso", "")}
        for epoch in epochs:
            name = FULL if epoch == epochs[-1] else f"e{epoch}"
            new[f"valid:{name}"] = _percent(row[f"val_e{epoch}"])
            new[f"seconds:{name}"] = row[f"seconds_e{epoch}"]
        out.append(new | {f"test:{FULL}": _percent(row[f"test_e{epochs[-1]}"])})
    return out


def from_mfkd(rows: list[Row]) -> list[Row]:
    """Converts the paper authors' measurements: a row per architecture, loss and fraction of the training set.

    Full fidelity is training on the whole set without distillation. The choices are the numbers of `encoding` that
    vary; MACs and parameters are those of the MobileNetV2 that it describes, on 32 x 32 images.
    """
    encodings = {row["arch"]: [[int(v) for v in b.split(",")] for b in row["encoding"].split(";")] for row in rows}
    flat = np.array([[value for block in blocks for value in block] for blocks in encodings.values()])
    names = [f"block{b}.{part}" for b in range(8) for part in ("expansion", "channels", "repeats", "stride")]
    varying = [i for i in range(flat.shape[1]) if len(set(flat[:, i])) > 1 and not (i >= 28 and i != 29)]
    out: dict[str, Row] = {}
    for arch, blocks in encodings.items():
        values = [value for block in blocks for value in block]
        macs, params = mobilenetv2_cost(blocks, classes=100, resolution=32)
        out[arch] = {f"choice:{names[i]}": str(values[i]) for i in varying} | {"macs": str(macs), "params": str(params)}
    for row in rows:
        full = row["kd"] == "nokd" and row["train_divisor"] == "1"
        name = FULL if full else f"{row['kd']}/{row['train_divisor']}"
        new = {f"valid:{name}": row["valid_acc"], f"seconds:{name}": row["seconds"]}
        out[row["arch"]] |= new | ({f"test:{FULL}": row["test_acc"]} if full else {})
    return list(out.values())


def mobilenetv2_cost(blocks: list[list[int]], classes: int, resolution: int) -> tuple[int, int]:
    """Multiply-accumulates and weights of a MobileNetV2 with blocks of (expansion, channels, repeats, stride).

    The stem has 32 channels at stride 1; the last block is a 1x1 convolution. MACs do not include normalisation.
    """
    size, inp = resolution, 32
    macs, params = size * size * 27 * inp, 27 * inp + 2 * inp
    for expansion, channels, repeats, stride in blocks[:-1]:
        for repeat in range(repeats):
            hidden = inp * expansion
            if expansion != 1:
                macs, params = macs + size * size * inp * hidden, params + inp * hidden + 2 * hidden
            size = -(-size // (stride if repeat == 0 else 1))
            macs += size * size * hidden * (9 + channels)
            params += hidden * (9 + channels) + 2 * (hidden + channels)
            inp = channels
    last = blocks[-1][1]
    macs += size * size * inp * last + last * classes
    return macs, params + inp * last + 2 * last + last * classes + classes


def _percent(text: str) -> str:
    return f"{float(text) / 100:.6g}" if text else ""


def _parse(name: str, rows: list[Row]) -> Table:
    rows = _first_of_each_class(rows)
    choices, encoded = _choices(rows)
    different, counts = np.unique(encoded, axis=0, return_counts=True)
    if len(different) < len(rows):  # it would be undefined which of them a trial means
        twin = [c.options[option] for c, option in zip(choices, different[counts.argmax()], strict=True)]
        raise ValueError(f"two rows have the same choices, {twin}; average them, or give them the same `class`")
    space = SearchSpace(name, choices, _no_network)
    lows = [c[6:] for c in rows[0] if c.startswith("valid:")]
    known = "macs" in rows[0]
    candidates = Candidates(
        encoded,
        space.encode(encoded),
        _numbers(rows, "macs") if known else np.ones(len(rows)),
        _numbers(rows, "params") if "params" in rows[0] else np.ones(len(rows)),
    )
    if np.isnan(candidates.macs).any() or np.isnan(candidates.params).any():
        raise ValueError("a row has no macs or no params; fill them in, or leave out the column")
    valid = {low: _numbers(rows, f"valid:{low}") for low in lows}
    seconds = {low: _numbers(rows, f"seconds:{low}") for low in lows}
    test = _numbers(rows, f"test:{FULL}")
    for column, values in (*valid.items(), ("test", test)):
        if np.nanmin(values) < 0 or np.nanmax(values) > 1:
            raise ValueError(f"accuracies in '{column}' are not within 0..1")
    return Table(name, candidates, valid, seconds, test)


def _first_of_each_class(rows: list[Row]) -> list[Row]:
    first: dict[Any, Row] = {}
    for i, row in enumerate(rows):
        first.setdefault(row.get("class") or (i,), row)
    return list(first.values())


def _choices(rows: list[Row]) -> tuple[tuple[Choice, ...], npt.NDArray[np.int8]]:
    """The choices that the columns describe, and the option indices of the rows (n, d)."""
    found, columns = [], []
    for column in (c for c in rows[0] if c.startswith("choice:")):
        values = [row[column] for row in rows]
        ordinal = all(_is_number(value) for value in values)
        options = sorted(set(values), key=(lambda v: (float(v), v)) if ordinal else None)
        if len(options) > 127:
            raise ValueError(f"{column} has {len(options)} options; at most 127 are possible")  # indices are int8
        place = {option: i for i, option in enumerate(options)}
        columns.append([place[value] for value in values])
        found.append(Choice(column[7:], tuple(map(float, options)) if ordinal else tuple(options), ordinal))
    return tuple(found), np.ascontiguousarray(np.array(columns, dtype=np.int8).T)


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def _numbers(rows: Iterable[Row], column: str) -> Array:
    return np.array([float(row[column]) if row[column] else np.nan for row in rows])


def _no_network(choices: tuple[int, ...], classes: int, width: float) -> Any:
    raise UsageError("a table of results describes no networks that could be built")
