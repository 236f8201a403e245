"""Where a round's seconds go: the ``time/`` columns, and Lightning's profilers."""

import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.profilers import AdvancedProfiler, PassThroughProfiler, Profiler, PyTorchProfiler, SimpleProfiler

from fedlight.run.folder import optional

PROFILERS: dict[str, type[Profiler]] = {
    "simple": SimpleProfiler,
    "advanced": AdvancedProfiler,
    "pytorch": PyTorchProfiler,
}


def make_profiler(wanted: Profiler | str | None) -> Profiler:
    """The profiler of ``trainer.profiler``.

    Raises:
        MisconfigurationException: if there is none of that name.
    """
    if isinstance(wanted, Profiler):
        return wanted
    if wanted is None:
        return PassThroughProfiler()
    if str(wanted).lower() not in PROFILERS:
        raise MisconfigurationException(
            f"trainer.profiler={wanted!r} must be one of {[*PROFILERS]}, a Profiler of Lightning, or null."
        )
    return PROFILERS[wanted.lower()]()


# Lightning's PyTorchProfiler counts actions of this name: its schedule (wait, warm up, record) is one of rounds here.
_ACTIONS = {"train": "clients.training_step"}


class RoundClock:
    """Seconds of a round's parts, each also an action of the profiler.

    A part that trains or evaluates on a CUDA device ends when the device has done its work.

    Args:
        profiler: told when each part begins and ends.
        device: where the work is done.
    """

    def __init__(self, profiler: Profiler, device: torch.device) -> None:
        self.profiler, self._cuda = profiler, device if device.type == "cuda" else None
        self._ended: float | None = None
        self.begin()

    def begin(self) -> None:
        """A round begins."""
        self._began = time.perf_counter()
        self._parts: dict[str, float] = {}

    @contextmanager
    def __call__(self, part: str) -> Iterator[None]:
        """Measure what is done inside as ``time/<part>_s``."""
        action = f"[FederatedTrainer]{_ACTIONS.get(part, part)}"
        self.profiler.start(action)
        began = time.perf_counter()
        try:
            yield
            if self._cuda is not None:
                torch.cuda.synchronize(self._cuda)
        finally:
            self._parts[part] = time.perf_counter() - began
            self.profiler.stop(action)

    def metrics(self) -> dict[str, float]:
        """Seconds of the parts, of the round until now, and of what came after the round before (``time/save_s``)."""
        before, self._ended = self._ended, time.perf_counter()
        out = {f"time/{part}_s": seconds for part, seconds in self._parts.items()}
        saving = 0.0 if before is None else self._began - before
        return {**out, "time/save_s": saving, "time/round_s": self._ended - self._began}


def start_profiler(profiler: Profiler, folder: Path | None, rank: int, cleanup: ExitStack) -> Profiler:
    """Begin to profile a fit; at its end the report goes to ``<folder>/fit-profile-<rank>.txt``, or to the log."""
    if isinstance(profiler, PassThroughProfiler):  # its report would be an empty file
        return profiler
    if profiler.filename is None and folder is not None:
        profiler.filename = "profile"
    profiler.setup("fit", rank, None if folder is None else str(folder))
    cleanup.enter_context(optional(profiler, "trainer.profiler's report"))
    cleanup.callback(profiler.teardown, "fit")
    cleanup.callback(profiler.describe)
    return profiler
