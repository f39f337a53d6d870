"""The table format and its converters, on small tables made here and on the published ones, where they are."""

import gzip
from pathlib import Path

import numpy as np
import pytest
from torch import nn

from engine.networks import count_cost, shufflenetv2
from engine.search.replay import published, tables
from engine.trial import EnvironmentUnusable, UsageError

SHARED = Path(__file__).parents[2] / "shared" / "data"
SYNTHETIC = Path(__file__).parent / "data" / "synthetic_table.csv"

NASBENCH = [
    {"index": "0", "ops": "012343", "iso": "7", "params": "100", "macs": "2000", "val_e12": "30.5", "test_e12": "30"}
    | {"val_e200": "60", "test_e200": "61", "seconds_e12": "10", "seconds_e200": "200"},
    {"index": "1", "ops": "312343", "iso": "8", "params": "300", "macs": "5000", "val_e12": "40", "test_e12": "41"}
    | {"val_e200": "70", "test_e200": "72.25", "seconds_e12": "12", "seconds_e200": "240"},
    {"index": "2", "ops": "012344", "iso": "7", "params": "100", "macs": "2000", "val_e12": "31", "test_e12": "32"}
    | {"val_e200": "61", "test_e200": "62", "seconds_e12": "10", "seconds_e200": "200"},
]


def write(rows, path):
    tables.dump(rows, path)
    return path


def test_nasbench201_rows_are_converted_and_identical_cells_merged(tmp_path):
    table = tables.load(write(NASBENCH, tmp_path / "cells.csv"))
    assert len(table.candidates) == 2  # rows 0 and 2 are the same network; the first stands for both
    assert table.lows == ("e12",)
    np.testing.assert_allclose(table.valid["full"], [0.60, 0.70])
    np.testing.assert_allclose(table.valid["e12"], [0.305, 0.40])
    np.testing.assert_allclose(table.test, [0.61, 0.7225])
    np.testing.assert_allclose(table.seconds["e12"], [10, 12])
    np.testing.assert_allclose(table.candidates.macs, [2000, 5000])
    assert (table.candidates.choices[0] != table.candidates.choices[1]).sum() == 1


def test_the_project_s_format_survives_a_round_trip_compressed_or_not(tmp_path):
    plain = tables.load(write(published.convert(NASBENCH), tmp_path / "a.csv"))
    packed = tables.load(write(published.convert(NASBENCH), tmp_path / "b.csv.gz"))
    np.testing.assert_array_equal(plain.candidates.features, packed.candidates.features)
    np.testing.assert_array_equal(plain.valid["e12"], packed.valid["e12"])
    assert (tmp_path / "b.csv.gz").read_bytes() == gzip.compress((tmp_path / "a.csv").read_bytes(), mtime=0)


def test_the_authors_rows_become_architectures_with_a_fidelity_per_loss_and_fraction(tmp_path):
    blocks = "1,16,{},1;6,32,1,2;6,64,4,2;6,128,4,2;6,184,2,1;6,320,1,2;6,440,2,1;0,{},2,0"
    rows = []
    for arch, (repeats, last) in enumerate([(1, 400), (4, 536), (2, 400)]):
        for kd, divisor, valid in (("attention", 27, 0.1), ("nokd", 1, 0.6)):
            rows.append(
                {"arch": str(arch), "encoding": blocks.format(repeats, last), "kd": kd, "train_divisor": str(divisor)}
                | {"valid_acc": str(valid + arch / 100), "test_acc": "0.65", "seconds": "100"}
            )
    table = tables.load(write(rows, tmp_path / "authors.csv"))
    assert table.lows == ("attention/27",)
    np.testing.assert_allclose(table.valid["full"], [0.6, 0.61, 0.62])
    # Two numbers vary, so there are two ordinal choices, of 3 and 2 options, scaled to 0..1.
    np.testing.assert_allclose(table.candidates.features, [[0, 0], [1, 1], [0.5, 0]])
    assert table.candidates.macs[0] < table.candidates.macs[2] < table.candidates.macs[1]


