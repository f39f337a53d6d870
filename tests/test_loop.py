"""The virtual clock: the same history whatever real workers do, and wherever a run was killed."""

import random
import threading
import time
from concurrent.futures import Future

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.search.loop import drive
from engine.trial import Architecture, Evaluation, Fidelity, Trial

LOW, FULL = Fidelity("low", epochs=1), Fidelity("full", epochs=7)


def cost(trial):
    return trial.fidelity.cost() * (1 + trial.architecture.choices[0] % 5)


def answer(trial):
    return Evaluation(trial, "ok", (trial.architecture.choices[0] * 37 % 101) / 101, seconds=cost(trial))


def policy(total):
    """Depends on everything in the history, its order and what is pending; waits now and then."""

    def propose(history, slots):
        if history.asked >= total or (history.pending and len(history.answered) % 4 == 3):
            return []
        seen = sum((i + 1) * e.accuracy for i, e in enumerate(history.answered)) + len(history.pending)
        wanted = min(slots, total - history.asked, 1 + int(seen * 10) % 3)
        kinds = (LOW, FULL) if history.asked % 3 else (LOW, LOW)
        return [
            Trial(history.asked + i, Architecture((int(seen * 1000) % 50 + i,)), kinds[i % 2]) for i in range(wanted)
        ]

    return propose


def at_once(trial):
    future = Future()
    future.set_result(answer(trial))
    return future


def test_what_a_study_brought_is_known_to_what_is_asked_beside_it():
    """A record without `seen` that the policy would not have asked: nothing of it is asked again."""
    members = [Architecture((i,)) for i in range(8)]

    def propose(history, slots):
        asked = {e.trial.architecture for e in history.answered} | {t.architecture for t in history.pending}
        free = [one for one in members if one not in asked]
        return [Trial(history.asked + i, one, LOW) for i, one in enumerate(free[:slots])]

    brought = [Trial(0, members[5], LOW), Trial(1, members[2], LOW), Trial(2, members[7], LOW)]
    history = drive(propose, 4, at_once, cost, recorded=brought)
    assert [e.trial for e in history.answered if e.trial.number < 3] == brought
    assert sorted(e.trial.architecture.choices for e in history.answered) == [(i,) for i in range(8)]


@settings(deadline=None, max_examples=80)
@given(st.integers(1, 12), st.integers(1, 6), st.integers(0, 20))
def test_what_began_with_a_study_and_was_killed_anywhere_decides_the_same(count, slots, cut):
    """What a study brought has no `seen`; nothing that was asked later is asked beside it."""
    propose = policy(count + 12)
    brought = [Trial(i, Architecture((30 - i,)), FULL if i % 3 == 2 else LOW) for i in range(count)]
    asked, seen, later = [], [], []

    def ask(trials, visible):
        asked.extend(trials)
        seen.extend([visible] * len(trials))

    unsaid = [-1] * count
    want = drive(propose, slots, at_once, cost, brought, asked=ask, seen=unsaid)
    recorded, known = [*brought, *asked[:cut]], [*unsaid, *seen[:cut]]
    got = drive(propose, slots, at_once, cost, recorded, seen=known, asked=lambda trials, _: later.extend(trials))
    assert (got.answered, got.times) == (want.answered, want.times)
    assert asked[:cut] + later == asked


def plain(total, slots):
    return drive(policy(total), slots, at_once, cost)


@settings(deadline=None, max_examples=40)
@given(st.integers(1, 25), st.integers(1, 6), st.integers(0, 2**32))
def test_order_and_delay_of_real_answers_change_nothing(total, slots, seed):
    chance = random.Random(seed)  # hypothesis' own is not for other threads
    want, waiting, lock = plain(total, slots), [], threading.Lock()
    done = threading.Event()

    def submit(trial):
        future = Future()
        with lock:
            waiting.append((trial, future))
        return future

    def work():
        while not done.is_set():
            with lock:
                item = waiting.pop(chance.randrange(len(waiting))) if waiting else None
            if item:
                item[1].set_result(answer(item[0]))
            else:
                time.sleep(1e-4)

    worker = threading.Thread(target=work, daemon=True)
    worker.start()
    got = drive(policy(total), slots, submit, cost)
    done.set()
    worker.join()
    assert (got.answered, got.times) == (want.answered, want.times)


@settings(deadline=None, max_examples=80)
@given(st.integers(1, 25), st.integers(1, 6), st.integers(0, 25))
def test_killed_anywhere_and_resumed_it_decides_the_same(total, slots, cut):
    asked = []
    want = drive(policy(total), slots, at_once, cost, asked=lambda trials, seen: asked.extend(trials))
    recorded, later = asked[:cut], []
    got = drive(policy(total), slots, at_once, cost, recorded=recorded, asked=lambda trials, seen: later.extend(trials))
    assert (got.answered, got.times) == (want.answered, want.times)
    assert recorded + later == asked


