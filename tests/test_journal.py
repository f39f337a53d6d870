from __future__ import annotations

import resource
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from engine.search.journal import Journal, read_journal
from engine.trial import Architecture, EngineError, Evaluation, Fidelity, Trial, UsageError

LOW = Fidelity("low")
TRIALS = [Trial(number, Architecture((number,)), LOW) for number in range(3)]
ANSWERS = [Evaluation(trial, "ok", 0.1 * trial.number) for trial in TRIALS]


def write(path: Path) -> bytes:
    with Journal(path) as journal:
        journal.ask(TRIALS[:2])
        journal.answer(ANSWERS[1])
        journal.ask(TRIALS[2:])
        journal.answer(ANSWERS[0])
    return path.read_bytes()


def test_trials_and_evaluations_are_read_back(tmp_path: Path) -> None:
    write(tmp_path / "j")
    record = read_journal(tmp_path / "j")
    assert record.asked == TRIALS
    assert record.answers == {0: ANSWERS[0], 1: ANSWERS[1]}


def test_a_missing_journal_is_empty(tmp_path: Path) -> None:
    assert read_journal(tmp_path / "j").asked == []


@given(st.data())
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=50)
def test_after_a_cut_anywhere_the_whole_lines_count_and_writing_resumes(tmp_path: Path, data: st.DataObject) -> None:
    """A crash may leave any prefix of the file."""
    path = tmp_path / "j"
    path.unlink(missing_ok=True)
    content = write(path)
    cut = data.draw(st.integers(0, len(content)))
    path.write_bytes(content[:cut])
    before = read_journal(path)
    assert before.asked == TRIALS[: len(before.asked)]
    with Journal(path) as journal:
        journal.ask(TRIALS[len(before.asked) :])
    after = read_journal(path)
    assert after.asked == TRIALS
    assert after.answers == before.answers


def test_a_broken_line_in_the_middle_is_named(tmp_path: Path) -> None:
    lines = write(tmp_path / "j").splitlines(keepends=True)
    (tmp_path / "j").write_bytes(b"".join([*lines[:2], b'{"asked": {"num\n', *lines[3:]]))
    with pytest.raises(EngineError, match="line 3: not a line that this program wrote"):
        read_journal(tmp_path / "j")


def test_another_format_is_refused(tmp_path: Path) -> None:
    (tmp_path / "j").write_text('{"journal":99}\n')
    with pytest.raises(EngineError, match="format 99"):
        read_journal(tmp_path / "j")


def test_a_second_evaluation_of_a_trial_is_ignored(tmp_path: Path) -> None:
    with Journal(tmp_path / "j") as journal:
        journal.ask(TRIALS[:1])
        journal.answer(ANSWERS[0])
        journal.answer(Evaluation(TRIALS[0], "lost"))
    assert read_journal(tmp_path / "j").answers == {0: ANSWERS[0]}


def test_a_journal_has_one_writer(tmp_path: Path) -> None:
    with Journal(tmp_path / "j"), pytest.raises(UsageError, match="another search is running"):
        Journal(tmp_path / "j").__enter__()
    write(tmp_path / "j")  # the lock is free again


def test_a_line_that_does_not_fit_on_the_disk_is_removed(tmp_path: Path) -> None:
    """A limit on file size stands in for a full disk: part of the line is written, the rest is refused."""
    path = tmp_path / "j"
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    with Journal(path) as journal:
        journal.ask(TRIALS[:1])
        before = path.read_bytes()
        resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) + 20, limits[1]))
        try:
            with pytest.raises(OSError):  # noqa: PT011 - the text depends on the system
                journal.answer(ANSWERS[0])
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        assert path.read_bytes() == before
        journal.answer(ANSWERS[0])
    assert read_journal(path).answers == {0: ANSWERS[0]}
