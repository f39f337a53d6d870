"""Stopping gracefully: on a signal, or before the time limit of the batch job that this process runs in."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from collections.abc import Callable, Iterable
from concurrent.futures import Future, wait
from types import FrameType, TracebackType
from typing import Any, TypeVar

from engine.fleet.processes import DRAINING
from engine.trial import Drained

T = TypeVar("T")
# A signal that arrives just before a thread starts to wait does not wake it: Python would run the handler only at the
# next event. So the main thread interrupts its wait at this interval, in seconds.
POLL_S = 0.5


def answer_of(future: Future[T]) -> T:
    """The result of a future. The main thread handles signals while it waits."""
    while not future.done():
        wait([future], POLL_S)
    return future.result()


class Drain:
    """A request to stop. Inside `with`, the signals in `DRAINING` make one, and so does a time limit.

    The first request calls the function given to `on_drain`. Drained is raised in the main thread `grace_s` seconds
    later, unless the block has ended by then. A second INT or TERM stops at once. HUP and INT stay ignored if nohup, or
    a shell that started this process in the background, had them ignored. The time limit makes its request `grace_s`
    before `remaining_s` seconds from now; None means no limit.
    """

    def __init__(self, grace_s: float, remaining_s: float | None) -> None:
        self._grace, self._remaining = grace_s, remaining_s
        self._on_drain: Callable[[], None] | None = None
        self._reason, self._over = "", False
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Drain:
        if threading.current_thread() is not threading.main_thread():
            return self  # only the main thread of Python receives signals
        for number in (*DRAINING, signal.SIGALRM):
            if number in (signal.SIGHUP, signal.SIGINT) and signal.getsignal(number) == signal.SIG_IGN:
                continue  # not meant for this process
            self._before[number] = signal.signal(number, self._handle)
        if self._remaining is not None:
            _alarm(self._remaining - self._grace)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.cancel_alarm()
        for number, handler in self._before.items():
            signal.signal(number, handler)

    @property
    def asked(self) -> bool:
        return bool(self._reason)

    def on_drain(self, notify: Callable[[], None]) -> None:
        """Sets the function that tells the workers to stop; it is called at once if the request has already come."""
        self._on_drain = notify
        if self.asked:
            notify()

    def settle(self, futures: Iterable[Future[Any]]) -> None:
        """Waits for all futures, whatever their outcome, until the grace period ends."""
        with contextlib.suppress(Drained):
            for future in futures if not self._over else ():
                while not future.done():
                    wait([future], POLL_S)

    def cancel_alarm(self) -> None:
        """Cancels the alarm of the time limit and the grace period: what follows must not be cut short."""
        if self._before:
            signal.setitimer(signal.ITIMER_REAL, 0)

    def drained(self) -> Drained:
        return Drained(f"interrupted by {self._reason}; run the same command again to resume")

    def _handle(self, number: int, frame: FrameType | None) -> None:
        """May run between any two steps of the main thread, so it must not take a lock, as printing would."""
        if not self.asked:
            self._reason = "the time limit" if number == signal.SIGALRM else signal.Signals(number).name
            _alarm(self._grace)
            text = f"{self._reason}: starting nothing new; running trials have {self._grace:g} s to finish\n"
            with contextlib.suppress(OSError):  # stderr or the run folder may be gone; the grace period still ends
                os.write(2, text.encode())
                if self._on_drain is not None:
                    self._on_drain()
        elif number == signal.SIGALRM:
            self._over = True
            raise self.drained()
        elif number == signal.SIGINT:
            raise KeyboardInterrupt
        elif number == signal.SIGTERM:
            raise SystemExit(128 + number)


def _alarm(seconds: float) -> None:
    signal.setitimer(signal.ITIMER_REAL, max(0.001, seconds))
