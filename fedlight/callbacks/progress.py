"""Progress over rounds."""

import sys
import time
from typing import Any

from fedlight.callbacks._rounds import RoundCallback

_SHOWN = {"val/accuracy": "accuracy", "val/loss": "val loss", "train/loss": "loss"}


class RoundProgress(RoundCallback):
    """One bar over the rounds, with accuracy, loss and time left; plain lines where there is no terminal or notebook.

    Args:
        every_n_seconds: at most one plain line in so many seconds; the first and the last round always have one.
    """

    optional_hooks = ("on_train_start", "on_round_end", "on_train_end")

    def __init__(self, every_n_seconds: float = 2.0) -> None:
        self.every_n_seconds = every_n_seconds
        self._bar: Any = None
        self._line: Any = None
        self._shown = list(_SHOWN)
        self._printed = float("-inf")

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Show an empty bar on a terminal."""
        self._started, self._first = time.monotonic(), trainer.current_round
        self._line = _notebook_line() if trainer.is_global_zero else None
        if not trainer.is_global_zero or not sys.stdout.isatty():
            return
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        console = Console()
        self._shown = list(_SHOWN)[: 3 if (wide := console.width >= 80) else 1]  # round and time have to be seen whole
        columns = (TextColumn("round"), BarColumn(40 if wide else 6), MofNCompleteColumn(), TimeRemainingColumn())
        self._bar = Progress(*columns, TextColumn("{task.fields[metrics]}"), console=console)
        self._task = self._bar.add_task("round", total=trainer.max_rounds, completed=trainer.current_round, metrics="")
        self._bar.start()

    def on_round_end(self, trainer: Any, pl_module: Any) -> None:
        """Advance by a round."""
        if not trainer.is_global_zero:
            return
        done, total = trainer.current_round, trainer.max_rounds
        known = trainer.callback_metrics
        text = "  ".join(f"{_SHOWN[name]} {float(known[name]):.4f}" for name in self._shown if name in known)
        if self._bar is not None:
            self._bar.update(self._task, completed=done, metrics=text)
            return
        now = time.monotonic()
        every = self.every_n_seconds if self._line is None else min(0.2, self.every_n_seconds)
        if now - self._printed >= every or done == total or done == self._first + 1:
            self._printed = now
            left = (now - self._started) / (done - self._first) * (total - done)
            line = f"round {done}/{total}  {text}  {left:.0f} s left"
            if self._line is None:
                print(line, flush=True)
                return
            html = f'<progress value="{done}" max="{total}"></progress> <code>{line}</code>'
            self._line.update({"text/plain": line, "text/html": html}, raw=True)

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        """Leave the last state of the bar on the screen."""
        if self._bar is not None:
            self._bar.stop()
            self._bar = None

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        """Leave the last state of the bar on the screen."""
        self.on_train_end(trainer, pl_module)

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_bar": None, "_line": None}


def _notebook_line() -> Any:
    """A line of a notebook's output that can be changed; None elsewhere. It needs no widgets."""
    if "ipykernel" not in sys.modules:
        return None
    from IPython import get_ipython
    from IPython.display import display

    kernel = hasattr(get_ipython(), "kernel")
    return display({"text/plain": "round"}, raw=True, display_id=True) if kernel else None  # type: ignore[no-untyped-call]
