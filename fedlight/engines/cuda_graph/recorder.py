"""Recording work once and replaying it, as a CUDA graph; a client's local steps in pieces that can be recorded."""

import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch

from fedlight.engines.hyperparameters import Values

Work = Callable[[], None]


class Recorder:
    """Records the work of one slot as CUDA graphs, on a stream and with a random state of its own.

    What is recorded reads and writes tensors that stay where they are.

    Slots that are captured on one stream share the workspace of the matrix library, and corrupt each other's results
    when they are replayed side by side. The random state has to be a slot's own for the same reason: a replay
    overwrites the seed and offset that running graphs of the same state still read.
    """

    WARM_UPS = 2
    """Runs before a capture: libraries choose their kernels and allocate workspaces in the first ones."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        index: int | None = device.index  # torch's own annotation has no None
        self._default = torch.cuda.default_generators[torch.cuda.current_device() if index is None else index]
        self._generator = self._default.clone_state()
        self._pool: Any = None

    def record(self, work: Work, warm_up: Work | None = None) -> Work:
        """Record the work, which is done as well, and return what does it again: whatever it wrote is written anew.

        ``warm_up`` is the same with less to do, which prepares libraries and memory as well.
        """
        torch.cuda.synchronize(self._device)
        # A capture that fails leaves its stream behind as the current one: the outer context puts the caller's back.
        with self._own_random_state(), torch.cuda.stream(self._stream):
            for _ in range(self.WARM_UPS):
                (warm_up or work)()
            self._stream.synchronize()
            graph = torch.cuda.CUDAGraph()
            # Graphs of a slot run one after the other and leave nothing in their pool that another one reads.
            with torch.cuda.graph(graph, pool=self._pool, stream=self._stream, capture_error_mode="thread_local"):
                work()
        self._pool = graph.pool()
        torch.cuda.synchronize(self._device)
        return graph.replay

    def anew(self, work: Work) -> Work:
        """What does the work as a recording would, with the slot's random numbers, but step by step."""
        return self._own_random_state()(work)

    def seed(self, seed: int) -> None:
        """Seed the slot's random state, which its graphs have captured."""
        self._generator.manual_seed(seed)

    @contextmanager
    def ordered(self) -> Iterator[None]:
        """Work in here goes to the slot's stream: it comes after what the slot was given before."""
        with torch.cuda.stream(self._stream):
            yield

    @contextmanager
    def strict(self) -> Iterator[None]:
        """Work in here fails where it waits for the device."""
        before = torch.cuda.get_sync_debug_mode()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch says that this mode is new
            torch.cuda.set_sync_debug_mode("error")
        try:
            yield
        finally:
            torch.cuda.set_sync_debug_mode(before)

    def begin(self) -> None:
        """The slot's stream waits for the caller's."""
        self._stream.wait_stream(torch.cuda.current_stream(self._device))

    def end(self) -> None:
        """The caller's stream waits for the slot's."""
        torch.cuda.current_stream(self._device).wait_stream(self._stream)

    @contextmanager
    def _own_random_state(self) -> Iterator[None]:
        before = self._default.graphsafe_get_state()
        self._default.graphsafe_set_state(self._generator)
        try:
            yield
        finally:
            self._default.graphsafe_set_state(before)


LONGEST = 32
"""At most so many local steps are recorded as one piece of work."""


@dataclass(frozen=True)
class Segment:
    """Consecutive local steps whose batches have the same sizes and whose hyperparameters are equal."""

    begin: int  # where its samples begin in the client's order
    sizes: tuple[int, ...]  # the micro-batches of each step
    steps: int
    values: Values

    @property
    def samples(self) -> int:
        """Samples of all its steps."""
        return self.steps * sum(self.sizes)


def segments(steps: Sequence[tuple[int, tuple[int, ...]]], values: Sequence[Values]) -> list[Segment]:
    """Cut a client's steps into segments whose lengths are powers of two, the longest first.

    So few different lengths have to be recorded: ten steps are eight and two, and a client with eleven adds one. A step
    is where its samples begin, and its micro-batches.
    """
    pieces, first = list[Segment](), 0
    while first < len(steps):
        (begin, sizes), now = steps[first], values[first]
        samples, count = sum(sizes), 1
        while (at := first + count) < len(steps) and steps[at] == (begin + count * samples, sizes):
            if values[at] is not now:
                break
            count += 1
        pieces += _cut(Segment(begin, sizes, count, now))
        first += count
    return pieces


def _cut(run: Segment) -> Iterator[Segment]:
    begin, left = run.begin, run.steps
    while left:
        steps = min(LONGEST, 1 << (left.bit_length() - 1))
        yield replace(run, begin=begin, steps=steps)
        begin, left = begin + steps * sum(run.sizes), left - steps
