"""How latency is measured, here and on another device, and a search that trusts another device's."""

from __future__ import annotations

import gzip
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from torch import nn

import cli
from engine.config import Budget, Resources, RunSettings, SearchConfig
from engine.latency import time_probes
from engine.latency.runtimes import Conditions, compressed_onnx
from engine.latency.time_probes import noise, noise_warning, open_network, quietest, time_in_rounds
from engine.search.journal import read_journal
from engine.search.latency.model import choose_probes, looked_up, parts_of
from engine.search.latency.table import BuiltSpace, check_table, read_table
from engine.search.progress import Display
from engine.search.runs import open_run, rows
from engine.search.search import search
from engine.space import candidates
from engine.tasks import LatencyTask, WorkerSettings, task_to_json
from engine.training.run_tasks import run_latency
from engine.trial import Architecture, EnvironmentUnusable, Fidelity, UsageError
from tests.faulty_space import WIDTHS, build

SPACE = "tests/faulty_space.py:SPACE"
CPU = torch.device("cpu")


def test_rounds_go_through_all_networks_and_back() -> None:
    """A device that is slower for a while, or grows slower, is so for all networks, and one is in memory at a time."""
    order: list[str] = []

    def prepare(name: str) -> Callable[[], float]:
        order.append(name)
        return lambda: float(len(order))  # slower each time that something is made ready

    found = time_in_rounds([lambda name=name: prepare(name) for name in "abc"], rounds=4)  # type: ignore[misc]
    assert "".join(order) == "abccbaabccba"
    assert np.mean(found, axis=1) == pytest.approx(6.5)
    assert [quietest(rounds) for rounds in found] == [1, 2, 3]


def test_a_call_is_the_median_of_a_round_after_its_warm_up() -> None:
    times = [900.0, 500.0, 100.0, *[1.0] * 8, *[50.0] * 7]
    left = iter(times)
    assert time_in_rounds([lambda: lambda: next(left)], rounds=1) == [[1.0]]
    slow = iter([900.0] * 100)
    assert time_in_rounds([lambda: lambda: next(slow)], rounds=1) == [[900.0]]
    assert len(list(slow)) == 100 - time_probes.WARM_UP_CALLS - 3


def test_a_machine_that_is_not_quiet_is_named() -> None:
    quiet = [[1.0, 1.01, 1.02], [5.0, 5.0, 5.1], [2.0, 4.0, 9.0]]
    assert noise(quiet) == pytest.approx(0.01)
    assert noise_warning(noise(quiet)) == ""
    busy = [[1.0, 1.2, 1.3], [5.0, 6.0, 7.0]]
    said = noise_warning(noise(busy))
    assert re.search(r"this machine is not quiet: .* 20 % longer .* load of .* cores; stop other work", said)


def test_torch_times_the_network_at_the_batch_size() -> None:
    torch.set_num_threads(1)
    small, large = (Conditions("torch", 32, batch, CPU).ready(lambda: build((3, 3, 3), 3, 1.0)) for batch in (1, 64))
    few, many = (quietest(rounds) for rounds in time_in_rounds([small, large], rounds=2))
    assert 0 < few < many


def test_a_network_is_compiled_once_and_timed_in_every_round(monkeypatch: pytest.MonkeyPatch) -> None:
    compiled: list[nn.Module] = []

    def compile_it(network: nn.Module, dynamic: bool) -> nn.Module:
        compiled.append(network)
        return network

    monkeypatch.setattr(torch, "compile", compile_it)
    found = time_in_rounds([Conditions("torch.compile", 16, 1, CPU).ready(lambda: build((0, 0, 0), 3, 1.0))], rounds=3)
    assert len(compiled) == 1
    assert not compiled[0].training
    assert len(found[0]) == 3
    assert min(found[0]) > 0


def test_compiling_without_a_compiler_is_an_error_with_a_way_out(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*arguments: Any, **options: Any) -> Any:
        raise RuntimeError("no C++ compiler\nmore")

    monkeypatch.setattr(torch, "compile", lambda network, dynamic: broken)
    with pytest.raises(EnvironmentUnusable, match=r"torch.compile fails here \(no C\+\+ compiler\); install a C\+\+"):
        Conditions("torch.compile", 16, 1, CPU).ready(lambda: build((0, 0, 0), 3, 1.0))()