def test_the_cost_of_mobilenetv2_is_the_sum_over_its_layers():
    blocks = [[1, 16, 2, 1], [6, 24, 1, 2], [0, 40, 2, 0]]
    macs, params = published.mobilenetv2_cost(blocks, classes=10, resolution=8)
    layers = [
        (64 * 27 * 32, 27 * 32 + 64),
        (64 * 32 * 9, 32 * 9 + 64), (64 * 32 * 16, 32 * 16 + 32),
        (64 * 16 * 9, 16 * 9 + 32), (64 * 16 * 16, 16 * 16 + 32),
        (64 * 16 * 96, 16 * 96 + 192), (16 * 96 * 9, 96 * 9 + 192), (16 * 96 * 24, 96 * 24 + 48),
        (16 * 24 * 40, 24 * 40 + 80), (40 * 10, 40 * 10 + 10),
    ]  # fmt: skip
    assert (macs, params) == tuple(map(sum, zip(*layers, strict=True)))


SHUFFLENETS = (
    "98,158,510,524;6,3,5",
    "[98, 160, 510, 524], [6, 4, 5]",
    "{'out_channels': [64, 158, 510, 700], 'num_blocks': [6, 3, 5]}",
)


def test_the_authors_shufflenetv2_are_read_however_their_numbers_are_separated(tmp_path):
    row = {"kd": "nokd", "train_divisor": "1", "valid_acc": "0.6", "test_acc": "0.6", "seconds": "9"}
    rows = [row | {"arch": str(arch), "encoding": encoding} for arch, encoding in enumerate(SHUFFLENETS)]
    converted = published.convert(rows)
    choices = [column.removeprefix("choice:") for column in converted[0] if column.startswith("choice:")]
    assert choices == ["stage1.channels", "stage2.channels", "last.channels", "stage2.blocks"]  # those that vary
    candidates = tables.load(write(rows, tmp_path / "t.csv")).candidates
    assert candidates.choices.tolist() == [[1, 0, 0, 0], [1, 1, 0, 1], [0, 0, 1, 0]]
    assert candidates.ordinal == (True,) * 4
    rows[0]["encoding"] = "98,158,510;6,3,5"
    with pytest.raises(UsageError, match=r"'98,158,510;6,3,5' has 6 numbers; .* of a ShuffleNetV2 7"):
        tables.load(write(rows, tmp_path / "t.csv"))
    rows[0]["encoding"] = ";".join(["1,16,1,1"] * 8)
    with pytest.raises(UsageError, match="it holds MobileNetV2 and ShuffleNetV2"):
        tables.load(write(rows, tmp_path / "t.csv"))


def test_the_cost_of_the_authors_shufflenetv2_is_that_of_the_network():
    """Counted on ours with their stem: a 1x1 convolution."""
    network = shufflenetv2.network(24, [(98, 7), (158, 4), (510, 6)], 524, 100)
    network.stem[0] = nn.Conv2d(3, 24, 1, bias=False)
    assert published.shufflenetv2_cost([98, 158, 510, 524], [6, 3, 5], 100, 32) == count_cost(network, 32)


def test_empty_cells_are_failed_evaluations(tmp_path):
    rows = published.convert(NASBENCH)
    rows[1] = rows[1] | {"valid:e12": ""}
    table = tables.load(write(rows, tmp_path / "t.csv"))
    np.testing.assert_array_equal(np.isnan(table.valid["e12"]), [False, True])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"valid:full": "60"}, "not within 0..1"),
        ({"valid:full": "good"}, "could not convert"),
        ({"macs": ""}, "a row has no macs"),
    ],
)
def test_a_malformed_table_is_refused_with_the_reason(tmp_path, change, message):
    rows = published.convert(NASBENCH)
    rows[0] = rows[0] | change
    with pytest.raises(UsageError, match=message):
        tables.load(write(rows, tmp_path / "t.csv"))


