"""The Python interface: the same settings, messages and run folders as the command line."""

from __future__ import annotations

import csv
import dataclasses
import inspect
import io
import json
import re
import signal
import subprocess
import sys
import time
import typing
from pathlib import Path
from typing import Any

import pytest

import cli
import mfkd
from engine.config import Budget, Resources, SearchConfig
from engine.run_folder import RunFolder
from engine.search.journal import read_journal

ROOT = Path(__file__).resolve().parent.parent
TINY: dict[str, Any] = {
    "data": "glyphs:144",
    "space": "nasbench201:channels=4,cells=1",
    "resolution": 16,
    "data_backend": "resident",
    "batch_size": 16,
    "low": "none@1/2x1",
    "high": mfkd.Fidelity("high", epochs=1),
    "max_low": 4,
    "max_high": 2,
    "device": "cpu",
    "workers": 1,
}
# Settings that a command line gives as text and Python as objects.
RICHER = {"data", "teacher", "low", "high", "only", "initial_weights", "fidelity_study", "gpus", "students_per_gpu"}
RICHER |= {"time_limit", "teacher_weights", "final", "latency"}
CLASSES = (SearchConfig, Budget, Resources)


def test_importing_it_does_not_import_torch() -> None:
    code = "import sys, mfkd; assert not {'torch', 'xgboost', 'nvidia.dali', 'parsl'} & sys.modules.keys()"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)


def test_settings_have_the_names_and_types_of_the_flags() -> None:
    typed = typing.get_type_hints(mfkd.Settings)
    fields: dict[str, Any] = {}
    for kind in CLASSES:
        fields |= typing.get_type_hints(kind)
    assert typed.keys() == fields.keys() | {"config"}
    assert {name: typed[name] for name in fields.keys() - RICHER} == {
        name: kind for name, kind in fields.items() if name not in RICHER
    }


@pytest.mark.parametrize("function", [mfkd.search, mfkd.fidelity_study])
def test_the_signature_shows_every_setting_with_its_default(function: Any) -> None:
    shown = inspect.signature(function).parameters
    for kind in CLASSES:
        for item in dataclasses.fields(kind):
            assert shown[item.name].default == item.default


def test_replay_has_the_parameters_of_the_command() -> None:
    from engine.search.replay.simulate import Replay

    shown = inspect.signature(mfkd.replay).parameters
    for item in dataclasses.fields(Replay):
        if item.name != "table":
            assert shown[item.name].default == item.default, item.name


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> mfkd.Run:
    return mfkd.search(run_dir=tmp_path_factory.mktemp("runs") / "tiny", **TINY)


def test_a_search_returns_its_winner_its_front_and_its_trials(finished: mfkd.Run) -> None:
    assert finished.finished
    winner = finished.winner
    assert winner is not None
    stored = json.loads(RunFolder(finished.path).result.read_text())["winner"]
    assert (str(winner.architecture), winner.test_accuracy) == (stored["architecture"], stored["test_accuracy"])
    assert [e.trial.number for e in finished.trials] == list(range(len(finished.trials)))
    full = {e.trial.architecture: e.accuracy for e in finished.trials if e.trial.fidelity.name == "high"}
    assert max(finished.front, key=lambda one: one.valid_accuracy).valid_accuracy == max(full.values())
    assert [one.macs for one in finished.front] == sorted(one.macs for one in finished.front)
    assert set(finished.tau) == {"low_vs_high", "macs_vs_high"}
    assert isinstance(finished.trials[:2], mfkd.Trials)


def test_trials_become_csv(finished: mfkd.Run, tmp_path: Path) -> None:
    text = finished.trials.to_csv(tmp_path / "trials.csv")
    assert (tmp_path / "trials.csv").read_text() == text
    rows = list(csv.DictReader(io.StringIO(text)))
    assert [row["architecture"] for row in rows] == [str(e.trial.architecture) for e in finished.trials]


def test_the_same_call_resumes_and_other_settings_are_refused(finished: mfkd.Run) -> None:
    before = read_journal(RunFolder(finished.path).journal)
    again = mfkd.search(run_dir=finished.path, **TINY)
    assert read_journal(RunFolder(finished.path).journal) == before
    assert again.winner == finished.winner
    with pytest.raises(mfkd.Error, match=r"holds a search with other settings \(lr: 0.1 there, 0.2 here\)"):
        mfkd.search(run_dir=finished.path, **TINY, lr=0.2)


def test_a_run_is_opened_reported_and_exported(finished: mfkd.Run, tmp_path: Path) -> None:
    opened = mfkd.open_run(finished.path)
    assert opened.winner == finished.winner
    page = opened.report(tmp_path / "report")
    assert str(finished.path.name) in page.read_text()
    other = next(one.architecture for one in opened.front)
    folder = opened.export(other, tmp_path / "export", device="cpu")
    assert {"weights.safetensors", "model.py", "README.md"} <= {path.name for path in folder.iterdir()}


def test_the_front_is_exported_with_the_networks_that_it_lists(finished: mfkd.Run, tmp_path: Path) -> None:
    folder = finished.export_front(tmp_path / "front", device="cpu")
    names = [str(member.architecture) for member in finished.front]
    assert {path.name for path in folder.iterdir()} == {*names, "front.csv", "front.md"}
    assert all({"model.onnx", "model.py", "README.md"} <= {p.name for p in (folder / name).iterdir()} for name in names)
    before = {path: path.stat().st_mtime_ns for path in folder.glob("*/*")}
    assert finished.export_front(folder, device="cpu") == folder
    assert {path: path.stat().st_mtime_ns for path in folder.glob("*/*")} == before, "what is there is not made again"