def test_the_file_that_is_timed_has_the_structure_and_no_weights() -> None:
    """Two convolutions of the same input stay two, though both have zeros for weights."""

    class Twins(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.other = (nn.Conv2d(3, 64, 3, padding=1) for _ in range(2))

        def forward(self, images: torch.Tensor) -> tuple[torch.Tensor, list[torch.Tensor]]:
            return (self.one(images).relu() * self.other(images)).mean((2, 3)), []

    network = Twins()
    content = compressed_onnx(network, 16)
    assert bool(network.one.weight.any())  # the network itself keeps its weights
    proto = gzip.decompress(content)
    assert len(content) < len(proto) / 5
    model = onnx.load_from_string(proto)
    assert sum(node.op_type == "Conv" for node in model.graph.node) == 2
    weights = [t for t in model.graph.initializer if len(t.dims) == 4]
    assert len(weights) == 2
    assert not any(any(tensor.raw_data) for tensor in weights)
    assert open_network(proto, (2, 3, 16, 16))() > 0


def test_probes_are_distinct_differ_in_structure_and_follow_the_seed() -> None:
    networks = BuiltSpace("nasbench201", 10, 1.0, 32)
    members = candidates(networks.space, 10, 1.0, 32)
    probes = choose_probes(networks, members, 40, seed=0)
    assert len(set(probes)) == 40
    assert probes == choose_probes(networks, members, 40, seed=0) != choose_probes(networks, members, 40, seed=1)
    taken = members.where(np.isin(np.arange(len(members)), [members.row(one) for one in probes]))
    parts, every = (parts_of(networks, those, slice(None)) for those in (taken, members))
    assert ((parts > 0).any(axis=0) == (every > 0).any(axis=0)).all()  # each kind of layer is among them
    assert taken.macs.min() < np.quantile(members.macs, 0.05) < np.quantile(members.macs, 0.95) < taken.macs.max()


def invented_ms(name: str) -> float:
    """Latency on an invented device: a constant, and so much for each channel."""
    return 0.5 + 0.1 * sum(WIDTHS[option] for option in Architecture.parse(name).choices)


@pytest.fixture(scope="module")
def probes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("latency") / "probes"
    assert cli.main(["latency", "export-probes", f"--space={SPACE}", "--classes=3", "--resolution=16", "--count=10",
                     f"--out={folder}", "-q"]) == 0  # fmt: skip
    return folder


@pytest.fixture(scope="module")
def table(probes: Path) -> Path:
    """What another device has measured, as imported: the script ran, but its clock says what was invented."""
    bare = {"PATH": os.environ["PATH"]}
    run = subprocess.run([sys.executable, "-I", "time_probes.py", "--device", "a phone"], cwd=probes, env=bare,
                         capture_output=True, text=True, timeout=120)  # fmt: skip
    assert run.returncode == 0, run.stderr
    assert "wrote latencies.json: 10 networks on a phone" in run.stdout
    path = probes / "latencies.json"
    found = json.loads(path.read_text())
    assert len(found["rounds"]) == 10
    assert all(found["milliseconds"][name] == min(rounds) > 0 for name, rounds in found["rounds"].items())
    found["milliseconds"] = {name: invented_ms(name) for name in found["milliseconds"]}
    path.write_text(json.dumps(found))
    out = probes.parent / "phone.json"
    assert cli.main(["latency", "import", str(probes), f"--out={out}", "-q"]) == 0
    return out


def test_the_script_needs_nothing_of_ours(probes: Path, table: Path) -> None:
    script = (probes / "time_probes.py").read_text()
    assert "engine" not in script
    assert "torch" not in script
    assert sum(path.stat().st_size for path in probes.glob("*.onnx.gz")) < 10 * 20_000


def test_an_import_says_how_well_others_are_predicted(
    probes: Path, table: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["latency", "import", str(probes / "latencies.json"), f"--out={table}"]) == 0
    out, err = capsys.readouterr()
    found = json.loads(out)
    assert (found["device"], found["networks"], found["batch"]) == ("a phone", 10, 1)
    assert found["median_error"] < 0.2  # of ten networks, timed while other tests run
    assert found["rank_correlation"] > 0.6
    assert "networks left out are predicted with a median error of" in err
    stored = read_table(table)
    predicted = looked_up(stored.built_space(), stored, [Architecture((3, 3, 2)), Architecture((1, 0, 2))])
    for architecture, (milliseconds, measured) in predicted.items():
        assert milliseconds == pytest.approx(invented_ms(str(architecture)), rel=0.1)
        assert measured == (str(architecture) in stored.milliseconds)


def config_of(table: Path, data: Path) -> SearchConfig:
    return SearchConfig(
        space=SPACE,
        data=str(data),
        low=Fidelity("low", Fraction(1, 2), 1),
        high=Fidelity("high", epochs=1),
        latency=str(table),
        max_latency_ms=2.5,
        data_backend="resident",
    )


def test_a_search_trusts_another_device(table: Path, tiny_npz: Path, tmp_path: Path) -> None:
    """It asks only for networks that are fast there, says so of its winner, and resumes without the file."""
    config = config_of(table, tiny_npz)
    copy = tmp_path / "phone.json"
    copy.write_text(table.read_text())
    settings = RunSettings(
        replace(config, latency=str(copy)), Budget(4, 2, final_training="never"), Resources(device="cpu", workers=1)
    )
    with Display("none") as display:
        result = search(settings, tmp_path / "run", display)
    winner = result["winner"]
    assert winner["latency_source"] in ("measured", "predicted")
    assert winner["latency_ms"] == pytest.approx(invented_ms(winner["architecture"]), rel=0.1)
    assert winner["latency_ms"] <= 2.5
    answers = list(read_journal(tmp_path / "run" / "journal.jsonl").answers.values())
    assert all(invented_ms(str(e.trial.architecture)) < 2.6 for e in answers)
    assert not any("latency_ms" in e.costs for e in answers)  # nothing was timed here
    listed = rows(open_run(str(tmp_path / "run")), answers)
    assert all(row["latency_ms"] == pytest.approx(invented_ms(row["architecture"]), rel=0.1) for row in listed)
    copy.write_text(json.dumps(json.loads(copy.read_text()) | {"milliseconds": {}}))  # no longer what it was
    with Display("none") as display:
        again = search(replace(settings, budget=Budget(6, 2, final_training="never")), tmp_path / "run", display)
    assert again["winner"]["latency_ms"] <= 2.5


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"resolution": 32}, "resolution: 32 there, 16 here.*export-probes --space .* --resolution 16 --batch 1"),
        ({"classes": 10}, "classes: 10 there, 3 here"),
        ({"width": 0.5}, "width: 0.5 there, 1.0 here"),
        ({"batch": 8}, "batch size: 8 there, 1 here"),
        ({"space": "nasbench201"}, "space: nasbench201 there, faulty here"),
        ({"milliseconds": {"0-0-0": 1.0}}, "has 1 networks; it takes at least 10"),
        ({"milliseconds": {"0-0-0": -1.0}}, "a latency is not positive"),
        ("{", "holds no latencies .*give the latencies.json that time_probes.py wrote"),
        ("[]", "holds no latencies"),
    ],
    ids=["resolution", "classes", "width", "batch", "space", "few", "negative", "not JSON", "no table"],
)
def test_a_file_of_other_networks_is_refused(
    change: dict[str, Any] | str, message: str, table: Path, tiny_npz: Path, tmp_path: Path
) -> None:
    path = tmp_path / "other.json"
    path.write_text(change if isinstance(change, str) else json.dumps(json.loads(table.read_text()) | change))
    with pytest.raises(UsageError, match=f"(?s){message}"):
        check_table(read_table(path), path, BuiltSpace(SPACE, 3, 1.0, 16), 1)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["import", "--out=x.json"], "name the folder of the probes"),
        (["import", "nowhere", "--out=x.json"], "no file nowhere.* run time_probes.py on the device first"),
        (["export-probes", "--count=5", "--out=new"], "predictions take at least 10 networks"),
        (["export-probes", "--out=tests"], "tests is not an empty folder"),
        (["export-probes", "--out=new", "--batch=0"], "--batch is 0; it must be at least 1"),
        (["export-probes", "probes", "--out=new"], "leave out probes"),
    ],
)
def test_wrong_uses(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["latency", *arguments]) == 2
    assert re.search(message, capsys.readouterr().err)


def test_a_search_refuses_a_runtime_that_does_not_exist(
    tiny_npz: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["search", f"--data={tiny_npz}", f"--run-dir={tmp_path / 'run'}", "--max-latency-ms=5", "-q"]
    assert cli.main([*arguments, "--latency=tflite"]) == 2
    said = capsys.readouterr().err
    assert "--latency tflite: no such file; give torch, torch.compile, onnxruntime, or a FILE" in said


def test_a_worker_times_what_onnxruntime_would_run(tiny_npz: Path, tmp_path: Path) -> None:
    config = replace(config_of(Path("onnxruntime"), tiny_npz), latency_batch=64)
    two = (Architecture((0, 0, 0)), Architecture((3, 3, 3)))
    found = run_latency(task_to_json(LatencyTask(WorkerSettings(config, tmp_path, "cpu"), two)))
    fast, slow = found["milliseconds"]
    assert 0 < fast < slow
    assert found["runtime"].startswith("onnxruntime 1.")
    assert found["device"]
    assert found["noise"] >= 0
