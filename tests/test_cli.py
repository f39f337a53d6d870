"""The command line as a user meets it: what it prints, where, and its exit codes."""

from __future__ import annotations

import importlib
import importlib.metadata
import json
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest
import yaml

import cli
import engine
from engine.commands.flags import Parser
from engine.config import Budget, SearchConfig, flatten
from engine.search.journal import read_journal
from engine.search.methods.propose import METHODS
from engine.trial import UsageError
from tests import searches

ROOT = Path(__file__).resolve().parent.parent
SMALL = [
    "--space=nasbench201:channels=4,cells=1",
    "--batch-size=16",
    "--teacher-epochs=1",
    "--low.fraction=1/2",
    "--low.epochs=1",
    "--high.epochs=2",
    "--max-low=5",
    "--max-high=2",
    "--device=cpu",
    "--progress=lines",
]


def small(data: Path, run_dir: Path, workers: int = 1) -> list[str]:
    return ["search", *SMALL, f"--data={data}", f"--run-dir={run_dir}", f"--workers={workers}"]


def test_a_gpu_that_torch_cannot_use_is_reported_before_any_training(
    tiny_npz: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "GPU-missing")
    arguments = [word for word in small(tiny_npz, tmp_path) if "device" not in word and "workers" not in word]
    assert cli.main([*arguments, "--gpus=1"]) == 3
    assert "torch cannot use it" in capsys.readouterr().err


def test_a_stopped_search_says_so_and_leaves_no_processes(
    tiny_npz: Path, tmp_path: Path, mark: Callable[[], list[psutil.Process]]
) -> None:
    more = ["--max-low=50", "--low.epochs=20", "--grace-s=5"]
    command = [sys.executable, "cli.py", *small(tiny_npz, tmp_path, workers=2), *more]
    process = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True)
    wait_for(lambda: len(read_journal(tmp_path / "journal.jsonl").answers) >= 1 or process.poll() is not None)
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=300)
    assert process.returncode == 75, err
    assert "Traceback" not in err
    wait_for(lambda: not mark())
    assert len(read_journal(tmp_path / "journal.jsonl").answers) >= 1


def wait_for(condition: Callable[[], bool], seconds: float = 300) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.05)


def parser_of(command: str) -> Parser:
    parser: Parser = importlib.import_module(f"engine.commands.{command.replace('-', '_')}").parser()
    return parser


def help_text(command: str, flag: str, capsys: pytest.CaptureFixture[str]) -> str:
    with pytest.raises(SystemExit) as stop:
        cli.main([command, flag])
    assert stop.value.code == 0
    return capsys.readouterr().out