@settings(deadline=None, max_examples=80)
@given(st.integers(1, 25), st.integers(1, 6), st.integers(0, 25))
def test_decisions_that_the_record_shows_whole_are_not_made_again(total, slots, cut):
    asked, seen, calls = [], [], []
    propose = policy(total)

    def ask(trials, count):
        asked.extend(trials)
        seen.extend([count] * len(trials))

    def counted(history, free):
        calls.append(len(history.answered))
        return propose(history, free)

    want = drive(propose, slots, at_once, cost, asked=ask)
    got = drive(counted, slots, at_once, cost, recorded=asked[:cut], seen=seen[:cut])
    assert (got.answered, got.times) == (want.answered, want.times)
    last = seen[:cut][-1] if cut and seen else 0
    assert all(count >= last for count in calls)


@settings(deadline=None, max_examples=80)
@given(st.integers(1, 25), st.integers(1, 4), st.integers(1, 6), st.integers(0, 25))
def test_continued_on_more_workers_the_record_holds_and_then_they_all_work(total, slots, more, cut):
    asked, seen, later, open_at_once = [], [], [], []

    def ask(trials, count):
        asked.extend(trials)
        seen.extend([count] * len(trials))

    def propose(history, free):
        open_at_once.append(len(history.pending) + free)
        return policy(total)(history, free)

    drive(policy(total), slots, at_once, cost, asked=ask)
    got = drive(
        propose, slots + more, at_once, cost, asked[:cut], seen=seen[:cut], asked=lambda trials, _: later.extend(trials)
    )
    assert sorted(e.trial.number for e in got.answered) == list(range(total))
    assert {e.trial.number: e.trial for e in got.answered} == {t.number: t for t in [*asked[:cut], *later]}
    assert got.times == sorted(got.times)
    assert set(open_at_once) <= {slots + more}


def test_the_record_wins_where_the_policy_now_says_otherwise():
    asked = []
    drive(policy(8), 2, at_once, cost, asked=lambda trials, seen: asked.extend(trials))
    other = [Trial(t.number, Architecture((t.architecture.choices[0] + 1,)), t.fidelity) for t in asked[:3]]
    history = drive(policy(8), 2, at_once, cost, recorded=other)
    by_number = {e.trial.number: e.trial for e in history.answered}
    assert [by_number[i] for i in range(3)] == other
    assert sorted(by_number) == list(range(len(by_number)))


def test_recorded_trials_are_all_asked_even_if_the_policy_has_no_more_to_ask():
    asked = []
    drive(policy(6), 2, at_once, cost, asked=lambda trials, seen: asked.extend(trials))
    history = drive(lambda history, slots: [], 2, at_once, cost, recorded=asked)
    assert sorted(e.trial.number for e in history.answered) == list(range(len(asked)))


@settings(deadline=None, max_examples=40)
@given(st.integers(1, 30), st.integers(1, 6))
def test_no_more_is_pending_than_there_are_workers_and_time_never_runs_back(total, slots):
    open_at_once = []

    def propose(history, free):
        open_at_once.append(len(history.pending) + free)
        return policy(total)(history, free)

    history = drive(propose, slots, at_once, cost)
    assert max(open_at_once) <= slots
    assert history.times == sorted(history.times)
    assert not history.pending
    assert sum(map(cost, (e.trial for e in history.answered))) <= slots * history.now + 1e-9


def test_one_worker_takes_the_sum_of_the_costs():
    history = plain(12, 1)
    assert history.now == pytest.approx(sum(cost(e.trial) for e in history.answered))


def test_once_stopped_nothing_is_asked_and_what_runs_is_waited_for():
    history = drive(policy(50), 3, at_once, cost, stop=lambda h: len(h.answered) >= 5)
    assert 5 <= len(history.answered) <= 7
    assert not history.pending


def test_an_interrupt_leaves_the_loop():
    def submit(trial):
        future = at_once(trial)
        if trial.number == 2:
            future.result = lambda timeout=None: (_ for _ in ()).throw(KeyboardInterrupt)
        return future

    with pytest.raises(KeyboardInterrupt):
        drive(policy(10), 2, submit, cost)


def test_ties_are_broken_by_number():
    def propose(history, slots):
        return [Trial(i, Architecture((0,)), LOW) for i in range(3)] if not history.asked else []

    history = drive(propose, 3, at_once, lambda trial: 1.0)
    assert [e.trial.number for e in history.answered] == [0, 1, 2]
