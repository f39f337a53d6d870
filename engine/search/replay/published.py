"""Converters: published tables of results, and of scores and latencies, into the project's format (`tables.py`)."""

from __future__ import annotations

import re

from engine.spaces.arithmetic import MACS_AND_PARAMS, conv_cost, linear_cost, strided
from engine.spaces.nasbench201 import EDGES, OPERATIONS
from engine.spaces.shufflenetv2 import down_cost, unit_cost

Row = dict[str, str]
FULL = "full"

CHOICES = tuple(f"choice:{target}<-{source}" for target, source in EDGES)
# The benchmark's scores of networks whose output does not depend on the input, and latencies that were not measured.
NO_SCORE, NO_LATENCY = -1e8, 0.0
# What the numbers of an encoding in the authors' tables are.
MOBILENETV2 = [f"block{b}.{part}" for b in range(8) for part in ("expansion", "channels", "repeats", "stride")]
SHUFFLENETV2 = [f"{part}.channels" for part in ("stage1", "stage2", "stage3", "last")]
SHUFFLENETV2 += [f"stage{stage}.blocks" for stage in (1, 2, 3)]
MACRO_BLOCKS = ("identity", "mbconv3_e3", "mbconv5_e6")
MACRO_SECONDS = "3600"


def convert(rows: list[Row]) -> list[Row]:
    """Rows in the project's format, from any of the formats below, which are recognised by their columns.

    Raises ValueError for other columns.
    """
    columns = set(rows[0])
    if {"ops", "val_e200", "test_e200"} <= columns:
        return from_nasbench201(rows)
    if {"encoding", "kd", "train_divisor"} <= columns:
        return from_mfkd(rows)
    if {"arch", "test_acc_0", "test_acc_1", "test_acc_2", "macs"} <= columns:
        return from_nasbench_macro(rows)
    if "ops" in columns and any(column.endswith("_latency") for column in columns):
        return [cell_choices(row["ops"]) | _latencies(row) for row in rows]
    if {"ops", "nwot"} <= columns:
        return [cell_choices(row["ops"]) | _proxies(row) for row in rows]
    if any(column.startswith("choice:") for column in columns):
        return rows
    raise ValueError(f"the columns {', '.join(sorted(columns))} match no known format")


def cell_choices(ops: str) -> Row:
    """The choices of a NAS-Bench-201 cell, from a digit per edge."""
    return {column: OPERATIONS[int(op)] for column, op in zip(CHOICES, ops, strict=True)}