def test_two_rows_of_one_architecture_are_refused_unless_they_share_a_class(tmp_path):
    rows = [row | {"class": ""} for row in published.convert(NASBENCH)]
    twice = [*rows, rows[1] | {"valid:full": "0.5"}]
    with pytest.raises(UsageError, match=r"t\.csv is not a table .*two rows have the same choices, \['nor_conv_3x3', "):
        tables.load(write(twice, tmp_path / "t.csv"))
    one = [row | {"class": name} for row, name in zip(twice, "abcb", strict=True)]
    assert len(tables.load(write(one, tmp_path / "t.csv")).candidates) == 3


def test_unknown_columns_missing_files_and_empty_ones_are_errors_that_name_the_file(tmp_path):
    with pytest.raises(UsageError, match=r"t\.csv is not a table of results: the columns a, b match no known format"):
        tables.load(write([{"a": "1", "b": "2"}], tmp_path / "t.csv"))
    (tmp_path / "plain.csv.gz").write_text("a,b\n1,2\n")
    with pytest.raises(UsageError, match="cannot read .* as a table"):
        tables.load(tmp_path / "plain.csv.gz")
    with pytest.raises(EnvironmentUnusable, match=r"no table .*none\.csv"):
        tables.load(tmp_path / "none.csv")
    (tmp_path / "empty.csv").write_text("a,b\n")
    with pytest.raises(UsageError, match="has no rows"):
        tables.load(tmp_path / "empty.csv")


def test_the_synthetic_table_has_192_architectures_and_one_low_fidelity():
    table = tables.load(SYNTHETIC)
    assert len(table.candidates) == 192
    assert table.lows == ("low",)
    assert table.candidates.features.shape[1] > 6


def test_scores_and_latencies_are_joined_by_choices_and_shared_within_a_class(tmp_path):
    """Row 1 has a score; row 0 has none, but its identical twin, row 2, does. A latency of -1 was not measured."""
    scores = [{"ops": "312343", "nwot": "600", "zen": "-1e+08"}, {"ops": "012344", "nwot": "500", "zen": "9"}]
    latencies = [{"ops": "012343", "pixel3_latency": "3.5", "pixel3_energy": "7"}]
    latencies.append({"ops": "312343", "pixel3_latency": "-1", "pixel3_energy": "8"})
    joined = [write(scores, tmp_path / "scores.csv"), write(latencies, tmp_path / "latencies.csv.gz")]
    table = tables.load(write(NASBENCH, tmp_path / "cells.csv"), joined)
    trends = table.candidates.trends
    assert set(trends) == {"proxy:nwot", "proxy:zen", "latency:pixel3"}
    np.testing.assert_array_equal(trends["proxy:nwot"], [500, 600])
    np.testing.assert_array_equal(trends["proxy:zen"], [9, np.nan])
    np.testing.assert_array_equal(trends["latency:pixel3"], [3.5, np.nan])
    np.testing.assert_array_equal(table.where(np.array([False, True])).candidates.trends["proxy:nwot"], [600])


@pytest.mark.parametrize(
    ("other", "message"),
    [
        ([{"ops": "444444", "nwot": "1"}], "they have no architecture in common"),
        ([{"choice:depth": "3", "proxy:x": "1"}], "it has no column choice:1<-0"),
        ([{"choice:1<-0": "none"}], "it has no column proxy:NAME or latency:NAME"),
    ],
)
def test_a_table_that_cannot_be_joined_is_refused_with_the_reason(tmp_path, other, message):
    with pytest.raises(UsageError, match=rf"other\.csv does not fit .*cells\.csv: {message}"):
        tables.load(write(NASBENCH, tmp_path / "cells.csv"), [write(other, tmp_path / "other.csv")])