@pytest.mark.parametrize("command", cli.COMMANDS)
def test_help_is_a_screen_or_two_of_everyday_flags(
    command: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """With examples, in 80 columns; the command's other flags are left to --help-all."""
    monkeypatch.setenv("COLUMNS", "80")
    text, parser = help_text(command, "--help", capsys), parser_of(command)
    assert max(map(len, text.splitlines())) <= 80
    shown = set(re.findall(r"^  (?:-\w[^-]*, )?(--[\w.-]+)", text, re.MULTILINE))
    assert len(shown) <= 26
    assert set(parser.everyday) <= {option for action in parser._actions for option in action.option_strings}
    if parser.everyday:
        assert shown == parser.everyday
        assert len(re.findall(rf"^  \S+ {command} .*", text, re.MULTILINE)) >= 2, "no examples"
        assert ";" not in text.partition("\noptions:")[2], "details are for --help-all"


@pytest.mark.parametrize("command", cli.COMMANDS)
def test_help_all_explains_every_flag_and_gives_its_default(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    """A flag whose entry shows no default is required, a switch, or a text that is empty by default."""
    parser = parser_of(command)
    text = help_text(command, "--help-all" if parser.everyday else "--help", capsys)
    entries = re.split(r"\n  (?=\S)", text)
    for action in parser._actions:
        assert action.help, action.dest
        if not action.option_strings or action.nargs == 0 or action.dest in ("help", "config"):
            continue
        entry = next(" ".join(e.split()) for e in entries if e.split(" ", 1)[0].rstrip(",") in action.option_strings)
        told = "(default: " in entry or "(required)" in entry or action.default in (None, "")
        assert told, f"{command}: {entry}"


def test_the_installed_program_is_the_same(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    (entry,) = importlib.metadata.entry_points(group="console_scripts", name="mfkd")
    assert entry.load() is cli.main
    monkeypatch.setattr(sys, "argv", ["/usr/bin/mfkd", "--version"])
    with pytest.raises(SystemExit):
        cli.main()
    assert capsys.readouterr().out == f"mfkd {engine.__version__}\n"
    with pytest.raises(SystemExit):
        cli.main(["--help"])
    out = capsys.readouterr().out
    assert "usage: mfkd COMMAND" in out
    assert all(command in out for command in cli.COMMANDS)


def test_a_closed_pipe_is_not_an_error(finished_run: Path) -> None:
    command = f"{sys.executable} cli.py trials {finished_run} --csv | true; exit ${{PIPESTATUS[0]}}"
    done = subprocess.run(["bash", "-c", command], cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")


def test_a_search_continues_when_nobody_reads_its_progress(tmp_path: Path) -> None:
    """As with `2>&1 | head`, or when the terminal has gone."""
    process = searches.start(tmp_path, "--progress=lines")
    assert process.stderr
    assert "run folder" in process.stderr.readline()
    process.stderr.close()
    process.stderr = None
    out, _ = process.communicate(timeout=300)
    assert process.returncode == 0
    assert json.loads(out)["status"] == "finished"


def test_quiet_shows_only_errors_and_verbose_their_tracebacks(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["search", "-q", "--data=nowhere"]) == 3
    (line,) = capsys.readouterr().err.splitlines()
    assert "no such file or folder" in line
    assert cli.main(["search", "-v", "--data=nowhere"]) == 3
    assert "Traceback" in capsys.readouterr().err


def test_config_shows_where_each_value_came_from(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The default, the last file that has it, or the command line. The YAML it writes gives the same search."""
    (tmp_path / "one.yaml").write_text("max_low: 7\nlow:\n  fraction: 1/27\n  epochs: 3\nmax_macs: 6e7\n")
    (tmp_path / "two.yaml").write_text("max_low: 8\ndata: glyphs\n")
    words = ["-c", str(tmp_path / "one.yaml"), "-c", str(tmp_path / "two.yaml"), "--low.epochs=5"]
    assert cli.main(["config", *words, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    origin = {key: Path(entry["from"]).name for key, entry in found.items()}
    assert (origin["max_low"], origin["data"], origin["low.fraction"]) == ("two.yaml", "two.yaml", "one.yaml")
    assert (origin["low.epochs"], origin["lr"]) == ("command line", "default")
    value = {key: entry["value"] for key, entry in found.items()}
    assert (value["low.epochs"], value["low.fraction"], value["max_params"]) == (5, "1/27", None)
    assert cli.main(["config", *words, f"--yaml={tmp_path / 'all.yaml'}"]) == 0
    again, first = (cli.parse(["search", *given])[1] for given in (["-c", str(tmp_path / "all.yaml")], words))
    assert {**vars(again), "config": None} == {**vars(first), "config": None}


def test_a_search_prints_one_object_and_the_same_command_finds_it_finished(
    tiny_npz: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(small(tiny_npz, tmp_path)) == 0
    out, err = capsys.readouterr()
    (line,) = out.splitlines()
    result = json.loads(line)
    assert set(result) >= {"run_dir", "status", "winner", "evaluations", "tau", "seconds"}
    assert set(result["winner"]) >= {"architecture", "valid_accuracy", "test_accuracy", "macs", "params"}
    assert result["evaluations"]["high"] == 2
    assert "winner" in err
    kept = {"config.yaml", "run.json", "journal.jsonl", "result.json", "teacher", "checkpoints"}
    assert {path.name for path in tmp_path.iterdir()} >= kept
    before = (tmp_path / "journal.jsonl").read_bytes()
    assert cli.main(small(tiny_npz, tmp_path)) == 0
    assert json.loads(capsys.readouterr().out)["winner"] == result["winner"]
    assert (tmp_path / "journal.jsonl").read_bytes() == before


def test_other_settings_in_the_same_folder_are_refused(
    tiny_npz: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = [*small(tiny_npz, tmp_path), "--max-low=2", "--max-high=1"]
    assert cli.main(arguments) == 0
    assert cli.main([*arguments, "--lr=0.5"]) == 2
    assert "lr: 0.1 there, 0.5 here" in capsys.readouterr().err


def test_flags_override_those_of_a_file(tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_text("max_low: 7\nmax_high: 3\nlow:\n  fraction: 1/27\n  kd_loss: nst\n")
    values = cli.parse(["search", "-c", str(tmp_path / "c.yaml"), "--max-high=5"])[1]
    assert (values.max_low, values.max_high, str(values.low.fraction), values.low.kd_loss) == (7, 5, "1/27", "nst")


def test_text_in_a_file_of_flags_needs_no_quotes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """YAML reads these as numbers (the time to base 60), the name as a date, and null as no text."""
    file = tmp_path / "c.yaml"
    text = "gpus: 8\ntime: 24:00:00\nteacher_cache: 0\nstudents_per_gpu: 4\ntime_limit: 3600\nrun_dir: null\n"
    file.write_text(f"{text}name: 2026-01-31\nmax_low: 7\nlr: 1e-3\nlow: {{fraction: 1/27}}\n")
    values = cli.parse(["search", "-c", str(file)])[1]
    assert (values.gpus, values.time, values.teacher_cache, values.students_per_gpu) == ("8", "24:00:00", "0", "4")
    assert (values.time_limit, values.name, values.run_dir) == ("3600", "2026-01-31", None)
    assert (values.max_low, values.lr, str(values.low.fraction)) == (7, 0.001, "1/27")
    assert cli.main(["config", "-c", str(file), "--device=cuda", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["gpus"] == {"value": "8", "from": str(file)}
    file.write_text("gpus: [0, 2]\n")
    with pytest.raises(UsageError, match=r"--gpus: Expected a text. Got value: \[0, 2\]"):
        cli.parse(["search", "-c", str(file)])


def test_a_search_without_settings_is_the_demo() -> None:
    demo = cli.parse(["search", "--workers=2"])[1]
    assert (demo.space, demo.data) == ("pretrained:timm:tf_efficientnet_lite0", "caltech21")
    assert cli.parse(["search", "--data=cifar10"])[1].max_low == Budget().max_low


@pytest.mark.parametrize("path", sorted((ROOT / "configs").glob("*.yaml")), ids=lambda path: path.name)
def test_every_shipped_configuration_works(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Its flags exist, work together and name a space and a method; its comment says which machine it is for."""
    assert cli.main(["config", "-c", str(path), "--json"]) == 0
    origins = {key: entry["from"] for key, entry in json.loads(capsys.readouterr().out).items()}
    for key, _ in flatten(yaml.safe_load(path.read_text())):
        assert origins[key] == str(path), key
    header = path.read_text().partition("\nspace:")[0]
    assert re.search("GPU|CPU", header)
    assert re.search("not measured|neither its running time|has the running time", header)


def test_low_auto_is_short_for_a_fidelity_study() -> None:
    for words in (["--low=auto"], ["--low", "auto"], ["--fidelity-study=auto"]):
        assert cli.parse(["search", "--data=glyphs", *words])[1].fidelity_study == "auto"


def test_help_separates_choices_that_contain_commas(capsys: pytest.CaptureFixture[str]) -> None:
    expected = "--objectives {accuracy | accuracy,macs | accuracy,params | accuracy,latency}"
    assert expected in help_text("search", "--help", capsys)


def test_the_help_names_every_method() -> None:
    assert set(METHODS) <= set(re.findall(r"[\w-]+", SearchConfig.__dataclass_fields__["method"].metadata["help"]))


def test_a_search_that_was_killed_and_resumed_ends_the_same(tiny_npz: Path, tmp_path: Path) -> None:
    """kill -9 in the middle, compared with an uninterrupted run."""
    whole = finish(small(tiny_npz, tmp_path / "whole"))
    command = small(tiny_npz, tmp_path / "killed", workers=1)
    process = subprocess.Popen([sys.executable, "cli.py", *command], cwd=ROOT, stderr=subprocess.DEVNULL)
    path = tmp_path / "killed" / "journal.jsonl"
    wait_for(lambda: len(read_journal(path).answers) >= 3 or process.poll() is not None)
    process.kill()
    process.wait()
    answered = read_journal(path).answers
    assert len(answered) >= 3
    again = finish(command)
    assert {**again["winner"], "weights": ""} == {**whole["winner"], "weights": ""}  # in different folders
    record = read_journal(path)
    assert all(record.answers[number] == answer for number, answer in answered.items())
    assert len(path.read_text().splitlines()) == 1 + len(record.asked) + len(record.answers)  # nothing twice


def finish(command: list[str]) -> dict:  # type: ignore[type-arg]
    done = subprocess.run([sys.executable, "cli.py", *command], cwd=ROOT, check=True, capture_output=True, text=True)
    return json.loads(done.stdout.splitlines()[-1])