@pytest.mark.parametrize(
    "wrong",
    [
        {"max_mac": 3},
        {"batch_size": "x"},
        {"lr": -1},
        {"data": "nowhere"},
        {"method": "magic"},
        {"low": "kd@2x1"},
        {"space": "nasbench202"},
        {"compile": "perhaps"},
    ],
    ids=lambda wrong: next(iter(wrong)),
)
def test_wrong_settings_raise_one_exception_with_the_message_of_the_command(
    wrong: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(mfkd.Error) as raised:
        mfkd.search(run_dir=tmp_path / "run", **wrong)
    assert capsys.readouterr() == ("", ""), "quiet by default"
    if "low" in wrong:  # the short form of a fidelity is Python's, and --lows'
        assert "fraction is 2; it must be" in str(raised.value)
        return
    flags = [f"--{name.replace('_', '-')}={value}" for name, value in wrong.items()]
    assert cli.main(["search", f"--run-dir={tmp_path / 'run'}", *flags]) in (2, 3)
    assert str(raised.value) in capsys.readouterr().err


def test_the_short_form_of_a_fidelity_sets_its_flags_and_weights() -> None:
    from engine.commands import search

    settings, run_dir = mfkd._parse(
        search.parser(),
        "here",
        {"low": "kd@1/3x5:width=0.5,kd_temperature=2", "only": [mfkd.Architecture((1, 2)), "3-4"], "gpus": 8},
    )
    low = settings.config.low
    assert (low.name, str(low.fraction), low.epochs, low.width, low.kd_loss) == ("low", "1/3", 5, 0.5, "kd")
    assert settings.config.kd_temperature == 2
    assert settings.config.only == "1-2,3-4"
    assert settings.resources.gpus == "8"
    assert run_dir == Path("here")
    auto, _ = mfkd._parse(search.parser(), None, {"low": "auto", "kd_temperature": 3.0})
    assert auto.config.fidelity_study == "auto"


def test_an_interrupt_drains_and_the_same_call_resumes(tmp_path: Path) -> None:
    """As a notebook's stop button does: SIGINT to the process whose main thread is inside `search`."""
    settings = {**TINY, "high": "none@1x1", "max_low": 40, "max_high": 2}
    script = tmp_path / "script.py"
    script.write_text(
        f"import mfkd\n"
        f"try:\n"
        f"    run = mfkd.search(run_dir={str(tmp_path / 'run')!r}, **{settings!r})\n"
        f"    print('finished', len(run.trials))\n"
        f"except mfkd.Drained as drained:\n"
        f"    print('drained:', drained)\n"
    )
    first = subprocess.Popen([sys.executable, str(script)], stdout=subprocess.PIPE, text=True, cwd=ROOT)
    journal = RunFolder(tmp_path / "run").journal
    deadline = time.monotonic() + 120
    while not (journal.exists() and '"answered"' in journal.read_text()):
        assert first.poll() is None, "it ended before anything was measured"
        assert time.monotonic() < deadline
        time.sleep(0.05)
    first.send_signal(signal.SIGINT)
    out, _ = first.communicate(timeout=120)
    assert out.startswith("drained: interrupted by SIGINT"), out
    known = len(read_journal(journal).answers)
    second = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, cwd=ROOT, check=True)
    assert second.stdout == "finished 44\n", second.stderr
    assert known < 42


def test_a_study_recommends_a_fidelity_to_search_with(tmp_path: Path) -> None:
    shared = {name: value for name, value in TINY.items() if name not in ("low", "max_low", "max_high")}
    study = mfkd.fidelity_study(
        lows=["none@1/2x1", mfkd.Fidelity.parse("none@1/2x2")], architectures=4, run_dir=tmp_path / "study", **shared
    )
    assert study.complete
    assert study.recommended.name in {row["name"] for row in study.fidelities}
    run = mfkd.search(
        config=study.run.path / "recommended.yaml", run_dir=tmp_path / "run", max_low=4, max_high=4, **{
            name: TINY[name] for name in ("device", "workers")
        }
    )
    assert run.finished
    assert len(run.trials) >= 8, "it starts with the evaluations of the study"


def test_replay_gives_the_figures_of_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    table = ROOT / "tests" / "data" / "synthetic_table.csv"
    found = mfkd.replay(table, ["random", "macs"], seeds=2, gpu_hours=2, at=[1, 2], processes=1)
    command = f"replay --table {table} --methods random,macs --seeds 2 --gpu-hours 2 --at 1,2 --processes 1"
    assert cli.main(command.split()) == 0
    printed = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert dataclasses.asdict(found) == printed


def test_the_page_describes_every_public_name() -> None:
    """docs/api.md has a heading for each, with the parameters and attributes that it really has."""
    page = (ROOT / "docs" / "api.md").read_text()
    headings = re.findall(r"^### `mfkd\.(\w+)(?:\(([^`]*)\))?`", page, re.M)
    described = {name for name, _ in headings}
    assert described == set(mfkd.__all__) - {"__version__"}
    for name, arguments in headings:
        for argument in re.findall(r"(\w+)=", arguments):
            known = inspect.signature(getattr(mfkd, name)).parameters
            assert argument in known, f"{name} has no parameter {argument}"
    for name in described:
        section = page.split(f"### `mfkd.{name}")[1].split("\n### ")[0]
        for attribute in re.findall(r"^- `\.(\w+)", section, re.M):
            thing = getattr(mfkd, name)
            fields = {item.name for item in dataclasses.fields(thing)} if dataclasses.is_dataclass(thing) else set()
            assert attribute in fields or hasattr(thing, attribute), f"{name} has no attribute {attribute}"