def test_nasbench_macro_gives_one_training_to_methods_and_the_others_to_the_comparison(tmp_path):
    row = {"test_acc_0": "90", "test_acc_1": "91", "test_acc_2": "93", "params": "10"}
    rows = [row | {"arch": "0120", "macs": "300"}, row | {"arch": "2120", "macs": "500", "test_acc_0": "94"}]
    table = tables.load(write(rows, tmp_path / "macro.csv"))
    np.testing.assert_allclose(table.valid["full"], [0.90, 0.94])
    np.testing.assert_allclose(table.test, [0.92, 0.92])
    assert table.lows == ()
    assert table.candidates.macs.tolist() == [300, 500]


@pytest.mark.parametrize("column", ["valid:full", "seconds:full", "seconds:e12", "test:full"])
def test_a_missing_column_is_named(tmp_path, column):
    rows = [{k: v for k, v in row.items() if k != column} for row in published.convert(NASBENCH)]
    with pytest.raises(UsageError, match=rf"t\.csv is not a table of results: it has no column '{column}'"):
        tables.load(write(rows, tmp_path / "t.csv"))


def test_a_missing_column_of_a_published_format_is_named(tmp_path):
    rows = [{k: v for k, v in row.items() if k != "seconds_e12"} for row in NASBENCH]
    with pytest.raises(UsageError, match="it has no column 'seconds_e12'"):
        tables.load(write(rows, tmp_path / "t.csv"))


def test_a_first_architecture_without_full_result_is_one_that_failed(tmp_path):
    """In the authors' format it then lacks the columns of the full fidelity."""
    blocks = "1,16,1,1;6,32,1,2;6,64,4,2;6,128,4,2;6,184,2,1;6,320,1,2;6,440,{},1;0,400,2,0"
    low = {"kd": "nst", "train_divisor": "27", "valid_acc": "0.1", "test_acc": "0.1", "seconds": "9"}
    rows = [low | {"arch": str(arch), "encoding": blocks.format(arch + 1)} for arch in range(2)]
    rows.append(rows[1] | {"kd": "nokd", "train_divisor": "1", "valid_acc": "0.6"})
    table = tables.load(write(rows, tmp_path / "t.csv"))
    np.testing.assert_array_equal(table.valid["full"], [np.nan, 0.6])
    rows[2]["test_acc"] = ""
    with pytest.raises(UsageError, match="no row has a value in 'test:full'"):
        tables.load(write(rows, tmp_path / "t.csv"))


def test_a_choice_may_have_more_options_than_fit_into_a_byte(tmp_path):
    rows = [{"choice:channels": str(8 * i)} for i in range(300)]
    rows = [row | {"valid:full": "0.5", "seconds:full": "1", "test:full": "0.5"} for row in rows]
    candidates = tables.load(write(rows, tmp_path / "t.csv")).candidates
    assert candidates.architecture(299).choices == (299,)
    np.testing.assert_allclose(candidates.features[:, 0], np.arange(300) / 299, rtol=1e-6)


@pytest.mark.skipif(not SHARED.exists(), reason="no ../shared/data beside the checkout: published tables not tested")
def test_the_published_tables_have_the_published_sizes_and_optimum():
    cells = tables.load(SHARED / "nasbench201_cifar100.csv.gz")
    assert len(cells.candidates) == 6466
    assert cells.test.max() == pytest.approx(0.735133)
    joined = [SHARED / f"nasbench201_{name}.csv.gz" for name in ("proxies", "hardware_cifar100")]
    trends = tables.load(SHARED / "nasbench201_cifar100.csv.gz", joined).candidates.trends
    assert np.isnan(trends["proxy:nwot"]).sum() == 182  # networks whose output does not depend on the image
    assert not np.isnan(trends["latency:pixel3"]).any()
    macro = tables.load(SHARED / "nasbench_macro_cifar10.csv.gz")
    assert len(macro.candidates) == 6561
    authors = tables.load(SHARED / "mfkd_mobilenetv2_cifar100.csv.gz")
    assert len(authors.candidates) == 100
    assert len(authors.lows) == 30
