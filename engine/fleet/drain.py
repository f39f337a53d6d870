"""Being told to stop: by a signal, or by the time limit of the job that this process runs in."""

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
# A signal that comes in the moment before a thread begins to wait does not wake it: Python's handler would run with the
# next event only. So a wait of the main thread looks up every so many seconds.
LOOK_S = 0.5


def answer_of(future: Future[T]) -> T:
    """What a future comes to. The main thread hears signals while it waits."""
    while not future.done():
        wait([future], LOOK_S)
    return future.result()


class Drain:
    """Whether to stop. Within `with`, signals ask for it, see `DRAINING`, and so does the end of a time limit.

    The first one has `order` called, see `tell`; Drained is raised in the main thread `grace_s` seconds later, if it
    has not come to its end by then. A second INT or TERM stops at once. HUP and INT stay ignored where they were: by
    nohup, by a shell for what it starts in the background. The time limit is `remaining_s` seconds from now, less the
    grace; None is none.
    """

    def __init__(self, grace_s: float, remaining_s: float | None) -> None:
        self._grace, self._remaining = grace_s, remaining_s
        self._order: Callable[[], None] | None = None
        self._reason, self._over = "", False
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Drain:
        if threading.current_thread() is not threading.main_thread():
            return self  # Python lets only the main thread hear signals
        for number in (*DRAINING, signal.SIGALRM):
            if number in (signal.SIGHUP, signal.SIGINT) and signal.getsignal(number) == signal.SIG_IGN:
                continue  # not meant for this process
            self._before[number] = signal.signal(number, self._hear)
        if self._remaining is not None:
            _alarm(self._remaining - self._grace)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.rest()
        for number, handler in self._before.items():
            signal.signal(number, handler)

    @property
    def asked(self) -> bool:
        return bool(self._reason)

    def tell(self, order: Callable[[], None]) -> None:
        """What passes the order on to the workers; called at once if it has been given already."""
        self._order = order
        if self.asked:
            order()

    def settle(self, futures: Iterable[Future[Any]]) -> None:
        """Waits for all of them, whatever they end with, as far as the grace goes."""
        with contextlib.suppress(Drained):
            for future in futures if not self._over else ():
                while not future.done():
                    wait([future], LOOK_S)

    def rest(self) -> None:
        """The time is no longer looked at: what comes now must not be cut short."""
        if self._before:
            signal.setitimer(signal.ITIMER_REAL, 0)

    def end(self) -> Drained:
        return Drained(f"stopped by {self._reason}; the same command continues")

    def _hear(self, number: int, frame: FrameType | None) -> None:
        """Runs between any two steps of the main thread, so it takes no lock, as printing would."""
        if not self.asked:
            self._reason = "the time limit" if number == signal.SIGALRM else signal.Signals(number).name
            _alarm(self._grace)
            text = f"{self._reason}: nothing new is started; what runs has {self._grace:g} s to finish\n"
            with contextlib.suppress(OSError):  # nobody reads stderr, or the run folder is gone: the grace still ends
                os.write(2, text.encode())
                if self._order is not None:
                    self._order()
        elif number == signal.SIGALRM:
            self._over = True
            raise self.end()
        elif number == signal.SIGINT:
            raise KeyboardInterrupt
        elif number == signal.SIGTERM:
            raise SystemExit(128 + number)


def _alarm(seconds: float) -> None:
    signal.setitimer(signal.ITIMER_REAL, max(0.001, seconds))
