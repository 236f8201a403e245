"""A client's local steps, cut into pieces that can be recorded and used again."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from fedlight.engines.schedule import Values

LONGEST = 32
"""At most so many local steps are recorded as one piece of work."""


@dataclass(frozen=True)
class Segment:
    """Consecutive local steps whose batches have the same sizes and whose hyperparameters are equal.

    Attributes:
        begin: where its samples begin in the client's order.
        sizes: the micro-batches of each step.
        steps: how many.
        values: the optimizer's hyperparameters.
    """

    begin: int
    sizes: tuple[int, ...]
    steps: int
    values: Values

    @property
    def samples(self) -> int:
        """Samples of all its steps."""
        return self.steps * sum(self.sizes)


def segments(steps: Sequence[tuple[int, tuple[int, ...]]], values: Sequence[Values]) -> list[Segment]:
    """Cut a client's steps into segments whose lengths are powers of two, the longest first.

    So few different lengths have to be recorded: ten steps are eight and two, and a client with eleven adds one.

    Args:
        steps: where each step's samples begin, and its micro-batches.
        values: the hyperparameters of each step.
    """
    runs: list[Segment] = []
    for (begin, sizes), now in zip(steps, values, strict=True):
        last = runs[-1] if runs else None
        if last is not None and last.sizes == sizes and last.values is now and last.begin + last.samples == begin:
            runs[-1] = replace(last, steps=last.steps + 1)
        else:
            runs.append(Segment(begin, sizes, 1, now))
    return [piece for run in runs for piece in _cut(run)]


def _cut(run: Segment) -> Iterator[Segment]:
    begin, left = run.begin, run.steps
    while left:
        steps = min(LONGEST, 1 << (left.bit_length() - 1))
        yield replace(run, begin=begin, steps=steps)
        begin, left = begin + steps * sum(run.sizes), left - steps
