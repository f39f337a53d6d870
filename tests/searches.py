"""Searches that take seconds, as separate processes, for tests that signal and kill them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil

from engine.fleet.supervisor import ROOT
from engine.run_folder import RunFolder
from engine.search.journal import Record, read_journal

QUICK = [
    "--space=tests/faulty_space.py:SPACE",
    "--data=glyphs:144",
    "--data-backend=resident",
    "--batch-size=16",
    "--low.kd-loss=none",
    "--low.epochs=1",
    "--low.fraction=1/2",
    "--high.epochs=2",
    "--max-low=8",
    "--max-high=3",
    "--device=cpu",
    "--workers=1",
    "--progress=none",
]


def start(run_dir: Path, *more: str, **environment: str) -> subprocess.Popen[str]:
    """Starts `cli.py search` on the space of tests/faulty_space.py; its environment names the run, see `processes`."""
    return launch(run_dir, *QUICK, *more, **environment)


def launch(run_dir: Path, *arguments: str, **environment: str) -> subprocess.Popen[str]:
    """Starts `cli.py search`; its environment names the run, see `processes`."""
    command = [sys.executable, "cli.py", "search", f"--run-dir={run_dir}", *arguments]
    told = {**os.environ, "RUN_OF_A_TEST": str(run_dir), **environment}
    return subprocess.Popen(
        command, cwd=ROOT, env=told, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    )


def finish(process: subprocess.Popen[str], code: int = 0, seconds: float = 300) -> tuple[dict[str, Any], str]:
    """Waits for a search that must end with `code`; returns its JSON line ({} for none) and stderr."""
    out, err = process.communicate(timeout=seconds)
    assert process.returncode == code, err
    assert "Traceback" not in err, err
    return (json.loads(out.splitlines()[-1]) if out else {}), err


def search(run_dir: Path, *more: str, code: int = 0, **environment: str) -> tuple[dict[str, Any], str]:
    return finish(start(run_dir, *more, **environment), code)


def read(run_dir: Path) -> Record:
    return read_journal(RunFolder(run_dir).journal)


def processes(run_dir: Path, word: str = "") -> list[psutil.Process]:
    """The living processes of a run, of any parent, with `word` in their command line."""
    found = []
    for process in psutil.process_iter():
        try:
            mine = process.environ().get("RUN_OF_A_TEST") == str(run_dir)
            if mine and process.status() != psutil.STATUS_ZOMBIE and word in " ".join(process.cmdline()):
                found.append(process)
        except psutil.Error:
            continue  # gone in the meantime, or another user's
    return found


def until(condition: Callable[[], bool], seconds: float = 120) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "the condition was not met in time"
        time.sleep(0.05)


def measured(run_dir: Path) -> list[tuple[Any, ...]]:
    """What a journal holds, without what may differ between two runs: times, places and durations."""
    record = read(run_dir)
    numbers = [trial.number for trial in record.asked]
    assert numbers == list(range(len(numbers)))
    lines = RunFolder(run_dir).journal.read_text().splitlines()
    assert len(lines) == 1 + len(record.asked) + len(record.answers)  # nothing twice
    answers = [record.answers[number] for number in sorted(record.answers)]
    return [*record.asked, *((e.trial, e.status, e.accuracy, e.macs) for e in answers)]


def winner(run_dir: Path) -> tuple[Any, ...]:
    found = json.loads(RunFolder(run_dir).result.read_text())["winner"]
    return found["architecture"], found["valid_accuracy"], found["test_accuracy"]