def from_nasbench201(rows: list[Row]) -> list[Row]:
    """Converts NAS-Bench-201: a row per cell: `ops` (a digit per edge), `val_eN`, `test_eN`, `seconds_eN`, `iso`."""
    epochs = sorted({int(c[5:]) for c in rows[0] if c.startswith("val_e")})
    out = []
    for row in rows:
        new = cell_choices(row["ops"])
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
    vary; MACs and parameters are those of the network that it describes (MobileNetV2 or ShuffleNetV2), on 32 x 32
    images of 100 classes.
    """
    networks = {row["arch"]: authors_network(row["encoding"]) for row in rows}
    if len({tuple(numbers) for numbers, _ in networks.values()}) > 1:
        raise ValueError("it holds MobileNetV2 and ShuffleNetV2; give a table for each")
    options = {name: {numbers[name] for numbers, _ in networks.values()} for name in next(iter(networks.values()))[0]}
    varying = [name for name, values in options.items() if len(values) > 1]
    out: dict[str, Row] = {}
    for arch, (numbers, (macs, params)) in networks.items():
        out[arch] = {f"choice:{name}": str(numbers[name]) for name in varying}
        out[arch] |= {"macs": str(macs), "params": str(params)}
    for row in rows:
        full = row["kd"] == "nokd" and row["train_divisor"] == "1"
        name = FULL if full else f"{row['kd']}/{row['train_divisor']}"
        new = {f"valid:{name}": row["valid_acc"], f"seconds:{name}": row["seconds"]}
        out[row["arch"]] |= new | ({f"test:{FULL}": row["test_acc"]} if full else {})
    return list(out.values())


def authors_network(encoding: str) -> tuple[dict[str, int], tuple[int, int]]:
    """The numbers that describe a network of the paper authors' tables, by name, and its MACs and parameters.

    A MobileNetV2 is 8 blocks of (expansion, channels, repeats, stride), the last of which is a 1x1 convolution that
    only has channels. A ShuffleNetV2 is its `out_channels`, 4 numbers, then its `num_blocks`, 3 numbers, as in the
    authors' notebook (NAS.ipynb of IlyaTrofimov/MF_NAS_KD). Only the order of the numbers matters, not what stands
    between them. Raises ValueError for any other count of numbers.
    """
    numbers = [int(number) for number in re.findall(r"\d+", encoding)]
    if len(numbers) == len(MOBILENETV2):
        blocks = [numbers[start : start + 4] for start in range(0, len(numbers), 4)]
        named = dict(zip(MOBILENETV2, numbers, strict=True))
        unused = [f"block7.{part}" for part in ("expansion", "repeats", "stride")]
        return {name: named[name] for name in named if name not in unused}, mobilenetv2_cost(blocks, 100, 32)
    if len(numbers) == len(SHUFFLENETV2):
        return dict(zip(SHUFFLENETV2, numbers, strict=True)), shufflenetv2_cost(numbers[:4], numbers[4:], 100, 32)
    raise ValueError(
        f"encoding '{encoding}' has {len(numbers)} numbers; that of a MobileNetV2 has {len(MOBILENETV2)}, of a "
        f"ShuffleNetV2 {len(SHUFFLENETV2)}"
    )


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
    params += inp * last + 2 * last + last * classes + classes
    return macs, params


def shufflenetv2_cost(channels: list[int], blocks: list[int], classes: int, resolution: int) -> tuple[int, int]:
    """Multiply-accumulates and weights of the authors' ShuffleNetV2: `channels` of the 3 stages and of the last 1x1
    convolution, `blocks` of stride 1 in each stage, after the one of stride 2.

    Their stem is a 1x1 convolution of 24 channels at stride 1, without pooling. MACs do not include normalisation.
    """
    size, before = resolution, 24
    total = conv_cost(3, before, 1, size) + linear_cost(channels[-1], classes)
    for after, count in zip(channels[:-1], blocks, strict=True):
        total += down_cost(before, after, size) + count * unit_cost(after, strided(size))
        size, before = strided(size), after
    macs, params = (total + conv_cost(before, channels[-1], 1, size))[MACS_AND_PARAMS]
    return int(macs), int(params)


def _percent(text: str) -> str:
    return f"{float(text) / 100:.6g}" if text else ""


def from_nasbench_macro(rows: list[Row]) -> list[Row]:
    """Converts NAS-Bench-Macro (arXiv 2103.11922): `arch` (a digit per layer), `test_acc_N` of three trainings, `macs`.

    The benchmark records neither a validation accuracy, nor costs, nor a low fidelity. The first training takes the
    place of the validation accuracy, the mean of the other two is the test accuracy, and each takes MACRO_SECONDS.
    """
    out = []
    for row in rows:
        new = {f"choice:layer{i}": MACRO_BLOCKS[int(block)] for i, block in enumerate(row["arch"])}
        new |= {"macs": row["macs"], "params": row["params"]}
        new |= {f"valid:{FULL}": _percent(row["test_acc_0"]), f"seconds:{FULL}": MACRO_SECONDS}
        test = (float(row["test_acc_1"]) + float(row["test_acc_2"])) / 2
        out.append(new | {f"test:{FULL}": _percent(str(test))})
    return out


def _latencies(row: Row) -> Row:
    """HW-NAS-Bench's `DEVICE_latency`, in milliseconds, as `latency:DEVICE`; its other columns are left out."""
    found = {c.removesuffix("_latency"): value for c, value in row.items() if c.endswith("_latency")}
    return {f"latency:{name}": value if float(value) > NO_LATENCY else "" for name, value in found.items()}


def _proxies(row: Row) -> Row:
    """The scores of NAS-Bench-Suite-Zero, `NAME`, as `proxy:NAME`."""
    return {f"proxy:{c}": value if float(value) > NO_SCORE else "" for c, value in row.items() if c != "ops"}
