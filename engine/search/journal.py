"""The journal, the only record that a run depends on: an append-only JSONL file, one writer, synced per line."""

from __future__ import annotations

import contextlib
import fcntl
import gc
import json
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from io import FileIO
from pathlib import Path
from typing import Any

from engine.search.line_file import LineFile
from engine.trial import (
    EnvironmentUnusable,
    Evaluation,
    Trial,
    UsageError,
    evaluation_from_json,
    evaluation_to_json,
    trial_from_json,
    trial_to_json,
)

SCHEMA = 1


@dataclass(frozen=True)
class Record:
    """The content of a journal: all trials asked, in order of their numbers, and their evaluations, by trial number in
    order of arrival.

    When `asked[i]` was asked, `known[i]` evaluations had arrived, and `seen[i]` of them were visible to the method
    (-1: unknown). `final_seconds` are those of evaluations that `searched` has left out.
    """

    asked: list[Trial]
    answers: dict[int, Evaluation]
    known: list[int]
    seen: list[int]
    final_seconds: float = 0.0

    @property
    def searched(self) -> Record:
        """The trials that decisions may depend on: not those that were trained on the validation images too."""
        keep = [place for place, trial in enumerate(self.asked) if not trial.fidelity.with_valid]
        answers = {number: e for number, e in self.answers.items() if not e.trial.fidelity.with_valid}
        return Record(
            [self.asked[place] for place in keep],
            answers,
            [self.known[place] for place in keep],
            [self.seen[place] for place in keep],
            sum(e.seconds for number, e in self.answers.items() if number not in answers),
        )


class Journal(LineFile):
    """Appends to a journal, and holds its lock from `__enter__` to `__exit__`.

    The first line is {"journal": SCHEMA}; the others are {"asked": trial, "seen": count} or {"answered": evaluation}.
    A broken line other than the last is an error: something other than this program wrote it.
    """

    def _begin(self, file: FileIO) -> None:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UsageError(
                f"another search is running in {self.path.parent}; wait for it, "
                "or choose another folder (--name, --run-dir or --out)"
            ) from None
        super()._begin(file)
        if file.seek(0, os.SEEK_END) == 0:
            self.append({"journal": SCHEMA})

    def ask(self, trials: Iterable[Trial], seen: int = -1) -> None:
        """Records trials before they are sent to a worker, with the number of evaluations that were visible to the
        method (-1: it was not asked)."""
        for trial in trials:
            self.append({"asked": trial_to_json(trial), "seen": seen})

    def answer(self, evaluation: Evaluation) -> None:
        """Records an evaluation."""
        self.append({"answered": evaluation_to_json(evaluation)})


_decode = json.JSONDecoder().raw_decode


def _entry(line: str) -> dict[str, Any]:
    """Decodes a line. `json.loads` would spend a third of its time on encodings and spaces that do not occur."""
    entry, end = _decode(line)
    if end != len(line) - 1 or not isinstance(entry, dict):
        raise ValueError("it is not one JSON object")
    return entry


@contextlib.contextmanager
def _no_collection() -> Iterator[None]:
    """Without garbage collection: it would take a quarter of the time, and millions of new objects are all in use."""
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


@_no_collection()
def read_journal(path: Path) -> Record:
    """The content of a journal. A second evaluation of a trial (from a worker believed lost) is ignored.

    Raises EnvironmentUnusable, naming the line, if the file cannot be understood.
    """
    asked: list[Trial] = []
    answers: dict[int, Evaluation] = {}
    known: list[int] = []
    seen: list[int] = []
    if not path.exists():
        return Record(asked, answers, known, seen)
    with open(path, "rb") as lines:
        for number, line in enumerate(lines, 1):
            if not line.endswith(b"\n"):
                break  # cut short by a crash, or being written
            try:
                entry = _entry(line.decode())
                if "asked" in entry:
                    asked.append(trial_from_json(entry["asked"]))
                    known.append(len(answers))
                    seen.append(entry.get("seen", -1))
                elif "answered" in entry:
                    evaluation = evaluation_from_json(entry["answered"])
                    answers.setdefault(evaluation.trial.number, evaluation)
                elif entry["journal"] != SCHEMA:
                    raise UsageError(
                        f"{path} has journal format {entry['journal']}, but this version reads {SCHEMA}; "
                        "use the version that wrote it, or another folder (--run-dir or --out)"
                    )
            except (ValueError, KeyError, TypeError) as error:
                raise EnvironmentUnusable(
                    f"{path}, line {number}: not a line that this program wrote ({error}); restore the file from a copy"
                ) from error
    return Record(asked, answers, known, seen)
