"""The loop on its virtual clock: the same history however real workers behave, and wherever a run was killed."""

import random
import threading
import time
from concurrent.futures import Future

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.search.loop import Recorded, VirtualWorkers, drive
from engine.trial import Architecture, Evaluation, Fidelity, Trial

LOW, FULL = Fidelity("low", epochs=1), Fidelity("full", epochs=7)


def cost(trial):
    return trial.fidelity.cost() * (1 + trial.architecture.choices[0] % 5)


def answer(trial):
    return Evaluation(trial, "ok", (trial.architecture.choices[0] * 37 % 101) / 101, seconds=cost(trial))


def method(total):
    """Proposals that depend on the whole history, its order and what is pending, and that now and then wait."""

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


class AtOnce:
    """Answers every trial at once."""

    def submit(self, trial):
        future = Future()
        future.set_result(answer(trial))
        return future

    def flush(self):
        return None


class Asked:
    """The trials that a run asked for, each with the number of evaluations that were visible then."""

    def __init__(self):
        self.trials, self.seen = [], []

    def __call__(self, trials, seen):
        self.trials.extend(trials)
        self.seen.extend([seen] * len(trials))

    def recorded(self, cut):
        return Recorded(self.trials[:cut], self.seen[:cut])


def workers(slots):
    return VirtualWorkers(slots, cost)


def test_architectures_imported_from_a_study_are_not_asked_for_again():
    """Imported trials have no `seen`, and the method would not have asked for them."""
    members = [Architecture((i,)) for i in range(8)]

    def propose(history, slots):
        asked = {e.trial.architecture for e in history.answered} | {t.architecture for t in history.pending}
        free = [one for one in members if one not in asked]
        return [Trial(history.asked + i, one, LOW) for i, one in enumerate(free[:slots])]

    imported = [Trial(0, members[5], LOW), Trial(1, members[2], LOW), Trial(2, members[7], LOW)]
    history = drive(propose, AtOnce(), workers(4), Recorded(imported))
    assert [e.trial for e in history.answered if e.trial.number < 3] == imported
    assert sorted(e.trial.architecture.choices for e in history.answered) == [(i,) for i in range(8)]


@settings(deadline=None, max_examples=80)
@given(st.integers(1, 12), st.integers(1, 6), st.integers(0, 20))
def test_a_search_that_began_with_a_study_decides_the_same_wherever_it_was_killed(count, slots, cut):
    propose = method(count + 12)
    imported = [Trial(i, Architecture((30 - i,)), FULL if i % 3 == 2 else LOW) for i in range(count)]
    first, later, unknown = Asked(), Asked(), [-1] * count
    want = drive(propose, AtOnce(), workers(slots), Recorded(imported, unknown), first)
    record = Recorded([*imported, *first.trials[:cut]], [*unknown, *first.seen[:cut]])
    got = drive(propose, AtOnce(), workers(slots), record, later)
    assert (got.answered, got.times) == (want.answered, want.times)
    assert first.trials[:cut] + later.trials == first.trials


@settings(deadline=None, max_examples=40)
@given(st.integers(1, 25), st.integers(1, 6), st.integers(0, 2**32))
def test_the_order_and_delay_of_real_answers_change_nothing(total, slots, seed):
    chance = random.Random(seed)  # hypothesis' own generator is not thread-safe
    want, waiting, lock = drive(method(total), AtOnce(), workers(slots)), [], threading.Lock()
    done = threading.Event()

    class Later(AtOnce):
        def submit(self, trial):
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
    got = drive(method(total), Later(), workers(slots))
    done.set()
    worker.join()
    assert (got.answered, got.times) == (want.answered, want.times)


@settings(deadline=None, max_examples=80)
@given(st.integers(1, 25), st.integers(1, 6), st.integers(0, 25))
def test_killed_anywhere_and_resumed_it_decides_the_same(total, slots, cut):
    """Here a record without `seen`, so that every decision is made again."""
    first, later = Asked(), Asked()
    want = drive(method(total), AtOnce(), workers(slots), asked=first)
    got = drive(method(total), AtOnce(), workers(slots), Recorded(first.trials[:cut]), later)
    assert (got.answered, got.times) == (want.answered, want.times)
    assert first.trials[:cut] + later.trials == first.trials


