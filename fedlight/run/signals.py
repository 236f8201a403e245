"""SIGTERM and Ctrl-C: let the round finish."""

import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any


class Signals:
    """Remembers a request to stop; a second one interrupts at once."""

    def __init__(self) -> None:
        self.received = 0

    def __call__(self, number: int, frame: FrameType | None) -> None:
        """The signal handler."""
        if self.received:
            raise KeyboardInterrupt if number == signal.SIGINT else SystemExit(128 + number)
        self.received = number

    def raise_received(self, number: int) -> None:
        """Raise what an unhandled signal would have raised: KeyboardInterrupt, or SystemExit with its exit code."""
        if number == signal.SIGINT:
            raise KeyboardInterrupt
        if number:
            raise SystemExit(128 + number)


@contextmanager
def deferred_signals(active: bool = True) -> Iterator[Signals]:
    """Catch SIGINT and SIGTERM inside (in the main thread), restore the handlers outside."""
    signals = Signals()
    if not active or threading.current_thread() is not threading.main_thread():
        yield signals
        return
    before: dict[int, Any] = {number: signal.signal(number, signals) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield signals
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def exit_by_signal(number: int) -> None:
    """Let the process die by a signal instead of leaving with a code: whoever waits for it sees that it was stopped."""
    if "wandb" in sys.modules:
        sys.modules["wandb"].teardown(exit_code=0)  # a run that was stopped on purpose has not failed
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    signal.signal(number, signal.SIG_DFL)
    os.kill(os.getpid(), number)
