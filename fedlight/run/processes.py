"""What ends processes: a signal, which lets the round finish, or the death of another one, which the rest explain."""

import os
import signal
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

from fedlight.run.context import RunContext

_PATIENCE_S = 5.0
_children: list["subprocess.Popen[bytes]"] = []  # of the program: a second fit goes on with those of the first


def watch_children(run: RunContext) -> Callable[[], None]:
    """Watch the processes that Fabric has started, in its place: it would kill this one and not say how to go on.

    Returns:
        A function that ends the watch.
    """
    started = getattr(getattr(run.fabric.strategy, "launcher", None), "procs", [])
    _children.extend(started)
    started.clear()
    ended = threading.Event()

    def look() -> None:
        while not ended.wait(0.5):
            # The main thread finds out by itself when it next waits for the others, unless it waits for ever.
            if any(child.poll() for child in _children) and not ended.wait(_PATIENCE_S):
                print(f"fedlight: error: {_what_died(run)}", file=sys.stderr, flush=True)
                for child in _children:
                    child.kill()
                os._exit(1)

    if _children:
        threading.Thread(target=look, daemon=True).start()
    return ended.set


def lost_process(run: RunContext, error: BaseException) -> str | None:
    """What is to be said in place of an error that torch.distributed raised; None for any other error."""
    if not isinstance(error, RuntimeError) or not raised_in(error).startswith("torch.distributed"):
        return None
    end = time.monotonic() + 2
    while _children and not any(child.poll() for child in _children) and time.monotonic() < end:
        time.sleep(0.05)
    return _what_died(run)


def raised_in(error: BaseException) -> str:
    """The module that an error was raised in."""
    frames = [frame for frame, _ in traceback.walk_tb(error.__traceback__)]
    return str(frames[-1].f_globals.get("__name__", "")) if frames else ""


def _what_died(run: RunContext) -> str:
    fabric, last = run.fabric, None if run.folder is None else run.folder.checkpoint("last")
    who, how = f"another of the {fabric.world_size} processes", "has ended; if it said why, that is above"
    for rank, child in enumerate(_children, 1):
        if code := child.poll():
            who = f"process {rank} of {fabric.world_size} (pid {child.pid})"
            how = f"has ended with exit code {code}; what it said is above"
            if code < 0:
                how = f"was killed by {signal.Signals(-code).name}" + (", perhaps for its memory" if code == -9 else "")
            break
    go_on = f"continue with ckpt_path={last}" if last is not None and last.exists() else "there is no checkpoint yet"
    return f"{who} {how}. This one, process {fabric.global_rank}, cannot go on without it: {go_on}."


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