@settings(deadline=None, max_examples=80)
@given(st.integers(1, 25), st.integers(1, 6), st.integers(0, 25))
def test_decisions_that_the_record_holds_completely_are_not_made_again(total, slots, cut):
    asked, calls = Asked(), []
    propose = method(total)

    def counted(history, free):
        calls.append(len(history.answered))
        return propose(history, free)

    want = drive(propose, AtOnce(), workers(slots), asked=asked)
    got = drive(counted, AtOnce(), workers(slots), asked.recorded(cut))
    assert (got.answered, got.times) == (want.answered, want.times)
    last = asked.seen[:cut][-1] if cut and asked.seen else 0
    assert all(count >= last for count in calls)


@settings(deadline=None, max_examples=80)
@given(st.integers(1, 25), st.integers(1, 4), st.integers(1, 6), st.integers(0, 25))
def test_resumed_on_more_workers_the_record_holds_and_all_of_them_work(total, slots, more, cut):
    first, later, open_at_once = Asked(), Asked(), []

    def propose(history, free):
        open_at_once.append(len(history.pending) + free)
        return method(total)(history, free)

    drive(method(total), AtOnce(), workers(slots), asked=first)
    got = drive(propose, AtOnce(), workers(slots + more), first.recorded(cut), later)
    assert sorted(e.trial.number for e in got.answered) == list(range(total))
    assert {e.trial.number: e.trial for e in got.answered} == {
        trial.number: trial for trial in [*first.trials[:cut], *later.trials]
    }
    assert got.times == sorted(got.times)
    assert set(open_at_once) <= {slots + more}


def test_the_record_wins_where_the_method_now_disagrees():
    asked = Asked()
    drive(method(8), AtOnce(), workers(2), asked=asked)
    other = [Trial(t.number, Architecture((t.architecture.choices[0] + 1,)), t.fidelity) for t in asked.trials[:3]]
    history = drive(method(8), AtOnce(), workers(2), Recorded(other))
    by_number = {e.trial.number: e.trial for e in history.answered}
    assert [by_number[i] for i in range(3)] == other
    assert sorted(by_number) == list(range(len(by_number)))


def test_all_recorded_trials_are_submitted_even_if_the_method_has_nothing_more_to_ask():
    asked = Asked()
    drive(method(6), AtOnce(), workers(2), asked=asked)
    history = drive(lambda history, slots: [], AtOnce(), workers(2), Recorded(asked.trials))
    assert sorted(e.trial.number for e in history.answered) == list(range(len(asked.trials)))


@settings(deadline=None, max_examples=40)
@given(st.integers(1, 30), st.integers(1, 6))
def test_no_more_is_pending_than_there_are_workers_and_time_never_runs_backwards(total, slots):
    open_at_once = []

    def propose(history, free):
        open_at_once.append(len(history.pending) + free)
        return method(total)(history, free)

    history = drive(propose, AtOnce(), workers(slots))
    assert max(open_at_once) <= slots
    assert history.times == sorted(history.times)
    assert not history.pending
    assert sum(map(cost, (e.trial for e in history.answered))) <= slots * history.now + 1e-9


def test_one_worker_takes_the_sum_of_the_costs():
    history = drive(method(12), AtOnce(), workers(1))
    assert history.now == pytest.approx(sum(cost(e.trial) for e in history.answered))


def test_once_stopped_nothing_is_asked_and_running_trials_are_waited_for():
    history = drive(method(50), AtOnce(), workers(3), stop=lambda h: len(h.answered) >= 5)
    assert 5 <= len(history.answered) <= 7
    assert not history.pending


def test_an_interrupt_leaves_the_loop():
    class Interrupted(AtOnce):
        def submit(self, trial):
            future = super().submit(trial)
            if trial.number == 2:
                future.result = lambda timeout=None: (_ for _ in ()).throw(KeyboardInterrupt)
            return future

    with pytest.raises(KeyboardInterrupt):
        drive(method(10), Interrupted(), workers(2))


def test_ties_are_broken_by_number():
    def propose(history, slots):
        return [Trial(i, Architecture((0,)), LOW) for i in range(3)] if not history.asked else []

    history = drive(propose, AtOnce(), VirtualWorkers(3, lambda trial: 1.0))
    assert [e.trial.number for e in history.answered] == [0, 1, 2]
