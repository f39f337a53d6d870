"""The virtual clock: what is decided depends on proposals, costs and answers, not on when the answers really come."""

from __future__ import annotations

import random
import threading
import time
from concurrent.futures import Future

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.clock import Timeline, drive
from engine.journal import History
from engine.trial import Architecture, Evaluation, Fidelity, Trial

LOW, HIGH = Fidelity("low"), Fidelity("high")
TOTAL = 14


def propose(history: History, free: int) -> list[Trial]:
    """Takes what it asks from the answers that it sees, and every third trial is a full one."""
    seen = sum(hash((e.trial.number, round(e.accuracy, 6))) for e in history.answered)
    rng = np.random.default_rng([seen % 2**32, history.asked, len(history.answered)])
    count = min(free, TOTAL - history.asked)
    return [
        Trial(history.asked + i, Architecture((int(rng.integers(100)),)), HIGH if (history.asked + i) % 3 == 2 else LOW)
        for i in range(count)
    ]


def answer(trial: Trial) -> Evaluation:
    return Evaluation(trial, "ok", accuracy=trial.architecture.choices[0] / 100)


def cost(trial: Trial) -> float:
    return 1.0 + trial.architecture.choices[0] * (3 if trial.fidelity == HIGH else 1)


def shares(trial: Trial) -> int:
    return 4 if trial.fidelity == HIGH else 1


def at_once(trial: Trial) -> Future[Evaluation]:
    future: Future[Evaluation] = Future()
    future.set_result(answer(trial))
    return future


@given(st.integers(1, 6), st.integers(0, 2**32 - 1))
@settings(max_examples=15, deadline=None)
def test_answers_may_come_in_any_order(slots: int, seed: int) -> None:
    rng = random.Random(seed)
    threads: list[threading.Thread] = []

    def sometime(trial: Trial) -> Future[Evaluation]:
        future: Future[Evaluation] = Future()
        delay = rng.random() * 0.004

        def finish() -> None:
            time.sleep(delay)
            future.set_result(answer(trial))

        threads.append(threading.Thread(target=finish))
        threads[-1].start()
        return future

    assert drive(propose, slots, sometime, cost) == drive(propose, slots, at_once, cost)
    for thread in threads:
        thread.join()


@given(st.integers(1, 6), st.integers(0, TOTAL), st.booleans())
def test_a_run_taken_up_again_is_the_run_that_was_never_broken(slots: int, cut: int, grouped: bool) -> None:
    options = {"shares": shares, "at_least": min(4, slots)} if grouped else {}
    asked: list[Trial] = []
    whole = drive(propose, slots, at_once, cost, asked=asked.extend, **options)  # type: ignore[arg-type]
    more: list[Trial] = []
    again = drive(propose, slots, at_once, cost, recorded=asked[:cut], asked=more.extend, **options)  # type: ignore[arg-type]
    assert again == whole
    assert asked[:cut] + more == asked


@given(st.integers(4, 12))
def test_trials_take_their_shares_of_the_slots(slots: int) -> None:
    open_shares: list[int] = []

    def watched(history: History, free: int) -> list[Trial]:
        open_shares.append(sum(map(shares, history.pending)))
        assert free >= 4 or not history.pending
        return propose(history, free)

    flushed: list[int] = []
    history = drive(watched, slots, at_once, cost, shares=shares, at_least=4, flush=lambda: flushed.append(1))
    assert len(history.answered) == TOTAL
    assert max(open_shares) <= slots
    assert len(flushed) == len(open_shares)


def test_one_that_needs_more_than_there_is_goes_alone() -> None:
    history = drive(propose, 2, at_once, cost, shares=shares)
    assert len(history.answered) == TOTAL


def test_what_takes_longer_is_seen_later() -> None:
    def two(history: History, free: int) -> list[Trial]:
        return [] if history.asked else [Trial(0, Architecture((9,)), LOW), Trial(1, Architecture((1,)), LOW)]

    history = drive(two, 2, at_once, cost)
    assert isinstance(history, Timeline)
    assert [e.trial.number for e in history.answered] == [1, 0]
    assert history.times == [2.0, 10.0]


def test_stopped_it_asks_nothing_more_and_waits_for_what_is_open() -> None:
    history = drive(propose, 3, at_once, cost, stop=lambda h: len(h.answered) >= 5)
    assert history.pending == []
    assert 5 <= len(history.answered) <= 8


def test_an_error_of_an_answer_comes_out() -> None:
    def broken(trial: Trial) -> Future[Evaluation]:
        future: Future[Evaluation] = Future()
        future.set_exception(OSError("disk full"))
        return future

    with pytest.raises(OSError, match="disk full"):
        drive(propose, 2, broken, cost)
